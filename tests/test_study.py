"""Studies: a small one for real, and what is wrong in a file said in one line."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pipeline.study import column_params, load_study, row_spec
from pudnet.errors import UserError

ROOT = Path(__file__).parent.parent
TINY = {
    "title": "Tiny",
    "over": {"groups.train_groups": 4, "groups.test_groups": 6, "evaluate.timing_groups": 1},
    "columns": {"digits": {"setting": "digits"}},
    "reference": "static trunk",
    "rows": {
        "static trunk": {"method": "static_trunk", "variant": "pudnet_plus"},
        "PudNet+": {"variant": "pudnet_plus"},
        "another group's": {"variant": "pudnet_plus", "sketch": "shuffled"},
        "few images": {"variant": "pudnet_plus", "sketch_images": 4},
        "untrained": {"method": "random_weights"},
    },
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with params.yaml and the study `tiny`."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)

    def write(study):
        (tmp_path / "studies" / "tiny.yaml").write_text(yaml.safe_dump(study, sort_keys=False))

    write(TINY)
    return write


def run_tiny(folder):
    command = [sys.executable, "-m", "pipeline.study", "tiny"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_study_trains_once_what_rows_share_and_measures_each_row(project, tmp_path):
    first = run_tiny(tmp_path)
    assert "2 training(s) on 4 groups" in first and first.count("6 test groups done") == 5
    table = pd.read_csv(tmp_path / "studies" / "results" / "tiny.csv")
    assert table.row.tolist() == list(TINY["rows"]) and (table.test_groups == 6).all()
    assert table.set_index("row").difference["static trunk"] == 0
    assert table.accuracy.nunique() >= 4 and table.accuracy.between(50, 100).all()
    assert table.set_index("row").milliseconds.notna().tolist() == [True, True, False, True, True]
    page = (tmp_path / "studies" / "results" / "tiny.md").read_text()
    assert all(f"| {row} | " in page for row in TINY["rows"])
    project({**TINY, "rows": {row: own for row, own in TINY["rows"].items() if row != "untrained"}})
    again = run_tiny(tmp_path)
    assert "2 of 2 trials are finished already" in again and "test groups done" not in again
    rest = pd.read_csv(tmp_path / "studies" / "results" / "tiny.csv")
    assert rest.accuracy.tolist() == table.accuracy[:4].tolist()


def test_a_rows_own_changes_win_over_its_variants(project):
    changes = {"filter_grid": 1, "learning_rate": 0.5, "sketch_images": 7}
    project({**TINY, "rows": {"static trunk": {"variant": "pudnet_plus", "changes": changes}}})
    study = load_study("tiny")
    spec = row_spec(column_params(study, "digits"), "static trunk", study.rows["static trunk"], 0)
    assert spec.model["class_filters"] and spec.model["filter_grid"] == 1 and spec.model["sketch_images"] == 7
    assert spec.train["learning_rate"] == 0.5 and spec.train["schedule"] == "one_cycle"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "best"}, "reference: no row is called 'best'"),
        ({"rows": {"a": {"method": "magic"}}}, "rows.a.method: "),
        ({"rows": {"a": {"variant": "pudnet_minus"}}}, "rows.a.variant: "),
        ({"rows": {"a": {"colour": 1}}}, "rows.a.colour: unknown key"),
        ({"rows": {"a": None}}, "rows.a: must be a block"),
        ({"rows": {}}, "rows: "),
        ({"rows": {"static trunk": {}, "same": {}}}, "rows.same: stands twice"),
        ({"columns": {"a": {"setting": "digits"}, "b": {"setting": "digits"}}}, "columns.b: stands twice"),
        ({"columns": {}}, "columns: "),
        ({"size": 3}, "size: unknown key"),
    ],
)
def test_what_is_wrong_in_a_study_is_said_in_one_line(changes, message, project):
    project({**TINY, **changes})
    with pytest.raises(UserError) as error:
        load_study("tiny")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("over", "changes", "message"),
    [
        ({"groups.colour": 1}, {}, "groups.colour: no such key"),
        ({"colour.red.green": 1}, {}, "colour.red.green: no such key"),
        ({"groups.train_groups": 0}, {}, "groups.train_groups: "),
        ({}, {"colour": 1}, "rows.PudNet.changes.colour: unknown key"),
        ({}, {"filter_grid": 0}, "filter_grid: "),
    ],
)
def test_what_a_study_asks_for_in_vain_is_said_in_one_line(over, changes, message, project):
    project({**TINY, "over": over, "reference": "PudNet", "rows": {"PudNet": {"changes": changes}}})
    study = load_study("tiny")
    with pytest.raises(UserError) as error:
        row_spec(column_params(study, "digits"), "PudNet", study.rows["PudNet"], 0)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_study_ends_with_the_names_of_those_there_are(project, tmp_path):
    command = [sys.executable, "-m", "pipeline.study", "table99"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "error: study: unknown name 'table99'; known: tiny\n"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "studies").glob("*.yaml") if path.stem != "dvc"))
def test_every_committed_study_is_sound_and_a_stage(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(name)
    for column in study.columns:
        params = column_params(study, column)
        assert all(row_spec(params, row, own, 0) for row, own in study.rows.items())
    assert name in yaml.safe_load((ROOT / "studies" / "dvc.yaml").read_text())["stages"]["study"]["matrix"]["name"]
