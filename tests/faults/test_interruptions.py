"""The driver of a stage, or of a study, is ended in the middle of its work."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import yaml

from tests.faults.harness import PATIENCE, Run, change, runs_of, shorten
from tests.test_pipeline import copy_project

SEARCH = ("results/search.csv", "results/best.yaml")
SMALL = {
    "title": "Small",
    "over": {"groups.train_groups": 20, "groups.test_groups": 4, "train.report_every": 2},
    "columns": {"digits": {"setting": "digits"}},
    "rows": {"PudNet": {}, "static trunk": {"method": "static_trunk"}},
    "measure": "losses",
}


def test_a_search_whose_driver_was_killed_goes_on_where_it_stood(undisturbed, start, same):
    project = undisturbed.interrupted()
    said = start(project, "search").well()
    assert "1 of 2 trials are finished already" in said and "split0-eta0.0-depth1: group" not in said
    assert "goes on from group" in said and "split0-eta0.2-depth1: group     2" not in said
    same(project, "search", *SEARCH)
    steps = [2, 4, 6, 8, 10, 12]
    assert runs_of(project) == {
        "search-split0": ("FINISHED", []),
        "split0-eta0.0-depth1": ("FINISHED", steps),
        "split0-eta0.2-depth1": ("FINISHED", steps),
    }


def test_a_search_killed_and_begun_again_at_once_repeats_no_finished_trial(undisturbed, start, same, tmp_path):
    """With what Ray left running."""
    project = undisturbed.before("search", tmp_path / "at-once")
    killed = start(project, "search").until("split0-eta0.2-depth1: group     4").hit()
    said = start(project, "search").well()
    finished = [line for run in (killed.out, said) for line in run.splitlines() if ": finished" in line]
    assert len(finished) == len(set(finished)) == 2
    same(project, "search", *SEARCH)


def test_a_search_with_asha_that_was_killed_goes_on(undisturbed, start, tmp_path):
    """Which trials it stops early depends on who is first: that all end, and that none begins again, does not."""
    project = undisturbed.before("search", tmp_path / "asha")
    change(project, "search", asha=True)
    trial = "split0-eta0.2-depth1"
    start(project, "search").until(f"{trial}: group     2").hit().clear()
    said = start(project, "search").well()
    assert "goes on from group" in said and "group     2" not in said
    rows = pd.read_csv(project / "results/search.csv")
    assert len(rows) == 2 and rows.groups.max() == 12
    assert start(project, "search").well().count(": group") == 0


@pytest.mark.parametrize("seconds", [0.3 * moment for moment in range(12)])
def test_a_search_that_is_stopped_as_it_begins_says_so(undisturbed, start, seconds, tmp_path):
    """At a dozen moments of Ray's start, in some of which it loses an interruption, and crashes later."""
    project = undisturbed.before("search", tmp_path / "begins")
    run = start(project, "search").until("search: ")
    time.sleep(seconds)
    assert run.hit(signal.SIGINT).badly(130) == "error: interrupted; the same command continues or starts again"


def test_a_second_interruption_does_not_wait_for_rays_start(undisturbed, start, tmp_path):
    project = undisturbed.before("search", tmp_path / "twice")
    run = start(project, "search").until("search: ")
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert run.hit(signal.SIGINT).badly(130) == "error: interrupted while Ray was starting or ending"


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_search_that_is_stopped_says_so_and_goes_on(undisturbed, start, same, sig, tmp_path):
    """Ctrl-C as a terminal sends it, to every process of the session; and what a machine that shuts down sends."""
    project = undisturbed.before("search", tmp_path / "stopped")
    run = start(project, "search").until("[1/2 done]").hit(sig, session=sig == signal.SIGINT)
    assert run.badly(130) == "error: interrupted; the same command continues or starts again"
    assert not (project / "results/search.csv").exists()
    run.clear()
    said = start(project, "search").well()
    assert "split0-eta0.0-depth1: group" not in said
    same(project, "search", *SEARCH)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_dvc_itself_is_stopped(undisturbed, same, sig, tmp_path):
    """Ctrl-C ends the stage too; without `dvc`, killed alone, it goes on, and another is refused for so long."""
    project = copy_project(tmp_path / "project")
    shorten(project / "params.yaml")
    first = Run(project, "dvc", "repro", "search").until("[0/2 done]").hit(sig, session=sig == signal.SIGINT)
    assert first.process.returncode != 0
    stage = [one for one in first.remember() if "pipeline.search" in " ".join(one.cmdline())]
    if sig == signal.SIGKILL:
        (stage,) = stage
        refused = Run(project, "dvc", "repro", "search").end()
        assert refused.process.returncode != 0
        assert f"is already running as process {stage.pid}; wait for it or stop it" in refused.said
        psutil.wait_procs([stage], PATIENCE)
    else:
        assert not stage
    first.clear()
    said = Run(project, "dvc", "repro", "search").well()
    same(project, "search", *SEARCH)
    assert sig == signal.SIGINT or "2 of 2 trials are finished already" in said


