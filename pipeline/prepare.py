"""Stage `prepare`: converts a source of images into a checksummed, memory-mapped uint8 store."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.made_for import note_prepared
from pipeline.params import Params
from pipeline.project import PREPARED, STORE, TEST_STORE, root
from pipeline.stage import run_stage
from pudnet.data.folders import by_type
from pudnet.data.sources import open_sources
from pudnet.data.store import whole_folder, write_store


def prepare(params: Params, project: Path = Path()) -> None:
    """Write data/prepared/train, and data/prepared/test if the setting tests on another set, below `project`."""
    sources = {STORE.name: params.prepare.source}
    if params.prepare.test_source:
        sources[TEST_STORE.name] = [params.prepare.test_source]
    raw, prepared = root() / "data" / "raw", project / PREPARED
    with whole_folder(prepared) as folder:
        for name, specs in sources.items():
            begin = f"prepare: {' + '.join(specs)}"
            source = open_sources(specs, raw, params.prepare.image_size, params.prepare.channels)
            write_store(source, folder / name)
            size, place = f"{params.prepare.image_size} px", os.path.relpath(prepared / name)
            print(
                f"{begin}: {len(source.labels):,} images of {len(source.class_names)} classes, {size}, "
                f"{params.prepare.channels} channel(s) -> {place}"
            )
            if source.passed_over:
                print(f"{begin}: passed over, since their type is not read: {by_type(source.passed_over)}")
        note_prepared(folder, params)


if __name__ == "__main__":
    run_stage(prepare)
