"""A study of how weights depend on data (Fig. 1): held-out canonical correlations of groups and networks.

Each point is a training group: x is its mean image, y the weights of one layer of the network that a row's method
makes from it. Networks trained from scratch all start from the same initialisation and see batches in the same order;
otherwise their channels would be permuted at random, and nothing could correlate. Pairing the weights with other
groups shows how large correlations are by chance.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pipeline.digests import digest
from pipeline.runs.keys import code_files
from pipeline.runs.measuring import measure_missing
from pipeline.studies.definition import Study
from pipeline.studies.figures import correlations_figure
from pipeline.studies.page import table_of
from pipeline.studies.tasks import correlation as tasks
from pipeline.studies.trained import TrainedColumn
from pudnet.cca import held_out_correlation

PART = 20  # groups in one task; an interruption loses at most one task


def measure(trained: TrainedColumn) -> pd.DataFrame:
    """Measure a column: one line for each row, class split and layer."""
    plan, lines = trained.study.correlation, []
    count = min(plan.groups, trained.params.groups.train_groups)
    parts = {
        at: [tasks.Part(cell, first, min(first + PART, count)) for first in range(0, count, PART)]
        for at, cell in trained.cells.items()
    }
    every = [part for of_cell in parts.values() for part in of_cell]
    keys = {part: part.cell.key(trained.params, part.first, part.end, code=[Path(tasks.__file__)]) for part in every}
    tables = measure_missing(
        trained.params,
        tasks.points_of,
        keys,
        lambda part, table: f"{part.cell.spec.name}: groups up to {part.end} done",
    )
    for (row, seed), of_cell in parts.items():
        joined = pd.concat([tables[part] for part in of_cell])
        found = _correlations(joined, plan.components, plan.pairings, seed)
        metrics = {f"correlation_{line['layer']}": line["correlation"] for line in found}
        code = [Path(__file__), *code_files(["cca"])]
        trained.log(row, seed, metrics, {}, key=digest([keys[part] for part in of_cell], code))
        own = {"row": row, "column": trained.column, "seed": seed, "groups": count, "components": plan.components}
        lines += [{**own, **line} for line in found]
    return pd.DataFrame(lines)


def _correlations(points: pd.DataFrame, components: int, pairings: int, seed: int) -> list[dict[str, float | str]]:
    """For each layer, the held-out correlation, and its mean and 95% range for shuffled pairs."""
    sides = {what: _coordinates(np.stack(own["values"])) for what, own in points.groupby("what", sort=False)}
    images, rng, lines = sides.pop("images"), np.random.default_rng(seed), []
    for layer, weights in sides.items():
        shuffled = [held_out_correlation(images, rng.permutation(weights), components) for _ in range(pairings)]
        low, high = np.quantile(shuffled, [0.025, 0.975])
        own = held_out_correlation(images, weights, components)
        beyond = sum(value >= own for value in shuffled)
        lines.append(
            {
                "layer": layer,
                "correlation": own,
                "shuffled": float(np.mean(shuffled)),
                "shuffled_low": low,
                "shuffled_high": high,
                "p": (1 + beyond) / (1 + pairings),
            }
        )
    return lines


def _coordinates(points: np.ndarray) -> np.ndarray:
    """Express points (n, p) in the n - 1 directions that they span, to save time; all distances stay the same."""
    basis, values, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    return basis[:, : len(points) - 1] * values[: len(points) - 1]


def figure(study: Study, table: pd.DataFrame) -> Figure:
    """Draw one panel for each column, with the correlations of each row and layer, and of shuffled pairs."""
    return correlations_figure(table)


def tables(study: Study, table: pd.DataFrame) -> str:
    """One table for each column."""
    page = ""
    for column, part in table.groupby("column", sort=False):
        lines = list(part.itertuples())
        columns = {
            "weights": [line.row for line in lines],
            "layer": [line.layer for line in lines],
            "split": [str(line.seed) for line in lines] if part.seed.nunique() > 1 else None,
            "correlation": [f"{line.correlation:.3f}" for line in lines],
            "shuffled pairs": [
                f"{line.shuffled:.3f} ({line.shuffled_low:.2f} to {line.shuffled_high:.2f})" for line in lines
            ],
            "p": [f"{line.p:.3f}" for line in lines],
        }
        caption = (
            f"{part.groups.iloc[0]:,} training groups, half of them to fit and half to test, in turn; each side "
            f"reduced to {part.components.iloc[0]} principal components."
        )
        page += f"\n## {column}\n\n{caption}\n\n{table_of(columns)}"
    return page
