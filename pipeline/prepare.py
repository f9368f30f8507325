"""Stage `prepare`: a source of images becomes a checksummed, memory-mapped uint8 store."""

from __future__ import annotations

from pathlib import Path

from pipeline.params import Params
from pipeline.stage import STORE, TEST_STORE, run_stage
from pudnet.data.sources import open_source
from pudnet.data.store import open_store, write_store

RAW = Path("data/raw")


def prepare(params: Params) -> None:
    """Write data/prepared/train, and data/prepared/test where the setting tests on another set."""
    pairs = [(params.prepare.source, STORE), (params.prepare.test_source, TEST_STORE)]
    for spec, destination in pairs:
        if spec is None:
            continue
        source = open_source(spec, RAW, params.prepare.image_size, params.prepare.channels)
        write_store(source, destination)
        store = open_store(destination, verify=False)
        print(
            f"prepare: {spec}: {len(store.labels):,} images of {len(store.class_names)} classes, "
            f"{store.image_size}x{store.image_size} px, {store.channels} channel(s) -> {destination}"
        )


if __name__ == "__main__":
    run_stage(prepare)
