"""Prediction at sizes that are not the training's: many classes, many images, large ones; memory stays bounded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pudnet import Predictor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def predictor():
    return Predictor.untrained("convnet3", channels=3, image_size=16)


def colours(classes, count):
    """`count` images (16 x 16) of each of many colours, and their labels."""
    labels = np.repeat(np.arange(classes), count)
    shades = np.random.default_rng(0).integers(0, 256, (classes, 4, 4, 3), dtype=np.uint8)
    noise = np.random.default_rng(1).integers(0, 20, (len(labels), 16, 16, 3), dtype=np.uint8)
    return (shades.repeat(4, 1).repeat(4, 2)[labels] // 2 + noise), labels


@pytest.mark.parametrize(("classes", "count"), [(2, 1), (2, 5_000), (100, 1), (1_000, 1), (1_000, 10)])
def test_from_two_to_a_thousand_classes_and_one_to_ten_thousand_images(classes, count, predictor):
    images, labels = colours(classes, count)
    every = Predictor(predictor.model, predictor.card, predictor.target)
    every.support_per_class = count  # so that each image is looked at, a part at a time
    network = every.predict(images, labels)
    assert network.card.provenance["support_images"] == len(images)
    queries, truth = images[:: max(1, len(images) // 200)], labels[:: max(1, len(images) // 200)]
    assert network(queries).shape == (len(queries), classes)
    assert np.mean(np.array(network.classify(queries)) == truth) > 0.9


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from pudnet import Predictor
predictor = Predictor.untrained("convnet3", channels=3, image_size=64)
predictor.predict(sys.argv[1]).classify(sys.argv[1])  # all that is loaded or allocated once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
network = predictor.predict(sys.argv[2])
found = network.classify(sys.argv[2])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"classes": len(network.classes), "images": len(found), "mb": grown / 1024}))
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """1,600 images of 512 px are 1.2 GB of pixels: those of one batch are held, and none of the others."""
    rng = np.random.default_rng(0)
    one = tmp_path / "one.jpg"
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((512, 512)).save(one)
    for folder, classes, count in (("few", 2, 250), ("many", 4, 400)):
        for label in range(classes):
            (tmp_path / folder / f"class {label}").mkdir(parents=True)
            for row in range(count):
                os.link(one, tmp_path / folder / f"class {label}" / f"{row:04}.jpg")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "few"), str(tmp_path / "many")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(done.stdout)
    assert (found["classes"], found["images"]) == (4, 1_600)
    assert found["mb"] < 60
