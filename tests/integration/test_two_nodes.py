"""recipes/train.sh on two nodes of this machine: nodes are lost and come back, a job is preempted and requeued."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megaeva.checkpoint.layout import complete_checkpoints
from megaeva.config import load
from megaeva.data.synthetic import make_shards
from megaeva.observability.metrics import read_metrics
from megaeva.parallel.runtime import Runtime
from megaeva.trainer import Trainer
from tests.helpers.ports import two_free_ports
from tests.helpers.slurm import fake_slurm
from tests.helpers.spawn import run_ranks
from tests.integration.test_training import losses, write_recipe

ROOT = Path(__file__).parents[2]
STEPS = 20
LENGTH = [f"train.total_samples={8 * STEPS}", "save.every_steps=4"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, num_shards=4, samples_per_shard=20, image_size=40, seed=0)
    return str(folder / "*.tar")


def _train(runtime: Runtime, recipe: str) -> int:
    return Trainer(load(recipe, LENGTH), runtime, resume=False, recipe_changes=[]).fit()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: str) -> dict[int, tuple[float, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_ranks(_train, 2, str(write_recipe(folder, shards))) == [0, 0]
    result = losses(folder / "run")
    assert len(result) == STEPS
    return result


class Jobs:
    """Processes whose output goes to files, none of which outlives the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        common = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        with (self._folder / f"{name}.log").open("ab") as log:
            env = os.environ | common | environment
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        self._started.append(process)
        return process

    def said(self, name: str) -> str:
        """All that the processes of this name printed."""
        return (self._folder / f"{name}.log").read_text()

    def everything(self) -> str:
        """What all printed, for the message of a failed test."""
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in sorted(self._folder.glob("*.log")))

    def await_step(self, run_dir: Path, step: int) -> None:
        """Returns after this step and a checkpoint."""
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not any(process.poll() for process in self._started):
            saved = complete_checkpoints(run_dir / "checkpoints")
            if saved and (metrics := read_metrics(run_dir)) and metrics[-1]["step"] >= step:
                return
            time.sleep(0.02)
        raise AssertionError(f"step {step} or its first checkpoint not reached\n{self.everything()}")

    def ends(self, *processes: "subprocess.Popen[bytes]") -> list[int]:
        """Their exit codes."""
        try:
            return [process.wait(timeout=600) for process in processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end\n{self.everything()}") from None

    def kill_all(self) -> None:
        """Whatever still runs."""
        for process in self._started:
            if process.poll() is None:
                for member in _family(process):
                    member.kill()
                process.wait()


def _family(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The process and all below it."""
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


@contextmanager
def _jobs(folder: Path) -> Iterator[Jobs]:
    jobs = Jobs(folder)
    try:
        yield jobs
    finally:
        jobs.kill_all()


def _kill_machine(process: "subprocess.Popen[bytes]") -> None:
    """Everything at once, as when the power fails."""
    for member in _family(process):
        member.kill()
    process.wait()


def _kill_agent(process: "subprocess.Popen[bytes]") -> None:
    """Only torchrun's agent; its rank, which nobody tells, ends by itself."""
    _, *ranks = _family(process)
    assert ranks
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(ranks, timeout=60)
    assert gone
    assert not alive


@pytest.mark.parametrize(
    "kill", [_kill_agent, pytest.param(_kill_machine, marks=pytest.mark.exhaustive)], ids=["agent", "machine"]
)
def test_a_node_killed_and_started_again_repeats_every_loss(
    tmp_path: Path,
    shards: str,
    undisturbed: dict[int, tuple[float, float]],
    kill: "Callable[[subprocess.Popen[bytes]], None]",
) -> None:
    recipe = write_recipe(tmp_path, shards)
    port = str(two_free_ports())

    with _jobs(tmp_path) as jobs:

        def start(rank: int, *arguments: str) -> "subprocess.Popen[bytes]":
            place = {"NNODES": "2", "NODE_RANK": str(rank), "PROCESSES": "1", "JOIN_SECONDS": "600"}
            command = ["bash", "recipes/train.sh", str(recipe), *arguments, *LENGTH]
            return jobs.start(f"node_{rank}", command, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place)

        nodes = [start(0), start(1)]
        jobs.await_step(tmp_path / "run", 6)
        kill(nodes[1])
        nodes[1] = start(1, "--resume")
        assert jobs.ends(*nodes) == [0, 0], jobs.everything()
        said = jobs.said("node_0") + jobs.said("node_1")
    assert re.search(r"resuming step \d+ from", said)
    assert losses(tmp_path / "run") == undisturbed
    # Each start of the ranks has left its output: of node 1 the lost one and the one that came back.
    logs = tmp_path / "run" / "logs"
    starts = {path.relative_to(logs).parts[:2] for path in logs.glob("node_*/start_*/attempt_*/0/stdout.log")}
    assert {("node_0", "start_1"), ("node_0", "start_2"), ("node_1", "start_1"), ("node_1", "start_2")} <= starts
    steps = [path.read_text().count("run · step") for path in sorted(logs.glob("*/start_*/*/0/stdout.log"))]
    assert sum(count > 0 for count in steps) == 2, "of rank 0, before and after"


@pytest.mark.exhaustive  # half a minute of CPU time
def test_a_preempted_job_is_requeued_and_goes_on(
    tmp_path: Path, shards: str, undisturbed: dict[int, tuple[float, float]]
) -> None:
    recipe = write_recipe(tmp_path, shards)
    slurm = fake_slurm(tmp_path, ROOT, 2) | {"PROCESSES": "1", "MASTER_PORT": str(two_free_ports())}
    command = ["bash", "recipes/train_slurm.sh", str(recipe), *LENGTH]
    with _jobs(tmp_path) as jobs:
        first = jobs.start("first", command, JOIN_SECONDS="600", **slurm)
        jobs.await_step(tmp_path / "run", 6)
        first.send_signal(signal.SIGTERM)  # to the batch script alone, as --signal=B: does
        assert jobs.ends(first) == [143], jobs.everything()
        assert "SIGTERM: step" in jobs.said("first")
        assert (tmp_path / "requeued").read_text() == "77\n"
        assert max(losses(tmp_path / "run")) < STEPS
        second = jobs.start("second", command, JOIN_SECONDS="600", SLURM_RESTART_COUNT="1", **slurm)
        assert jobs.ends(second) == [0], jobs.everything()
        assert "resuming step" in jobs.said("second")
    assert losses(tmp_path / "run") == undisturbed
