"""Ray Tune: many meta-trainings side by side, each resumable, under a key that says what they depend on."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline import cluster  # first: it sets Ray's environment

# isort: split
import torch
from ray import tune

from pipeline.callback import TrialProgress
from pipeline.dependencies import digest, trial_key
from pipeline.kept import Finished, forget_trials, keep_trial, read_trial, reports
from pipeline.parallel import checkpoint_folder, run_parallel
from pipeline.params import Params
from pipeline.stage import root
from pipeline.tracking import Tracking
from pipeline.trial import TrialSpec, open_trial, run_trial
from pudnet.errors import RunFailed, UserError

ATTEMPTS_AFTER_A_FAULT = 2
DRIVER = {"memory": 2**28}  # of a trial whose workers have the cores: Tune wants some resource, and it has a process


@dataclass(frozen=True)
class Experiment:
    """Trials that run, stop and go on together.

    `keep_going`: trials that fail are left out of the result, as long as one finishes. `workers`: how many processes,
    each with a trial's share, split the groups of a step.
    """

    stage: str
    specs: Sequence[TrialSpec]
    asha: bool = False
    keep_going: bool = False
    workers: int = 1  # processes of one trial

    @property
    def key(self) -> str:
        """A hash of all that the trials depend on: their specs, the data, and the method's own code.

        Ray would restore an experiment under changed settings without a word; under another name it cannot.
        """
        specs = [[asdict(spec), trial_key(spec)] for spec in self.specs]
        return f"{self.stage}-{digest([self.stage, self.asha, specs], [])}"

    @property
    def folder(self) -> Path:
        """Where Ray keeps the experiment's state."""
        return root() / ".pud" / "ray" / self.key


def run_missing(
    experiment: Experiment, params: Params, tracking: Tracking, parent: str | None = None, fresh: bool = False
) -> list[Finished]:
    """`run_trials`, less the trials that are kept from earlier experiments, whatever else those ran."""
    if fresh:
        forget_trials(experiment.specs)
    kept = {spec.name: found for spec in experiment.specs if (found := read_trial(spec))}
    missing = [spec for spec in experiment.specs if spec.name not in kept]
    if kept:
        print(f"  {len(kept)} of {len(experiment.specs)} trials are finished already", flush=True)
    if missing:
        rest = replace(experiment, specs=missing)
        kept |= {trial.spec.name: trial for trial in run_trials(rest, params, tracking, parent, fresh)}
    return [kept[spec.name] for spec in experiment.specs if spec.name in kept]


def run_trials(
    experiment: Experiment, params: Params, tracking: Tracking, parent: str | None = None, fresh: bool = False
) -> list[Finished]:
    """Run all trials in an open Ray session, going on where an earlier run stopped. Returns those that finished.

    `parent` names the MLflow run that the trials' runs are children of.

    Raises:
        RunFailed: when a trial is unfinished at the end: interrupted, or failed for good.
        UserError: when another process runs the same trials, or a trial cannot start; then none is.
    """
    groups = {spec.name: open_trial(spec, torch.device("cpu")).groups for spec in experiment.specs}
    with _alone(experiment.folder):
        if fresh:
            shutil.rmtree(experiment.folder, ignore_errors=True)
        if not tune.Tuner.can_restore(str(experiment.folder)):
            tracking.supersede(experiment.key)  # runs of an experiment whose state is gone
        parent_id = tracking.find_or_create(experiment.key, parent) if parent else None
        progress = TrialProgress(params, experiment.key, len(experiment.specs), parent_id)
        return _collect(experiment, groups, _tuner(experiment, params, progress).fit())


def _collect(experiment: Experiment, groups: Mapping[str, int], results: tune.ResultGrid) -> list[Finished]:
    """The trials that saw all their `groups` (fewer where ASHA stopped them), in the order of the specs."""
    statuses = {t.config["spec"]["name"]: t.status for t in results._experiment_analysis.trials}  # no public way
    found = {r.config["spec"]["name"]: r for r in results if r.config and r.metrics}

    def is_done(name: str) -> bool:
        ended = name in found and statuses.get(name) == "TERMINATED"
        return ended and (experiment.asha or found[name].metrics["groups"] == groups[name])

    done = [spec for spec in experiment.specs if is_done(spec.name)]
    failed = [result for result in results if result.error]
    if len(done) < len(experiment.specs) and not (experiment.keep_going and done and _all(experiment, done, failed)):
        raise RunFailed(_why(len(done), len(experiment.specs), failed))
    return [_finished(experiment, spec, found[spec.name]) for spec in done]


def _all(experiment: Experiment, done: Sequence[TrialSpec], failed: Sequence[tune.Result]) -> bool:
    return len(done) + len(failed) == len(experiment.specs)


def _finished(experiment: Experiment, spec: TrialSpec, result: tune.Result) -> Finished:
    """A trial that is done; kept, in case it was not when it ended."""
    rows = result.metrics_dataframe.to_dict("records")
    checkpoint = checkpoint_folder(result.checkpoint, result.metrics)
    trial = Finished(spec, reports(rows), checkpoint, f"{experiment.key}/{spec.name}")
    keep_trial(trial)
    return trial


def _why(done: int, total: int, failed: Sequence[tune.Result]) -> str:
    state = f"{done} of {total} trials are done"
    if not failed:
        return f"{state}, the others were interrupted; the same command continues"
    reason = str(failed[0].error).strip().splitlines()[-1].removeprefix("pudnet.errors.RunFailed: ")
    return f"{state}; {reason} (all of it in {failed[0].path}/error.txt); the same command continues"


def _tuner(experiment: Experiment, params: Params, progress: TrialProgress) -> tune.Tuner:
    share, parallel = cluster.share(params), experiment.workers > 1
    trainable = tune.with_resources(run_parallel if parallel else run_trial, DRIVER if parallel else share)
    if tune.Tuner.can_restore(str(experiment.folder)):
        print(f"  going on with {experiment.key}: finished trials are not run again", flush=True)
        return tune.Tuner.restore(str(experiment.folder), trainable, resume_errored=True)
    specs = [asdict(spec) for spec in experiment.specs]
    space = {"spec": tune.grid_search(specs), "share": share, "storage": str(experiment.folder)}
    space |= asdict(params.resources) | {"workers": experiment.workers}
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            scheduler=_asha(experiment, params) if experiment.asha else None,
            trial_dirname_creator=lambda trial: trial.config["spec"]["name"],
        ),
        run_config=tune.RunConfig(
            name=experiment.folder.name,
            storage_path=str(experiment.folder.parent),
            callbacks=[progress],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=ATTEMPTS_AFTER_A_FAULT),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        ),
    )


def _asha(experiment: Experiment, params: Params) -> tune.schedulers.ASHAScheduler:
    """Stop the weaker trials at their first report, and again at each fourfold number of groups."""
    groups = params.groups.search_groups
    first = min(groups, max(spec.train["report_every"] for spec in experiment.specs))
    return tune.schedulers.ASHAScheduler(
        time_attr="groups", metric="validation_accuracy", mode="max", max_t=groups, grace_period=first
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the experiment's lock: a second search on one experiment would mix with the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder.name}: another process runs these trials; wait for it or stop it") from None
        yield
