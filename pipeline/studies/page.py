"""The page of a study: title, text, command, picture, tables, and what was not run and why."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import yaml

from pipeline.params import PARAMS, Params
from pipeline.project import committed
from pipeline.studies.columns import GROUPS_KEY
from pipeline.studies.definition import Study
from pipeline.yaml_file import Loader, read_yaml
from pudnet.config import passed
from pudnet.settings import SETTINGS

PAGE = """# {title}

{text}Made by `{command}`. {legend}

![{title}]({name}.png)
"""
LEGENDS = {
    "accuracy": "Accuracy in percent, with its 95% interval over test groups. Each row is trained once on each class "
    "split; the intervals do not include what another training seed would change.",
    "losses": "Training losses, mean over the groups since the report before, of which not all are shown.",
    "finetune": "Accuracy in percent on test images that were not trained on, with its 95% interval over them.",
    "correlation": "Canonical correlations on groups that they were not fitted to. Shuffled pairs: the same for "
    "weights paired with other groups, as mean and 95% range.",
    "whole": "Accuracy in percent, with its 95% interval over test images.",
}
TRAININGS = (
    "Accuracy in percent, mean of {trainings} trainings of each row on each class split. Its 95% interval is over test "
    "groups and trainings, which differ only in their seed (Student's t, with one standard deviation of a training for "
    "all rows of a column)."
)
PAIRED = " Differences to {} are paired over the same test groups."
PAPER = " The paper's results are for its own class split and {groups} number of groups."
UNTOLD = ("sources", "hours")  # keys of the block `study` that change no result
OF_ALL = {"seed": 0, "splits": 1}  # the other keys of params.yaml that are for all studies, as the project has them
# Places of datasets, and keys that studies do not read: a row has its own variant, and nothing is searched.
UNREAD = ("prepare.source", "prepare.test_source", "variant", "search.space", "search.asha", "baselines.space")
DIAGNOSED = """ *Weights move*: how far
predicted weights are from their mean over groups, relative to its size, mean over layers. *Probe*: how well a linear
probe reads from the sketch which classes a group has (area under the ROC curve; 50 is chance)."""


def render(name: str, study: Study, tables: str, left_out: Mapping[str, str], params: Params) -> str:
    """Render the study as Markdown. `params` are those of any column; the page's command has what the study lacks."""
    asked = params.study
    several = study.measure == "accuracy" and asked.trainings
    legend = TRAININGS.format(trainings=asked.trainings) if several else LEGENDS[study.measure]
    if study.references and study.axis != "columns":  # such a study's tables have no differences
        first, *others = (f"“{row}”" for row in study.references)
        legend += PAIRED.format(first + f" or, for rows of as many images, {' or '.join(others)}" * bool(others))
    groups = "the same" if study.axis == "columns" else "its full"
    of_the_paper = any(own.paper for column, own in study.columns.items() if column not in left_out)
    legend += PAPER.format(groups=groups) if of_the_paper else ""
    legend += DIAGNOSED if study.diagnose else ""
    page = PAGE.format(
        title=study.title,
        text=f"{study.text.strip()}\n\n" if study.text.strip() else "",
        name=name,
        command=_command(name, study, params),
        legend=legend,
    )
    reasons = "".join(f"- {column}: {reason}\n" for column, reason in left_out.items())
    return page + tables + (f"\n## Not run\n\n{reasons}" if reasons else "")


def _command(name: str, study: Study, params: Params) -> str:
    """The command that runs the study as it was run, except for the places of datasets and a limit of time."""
    asked = asdict(params.study)
    changed = {f"study.{key}": asked[key] for key in asked if asked[key] is not None and key not in UNTOLD}
    changed |= {key: value for key, usual in OF_ALL.items() if (value := getattr(params, key)) != usual}
    if params.study.budget is None and params.groups.train_groups != SETTINGS[params.setting].train_groups:
        changed[GROUPS_KEY] = params.groups.train_groups
    changed |= _since_commit()
    own = {*study.over, *set.intersection(*(set(column.changes) for column in study.columns.values()))}
    changed = {key: value for key, value in changed.items() if key not in own}
    if not changed:
        return f"python -m pipeline.study {name}"
    changes = " ".join(f"-S '{key}={_value(value)}'" for key, value in changed.items())
    return f"dvc exp run {changes} studies/dvc.yaml:study@{name}"


def _since_commit() -> dict[str, Any]:
    """The keys of params.yaml, with dots, that have another value than in the commit, and that studies read.

    Without those of `study` and `OF_ALL`, and the places of datasets. A key that the commit lacks has a + in front, as
    DVC wants it.
    """
    before: dict[str, Any] = {}
    with contextlib.suppress(yaml.YAMLError, AttributeError):  # what is committed may be anything
        before = _flat(yaml.load(committed(PARAMS), Loader=Loader))
    now = _flat(read_yaml(PARAMS)) if before else {}
    return {
        key if key in before else f"+{key}": value
        for key, value in now.items()
        if key not in OF_ALL and not key.startswith(("study.", *UNREAD)) and (key not in before or before[key] != value)
    }


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return flat


def _value(value: Any) -> str:
    """A value as DVC's `-S` takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def trained_on(part: pd.DataFrame) -> str:
    """How many groups the rows of a table were trained on, and how often they were passed."""
    passes = part.passes[part.train_groups > 0]
    return f"{part.train_groups.max():,} training groups" + (f", {passed(*passes)}" if len(passes) else "")


def table_of(columns: Mapping[str, Sequence[str] | pd.Series | None]) -> str:
    """A Markdown table. Columns that are None or completely empty are left out, except the first."""
    titles, cells = [], []
    for position, (title, values) in enumerate(columns.items()):
        if position == 0 or (values is not None and any(values)):
            titles.append(title)
            cells.append(list(values))
    lines = [titles, ["---"] * len(titles), *zip(*cells, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float | None, form: str) -> str:
    """A formatted number; empty if there is none."""
    return "" if pd.isna(value) else form.format(value)
