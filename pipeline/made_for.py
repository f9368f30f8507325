"""What the images and groups on disk were made for: a stage that is run by itself refuses those of other parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.digests import digest
from pipeline.params import Params
from pipeline.project import GROUPS, PREPARED, STORE, TEST_STORE, read_result, write_json
from pudnet.data.store import META
from pudnet.errors import UserError

NOTE = "made_for.json"


def note_prepared(folder: Path, params: Params) -> None:
    """Write down, beside the images in `folder`, the parameters that they were made for."""
    write_json(folder / NOTE, _of_prepared(params))


def note_groups(folder: Path, params: Params) -> None:
    """Write down, beside the groups in `folder`, the parameters and the images that they were made for."""
    write_json(folder / NOTE, _of_groups(params))


def check_prepared(params: Params) -> None:
    """Raise `UserError` if the images were made for another section `prepare`."""
    _compare(PREPARED, _of_prepared(params), "prepare")


def check_groups(params: Params) -> None:
    """Raise `UserError` if images or groups were made for other sections `prepare` and `groups`, or of other images."""
    check_prepared(params)
    _compare(GROUPS, _of_groups(params), "groups")


def _of_prepared(params: Params) -> dict[str, Any]:
    return {"prepare": asdict(params.prepare)}


def _of_groups(params: Params) -> dict[str, Any]:
    images = {store.name: digest(None, [store / META]) for store in (STORE, TEST_STORE)}  # it has their checksums
    return {"groups": asdict(params.groups), "images": images}


def _compare(folder: Path, wanted: Mapping[str, Any], stage: str) -> None:
    found = read_result(folder / NOTE, lambda path: dict(json.loads(path.read_text())), stage)
    for block, values in json.loads(json.dumps(wanted)).items():  # as JSON gives them back
        for key, value in values.items():
            if (was := found.get(block, {}).get(key)) != value:
                what = "of other images" if block == "images" else f"for {block}.{key}: {was}, not {value}"
                raise UserError(f"{folder}: was made {what}; run `dvc repro`, or `python -m pipeline.{stage}` first")
