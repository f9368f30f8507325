"""Studies: a small one for real, and what is wrong in a file said in one line."""

import contextlib
import re
import subprocess
import sys
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.params import resolve
from pipeline.project import STORE, Busy
from pipeline.reporting.drawing import to_png
from pipeline.studies import running, trained
from pipeline.studies.accuracy import Spread
from pipeline.studies.columns import ANY, check_labels, check_rows, column_params, row_spec, wanted
from pipeline.studies.definition import Column, Row, Study, load_study
from pipeline.studies.figures import lines_figure
from pipeline.studies.page import render
from pipeline.studies.tasks import cell
from pipeline.studies.tasks.cell import StudyCell, given_labels
from pipeline.studies.trained import _training
from pipeline.studies.workspace import _data_folder, get_data
from pipeline.study import main
from pudnet import Predictor
from pudnet.data.store import open_store
from pudnet.errors import UserError
from tests.conftest import LONGEST
from tests.test_pipeline import environment

ROOT = Path(__file__).parent.parent
SMALL = {
    "groups.train_groups": 4,
    "groups.test_groups": 6,
    "groups.images_per_group": 60,
    "evaluate.timing_groups": 1,
    "train.report_every": 2,
}
CHOSEN = {"penalty": "leave_one_out", "blocks": "leave_one_out"}
TINY = {
    "title": "Tiny",
    "over": SMALL,
    "diagnose": True,
    "columns": {"digits": {"setting": "digits", "baselines.scratch_groups": 2, "paper": "table1.fashion.{row}"}},
    "reference": "static trunk",
    "rows": {
        "static trunk": {"method": "static_trunk", "variant": "pudnet_plus"},
        "PudNet+": {"variant": "pudnet_plus"},
        "another group's": {"variant": "pudnet_plus", "sketch": "shuffled"},
        "few images": {"variant": "pudnet_plus", "images": 4},
        "untrained": {"method": "random_weights"},
        "from scratch": {"method": "scratch_adam", "changes": {"epochs": 1}, "paper": "adam_1"},
    },
}

REST = TINY | {  # rows that `tiny` has, with other references
    "rows": {row: own for row, own in TINY["rows"].items() if row != "untrained"},
    "reference": ["PudNet+", "few images"],
}
TWICE = TINY | {
    "over": {**SMALL, "study.trainings": 2},
    "rows": {row: TINY["rows"][row] for row in ("static trunk", "PudNet+", "untrained")},
}
KINDS = {  # one of each other kind, over cells that they share with the first
    "converged": {
        "title": "Converged",
        "over": {**SMALL, "groups.search_groups": 4, "search.report_every": 2, "train.passes": 3},
        "columns": {"digits": {"setting": "digits"}},
        "rows": {
            "thrice": {},
            "once": {"changes": {"passes": 1}},
            "patient": {"method": "static_trunk", "changes": {"patience": 1}},
            "patient ProtoNet": {"method": "protonet", "changes": {"patience": 1, "passes": 2}},
        },
    },
    "axis": {
        "title": "Axis",
        "over": SMALL,
        "axis": "columns",
        "columns": {
            "digits / 2": {"setting": "digits", "groups.train_groups": 2, "paper": "table10.{row}.0"},
            "digits / 4": {"setting": "digits", "groups.train_groups": 4, "paper": "table10.{row}.1"},
            "digits / 900": {"setting": "digits", "groups.train_groups": 900, "paper": "table10.{row}.2"},
            "animals / 4": {"setting": "digits", "prepare.source": "folder:data/raw/animals"},
        },
        "rows": {"PudNet": {"paper": "train_c80"}},
    },
    "curve": {
        "title": "Curve",
        "over": SMALL,
        "measure": "losses",
        "columns": {"digits": {"setting": "digits"}},
        "rows": {"PudNet": {}},
    },
    "start": {
        "title": "Start",
        "over": SMALL,
        "measure": "finetune",
        "finetune": {"images": 100, "test_images": 50, "epochs": 2},
        "columns": {"digits": {"setting": "digits", "paper": "table5.convnet3.{row}"}},
        "rows": {"random": {"method": "random_weights"}, "PudNet": {"paper": "pudnet"}},
    },
    "chance": {
        "title": "Chance",
        "over": {**SMALL, "groups.train_groups": 24, "groups.images_per_group": 40},
        "measure": "correlation",
        "correlation": {"groups": 24, "components": 3, "pairings": 20},
        "columns": {"digits": {"setting": "digits"}},
        "rows": {"trained": {"method": "scratch_adam", "changes": {"epochs": 1}}},
    },
    "many": {
        "title": "Many",
        "over": SMALL,
        "measure": "whole",
        "whole": {"images": "data/raw/here", "test_images": "data/raw/there", "top": 2, "classes": 10},
        "columns": {"digits": {"setting": "digits", "paper": "imagenet1k.{row}"}},
        "rows": {"PudNet": {"paper": "pudnet"}, "PudNet+": {"variant": "pudnet_plus"}},
    },
    "seconds": {
        "title": "Seconds",
        "over": SMALL,
        "axis": "time",
        "columns": {
            "digits": {"setting": "digits", "baselines.scratch_groups": 2, "groups.test_classes_per_group": 3},
        },
        "reference": "PudNet+ / 30 images",
        "rows": {
            "PudNet+ / 6 images": {"variant": "pudnet_plus", "images": 6},
            "PudNet+ / 30 images": {"variant": "pudnet_plus", "images": 30},
            "PudNet+, chosen / 30 images": {"variant": "pudnet_plus", "images": 30, "changes": CHOSEN},
            "R2-D2 / 30 images": {"method": "r2d2", "variant": "pudnet_plus", "images": 30},
            "R2-D2, chosen / 30 images": {
                "method": "r2d2",
                "variant": "pudnet_plus",
                "images": 30,
                "changes": CHOSEN,
            },
            "static trunk / 30 images": {
                "method": "static_trunk",
                "variant": "pudnet_plus",
                "images": 30,
                "target": "convnet3_multilevel",
            },
            "fine-tuned / 1 epoch": {"variant": "pudnet_plus", "images": 30, "finetune": {"epochs": 1}},
            "from scratch / 1 epoch": {"method": "scratch_adam", "changes": {"epochs": 1}},
        },
    },
}


