"""recipes/train.sh and train_slurm.sh on one node: what they would run, and what they refuse before torch is loaded."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError

from megaeva.config.schema import Config
from megaeva.config.world import check_world_size
from megaeva.errors import ConfigError, UserError
from megaeva.loop import agent
from megaeva.loop.node import machine_faults, main, read_node, run

ROOT = Path(__file__).parents[3]
VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 64,
    "activation": "gelu", "qkv_bias": "qkv",
}  # fmt: skip
TEXT = {"context_length": 16, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 64}
TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "PROCESSES": "1"}
JOB_VARIABLES = (
    *TWO, "MASTER_PORT", "MAX_RESTARTS", "JOIN_SECONDS", "LOG_DIR", "JOB_ID", "LOCAL_ADDR", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*JOB_VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "task": "contrastive",
                "run_dir": str(tmp_path / "run"),
                "platform": "cpu",
                "model": {"embed_dim": 16, "vision": VISION, "text": TEXT},
                "data": {"train": [str(tmp_path / "*.tar")]},
                "optim": {"vision": {"lr": 1e-3}},
                "train": {"total_samples": 64, "global_batch_size": 8},
            }
        )
    )
    return path


@pytest.fixture
def cfg(recipe: Path) -> Config:
    return Config.model_validate(yaml.safe_load(recipe.read_text()))


def run_script(name: str, *arguments: object, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / name), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    return done.returncode, done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------- the scripts


def test_a_dry_run_prints_the_job_and_starts_nothing(recipe: Path) -> None:
    code, out, err = run_script("train.sh", "--dry-run", recipe, "--resume", "seed=3", **TWO)
    assert code == 0, err
    for part in (
        "node 1 of 2", "1 of 2 ranks", "MEGAEVA_WORLD_SIZE=2", "--nnodes=2", "--rdzv-endpoint=127.0.0.1:29500",
        "is_host=0", "--max-restarts=3", "--nproc-per-node=1", f"megaeva.train {recipe} --resume seed=3",
    ):  # fmt: skip
        assert part in out
    assert not (recipe.parent / "run").exists()


def test_slurm_dry_run_outside_of_slurm(recipe: Path) -> None:
    code, out, err = run_script(
        "train_slurm.sh", "--dry-run", recipe, "seed=3", NNODES="2", PROCESSES="4", MASTER_PORT="31000"
    )
    assert code == 0, err
    assert "srun --nodes=2 --ntasks-per-node=1" in out
    assert "4 of 8 ranks, node 0 at FIRST_NODE:31000" in out
    assert "warning" not in out


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "parts"),
    [
        ("train.sh", [], {}, ("no RECIPE", "usage:")),
        ("train.sh", ["absent.yaml"], {}, ("RECIPE=absent.yaml cannot be read", "on every node")),
        ("train.sh", ["README.md", "--fast"], {}, ("--fast is no option", "--dry-run and --resume")),
        ("train.sh", ["README.md"], {"PYTHON": "/absent"}, ("PYTHON=/absent is no command", "set PYTHON=")),
        ("train.sh", ["README.md"], {"PYTHON": "false"}, ("PYTHON=false does not run on", "set PYTHON=")),
        ("train_slurm.sh", ["README.md"], {}, ("SLURM_JOB_ID is not set", "use sbatch")),
        ("train_slurm.sh", ["README.md"], {"SLURM_JOB_ID": "7"}, ("SLURM_JOB_NODELIST", "is not set")),
        ("train_slurm.sh", ["README.md"], {"SLURM_SUBMIT_DIR": "/tmp"}, ("/tmp/recipes/train.sh is not there",)),
    ],
)
def test_scripts_refuse(script: str, arguments: list[str], environment: dict[str, str], parts: tuple[str, ...]) -> None:
    code, _, err = run_script(script, *arguments, **environment)
    assert code != 0
    for part in parts:
        assert part in err


def test_an_interpreter_without_megaeva_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    code, _, err = run_script("train.sh", "README.md", PYTHON=str(bare))
    assert code == 2
    assert f"PYTHON={bare} lacks megaeva, torch, megatron on {socket.gethostname()}" in err


# ------------------------------------------------------------------------------------------------ the environment


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"NNODES": "two"}, "NNODES=two must be a whole number"),
        ({"PROCESSES": "²"}, "^PROCESSES=² must be a whole number of at least 1; set PROCESSES="),
        ({"PROCESSES": "9" * 5000}, "9 must be a whole number"),
        ({"NNODES": ""}, "^NNODES is empty and must be a whole number of at least 1"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": ""}, "^MASTER_ADDR is empty with NNODES=2"),
        ({"MASTER_PORT": "65535"}, "MASTER_PORT=65535 must be a whole number from 1 to 65534"),
        ({"NNODE": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, "NODE_RANK and MASTER_ADDR set, but not NNODES"),
        ({"NNODES": "2"}, "NODE_RANK is not set"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 must be 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set with NNODES=2"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, "PROCESSES is not set with NNODES=2"),
        ({"SLURM_STEP_NUM_NODES": "4"}, "NNODES=1, but Slurm started this on 4 nodes"),
    ],
)
def test_places_that_are_refused(cfg: Config, environment: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_node(cfg, environment, 0)


def test_slurm_numbers_the_nodes(cfg: Config) -> None:
    environment = {
        "NNODES": "2",
        "SLURM_NODEID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "PROCESSES": "8",
        "SLURM_STEP_NUM_NODES": "2",
    }
    node = read_node(cfg, environment, 8)
    assert (node.rank, node.processes, node.max_restarts) == (1, 8, 3)


@pytest.mark.parametrize(
    ("platform", "num_gpus", "environment", "text"),
    [
        ("auto", 7, TWO | {"SLURM_GPUS_ON_NODE": "8"}, "nvidia-smi sees 7 GPUs, Slurm gave 8"),
        ("auto", 7, TWO | {"PROCESSES": "8"}, "PROCESSES=8, but this node has 7 GPUs"),
        ("auto", 0, TWO, "nvidia-smi sees no GPU"),
        ("cuda", 0, {}, "nvidia-smi sees no GPU"),
        ("cpu", 0, TWO | {"GLOO_SOCKET_IFNAME": "absent0"}, "GLOO_SOCKET_IFNAME=absent0 names no interface"),
        ("cpu", 0, TWO | {"NCCL_SOCKET_IFNAME": "=l"}, "NCCL_SOCKET_IFNAME==l names no interface"),
    ],
)
def test_machines_that_are_refused(
    cfg: Config, platform: str, num_gpus: int, environment: dict[str, str], text: str
) -> None:
    cfg = cfg.model_copy(update={"platform": platform})
    (fault,) = machine_faults(read_node(cfg, environment, num_gpus), cfg, environment, num_gpus)
    assert text in fault


def test_a_name_that_means_localhost_is_refused_on_gloo(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    environment = TWO | {"MASTER_ADDR": "10.1.2.3", "LOCAL_ADDR": "10.1.2.4"}
    (fault,) = machine_faults(read_node(cfg, environment, 0), cfg, environment, 0)
    assert "means 127.0.1.1" in fault
    assert "interface of 10.1.2.4" in fault
    with_interface = environment | {"GLOO_SOCKET_IFNAME": "lo"}
    assert not machine_faults(read_node(cfg, with_interface, 0), cfg, with_interface, 0)


def test_good_machines_pass(cfg: Config) -> None:
    on_gpus = cfg.model_copy(update={"platform": "auto"})
    assert not machine_faults(read_node(on_gpus, {}, 8), on_gpus, {}, 8)
    assert not machine_faults(read_node(on_gpus, {}, 0), on_gpus, {}, 0)
    two = TWO | {"NCCL_SOCKET_IFNAME": "^docker,lo"}
    assert not machine_faults(read_node(cfg, two, 0), cfg, two, 0)


# ----------------------------------------------------------------------------------------------------- main


def test_an_old_run_is_refused_and_a_restart_resumes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = recipe.parent / "run" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "megaeva.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds step_00000004"):
        main(["--dry-run", str(recipe)])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(["--dry-run", str(recipe)]) == 0
    assert "--resume" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "x")
    with pytest.raises(ConfigError, match=r"^SLURM_RESTART_COUNT=x must be a whole number of at least 0; set "):
        main(["--dry-run", str(recipe)])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RendezvousConnectionError("store"), r"node 0 at 127.0.0.1:29500 is gone \(store\), seen from node 1 of 2"),
        (RendezvousTimeoutError("late"), r"node 1 of 2 does not find all others .* within JOIN_SECONDS=600"),
    ],
)
def test_a_job_that_lost_a_node_says_which(
    cfg: Config, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def lose(_: object) -> int:
        raise error

    monkeypatch.setattr(agent, "main", lose)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(UserError, match=text):
        run(read_node(cfg, TWO, 0), [])


def test_no_recipe_is_no_traceback() -> None:
    with pytest.raises(ConfigError, match="no RECIPE is given"):
        main(["--dry-run"])


def test_a_dry_run_says_what_the_machine_lacks(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", str(recipe), "platform=cuda"]) == 0
    assert "would be refused on this machine: platform=cuda" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="sees no GPU"):
        main([str(recipe), "platform=cuda"])


def test_a_dry_run_says_that_node_0_has_no_such_name(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (TWO | {"MASTER_ADDR": "nohost.invalid"}).items():
        monkeypatch.setenv(name, value)
    assert main(["--dry-run", str(recipe)]) == 0
    assert "\nwarning: MASTER_ADDR=nohost.invalid does not resolve on this machine (" in capsys.readouterr().out
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main(["--dry-run", str(recipe)]) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"WORLD_SIZE": "8", "MEGAEVA_WORLD_SIZE": "16"}, "WORLD_SIZE=8 on this rank, but .* with 16 ranks"),
        ({"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1", "SLURM_STEP_NUM_NODES": "4"}, "srun started this on .*=4 nodes"),
    ],
)
def test_a_rank_refuses_a_part_of_the_job(environment: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_world_size(environment)


def test_a_rank_takes_the_whole_job() -> None:
    check_world_size({})
    check_world_size({"WORLD_SIZE": "8", "MEGAEVA_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"})
    check_world_size({"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "4", "SLURM_STEP_NUM_NODES": "4"})