def test_a_training_whose_driver_is_killed_goes_on(undisturbed, start, same, tmp_path):
    project = undisturbed.before("train", tmp_path / "train")
    trial = "train-pudnet-split0"
    start(project, "train").until(f"{trial}: group     4").hit().clear()
    assert not (project / "models/pudnet.safetensors").exists()
    said = start(project, "train").well()
    assert "goes on from group" in said and "group     4" not in said
    same(project, "train", "models/pudnet.safetensors", "results/train_curves.csv")


def test_an_evaluation_that_is_killed_leaves_nothing_half_written_and_starts_again(undisturbed, start, same, tmp_path):
    project = undisturbed.before("evaluate", tmp_path / "evaluate")
    start(project, "evaluate").until(lambda: (project / "results/.weights.partial").exists()).hit()
    assert not (project / "results/weights").exists() and not (project / "results/metrics.json").exists()
    start(project, "evaluate").well()
    same(project, "evaluate", "results/metrics.json", "results/pudnet.csv")
    assert len([*(project / "results/weights").rglob("*.safetensors")]) == 2


def test_baselines_killed_in_tuning_training_and_measuring_repeat_nothing_finished(undisturbed, start, same, tmp_path):
    project = undisturbed.before("baselines", tmp_path / "baselines")
    said = []
    for place in ("protonet-split0-scale1.0: finished", "train-protonet-split0: finished", "test groups done"):
        run = start(project, "baselines").until(place).hit()
        run.clear()
        said.append(run.out)
    said.append(start(project, "baselines").well())
    for done in ("protonet-split0-scale1.0: finished", "protonet-split0-scale0.01: finished"):
        assert sum(one.count(done) for one in said) == 1, said
    assert sum(one.count("train-protonet-split0: finished") for one in said) == 1
    measured = [line for one in said for line in one.splitlines() if "test groups done" in line]
    assert len(measured) == len(set(measured)) == 4
    same(project, "baselines", "results/accuracies.csv", "results/tuning.csv")


def test_a_study_whose_driver_is_killed_goes_on_within_the_training_it_was_at(undisturbed, start, tmp_path):
    pages = []
    for killed in (True, False):
        project = tmp_path / f"study{killed:d}"
        (project / "studies").mkdir(parents=True)
        (project / "params.yaml").write_text((undisturbed.run("search") / "params.yaml").read_text())
        (project / "studies/small.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
        if killed:
            run = start(project, "study", "small")
            run.until("static-trunk-split0: group     4").hit().clear()
        said = start(project, "study", "small").well()
        if killed:
            assert "1 of 2 trials are finished already" in said and "goes on from group" in said
            assert "group     2" not in said and said.count("-split0: finished") == 1
        pages.append((project / "studies/results/small.csv").read_bytes())
    assert pages[0] == pages[1]


def test_a_kernel_that_was_being_written_is_done_without(tmp_path):
    """A file of torch's cache has nothing in it: the steps are slower, and a line says why."""
    code = "import torch; from pudnet.cpu import _kernel, _moments; x = torch.arange(16.).view(1, 2, 2, 4)\n"
    code += "print(_kernel(_moments)(x, torch.ones(4)))"
    cached = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def printed() -> tuple[str, str]:
        ended = subprocess.run([sys.executable, "-c", code], env=cached, capture_output=True, text=True, check=True)
        return ended.stdout, ended.stderr

    sums, said = printed()
    assert "torch.compile failed" not in said
    for file in tmp_path.rglob("*.so"):
        file.write_bytes(b"")
    again, said = printed()
    assert again == sums and "torch.compile failed" in said and str(tmp_path) in said
