"""One trial diverges, is killed, loses its checkpoint, or has too little memory."""

import shutil

import pandas as pd
import pytest

from tests.faults.harness import change, checkpoints, mlflow_of, runs_of, truncate
from tests.test_pipeline import ROOT

SEARCH = ("results/search.csv", "results/best.yaml")
TRIALS = ("split0-eta0.0-depth1", "split0-eta0.2-depth1")
STEPS = [2, 4, 6, 8, 10, 12]
HUNGRY = """

class Hungry(MetaLearner):
    def losses(self, *arguments):
        try:
            os.rename({wanted!r}, {refused!r})
        except FileNotFoundError:
            return super().losses(*arguments)
        with open({refused!r}, "w") as file:
            print(os.getpid(), file=file)
        torch.empty(2**50)  # more than any process can have


import os

MetaLearner = Hungry
"""


def blank(path):
    """A page of zeros in the middle, of what a power cut leaves."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    path.write_bytes(content)


def test_a_trial_that_diverges_is_left_out_and_the_others_finish(undisturbed, start, tmp_path):
    project = undisturbed.before("search", tmp_path / "nan")
    change(project, "search", space={"eta": [0.2], "depth": [1], "learning_rate": [0.001, 1e30]})
    said = start(project, "search").well()
    assert "split0-eta0.2-depth1-learning_rate1e+30 is left out: training: the loss was not finite" in said
    found, whole = (pd.read_csv(folder / "results/search.csv") for folder in (project, undisturbed.run("search")))
    assert found.learning_rate.tolist() == [0.001]
    assert found.accuracy.tolist() == whole.accuracy[whole.eta == 0.2].tolist()
    before = (project / "results/search.csv").read_bytes()
    again = start(project, "search").well()
    assert "1 of 2 trials are finished already" in again and ": group" not in again  # it would diverge again
    assert "learning_rate1e+30 is left out: training: the loss was not finite" in again
    assert (project / "results/search.csv").read_bytes() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_that_diverges_says_so_once_and_is_not_repeated(undisturbed, start, workers, tmp_path):
    project = undisturbed.before("train", tmp_path / "diverges")
    change(project, "train", learning_rate=1e30, groups_per_step=2)
    change(project, "resources", workers=workers, cpus=1)
    for begins in (True, False):
        run = start(project, "train")
        assert "train-pudnet-split0: training: the loss was not finite" in run.badly(1)
        assert run.out.count("train-pudnet-split0: failed") == begins
    change(project, "train", learning_rate=0.001)
    start(project, "train").well()


@pytest.mark.parametrize(("damage", "damaged"), [(truncate, "the newest"), (blank, "the newest"), (truncate, "every")])
def test_a_trial_whose_checkpoint_is_damaged_goes_on_from_what_was_before(undisturbed, start, same, damage, damaged):
    project = undisturbed.interrupted()
    found = checkpoints(project)
    assert len(found) == 2
    for checkpoint in found if damaged == "every" else found[-1:]:
        damage(checkpoint)
    said = start(project, "search").well()
    assert said.count("is damaged; its trial goes on from what was before") == (2 if damaged == "every" else 1)
    assert f"{TRIALS[0]}: group" not in said
    assert (f"{TRIALS[1]}: group     2" in said) == (damaged == "every")
    same(project, "search", *SEARCH)


def test_a_trial_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(undisturbed, start, same):
    project = undisturbed.interrupted()
    *_, newest = checkpoints(project)
    newest.rename(newest.with_name(".state.pt.1.partial"))
    said = start(project, "search").well()
    assert "is damaged" not in said and f"{TRIALS[1]}: group     2" not in said
    same(project, "search", *SEARCH)


def test_a_trial_killed_between_its_last_checkpoint_and_its_end_is_not_trained_again(
    undisturbed, start, same, tmp_path
):
    project = undisturbed.before("search", tmp_path / "last")
    start(project, "search").well()
    for ended in (project / ".pud/trials").glob("*/ended.json"):
        ended.unlink()
    said = start(project, "search").well()
    assert said.count("goes on from group 12") == 2 and ": group" not in said
    same(project, "search", *SEARCH)
    assert runs_of(project) == {"search-split0": ("FINISHED", [])} | dict.fromkeys(TRIALS, ("FINISHED", STEPS))


def test_a_trial_begun_in_another_place_goes_on(undisturbed, start, same, tmp_path):
    project = shutil.copytree(undisturbed.interrupted(), tmp_path / "moved")
    said = start(project, "search").well()
    assert f"{TRIALS[0]}: group" not in said and f"{TRIALS[1]}: group     2" not in said
    same(project, "search", *SEARCH)


def test_a_fresh_search_begins_all_trials_again(undisturbed, start, same):
    project = undisturbed.interrupted()
    said = start(project, "search", "--fresh").well()
    assert all(f"{trial}: group     2" in said for trial in TRIALS)
    same(project, "search", *SEARCH)
    runs = mlflow_of(project).search_runs(["1"], "attributes.run_name LIKE 'split0-%'")
    superseded = ["superseded/" in run.data.tags["pudnet.key"] for run in runs]
    assert sorted(superseded) == [False, False, True, True]
    parents = {run.data.tags["mlflow.parentRunId"]: [] for run in runs}
    for run in runs:
        parents[run.data.tags["mlflow.parentRunId"]].append("superseded/" in run.data.tags["pudnet.key"])
    assert sorted(parents.values()) == [[False, False], [True, True]]


@pytest.mark.parametrize("damaged", ["trials/*/*/state.pt", "trials/*/ended.json"])
def test_a_finished_training_that_is_truncated_is_finished_again(undisturbed, start, same, damaged, tmp_path):
    project = undisturbed.after("train", tmp_path / "kept")
    files = [*(project / ".pud").glob(damaged)]
    assert files
    for file in files:
        truncate(file)
    (project / "models/pudnet.safetensors").unlink()
    said = start(project, "train").well()
    assert "train-pudnet-split0: its folder is damaged; it goes on from the newest whole checkpoint, if any" in said
    same(project, "train", "models/pudnet.safetensors", "results/train_curves.csv")
    assert "1 of 1 trials are finished already" in start(project, "train").well()


def test_a_measured_table_that_is_truncated_is_measured_again(undisturbed, start, same, tmp_path):
    project = undisturbed.after("baselines", tmp_path / "tables")
    tables = sorted((project / ".pud/measurements").glob("*.parquet"))
    truncate(tables[0])
    (project / "results/accuracies.csv").unlink()
    said = start(project, "baselines").well()
    assert f"{len(tables) - 1} of {len(tables)} measurements are done already" in said
    same(project, "baselines", "results/accuracies.csv")


def test_a_search_with_other_resources_goes_on(undisturbed, start):
    project = undisturbed.interrupted()
    change(project, "resources", cpus=1)
    said = start(project, "search").well()
    assert f"{TRIALS[0]}: group" not in said and f"{TRIALS[1]}: group     2" not in said
    assert len(pd.read_csv(project / "results/search.csv")) == 2


def test_a_trial_whose_process_is_killed_goes_on_in_another(undisturbed, start, same, tmp_path):
    project = undisturbed.before("search", tmp_path / "worker")
    run = start(project, "search").until(f"{TRIALS[0]}: group     4")
    workers = run.workers()
    assert workers
    for worker in workers:
        worker.kill()
    said = run.well()
    assert all(said.count(f"{trial}: group     4") == 1 for trial in TRIALS)  # said once, and not from the beginning
    same(project, "search", *SEARCH)


def test_a_trial_that_gets_on_between_its_failures_is_never_given_up(undisturbed, start, same, tmp_path):
    """A process that is killed after each report, more often than a trial may fail without one."""
    project = undisturbed.before("train", tmp_path / "often")
    run = start(project, "train")
    for step in STEPS[:-1]:
        run.until(f"train-pudnet-split0: group {step:>5}")
        for worker in run.workers():
            worker.kill()
    said = run.well()
    assert [said.count(f"train-pudnet-split0: group {step:>5}") for step in STEPS] == [1] * len(STEPS)
    same(project, "train", "models/pudnet.safetensors", "results/train_curves.csv")


def test_a_trial_that_gets_no_more_memory_goes_on_in_another_process(undisturbed, start, same, tmp_path):
    """The project's own copy of the code asks once for more memory than there is, when the test says so."""
    project = undisturbed.before("search", tmp_path / "no-more")
    wanted, refused = tmp_path / "wanted", tmp_path / "refused"
    for package in ("pudnet", "pipeline"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (project / "pudnet/learner.py").open("a") as code:
        code.write(HUNGRY.format(wanted=str(wanted), refused=str(refused)))
    run = start(project, "search", PYTHONPATH=str(project)).until(f"{TRIALS[0]}: group     4")
    wanted.touch()
    run.until(lambda: refused.exists() and refused.read_text())
    hungry = int(refused.read_text())
    run.until(lambda: run.workers() and hungry not in [one.pid for one in run.workers()])
    said = run.well()
    assert all(said.count(f"{trial}: group     4") == 1 for trial in TRIALS)
    same(project, "search", *SEARCH)


def test_a_measurement_whose_process_is_killed_is_made_in_another(undisturbed, start, same, tmp_path):
    project = undisturbed.before("baselines", tmp_path / "task")
    run = start(project, "baselines").until("test groups done")
    run.until(lambda: run.workers("measure_job"))
    for worker in run.workers("measure_job"):
        worker.kill()
    run.well()
    same(project, "baselines", "results/accuracies.csv")


def test_a_search_out_of_memory_says_so_and_ends_as_if_it_had_not_been(undisturbed, start, same, tmp_path):
    """Ray kills the largest process when a node's memory is used up: here from 1 % on."""
    project = undisturbed.before("search", tmp_path / "memory")
    run = start(project, "search", RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100")
    error = run.badly(1)
    assert "0 of 2 trials are done" in error and "memory" in error and "the same command continues" in error
    start(project, "search").well()
    same(project, "search", *SEARCH)


def test_a_measurement_out_of_memory_says_so(undisturbed, start, tmp_path):
    project = undisturbed.before("baselines", tmp_path / "measured")
    change(project, "baselines", methods=["random_weights"])
    run = start(project, "baselines", RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100")
    assert "a task was lost" in (error := run.badly(1)) and "memory" in error
    start(project, "baselines").well()


def test_a_search_whose_ray_is_gone_says_so(undisturbed, start, same, tmp_path):
    """As when the machine's memory is used up, and the kernel ends what it will."""
    project = undisturbed.before("search", tmp_path / "raylet")
    run = start(project, "search").until("[1/2 done]")
    raylet = [one for one in run.remember() if one.name() == "raylet"]
    for one in [*raylet, *run.workers()]:
        one.kill()
    assert "the Ray of this machine is gone" in run.badly(1)
    run.clear()
    assert f"{TRIALS[0]}: group" not in start(project, "search").well()
    same(project, "search", *SEARCH)


def test_a_trial_that_no_memory_can_hold_is_named_before_any_begins(undisturbed, start, tmp_path):
    project = undisturbed.before("search", tmp_path / "large")
    change(project, "search", space={"eta": [0.2], "depth": [1], "hidden": [128, 500_000]})
    run = start(project, "search")
    error = run.badly(1)
    assert "split0-eta0.2-depth1-hidden500000: cannot start" in error and "memory" in error
    assert "group" not in run.out.partition("\n")[2]
