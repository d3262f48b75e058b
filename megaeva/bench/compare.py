"""Alternating runs of two pieces of work, their ratio, and the row that benchmarks/log.md wants of them."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch


@dataclass(frozen=True)
class Spread:
    """A figure over rounds: `median (low-high)`."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


@dataclass(frozen=True)
class Comparison:
    """Milliseconds of alternating runs; the same index is the same round."""

    ours_ms: tuple[float, ...]
    peer_ms: tuple[float, ...]

    @property
    def ours(self) -> float:
        """Median milliseconds."""
        return statistics.median(self.ours_ms)

    @property
    def peer(self) -> float:
        """Median milliseconds."""
        return statistics.median(self.peer_ms)

    @property
    def ours_per_peer(self) -> Spread:
        """Time of ours / time of the peer in each round; above 1 ours is slower."""
        return _spread(ours / peer for ours, peer in zip(self.ours_ms, self.peer_ms, strict=True))

    @property
    def peer_per_ours(self) -> Spread:
        """Time of the peer / time of ours in each round; above 1 ours is faster."""
        return _spread(peer / ours for ours, peer in zip(self.ours_ms, self.peer_ms, strict=True))


def alternate(ours: Callable[[], object], peer: Callable[[], object], *, device: str, num_rounds: int) -> Comparison:
    """Times both in every round, in turn first, so that a slow spell of the machine meets both. Warm both up before."""
    return Comparison(*take_turns([ours, peer], device=device, num_rounds=num_rounds))


def take_turns(
    functions: Sequence[Callable[[], object]], *, device: str, num_rounds: int
) -> tuple[tuple[float, ...], ...]:
    """Milliseconds of each function in each round; every second round runs them in reverse order."""
    times_ms: list[list[float]] = [[] for _ in functions]
    for number in range(num_rounds):
        turns = list(zip(functions, times_ms, strict=True))
        for function, times in turns if number % 2 == 0 else reversed(turns):
            times.append(milliseconds(function, device))
    return tuple(map(tuple, times_ms))


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Wall time of one call, the device's queue empty before and after."""
    drain(device)
    start = time.perf_counter()
    function()
    drain(device)
    return 1e3 * (time.perf_counter() - start)


def drain(device: str) -> None:
    """Waits for what is queued on a device of this type; a CPU has no queue."""
    if device == "cuda":
        torch.cuda.synchronize()


def row(*cells: str) -> str:
    """A row of benchmarks/log.md: date, measured commit, `cells`, machine."""
    what = commit_and_machine()
    return "| " + " | ".join((what["date"], what["commit"], *cells, what["machine"])) + " |"


def commit_and_machine() -> dict[str, str]:
    """The date, what is measured and where, under the names of the log's columns."""
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": _commit(), "machine": _machine()}


def _spread(values: Iterable[float]) -> Spread:
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def _commit() -> str:
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def _machine() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}"
