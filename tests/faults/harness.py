"""Commands that run for real, are hurt, and run again."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from mlflow import MlflowClient

from tests.smallest import shrink
from tests.test_pipeline import ROOT, environment

PATIENCE = 300  # seconds; a machine that is busy with other things takes long
BEFORE = {  # what has to have run before a stage
    "search": ["prepare", "groups"],
    "train": ["search"],
    "evaluate": ["train"],
    "baselines": ["evaluate"],
}


def python(stage: str, *arguments: str) -> tuple[str, ...]:
    """The command of a stage."""
    return (sys.executable, "-u", "-m", f"pipeline.{stage}", *arguments)


def shorten(path: Path) -> None:
    """The smallest pipeline, with more reports: each is a place to be interrupted at."""
    shrink(path)
    params = yaml.safe_load(path.read_text())
    params["groups"] |= {"search_groups": 12, "train_groups": 12}
    params["search"] |= {"report_every": 2}
    params["train"] |= {"report_every": 2}
    params["baselines"]["methods"] = ["protonet", "scratch_adam", "static_trunk", "shuffled_sketch"]
    params["baselines"]["space"] = {"protonet": {"scale": [1.0, 0.01]}}
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def change(project: Path, block: str, **values) -> None:
    """Change a block of a project's params."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    params[block] |= values
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


class Run:
    """A command at work in a project's folder, in a session of its own; what it says goes to files elsewhere."""

    def __init__(self, project: Path, *command: str, **extra: str) -> None:
        self.logs = [project.parent / f"{project.name}-{time.time_ns()}.{kind}" for kind in ("out", "err")]
        self.started: dict[int, psutil.Process] = {}
        with self.logs[0].open("w") as out, self.logs[1].open("w") as err:
            self.process = subprocess.Popen(
                command,
                cwd=project,
                env=environment(ROOT) | extra,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
            )

    @property
    def out(self) -> str:
        return self.logs[0].read_text()

    @property
    def err(self) -> str:
        return self.logs[1].read_text()

    @property
    def said(self) -> str:
        return f"exit code {self.process.poll()}\n{self.out}\n{self.err}"

    def until(self, there) -> "Run":
        """Wait until a text is in the output, or a function of the run says so."""
        said = there if callable(there) else lambda: there in self.out + self.err
        end = time.monotonic() + PATIENCE
        while not said():
            assert self.process.poll() is None and time.monotonic() < end, f"waited for {there}; {self.said}"
            time.sleep(0.02)
        return self

    def hit(self, sig: int = signal.SIGKILL, session: bool = False) -> "Run":
        """Send a signal, to the command alone or to its session as a terminal does, and wait for its end."""
        self.remember()
        (os.killpg if session else os.kill)(self.process.pid, sig)
        return self.end()

    def end(self) -> "Run":
        """Wait for the end."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end; {self.said}") from None
        return self

    def well(self) -> str:
        """Wait for an end that is a success; what was said."""
        assert self.end().process.returncode == 0, self.said
        return self.out + self.err

    def badly(self, code: int) -> str:
        """Wait for an end with this exit code and one line of error; that line."""
        assert self.end().process.returncode == code, self.said
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in self.said, self.said
        return errors[0]

    def remember(self) -> list[psutil.Process]:
        """The processes below the command."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.started |= {one.pid: one for one in psutil.Process(self.process.pid).children(recursive=True)}
        return [one for one in self.started.values() if one.is_running()]

    def workers(self, *titles: str) -> list[psutil.Process]:
        """Processes in which a trial runs, or a task of this title."""
        titles = titles or ("ImplicitFunc", "run_trial")
        return [one for one in self.remember() if any(name in _title(one) for name in titles)]

    def clear(self) -> None:
        """End what is left of it, process by process."""
        for one in [*self.remember(), *([self.process] if self.process.poll() is None else [])]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def checkpoints(project: Path) -> list[Path]:
    """The checkpoints of the one trial that has not ended, the newest last."""
    (folder,) = (one for one in (project / ".pud/trials").iterdir() if not (one / "ended.json").exists())
    return sorted(folder.glob("*/state.pt"))