def write_study(folder, study, name="tiny"):
    (folder / "studies" / f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def make_project(folder):
    """Write params.yaml and the study `tiny` into a folder."""
    (folder / "studies").mkdir()
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    write_study(folder, TINY)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with params.yaml and the study `tiny`. What it gives writes another study there."""
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return partial(write_study, tmp_path)


def command(folder, *names):
    started = [sys.executable, "-m", "pipeline.study", *names]
    limit = LONGEST - 60  # so that a study which hangs is ended, before its test is
    own = environment(ROOT)
    return subprocess.run(started, cwd=folder, env=own, capture_output=True, text=True, timeout=limit, check=False)


def results(folder, name):
    written = folder / "studies" / "results"
    assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return pd.read_csv(written / f"{name}.csv"), (written / f"{name}.md").read_text()


def write_digits(folder):
    digits = load_digits()
    for name, rows in (("here", slice(0, 300)), ("there", slice(300, 500))):
        for row in range(rows.start, rows.stop):
            path = folder / "data" / "raw" / name / f"class {digits.target[row]}" / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[row] * 15).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder in which one command ran a study of each kind, and what it said."""
    folder = tmp_path_factory.mktemp("kinds")
    make_project(folder)
    studies = {"rest": REST, "twice": TWICE, **KINDS}
    for name, study in studies.items():
        write_study(folder, study, name)
    write_digits(folder)
    done = command(folder, "tiny", *studies)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_study_has_a_table_a_page_and_a_figure(ran):
    folder, said = ran
    assert "2 training(s) on 4 groups" in said
    table, page = results(folder, "tiny")
    assert table.row.tolist() == list(TINY["rows"]) and table.test_groups.tolist() == [6] * 5 + [2]
    assert table.set_index("row").difference["static trunk"] == 0
    assert table.accuracy.nunique() >= 4 and table.accuracy.between(50, 100).all()
    assert table.set_index("row").milliseconds.notna().tolist() == [True, True, False, True, True, True]
    assert all(f"| {row} | " in page for row in TINY["rows"])
    assert "| 91.07 ± 1.11 |" in page and "| 870 ms |" in page and "| labels, at most |" in page


def test_a_diagnosis_says_how_far_the_weights_of_a_group_move(ran):
    table = results(ran[0], "tiny")[0].set_index("row")
    own = table.loc[["PudNet+", "few images"]]
    assert (own.movement > 0).all() and own.probe.isna().all()  # class filters are not of one length
    assert table.movement.drop(own.index).isna().all()


def test_what_is_done_is_not_done_again(ran):
    folder, said = ran
    again = said.partition("study: rest, digits: 2 training(s)")[2].partition("study: twice, ")[0]
    assert "2 of 2 trials are finished already" in again
    assert "test groups done" not in again and "diagnosed" not in again
    (table, _), (rest, _) = results(folder, "tiny"), results(folder, "rest")
    assert rest.accuracy.tolist() == table.accuracy[table.row != "untrained"].tolist()


def test_of_several_references_a_row_is_compared_with_the_one_of_as_many_images(ran):
    table, page = results(ran[0], "rest")
    table = table.set_index("row")
    less = table.accuracy - table.accuracy["PudNet+"]
    assert table.difference["few images"] == 0 != less["few images"]
    assert table.difference["static trunk"] == pytest.approx(less["static trunk"], abs=1e-3)
    assert "Differences to “PudNet+” or, for rows of as many images, “few images” are paired" in page


def test_two_trainings_of_each_row_give_deviations_and_the_interval_of_a_difference_over_both(ran):
    folder, said = ran
    told = said.partition("study: twice, digits: 4 training(s)")[2].partition("study: converged")[0]
    assert "  2 of 4 trials are finished already" in told
    table, page = results(folder, "twice")
    assert table.trainings.tolist() == [2, 2, 1] and table.trainings_sd.notna().tolist() == [True, True, False]
    for line in table[:2].itertuples():
        each = [float(one) for one in line.trainings_accuracies.split()]
        assert len(each) == 2 and sum(each) / 2 == pytest.approx(line.accuracy, abs=0.01)
    assert (table.difference_ci95_trainings[1:] > 0).all() and "mean of 2 trainings of each row" in page
    assert "| deviation of a training |" in page and "test groups and trainings" in page


def test_with_patience_a_row_passes_its_groups_as_often_as_the_best_report_of_its_validation_run_says(ran):
    folder, said = ran
    table, page = results(folder, "converged")
    assert table.passes[:2].tolist() == [3, 1] and "2 validation run(s)" in said
    assert "\n4 training groups, passed" in page and "| passes |" in page
    assert "(the paper: " not in page  # it has no setting `digits`
    for slug, passes, limit in zip(["patient", "patient-protonet"], table.passes[2:], [3, 2], strict=True):
        told = re.findall(rf"{slug}-split0-validation: group +(\d+) of {4 * limit}, .*validation +([\d.]+)", said)
        groups, accuracies = zip(*((int(groups), float(accuracy)) for groups, accuracy in told), strict=True)
        best = accuracies.index(max(accuracies))
        assert passes == groups[best] / 4 and groups[-1] == min(groups[best] + 2, 4 * limit)
        assert f"{slug}-split0: group {groups[best]:>5} of {groups[best]}, " in said


def test_columns_that_cannot_run_are_left_out_of_a_figure_and_said(ran):
    folder, said = ran
    axis, page = results(folder, "axis")
    assert axis.column.tolist() == ["digits / 2", "digits / 4"] and axis.paper.tolist() == [45.37, 51.99]
    assert "- digits / 900: 900 training groups are over the budget of 4" in page
    assert "- animals / 4: data/raw/animals: no such folder" in page and "animals / 4: not run" in said


def test_a_study_of_losses_has_the_reports_of_a_training(ran):
    curve, _ = results(ran[0], "curve")
    assert curve.groups.tolist() == [2, 4] and (curve.loss > curve.metric_loss).all()


def test_a_study_of_finetuning_has_curves_that_rise_and_a_run_for_each_row(ran):
    folder, _ = ran
    start, page = results(folder, "start")
    assert start.epoch.tolist() == [0, 1, 2] * 2 and (start.images == 100).all() and (start.ci95 < 15).all()
    assert start.groupby("row").accuracy.agg(lambda of_row: of_row.iloc[-1] > of_row.iloc[0]).all()
    assert start.paper.notna().tolist() == [False] * 5 + [True] and "55.21 ± 0.19" in page
    runs = MlflowClient(f"sqlite:///{folder}/mlflow.db").search_runs(["1"], "tags.study = 'start'")
    assert {(run.data.tags["row"], run.data.tags["column"], run.data.tags["seed"]) for run in runs} == {
        ("random", "digits", "0"),
        ("PudNet", "digits", "0"),
    }


def test_a_study_of_correlations_has_each_layer_beside_shuffled_pairs(ran):
    chance, _ = results(ran[0], "chance")
    assert chance.layer.nunique() == 3 and chance.correlation.between(-1, 1).all()
    assert chance.p.between(1 / 21, 1).all()  # of 20 shuffled pairings, some or none
    assert (chance.shuffled_low < chance.shuffled).all() and (chance.shuffled < chance.shuffled_high).all()


def test_a_study_of_a_whole_set_is_better_than_chance(ran):
    many, page = results(ran[0], "many")
    assert many.accuracy.between(40, 100).all() and (many.classes == 10).all() and "44.92" in page  # by chance: 20


def test_a_study_of_seconds_has_the_times_of_rows_that_share_their_trainings(ran):
    folder, said = ran
    seconds, page = results(folder, "seconds")
    assert "study: seconds, digits: 3 training(s)" in said  # PudNet+ is one: its rows differ in predictions only
    assert seconds.test_groups.tolist() == [6] * 6 + [2] * 2
    assert seconds.accuracy.between(34, 100).all()  # by chance: 33
    assert seconds.milliseconds.gt(0).all() and seconds.milliseconds_all_threads.gt(0).all()
    assert f"with {seconds.all_threads[0]} threads" in page and "less PudNet+ / 30 images" in page
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (multilevel,) = client.search_runs(["1"], "tags.study = 'seconds' AND tags.target = 'convnet3_multilevel'")
    assert multilevel.data.tags["row"] == "static trunk / 30 images"


def test_rows_of_the_same_models_are_not_counted_as_more_trainings():
    models = {"a": (Path("1"), Path("2"), Path("3")), "untrained": (None,)}
    once = Spread.of({"a": [70, 71, 72], "untrained": [60]}, models)
    again = Spread.of({"a": [70, 71, 72], "a, all images": [80, 81, 82]}, models | {"a, all images": models["a"]})
    assert once == again == Spread(1.0, 2)
    assert once.half_width(3) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)  # Student's t, two degrees of freedom
    assert once.half_width(3, 3) == pytest.approx(4.3027 * (2 / 3) ** 0.5, rel=1e-4)


