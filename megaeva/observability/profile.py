"""A torch.profiler trace of some steps of a run (`train.profile`), and what its time went into.

`share_table` reads the trace file alone, so a trace of a cluster can be summed up on a laptop:

    python -m megaeva.observability.profile RUN/profile/rank_0_steps_10_12.json.gz
"""

import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from megaeva.config.schema import ProfileSection
from megaeva.errors import DataError, explain_end

WINDOW, DATA = "megaeva::window", "megaeva::data"  # ranges in the trace; the loader opens the second
PARTS = ("matmul", "memory-bound", "communication", "data", "idle")

_COMMUNICATION = re.compile(r"^(c10d::|gloo:|nccl:|ncclDevKernel|ncclKernel)|record_param_comms|nccl", re.IGNORECASE)
_MATMUL = re.compile(
    r"^aten::(\w*mm|\w*bmm|addmv|mv|dot|baddbmm|_scaled_mm|mkldnn_\w*convolution\w*|_?convolution\w*|thnn_conv2d\w*|"
    r"_scaled_dot_product\w*|_flash_attention\w*)$|^megaeva::(attention|infonce|sigmoid)\w*|"
    r"gemm|cutlass|cublas|xmma|wgmma|nvjet|fmha|flash|attention|convolve",
    re.IGNORECASE,
)
_HOST_OPERATION = re.compile(r"^(aten|megaeva)::")


class StepProfiler:
    """Traces the steps of the window on the ranks that were asked for; elsewhere, and without a section, does nothing.

    The first of these ranks tells of it.

    Args:
        section: `train.profile`.
        run_dir: `profile/` in it gets rank_R_steps_A_B.json.gz (chrome://tracing, Perfetto) and a table of the same
            name, .txt.
        rank: this process's.
        on_gpu: trace its kernels, too.
    """

    def __init__(self, section: ProfileSection | None, run_dir: Path, rank: int, *, on_gpu: bool = False) -> None:
        traced = section is not None and (section.ranks == "all" or rank in section.ranks)
        self._section = section if traced else None
        self._folder, self._rank, self._on_gpu = run_dir / "profile", rank, on_gpu
        self._speaks = section is not None and rank == (0 if section.ranks == "all" else min(section.ranks))
        self._profile: Any = None
        self._window: Any = None
        self._first = self._steps = 0

    def before_step(self, step: int) -> None:
        """Begin the window with its first step; call before the step's data are read."""
        if self._section is not None and self._profile is None and step >= self._section.first_step:
            self._first = step
            if not self._on_gpu:
                os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints the lack of a GPU as an error
            on_device = [ProfilerActivity.CUDA] if self._on_gpu else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_device])
            self._profile.start()
            self._window = record_function(WINDOW)
            self._window.__enter__()

    def after_step(self) -> None:
        """End the window after its last step and write it."""
        if self._window is not None:
            self._steps += 1
            if self._section is not None and self._steps == self._section.num_steps:
                self.write()

    def end(self) -> None:
        """End the window if it is open, also before its last step."""
        if self._window is not None:
            self._window.__exit__(None, None, None)
            self._window = None
            self._profile.stop()

    def write(self) -> None:
        """End the window if it is open, and write what steps it has, once."""
        self.end()
        if self._profile is None:
            return
        if not self._steps:
            self.abandon()
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        last = self._first + self._steps - 1
        path = self._folder / f"rank_{self._rank}_steps_{self._first}_{last}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = self._section = None
        table = share_table(read_trace(path))
        path.with_suffix("").with_suffix(".txt").write_text("\n".join(table) + "\n", encoding="utf-8")
        self._say("\n".join([f"trace of steps {self._first} to {last}: {path}", *table]))

    def abandon(self) -> None:
        """Say that there will be no trace if a window was begun and not written: an error ended the run in it."""
        if self._profile is not None:
            with suppress(Exception):  # of a device that is broken already; another error is under way
                self.end()
            self._profile = self._section = None
            self._say(f"no trace: the run ended in step {self._first + self._steps}, within train.profile's window")

    def _say(self, text: str) -> None:
        if self._speaks:
            print(text, flush=True)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file.

    Raises:
        DataError: it is none.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return list(json.load(file)["traceEvents"])
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as a trace ({type(error).__name__}: {error}); it must be a .json.gz that "
            "train.profile wrote to its end; look into RUN/profile/."
        ) from None


def shares(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of the window by part of PARTS; they sum to the window.

    A moment counts as the first part that is under way in it. On a GPU: matmul, memory-bound, communication (so what is
    hidden behind computation costs nothing), data, idle. On a CPU the data come first, as a rank that decodes runs
    operations of its own; and idle is Python between the operations, too. Communication contains the wait for a rank
    that comes later.

    Raises:
        DataError: no window in the trace.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    window = next((event for event in complete if event["name"] == WINDOW), None)
    if window is None:
        raise DataError(f"the trace has no range {WINDOW}; it must be of whole steps; make it with train.profile.")
    begin, end = float(window["ts"]), float(window["ts"]) + float(window["dur"])
    on_gpu = any(event.get("cat") == "kernel" for event in complete)
    order = ("matmul", "memory-bound", "communication", "data") if on_gpu else PARTS[3:4] + PARTS[:3]
    edges: list[tuple[float, int, int]] = []
    for event in complete:
        part = _part(event, on_gpu)
        start, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        start, stop = max(begin, start), min(end, stop)
        if part is not None and stop > start:
            index = order.index(part)
            edges += [(start, 1, index), (stop, -1, index)]
    milliseconds = dict.fromkeys(PARTS, 0.0)
    under_way, since = [0] * len(order), begin
    for moment, change, index in sorted(edges):
        current = next((order[i] for i, count in enumerate(under_way) if count), "idle")
        milliseconds[current] += (moment - since) / 1e3
        since = moment
        under_way[index] += change
    milliseconds["idle"] += (end - since) / 1e3
    return milliseconds


def share_table(events: Iterable[dict[str, Any]]) -> list[str]:
    """Lines: each part's time and share of the window."""
    milliseconds = shares(events)
    whole = sum(milliseconds.values())
    rows = [f"  {part:<14} {ms:10.1f} ms  {100 * ms / whole:6.2f} %" for part, ms in milliseconds.items()]
    return [*rows, f"  {'window':<14} {whole:10.1f} ms"]


def _part(event: dict[str, Any], on_gpu: bool) -> str | None:
    """What an event counts as; None: a range that only holds others, or the host's side of a kernel."""
    name, category = event["name"], event.get("cat")
    if name in (DATA, WINDOW):
        return "data" if name == DATA and category != "gpu_user_annotation" else None
    if on_gpu:
        if category in ("gpu_memcpy", "gpu_memset"):
            return "memory-bound"
        if category != "kernel":
            return None
    elif category not in ("cpu_op", "user_annotation"):
        return None
    if _COMMUNICATION.search(name):
        return "communication"
    if not on_gpu and not _HOST_OPERATION.match(name):
        return None
    return "matmul" if _MATMUL.search(name) else "memory-bound"


def main(paths: Sequence[str]) -> int:
    """Prints the table of each trace; the exit code."""
    if not paths:
        raise DataError(
            "no trace is given; files that train.profile wrote must be; "
            "usage: python -m megaeva.observability.profile RUN/profile/rank_0_steps_10_12.json.gz ..."
        )
    for path in paths:
        print("\n".join([path, *share_table(read_trace(Path(path)))]))
    return 0


if __name__ == "__main__":
    sys.exit(explain_end(lambda: main(sys.argv[1:])))
