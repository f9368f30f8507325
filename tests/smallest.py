"""The default pipeline at its smallest: `python -m tests.smallest params.yaml` rewrites the file in place."""

import os
import sys
from pathlib import Path

import yaml


def shrink(path: Path) -> None:
    """Keep the setting and every stage; few groups, two a step, a search of two trials, one class split."""
    params = yaml.safe_load(path.read_text())
    params["splits"] = 1
    params["groups"] |= {"train_groups": 19, "search_groups": 10, "validation_groups": 4, "test_groups": 6}
    params["groups"] |= {"images_per_group": 48}
    params["train"] |= {"report_every": 10, "groups_per_step": 2}
    params["search"] |= {"space": {"eta": [0.0, 0.2], "depth": [1]}, "report_every": 4}
    params["evaluate"] |= {"keep_weights": 2, "timing_groups": 2}
    params["baselines"] |= {"sketch_groups": 5, "scratch_groups": 2, "scratch_epochs": [1, 2]}
    params["baselines"] |= {"scratch_search_groups": 2, "scratch_search_epochs": [1]}
    params["baselines"]["space"] = {"protonet": {"scale": [1.0, 0.01]}, "scratch_gc": {"learning_rate": [0.003, 0.01]}}
    params["baselines"]["space"] |= {"musml": {"inner_steps": [1]}}  # of a grid of one, nothing is tuned
    params["resources"] |= {"cpus": os.cpu_count()}  # one trial after the other: its threads decide the rounding
    path.write_text(yaml.safe_dump(params, sort_keys=False))


if __name__ == "__main__":
    shrink(Path(sys.argv[1]))
