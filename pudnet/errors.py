"""The two ways in which a command of this project ends badly, each said in one line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in usage, configuration or input: what is wrong, where, and what to do. Exit code 2."""


class RunFailed(Exception):
    """A run that started well and could not be finished: what failed, and what to do. Exit code 1."""


def exit_code(command: Callable[[], object]) -> int:
    """Run a command; what ends it badly is said in one line, and its exit code returned (130: interrupted)."""
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        return _say(error, 2)
    except RunFailed as error:
        return _say(error, 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _say(f"{_where(error)}the disk is full; make room, then the same command continues or starts again", 1)
    except KeyboardInterrupt:
        return _say("interrupted; the same command continues or starts again", 130)
    return 0


def _where(error: OSError) -> str:
    return f"{error.filename}: " if error.filename else ""


def _say(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
