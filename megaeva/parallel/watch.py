"""Which rank a job waits for: every rank notes what it does, and a rank that hangs or dies is named with its notes.

`at` and `place` cost an assignment. While `explaining` runs, a thread of each rank copies these notes to the job's
store twice a second, through a connection of its own, so that it works while the main thread waits in a collective.
torchrun's agent keeps the store: it outlives rank 0.

When a collective fails (it waited longer than `train.timeout_minutes`, or its peer's connection closed), the first rank
that notices raises the alarm in the store. The threads answer it, each with where its main thread stands. The first
rank names, in this order: ranks that told an error of their own, ranks that do not answer (dead, stopped, or the whole
host), ranks whose main thread is not waiting for others. Then every process ends with status LOST_PEER, also one whose
main thread hangs: its watching thread ends it. That takes seconds after the timeout.

Limits:

- A stopped process cannot end itself. The others wake it (SIGCONT) if they are on its host, and its thread ends it;
  what cannot be woken (a hung driver) torchrun kills 30 s after another rank of that node ended. Alone on its node it
  stays.
- gloo only. NCCL's own watchdog thread aborts a process whose collective waits longer than the timeout (SIGABRT), so
  its main thread gets no exception and no alarm is raised; `megaeva train` then names the rank that was aborted, which
  is one that waited. A main thread that waits for the GPU would count as hanging. Nothing here has run on a GPU.
"""

import json
import linecache
import os
import signal
import socket
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megaeva.config.topology import virtual_stages
from megaeva.errors import LOST_PEER, LostRankError, explain, is_lost_peer, is_timeout
from megaeva.parallel.grid import Grid
from megaeva.parallel.runtime import Runtime

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5.0  # for answers to the alarm, with room for a busy machine
_END_SECONDS = 10.0  # for a process to end by itself
_PRECEDENCE_SECONDS = 1.0  # of the rank that speaks: torchrun stops all as soon as one ends
_NAMED_IN_FULL = 3
_TORCH_DISTRIBUTED = str(Path(dist.__file__).parent) + os.sep
_PACKAGE = str(Path(__file__).parents[1]) + os.sep

_WAITS, _STANDS, _LEFT, _TOLD = "waits", "stands", "left", "told"


@dataclass(frozen=True)
class Seen:
    """A rank's notes.

    Attributes:
        since: time.time() of the last note.
    """

    host: str
    pid: int
    place: str
    position: str
    since: float


_step: int | None = None
_note: tuple[str, float] = ("starting", time.time())
_place = ""
_wake = threading.Event()  # the watching thread, before its next half second


def at(text: str, step: int | None = None) -> None:
    """Note what this rank begins to do; costs an assignment.

    Args:
        text: e.g. "pass (i), vision, microbatch 2 of 4".
        step: the optimizer step that this text and those after it belong to; None: the one named last.
    """
    global _step, _note
    first = _step is None and step is not None
    if step is not None:
        _step = step
    _note = (text if _step is None else f"step {_step}, {text}", time.time())
    if first:
        _wake.set()  # a rank may die in its first half second, too


def place(text: str) -> None:
    """Note which part of the towers this rank holds, see `place_of`. It reaches the others at once."""
    global _place
    _place = text
    _wake.set()


def place_of(tower: str, grid: Grid, num_layers: int) -> str:
    """E.g. "vision tp rank 0 of 2, pp rank 1 of 2 (layers 12-23), data rank 0 of 1"; axes of size one are left out."""
    words = []
    if grid.tp_size > 1:
        words.append(f"tp rank {grid.tp_rank} of {grid.tp_size}")
    if grid.pp_size > 1:
        stages = virtual_stages(grid.axes, num_layers)[grid.pp_rank :: grid.pp_size]
        layers = ", ".join(f"{stage[0]}-{stage[-1]}" for stage in stages)
        words.append(f"pp rank {grid.pp_rank} of {grid.pp_size} (layers {layers})")
    if grid.dp_size > 1:
        words.append(f"data rank {grid.dp_rank} of {grid.dp_size}")
    return f"{tower} {', '.join(words)}" if words else tower


@contextmanager
def explaining(runtime: Runtime) -> Iterator[None]:
    """Watch over a block that all ranks run on their main thread; an end caused by a lost rank is explained.

    Must start after `runtime.start` and end before `runtime.stop`. On one rank it does nothing.

    Raises:
        LostRankError: another rank hangs or is gone. From then on SIGTERM is ignored: torchrun sends it to the ranks
            that remain, and they have yet to say why. Other errors are passed on, and quoted to the other ranks.
    """
    if runtime.world_size == 1:
        yield
        return
    post = _Post(runtime)
    post.start()
    try:
        yield
    except BaseException as error:
        if not is_lost_peer(error):
            if runtime.is_main and explain(error) is not None:
                post.leave(_TOLD, "")  # by this rank, on the terminal, at once
            else:
                post.leave(_LEFT, f"{type(error).__name__}: {error}")
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise post.verdict(error) from None
    else:
        post.leave(_LEFT, "it ended before the others")


