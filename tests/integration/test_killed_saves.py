"""Runs of two ranks that save after every step and are killed in the middle of it, again and again.

After every kill each folder named step_* is whole, and the resumed run repeats the losses of one that was never killed.
All ranks are forked by a process that has loaded torch already: loading it takes longer than a run.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2
# With CLIP's vocabulary 13 MB of a save: most of its time goes into copying and writing.
TOWER = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 32}
Losses = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Kill:
    """When and whom a job loses.

    Attributes:
        ranks: that get SIGKILL. The others must end by themselves.
        seconds: after the first save of the job began.
        operation: instead of a time: the rank kills itself before this operation on a file of its checkpoints, counted
            from its second save on.
    """

    ranks: tuple[int, ...]
    seconds: float = 0.0
    operation: int | None = None


# ---------------------------------------------------------------------------- in the process that forks, and the ranks


def die_at(operation: int, folder: Path) -> None:
    """Kill this process before that one of its operations: opening for writing, making, renaming, removing a file."""
    saves: set[str] = set()
    operations = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        path = str(arguments[0])
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        # What rmtree removes it names relative to an open folder.
        if path.startswith(str(folder)) or (event in ("os.remove", "os.rmdir") and not os.path.isabs(path)):
            saves.update(re.findall(r"\.writing_step_\d+", path))
            operations += len(saves) > 1
            if operations > operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def fork_rank(rank: int, port_pipe: int, recipe: Path, output: Path, kill: Kill | None) -> int:
    """The process id of a rank of a job that trains until it ends or is killed."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(int(os.read(port_pipe, 5))), TORCHELASTIC_USE_AGENT_STORE="True",
        )  # fmt: skip
        from megaeva.errors import explain_end
        from megaeva.train import train

        run_dir = recipe.parent / "run"
        if kill is not None and kill.operation is not None and rank in kill.ranks:
            die_at(kill.operation, run_dir / "checkpoints")
        status = explain_end(lambda: train(str(recipe), [], resume=run_dir.exists()))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_job(recipe: Path, kill: Kill | None, output: Path) -> dict[int, int]:
    """Exit codes of the ranks of one job, negative for a signal; called in a process of its own."""
    import torch.distributed as dist

    checkpoints = recipe.parent / "run" / "checkpoints"
    before = set(os.listdir(checkpoints)) if checkpoints.exists() else set()
    reading, writing = os.pipe()
    ranks = {fork_rank(rank, reading, recipe, output, kill): rank for rank in range(NUM_RANKS)}
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writing, f"{store.port:05}".encode() * NUM_RANKS)
    status: dict[int, int] = {}
    kill_at = None
    deadline = time.monotonic() + 60
    while ranks and time.monotonic() < deadline:
        pid, ended = os.waitpid(-1, os.WNOHANG)
        if pid:
            status[ranks.pop(pid)] = os.waitstatus_to_exitcode(ended)
            continue
        if kill is not None and kill.operation is None:
            if kill_at is None and checkpoints.exists() and set(os.listdir(checkpoints)) - before:
                kill_at = time.monotonic() + kill.seconds
            if kill_at is not None and time.monotonic() >= kill_at:
                for pid, rank in ranks.items():
                    if rank in kill.ranks:
                        os.kill(pid, signal.SIGKILL)
                kill_at = float("inf")
        time.sleep(0.001)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    return status | dict.fromkeys(ranks.values(), 999)


