"""Part `correct`: the tests that mean something on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu_report import Report, Run
from pudnet.errors import RunFailed

TESTS = Path(__file__).resolve().parent.parent / "tests" / "test_gpu.py"
# With --smallest: tests of a second, a training and some that need a GPU; the suite has all of them by themselves.
QUICK = "goes_on_from_its_checkpoint or compiled_training or whole_set"


class _Outcomes:
    """A plugin of pytest that reports every test."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's call, and whatever else did not pass (a skip is of the set-up)."""
        if report.when == "call" or not report.passed:
            name = report.nodeid.partition("::")[2]
            self.report.add("tests", {"test": name, "outcome": report.outcome, "seconds": report.duration})


def measure(run: Run, report: Report) -> None:
    """Run them all, or a few with `--smallest`. Raises `RunFailed` where one fails.

    By the file that holds them, and without the suite's own options: neither its other files nor its plugins
    have to be at hand.
    """
    chosen = ["-k", QUICK] if run.smallest else []
    options = ["-m", "gpu", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *chosen]
    code = pytest.main([*options, str(TESTS)], [_Outcomes(report)])
    tests = report.content.get("tests", [])
    for outcome in ("passed", "skipped", "failed"):
        report.add("outcomes", {"outcome": outcome, "tests": sum(row["outcome"] == outcome for row in tests)})
    report.show("outcomes")
    if code != pytest.ExitCode.OK:
        raise RunFailed(f"correct: pytest ended with {pytest.ExitCode(code).name.lower().replace('_', ' ')}")
