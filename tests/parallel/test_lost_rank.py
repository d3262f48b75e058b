"""Ranks that really hang, stop, die or fail: the others end within the timeout and name the right one.

All jobs of the first half run at once, forked by one process that has loaded torch already: they mostly wait, and
loading torch would take longer than they do. The second half trains under torchrun. Timeouts leave room for a busy
machine.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
RANKS = 3
TIMEOUT_SECONDS = 6.0


@dataclass
class Job:
    """What became of its ranks.

    Attributes:
        status: exit codes, negative for a signal.
        seconds: from the point where it went wrong until each rank ended.
        output: what each printed.
    """

    status: dict[int, int]
    seconds: dict[int, float]
    output: dict[int, str]


# ------------------------------------------------------------------------------- in the process that forks the ranks


def hang() -> None:
    while True:
        time.sleep(1)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("no such sample\nin this shard")


def refuse() -> None:
    from megaeva.errors import DataError

    raise DataError("no shards; there must be some; write them")


ENDS: dict[str, Callable[[], None]] = {f.__name__: f for f in (hang, stop, die, fail)}
# (how the culprit ends, what the others wait in, the culprit)
CASES = [
    *((end, how, 1) for end in ENDS for how in ("all_reduce", "p2p")),
    ("stop", "all_reduce", 0),
    ("die", "all_reduce", 0),
    ("none", "mismatch", -1),
    ("refuse", "all_reduce", 0),
]


def wait_for_culprit(end: str, how: str, culprit: int, went_wrong: Path) -> int:
    """One rank: it takes part until the culprit ends in one of the ways above, where the others need it."""
    import torch
    import torch.distributed as dist

    from megaeva.parallel import runtime, watch

    this = replace(runtime.start("cpu", timeout_minutes=1), timeout=timedelta(seconds=TIMEOUT_SECONDS))
    dist.barrier()  # all ranks have started
    group = dist.new_group(timeout=this.timeout)
    with watch.explaining(this):
        watch.place(f"vision pp rank {this.rank} of 3")
        watch.at("reading data", step=17)
        dist.barrier()
        watch.at("pass (iii), vision, microbatch 2 of 4")
        time.sleep(2)  # notes are published twice a second
        if this.rank in (culprit, culprit + 1):
            went_wrong.touch()
        if this.rank == culprit:
            (ENDS | {"refuse": refuse})[end]()
        if how == "all_reduce":
            dist.all_reduce(torch.ones(4), group=group)
        elif how == "mismatch":
            watch.at(f"the place of rank {this.rank}")
            dist.barrier(group=group if this.rank == 0 else None)
        else:
            # As mcore's pipeline does it: rank 0 waits for something of rank 1's, and rank 2 for rank 1 to take
            # something that the sockets cannot hold.
            op, size = (dist.irecv, 4) if this.rank == 0 else (dist.isend, 4_000_000)
            for request in dist.batch_isend_irecv([dist.P2POp(op, torch.ones(size), culprit, group)]):
                request.wait()
    return 0


def fork_rank(rank: int, port_pipe: int, folder: Path, case: tuple[str, str, int]) -> int:
    """The process id of a rank that reads its store's port from a pipe and writes its output to `folder`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        sink = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(int(os.read(port_pipe, 5))), TORCHELASTIC_USE_AGENT_STORE="True",
        )  # fmt: skip
        from megaeva.errors import explain_end

        status = explain_end(lambda: wait_for_culprit(*case, folder / "went_wrong"))
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(status)


def said(file: Path) -> str:
    """What a rank printed, without c10d's warnings (a host name that a busy resolver did not find)."""
    lines = file.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"(\[rank\d\]:)?\[W\d+ .*\[c10d\]", line))


