"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from pudnet import PredictedNetwork

ROOT = Path(__file__).parent.parent


def test_own_images(tmp_path):
    """Without images of one's own: five classes of digits, through the shipped model."""
    command = [sys.executable, str(ROOT / "examples" / "own_images.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "digit 0, digit 1, digit 2, digit 3, digit 4" in done.stdout
    right = float(done.stdout.split(" % right")[0].split()[-1])
    assert right > 70
    for name in ("filters.png", "confusion.png"):
        assert min(Image.open(tmp_path / name).size) > 200
    assert PredictedNetwork.load(tmp_path / "weights.safetensors").card.provenance["support_images"] == 90
