"""How far trials are: bars in a terminal, with the reports in a log file; lines elsewhere."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from pipeline.runs.display import TrialBars

ROOT = Path(__file__).parent.parent


def two_trials():
    """Show two trials, the second of which fails."""
    ended = []
    with TrialBars(2, ended, Path("log.txt")) as bars:
        for name in ("first", "second"):
            for groups in (4, 8):
                report = {"groups": groups, "total": 8, "loss": 1.5, "train_accuracy": 90.0, "groups_per_second": 2.0}
                bars.report(name, report)
            ended.append(name)
            bars.end(name, [report], failed=name == "second")


LINES = [
    "[0/2 done] first: group     4 of 8, loss 1.500, training 90.00 %, 2.00 groups/s",
    "[0/2 done] first: group     8 of 8, loss 1.500, training 90.00 %, 2.00 groups/s",
    "first: finished, training 90.00 %",
    "[1/2 done] second: group     4 of 8, loss 1.500, training 90.00 %, 2.00 groups/s",
    "[1/2 done] second: group     8 of 8, loss 1.500, training 90.00 %, 2.00 groups/s",
    "second: failed",
]


def test_in_a_terminal_bars_move_and_the_reports_go_to_a_file(tmp_path):
    reader, terminal = pty.openpty()
    command = [sys.executable, "-c", "from tests.test_display import two_trials; two_trials()"]
    own = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, stdout=terminal, check=True, env=own)
    os.close(terminal)
    shown = b""
    while chunk := _read(reader):
        shown += chunk
    assert all(words in shown for words in (b"log.txt", b"all trials", b"2/2", b"second: failed"))
    assert b"4 of 8" not in shown and b"finished" not in shown
    assert (tmp_path / "log.txt").read_text().splitlines() == LINES


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # the other end is closed
        return b""


def test_elsewhere_there_are_twenty_reports_at_most_and_a_line_for_each_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    two_trials()
    assert [line.strip() for line in capsys.readouterr().out.splitlines()][1:] == LINES
    with TrialBars(3, [], Path("many.txt")) as bars:
        for groups in range(1, 501):
            for name in ("a", "b", "c"):
                report = {"groups": groups, "total": 500, "train_accuracy": 90.0, "groups_per_second": 2.0}
                bars.report(name, report)
    assert [line.split(":")[1].split(" of")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        f" group {groups:>5}" for groups in range(25, 501, 25)
    ]
    assert len((tmp_path / "many.txt").read_text().splitlines()) == 1500
