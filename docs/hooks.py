"""What mkdocs does besides: pages and listings made from other files of the repository, and equations as MathML.

A line `{{ FILE }}` in a page is replaced by that file, `{{ FILE::NAME }}` by one part of it (a function, class or
value, a block of a YAML file), and `{{ $ COMMAND }}` by the command and what it prints. So none of them can fall
behind.
"""

from __future__ import annotations

import ast
import html
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import yaml
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS, STUDIES = ROOT / "docs", ROOT / "studies"
LANGUAGES = {".py": "python", ".yaml": "yaml"}


def studies_with_results() -> list[str]:
    """Names of the studies that were run, in the order of studies/dvc.yaml."""
    names = yaml.safe_load((STUDIES / "dvc.yaml").read_text())["stages"]["study"]["matrix"]["name"]
    return [name for name in names if (STUDIES / "results" / f"{name}.md").exists()]


# A page of the site -> the file of the repository that it is made from.
PAGES = {
    "results/studies.md": "studies/README.md",
    "results/bench.md": "reference/README.md",
    "results/speed.md": "benchmarks/README.md",
    "results/ingredients.md": "studies/results/ingredients.md",
    "results/rates.md": "studies/results/rates.md",
    "results/schedules.md": "studies/results/schedules.md",
    "results/pretraining.md": "studies/results/pretraining.md",
    "results/shipped.md": "studies/results/shipped.md",
    "results/long_training.md": "studies/results/long_training.md",
    "results/aims.md": "studies/results/aims.md",
    **{f"use/{card.name}": f"models/pretrained/{card.name}" for card in ROOT.glob("models/pretrained/*.md")},
    **{f"results/{name}.md": f"studies/results/{name}.md" for name in studies_with_results()},
    **{f"results/{name}.png": f"studies/results/{name}.png" for name in studies_with_results()},
}
PLACES = {f"docs/{file.relative_to(DOCS)}": str(file.relative_to(DOCS)) for file in DOCS.rglob("*") if file.is_file()}
PLACES |= {source: page for page, source in PAGES.items()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the studies below Results."""
    results = next(part["Results"] for part in config.nav if "Results" in part)
    results.append({"Studies": [f"results/{name}.md" for name in studies_with_results()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from other files."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def moved(text: str, page: str, source: str) -> str:
    """Rewrite a file's links for its place in the site; a link to what is not in the site becomes the file's name."""

    def link(found: re.Match) -> str:
        whole, said, target = found.group(0), found.group(1), found.group(2)
        path, _, anchor = target.partition("#")
        if not path or "://" in target:
            return whole
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path not in PLACES:
            return f"{said} (`{path}`)"
        place = posixpath.relpath(PLACES[path], posixpath.dirname(page))
        return whole.replace(target, place + ("#" + anchor if anchor else ""))

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def on_page_markdown(markdown: str, page: Page, **about: object) -> str:
    """Rewrite links to files of the repository for the site, and replace each line `{{ ... }}` by what it names."""
    place = page.file.src_uri
    markdown = moved(markdown, place, PAGES.get(place, f"docs/{place}"))
    return re.sub(r"^\{\{ (.+) \}\}$", lambda found: listing(found.group(1)), markdown, flags=re.MULTILINE)


def listing(what: str) -> str:
    """A code block: a command with what it prints, a file, or a part of a file with its line numbers."""
    if what.startswith("$ "):
        return f"```text\n{what}\n{printed(what[2:])}\n```"
    name, _, part = what.partition("::")
    path = ROOT / name
    if not path.is_file():
        raise PluginError(f"{{{{ {what} }}}}: there is no file {name}")
    lines = path.read_text().splitlines()
    first, last = part_of(path, part) if part else (1, len(lines))
    code = "\n".join(lines[first - 1 : last])
    return f'```{LANGUAGES[path.suffix]} title="{name}" linenums="{first}"\n{code}\n```'


def printed(command: str) -> str:
    """What a command of this project prints; only `pudnet`, whose --help needs no other package."""
    program, *options = command.split()
    if program != "pudnet":
        raise PluginError(f"{command}: only the command pudnet can be run here")
    environment = os.environ | {"COLUMNS": "90", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    called = [sys.executable, "-m", "pudnet.cli", *options]
    done = subprocess.run(called, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.rstrip()


def part_of(path: Path, part: str) -> tuple[int, int]:
    """First and last line of a function or class (`Class.method`), or of a top-level block of a YAML file."""
    if path.suffix == ".yaml":
        lines = path.read_text().splitlines()
        keys = [number for number, line in enumerate(lines, 1) if re.match(r"\w", line)] + [len(lines) + 1]
        for first, following in zip(keys, keys[1:], strict=False):
            if lines[first - 1].startswith(f"{part}:"):
                return first, max(n for n in range(first, following) if lines[n - 1].strip())
        raise PluginError(f"{path.name} has no block {part}")
    node: ast.AST = ast.parse(path.read_text())
    for name in part.split("."):
        inside = [child for child in ast.iter_child_nodes(node) if name in names_of(child)]
        if not inside:
            raise PluginError(f"{path.name} has no {part}")
        node = inside[0]
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]), node.end_lineno


def names_of(node: ast.AST) -> list[str]:
    """The names that a statement defines: of a function, a class or a value."""
    assigned = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [getattr(node, "name", "")] + [name.id for name in assigned if isinstance(name, ast.Name)]


def on_page_content(page_html: str, **about: object) -> str:
    """Turn equations (of pages, and of docstrings: :math:`...`) into MathML, and keep an interval in one line."""
    page_html = re.sub(r"(?<=\S)\s±\s", "&nbsp;±&nbsp;", page_html)
    page_html = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _equation, page_html, flags=re.DOTALL
    )
    return re.sub(r"(:math:)<code[^>]*>(.*?)</code>", _equation, page_html, flags=re.DOTALL)


def _equation(found: re.Match) -> str:
    display = "block" if found.group(1) == "div" else "inline"
    return convert(html.unescape(found.group(2)), display=display)
