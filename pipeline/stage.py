"""How a stage runs as a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from pipeline.params import Params, load_params
from pipeline.project import folder_locked
from pudnet.errors import exit_code


def run_stage(stage: Callable[[Params], None]) -> None:
    """Run one stage as a command: exit code 2 for a mistake in params or input, 1 for a failed run."""

    def run() -> None:
        params = load_params()
        with folder_locked(stage.__name__):
            stage(params)

    sys.exit(exit_code(run))


def wants_fresh() -> bool:
    """Whether the command line has `--fresh`: start over instead of continuing an earlier run of the stage."""
    parser = argparse.ArgumentParser(description="Run the stage; without --fresh it continues an earlier run.")
    parser.add_argument("--fresh", action="store_true", help="forget the earlier run's state and start over")
    return parser.parse_args().fresh
