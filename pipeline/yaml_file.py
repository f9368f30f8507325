"""Reads a YAML file of ours: params.yaml, or a study. Whatever is in it, a mistake is one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pudnet.errors import UserError

MOST_VALUES, MOST_LEVELS, MOST_DIGITS = 10_000, 20, 18  # limits of a file (aliases expanded) and its integers


class Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-5 (as `dvc exp run -S` writes it) as a number, and refuses duplicate keys."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Check a mapping's keys before merges are applied."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


FLOAT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping. Raises `UserError`, in one line, for any other file."""
    try:
        with path.open(encoding="utf-8") as file:  # a file, so that errors name it
            raw = yaml.load(file, Loader=Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the project's root") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # PyYAML raises many types of error for values that do not fit their tag
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not YAML ({reason})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of blocks")
    _check_extent(path, raw)
    return raw


def _check_extent(path: Path, raw: Any) -> None:
    """Raise `UserError` if there are too many values to check or print: aliases of aliases can make millions."""
    left, count = [((), raw)], 0
    while left:
        where, value = left.pop()
        count, reason = count + 1, None
        if count > MOST_VALUES or len(where) > MOST_LEVELS:
            reason = f"more than {MOST_VALUES:,} values or {MOST_LEVELS} levels, with aliases expanded"
        elif isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
            reason = f"an integer of more than {MOST_DIGITS} digits"
        if reason:
            raise UserError(": ".join(filter(None, (str(path), ".".join(map(str, where)), reason))))
        if isinstance(value, dict | list | set):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            left += [((*where, key), each) for key, each in inner]
            left += [(where, key) for key in value if isinstance(value, dict)]  # keys too, since errors print them


def check_block(where: str, block: Any, what: str = "a block of keys") -> None:
    """Raise `UserError` unless a value of a YAML file maps names to values; `what` says what it has to be."""
    if not isinstance(block, dict):
        raise UserError(f"{where}: must be {what}, got {block!r}")
    for key in block:
        if not isinstance(key, str):
            raise UserError(f"{where}: {key}: a key must be text; put it in quotes")
