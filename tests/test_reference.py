"""What the pages say was measured is what the committed results say."""

import runpy
from pathlib import Path

import pytest
import torch

from pudnet.targets import build_target
from reference import ingredients

ROOT = Path(__file__).parent.parent


def test_the_tables_of_the_pages_are_those_of_the_results():
    made = runpy.run_path(str(ROOT / "reference" / "readme.py"))
    for page in made["PAGES"]:
        assert made["written"](page) == (ROOT / page).read_text(), page


def test_the_page_of_measured_runs_is_that_of_their_files():
    page = runpy.run_path(str(ROOT / "reference" / "table.py"))["page"]()
    assert (ROOT / "reference" / "README.md").read_text() == page


@pytest.mark.parametrize("name", ingredients.TRIED)
def test_the_plain_network_of_each_ingredient_has_the_features_that_were_trained(name):
    torch.manual_seed(0)
    target, labels = build_target("convnet3", 3, 16), torch.arange(3).repeat_interleave(4)
    model = ingredients.Adapted(target, ingredients.TRIED[name])
    for parameter in model.parameters():  # what starts as no change is a change
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.randn(12, 3, 16, 16)
    with torch.no_grad():
        trained, _ = model.features(images, torch.arange(12), labels, 3)
    network, features = ingredients.made_for(model, target, images, labels, 3)
    torch.testing.assert_close(features, trained, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(network(images).flatten(1), trained, rtol=1e-4, atol=1e-4)