def test_a_study_ends_after_its_hours(project, tmp_path):
    params = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(params.replace("hours: null", "hours: 0.0001"))
    done = command(tmp_path, "tiny")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "study.hours: 0.0001 hours are over" in done.stderr
    assert not (tmp_path / "studies" / "results").exists()


def test_a_page_names_all_rows_that_others_are_compared_with(project):
    rows = {f"{n} images": {"variant": "pudnet_plus", "images": n} for n in (4, 8, 12)}
    project({**TINY, "rows": rows, "reference": list(rows)})
    study = load_study("tiny")
    page = render("tiny", study, "", {}, column_params(study, "digits"))
    assert "to “4 images” or, for rows of as many images, “8 images” or “12 images” are paired" in page


@pytest.mark.parametrize("source", ["npz:mine.npz", "npz:~/mine.npz", "folder:linked"])
def test_the_source_of_a_study_may_be_anywhere_and_its_changes_are_noticed(source, project, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    digits = load_digits()
    for label in range(10):
        (tmp_path / "elsewhere" / str(label)).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "elsewhere" / str(label) / "0.png")
    (tmp_path / "linked").mkdir()
    for label in range(10):
        (tmp_path / "linked" / str(label)).symlink_to(tmp_path / "elsewhere" / str(label))

    def prepared(value):
        images = np.full((len(digits.target), 8, 8), value, np.uint8)
        np.savez(tmp_path / "mine.npz", images=images, labels=digits.target)
        Image.fromarray(images[0]).save(tmp_path / "elsewhere" / "0" / f"{value}.png")
        params = column_params(load_study("tiny"), "digits")
        params = replace(params, prepare=replace(params.prepare, source=[source]))
        get_data(params)
        return int(open_store(_data_folder(params) / STORE, verify=False).images.max())

    assert [prepared(3), prepared(200)] == [3, 200]


