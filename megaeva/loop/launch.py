"""Starts one torchrun job, relays what it prints, and says which rank died of what."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from types import FrameType
from typing import BinaryIO, TextIO

from megaeva.config.schema import LaunchSection
from megaeva.errors import EXPLAINED, LOST_CONTACT, LOST_PEER, UserError
from megaeva.observability.progress import is_status_line

_TAIL_LINES = 200
_END_SECONDS = 60.0  # between SIGTERM and SIGKILL for a job that hung: torchrun gives its ranks 30
_TORCH_LOG_LINE = re.compile(r"^[IWE]\d{4} ")
_TORCHRUN_LINE = re.compile(r"^[IWE]\d{4} .*torch/distributed/elastic/")  # its remarks on an end that we explain
_LOST_CONTACT_LINE = re.compile(rf"^error: ({re.escape(LOST_CONTACT)}.*)$")
_LOST_RANK = re.compile(rf"^{re.escape(LOST_CONTACT)}rank (\d+) \(")
_SILENT = "it printed nothing for "
CONTINUES = "run the same command again: it continues from the last checkpoint."
_EXCEPTION_LINE = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)\b.*")


class StageFailedError(UserError):
    """A job ended with an error.

    Attributes:
        stage: the job's name.
        rank: global rank that died first or that the others could not reach; None when the launcher itself failed, or
            when nobody is to blame.
        exit_code: of that rank, negative for a signal; LOST_PEER for one that hung.
        reason: its last error message, or what the others said of it: host, place in the towers, and last position.
    """

    def __init__(
        self, stage: str, rank: int | None, exit_code: int, reason: str, log_path: Path, again: str = CONTINUES
    ) -> None:
        self.stage, self.rank, self.exit_code, self.reason = stage, rank, exit_code, reason
        if exit_code == EXPLAINED:
            # The rank has told it on this terminal just now, with what to do.
            self.is_told = True
            super().__init__(f"stage {stage} stopped by the error above (log: {log_path})")
            return
        self.status = 1
        if reason.startswith((LOST_CONTACT, _SILENT)):
            # Who went and where it stood. How its process ended is news only where that was the cause.
            how = f"rank {rank} {describe_exit(exit_code)}: " if exit_code < 0 else ""
            failure = f"{how}{reason}"
        else:
            who = f"rank {rank}" if rank is not None else "the launcher"
            failure = f"{who} {describe_exit(exit_code)}{': ' + reason if reason else ''}"
        super().__init__(
            f"stage {stage} failed: {failure}\n"
            f"Every rank must end with exit code 0; the others were stopped. "
            f"Read {log_path}, mend the cause and {again}"
        )


class StageInterruptedError(UserError):
    """A job was stopped on request (Ctrl-C or SIGTERM)."""

    def __init__(self, stage: str, signum: int, again: str = CONTINUES) -> None:
        self.stage, self.signum, self.status = stage, signum, 128 + signum
        super().__init__(
            f"stage {stage} was stopped by {signal.Signals(signum).name} before its end; to go on, {again}"
        )


def launch(
    recipe_path: Path | str,
    overrides: Sequence[str],
    launch: LaunchSection,
    log_path: Path,
    resume: bool = False,
    *,
    stage: str = "train",
    again: str = CONTINUES,
    patience_seconds: float | None = None,
) -> None:
    """Returns when the job `python -m megaeva.train RECIPE [--resume] [key=value ...]` ended well on all ranks.

    Args:
        recipe_path: a recipe file.
        overrides: key=value settings on top of it.
        launch: number of processes, threads, further torchrun arguments.
        log_path: file that everything the job prints is appended to, beside the terminal.
        resume: continue from the newest checkpoint of the recipe's run folder.
        stage: the job's name in messages.
        again: how an error message tells its reader to go on.
        patience_seconds: a job that prints nothing for so long is ended; None: it may be silent for ever.

    Raises:
        StageFailedError: a rank died; names the first one, its exit code or signal, and its last error message. Or the
            job was silent for too long.
        StageInterruptedError: this process got SIGINT or SIGTERM, which it passes on as SIGTERM so that the job saves.
            A second signal kills the job.
    """
    arguments = [str(recipe_path), *(["--resume"] if resume else []), *overrides]
    run_module(
        "megaeva.train", arguments, launch, log_path, stage=stage, again=again, patience_seconds=patience_seconds
    )


def run_module(
    module: str,
    arguments: Sequence[str],
    launch: LaunchSection,
    log_path: Path,
    *,
    stage: str,
    again: str = CONTINUES,
    patience_seconds: float | None = None,
) -> None:
    """Returns when `python -m MODULE ARGUMENTS` ended well on all ranks; see `launch` for the rest."""
    with tempfile.TemporaryDirectory(prefix="megaeva-") as scratch:
        failure_file = Path(scratch) / "failure.json"
        command = build_command(module, arguments, launch, failure_file)
        environment = build_environment(launch) | {"TORCHELASTIC_ERROR_FILE": str(Path(scratch) / "error.json")}
        exit_code, tail = run_command(
            command, environment, log_path, stage=stage, again=again, patience_seconds=patience_seconds
        )
        if exit_code:
            rank, exit_code, reason = _verdict(exit_code, failure_file, tail, direct=_is_direct(launch))
            raise StageFailedError(stage, rank, exit_code, reason, log_path, again)


def run_command(
    command: Sequence[str],
    environment: Mapping[str, str],
    log_path: Path,
    *,
    stage: str,
    again: str,
    patience_seconds: float | None,
) -> tuple[int, Sequence[str]]:
    """Returns the exit code of a job's command and the last lines that it printed; see `launch` for the rest."""
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.open("ab").close()
    except OSError as error:
        raise UserError(
            f"{log_path} cannot be written ({error.strerror}); what the job prints must have a file there; "
            "choose another folder for the run"
        ) from None
    with log_path.open("ab", buffering=0) as log:
        with suppress(OSError):  # a full disk, which the job has to tell of
            log.write(f"$ {' '.join(command)}\n".encode())
        # A session of its own: Ctrl-C on the terminal reaches this process only, which passes it on once.
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        assert process.stdout is not None
        with _forwarded_signals(process) as received, _Patience(process, patience_seconds) as patience:
            tail = _relay(process.stdout, sys.stdout, log, patience.heard)  # type: ignore[arg-type]
            exit_code = process.wait()
    if received:
        raise StageInterruptedError(stage, received[0], again)
    if patience.is_over:
        reason = f"{_SILENT}{patience_seconds:.0f} s, so it was ended: it hung, or one step takes longer"
        raise StageFailedError(stage, None, LOST_PEER, reason, log_path, again)
    return exit_code, tail


