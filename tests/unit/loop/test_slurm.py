"""recipes/train_slurm.sh under a Slurm of two shell scripts, with a shell script in place of each node's job."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.slurm import fake_slurm

SCRIPT = Path(__file__).parents[3] / "recipes" / "train_slurm.sh"
TRAIN = """#!/bin/bash
echo "node $SLURM_NODEID: NNODES=$NNODES MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT JOB_ID=$JOB_ID $*"
trap "sleep 0.2; exit $SAVED" TERM
touch "$STARTED.$SLURM_NODEID"
[[ "$1" == --dry-run ]] && exit
[[ -z "$ENDS" ]] || exit "$ENDS"
while true; do sleep 0.05; done
"""


def _run(folder: Path, *arguments: str, stop: bool = False, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code, output, requeued jobs; with `stop` SIGTERM goes to the batch script when both nodes run."""
    (folder / "recipes").mkdir()
    (folder / "recipes" / "train.sh").write_text(TRAIN)
    environment = fake_slurm(folder, folder, 2) | {"STARTED": str(folder / "started"), "ENDS": ""} | environment
    process = subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if stop:
        deadline = time.monotonic() + 120
        while not all((folder / f"started.{node}").exists() for node in (0, 1)) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    requeued = folder / "requeued"
    return process.returncode, out, requeued.read_text().split() if requeued.exists() else []


def test_every_node_gets_the_first_ones_name_and_a_port_of_the_job(tmp_path: Path) -> None:
    code, out, requeued = _run(tmp_path, "r.yaml", "seed=3", ENDS="0", FAKE_HOSTS="gpu1 gpu2")
    assert (code, requeued) == (0, [])
    for node in (0, 1):
        assert f"node {node}: NNODES=2 MASTER_ADDR=gpu1 MASTER_PORT=20077 JOB_ID=77 r.yaml seed=3" in out


def test_a_dry_run_inside_of_a_job_starts_no_step(tmp_path: Path) -> None:
    code, out, _ = _run(tmp_path, "--dry-run", "r.yaml")
    assert code == 0
    assert "srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 bash" in out
    assert out.count("MASTER_ADDR=") == 1


def test_preemption_requeues_after_the_ranks_saved(tmp_path: Path) -> None:
    code, out, requeued = _run(tmp_path, "r.yaml", stop=True, SAVED="143")
    assert (code, requeued) == (143, ["77"]), out
    assert "requeueing job 77" in out


def test_a_job_that_ends_at_the_signal_is_not_requeued(tmp_path: Path) -> None:
    code, out, requeued = _run(tmp_path, "r.yaml", stop=True, SAVED="0")
    assert (code, requeued) == (0, []), out


def test_a_requeue_that_slurm_refuses_is_told(tmp_path: Path) -> None:
    code, out, _ = _run(tmp_path, "r.yaml", stop=True, SAVED="143", FAKE_REQUEUE_CODE="1")
    assert code == 2
    assert "scontrol does not requeue job 77" in out
    assert "again with --resume" in out


def test_a_job_that_fails_is_not_requeued(tmp_path: Path) -> None:
    code, _, requeued = _run(tmp_path, "r.yaml", ENDS="2")
    assert (code, requeued) == (2, [])


@pytest.mark.parametrize(
    ("hosts", "text"), [("", "scontrol names no host of SLURM_JOB_NODELIST=gpu"), ("localhost", "is called localhost")]
)
def test_node_lists_that_are_refused(tmp_path: Path, hosts: str, text: str) -> None:
    code, out, _ = _run(tmp_path, "r.yaml", FAKE_HOSTS=hosts)
    assert code == 2
    assert text in out
