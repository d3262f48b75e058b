"""`megaeva bench sweep` over two nodes of this machine under a Slurm of two shell scripts, killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megaeva.data.synthetic import make_shards
from tests.helpers.ports import two_free_ports
from tests.helpers.slurm import write_commands
from tests.integration.test_training import write_recipe

pytestmark = pytest.mark.exhaustive  # a minute: four jobs of one or two nodes

SRUN = """#!/bin/bash
# As many tasks as nodes, each on one of its own; as srun does, it answers SIGTERM by killing them.
[[ "$1 $2" =~ ^--overlap\\ --nodes=([12])$ ]] || exit 99
nodes=${BASH_REMATCH[1]}
shift 5
for ((node = 0; node < nodes; node++)); do
    SLURM_NODEID=$node SLURM_STEP_NUM_NODES=$nodes setsid "$@" & tasks+=($!)
done
trap 'for task in "${tasks[@]}"; do kill -KILL -- "-$task"; done' TERM
code=0
for task in "${tasks[@]}"; do
    while true; do one=0; wait "$task" || one=$?; kill -0 "$task" 2>/dev/null || break; done
    [[ $one -eq 0 ]] || code=$one
done
exit $code
"""
SCONTROL = """#!/bin/bash
printf '127.0.0.1\\nlocalhost\\n'
"""


def start(folder: Path, recipe: Path, *arguments: str) -> "subprocess.Popen[str]":
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "two", "PROCESSES": "1",
        "MASTER_PORT": str(two_free_ports()), "JOIN_SECONDS": "60", "OMP_NUM_THREADS": "1",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }  # fmt: skip
    main = "from megaeva.cli import main; main()"
    options = ["--ranks", "1,2", "--layouts", "dp", "--scaling", "strong", "--steps", "2", "--out", str(folder / "out")]
    return subprocess.Popen(
        [sys.executable, "-c", main, "bench", "sweep", str(recipe), *options, *arguments],
        env=os.environ | slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(folder: Path) -> list[dict[str, object]]:
    path = folder / "out" / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_sweep_over_nodes_is_killed_and_goes_on(tmp_path: Path) -> None:
    make_shards(tmp_path, num_shards=4, samples_per_shard=20, image_size=40, seed=0)
    recipe = write_recipe(tmp_path, str(tmp_path / "*.tar"))
    write_commands(tmp_path, srun=SRUN, scontrol=SCONTROL)
    first = start(tmp_path, recipe)
    on_two = tmp_path / "out/runs/recipe_fp32_dp_2_ranks_batch_8"
    try:
        deadline = time.monotonic() + 400
        while not (on_two / "config.yaml").exists():  # the second run is under way
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        family = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        for member in family:  # the machine loses its power
            member.kill()
        first.wait()
    (kept,) = rows(tmp_path)
    second = start(tmp_path, recipe)
    said, _ = second.communicate(timeout=400)
    assert second.returncode == 0, said
    assert "(1/2) recipe_fp32_dp_1_ranks_batch_8: has its row" in said
    assert "node 1 of 2" in (on_two / "train.log").read_text()
    one, two = rows(tmp_path)
    assert one == kept
    assert (one["ranks"], one["nodes"], two["ranks"], two["nodes"]) == (1, 1, 2, 2)
    assert isinstance(two["communication_share"], float) and two["communication_share"] > one["communication_share"]
    assert not list(tmp_path.glob("out/runs/*/checkpoints/*"))
    refused, _ = start(tmp_path, recipe, "--ranks", "4").communicate(timeout=200)
    assert "error: --ranks 4 takes 4 nodes of 1 processes, and the allocation has 2" in refused

    third = start(tmp_path, recipe, "--steps", "2000", "--out", str(tmp_path / "long"))
    long_run = tmp_path / "long/runs/recipe_fp32_dp_1_ranks_batch_8"
    deadline = time.monotonic() + 400
    while not (long_run / "metrics.jsonl").exists() or not (long_run / "metrics.jsonl").read_text():
        assert third.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(third.pid).children(recursive=True)
    third.send_signal(signal.SIGINT)
    said, _ = third.communicate(timeout=200)
    assert third.returncode == 130, said
    assert "was stopped by SIGINT before its end" in said
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    assert rows(tmp_path) == [one, two]
