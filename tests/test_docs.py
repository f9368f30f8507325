"""What the pages tell users to type exists: commands, options, parameters, modules, targets of make."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from pudnet.cli import main

ROOT = Path(__file__).parent.parent
OF_FOLDERS = [ROOT / name / "README.md" for name in ("studies", "benchmarks", "reference")]
PAGES = [ROOT / "README.md", *OF_FOLDERS, *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_link_leads_to_a_file_of_the_repository():
    """As pages are read where the code is; `make docs` checks links again, for the site."""
    for page in [*PAGES, *ROOT.glob("*/README.md"), *ROOT.glob("studies/results/*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            assert "://" in target or (page.parent / target).exists(), (page.relative_to(ROOT), target)


@pytest.fixture(scope="module")
def code():
    """All blocks and pieces of code of the pages, comments left out, and continued lines joined."""
    text = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    blocks += re.findall(r"^    \S.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return re.sub(r"\s#.*", "", re.sub(r"\\\n\s*", "", "\n".join(blocks)))


def test_every_parameter_that_is_set_is_one_of_params_yaml(code):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    keys = set(re.findall(r"-S '?([a-z_.0-9]+)=", code))
    assert keys
    for key in keys:
        found = params
        for name in key.split("."):
            assert name in found, key
            found = found[name]


def test_every_module_that_is_run_exists(code):
    modules = {name for name in re.findall(r"python3? -m ([a-z_.]+[a-z])", code) if name not in ("pip", "venv")}
    assert {"pipeline.search", "docs.screenshots"} <= modules
    for name in modules:
        assert importlib.util.find_spec(name), name


def test_every_target_of_make_exists(code):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z]+)\b", code))
    assert {"setup", "repro", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_and_option_of_pudnet_exists(code, capsys):
    calls = re.findall(r"^pudnet ([a-z]+)(.*)$", code, re.MULTILINE)
    assert len(calls) > 5
    for command, rest in calls:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", rest):
            assert f"{option} " in told, f"pudnet {command} {option}"
