"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pudnet.errors import UserError, is_full


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` once the block has ended well and all is on disk.

    Its folder is made where there is none. Raises `UserError` where the file cannot be written, before the block is
    entered if that can be seen then, and `OSError` where the disk is full; what the block has written is removed.
    """
    if not path.name or path.is_dir():
        raise UserError(f"{path}: cannot be written (it is a folder)")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        yield partial
        to_disk(partial)
        partial.replace(path)
    except OSError as error:
        if is_full(error):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def to_disk(file: Path) -> None:
    """Wait until a file's content is on the disk: after a power cut its new name alone would be there."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path) -> None:
    """Raise `UserError` for a path that cannot be written, before hours of work for it."""
    with contextlib.suppress(_Untouched), replacing(path):
        raise _Untouched


class _Untouched(Exception):
    """Leaves a file as it is."""
