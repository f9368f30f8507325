"""Stage `groups`: makes class splits and the tables of training, validation and test groups."""

from __future__ import annotations

from pathlib import Path

from pipeline.made_for import check_prepared, note_groups
from pipeline.params import Params
from pipeline.project import GROUPS, STORE, TEST_STORE, group_folder
from pipeline.stage import run_stage
from pudnet.data.groups import build_groups, split_sets, write_groups
from pudnet.data.store import Store, open_store, whole_folder
from pudnet.errors import UserError


def groups(params: Params) -> None:
    """Write one folder of tables for each class split."""
    check_prepared(params)
    store = open_store(STORE, verify=True)
    other = open_store(TEST_STORE, verify=True) if params.prepare.test_source else None
    with whole_folder(GROUPS) as folder:
        for seed in params.split_seeds:
            _build_split(params, store, other, seed, folder / group_folder(seed).name)
        note_groups(folder, params)


def _build_split(params: Params, store: Store, other: Store | None, seed: int, folder: Path) -> None:
    own = params.groups
    if other is not None and len(other.class_names) < 2:
        raise UserError(f"{params.prepare.test_source}: has one class; a group needs two")
    tested = 2 if own.test_whole else own.test_classes_per_group  # a whole set is one group, of all its classes
    split = split_sets(store, own.train_classes, own.classes_per_group, seed, other, own.test_classes, tested)
    tables = build_groups(split, params.sizes, store, other, own.looks, own.test_looks)
    test_names = (other or store).class_names
    write_groups(folder, split, tables, store.class_names, test_names)
    names = ", ".join(test_names[c] for c in split.test_classes[:8])
    sizes = ", ".join(f"{len(table):,} {name}" for name, table in tables.items())
    print(f"groups: split {seed}: {sizes}; test classes: {names}{', ...' if len(split.test_classes) > 8 else ''}")


if __name__ == "__main__":
    run_stage(groups)