def judge(
    error: str, seen: Mapping[int, Seen], answers: Mapping[int, Sequence[str]], timeout_minutes: float, now: float
) -> tuple[list[int], str]:
    """The ranks to blame, none where that cannot be told, and the message.

    Args:
        error: what the collective failed with on the rank that raised the alarm.
        seen: every rank's notes, as far as they are known.
        answers: of the ranks that answered: ("waits", ""), ("stands", where), ("left", why), or ("told", "") from one
            that left and says why itself.
    """
    timed_out = is_timeout(error)
    left = {rank: answer[1] for rank, answer in answers.items() if answer[0] == _LEFT}
    left |= {rank: "for the reason it tells" for rank, answer in answers.items() if answer[0] == _TOLD}
    silent = [rank for rank in sorted(seen) if rank not in answers]
    standing = {rank: answer[1] for rank, answer in answers.items() if answer[0] == _STANDS and timed_out}
    silence = f"no answer for {timeout_minutes:g} min"
    if left:
        reasons = {rank: f"left the job: {why}" for rank, why in left.items()}
        remedy = "Ranks must leave together; mend that"
    elif silent and not timed_out:
        reasons = dict.fromkeys(silent, "its process is gone")
        remedy = "Every rank must live as long as the job; look at the end of its output and at that host (dmesg)"
    elif silent:
        reasons = dict.fromkeys(silent, silence)
        remedy = f"Ranks must answer within train.timeout_minutes={timeout_minutes:g}; look at that process and host"
    elif standing:
        reasons = {rank: f"{silence}, it stands in {where}" for rank, where in standing.items()}
        remedy = f"Ranks must answer within train.timeout_minutes={timeout_minutes:g}; see what it does there"
    else:
        stand = defaultdict(list)
        for rank, notes in sorted(seen.items()):
            stand[notes.position].append(rank)
        where = "; ".join(f"rank {', '.join(map(str, ranks))} in {text}" for text, ranks in stand.items())
        return [], (
            f"a collective failed ({error}) though every rank answers: {where}. Ranks must wait for each other in the "
            "same places; where they do, look at the network between their hosts, and continue with --resume."
        )
    blamed = sorted(reasons)
    texts = []
    for rank in blamed[:_NAMED_IN_FULL]:
        notes = seen[rank]
        who = ", ".join([f"host {notes.host}", f"pid {notes.pid}", *([notes.place] if notes.place else [])])
        texts.append(
            f"rank {rank} ({who}): {reasons[rank]}; last seen in {notes.position} ({_ago(now - notes.since)} ago)"
        )
    if rest := blamed[_NAMED_IN_FULL:]:
        hosts = sorted({seen[rank].host for rank in rest})
        texts.append(f"and rank {', '.join(map(str, rest))} (host {', '.join(hosts)})")
    return blamed, f"{'; '.join(texts)}. {remedy}, and continue with --resume."


