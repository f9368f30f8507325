"""Runs many trainings side by side with Ray Tune. Each continues from its last checkpoint.

Ray schedules the trials, gives them devices, and starts them again when a process or a node is lost. It remembers
nothing from one start of the program to the next: a trial continues from the checkpoint in its own folder
(`trial_folder.py`), and every start makes a new Tuner, of the trials that have not ended.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from pipeline.digests import digest
from pipeline.params import Params
from pipeline.project import locked, root, write
from pipeline.runs import cluster
from pipeline.runs.keys import trial_key
from pipeline.runs.progress import TrialProgress
from pipeline.runs.trainable import REPLAYED, run_trial
from pipeline.runs.trial import TrialSpec, open_trial
from pipeline.runs.trial_folder import ENDED, Finished, read_trial, trial_folder
from pipeline.runs.trial_log import TrialLog
from pipeline.runs.waiting import WaitingNotice
from pipeline.tracking.runs import Tracking
from pudnet.config import TrainConfig
from pudnet.errors import RunFailed, is_out_of_memory

FAILURES = 2  # Ray restarts a failed trial this often. If it made progress by then, another Tuner tries it again.
# What the process of a trial with several workers requests. The workers request the cores, but Tune wants something.
DRIVER = {"memory": 2**28}


@dataclass(frozen=True)
class Experiment:
    """Trials that run side by side.

    `keep_going`: trials that diverge are left out of the result. `workers`: how many processes, each with a trial's
    share, split the groups of a step.
    """

    stage: str
    specs: Sequence[TrialSpec]
    asha: bool = False
    keep_going: bool = False
    workers: int = 1

    @cached_property
    def key(self) -> str:
        """A hash of the trials' names and of all that their results depend on."""
        return f"{self.stage}-{digest([self.asha, [[spec.name, trial_key(spec)] for spec in self.specs]], [])}"

    @cached_property
    def keys(self) -> dict[str, str]:
        """Each trial's key, by its name.

        With ASHA a trial's result depends on the other trials, so its key includes the experiment's.
        """
        return {spec.name: trial_key(spec) + (f"-{self.key}" if self.asha else "") for spec in self.specs}


def run_missing(
    experiment: Experiment, params: Params, tracking: Tracking, parent: str | None = None, fresh: bool = False
) -> list[Finished]:
    """Run the trials that have not ended, in an open Ray session. Returns all that ended well, in the order of specs.

    `parent` names the MLflow run that the trials' runs are children of. `fresh` forgets all earlier checkpoints.

    Raises:
        RunFailed: if a trial fails for good, does not fit in memory, or diverges without `keep_going`.
        UserError: if another process runs the same trials, or the configurations of a trial do not fit together.
    """
    log = TrialLog(params, tracking, experiment.keys, (experiment.key, parent) if parent else None)
    progress = TrialProgress(experiment.keys, log)
    with _locked(experiment, fresh):
        _read_earlier(experiment, progress, fresh)
        for spec in experiment.specs:
            if spec.name not in progress.ended:
                _check_fits(spec)
        while len(progress.ended) < len(experiment.specs):
            before = {name: len(reports) for name, reports in progress.reports.items()}
            with progress.bars:
                errors = run_trials(experiment, params, progress)
            progressed = any(len(progress.reports[name]) > before[name] for name in errors)
            if len(progress.ended) < len(experiment.specs) and not progressed:
                raise RunFailed(_why_unfinished(experiment, len(progress.ended), errors))
    trials = [progress.ended[spec.name] for spec in experiment.specs]
    for trial in trials:  # MLflow may lack one that another experiment ran, or that ended while it did not answer
        log.write(trial.spec, trial.history, "FAILED" if trial.diverged else "FINISHED")
        if trial.diverged and not experiment.keep_going:
            again = f"to try the same again, delete {trial_folder(trial.key)}"
            raise RunFailed(f"{trial.spec.name}: {trial.diverged} ({again})")
        if trial.diverged:
            print(f"  {trial.spec.name} is left out: {trial.diverged}", flush=True)
    return [trial for trial in trials if not trial.diverged]


