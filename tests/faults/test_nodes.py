"""A node of a cluster is lost: several `ray start` on this machine, each in a session of its own."""

import secrets
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from tests.faults.harness import Run

SEARCH = ("results/search.csv", "results/best.yaml")
TRIALS = ("split0-eta0.0-depth1", "split0-eta0.2-depth1")


@pytest.fixture
def cluster(tmp_path, undisturbed):
    """A head without cores and two nodes that can hold one trial each: what a driver needs to join, and the nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = Path(tempfile.mkdtemp(prefix="pud", dir="/tmp"))  # its sockets' paths have to be short
    joining = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = Path(sys.executable).with_name("ray")
    nodes, store = [], "--object-store-memory=100000000"

    def start(*options):
        command = (str(ray), "start", "--block", "--disable-usage-stats", store, *options)
        extra = {key: value for key, value in joining.items() if key != "RAY_ADDRESS"}
        nodes.append(Run(tmp_path, *command, **extra).until("Ray runtime started"))

    cpus = undisturbed.cpus
    try:
        head = ("--head", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}")
        start(*head, "--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}")
        for _ in range(2):
            start(f"--address={address}", f"--num-cpus={cpus}")
        yield joining, nodes
    finally:
        for node in reversed(nodes):
            node.clear()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_trial_whose_node_is_lost_goes_on_at_another(undisturbed, start, same, cluster, tmp_path):
    joining, nodes = cluster
    project = undisturbed.before("search", tmp_path / "nodes")
    run = start(project, "search", **joining)
    for trial in TRIALS:  # side by side, one a node
        run.until(f"{trial}: group     4")
    nodes[-1].clear()
    said = run.well()
    assert all(said.count(f"{trial}: group     {step}") == 1 for trial in TRIALS for step in (2, 4))
    same(project, "search", *SEARCH)
