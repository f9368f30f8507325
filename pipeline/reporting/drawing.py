"""How pictures look, and how they become files.

A Figure is drawn in the colours of the light scheme. `to_svg` replaces each colour by a CSS variable of the page, so
that one picture serves both the light and the dark scheme; `to_png` keeps the colours.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

# CSS variable -> (light, dark). `s…`: one for each method; `d…`: an ordered scale, for depths.
PALETTE = {
    "ink": ("#1b1f24", "#e8eaed"),
    "soft": ("#5d6570", "#9ba3ae"),
    "rule": ("#dfe2e6", "#333940"),
    "s0": ("#1f5fb4", "#74aefc"),
    "s1": ("#c4560a", "#f59b52"),
    "s2": ("#0b8069", "#45c4a8"),
    "s3": ("#7d4bb3", "#bd9bf5"),
    "s4": ("#78808a", "#8f98a3"),
    "s5": ("#b42d63", "#f27dab"),
    "s6": ("#77740d", "#cbc24d"),
    "s7": ("#a3271f", "#f4847b"),
    "d0": ("#86b6ea", "#39689e"),
    "d1": ("#4f94d8", "#558dca"),
    "d2": ("#2673c0", "#7db0e6"),
    "d3": ("#12549a", "#abcef5"),
    "d4": ("#093466", "#dbeaff"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
INK, SOFT, RULE = LIGHT["ink"], LIGHT["soft"], LIGHT["rule"]
SERIES = [name for name in PALETTE if re.fullmatch(r"s\d", name)]
DEPTHS = [name for name in PALETTE if re.fullmatch(r"d\d", name)]

STYLE = {
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.left": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, with its size in the page's pixels, of which an SVG has 72 to the inch."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def series_colors(methods: Sequence[str]) -> dict[str, str]:
    """A palette name for each method, by its position in the list."""
    return {method: SERIES[i % len(SERIES)] for i, method in enumerate(methods)}


def over_seconds(axes: Axes) -> None:
    """Set the axes of accuracy over the time of an adaptation."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="seconds for a test group, logarithmic", ylabel="accuracy, %")


def to_svg(figure: Figure, name: str) -> str:
    """Render as one `<svg>` for a page that defines the palette's CSS variables; the bytes are always the same."""
    buffer = io.StringIO()
    # The salt makes ids repeatable, and different for each picture of a page.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    # Keep only the view box: the page sets the size, and HTML needs no namespaces.
    view_box, body = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)', buffer.getvalue(), re.DOTALL).groups()
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    for variable, color in LIGHT.items():
        body = body.replace(color, f"var(--{variable})")
    return f'<svg role="img" aria-label="{name}" {view_box}>{body}'


def to_png(figure: Figure) -> bytes:
    """Render on white at twice the page's resolution; the bytes are always the same."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
