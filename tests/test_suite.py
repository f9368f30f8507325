"""The suite itself: it ends, and names the test, whatever becomes of a worker."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BODIES = {"dead": "os.kill(os.getpid(), signal.SIGSEGV)", "stuck": "time.sleep(600)"}


@pytest.mark.parametrize("fate", BODIES)
def test_a_worker_that_dies_or_stands_still_ends_the_suite_with_the_tests_name(fate, tmp_path):
    (tmp_path / "test_bad.py").write_text(f"import os, signal, time\ndef test_bad(): {BODIES[fate]}\n")
    for other in "ab":
        (tmp_path / f"test_{other}.py").write_text("def test_well(): pass\n")
    options = ["-c", str(ROOT / "pyproject.toml"), "-n", "2", "--dist", "loadfile", "-o", "timeout=1"]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={tmp_path}", str(tmp_path)]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1 and "FAILED test_bad.py::test_bad" in done.stdout
    assert time.monotonic() - begun < 60
