"""How far trials are: bars in a terminal, with the reports in a log file; lines elsewhere."""

import os
import pty
import subprocess
import sys

TRIALS = """
from pathlib import Path
from pipeline.runs.display import TrialBars
ended = []
with TrialBars(2, ended, Path("log.txt")) as bars:
    for name in ("first", "second"):
        for groups in (4, 8):
            bars.report(name, groups, 8, f"  {name}: group {groups} of 8")
        ended.append(name)
        bars.end(name, f"  {name}: finished")
"""
LINES = [f"{name}: group {groups} of 8" for name in ("first", "second") for groups in (4, 8)]


def test_in_a_terminal_bars_move_and_the_reports_go_to_a_file(tmp_path):
    reader, terminal = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", TRIALS], cwd=tmp_path, stdout=terminal, check=True, env=os.environ | {"TERM": "xterm"}
    )
    os.close(terminal)
    shown = b""
    while chunk := _read(reader):
        shown += chunk
    assert all(words in shown for words in (b"log.txt", b"all trials", b"2/2", b"first: finished"))
    assert b"group 4 of 8" not in shown
    assert (tmp_path / "log.txt").read_text().splitlines() == LINES


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # the other end is closed
        return b""


def test_elsewhere_there_are_ten_lines_a_trial_at_most(tmp_path):
    done = subprocess.run([sys.executable, "-c", TRIALS], cwd=tmp_path, capture_output=True, text=True, check=True)
    told = [line.strip() for line in done.stdout.splitlines()]
    assert [line for line in told if "group" in line] == LINES and "second: finished" in told
    many = """
from pathlib import Path
from pipeline.runs.display import TrialBars
with TrialBars(1, [], Path("many.txt")) as bars:
    for groups in range(1, 501):
        bars.report("long", groups, 500, f"  long: group {groups} of 500")
"""
    done = subprocess.run([sys.executable, "-c", many], cwd=tmp_path, capture_output=True, text=True, check=True)
    told = [line.strip() for line in done.stdout.splitlines() if "group" in line]
    assert told == [f"long: group {groups} of 500" for groups in range(50, 501, 50)]
    assert len((tmp_path / "many.txt").read_text().splitlines()) == 500
