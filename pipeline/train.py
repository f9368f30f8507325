"""Stage `train`: trains the final PudNet of each class split, with the values that the search chose."""

from __future__ import annotations

from pipeline.made_for import check_groups
from pipeline.params import Params
from pipeline.project import RESULTS, write
from pipeline.runs import cluster
from pipeline.runs.final_training import curves_csv, read_best, train_pudnet
from pipeline.stage import run_stage


def train(params: Params, fresh: bool = False) -> None:
    """Train the final PudNet of each class split; write models/ and results/train_curves.csv."""
    check_groups(params)
    best = read_best(params)
    with cluster.session():
        curves = train_pudnet(params, best, fresh)
    write(RESULTS / "train_curves.csv", curves_csv(curves))


if __name__ == "__main__":
    run_stage(train, resumes=True)