def run_jobs(folder: Path) -> None:
    """Runs every case and writes what happened to `folder`/jobs.json."""
    import torch
    import torch.distributed as dist

    from megaeva.parallel import platform, watch  # noqa: F401  loaded once, before the forks

    torch.set_num_threads(1)
    platform.apply_cpu_shim()
    left = {}
    pipes = [os.pipe() for _ in CASES]
    for number, case in enumerate(CASES):
        (folder / str(number)).mkdir()
        for rank in range(RANKS):
            left[fork_rank(rank, pipes[number][0], folder / str(number), case)] = (number, rank)
    # After all forks: a store has threads, and a fork beside threads may inherit a lock that nobody opens.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in CASES]
    for (_, pipe), store in zip(pipes, stores, strict=True):
        os.write(pipe, f"{store.port:05}".encode() * RANKS)
    jobs = [Job({}, {}, {}) for _ in CASES]
    deadline = time.monotonic() + 60
    while left and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.05)
            continue
        number, rank = left.pop(pid)
        jobs[number].status[rank] = os.waitstatus_to_exitcode(status)
        went_wrong = folder / str(number) / "went_wrong"
        jobs[number].seconds[rank] = time.time() - (went_wrong.stat().st_mtime if went_wrong.exists() else 0)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for number, job in enumerate(jobs):
        job.output = {rank: said(folder / str(number) / f"{rank}.txt") for rank in range(RANKS)}
    (folder / "jobs.json").write_text(json.dumps([vars(job) for job in jobs]))


# ------------------------------------------------------------------------------------------------ what is asked of it


Jobs = dict[tuple[str, str, int], Job]
SLACK_SECONDS = 10  # a busy machine


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    folder = tmp_path_factory.mktemp("jobs")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=True, timeout=120)
    read = json.loads((folder / "jobs.json").read_text())
    fields = ("status", "seconds", "output")
    return {
        case: Job(*({int(rank): value for rank, value in job[field].items()} for field in fields))
        for case, job in zip(CASES, read, strict=True)
    }


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ENDS], ids=lambda case: "-".join(map(str, case)))
def test_the_right_rank_is_named_once(jobs: Jobs, case: tuple[str, str, int]) -> None:
    (end, _, culprit), job = case, jobs[case]
    others = [rank for rank in range(RANKS) if rank != culprit]
    lines = [line for rank in others for line in job.output[rank].splitlines()]
    assert len(lines) == 1, job.output
    if culprit:
        assert job.output[0], "rank 0 speaks"
    reason = {
        "hang": "no answer for 0.1 min, it stands in hang (",
        "stop": "no answer for 0.1 min; ",
        "die": "its process is gone; ",
        "fail": "left the job: ValueError: no such sample in this shard; ",
    }[end]
    assert lines[0].startswith(f"error: lost contact: rank {culprit} (host {socket.gethostname()}, pid ")
    assert f", vision pp rank {culprit} of 3): {reason}" in lines[0]
    assert "last seen in step 17, pass (iii), vision, microbatch 2 of 4 (" in lines[0]
    assert lines[0].endswith("continue with --resume.")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_process_ends(jobs: Jobs, case: tuple[str, str, int]) -> None:
    (end, _, culprit), job = case, jobs[case]
    own = {"hang": 3, "stop": 3, "die": -signal.SIGKILL, "fail": 1, "none": 3, "refuse": 2}[end]
    assert job.status == {rank: own if rank == culprit else 3 for rank in range(RANKS)}
    waited = TIMEOUT_SECONDS if end in ("hang", "stop", "none") else 0
    asked = 5 if end in ("stop", "die") else 1  # where a rank is silent, the others wait for its answer
    assert max(job.seconds.values()) < waited + asked + 1 + SLACK_SECONDS


def test_ranks_that_wait_for_each_other_are_not_blamed(jobs: Jobs) -> None:
    job = jobs["none", "mismatch", -1]
    lines = [line for output in job.output.values() for line in output.splitlines()]
    assert len(lines) == 1, job.output
    assert (
        "every rank answers: " + "; ".join(f"rank {r} in step 17, the place of rank {r}" for r in (0, 1, 2)) in lines[0]
    )


def test_a_mistake_that_rank_0_explains_is_not_told_again(jobs: Jobs) -> None:
    job = jobs["refuse", "all_reduce", 0]
    assert job.output == {0: "error: no shards; there must be some; write them\n", 1: "", 2: ""}