class _Post(threading.Thread):
    """This rank's watching thread; the only one that uses its connection to the store."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(name="watch", daemon=True)
        self._runtime = runtime
        self._store = dist.PrefixStore("watch", _get_default_store().clone())
        self._main_id = threading.get_ident()
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._published: Seen | None = None
        self._told, self._lock = threading.Event(), threading.Lock()
        self._main_ends = False  # the main thread has left the block and ends the process
        self._left: tuple[str, ...] | None = None
        self._error: str | None = None
        self._text: str | None = None
        self._speaks = False

    # --------------------------------------------------------------------------------------------- the main thread

    def leave(self, *answer: str) -> None:
        """Tell the others that this rank leaves for a reason of its own."""
        with self._lock:
            self._main_ends = True
        self._left = tuple(map(_one_line, answer))
        _wake.set()
        self.join(timeout=2.0)

    def verdict(self, error: BaseException) -> LostRankError:
        """What the ranks find out about a failed collective; returns within seconds."""
        with self._lock:
            self._main_ends = True
        self._error = _one_line(str(error))
        _wake.set()
        self._told.wait(_GRACE_SECONDS + _END_SECONDS)
        if self._text is None:
            where = os.environ.get("MASTER_ADDR", "rank 0's host")
            return LostRankError(
                f"a collective failed ({self._error}) in {_note[0]}, and the job's store on {where} does not answer. "
                "That host must be up as long as the job; look at it, and continue with --resume.",
                speaks=self._runtime.local_rank == 0,
            )
        if not self._speaks:
            time.sleep(_PRECEDENCE_SECONDS)
        return LostRankError(self._text, speaks=self._speaks)

    # ----------------------------------------------------------------------------------------- the watching thread

    def run(self) -> None:
        """Publish until the block ends or the alarm is raised."""
        try:
            while True:
                self._publish()
                if self._left is not None:
                    self._answer(*self._left)
                    return
                if self._error is not None or self._store.check(["alarm"]):
                    break
                _wake.wait(_POLL_SECONDS)
                _wake.clear()
            self._end()
        except RuntimeError:
            return  # the store is gone, and with it every way to ask; collectives still fail by themselves
        finally:
            self._told.set()

    def _publish(self) -> None:
        position, since = _note
        notes = Seen(self._host, self._pid, _place, position, since)
        if notes != self._published:
            self._store.set(f"seen/{self._runtime.rank}", json.dumps(asdict(notes)))
            self._published = notes

    def _answer(self, *answer: str) -> None:
        self._store.set(f"answer/{self._runtime.rank}", json.dumps(answer))

    def _end(self) -> None:
        """Find out who is to blame, and see to it that this process ends."""
        self._publish()
        first = self._error is not None and self._store.add("alarm", 1) == 1
        where = None if self._main_ends else _standing(self._main_id)
        self._answer(*((_WAITS, "") if where is None else (_STANDS, where)))
        verdict = self._judge() if first else self._await_verdict()
        if verdict is not None:
            self._text, self._speaks = verdict["text"], verdict["speaker"] == self._runtime.rank
            for host, pid in verdict["silent"]:
                if host == self._host:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGCONT)  # a stopped process ends itself then; no other minds it
        self._told.set()
        with self._lock:
            if not self._main_ends:
                if self._text is not None and self._speaks:
                    LostRankError(self._text, speaks=True).tell()
                else:
                    time.sleep(_PRECEDENCE_SECONDS)
                os._exit(LOST_PEER)
        time.sleep(_END_SECONDS)
        if self._left is None:
            os._exit(LOST_PEER)

    def _judge(self) -> dict[str, Any]:
        """On the rank that raised the alarm: hear the others, and publish the verdict."""
        ranks = range(self._runtime.world_size)
        heard_until = time.monotonic() + _GRACE_SECONDS
        answers: dict[int, Sequence[str]] = {}
        while len(answers) < len(ranks) and time.monotonic() < heard_until:
            time.sleep(0.1)
            new = {rank: self._read(f"answer/{rank}") for rank in ranks if rank not in answers}
            answers |= {rank: answer for rank, answer in new.items() if answer}
        notes = {rank: self._read(f"seen/{rank}") for rank in ranks}
        seen = {rank: Seen(**note) if note else _UNSEEN for rank, note in notes.items()}
        minutes = self._runtime.timeout.total_seconds() / 60
        blamed, text = judge(self._error or "", seen, answers, minutes, time.time())
        speaker: int | None = 0 if 0 not in blamed else self._runtime.rank
        if any(answer[0] == _TOLD for answer in answers.values()):
            speaker = None
        silent = [(seen[rank].host, seen[rank].pid) for rank in ranks if rank not in answers and notes[rank]]
        verdict = {"text": text, "speaker": speaker, "silent": silent}
        self._store.set("verdict", json.dumps(verdict))
        return verdict

    def _await_verdict(self) -> dict[str, Any] | None:
        """On the others; None where the rank that raised the alarm is gone too."""
        until = time.monotonic() + 2 * _GRACE_SECONDS
        while time.monotonic() < until:
            if verdict := self._read("verdict"):
                return dict(verdict)
            time.sleep(0.1)
        return None

    def _read(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


_UNSEEN = Seen("unknown", 0, "", "the start", time.time())


def _standing(thread_id: int) -> str | None:
    """Where a thread stands, as "function (file:line)" and the same of our code; None if it waits for other ranks."""
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return None
    file, line = frame.f_code.co_filename, frame.f_lineno
    # Blocking collectives wait inside torch.distributed; mcore waits for its own with `.wait()`, which has no frame.
    if file.startswith(_TORCH_DISTRIBUTED) or ".wait(" in linecache.getline(file, line):
        return None
    stands = f"{frame.f_code.co_name} ({file}:{line})"
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(_PACKAGE):
        ours = ours.f_back
    if ours is None or ours is frame:
        return stands
    return f"{stands} under {ours.f_code.co_name} ({ours.f_code.co_filename}:{ours.f_lineno})"


def _one_line(text: str) -> str:
    return textwrap.shorten(text, 500, placeholder=" ...")


def _ago(seconds: float) -> str:
    return f"{max(0.0, seconds):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