def test_a_rows_own_changes_win_over_its_variants(project):
    changes = {"filter_grid": 1, "learning_rate": 0.5, "sketch_images": 7}
    project({**TINY, "rows": {"static trunk": {"variant": "pudnet_plus", "changes": changes}}})
    study = load_study("tiny")
    spec = row_spec(column_params(study, "digits"), "static trunk", study.rows["static trunk"], 0, ANY)
    assert spec.model["class_filters"] and spec.model["filter_grid"] == 1 and spec.model["sketch_images"] == 7
    assert spec.train["learning_rate"] == 0.5 and spec.train["schedule"] == "one_cycle"


def test_a_row_of_a_resnet_is_pretrained_if_its_own_changes_give_it_base_weights(project):
    rows = {"with": {"base": True}, "without": {}, "told": {"base": True, "pretraining_share": 0.25}}
    rows = {name: {"changes": changes} for name, changes in rows.items()}
    column = {"a": {"setting": "digits", "target": "resnet18"}}
    rows |= {"PudNet+": {"variant": "pudnet_plus"}, "pretrained": {"variant": "pretrained_ridge"}}
    project({**TINY, "reference": None, "columns": column, "rows": rows})
    study = load_study("tiny")
    specs = {name: row_spec(column_params(study, "a"), name, row, 0, ANY) for name, row in study.rows.items()}
    shares = {name: spec.train["pretraining_share"] for name, spec in specs.items()}
    assert shares == {"with": 0.8, "without": 0.0, "told": 0.25, "PudNet+": 0.8, "pretrained": 1.0}


@pytest.mark.parametrize("method", ["pudnet", "r2d2"])
def test_rows_that_differ_in_predictions_share_a_training_and_no_result(project, method):
    rows = {name: {"method": method, "changes": own} for name, own in (("one", {}), ("other", CHOSEN))}
    project({**TINY, "reference": None, "rows": rows})
    study = load_study("tiny")
    params = column_params(study, "digits")
    one, other = (replace(row_spec(params, name, row, 0, ANY), name="") for name, row in study.rows.items())
    assert one != other and _training(one) == _training(other) == one


