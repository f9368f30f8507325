"""The disk is full while a store, a checkpoint or an artifact is written."""

import subprocess

import pytest

SEARCH = ("results/search.csv", "results/best.yaml")


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk; a second call with the same folder changes its size."""
    mounted = []

    def mount(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        options = f"size={size},remount" if folder in mounted else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Use up what is left of a disk."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


def test_a_store_on_a_full_disk_leaves_nothing_and_is_written_whole_later(undisturbed, start, same, disk, tmp_path):
    project = disk(tmp_path / "store", "100k")
    undisturbed.before("prepare", project)
    error = start(project, "prepare").badly(1)
    assert "the disk is full; make room" in error
    assert [path.name for path in project.rglob("*") if path.is_file() and ".pud" not in path.parts] == ["params.yaml"]
    disk(project, "1m")
    start(project, "prepare").well()
    same(project, "prepare", *(f"data/prepared/train/{name}" for name in ("images.npy", "labels.npy", "meta.json")))


@pytest.mark.parametrize(
    ("stage", "when", "done", "files"),
    [
        ("search", "[1/2 done]", "split0-eta0.0-depth1: group", SEARCH),
        ("train", "split0: group     8", "split0: group     2", ("models/pudnet.safetensors",)),
    ],
)
def test_trials_on_a_full_disk_go_on_once_there_is_room(
    undisturbed, start, same, disk, stage, when, done, files, tmp_path
):
    project = undisturbed.before(stage, disk(tmp_path / stage, "200m"))
    run = start(project, stage).until(when)
    ballast = fill(project)
    error = run.badly(1)
    assert "o space left" in error or "the disk is full" in error
    ballast.unlink()
    assert done not in start(project, stage).well()
    same(project, stage, *files)


def test_an_artifact_on_a_full_disk_is_left_out_and_logged_later(undisturbed, start, same, disk, tmp_path):
    project = undisturbed.before("evaluate", tmp_path / "artifacts")
    disk(project / "mlartifacts", "8k")
    said = start(project, "evaluate").well()
    assert "cannot be written ([Errno 28] No space left on device" in said
    same(project, "evaluate", "results/metrics.json", "results/pudnet.csv")
    disk(project / "mlartifacts", "20m")
    assert "cannot be written" not in start(project, "evaluate").well()
    assert len([*(project / "mlartifacts").rglob("group-*.safetensors")]) == 2


def test_results_on_a_full_disk_are_whole_or_not_there(undisturbed, start, same, disk, tmp_path):
    project = undisturbed.before("evaluate", disk(tmp_path / "results", "200m"))
    ballast = fill(project)
    assert "the disk is full; make room" in start(project, "evaluate").badly(1)
    assert not (project / "results/metrics.json").exists() and not (project / "results/weights").exists()
    ballast.unlink()
    start(project, "evaluate").well()
    same(project, "evaluate", "results/metrics.json", "results/pudnet.csv")
