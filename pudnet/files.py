"""Writes files completely or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from pudnet.errors import UserError, is_full


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. When the block ends without an error, it replaces `path`; else it is removed.

    If `path` is a link, the file that it leads to is replaced. Missing parent folders are made. Raises `UserError` if
    the file cannot be written, if possible before the block runs, and `OSError` if the disk is full.
    """
    if not path.name or path.is_dir():
        raise UserError(f"{path}: cannot be written (it is a folder)")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be written (it is a device or a pipe); give the name of a file")
    final = Path(os.path.realpath(path))
    partial = final.with_name(f".{final.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        yield partial
        to_disk(partial)
        partial.replace(final)
    except OSError as error:
        if is_full(error):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def to_disk(file: Path) -> None:
    """Wait until a file's content is on the disk. Without this, a power cut may leave an empty file of its new name."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path) -> None:
    """Raise `UserError` if a path cannot be written, before hours are spent on its content."""
    with contextlib.suppress(_Untouched), replacing(path):
        raise _Untouched


class _Untouched(Exception):
    """Ends `check_writable`'s block, so that the file stays as it is."""
