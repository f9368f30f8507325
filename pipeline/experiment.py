"""Ray Tune: many meta-trainings side by side, each resumable, under a key that says what they depend on."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from pipeline import cluster  # first: it sets Ray's environment

# isort: split
import torch
from ray import tune

from pipeline.callback import TrialProgress, log_finished
from pipeline.dependencies import digest, trial_key
from pipeline.kept import Diverged, Finished, forget_trials, is_whole, keep_trial, read_trial, reports, written
from pipeline.parallel import WORKERS, checkpoint_folder, run_parallel
from pipeline.params import Params
from pipeline.stage import alone, root, write, write_json
from pipeline.tracking import Tracking
from pipeline.trial import DIVERGED, STATE, TrialSpec, load_state, open_trial, run_trial
from pudnet.errors import RunFailed, is_out_of_memory
from pudnet.files import replacing

ATTEMPTS_AFTER_A_FAULT = 2  # in a row: a report in between makes good for what was
ERROR = "error.pkl"  # in a trial's folder: how it failed last; Ray's own name
RECORD = "checkpoint_manager_snapshot.json"  # of workers' checkpoints; Ray Train's own name
DRIVER = {"memory": 2**28}  # of a trial whose workers have the cores: Tune wants some resource, and it has a process


@dataclass(frozen=True)
class Experiment:
    """Trials that run, stop and go on together.

    `keep_going`: trials that diverge are left out of the result. `workers`: how many processes, each with a trial's
    share, split the groups of a step.
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
    with alone(experiment.folder.with_suffix(".whole.lock")):
        if fresh:
            forget_trials(experiment.specs)
        ended = {spec.name: found for spec in experiment.specs if (found := read_trial(spec))}
        kept = {name: trial for name, trial in ended.items() if isinstance(trial, Finished)}
        missing = [spec for spec in experiment.specs if spec.name not in ended]
        _leave_out(experiment, {name: trial.why for name, trial in ended.items() if isinstance(trial, Diverged)})
        if kept:
            print(f"  {len(kept)} of {len(experiment.specs)} trials are finished already", flush=True)
        for name, trial in kept.items():
            if parent:
                kept[name] = replace(trial, run_key=f"{experiment.key}/{name}")  # a child of this parent, too
            tracking.attempt(partial(log_finished, tracking, params, kept[name], parent))
        if missing:
            rest = _begun(experiment, missing, fresh, params)
            ran = run_trials(rest, params, tracking, parent, fresh, experiment.key, kept)
            kept |= {trial.spec.name: trial for trial in ran}
    return [kept[spec.name] for spec in experiment.specs if spec.name in kept]


def _leave_out(experiment: Experiment, diverged: Mapping[str, str]) -> None:
    """Say which trials diverged, and why; that is the end of an experiment that is not to keep going without them."""
    for name, why in diverged.items():
        if not experiment.keep_going:
            raise RunFailed(f"{name}: {why}")
        print(f"  {name} is left out: {why}", flush=True)


def _begun(experiment: Experiment, missing: Sequence[TrialSpec], fresh: bool, params: Params) -> Experiment:
    """The experiment that can go on, where what is missing was begun; else a new one, of what is missing.

    Ray goes on with an experiment as a whole, also with the trials that have finished since.
    """
    note, names = experiment.folder.with_suffix(".json"), {spec.name for spec in missing}
    if not fresh and (begun := _noted(note)):
        specs = [spec for spec in experiment.specs if spec.name in begun["trials"]]
        earlier = replace(experiment, stage=begun["stage"], specs=specs)
        if names <= set(begun["trials"]) and _restorable(earlier, names, params):
            return earlier
    rest = replace(experiment, specs=missing)
    if rest.folder.exists() and not _restorable(rest, names, params) and not fresh:
        rest = replace(rest, stage=f"{rest.stage}-{int(time.time())}")  # what is finished in the old one is left there
    write_json(note, {"stage": rest.stage, "trials": sorted(names)})
    return rest


def _is_cut_off(path: Path) -> bool:
    """Whether one of Ray's own files lacks the full stop that ends them all."""
    return not path.read_bytes().endswith(b".")


