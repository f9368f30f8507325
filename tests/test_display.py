"""How far trials are: bars in a terminal, with the reports in a log file; lines elsewhere."""

import os
import pty
import subprocess
import sys
from pathlib import Path

TRIALS = """
from pathlib import Path
from pipeline.runs.display import TrialBars
with TrialBars(2, Path("log.txt")) as bars:
    for name in ("first", "second"):
        for groups in (4, 8):
            bars.report(name, groups, 8, f"  {name}: group {groups} of 8")
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
    assert all(words in shown for words in (b"log.txt", b"all trials", b"16/16", b"first: finished"))
    assert b"group 4 of 8" not in shown
    assert (tmp_path / "log.txt").read_text().splitlines() == LINES


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # the other end is closed
        return b""


def test_elsewhere_each_report_is_a_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", TRIALS], cwd=tmp_path, capture_output=True, text=True, check=True)
    told = [line.strip() for line in done.stdout.splitlines()]
    assert [line for line in told if "group" in line] == LINES and "second: finished" in told
    assert not list(Path(tmp_path).iterdir())