def truncate(path: Path) -> None:
    """Cut off the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def mlflow_of(project: Path) -> MlflowClient:
    """A client of the project's database, as it is now: of a copy, since a client keeps open what a test replaces."""
    now = project.parent / f"{project.name}-{time.time_ns()}.db"
    shutil.copy(project / "mlflow.db", now)
    return MlflowClient(f"sqlite:///{now}")


def runs_of(project: Path, uri: str | None = None, by_project: bool = False) -> dict:
    """What MLflow has of each run: its status, and the steps of its speed; `by_project`: apart for each project."""
    client, found = MlflowClient(uri) if uri else mlflow_of(project), {}
    for run in client.search_runs([one.experiment_id for one in client.search_experiments()]):
        own = found.setdefault(run.data.tags["pudnet.project"], {})
        assert run.info.run_name not in own
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "groups_per_second")]
        own[run.info.run_name] = (run.info.status, steps)
    if by_project:
        return found
    (only,) = found.values()
    return only


class Undisturbed:
    """A project in which nothing goes wrong; each stage runs once, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder / "undisturbed", []
        self.folder.mkdir()
        shutil.copy(ROOT / "params.yaml", self.folder)
        shorten(self.folder / "params.yaml")

    @property
    def cpus(self) -> int:
        """What a trial takes."""
        return yaml.safe_load((self.folder / "params.yaml").read_text())["resources"]["cpus"]

    def run(self, stage: str) -> Path:
        """The project, once the stage has run. As it was before it lies beside it, without state and tracking."""
        for earlier in BEFORE.get(stage, []):
            self.run(earlier)
        if stage not in self.done:
            left_out = shutil.ignore_patterns(".pud", "mlflow.db", "mlartifacts")
            shutil.copytree(self.folder, self.folder.with_name(f"before-{stage}"), ignore=left_out)
            Run(self.folder, *python(stage)).well()
            self.done.append(stage)
        return self.folder

    def after(self, stage: str, destination: Path) -> Path:
        """A copy of the project as it was after a stage, with its state."""
        self.run(stage)
        return shutil.copytree(self.folder, destination)

    def interrupted(self) -> Path:
        """A project whose search was killed in the middle of its second trial; in its folder anew at each call."""
        project, kept = self.folder.with_name("interrupted"), self.folder.with_name("interrupted-kept")
        if not kept.is_dir():
            self.before("search", project)
            Run(project, *python("search")).until("split0-eta0.2-depth1: group     6").hit().clear()
            shutil.copytree(project, kept)
        shutil.rmtree(project)
        return shutil.copytree(kept, project)

    def before(self, stage: str, destination: Path) -> Path:
        """A copy of the project as it was before a stage."""
        self.run(stage)
        return shutil.copytree(self.folder.with_name(f"before-{stage}"), destination, dirs_exist_ok=True)


class Cluster:
    """A head without cores, which a driver on this machine needs, and nodes with the cores of one trial each."""

    def __init__(self, folder: Path, cpus: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.cpus, self.nodes = folder, cpus, []
        self.sockets = Path(tempfile.mkdtemp(prefix="pud", dir="/tmp"))  # their paths have to be short
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.joining = {"RAY_ADDRESS": self.address} | self.token
        own = ("--node-ip-address=127.0.0.1", f"--port={self.address.rpartition(':')[2]}")
        self._start("--head", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={self.sockets}", *own)

    def add(self, gpus: int = 0, **extra: str) -> Run:
        """One more node; the GPUs are Ray's count of them, by which it places trials."""
        return self._start(f"--address={self.address}", f"--num-cpus={self.cpus}", f"--num-gpus={gpus}", **extra)

    def _start(self, *options: str, **extra: str) -> Run:
        ray = str(Path(sys.executable).with_name("ray"))
        command = (ray, "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000", *options)
        self.nodes.append(Run(self.folder, *command, **self.token, **extra))
        return self.nodes[-1].until("Ray runtime started")

    def clear(self) -> None:
        for node in reversed(self.nodes):
            node.clear()
        shutil.rmtree(self.sockets, ignore_errors=True)