def in_a_fork(function: Callable[[], Any]) -> Any:
    """What the function returns in a forked process: this one must get no threads, or its forks would hang."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def check_whole(recipe: Path) -> list[str]:
    """Names of the finished checkpoints, whose every byte was read and compared with its checksum."""
    from megaeva.checkpoint.layout import complete_checkpoints
    from megaeva.checkpoint.torch_dist import Reader

    found = complete_checkpoints(recipe.parent / "run" / "checkpoints")
    for folder in found:
        reader = Reader(folder)
        reader.verify()
        reader.close()
    return [folder.name for folder in found]


def read_losses(recipe: Path) -> Losses:
    from megaeva.observability.metrics import read_metrics

    return {str(int(line["step"])): (line["loss"], line["grad_norm"]) for line in read_metrics(recipe.parent / "run")}


def nursery(folder: Path, kills: list[Kill]) -> None:
    """Trains in `folder`/whole, and in `folder`/killed with these kills and then to the end; writes report.json."""
    import torch
    import torch.utils.tensorboard

    import megaeva.trainer  # noqa: F401  loaded once, before the forks
    from megaeva.parallel import platform, watch

    torch.set_num_threads(1)
    platform.apply_cpu_shim()
    watch._GRACE_SECONDS = watch._PRECEDENCE_SECONDS = 0.5  # enough between two forks on one machine
    jobs = []
    for name, kill in [("whole", None), *(("killed", kill) for kill in kills), ("killed", None)]:
        recipe, output = folder / name / "recipe.yaml", folder / f"job_{len(jobs)}.txt"
        status = in_a_fork(partial(run_job, recipe, kill, output))
        checkpoints = in_a_fork(partial(check_whole, recipe))
        jobs.append({"status": status, "checkpoints": checkpoints, "output": output.read_text()})
    losses = {name: in_a_fork(partial(read_losses, folder / name / "recipe.yaml")) for name in ("whole", "killed")}
    (folder / "report.json").write_text(json.dumps({"jobs": jobs, "losses": losses}))


# ------------------------------------------------------------------------------------------------ what is asked of it


def write_recipe(folder: Path, shards: str, num_steps: int) -> None:
    vision = TOWER | {"image_size": 16, "patch_size": 8, "activation": "gelu", "qkv_bias": "qkv"}
    content = {
        "task": "contrastive",
        "run_dir": str(folder / "run"),
        "platform": "cpu",
        "model": {"embed_dim": 8, "vision": vision, "text": TOWER | {"context_length": 12}},
        "data": {"train": [shards], "shuffle_buffer": 8},
        "optim": {"vision": {"lr": 1e-3}},
        "train": {
            "total_samples": 8 * num_steps, "global_batch_size": 8, "precision": "fp32", "log_every_steps": 1,
            "timeout_minutes": 0.5,
        },
        "save": {"every_steps": 1, "keep": 2},
    }  # fmt: skip
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))


def run_kills(folder: Path, kills: list[Kill], num_steps: int) -> list[dict[str, Any]]:
    """What became of each job with a kill, after checking that the run got over all of them.

    Each job is {"status": {rank: exit code}, "checkpoints": names of the whole ones after it, "output": text}.
    """
    from megaeva.data.synthetic import make_shards  # here: the ranks do without

    make_shards(folder / "shards", num_shards=2, samples_per_shard=16, image_size=32, seed=0)
    for name in ("whole", "killed"):
        write_recipe(folder / name, f"{folder}/shards/*.tar", num_steps)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    plan = json.dumps([vars(kill) for kill in kills])
    subprocess.run([sys.executable, __file__, str(folder), plan], env=environment, check=True, timeout=1800)
    report = json.loads((folder / "report.json").read_text())
    whole, *killed, last = report["jobs"]
    everything = [f"step_{step:08d}" for step in (num_steps - 1, num_steps)]
    for job in (whole, last):
        assert job["status"] == {"0": 0, "1": 0}, job
        assert job["checkpoints"] == everything, job
    assert len(report["losses"]["whole"]) == num_steps
    assert report["losses"]["killed"] == report["losses"]["whole"]
    assert sorted(os.listdir(folder / "killed" / "run" / "checkpoints")) == everything, "nothing is left of the dead"
    for kill, job in zip(kills, killed, strict=True):
        assert "Traceback" not in job["output"], job["output"]
        assert "damaged" not in job["output"], job["output"]
        if kill.operation is None:
            assert job["status"] == {str(rank): -9 if rank in kill.ranks else 3 for rank in range(NUM_RANKS)}, job
    return killed


def random_kills(seed: int, number: int) -> list[Kill]:
    """Half of them of both ranks, within what some saves take."""
    moments = random.Random(seed)
    ranks = [((0, 1), (0,), (0, 1), (1,))[i % 4] for i in range(number)]
    return [Kill(who, moments.uniform(0.0, 0.4)) for who in ranks]


def test_killed_at_random_moments_and_between_two_operations(tmp_path: Path) -> None:
    # Rank 0: before a checkpoint gets its name, and while an old one is removed; rank 1: before its file is made.
    operations = [Kill((0,), operation=7), Kill((0,), operation=10), Kill((1,), operation=0)]
    jobs = run_kills(tmp_path, [*random_kills(0, 4), *operations], num_steps=24)
    assert any(job["checkpoints"] for job in jobs), "jobs that die before their first save say nothing"


@pytest.mark.exhaustive
def test_killed_at_many_moments(tmp_path: Path) -> None:
    run_kills(tmp_path, random_kills(1, 60), num_steps=400)


@pytest.mark.exhaustive
def test_killed_before_every_operation(tmp_path: Path) -> None:
    """Of two saves in a row: the folder, the files, their names, the removal of the oldest."""
    kills = [Kill((rank,), operation=number) for rank, count in ((0, 36), (1, 2)) for number in range(count)]
    run_kills(tmp_path, kills, num_steps=100)


if __name__ == "__main__":
    nursery(Path(sys.argv[1]), [Kill(**fields) for fields in json.loads(sys.argv[2])])
