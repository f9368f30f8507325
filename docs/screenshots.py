"""Takes the screenshots of docs/start.md, in headless Chromium: `python -m docs.screenshots`, after `make repro`.

`--project FOLDER` takes them of a run in another clone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

IMAGES = Path(__file__).parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT, COLOURS = 1200, 900, 128
ASSISTANT = 410  # pixels at the right of MLflow's pages, which are cut off
PATIENCE = 60  # seconds for MLflow's server to answer


def main() -> None:
    """Write docs/images/report.png, report-search.png, mlflow-runs.png and mlflow-compare.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=Path(), help="where `make repro` was run (here)")
    project = parser.parse_args().project.resolve()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    report = project / "results" / "report.html"
    if browser is None or not report.is_file():
        sys.exit(f"error: {'no chromium is installed' if browser is None else f'{report} is missing; run make repro'}")
    take(browser, report.as_uri(), "report")
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "report.html")
        part.write_text(from_heading(report.read_text(), "Search"))
        take(browser, part.as_uri(), "report-search")
    with mlflow_server(project) as address:
        client = MlflowClient(address)
        (experiment,) = client.search_experiments(filter_string="name LIKE 'pudnet-%'", max_results=1)
        trials = trials_of_newest_search(client, experiment.experiment_id)
        runs = f"{address}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
        take(browser, runs, "mlflow-runs", ASSISTANT)
        listed = "[" + ",".join(f'"{trial}"' for trial in trials) + "]"
        compare = f'{address}/#/compare-runs?runs={listed}&experiments=["{experiment.experiment_id}"]'
        take(browser, compare, "mlflow-compare", ASSISTANT)
    print(f"screenshots: {IMAGES}")


def from_heading(page: str, heading: str) -> str:
    """A page without what stands between its title and a heading."""
    before, found, after = page.partition(f"<h2>{heading}</h2>")
    if not found:
        sys.exit(f"error: the report has no heading {heading}")
    return before[: before.index("<h1>")] + found + after


def trials_of_newest_search(client: MlflowClient, experiment: str) -> list[str]:
    """The ids of the children of the newest run that is called `search...`."""
    runs = client.search_runs([experiment], "attributes.run_name LIKE 'search%'", order_by=["start_time DESC"])
    parent = next(run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    return [run.info.run_id for run in children]


@contextlib.contextmanager
def mlflow_server(project: Path) -> Iterator[str]:
    """MLflow's UI on a copy of the project's database: its address."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        shutil.copy(project / "mlflow.db", folder)
        command = (
            f"mlflow ui --host 127.0.0.1 --port {port} --backend-store-uri sqlite:///mlflow.db --workers 1".split()
        )
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with Path(folder, "log").open("w") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=folder,
                env=os.environ | quiet,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_for(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, 15)
            server.wait()


def wait_for(port: int) -> None:
    """Return when something answers at a port of this machine."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.5)
    sys.exit("error: MLflow's server does not answer")


def take(browser: str, address: str, name: str, cut: int = 0) -> None:
    """One screenshot, as a PNG of few colours, less `cut` pixels at its right."""
    path = IMAGES / f"{name}.png"
    options = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size={WIDTH + cut},{HEIGHT}"
    waiting = ["--virtual-time-budget=20000", f"--screenshot={path}"]
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *options.split(), f"--user-data-dir={profile}", *waiting, address]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(path) as image:
        image.convert("RGB").crop((0, 0, WIDTH, HEIGHT)).quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main()
