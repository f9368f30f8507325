"""What the tests of faults share."""

import pytest

from tests.faults.harness import Cluster, Run, Undisturbed, python


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def start():
    """Start `python -m pipeline.STAGE ARGUMENTS` in a project; what it leaves behind is ended with the test."""
    runs = []

    def start(project, stage, *arguments, **extra):
        runs.append(Run(project, *python(stage, *arguments), **extra))
        return runs[-1]

    yield start
    for run in runs:
        run.clear()


@pytest.fixture
def same(undisturbed):
    """Check that files of a project are those of the undisturbed one, byte by byte."""

    def same(project, stage, *names):
        whole = undisturbed.run(stage)
        for name in names:
            assert (project / name).read_bytes() == (whole / name).read_bytes(), name

    return same


@pytest.fixture
def cluster(tmp_path, undisturbed):
    cluster = Cluster(tmp_path, undisturbed.cpus)
    yield cluster
    cluster.clear()