@pytest.mark.parametrize(
    ("setting", "images", "labels"), [("cifar100", 100, 18), ("fashion", 300, 45), ("digits", 30, 15)]
)
@pytest.mark.parametrize("method", ["static_trunk", "r2d2", "pretrained"])
def test_a_baseline_beside_a_variant_is_trained_as_it_is_and_given_as_many_labels(
    project, setting, images, labels, method
):
    rows = {"beside": {"method": method, "variant": "pudnet_plus"}, "PudNet+": {"variant": "pudnet_plus"}}
    rows["its own"] = rows["beside"] | {"changes": {"learning_rate": 0.5, "support_per_class": 3}}
    project({**TINY, "columns": {"a": {"setting": setting}}, "reference": None, "rows": rows})
    study = load_study("tiny")
    found = {name: row_spec(column_params(study, "a"), name, row, 0, images).train for name, row in study.rows.items()}
    assert found["beside"] == found["PudNet+"] | {"support_per_class": labels}
    assert found["its own"] == found["beside"] | {"learning_rate": 0.5, "support_per_class": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "best"}, "reference: no row is called 'best'"),
        ({"reference": ["PudNet+", "best"]}, "reference: no row is called 'best'"),
        ({"reference": ["PudNet+", "static trunk"]}, "reference: of several, each must be a row of another number of"),
        (
            {"reference": ["PudNet+", "few images"], "axis": "time"},
            "reference: several are for a study without an axis",
        ),
        ({"rows": {"a": {"method": "magic"}}}, "rows.a.method: "),
        ({"rows": {"a": {"variant": "pudnet_minus"}}}, "rows.a.variant: "),
        ({"rows": {"a": {"colour": 1}}}, "rows.a.colour: unknown key"),
        ({"rows": {"a": None}}, "rows.a: must be a block"),
        ({"rows": {"static trunk": {"method": "protonet", "sketch": "shuffled"}}}, "rows.static trunk: sketch: "),
        (
            {"rows": {"static trunk": {"method": "r2d2", "head": "ridge", "changes": {"penalty": "leave_one_out"}}}},
            "rows.static trunk: head: ridge replaces the classifier that changes.penalty is for",
        ),
        ({"measure": "losses", "rows": {"static trunk": {"method": "scratch_gc"}}}, "has no losses"),
        ({"measure": "correlation"}, "method: static_trunk has the same weights for all groups"),
        ({"axis": "columns", "columns": {"x / nan": {}}}, "axis: columns.x / nan: must be called NUMBER"),
        ({"rows": {}}, "rows: "),
        (
            {"rows": {"static trunk": {}, "Static-trunk!": {"variant": "pudnet_plus"}}},
            "rows.static trunk: its letters and digits must differ",
        ),
        ({"rows": {"static trunk": {}, "same": {}}}, "rows.same: stands twice"),
        ({"columns": {"a": {"setting": "digits"}, "b": {"setting": "digits"}}}, "columns.b: stands twice"),
        ({"columns": {}}, "tiny.yaml: columns: needs one at least, such as `digits: {setting: digits}`"),
        ({"columns": {"a": 3}}, "columns.a: must be a block"),
        ({"measure": "speed"}, "measure: "),
        ({"measure": "whole"}, "whole: missing"),
        ({"measure": "losses", "reference": None, "rows": {"PudNet": {}}}, "diagnose: is for `measure: accuracy`"),
        ({"finetune": {"epochs": 0}}, "finetune.epochs: "),
        (
            {"measure": "finetune", "rows": {"few": {"images": 20}}, "reference": None},
            "few: images: is not for `measure",
        ),
        ({"axis": "columns"}, "columns.digits: must be called NUMBER or PANEL / NUMBER"),
        ({"rows": {"static trunk": {"paper": "best"}}, "columns": {"a": {"paper": "table9.{row}"}}}, "'table9.best'"),
        ({"size": 3}, "size: unknown key"),
        ({date(2026, 1, 2): 3}, "tiny.yaml: 2026-01-02: a key must be text; put it in quotes"),
        ({"rows": {"a": {0.2: 3}}}, "rows.a: 0.2: a key must be text; put it in quotes"),
    ],
)
def test_what_is_wrong_in_a_study_is_said_in_one_line(changes, message, project):
    project({**TINY, **changes})
    with pytest.raises(UserError) as error:
        load_study("tiny")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("over", "row", "message"),
    [
        ({"groups.colour": 1}, {}, "groups.colour: no such key"),
        ({"colour.red.green": 1}, {}, "colour.red.green: no such key"),
        ({"groups.train_groups": 0}, {}, "groups.train_groups: "),
        ({}, {"changes": {"colour": 1}}, "rows.PudNet.changes.colour: unknown key"),
        ({}, {"changes": {"filter_grid": 0}}, "filter_grid: "),
        ({}, {}, "rows.PudNet: means the same as row usual"),
        ({}, {"changes": {"hidden": 1_000_000}}, "rows.PudNet: model: a hypernetwork of "),
        ({}, {"target": "resnet99"}, "rows.PudNet.target: unknown name 'resnet99'"),
        ({}, {"target": "resnet18"}, "rows.PudNet.target: resnet18 in a column of convnet3"),
        ({}, {"method": "pretrained", "changes": {"kl_weight": 0.5}}, "rows.PudNet.changes.kl_weight: unknown key"),
        (
            {},
            {"method": "pretrained", "changes": {"pretraining_share": 0.5}},
            "rows.PudNet.changes.pretraining_share: unknown key",
        ),
        (
            {"groups.test_classes_per_group": 4},
            {"method": "r2d2", "variant": "pudnet_plus"},
            "rows.PudNet: images: missing; test groups have 4 classes and training groups 2",
        ),
        ({"groups.test_groups": 1}, {"sketch": "shuffled"}, "rows.PudNet: sketch: shuffled needs another test group"),
        ({"study.hours": 1}, {}, "over: study.hours: is for a command, not for a study; set it in"),
        (
            {},
            {"method": "scratch_adam", "changes": {"gc": True}},
            "changes.gc: unknown key; known: ",
        ),
        ({}, {"method": "random_weights", "changes": {"eta": 0.5}}, "changes.eta: unknown key; known: none"),
        ({}, {"method": "r2d2", "changes": {"scale": -1}}, "rows.PudNet.changes.scale: "),
        (
            {"groups": {"train_groups": 5}},
            {},
            "over: groups: write each of its keys with a dot, as `groups.train_groups`",
        ),
        (
            {"resources.workers": 2, "train.groups_per_step": 2},
            {"changes": {"normalization": "batch"}},
            "rows.PudNet: with model.normalization batch, set resources.workers to 1",
        ),
        (
            {},
            {"images": 13},
            "rows.PudNet: images: 13 labels are not as many of each of a test group's 2 classes",
        ),
        (
            {"target": "resnet18"},
            {"method": "r2d2", "changes": {"blocks": "leave_one_out"}},
            "rows.PudNet: r2d2.blocks: leave_one_out needs target: convnet3",
        ),
    ],
)
def test_what_a_study_asks_for_in_vain_is_said_in_one_line(over, row, message, project):
    project(
        {
            **TINY,
            "over": over,
            "reference": "PudNet",
            "rows": {"usual": {"changes": {"pooling": "mean"}}, "PudNet": row},
        }
    )
    study = load_study("tiny")
    with pytest.raises(UserError) as error:
        check_rows(study, column_params(study, "digits"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_target_that_cannot_be_built_is_said_whatever_the_methods(project):
    columns = {"digits": {"setting": "digits", "target": "nowhere.nets:Net"}}
    project({**TINY, "columns": columns, "rows": {"one": {"method": "pretrained"}}, "reference": "one"})
    study = load_study("tiny")
    with pytest.raises(UserError, match=r"^rows\.one: target nowhere\.nets:Net: "):
        check_rows(study, column_params(study, "digits"))


def test_a_row_has_the_columns_target_or_its_own(project):
    project({**TINY, "rows": {"one": {}, "other": {"target": "convnet3_multilevel"}}, "reference": "one"})
    study = load_study("tiny")
    params = column_params(study, "digits")
    specs = [row_spec(params, name, row, 0, 10) for name, row in study.rows.items()]
    assert [spec.target for spec in specs] == ["convnet3", "convnet3_multilevel"]
    check_rows(study, params)


@pytest.mark.parametrize("classes", [2, 5, 10, 30])
@pytest.mark.parametrize("variant", ["pudnet", "pudnet_plus"])
def test_a_row_has_the_labels_of_as_many_images_as_it_says(variant, classes):
    """Of ten classes, too, where a prediction for a user would have ten of each, whatever it looks at."""
    some = Predictor.untrained("convnet3", channels=1, image_size=8, variant=variant)
    labels = torch.arange(classes).repeat_interleave(50)
    predictor = Predictor(some.model, given_labels(some.card, 90, classes), some.target, sketch_images=90)
    network = predictor.adapt(torch.randn(len(labels), 1, 8, 8), labels, tuple(range(classes)))
    used = network.card.provenance
    assert used["support_images"] == used["sketch_images"] == 90
    if variant == "pudnet_plus":
        assert used["calibration_images"] == 90  # so one pass is enough


@pytest.mark.parametrize(
    "row",
    [
        {"method": "static_trunk"},  # each class has as many labels as in every row of this variant
        {"method": "r2d2", "variant": "pudnet_plus", "images": 40},
        {"method": "scratch_gc", "variant": "pudnet_plus"},  # has all labels
    ],
)
def test_test_groups_may_have_other_classes_than_training_groups(row, project):
    rows = {"one": row, "other": {}}
    project({**TINY, "over": {"groups.test_classes_per_group": 4}, "rows": rows, "reference": "one"})
    study = load_study("tiny")
    check_rows(study, column_params(study, "digits"))
    check_labels(study, column_params(study, "digits"), tested=10)  # as of a whole set


def test_a_budget_is_a_part_of_the_papers_number_of_groups(project, tmp_path):
    columns = {"all": {"setting": "fashion"}, "ten": {"setting": "fashion", "groups.train_groups": 10}}
    project({**TINY, "columns": columns})
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("budget: null", "budget: 0.25"))
    study = load_study("tiny")
    params = {column: column_params(study, column) for column in columns}
    assert [own.groups.train_groups for own in params.values()] == [500, 10]
    assert wanted(study, params) == (params, {})


def test_without_a_budget_params_say_how_many_groups_if_the_study_does_not(project, tmp_path):
    columns = {"one": {"setting": "fashion"}, "ten": {"setting": "fashion", "groups.train_groups": 10}}
    over = {key: value for key, value in SMALL.items() if key != "groups.train_groups"}
    project({**TINY, "columns": columns, "over": over})
    text = (ROOT / "params.yaml").read_text()
    for given, expected in (("null", 2000), ("70", 70)):
        (tmp_path / "params.yaml").write_text(text.replace("train_groups: null", f"train_groups: {given}"))
        study = load_study("tiny")
        assert [column_params(study, column).groups.train_groups for column in columns] == [expected, 10]


def test_a_pages_command_repeats_what_params_say_to_all_studies(project):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    study = Study(title="", columns={"digits": Column({})}, rows={"PudNet": Row()})
    assert "Made by `python -m pipeline.study tiny`." in render("tiny", study, "", {}, resolve(raw))
    raw |= {"seed": 5, "splits": 3, "study": raw["study"] | {"settings": ["digits"], "hours": 2}}
    raw["groups"]["train_groups"] = 70
    changes = "-S 'study.settings=[digits]' -S 'seed=5' -S 'splits=3' -S 'groups.train_groups=70'"
    command = f"dvc exp run {changes} studies/dvc.yaml:study@tiny"
    assert f"Made by `{command}`." in render("tiny", study, "", {}, resolve(raw))


def test_a_pages_command_has_what_differs_from_the_committed_params(project, tmp_path):
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(re.sub("\n  augment: .*", "", text))  # as of before this key came
    for command in ("init -q", "add params.yaml", "-c user.name=t -c user.email=t@example.invalid commit -qm t"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    raw = yaml.safe_load(text)
    study = Study(title="", over={"train.passes": 2}, columns={"digits": Column({})}, rows={"PudNet": Row()})
    raw["train"] |= {"augment": "shift_mirror", "passes": 2, "learn_temperature": True}
    raw["search"] |= {"space": {"eta": [0.5]}, "report_every": 7}
    raw["prepare"]["source"], raw["variant"] = "npz:/home/me/mine.npz", "pudnet_plus"  # its place; each row has its own
    raw["study"]["hours"], raw["seed"] = 3, 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    page = render("tiny", study, "", {}, resolve(raw))
    changes = re.findall(r"-S '(.*?)'", page[page.index("Made by") : page.index("studies/dvc.yaml")])
    assert sorted(changes) == [
        "+train.augment=shift_mirror",
        "search.report_every=7",
        "seed=1",
        "train.learn_temperature=true",
    ]


def test_a_study_that_finds_its_trainings_running_elsewhere_leaves_its_page(project, tmp_path, monkeypatch):
    columns = {name: {"setting": "digits", "seed": seed} for seed, name in enumerate(("one", "two"))}
    project({**TINY, "columns": columns})
    study, done = load_study("tiny"), pd.DataFrame({"row": ["PudNet+"]})
    said = iter([done, Busy("study-tiny: is already running as process 7")])

    def train(*_):
        if isinstance(found := next(said), Busy):
            raise found
        return found

    monkeypatch.setattr(running.workspace, "get_data", lambda params: None)
    monkeypatch.setattr(running.workspace, "workspace", lambda params: contextlib.nullcontext())
    monkeypatch.setattr(running.trained, "train", train)
    monkeypatch.setitem(running.KINDS, "accuracy", SimpleNamespace(measure=lambda found: found))
    written = []
    monkeypatch.setattr(running, "_write", lambda name, study, frames, left_out, params: written.append(left_out))
    with pytest.raises(Busy, match="already running as process 7"):
        running.run_study("tiny", study, {name: column_params(study, name) for name in columns}, {})
    assert written == [{"two": "not yet"}]


def test_code_that_is_edited_during_a_study_spoils_nothing(project, monkeypatch):
    study = load_study("tiny")
    params = column_params(study, "digits")
    rows = {name: row for name, row in study.rows.items() if row.trained}
    specs = {name: row_spec(params, name, row, 0, ANY) for name, row in rows.items()}
    code = ["before"]
    for module in (trained, cell):
        monkeypatch.setattr(module, "trial_key", lambda spec: f"{spec.kind}-{code[0]}")

    def run_missing(experiment, *_):
        code[0] = "after"
        return [f"{spec.kind}'s" for spec in experiment.specs]

    monkeypatch.setattr(trained, "run_missing", run_missing)
    monkeypatch.setattr(cell, "measurement_key", lambda kind, target, seed, plain, code: str(plain))
    ended = trained._run_once("{}", "tiny", specs, params, None)
    assert ended == {name: f"{spec.kind}'s" for name, spec in specs.items()}
    keys = {StudyCell(specs["PudNet+"], Path(f"{key}/checkpoint")).key(params) for key in ("before", "after")}
    assert len(keys) == 2


def test_any_number_of_lines_has_a_figure_and_a_place_may_be_a_fraction(project):
    points = pd.DataFrame({"panel": "a", "line": [f"row {i}" for i in range(40)] * 2, "x": [0.25] * 40 + [1000.0] * 40})
    assert to_png(lines_figure(points.assign(y=1.0), "x", "y", log=True)).startswith(b"\x89PNG")
    axes = lines_figure(points.assign(y=1.0), "x", "y", log=True).axes[0]
    assert [axes.xaxis.get_major_formatter()(x) for x in (0.25, 1e3, 1e6)] == [
        "0.25",
        "1,000",
        "1,000,000",
    ]


def test_a_column_that_is_not_to_run_stops_no_other(project, tmp_path):
    """Of a budget that is enough for one setting alone, or with too few points for correlations."""
    columns = {"few": {"setting": "fashion"}, "many": {"setting": "cifar100"}}
    project({**TINY, "columns": columns})
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("budget: null", "budget: 0.0002"))
    study = load_study("tiny")
    chosen, left_out = wanted(study, {column: column_params(study, column) for column in columns})
    assert list(chosen) == ["many"] and chosen["many"].groups.train_groups == 20
    assert "0.0002 of the 2,000 groups of fashion leaves none" in left_out["few"]
    study = replace(study, measure="correlation")
    with pytest.raises(UserError, match="half of 20 training groups is too few for 10 components a side"):
        wanted(study, {"many": column_params(study, "many")})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("budget: 0.0001", "study.budget: 0.0001 of the 400 groups of digits leaves none; give at least 0.0025"),
        ("budget: 2", "study.budget: "),
        ("settings: [fashion]", "study: nothing is left to run: not among study.settings"),
        ("settings: [magic]", "setting: unknown name 'magic'"),
        ("targets: [magic]", "target: "),
        ("sources: 3", "study.sources: "),
        ("sources: {CIFAR100: npz:c.npz}", "study.sources: source 'CIFAR100' is not known"),
        ("sources: {torchvision:CIFAR100: c.npz}", "study.sources: source 'c.npz' is not known"),
    ],
)
def test_what_params_ask_of_studies_in_vain_is_said_in_one_line(line, message, project, tmp_path):
    text, key = (ROOT / "params.yaml").read_text(), line.partition(":")[0]
    lines = [f"  {line}" if own.startswith(f"  {key}: ") else own for own in text.splitlines()]
    (tmp_path / "params.yaml").write_text("\n".join(lines))
    study = load_study("tiny")
    with pytest.raises(UserError) as error:
        wanted(study, {column: column_params(study, column) for column in study.columns})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_study_ends_with_the_names_of_those_there_are(project, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["table99"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: study: unknown name 'table99'; known: tiny\n"
    Path("studies").rename("elsewhere")
    with pytest.raises(SystemExit) as ended:
        main(["tiny"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: studies: no such folder; run from the project's root\n"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "studies").glob("*.yaml") if path.stem != "dvc"))
def test_every_committed_study_is_sound_and_a_stage(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(name)
    columns = [column_params(study, column) for column in study.columns]
    for params in columns:
        for row, own in study.rows.items():
            row_spec(params, row, own, 0, ANY)
    for params in {(own.setting, own.target, own.groups.test_classes_per_group): own for own in columns}.values():
        check_rows(study, params)
    assert name in yaml.safe_load((ROOT / "studies" / "dvc.yaml").read_text())["stages"]["study"]["matrix"]["name"]
