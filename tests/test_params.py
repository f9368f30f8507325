"""params.yaml: what is null comes from the setting, and a mistake is one line that names the key."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.check import check
from pipeline.params import PLUS, load_params, resolve
from pipeline.project import git_commit
from pipeline.reporting import methods
from pipeline.runs.keys import CODE, TRAINING_CODE, VALIDATION_CODE, code_files
from pipeline.runs.trial import make_spec, pick_device
from pipeline.studies.workspace import GROUPS_CODE, PREPARE_CODE
from pipeline.tracking.provenance import provenance
from pudnet.baselines import LEARNED
from pudnet.config import VARIANTS, paper_target
from pudnet.errors import UserError
from pudnet.hypernet import PudNet
from pudnet.settings import SETTINGS
from pudnet.targets.build import TARGETS, build_target

ROOT = Path(__file__).parent.parent


@pytest.fixture
def raw() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_brings_its_own_protocol(raw, name):
    raw["setting"] = name
    raw["groups"]["train_groups"] = None
    params, setting = resolve(raw), SETTINGS[name]
    sources = setting.source if isinstance(setting.source, list) else [setting.source]
    assert (params.prepare.source, params.prepare.test_source) == (sources, setting.test_source)
    assert tuple(params.groups.looks) == setting.looks
    assert params.groups.train_groups == setting.train_groups
    assert params.model.eta == setting.eta["convnet3"]
    assert params.model.depth == setting.depth["convnet3"]


def test_another_set_is_one_test_group_unless_groups_are_asked_for(raw):
    assert not resolve(raw).sizes.test_whole
    raw["prepare"]["test_source"] = "folder:photos"
    assert resolve(raw).sizes.test_whole and resolve(raw).groups.test_groups == 1
    looks = {**raw, "groups": {**raw["groups"], "test_groups": 50, "test_looks": ["grey", "edges"]}}
    assert resolve(looks).groups.test_groups == 2  # all images, once with each look
    for name in ("test_classes_per_group", "test_images_per_group"):  # which one group of all images cannot have
        asked = {**raw, "groups": {**raw["groups"], name: 4}}
        with pytest.raises(UserError, match=rf"groups.{name}: .* all test images are one group"):
            resolve(asked)
        asked["groups"]["test_whole"] = False
        assert getattr(resolve(asked).sizes, name) == 4
    raw["groups"]["test_whole"] = False
    assert not resolve(raw).sizes.test_whole


def test_a_target_brings_its_extractor_eta_and_depth(raw):
    small, large = ("1conv-1linear", 0.3, 2), ("5conv", 0.5, 4)
    expected = {"convnet3": small, "convnet3_multilevel": small, "resnet18": large, "my.nets:Net": large}
    raw["setting"] = "imagenet"
    for raw["target"], own in expected.items():
        model = resolve(raw).model
        assert (model.extractor, model.eta, model.depth) == own


def test_every_target_has_a_name_for_pages_and_one_of_the_paper_that_it_is_like():
    alike = {name: paper_target(name) for name in TARGETS}
    assert alike == {
        "convnet3": "convnet3",
        "convnet3_multilevel": "convnet3",
        "resnet18": "resnet18",
        "resnet34": "resnet34",
    }
    assert methods.TARGETS.keys() == TARGETS.keys()


def test_the_check_names_the_methods_that_make_all_passes_whatever_patience_says(raw, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check(resolve(raw))
    assert "patience" not in capsys.readouterr().out
    raw["train"]["patience"] = 1
    check(resolve(raw))
    said = "check: meta_baseline, meta_deepbdc, musml, pudnet_plus: train.patience does not hold"
    assert said in capsys.readouterr().out
    check(resolve({**raw, "variant": "pudnet_plus"}))  # whose rate falls, and the rates of all beside it
    assert f"check: pudnet, {', '.join(LEARNED)}, static_trunk: train.patience does not" in capsys.readouterr().out


@pytest.mark.parametrize("share", [None, 0.5, 1.0])
def test_patience_holds_where_a_shorter_training_is_the_beginning_of_a_longer_one(raw, share):
    raw["train"] |= {"patience": 2, "pretraining_share": share}
    holds = {}
    for schedule in ("constant", "one_cycle"):
        raw["train"]["schedule"] = schedule
        params = resolve(raw)
        specs = [make_spec(params, name, name, 0, {}, "train", 0) for name in ("pudnet", "static_trunk", *LEARNED)]
        holds[schedule] = {spec.name for spec in specs if spec.patience}
    one_stage = {"pudnet", "static_trunk", "matchnet", "protonet", "r2d2"} if share != 0.5 else set()
    assert holds == {"constant": one_stage | {"pretrained"}, "one_cycle": set()}


def test_the_check_says_how_large_the_hypernetwork_is_and_warns_of_one_too_large(raw, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where it writes that it is done
    raw["target"] = "tests.nets:Depthwise"
    check(resolve(raw))
    assert "for the 1,680 weights of 4 convolutions" in capsys.readouterr().out
    raw["model"]["generator_hidden"] = 64
    check(resolve(raw))
    assert "lower model.generator_hidden, which is 64" in capsys.readouterr().err
    raw["target"], raw["model"]["generator_hidden"] = "resnet18", 16
    check(resolve(raw))
    captured = capsys.readouterr()
    assert "20 convolutions" in captured.out and not captured.err
    assert (tmp_path / "results/checked.txt").is_file()


def test_the_check_is_of_the_variant_and_says_what_that_sets_itself(raw, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    raw |= {"variant": "pudnet_plus", "model": raw["model"] | {"penalty": "leave_one_out", "blocks": "leave_one_out"}}
    params = resolve(raw)
    check(params)
    target = build_target("convnet3", 1, 8)
    parameters = sum(weight.numel() for weight in PudNet(params.configured({})[0], target).parameters())
    assert capsys.readouterr().out.count("\n") == 1 and params.overridden() == []
    raw["model"]["sketch_images"], raw["train"]["learning_rate"] = 200, 0.003
    check(resolve(raw))
    said = capsys.readouterr().out
    assert f"a hypernetwork of {parameters:,} parameters" in said
    assert "pudnet_plus sets model.sketch_images, train.learning_rate itself, not as params.yaml has them" in said


def test_the_check_comes_before_everything_else():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(stages["check"]["outs"]) <= set(stages["prepare"]["deps"])
    assert "data/prepared" in stages["groups"]["deps"] and "data/groups" in stages["search"]["deps"]


def test_a_given_value_wins_over_the_setting(raw):
    raw["model"]["eta"] = 0.7
    raw["prepare"]["source"] = "folder:photos"
    params = resolve(raw)
    assert params.model.eta == 0.7
    assert params.prepare.source == ["folder:photos"]


def test_the_grid_is_every_combination_and_each_cell_changes_the_model(raw):
    raw["search"]["space"] = {"eta": [0.0, 0.3], "depth": [1, 4], "learning_rate": [0.01]}
    params = resolve(raw)
    assert len(params.grid()) == 4
    model, train = params.configured(params.grid()[-1])
    assert (model.eta, model.depth, train.learning_rate) == (0.3, 4, 0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_wins_over_the_grid(raw, variant):
    raw["variant"] = variant
    raw["search"]["space"] = {"eta": [0.1, 0.3], "depth": [1, 2]}
    params = resolve(raw)
    for cell in params.grid():
        model, train = params.configured(cell)
        for key, value in VARIANTS[variant].items():
            assert {**model.__dict__, **train.__dict__}[key] == value
            assert key not in cell  # it is not searched
    assert len(params.grid()) == 4 / 2 ** len(VARIANTS[variant].keys() & {"eta", "depth"})


def test_a_baselines_cell_is_its_own_and_its_trainings(raw):
    raw["baselines"]["space"] = {"meta_baseline": {"learning_rate": [0.01, 0.02], "meta_rate": [0.5]}}
    params = resolve(raw)
    own, train = params.baseline("meta_baseline", params.baseline_grid("meta_baseline")[1])
    assert (own.meta_rate, own.pretraining, train.learning_rate) == (0.5, 0.5, 0.02)
    assert train.support_per_class == params.train.support_per_class
    assert params.baseline_grid("protonet") == [{}]


def test_a_resnet_of_pudnet_plus_is_pretrained_unless_told_otherwise(raw):
    shares = {}
    for target, variant in itertools.product(("convnet3", "resnet18"), ("pudnet", "pudnet_plus")):
        params = resolve({**raw, "target": target, "variant": variant})
        own, others = params.configured({})[1], params.for_baselines(500)
        assert own.pretraining_share == others.baseline("r2d2", {})[1].pretraining_share
        plus = make_spec(others, "plus", PLUS, 0, {}, "train", 0)
        assert plus.train["pretraining_share"] == (0.8 if target == "resnet18" else 0.0)
        shares[target, variant] = own.pretraining_share
        assert others.baseline("r2d2", {"pretraining_share": 0.5})[1].pretraining_share == 0.5
    assert shares.pop(("resnet18", "pudnet_plus")) == 0.8 and set(shares.values()) == {0.0}
    raw["model"]["base"] = True
    with_base = resolve({**raw, "target": "resnet18", "variant": "pudnet"})
    assert [with_base.configured({"base": base})[1].pretraining_share for base in (True, False)] == [0.8, 0.0]
    raw["train"]["pretraining_share"] = 0.0
    params = resolve({**raw, "target": "resnet18", "variant": "pudnet_plus"})
    assert params.configured({})[1].pretraining_share == 0.0


def test_numbers_are_read_as_dvc_writes_them(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("learning_rate: 0.001", "learning_rate: 1e-05"))
    assert load_params(path).train.learning_rate == 1e-5


MISTAKES = {
    "setting": ("setting", "mnist"),
    "target": ("target", "resnet1"),
    "variant": ("variant", "with_everything"),
    "splits": ("splits", 0),
    "seed": ("seed", "zero"),
    "unknown": ("unknown", 1),
    "model.eta": ("model.eta", 1.5),
    "model.depth": ("model.depth", 0),
    "model.pooling": ("model.pooling", "median"),
    "model.extractor": ("model.extractor", "tenconv"),
    "model.etaa": ("model.etaa", 0.5),
    "model: class_filters: true and change: false need base: true": ("model.change", False),
    "train.learning_rate": ("train.learning_rate", float("nan")),
    "train.learn_temperature": ("train.learn_temperature", "yes please"),
    "groups.train_groups": ("groups.train_groups", 2.5),
    "groups": ("groups", [1, 2]),
    "search.space.etta": ("search.space.etta", [0.1]),
    "search.space.eta": ("search.space.eta", []),
    "search.space": ("search.space.eta", [0.1, 7]),
    "search.space.report_every: unknown key": ("search.space.report_every", [10, 20]),
    "study.hours": ("study.hours", 1e300),
    "prepare.channels": ("prepare.channels", 4),
    "resources.gpus": ("resources.gpus", -1),
    "prepare.test_source": ("prepare.test_source", "sklearn:digits"),
    "prepare.source: one is listed twice": ("prepare.source", ["sklearn:digits", "sklearn:digits"]),
    "groups.train_classes: [6] has 1 number(s), but prepare.source has 2": (
        "prepare.source",
        ["sklearn:digits", "npz:x.npz"],
    ),
    "groups.looks.1": ("groups.looks", ["plain", "upside_down"]),
    "groups.test_looks: one is listed twice": ("groups.test_looks", ["grey", "grey"]),
    "baselines.methods": ("baselines.methods", ["static_trunk", "static_trunk"]),
    "baselines.methods.1": ("baselines.methods", ["static_trunk", "alexnet"]),
    "baselines.space.gandalf": ("baselines.space.gandalf", {}),
    "baselines.space.protonet.scalee": ("baselines.space.protonet.scalee", [1.0]),
    "baselines.space.musml.subspaces": ("baselines.space.musml.subspaces", [0, 1]),
    "baselines.space.scratch_gc.temperature": ("baselines.space.scratch_gc", {"temperature": [1.0]}),
    "baselines.space.scratch_adam.epochs": ("baselines.space.scratch_adam", {"epochs": [5, 10]}),
    "baselines.space.protonet.support_per_class": ("baselines.space.protonet", {"support_per_class": [20]}),
    "baselines.scratch_epochs": ("baselines.scratch_epochs", [5, 1]),
    "baselines.scratch_search_epochs": ("baselines.scratch_search_epochs", [5, 5]),
}


@pytest.mark.parametrize(("named", "mistake"), MISTAKES.items())
def test_a_mistake_is_one_line_that_names_its_key(raw, named, mistake):
    (*path, last), value = mistake[0].split("."), mistake[1]
    block = raw
    for key in path:
        block = block[key]
    block[last] = value
    with pytest.raises(UserError) as error:
        resolve(raw)
    assert str(error.value).startswith(named)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gpus", "normalization", "said"), [(0.5, "group", "cannot share a GPU"), (1, "batch", "normalization batch")]
)
def test_workers_that_could_not_train_as_one_process_are_refused(raw, gpus, normalization, said):
    raw["resources"] |= {"workers": 2, "gpus": gpus}
    raw["train"]["groups_per_step"] = 2
    raw["model"]["normalization"] = normalization
    with pytest.raises(UserError, match=f"resources.workers: .*{said}"):
        resolve(raw)


@pytest.mark.parametrize("text", ["setting: [", "- a list", "", "setting: digits"])
def test_a_file_that_is_no_params_file_is_one_line(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_params(path)
    assert "\n" not in str(error.value)


def test_results_depend_on_every_file_of_the_method_that_a_trial_imports():
    """But for what only finds, reads and names data, whose content counts by itself."""
    names = "import pipeline.runs.trial, sys; print(*(name for name in sys.modules if name.startswith('pudnet.')))"
    imported = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True).stdout.split()
    plain = {f"pudnet.{name}" for name in ("data", "errors", "files", "locations", "settings")}
    plain |= {f"pudnet.data.{name}" for name in ("datasets", "decode", "folders", "groups", "sources", "store")}
    counted = {file.relative_to(CODE).with_suffix("") for file in code_files(TRAINING_CODE + VALIDATION_CODE)}
    counted = {".".join(path.parts).removesuffix(".__init__") for path in counted}
    of_scratch = {"pudnet.scratch", "pudnet.gradient_centralization"}
    own_of_a_method = {name for name in imported if name.startswith("pudnet.baselines")} | of_scratch
    assert set(imported) - plain - own_of_a_method <= counted and counted <= set(imported)


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("prepare", PREPARE_CODE),
        ("groups", GROUPS_CODE),
        ("search", TRAINING_CODE + VALIDATION_CODE),
        ("train", TRAINING_CODE),
        ("evaluate", (*VALIDATION_CODE, "hypernet", "targets", "classifier", "ridge", "cpu", "device", "data/images")),
        ("baselines", (*TRAINING_CODE, *VALIDATION_CODE, "baselines", "scratch", "gradient_centralization")),
    ],
)
def test_dvc_knows_all_code_that_a_stages_result_depends_on(stage, names):
    known = [CODE / path for path in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["deps"]]
    missing = [file for file in code_files(names) if file not in known and not set(file.parents) & set(known)]
    assert not missing


def test_baselines_are_trained_as_the_variant_is_and_given_as_many_labels(raw):
    raw["setting"] = "cifar100"
    for variant, images, support in (("pudnet", 100, 10), ("pudnet_plus", 100, 18), ("pudnet_plus", 30, 15)):
        raw["variant"] = variant
        params = resolve(raw)
        train = params.for_baselines(images).baseline("r2d2", {})[1]
        assert train == replace(params.configured({})[1], support_per_class=support)


def test_a_variant_that_is_only_pretrained_leaves_baselines_their_groups(raw):
    params = resolve({**raw, "setting": "cifar100", "variant": "pretrained_ridge"})
    model, own = params.configured({})
    assert (model.reads_labels, model.makes_weights, own.pretraining_share) == (True, False, 1.0)
    others = params.for_baselines(100)
    assert others.baseline("r2d2", {})[1] == replace(own, pretraining_share=0.0, support_per_class=18)
    for method in ("static_trunk", PLUS):
        train = make_spec(others, method, method, 0, {}, "train", 0).train
        assert (train["pretraining_share"], train["support_per_class"]) == (0.0, 18)
    assert make_spec(others, PLUS, PLUS, 0, {}, "train", 0).train["learning_rate"] == 6e-3


def test_every_method_is_given_as_many_labels_of_a_test_group_as_the_variant(raw):
    for variant, classes, labels in (("pudnet", 5, 10), ("pudnet_plus", 5, 18), ("pudnet_plus", 20, 10)):
        assert resolve({**raw, "variant": variant}).labels(classes) == labels


def test_a_gpu_is_for_those_who_were_given_some_of_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [pick_device(gpus).type for gpus in (1, 0.5, 0)] == ["cuda", "cuda", "cpu"]


def test_a_lock_file_in_a_merge_is_left_to_dvc(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\nstages: {}\n=======\n>>>>>>> other\n")
    assert not [tag for tag in provenance(resolve(raw), "search", "report") if tag.startswith("dvc.md5")]


def test_a_commit_is_dirty_if_files_differ_that_no_run_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_commit() == ""

    def git(*command):
        own = ("git", "-c", "user.name=test", "-c", "user.email=test@example.invalid")
        return subprocess.run([*own, *command], capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    assert git_commit() == ""
    written = ("params.yaml", "dvc.lock", "results/metrics.json", "studies/dvc.lock", "studies/results/a.md")
    for name in (*written, "pudnet/net.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    for name in written:
        (tmp_path / name).write_text("2\n")
    assert git_commit() == head
    (tmp_path / "pudnet/net.py").write_text("2\n")
    assert git_commit() == f"{head}-dirty"
    monkeypatch.chdir(tmp_path / "studies")  # a study works in a folder of its own
    assert git_commit() == f"{head}-dirty"
