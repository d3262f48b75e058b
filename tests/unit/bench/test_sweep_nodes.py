"""Which nodes a sweep's runs are started on, and what is refused. srun and scontrol here are shell scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaeva.bench.sweep_nodes import Machines, find_machines
from megaeva.config import load
from megaeva.config.schema import Config
from megaeva.errors import ConfigError, UserError
from megaeva.loop.launch import StageFailedError
from tests.helpers.slurm import write_commands
from tests.integration.test_training import write_recipe

SLURM = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "gpu[1-4]"}
FOUR = Machines(8, ("gpu1", "gpu2", "gpu3", "gpu4"), 77, has_gpus=True)
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames gpu[1-4]" ]] && printf 'gpu1\\ngpu2\\ngpu3\\ngpu4\\n' || exit 1
"""
SRUN = """#!/bin/bash
python=${SHOW_WITH}
"$python" -c 'import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open(os.environ["SHOWN"], "w"))' "$@"
echo "[3]: error: CUDA out of memory"
exit 1
"""


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return load(write_recipe(tmp_path, "*.tar", platform="auto"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_commands(tmp_path, scontrol=SCONTROL, srun=SRUN)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SHOWN", str(tmp_path / "shown.json"))
    monkeypatch.setenv("SHOW_WITH", sys.executable)


def test_without_slurm_it_is_this_machine(cfg: Config) -> None:
    assert find_machines(cfg, {}, 0) == Machines(None)
    assert find_machines(cfg, {}, 8) == Machines(8, has_gpus=True)
    assert find_machines(cfg.model_copy(update={"platform": "cpu"}), {}, 8) == Machines(None)
    assert find_machines(cfg, SLURM | {"SLURM_NNODES": "1"}, 8) == Machines(8, has_gpus=True)
    assert [Machines(None).num_nodes(ranks) for ranks in (1, 64)] == [1, 1]
    assert Machines(8, has_gpus=True).num_nodes(8) == 1
    with pytest.raises(ConfigError, match=r"--ranks 16, but this machine has 8 GPUs.*use 8 or less, or.*--nodes=2"):
        Machines(8, has_gpus=True).num_nodes(16)


def test_an_allocation_is_read(slurm: None, cfg: Config) -> None:
    assert find_machines(cfg, SLURM, 8) == FOUR
    assert find_machines(cfg, SLURM | {"PROCESSES": "4"}, 0) == Machines(4, FOUR.hosts, 77)
    for environ in (SLURM, SLURM | {"PROCESSES": "eight"}):
        with pytest.raises(ConfigError, match=r"^PROCESSES=.* in an allocation of 4 nodes, and no GPU"):
            find_machines(cfg, environ, 0)
    with pytest.raises(UserError, match=r"scontrol names no host of SLURM_JOB_NODELIST=other"):
        find_machines(cfg, SLURM | {"SLURM_JOB_NODELIST": "other"}, 8)


def test_runs_take_whole_nodes_or_fit_on_one() -> None:
    assert [FOUR.num_nodes(ranks) for ranks in (1, 4, 8, 16, 32)] == [1, 1, 1, 2, 4]
    with pytest.raises(ConfigError, match=r"--ranks 12 must fill nodes of 8 GPUs each.*use 8 or 16"):
        FOUR.num_nodes(12)
    with pytest.raises(ConfigError, match=r"--ranks 64 takes 8 nodes of 8 GPUs, and the allocation has 4.*at most 32"):
        FOUR.num_nodes(64)


@pytest.mark.parametrize(("ranks", "nodes", "each"), [(16, 2, "8"), (2, 1, "2")])
def test_srun_gets_the_nodes_and_the_ranks_of_each(
    slurm: None, ranks: int, nodes: int, each: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NODE_RANK": "3", "SLURM_CPUS_PER_TASK": "96", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_PORT", "CUDA_VISIBLE_DEVICES", "SRUN_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    recipe = tmp_path / "recipe.yaml"
    with pytest.raises(StageFailedError, match="CUDA out of memory") as caught:
        FOUR.start(recipe, ranks, 5, stage="one", again="again.", patience_seconds=60)
    assert str(tmp_path / "train.log") in str(caught.value)
    arguments, environment = json.loads((tmp_path / "shown.json").read_text())
    hosts = ",".join(FOUR.hosts[:nodes])
    assert arguments == [
        "--overlap", f"--nodes={nodes}", f"--nodelist={hosts}", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
        sys.executable, "-m", "megaeva.loop.node", str(recipe),
    ]  # fmt: skip
    wanted = {
        "NNODES": str(nodes), "PROCESSES": each, "MASTER_ADDR": "gpu1", "MASTER_PORT": "20087", "JOB_ID": "77_5",
        "MAX_RESTARTS": "0", "SRUN_CPUS_PER_TASK": "96",
    }  # fmt: skip
    assert environment.items() >= wanted.items()
    assert not {"NODE_RANK", "SLURM_RESTART_COUNT"} & environment.keys()
    assert environment.get("CUDA_VISIBLE_DEVICES") == (None if ranks == 16 else "0,1")


def test_a_silent_run_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_commands(tmp_path, srun="#!/bin/bash\necho started; trap '' TERM; sleep 50\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(StageFailedError, match="one failed: it printed nothing for 1 s, so it was ended"):
        FOUR.start(tmp_path / "recipe.yaml", 8, 0, stage="one", again="again.", patience_seconds=1)
    assert subprocess.run(["pgrep", "-f", str(tmp_path / "srun")]).returncode == 1
