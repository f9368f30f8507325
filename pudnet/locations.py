"""Finds a trained model: a file, the name of a model that ships with the project, or the URI of a model store."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from pudnet.errors import UserError

PACKAGE = Path(__file__).resolve().parent
IN_WHEEL, IN_REPOSITORY = PACKAGE / "pretrained", PACKAGE.parent / "models" / "pretrained"
SHIPPED = IN_WHEEL if IN_WHEEL.is_dir() else IN_REPOSITORY  # one folder: the wheel is built with the repository's
STORES = "pudnet.stores"  # entry points: a URI's scheme -> a function from the URI to a local path


def shipped() -> dict[str, Path]:
    """The models that ship with the project, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.safetensors"))}


def local_file(location: str | Path) -> Path:
    """The local file for a path, a shipped model's name, or a URI, whose model is fetched from its store.

    `pudnet` itself knows no stores. Other packages (here `pipeline`, for MLflow) register a function for each
    scheme (`models`, `runs`) under the entry points `pudnet.stores`.

    Raises `UserError` if no function is registered for the scheme, or its package is not installed.
    """
    text = str(location)
    scheme, _, rest = text.partition(":")
    if isinstance(location, str) and rest.startswith("/") and len(scheme) > 1:
        found = list(entry_points(group=STORES, name=scheme))
        try:
            fetch = found[0].load()
        except (IndexError, ModuleNotFoundError):  # the wheel names a store of `pipeline`, which is not in it
            reason = f"{text}: nothing is installed that reads {scheme}:/ (the project's set-up installs it)"
            raise UserError(reason) from None
        return fetch(text)
    if text in (known := shipped()):
        return known[text]
    try:
        there = Path(location).exists()
    except OSError:  # a name that no file can have
        there = False
    if there or Path(location).suffix:
        return Path(location)
    names = ", ".join(known) or "none"
    raise UserError(f"{text[:200]}: no such file, nor a model that ships with the project ({names})")