# ------------------------------------------------------------------------------------------ training under torchrun

TOWER = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 32}
MEGAEVA_TRAIN = ["-c", "from megaeva.cli import main; main()", "train"]
# The timeout, the others' search, and what torchrun gives a process to end; some 17 s where the machine is not busy.
LONGEST_SECONDS = 9 + 5 + 30
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megaeva.train"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """An endless contrastive run whose vision tower is a pipeline of two ranks."""
    from megaeva.data.synthetic import make_shards  # here: the ranks of the first half do without

    make_shards(tmp_path / "data", num_shards=2, samples_per_shard=16, image_size=32, seed=0)
    vision = TOWER | {"image_size": 16, "patch_size": 8, "activation": "gelu", "qkv_bias": "qkv"}
    train = {"total_samples": 16_000_000, "global_batch_size": 16, "micro_batch_size": 4, "log_every_steps": 1}
    content = {
        "task": "contrastive",
        "run_dir": str(tmp_path / "run"),
        "platform": "cpu",
        "model": {"embed_dim": 8, "vision": vision, "text": TOWER | {"context_length": 12}},
        "data": {"train": [f"{tmp_path}/data/*.tar"], "shuffle_buffer": 16},
        "parallel": {"vision": {"pp": 2}},
        "optim": {"vision": {"lr": 1e-3}},
        "train": train | {"precision": "fp32", "timeout_minutes": 0.15},
        "save": {"every_steps": None, "every_minutes": None},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train_until(signum: signal.Signals, command: list[str], recipe: Path) -> tuple[int, str, float]:
    """Sends the signal to rank 1 after some steps; the launcher's exit code, what it printed, and how long it took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *command, str(recipe), *(["--processes", "2"] if command is MEGAEVA_TRAIN else [])],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    launcher = psutil.Process(process.pid)
    family: list[psutil.Process] = []
    try:
        metrics = recipe.parent / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < deadline, "it does not train"
            time.sleep(0.1)
        family = launcher.children(recursive=True)
        next(p for p in family if p.environ().get("RANK") == "1").send_signal(signum)
        sent_at = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "a process is left"
        return process.returncode, output, time.monotonic() - sent_at
    finally:
        with suppress(psutil.NoSuchProcess):
            family = family or launcher.children(recursive=True)
        for left in [launcher, *family]:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


@pytest.mark.parametrize("signum", [signal.SIGSTOP, signal.SIGKILL], ids=lambda signum: signum.name)
def test_training(recipe: Path, signum: signal.Signals) -> None:
    status, output, seconds = train_until(signum, MEGAEVA_TRAIN, recipe)
    assert status == 1, output
    assert seconds < LONGEST_SECONDS
    assert "Traceback" not in output
    assert "Error" not in output
    assert output.count("lost contact") == 1, output
    failed, remedy = output.splitlines()[-2:]
    how = "rank 1 was killed by SIGKILL" if signum == signal.SIGKILL else "lost contact: rank 1 (host "
    assert f"failed: {how}" in failed
    assert re.search(r"rank 1 \(host .*, pid \d+, vision pp rank 1 of 2 \(layers 1-1\)\): ", failed)
    assert re.search(r"last seen in step \d+, .* \(\d+ s ago\)", failed)
    assert "--resume" in remedy


# Our launcher is torchrun's agent too, and both signals are sent under it above; here one of them, the other beside.
@pytest.mark.parametrize(
    "signum",
    [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.exhaustive)],
    ids=lambda signum: signum.name,
)
def test_training_under_torchrun_itself(recipe: Path, signum: signal.Signals) -> None:
    status, output, seconds = train_until(signum, TORCHRUN, recipe)
    assert status == 1, output
    assert seconds < LONGEST_SECONDS
    assert output.count("lost contact") == 1, output
    (told,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert re.match(r"error: lost contact: rank 1 \(host .*, vision pp rank 1 of 2 \(layers 1-1\)\): ", told)
    # torchrun ends with a traceback of its own; the ranks do not.
    assert output.index("lost contact") < output.find("Traceback")
    assert output.count("Traceback") == 1


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]))