class _Patience:
    """Ends a process that was not heard of for `seconds`: SIGTERM, then SIGKILL for it and all below it."""

    def __init__(self, process: "subprocess.Popen[bytes]", seconds: float | None) -> None:
        self.is_over = False
        self._process, self._seconds, self._since = process, seconds, time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def heard(self) -> None:
        self._since = time.monotonic()

    def __enter__(self) -> "_Patience":
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        assert self._seconds is not None
        while (left := self._since + self._seconds - time.monotonic()) > 0:
            if self._done.wait(left):
                return
        self.is_over = True
        self._process.terminate()
        if not self._done.wait(min(self._seconds, _END_SECONDS)):
            _kill_tree(self._process.pid)


def build_command(module: str, arguments: Sequence[str], launch: LaunchSection, failure_file: Path) -> list[str]:
    """The command line of a job: torchrun, or the module itself when there is one process and nothing to rendezvous."""
    if _is_direct(launch):
        return [sys.executable, "-m", module, *arguments]
    # A given rendezvous or node count replaces --standalone, which contradicts both.
    elsewhere = any(a.startswith(("--rdzv", "--nnodes", "--master")) for a in launch.extra_torchrun_args)
    return [
        sys.executable, "-m", "megaeva.loop.agent", str(failure_file),
        *([] if elsewhere else ["--standalone"]),
        f"--nproc-per-node={launch.num_processes}", *launch.extra_torchrun_args,
        "-m", module, *arguments,
    ]  # fmt: skip


def build_environment(launch: LaunchSection) -> dict[str, str]:
    """This process's environment; threads of a rank: as set, else the variable in place, else a fair share."""
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    # A job started from inside another torchrun job must not take that one's place in its world.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if launch.threads_per_process is not None:
        environment["OMP_NUM_THREADS"] = str(launch.threads_per_process)
    elif launch.num_processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(threads_of_each(launch.num_processes)))
    return environment


