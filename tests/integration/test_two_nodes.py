"""recipes/train.sh on two nodes of this machine, and recipes/train_slurm.sh under a Slurm of two shell scripts."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megaeva.checkpoint.layout import complete_checkpoints
from megaeva.data.synthetic import make_shards
from megaeva.observability.metrics import read_metrics
from tests.integration.test_training import losses, write_recipe

pytestmark = pytest.mark.exhaustive  # a minute: heartbeats of a lost node are awaited

ROOT = Path(__file__).parents[2]
STEPS = 40
LENGTH = [f"train.total_samples={8 * STEPS}", "save.every_steps=5"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, num_shards=4, samples_per_shard=20, image_size=40, seed=0)
    return str(folder / "*.tar")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: str) -> dict[int, tuple[float, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = str(write_recipe(folder, shards))
    main = "from megaeva.cli import app; app()"
    command = [sys.executable, "-c", main, "train", recipe, "--processes", "2", *LENGTH]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder / "run")


def _environment(**other: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | other


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def _wait_for_step(run_dir: Path, step: int) -> None:
    """And for a checkpoint."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        saved = complete_checkpoints(run_dir / "checkpoints")
        if saved and (metrics := read_metrics(run_dir)) and metrics[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} or its first checkpoint not reached")


def _kill_node(process: "subprocess.Popen[bytes]") -> None:
    """Everything at once, as when the power fails."""
    agent = psutil.Process(process.pid)
    for member in [agent, *agent.children(recursive=True)]:
        member.kill()
    process.wait()


def test_a_node_killed_and_started_again_repeats_every_loss(
    tmp_path: Path, shards: str, undisturbed: dict[int, tuple[float, float]]
) -> None:
    recipe = write_recipe(tmp_path, shards)
    port = _free_port()

    def start(rank: int, *arguments: str) -> "subprocess.Popen[bytes]":
        place = {"NNODES": "2", "NODE_RANK": str(rank), "PROCESSES": "1", "JOIN_SECONDS": "120"}
        with (tmp_path / f"node_{rank}.log").open("ab") as log:
            return subprocess.Popen(
                ["bash", "recipes/train.sh", str(recipe), *arguments, *LENGTH],
                cwd=ROOT,
                env=_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    nodes = [start(0), start(1)]
    try:
        _wait_for_step(tmp_path / "run", 7)
        _kill_node(nodes[1])
        nodes[1] = start(1, "--resume")
        codes = [node.wait(timeout=150) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                _kill_node(node)
    said = (tmp_path / "node_0.log").read_text()
    assert codes == [0, 0], said
    assert re.search(r"resuming step \d+ from", said)
    assert losses(tmp_path / "run") == undisturbed
    outputs = list((tmp_path / "run" / "logs").glob("node_*/*/attempt_*/*/stdout.log"))
    assert {path.relative_to(tmp_path / "run" / "logs").parts[0] for path in outputs} == {"node_0", "node_1"}


SRUN = """#!/bin/bash
# Two tasks, each on a node of its own; a signal goes to both.
[[ "$1 $2 $3" == "--nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1" ]] || exit 99
shift 3
for node in 0 1; do SLURM_NODEID=$node SLURM_STEP_NUM_NODES=2 "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    while true; do one=0; wait "$task" || one=$?; kill -0 "$task" 2>/dev/null || break; done
    [[ $one -eq 0 ]] || code=$one
done
exit $code
"""
SCONTROL = """#!/bin/bash
case "$1" in show) echo 127.0.0.1 ;; requeue) echo "$2" > "$REQUEUED" ;; esac
"""


def test_a_preempted_job_is_requeued_and_goes_on(
    tmp_path: Path, shards: str, undisturbed: dict[int, tuple[float, float]]
) -> None:
    recipe = write_recipe(tmp_path, shards)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    # scontrol names 127.0.0.1, which the script refuses as it must; the fake cluster is this machine.
    script = (ROOT / "recipes/train_slurm.sh").read_text().replace('"$MASTER_ADDR" =~ ^(localhost|127\\.)', '"" =~ x')
    (tmp_path / "train_slurm.sh").write_text(script)
    requeued = tmp_path / "requeued"
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "two", "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "REQUEUED": str(requeued), "PROCESSES": "1",
        "MASTER_PORT": _free_port(), "JOIN_SECONDS": "60",
    }  # fmt: skip

    def start(**other: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(tmp_path / "train_slurm.sh"), str(recipe), *LENGTH],
            cwd=ROOT,
            env=_environment(**slurm, **other),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first = start()
    _wait_for_step(tmp_path / "run", 7)
    first.send_signal(signal.SIGTERM)  # to the batch script alone, as --signal=B: does
    out, _ = first.communicate(timeout=100)
    assert first.returncode == 143, out
    assert "SIGTERM: step" in out
    assert requeued.read_text() == "77\n"
    assert max(losses(tmp_path / "run")) < STEPS
    second = start(SLURM_RESTART_COUNT="1")
    out, _ = second.communicate(timeout=150)
    assert second.returncode == 0, out
    assert "resuming step" in out
    assert losses(tmp_path / "run") == undisturbed


def test_nodes_that_do_not_meet_train_nothing(tmp_path: Path, shards: str) -> None:
    """Two nodes that both believe to be the first: neither becomes a job of its own."""
    recipe = write_recipe(tmp_path, shards)
    place = {"NNODES": "2", "NODE_RANK": "0", "PROCESSES": "1", "JOIN_SECONDS": "3", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        ["bash", "recipes/train.sh", str(recipe)],
        cwd=ROOT,
        env=_environment(MASTER_PORT=_free_port(), **place),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done.stderr
    assert "error: node 0 of 2 did not meet the others at 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
