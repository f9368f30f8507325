"""Tags of a run that say what made it, and from what: git, DVC, the user."""

from __future__ import annotations

import contextlib
import getpass
import os
from pathlib import Path

import yaml

from pipeline.params import Params
from pipeline.project import git_commit


def provenance(params: Params, stage: str, report: str) -> dict[str, str]:
    """Tags that record what a run was made by, and from."""
    command = f"dvc repro {os.environ['DVC_STAGE']}" if "DVC_STAGE" in os.environ else f"python -m pipeline.{stage}"
    tags = {"mlflow.user": _user(), "mlflow.source.name": command, "mlflow.source.type": "LOCAL"}
    tags |= {"stage": stage, "report": report}
    tags |= {"setting": params.setting, "target": params.target, "variant": params.variant}
    commit = git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    if os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = os.environ["DVC_EXP_NAME"]
    return tags | {f"dvc.md5.{path}": md5 for path, md5 in _lock_md5s().items()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        return "unknown"


def _lock_md5s() -> dict[str, str]:
    """Checksums of the prepared data and group tables, as DVC locked them."""
    lock = Path("dvc.lock")
    if not lock.is_file():
        return {}
    with contextlib.suppress(
        yaml.YAMLError, KeyError, TypeError, AttributeError
    ):  # damaged, perhaps by a merge; dvc reports that
        stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {})
        outs = [out for stage in ("prepare", "groups") for out in stages.get(stage, {}).get("outs", [])]
        return {out["path"]: out["md5"] for out in outs if "md5" in out}
    return {}
