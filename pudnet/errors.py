"""The two kinds of error that end a command of this project, each printed as one line."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

LONGEST_LINE = 1000  # characters; an error that quotes a long value is cut off
# Errors caused by the file itself or its name. EINVAL: a damaged file made the reader seek outside it.
FILES_FAULT = {errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL}


class _OneLine(Exception):
    """An error whose text is always one printable line, whatever values it quotes."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > LONGEST_LINE:
            text = f"{text[:LONGEST_LINE]} ..."
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(_OneLine):
    """A mistake in usage, configuration or input. The text says where, what is wrong and what to do. Exit code 2."""


class UnreadableImage(UserError):
    """A file that should be an image cannot be decoded."""


class RunFailed(_OneLine):
    """A run that started well but could not be finished. The text says what failed and what to do. Exit code 1."""


def one_line(error: BaseException) -> str:
    """The type and text of an error that foreign code raised, in one line, to quote in our own errors."""
    return words(f"{type(error).__name__}: {error}", 300)


def words(text: object, most: int) -> str:
    """A text of any shape in one line of at most so many characters."""
    return " ".join(str(text).split())[:most]


def exit_code(command: Callable[[], object]) -> int:
    """Run a command -> its exit code (130: interrupted). An error that ends it is printed as one line."""
    warnings.filterwarnings("ignore", module="PIL")  # it warns about files that it reads anyway, or that we refuse
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes may hold any bytes
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        return _say(error, 2)
    except RunFailed as error:
        return _say(error, 1)
    except OSError as error:
        if is_full(error):
            return _say(
                f"{_where(error)}the disk is full; make room, then the same command continues or starts again", 1
            )
        if error.filename is None:  # not about a file, so not the user's mistake
            raise
        return _say(UserError(f"{error.filename}: {error.strerror}"), 2)
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError when there is not enough memory
        if not is_out_of_memory(error):
            raise
        cause = "".join(f" ({line})" for line in str(error).splitlines()[:1])
        return _say(f"out of memory{cause}; free some, or use a smaller model, smaller images or fewer at once", 1)
    except KeyboardInterrupt:
        return _say("interrupted; the same command continues or starts again", 130)
    return 0


def is_full(error: OSError) -> bool:
    """Whether the error means that a disk is full, which is not the user's mistake but ends the run."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def not_its_fault(path: Path, error: OSError) -> UserError | RunFailed | None:
    """The error to raise if a failure is not the file's own fault; else None."""
    if isinstance(error, PermissionError):
        return UserError(f"{path}: may not be read ({error.strerror}); change its permissions")
    if error.errno in (None, *FILES_FAULT):
        return None
    return RunFailed(f"{path}: cannot be read now ({error.strerror}); it may be good, so try again")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory is used up."""
    return isinstance(error, MemoryError) or bool(
        re.search("out of memory|allocate memory|start new thread|ALLOC_FAILED", str(error))
    )


def _where(error: OSError) -> str:
    return f"{error.filename}: " if error.filename else ""


def _say(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
