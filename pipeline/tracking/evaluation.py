"""The MLflow run of an evaluation, which the stages `evaluate` and `report` log to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from pipeline.params import Params
from pipeline.project import group_folder, split_model
from pipeline.tracking.runs import Tracking


def evaluation_run(tracking: Tracking, params: Params) -> str:
    """Find or create the run; its id. A repeated evaluation continues its run."""
    return tracking.find_or_create(f"evaluate/{_identity(params)}", f"evaluate-{params.variant}")


def _identity(params: Params) -> str:
    """A hash of the models, the test groups and the params."""
    plain = [params.setting, params.target, params.variant, asdict(params.evaluate)]
    digest = hashlib.sha256(json.dumps(plain).encode())
    for seed in params.split_seeds:
        digest.update(split_model("pudnet", seed).read_bytes())
        digest.update((group_folder(seed) / "test.npy").read_bytes())
    return digest.hexdigest()[:12]