@contextlib.contextmanager
def _locked(experiment: Experiment, fresh: bool) -> Iterator[None]:
    """Hold the locks of all trials that are to run, since another experiment may have some of them, too."""
    with contextlib.ExitStack() as locks:
        for spec in experiment.specs:
            key = experiment.keys[spec.name]
            ended = (trial_folder(key) / ENDED).is_file() and read_trial(key, spec)[1]  # no, if its folder is damaged
            if fresh or not ended:
                locks.enter_context(locked(root() / ".pud" / "running" / f"{key}.lock"))
        yield


def _read_earlier(experiment: Experiment, progress: TrialProgress, fresh: bool) -> None:
    """Tell `progress` what earlier starts have done; with `fresh`, forget it."""
    if fresh:
        progress.log.supersede_parent()
    for spec in experiment.specs:
        key = experiment.keys[spec.name]
        if fresh:
            shutil.rmtree(trial_folder(key), ignore_errors=True)
            progress.log.supersede(spec)
        reports, ended = read_trial(key, spec)
        progress.reports[spec.name] = reports
        if ended:
            progress.ended[spec.name] = ended
        elif reports:
            print(f"  {spec.name}: goes on from group {reports[-1]['groups']}", flush=True)
    if done := [trial for trial in progress.ended.values() if not trial.diverged]:
        print(f"  {len(done)} of {len(experiment.specs)} trials are finished already", flush=True)


def run_trials(experiment: Experiment, params: Params, progress: TrialProgress) -> dict[str, object]:
    """Run the trials that have not ended, in a new Tuner. Returns the errors of those that failed too often, by name.

    With ASHA, trials that have ended take part too, and only replay their reports, since ASHA compares the others with
    them.
    """
    missing = [spec for spec in experiment.specs if spec.name not in progress.ended]
    replayed = [trial.spec for trial in progress.ended.values() if experiment.asha and trial.history]
    folders = {spec.name: str(trial_folder(experiment.keys[spec.name])) for spec in experiment.specs}
    trials = [{"spec": asdict(spec), "folder": folders[spec.name]} for spec in (*replayed, *missing)]
    share = cluster.share(params, experiment.workers)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # for Ray's own files; none is read again
        tuner = tune.Tuner(
            tune.with_resources(run_trial, share if experiment.workers == 1 else DRIVER),
            param_space={"trial": tune.grid_search(trials), "share": share, "workers": experiment.workers},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                scheduler=_asha(experiment, params) if experiment.asha else None,
                trial_dirname_creator=lambda trial: trial.config["trial"]["spec"]["name"],
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                callbacks=[progress, WaitingNotice(params)],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=FAILURES),
            ),
        )
        # By their folders, since Ray knows no config of a trial that failed before its first report.
        return {Path(result.path).name: result.error for result in tuner.fit() if result.error}


def _check_fits(spec: TrialSpec) -> None:
    """Build a trial once, and throw it away, so that a mistake in one trial is found before any of them runs."""
    try:
        open_trial(spec, torch.device("cpu"))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(f"{spec.name}: cannot start ({cluster.reason(error)})") from None


def _why_unfinished(experiment: Experiment, done: int, errors: Mapping[str, object]) -> str:
    """Say in one line how many trials are done, and why the others are not. The first error is written to a file."""
    state = f"{done} of {len(experiment.specs)} trials are done"
    if not errors:
        return f"{state}, the others were interrupted; the same command continues"
    name, error = next(iter(errors.items()))
    path = trial_folder(experiment.keys[name]) / "error.txt"
    with contextlib.suppress(OSError):  # a full disk, which may be the error itself
        write(path, str(error))
    return f"{state}; {name}: {cluster.reason(error)} (the whole error is in {path}); the same command continues"


class Asha(ASHAScheduler):
    """ASHA that does not stop a trial at a replayed report, since it did not stop it when the report was new."""

    def on_trial_result(self, tune_controller: object, trial: object, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result.get(REPLAYED) else decision


def _asha(experiment: Experiment, params: Params) -> ASHAScheduler:
    """Stop the weaker trials at their first report, and again at each fourfold number of groups."""
    trains = [TrainConfig(**spec.train) for spec in experiment.specs]
    groups = max(train.groups(params.groups.search_groups) for train in trains)
    first = min(groups, max(train.report_every for train in trains))
    return Asha(time_attr="groups", metric="validation_accuracy", mode="max", max_t=groups, grace_period=first)
