"""Ray Tune: many meta-trainings side by side, each of which goes on where it was left.

Ray schedules trials, gives them devices and starts them again when a process or a node is lost. It remembers nothing
from one start to the next: a trial goes on from its own folder (`trial_folder.py`), and every start makes a new Tuner
of the trials that have not ended.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from pipeline.params import Params
from pipeline.project import locked, root, write
from pipeline.runs import cluster
from pipeline.runs.keys import digest, trial_key
from pipeline.runs.progress import TrialProgress
from pipeline.runs.trainable import REPLAYED, run_trial
from pipeline.runs.trial import TrialSpec, open_trial
from pipeline.runs.trial_folder import REPORTS, Finished, forget_trial, newest_checkpoint, read_ended, trial_folder
from pipeline.tracking.runs import Tracking
from pudnet.errors import RunFailed, is_out_of_memory

FAILURES = 2  # Ray restarts a failed trial this often. If it made progress by then, another Tuner tries it again.
# What a multi-worker trial's own process requests: its workers request the cores, but Tune needs at least one resource.
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
    workers: int = 1  # processes of one trial

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
    """Run the trials that have not ended, in an open Ray session. Returns all that ended well, in the specs' order.

    `parent` names the MLflow run that the trials' runs are children of; `fresh`: what was before is forgotten.

    Raises:
        RunFailed: when a trial failed for good, or diverged where none may.
        UserError: when another process runs the same trials, or a trial cannot start; then none is.
    """
    parent_run = (experiment.key, parent) if parent else None
    progress = TrialProgress(params, tracking, experiment.keys, parent_run)
    with locked(root() / ".pud" / "running" / f"{experiment.key}.lock"):
        for spec in experiment.specs:
            key = experiment.keys[spec.name]
            if fresh:
                forget_trial(key)
                tracking.submit(partial(tracking.supersede, progress.run_key(spec)))
            elif ended := read_ended(key, spec):
                progress.ended[spec.name] = ended
            elif reports := newest_checkpoint(trial_folder(key))[1][REPORTS]:
                progress.reports[spec.name] = {report["groups"]: report for report in reports}
                print(f"  {spec.name}: goes on from group {reports[-1]['groups']}", flush=True)
        if kept := [trial for trial in progress.ended.values() if not trial.diverged]:
            print(f"  {len(kept)} of {len(experiment.specs)} trials are finished already", flush=True)
        while len(progress.ended) < len(experiment.specs):
            before = {name: len(reports) for name, reports in progress.reports.items()}
            errors = run_trials(experiment, params, progress)
            got_on = any(len(progress.reports[name]) > before[name] for name in errors)
            if len(progress.ended) < len(experiment.specs) and not got_on:
                raise RunFailed(_why(experiment, len(progress.ended), errors))
    trials = [progress.ended[spec.name] for spec in experiment.specs]
    for trial in trials:
        if trial.diverged and not experiment.keep_going:
            raise RunFailed(f"{trial.spec.name}: {trial.diverged}")
        if trial.diverged:
            print(f"  {trial.spec.name} is left out: {trial.diverged}", flush=True)
        else:  # MLflow may lack a trial of another experiment, or of a time when it did not answer
            progress.log(trial.spec, trial.history, "FINISHED")
    return [trial for trial in trials if not trial.diverged]


def run_trials(experiment: Experiment, params: Params, progress: TrialProgress) -> dict[str, object]:
    """Run the trials that have not ended, in a new Tuner. Returns the errors of those that failed too often, by name.

    With ASHA, trials that have ended replay their reports too, so that the scheduler can compare the others with them.
    """
    missing = [spec for spec in experiment.specs if spec.name not in progress.ended]
    for spec in missing:
        _check(spec)
    known = [trial.spec for trial in progress.ended.values() if experiment.asha and trial.groups]
    trials = [
        {
            "spec": asdict(one),
            "folder": str(trial_folder(experiment.keys[one.name])),
            "ended": one.name in progress.ended,
        }
        for one in (*known, *missing)
    ]
    share = cluster.share(params, experiment.workers)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # for Ray's own notes; none is read again
        tuner = tune.Tuner(
            tune.with_resources(run_trial, share if experiment.workers == 1 else DRIVER),
            param_space={"trial": tune.grid_search(trials), "share": share, "workers": experiment.workers},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                scheduler=_asha(experiment, params) if experiment.asha else None,
                trial_dirname_creator=lambda trial: trial.config["trial"]["spec"]["name"],
            ),
            run_config=tune.RunConfig(
                name=experiment.key,
                storage_path=scratch,
                callbacks=[progress],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=FAILURES),
            ),
        )
        return {result.config["trial"]["spec"]["name"]: result.error for result in tuner.fit() if result.error}


def _check(spec: TrialSpec) -> None:
    """Build a trial to check it before any runs, and free it: all together they may not fit in memory."""
    try:
        open_trial(spec, torch.device("cpu"))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(f"{spec.name}: cannot start ({cluster.reason(error)})") from None


def _why(experiment: Experiment, done: int, errors: Mapping[str, object]) -> str:
    """What is not done and why, in one line; the whole of the first error goes to a file."""
    state = f"{done} of {len(experiment.specs)} trials are done"
    if not errors:
        return f"{state}, the others were interrupted; the same command continues"
    name, error = next(iter(errors.items()))
    path = trial_folder(experiment.keys[name]) / "error.txt"
    with contextlib.suppress(OSError):  # a full disk, which may be the error itself
        write(path, str(error))
    return f"{state}; {name}: {cluster.reason(error)} (all of it in {path}); the same command continues"


class Asha(ASHAScheduler):
    """ASHA that records replayed reports but never stops a trial because of one: it did not when they were new."""

    def on_trial_result(self, tune_controller: object, trial: object, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result.get(REPLAYED) else decision


def _asha(experiment: Experiment, params: Params) -> ASHAScheduler:
    """Stop the weaker trials at their first report, and again at each fourfold number of groups."""
    groups = params.groups.search_groups
    first = min(groups, max(spec.train["report_every"] for spec in experiment.specs))
    return Asha(time_attr="groups", metric="validation_accuracy", mode="max", max_t=groups, grace_period=first)