def _noted(note: Path) -> dict:
    """What `_begun` wrote; nothing where it did not, or what it wrote is damaged."""
    try:
        begun = json.loads(note.read_text())
        return {"stage": str(begun["stage"]), "trials": [*begun["trials"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _restorable(experiment: Experiment, names: Collection[str], params: Params) -> bool:
    """Whether Ray can go on with an experiment, and would run these trials of it, each with `params.resources`.

    What a trial gets is part of Ray's state of it, and would stay whatever params.yaml says by now.
    """
    now, trainable = _resources(experiment, params), _trainable(experiment, params)
    if not tune.Tuner.can_restore(str(experiment.folder)):
        return False
    try:
        trials = [trial for trial, _ in _saved(experiment.folder)]
        begun_with = [{key: one["config"][key] for key in now} for one in trials if _is_unfinished(one)]
        tune.Tuner.restore(str(experiment.folder), trainable)
        is_whole = not any(map(_is_cut_off, experiment.folder.glob("basic-variant-state-*")))
    except Exception:  # a damaged file can fail in nearly every way
        is_whole = False
    if not is_whole:
        print(f"  {experiment.key}: its state is not whole; what is not finished begins again", flush=True)
        return False
    if any(one != now for one in begun_with):
        print(f"  {experiment.key}: was begun with other resources; what is not finished begins again", flush=True)
        return False
    return not any(one["status"] == "TERMINATED" and one["config"]["spec"]["name"] in names for one in trials)


def _saved(folder: Path) -> list[tuple[dict, dict]]:
    """What Ray's newest snapshot of an experiment says of each trial, and of its state."""
    pairs = json.loads(_snapshot(folder).read_text())["trial_data"]
    return [(json.loads(trial), json.loads(state)) for trial, state in pairs]


def _is_unfinished(trial: dict) -> bool:
    return trial["status"] != "TERMINATED"


def _note_finished(folder: Path, names: Collection[str]) -> None:
    """Tell Ray of trials that finished after its newest snapshot: it would run them again from there."""
    snapshot = json.loads(_snapshot(folder).read_text())
    for pair in snapshot["trial_data"]:
        trial = json.loads(pair[0])
        if trial["config"]["spec"]["name"] in names:
            pair[0] = json.dumps(trial | {"status": "TERMINATED"})
    write(_snapshot(folder), json.dumps(snapshot))


def _snapshot(folder: Path) -> Path:
    return max(folder.glob("experiment_state-*.json"))


def run_trials(
    experiment: Experiment,
    params: Params,
    tracking: Tracking,
    parent: str | None = None,
    fresh: bool = False,
    key: str | None = None,
    kept: Mapping[str, Finished] = MappingProxyType({}),
) -> list[Finished]:
    """Run all trials in an open Ray session, going on where an earlier run stopped. Returns those that finished.

    `parent` names the MLflow run that the trials' runs are children of; `key` is what these runs go by, the
    experiment's own where there is none. Of an experiment that goes on, those in `kept` are finished.

    Raises:
        RunFailed: when a trial is unfinished at the end: interrupted, or failed for good.
        UserError: when another process runs the same trials, or a trial cannot start; then none is.
    """
    key = key or experiment.key
    groups = {spec.name: _groups(spec) for spec in experiment.specs}
    with alone(experiment.folder.with_suffix(".lock")):
        if fresh or not _restorable(experiment, (), params):
            shutil.rmtree(experiment.folder, ignore_errors=True)
            for name in groups:  # runs of an experiment whose state is gone
                tracking.attempt(partial(tracking.supersede, f"{key}/{name}"))
        else:
            _note_finished(experiment.folder, kept)
            _mend(experiment)
        progress = TrialProgress(params, key, len(experiment.specs), parent, keep=not experiment.asha)
        results = _fit(experiment, _tuner(experiment, params, progress))
        finished = _collect(experiment, key, groups, kept, results)
    for trial in finished:
        tracking.attempt(partial(log_finished, tracking, params, trial, parent))
    return finished


def _fit(experiment: Experiment, tuner: tune.Tuner) -> tune.ResultGrid:
    """Run to the end of all trials. Raises `RunFailed` where Ray cannot read what it wrote of one that failed."""
    try:
        return tuner.fit()
    except Exception:  # an error of any kind
        if not any(map(_is_cut_off, experiment.folder.glob(f"*/{ERROR}"))):
            raise
        raise RunFailed("a trial failed while the disk is full; make room, then the same command continues") from None


def _groups(spec: TrialSpec) -> int:
    """On how many groups a trial runs: it is opened, and so found fit, and let go, since all together may be large."""
    try:
        return open_trial(spec, torch.device("cpu")).groups
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(f"{spec.name}: cannot start ({cluster.reason(error)})") from None


def _mend(experiment: Experiment) -> None:
    """Put another checkpoint, or the trial's beginning, in the place of one that cannot be read, or is not there.

    A power cut leaves such a one, and Ray goes on from the newest that it knows of, whatever that holds. It removes
    old ones before its snapshot says so, so that a kill can leave a name for nothing.
    """
    for trial, state in _saved(experiment.folder):
        if _is_unfinished(trial):
            spec = TrialSpec(**trial["config"]["spec"])
            own = experiment.folder / spec.name
            (own / ERROR).unlink(missing_ok=True)  # one that is cut off would end the experiment again
            if experiment.workers > 1:
                own = own.with_name(f"{spec.name}{WORKERS}")
                known = _known_to_workers(own, spec.name)
            else:
                known = re.findall(r"checkpoint_\d{6}", _text(state["checkpoint_manager"]))
            _mend_checkpoints(spec, {own / name for name in known} | {*filter(Path.is_dir, own.glob("checkpoint_*"))})


def _text(state: Mapping[str, str]) -> str:
    """What can be read of an object of Ray's that its snapshot has as hexadecimal digits."""
    return bytes.fromhex(state["value"]).decode("latin-1")


def _known_to_workers(folder: Path, name: str) -> list[str]:
    """The checkpoints that Ray Train goes by; where its record of them is damaged, all of them are removed."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return [one["checkpoint_dir_name"] for one in record["checkpoint_results"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        print(f"  {name}: the record of its workers is damaged; they begin again", flush=True)
        shutil.rmtree(folder)
        return []


def _mend_checkpoints(spec: TrialSpec, folders: Collection[Path]) -> None:
    whole = {folder for folder in folders if is_whole(folder)}
    for folder in sorted({*folders} - whole):
        what = "damaged; it goes on from what was before" if folder.is_dir() else "gone; it goes on from what there is"
        print(f"  {spec.name}: {folder.name} is {what}", flush=True)
        nearest = max((one for one in whole if one < folder), default=min(whole, default=None))
        state = load_state(nearest) if nearest else open_trial(spec, torch.device("cpu")).state_dict()
        with replacing(folder / STATE) as path:
            torch.save(state, path)


def _collect(
    experiment: Experiment,
    key: str,
    groups: Mapping[str, int],
    kept: Mapping[str, Finished],
    results: tune.ResultGrid,
) -> list[Finished]:
    """The trials that saw all their `groups` (fewer where ASHA stopped them), in the order of the specs.

    Of those that diverged `_leave_out` decides.
    """
    statuses = {t.config["spec"]["name"]: t.status for t in results._experiment_analysis.trials}  # no public way
    found = {r.config["spec"]["name"]: r for r in results if r.config and r.metrics}
    diverged = {name: result.metrics[DIVERGED] for name, result in found.items() if DIVERGED in result.metrics}

    def is_done(name: str) -> bool:
        ended = name in found and name not in diverged and statuses.get(name) == "TERMINATED"
        return name in kept or (ended and (experiment.asha or found[name].metrics["groups"] == groups[name]))

    done = [spec for spec in experiment.specs if is_done(spec.name)]
    if len(done) + len(diverged) < len(experiment.specs):
        raise RunFailed(_why(len(done), len(experiment.specs), [result for result in results if result.error]))
    _leave_out(experiment, diverged)
    return [kept.get(spec.name) or _finished(experiment, key, spec, found[spec.name]) for spec in done]


def _finished(experiment: Experiment, key: str, spec: TrialSpec, result: tune.Result) -> Finished:
    """A trial that is done; kept, in case it was not when it ended."""
    rows = [*written(Path(result.path)), result.metrics]
    trial = Finished(spec, reports(rows), checkpoint_folder(result.checkpoint, result.metrics), f"{key}/{spec.name}")
    if not experiment.asha:  # which may have stopped it early
        keep_trial(trial)
    return trial


def _why(done: int, total: int, failed: Sequence[tune.Result]) -> str:
    state = f"{done} of {total} trials are done"
    if not failed:
        return f"{state}, the others were interrupted; the same command continues"
    reason, path = cluster.reason(failed[0].error), failed[0].path
    return f"{state}; {_name(failed[0])}: {reason} (all of it in {path}/error.txt); the same command continues"


def _name(result: tune.Result) -> str:
    """A trial's name, also of one that never reported."""
    return Path(result.path).name


def _tuner(experiment: Experiment, params: Params, progress: TrialProgress) -> tune.Tuner:
    share, trainable = cluster.share(params, experiment.workers), _trainable(experiment, params)
    if tune.Tuner.can_restore(str(experiment.folder)):
        print(f"  going on with {experiment.key}: finished trials are not run again", flush=True)
        return tune.Tuner.restore(str(experiment.folder), trainable, resume_errored=True)
    specs = [asdict(spec) for spec in experiment.specs]
    space = {"spec": tune.grid_search(specs), "share": share, "storage": str(experiment.folder)}
    space |= _resources(experiment, params)
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


def _trainable(experiment: Experiment, params: Params) -> Callable[[dict], None]:
    if experiment.workers > 1:
        return tune.with_resources(run_parallel, DRIVER)
    return tune.with_resources(run_trial, cluster.share(params))


def _resources(experiment: Experiment, params: Params) -> dict[str, float]:
    """What a trial of the experiment is to get, in the terms of params.yaml."""
    return asdict(params.resources) | {"workers": experiment.workers}


def _asha(experiment: Experiment, params: Params) -> tune.schedulers.ASHAScheduler:
    """Stop the weaker trials at their first report, and again at each fourfold number of groups."""
    groups = params.groups.search_groups
    first = min(groups, max(spec.train["report_every"] for spec in experiment.specs))
    return tune.schedulers.ASHAScheduler(
        time_attr="groups", metric="validation_accuracy", mode="max", max_t=groups, grace_period=first
    )