def threads_of_each(num_processes: int) -> int:
    """A fair share of this machine's cores."""
    return max(1, (os.cpu_count() or 1) // num_processes)


def describe_exit(exit_code: int) -> str:
    """`was killed by SIGKILL (signal 9)` or `exited with code 2`."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = "a signal"
    hint = "; often the kernel's answer to memory running out" if name == "SIGKILL" else ""
    return f"was killed by {name} (signal {-exit_code}{hint})"


def last_error(lines: Sequence[str]) -> str:
    """The error message at the end of a job's output: the last exception's line, else its last few plain lines."""
    plain = [line for line in lines if line.strip() and not is_status_line(line) and not _TORCH_LOG_LINE.match(line)]
    if any(line.startswith("Traceback (most recent call last)") for line in plain):
        for line in reversed(plain):
            if _EXCEPTION_LINE.match(line):
                return line.strip()
    return "\n".join(line.rstrip() for line in plain[-4:])


def _is_direct(launch: LaunchSection) -> bool:
    return launch.num_processes == 1 and not launch.extra_torchrun_args


def _verdict(exit_code: int, failure_file: Path, tail: Sequence[str], *, direct: bool) -> tuple[int | None, int, str]:
    """(rank, its exit code, its last message or what the other ranks said of it)."""
    if direct:
        return 0, exit_code, last_error(tail)
    failure = json.loads(failure_file.read_text(encoding="utf-8")) if failure_file.exists() else None
    told = next((match[1] for line in reversed(tail) if (match := _LOST_CONTACT_LINE.match(line))), None)
    if told is not None:
        named = _LOST_RANK.match(told)
        rank = int(named[1]) if named else None
        # torchrun kills a rank that hangs, too, but that is not what it died of.
        if "its process is gone" in told and failure is not None and failure["rank"] == rank:
            return rank, int(failure["exit_code"]), told
        return rank, LOST_PEER, told
    if failure is None:
        return None, exit_code, last_error(tail)
    message = str(failure["message"])
    if failure["exit_code"] < 0:
        message = ""  # a signal leaves no words; what stands last in the log is another rank's
    elif message.startswith("To enable traceback"):
        message = last_error(tail)
    return int(failure["rank"]), int(failure["exit_code"]), message


@contextmanager
def _forwarded_signals(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Passes SIGINT and SIGTERM on to the job as SIGTERM, the second kills it. Yields the list of those received."""
    received: list[int] = []

    def forward(signum: int, _: FrameType | None) -> None:
        received.append(signum)
        if len(received) == 1:
            process.terminate()
        else:
            _kill_tree(process.pid)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    except BaseException:
        _kill_tree(process.pid)  # leave no orphan rank behind whatever went wrong here
        raise
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _kill_tree(pid: int) -> None:
    # The ranks are in sessions of their own, so a signal to the launcher's group would miss them.
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def _relay(source: BinaryIO, terminal: TextIO, log: RawIOBase, heard: Callable[[], None]) -> deque[str]:
    """Copies lines to log and terminal, where a status line overwrites the one before. Returns the last lines.

    `heard` is called for each.

    What torchrun itself says of a rank's end goes to the log only, and what ranks say of a lost one, as the error that
    the launcher ends with quotes it.
    """
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    in_place = terminal.isatty()
    redrawing = False
    log_works = True
    for raw in source:
        heard()
        try:
            if log_works:
                log.write(raw)
        except OSError as error:  # a full disk; the job has to say so itself
            log_works = False
            terminal.write(f"warning: nothing more is written to the log: {error.strerror}\n")
        text = raw.decode("utf-8", errors="replace").rstrip("\n")
        if _TORCHRUN_LINE.match(text):
            continue
        tail.append(text)
        if _LOST_CONTACT_LINE.match(text):
            continue
        status = in_place and is_status_line(text)
        if status:
            width = os.get_terminal_size(terminal.fileno()).columns
            terminal.write("\r\x1b[K" + text[: max(1, width - 1)])
        else:
            terminal.write(("\n" if redrawing else "") + text + "\n")
        redrawing = status
        terminal.flush()
    if redrawing:
        terminal.write("\n")
    return tail
