"""MLflow's database is damaged, its server is down: the run goes on, and what is missing is logged later."""

import signal
import socket
import time
import urllib.request

import pytest

from tests.faults.harness import Run, runs_of

SEARCH = ("results/search.csv", "results/best.yaml")
STEPS = [2, 4, 6, 8, 10, 12]
WHOLE = {
    "search-split0": ("FINISHED", []),
    "split0-eta0.0-depth1": ("FINISHED", STEPS),
    "split0-eta0.2-depth1": ("FINISHED", STEPS),
}


@pytest.fixture
def server(tmp_path):
    """A function that starts MLflow's server, always the same one; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, folder = [], tmp_path / "server"
    folder.mkdir()
    options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *options]

    def start():
        started.append(Run(folder, *command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"))

        def answers():
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
            except OSError:
                return False

        return started[-1].until(answers)

    yield f"http://127.0.0.1:{port}", start
    for run in started:
        run.clear()


def test_a_search_goes_on_without_its_server_and_logs_all_of_it_later(undisturbed, start, same, server, tmp_path):
    """Down at the start, up for a while, down until the end; then the search, run again, logs what is missing."""
    project = undisturbed.before("search", tmp_path / "down")
    uri, serve = server
    run = start(project, "search", MLFLOW_TRACKING_URI=uri).until("split0-eta0.0-depth1: group     2")
    assert f"tracking: {uri} cannot be written" in run.out
    run.process.send_signal(signal.SIGSTOP)  # so that the trials last longer than a server takes to start
    up = serve()
    run.process.send_signal(signal.SIGCONT)
    run.until(f"tracking: {uri} is written again")
    run.process.send_signal(signal.SIGSTOP)  # so that it does not end before its server does
    assert runs_of(project, uri)["split0-eta0.0-depth1"][1][:1] == [2]  # which it reported without a server
    up.clear()
    run.process.send_signal(signal.SIGCONT)
    said = run.well()
    assert said.count("cannot be written") == 2 and said.count("misses some logs") == 1
    same(project, "search", *SEARCH)
    serve()
    again = start(project, "search", MLFLOW_TRACKING_URI=uri).well()
    assert "2 of 2 trials are finished already" in again and "cannot be written" not in again
    assert runs_of(project, uri) == WHOLE


def test_a_search_goes_on_without_a_damaged_database_and_logs_all_of_it_to_a_new_one(undisturbed, start, same):
    project = undisturbed.interrupted()
    database = project / "mlflow.db"
    database.write_bytes(b"damaged" * 1000 + database.read_bytes()[7000:])
    said = start(project, "search").well()
    assert said.count(f"tracking: sqlite:///{database} cannot be written") == 1
    same(project, "search", *SEARCH)
    database.unlink()
    assert "2 of 2 trials are finished already" in start(project, "search").well()
    assert runs_of(project) == WHOLE


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_stage_without_its_server_ends_well(undisturbed, start, same, stage, tmp_path):
    project = undisturbed.after(stage, tmp_path / stage)
    result = {"train": "models/pudnet.safetensors", "evaluate": "results/metrics.json"}[stage]
    (project / result).unlink()
    begun = time.monotonic()
    said = start(project, stage, MLFLOW_TRACKING_URI="http://127.0.0.1:9").well()
    assert said.count("tracking: http://127.0.0.1:9 cannot be written") == 1 and time.monotonic() - begun < 200
    same(project, stage, result)


def test_an_address_that_mlflow_does_not_know_is_refused_at_once(undisturbed, start, tmp_path):
    project = undisturbed.before("search", tmp_path / "unknown")
    error = start(project, "search", MLFLOW_TRACKING_URI="magic://here").badly(2)
    assert "MLFLOW_TRACKING_URI: magic://here is no address that MLflow knows" in error
