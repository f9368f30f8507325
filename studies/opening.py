"""Write the table that README.md opens with, from studies/results/matters.csv: `python studies/opening.py`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pipeline.studies.accuracy import overview
from pipeline.studies.definition import Study, load_study

ROOT = Path(__file__).parent.parent
NAME = "matters"
BEGIN, END = "<!-- from here: python studies/opening.py -->\n", "<!-- to here -->\n"
TOLD = """Each method was trained on the same {train_groups:,} task groups, one update each, and measured on
{test_groups:,} task groups of classes that it has never seen ({splits} class split(s), ConvNet-3, fp32 on 2 CPU cores):
accuracy in percent ± its 95% interval over test groups, in brackets the difference to the static trunk, paired over
them (`dvc repro studies/dvc.yaml:study@{name}`; [times, and what each row is](studies/results/{name}.md)):

"""


def opening(study: Study, table: pd.DataFrame) -> str:
    """The table and the picture."""
    first = table.iloc[0]
    told = TOLD.format(
        train_groups=table.train_groups.max(), test_groups=first.test_groups, splits=first.splits, name=NAME
    )
    return f"{told}{overview(study, table)}\n![Each row beside the static trunk](studies/results/{NAME}.png)\n"


def written(page: str, part: str) -> str:
    """A page with what stands between the two lines replaced."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + part + END + rest.partition(END)[2]


def main() -> None:
    """Write the README."""
    readme, results = ROOT / "README.md", ROOT / "studies" / "results" / f"{NAME}.csv"
    readme.write_text(written(readme.read_text(), opening(load_study(NAME), pd.read_csv(results))))


if __name__ == "__main__":
    main()
