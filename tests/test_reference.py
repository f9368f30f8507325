"""What the pages say was measured is what the committed results say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_of_the_pages_are_those_of_the_results():
    made = runpy.run_path(str(ROOT / "reference" / "readme.py"))
    for page in made["PAGES"]:
        assert made["written"](page) == (ROOT / page).read_text(), page


def test_the_page_of_measured_runs_is_that_of_their_files():
    page = runpy.run_path(str(ROOT / "reference" / "table.py"))["page"]()
    assert (ROOT / "reference" / "README.md").read_text() == page
