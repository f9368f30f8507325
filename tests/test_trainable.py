"""What a trial leaves in its folder, how another process goes on from there, and what Ray hears of it."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from ray import tune

from pipeline.project import Busy
from pipeline.runs import executor, trainable, trial_folder
from pipeline.runs.executor import Asha, _locked
from pipeline.runs.trial import DIVERGED, STATE, TrialSpec
from pudnet.errors import RunFailed

NAMES = {field.name for field in dataclasses.fields(TrialSpec)}


class Counting:
    """A trial of ten groups that counts them, and ends as it is told to."""

    def __init__(self, last: int = 10, error: Exception | None = None) -> None:
        self.count, self.last, self.error = 0, last, error

    def run(self):
        while self.count < self.last:
            self.count += 2
            yield {"groups": self.count, "loss": float(self.count)}
        if self.error:
            raise self.error

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a trial in one folder, time after time; what it reports."""

    def run(trial):
        reports = []
        monkeypatch.setattr(tune, "report", reports.append)
        monkeypatch.setattr(trainable, "open_trial", lambda *what: trial)
        share = {"cpu": torch.get_num_threads(), "gpu": 0}
        told = {"spec": dict.fromkeys(NAMES, ""), "folder": str(tmp_path / "trial")}
        with contextlib.suppress(SystemExit):
            trainable.run_trial({"trial": told, "share": share, "workers": 1})
        return reports

    return run


def checkpoints(tmp_path):
    return sorted(path.parent.name for path in (tmp_path / "trial").glob(f"*/{STATE}"))


def groups(reports, replayed):
    return [one["groups"] for one in reports if "groups" in one and one.get(trainable.REPLAYED, False) == replayed]


def test_a_trial_goes_on_from_its_last_report_and_says_again_what_it_said(run, tmp_path):
    first = run(Counting(6, SystemExit()))
    assert (groups(first, True), groups(first, False)) == ([], [2, 4, 6])
    again = run(Counting())
    assert (groups(again, True), groups(again, False)) == ([2, 4, 6], [8, 10])
    assert [{**one, trainable.REPLAYED: True} for one in first] == again[:3]
    assert checkpoints(tmp_path) == ["000000008", "000000010"]
    assert groups(run(Counting()), False) == []


def test_a_trial_that_has_ended_is_only_heard_again(run, tmp_path):
    run(Counting(4, SystemExit()))
    (tmp_path / "trial" / trial_folder.ENDED).touch()
    again = run(Counting())
    assert groups(again, True) == [2, 4] and groups(again, False) == []


@pytest.mark.parametrize(("damaged", "first"), [(1, 8), (2, 2)])
def test_damaged_checkpoints_are_named_passed_over_and_written_anew(run, tmp_path, capsys, damaged, first):
    run(Counting(8, SystemExit()))
    for name in checkpoints(tmp_path)[-damaged:]:
        file = tmp_path / "trial" / name / STATE
        file.write_bytes(file.read_bytes()[:100])
    stopped = run(Counting(first, SystemExit()))
    assert capsys.readouterr().out.count("is damaged") == damaged
    assert groups(stopped, False) == [first]
    again = run(Counting())
    assert groups(again, False) == [*range(first + 2, 11, 2)]
    assert checkpoints(tmp_path) == ["000000008", "000000010"]


def test_a_checkpoint_that_no_memory_can_hold_is_not_taken_for_damaged(run, monkeypatch):
    run(Counting(4, SystemExit()))
    monkeypatch.setattr(trial_folder, "load_state", lambda folder: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        run(Counting())


def test_a_trial_that_diverges_tells_ray_of_no_failure(run):
    assert run(Counting(4, RunFailed("the loss was not finite")))[-1] == {DIVERGED: "the loss was not finite"}


def test_asha_stops_no_trial_for_what_it_reported_before_but_remembers_it():
    class Trial:
        def __init__(self, name):
            self.trial_id = name

    asha = Asha(time_attr="groups", metric="validation_accuracy", mode="max", max_t=16, grace_period=2)
    good, weak, other = map(Trial, ("good", "weak", "other"))
    for trial in (good, weak, other):
        asha.on_trial_add(None, trial)
    report = {"groups": 2, trainable.REPLAYED: True}
    assert asha.on_trial_result(None, good, report | {"validation_accuracy": 90}) == asha.CONTINUE
    assert asha.on_trial_result(None, weak, report | {"validation_accuracy": 50}) == asha.CONTINUE
    assert asha.on_trial_result(None, weak, {"groups": 4, "validation_accuracy": 50}) == asha.CONTINUE
    assert asha.on_trial_result(None, other, {"groups": 2, "validation_accuracy": 50}) == asha.STOP


def test_a_trial_that_diverged_names_the_folder_to_delete_and_mlflow_is_told_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = SimpleNamespace(name="steep")
    trial_folder.mark_ended(trial_folder.Finished(spec, "key", [], "the loss was not finite"))
    experiment = SimpleNamespace(specs=[spec], keys={"steep": "key"}, key="one", keep_going=False)
    told = []
    log = SimpleNamespace(write=lambda spec, reports, status: told.append((spec.name, status)))
    monkeypatch.setattr(executor, "TrialLog", lambda *_: log)
    said = "steep: the loss was not finite .to try the same again, delete .*/.pud/trials/key.$"
    with pytest.raises(RunFailed, match=said):
        executor.run_missing(experiment, None, None)
    assert told == [("steep", "FAILED")]  # MLflow may have missed it


def test_a_trial_of_two_experiments_is_run_by_one_of_them_unless_it_has_ended(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def held(*trials: str) -> contextlib.AbstractContextManager[None]:
        specs = [SimpleNamespace(name=name) for name in trials]
        return _locked(SimpleNamespace(specs=specs, keys={name: name for name in trials}), fresh=False)

    with held("common", "first"):
        with pytest.raises(Busy, match="common: is already running"), held("second", "common"):
            pass
        folder = trial_folder.trial_folder("common")
        folder.mkdir(parents=True)
        (folder / trial_folder.ENDED).write_text('{"groups": 0, "diverged": null}')
        with held("second", "common"):
            pass
        (folder / trial_folder.ENDED).write_text("damaged")  # so it is to run again
        with pytest.raises(Busy, match="common: is already running"), held("second", "common"):
            pass
