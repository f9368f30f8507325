"""One trial diverges, is killed, loses its checkpoint, or has too little memory."""

import shutil

import pandas as pd
import psutil
import pytest

from tests.faults.harness import OFTEN, change, truncate

SEARCH = ("results/search.csv", "results/best.yaml")
TRIALS = ("split0-eta0.0-depth1", "split0-eta0.2-depth1")
STEPS = [2, 4, 6, 8, 10, 12]


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
    (folder,) = (project / ".pud/ray").glob(f"search-*/{TRIALS[1]}")
    checkpoints = sorted(folder.glob("checkpoint_*"))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints if damaged == "every" else checkpoints[-1:]:
        damage(checkpoint / "state.pt")
    said = start(project, "search").well()
    assert said.count("is damaged; it goes on from what was before") == (len(checkpoints) if damaged == "every" else 1)
    assert f"{TRIALS[0]}: group" not in said
    same(project, "search", *SEARCH)


def test_a_trial_whose_checkpoint_is_gone_goes_on_from_a_later_one(undisturbed, start, same):
    """Ray removes an old one before its snapshot says so."""
    project = undisturbed.interrupted()
    (state,) = (project / ".pud/ray").glob("search-*/experiment_state-*.json")
    for path in sorted(state.parent.glob(f"{TRIALS[1]}/checkpoint_*"))[:-1]:
        shutil.rmtree(path)
    (last,) = state.parent.glob(f"{TRIALS[1]}/checkpoint_*")
    last.rename(last.with_name("checkpoint_000050"))  # as if there had been many since
    said = start(project, "search").well()
    assert "is gone; it goes on from what there is" in said
    assert all(f"{trial}: group     2" not in said for trial in TRIALS)
    same(project, "search", *SEARCH)


@pytest.mark.parametrize("damage", [truncate, blank])
def test_a_search_whose_setup_is_damaged_begins_again(undisturbed, start, same, damage):
    project = undisturbed.interrupted()
    (setup,) = (project / ".pud/ray").glob("search-*/tuner.pkl")
    damage(setup)
    said = start(project, "search").well()
    assert "its state is not whole; what is not finished begins again" in said
    assert f"{TRIALS[0]}: group" not in said
    same(project, "search", *SEARCH)


def test_a_search_whose_state_is_truncated_repeats_no_finished_trial(undisturbed, start, same):
    project = undisturbed.interrupted()
    (state,) = (project / ".pud/ray").glob("search-*/experiment_state-*.json")
    truncate(state)
    said = start(project, "search").well()
    assert "its state is not whole; what is not finished begins again" in said
    assert f"{TRIALS[0]}: group" not in said and f"{TRIALS[1]}: group     2" in said
    same(project, "search", *SEARCH)


@pytest.mark.parametrize("damaged", ["ray/train-*/*/checkpoint_*/state.pt", "kept/*.json"])
def test_a_finished_training_that_is_truncated_is_trained_again(undisturbed, start, same, damaged, tmp_path):
    project = undisturbed.after("train", tmp_path / "kept")
    files = [*(project / ".pud").glob(damaged)]
    assert files
    for file in files:
        truncate(file)
    (project / "models/pudnet.safetensors").unlink()
    said = start(project, "train").well()
    assert "train-pudnet-split0: its last checkpoint is gone or damaged; it is trained again" in said
    same(project, "train", "models/pudnet.safetensors", "results/train_curves.csv")
    assert "1 of 1 trials are finished already" in start(project, "train").well()


def test_a_measured_table_that_is_truncated_is_measured_again(undisturbed, start, same, tmp_path):
    project = undisturbed.after("baselines", tmp_path / "tables")
    tables = sorted((project / ".pud/kept").glob("*.parquet"))
    truncate(tables[0])
    (project / "results/accuracies.csv").unlink()
    said = start(project, "baselines").well()
    assert f"{len(tables) - 1} of {len(tables)} measurements are done already" in said
    same(project, "baselines", "results/accuracies.csv")


def test_a_search_with_other_resources_begins_its_unfinished_trials_again(undisturbed, start):
    project = undisturbed.interrupted()
    change(project, "resources", cpus=1)
    said = start(project, "search").well()
    assert "was begun with other resources; what is not finished begins again" in said
    assert f"{TRIALS[0]}: group" not in said and f"{TRIALS[1]}: group     2" in said
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


def test_a_trial_that_gets_no_more_memory_goes_on_in_another_process(undisturbed, start, same, tmp_path):
    project = undisturbed.before("search", tmp_path / "no-more")
    run = start(project, "search").until(f"{TRIALS[0]}: group     4")
    for worker in run.workers():
        worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms, psutil.RLIM_INFINITY))
    run.until(lambda: run.workers() and all(one.rlimit(psutil.RLIMIT_AS)[0] < 0 for one in run.workers()))
    said = run.well()
    assert all(said.count(f"{trial}: group     4") == 1 for trial in TRIALS)
    same(project, "search", *SEARCH)


def test_a_measurement_whose_process_is_killed_is_made_in_another(undisturbed, start, same, tmp_path):
    project = undisturbed.before("baselines", tmp_path / "task")
    run = start(project, "baselines").until("test groups done")
    run.until(lambda: run.workers("_measure"))
    for worker in run.workers("_measure"):
        worker.kill()
    run.well()
    same(project, "baselines", "results/accuracies.csv")


def test_a_search_out_of_memory_says_so_and_ends_as_if_it_had_not_been(undisturbed, start, same, tmp_path):
    """Ray kills the largest process when a node's memory is used up: here from 1 % on."""
    project = undisturbed.before("search", tmp_path / "memory")
    run = start(project, "search", RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100", **OFTEN)
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
    run = start(project, "search", **OFTEN).until("[1/2 done]")
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
