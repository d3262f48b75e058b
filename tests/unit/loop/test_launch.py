"""A job's output is relayed, and its end is told with the rank, the cause and the message."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megaeva.config.schema import LaunchSection
from megaeva.errors import LOST_PEER
from megaeva.loop.agent import _suspicion
from megaeva.loop.launch import (
    StageFailedError,
    StageInterruptedError,
    build_command,
    build_environment,
    describe_exit,
    last_error,
    run_module,
)

ONE, TWO = LaunchSection(), LaunchSection(num_processes=2)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module named `job` that the started processes can import."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path.cwd()}")
    return lambda source: (tmp_path / "job.py").write_text(textwrap.dedent(source))


def test_output_goes_to_terminal_and_log(job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job("import sys; print('hello', sys.argv[1:]); print('warned', file=sys.stderr)")
    log = tmp_path / "logs" / "a.log"
    run_module("job", ["x=1"], ONE, log, stage="a")
    for text in (capsys.readouterr().out, log.read_text()):
        assert "hello ['x=1']" in text
        assert "warned" in text


def test_error_of_a_single_process_is_quoted(job, tmp_path: Path) -> None:
    job("raise ValueError('the shard is empty')")
    with pytest.raises(StageFailedError) as caught:
        run_module("job", [], ONE, tmp_path / "a.log", stage="round1/distil")
    text = str(caught.value)
    assert not caught.value.is_told
    for part in ("round1/distil", "rank 0", "code 1", "ValueError: the shard is empty", "a.log"):
        assert part in text


def test_user_error_is_quoted_whole(job, tmp_path: Path) -> None:
    job("import sys; print('error: tp=3 is wrong.\\nUse 2.', file=sys.stderr); sys.exit(2)")
    with pytest.raises(StageFailedError) as caught:
        run_module("job", [], ONE, tmp_path / "a.log", stage="a")
    assert (caught.value.exit_code, caught.value.status, caught.value.is_told) == (2, 2, True)
    assert caught.value.reason == "error: tp=3 is wrong.\nUse 2."


def test_rank_that_is_killed_is_named_and_others_stop(job, tmp_path: Path) -> None:
    job(
        """
        import os, signal, time
        print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"])
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)
        """
    )
    started_at = time.monotonic()
    with pytest.raises(StageFailedError) as caught:
        run_module("job", [], TWO, tmp_path / "a.log", stage="a")
    assert (caught.value.rank, caught.value.exit_code) == (1, -signal.SIGKILL)
    assert "rank 1 was killed by SIGKILL" in str(caught.value)
    assert time.monotonic() - started_at < 60


def test_message_of_the_rank_that_failed_first_is_found(job, tmp_path: Path) -> None:
    job(
        """
        import os, time
        from torch.distributed.elastic.multiprocessing.errors import record
        @record
        def main():
            if os.environ["RANK"] == "1":
                raise ValueError("bad sample 000123")
            time.sleep(120)
        main()
        """
    )
    with pytest.raises(StageFailedError) as caught:
        run_module("job", [], TWO, tmp_path / "a.log", stage="a")
    assert (caught.value.rank, caught.value.exit_code) == (1, 1)
    assert "bad sample 000123" in caught.value.reason


LOST = (
    "lost contact: rank 1 (host n2, pid 71, vision pp rank 1 of 2): {}; last seen in step 17, pass (i) (9 s ago). Mend."
)


@pytest.mark.parametrize("culprit_dies", [True, False])
def test_what_the_ranks_say_of_a_lost_one_is_told_once(
    job, tmp_path: Path, capsys: pytest.CaptureFixture[str], culprit_dies: bool
) -> None:
    told = LOST.format("its process is gone" if culprit_dies else "no answer for 10 min")
    job(
        f"""
        import os, pathlib, signal, sys, time
        listens = pathlib.Path({str(tmp_path / "listens")!r})
        if os.environ["RANK"] == "1":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            while not listens.exists():
                time.sleep(0.02)
            {"os.kill(os.getpid(), signal.SIGKILL)" if culprit_dies else "time.sleep(60)"}
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        listens.touch()
        time.sleep(2)
        print({"error: " + told!r}, file=sys.stderr)
        sys.exit(3)
        """
    )
    log = tmp_path / "a.log"
    with pytest.raises(StageFailedError) as caught:
        run_module("job", [], TWO, log, stage="a")
    assert (caught.value.rank, caught.value.reason) == (1, told)
    assert caught.value.exit_code == (-signal.SIGKILL if culprit_dies else LOST_PEER)
    assert f"error: {told}" in log.read_text()
    assert told not in capsys.readouterr().out, "the error that follows quotes it"
    first_line = str(caught.value).splitlines()[0]
    assert first_line.endswith(told)
    assert ("rank 1 was killed by SIGKILL" in first_line) == culprit_dies


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_the_job_which_may_save(job, tmp_path: Path, signum: signal.Signals) -> None:
    job(
        f"""
        import pathlib, signal, sys, time
        def save(*_):
            pathlib.Path({str(tmp_path / "saved")!r}).write_text("yes")
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        print("ready")
        time.sleep(60)
        """
    )
    code = (
        "from pathlib import Path; from megaeva.config.schema import LaunchSection;"
        "from megaeva.loop.launch import run_module;"
        f"run_module('job', [], LaunchSection(), Path({str(tmp_path / 'a.log')!r}), stage='a')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signum)
    _, errors = parent.communicate(timeout=30)
    assert (tmp_path / "saved").read_text() == "yes"
    assert StageInterruptedError.__name__ in errors
    assert signum.name in errors


def test_command_forms(tmp_path: Path) -> None:
    assert build_command("m", ["a"], ONE, tmp_path)[1:] == ["-m", "m", "a"]
    assert "--standalone" in build_command("m", ["a"], TWO, tmp_path)
    cluster = LaunchSection(num_processes=8, extra_torchrun_args=("--nnodes=45", "--rdzv-endpoint=head:29500"))
    command = build_command("m", ["a"], cluster, tmp_path)
    assert "--standalone" not in command
    assert command[-3:] == ["-m", "m", "a"]
    assert command.index("--nnodes=45") < command.index("m")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert build_environment(TWO)["OMP_NUM_THREADS"] == "5"
    assert build_environment(LaunchSection(threads_per_process=3))["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "OMP_NUM_THREADS" not in build_environment(ONE)
    assert int(build_environment(TWO)["OMP_NUM_THREADS"]) >= 1


def test_exit_descriptions() -> None:
    assert "SIGKILL" in describe_exit(-9)
    assert "memory" in describe_exit(-9)
    assert describe_exit(3) == "exited with code 3"


def test_last_error_skips_noise() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in <module>',
        "torch.OutOfMemoryError: 12 GiB wanted",
        "mim · step 10/20 (50 %) · loss 0.1",
        "W1123 10:00:00 torch/distributed/elastic: Sending process 12 closing signal SIGTERM",
    ]
    assert last_error(lines) == "torch.OutOfMemoryError: 12 GiB wanted"


def test_cause_comes_before_consequences() -> None:
    class Failure:
        def __init__(self, exitcode: int, message: object, timestamp: int) -> None:
            self.exitcode, self.message, self.timestamp = exitcode, message, timestamp

    stopped = Failure(-signal.SIGTERM, "", 1)
    lost = Failure(1, {"message": "RuntimeError: Connection reset by peer"}, 2)
    killed = Failure(-signal.SIGKILL, "Signal 9", 3)
    raised = Failure(2, {"message": "DataError: no captions"}, 3)
    assert min([lost, stopped, killed], key=_suspicion) is killed
    assert min([stopped, lost, raised], key=_suspicion) is raised
    assert min([stopped, lost], key=_suspicion) is stopped
