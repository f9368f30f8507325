"""Numbers as pages show them."""

from __future__ import annotations

import pandas as pd


def plus_minus(value: float | None, ci95: float | None = None, sign: str = "") -> str:
    """`95.10 ± 0.30`; `95.10` if there is no interval (a single group); empty if there is no value."""
    if pd.isna(value):
        return ""
    return f"{value:{sign}.2f}" + ("" if pd.isna(ci95) else f" ± {ci95:.2f}")


def duration(milliseconds: float | None) -> str:
    """`0.42 ms`, `62.0 ms`, `249 ms`, `2.14 s`: at most three digits; empty if there is no value."""
    if pd.isna(milliseconds):
        return ""
    value, unit = (milliseconds, "ms") if milliseconds < 1000 else (milliseconds / 1000, "s")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f} {unit}"


def signed(difference: float, ci95: float | None = None) -> str:
    """`+0.50 ± 0.12` or `−0.50 ± 0.12`, with a typographic minus."""
    return plus_minus(difference, ci95, "+").replace("-", "−")
