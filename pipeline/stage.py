"""How a stage runs as a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from pipeline.params import load_params
from pipeline.project import folder_locked
from pudnet.errors import exit_code


def run_stage(stage: Callable[..., None], resumes: bool = False) -> None:
    """Run one stage as a command: exit code 2 for a mistake in params or input, 1 for a failed run.

    A stage that `resumes` an earlier run takes `--fresh`, and is called with `fresh`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m pipeline.{stage.__name__}", description=stage.__doc__)
    if resumes:
        parser.add_argument("--fresh", action="store_true", help="forget the earlier run's state and start over")
    options = vars(parser.parse_args())

    def run() -> None:
        params = load_params()
        with folder_locked(stage.__name__):
            stage(params, **options)

    sys.exit(exit_code(run))
