"""Peak memory and time of one side of `megaeva bench loss`, alone in a fresh process."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megaeva.bench.compare import milliseconds
from megaeva.bench.loss_sides import SIDES, Precision, draw
from megaeva.errors import UserError

MIB = 2**20
# glibc keeps what was freed for later: then resident memory is no measure of what is live. With these every block from
# 64 KiB on is a mapping of its own, gone when it is freed, and the heap's end is given back at once.
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


@dataclass(frozen=True)
class Alone:
    """What a process that does one thing measured.

    Attributes:
        times_ms: of each call.
        peak_bytes: resident memory at its highest during the calls, less what was resident before the first, with the
            inputs, and less the two feature gradients that a call returns. (A side whose peak comes before its
            gradients are there, as ClipLoss's does, is given their bytes for nothing.)
    """

    times_ms: tuple[float, ...]
    peak_bytes: int

    @property
    def ms(self) -> float:
        """Median milliseconds."""
        return statistics.median(self.times_ms)

    @property
    def peak_mib(self) -> float:
        """The peak in MiB."""
        return self.peak_bytes / MIB


@dataclass(frozen=True)
class Job:
    """What is measured: a name in `loss_sides.SIDES`, on features of this size."""

    side: str
    num_pairs: int
    embed_dim: int
    precision: Precision
    num_calls: int
    num_threads: int


def measure_alone(job: Job) -> Alone:
    """Runs `job` in a process of its own.

    Raises:
        UserError: that process did not survive, which is what the kernel does to one that wants too much memory.
    """
    done = subprocess.run(
        [sys.executable, "-m", "megaeva.bench.loss_memory", json.dumps(asdict(job))],
        env=os.environ | _EXACT_MALLOC,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"the process that measures {job.side} with {job.num_pairs} pairs ended with exit code {done.returncode}, "
            "it must end by itself (-9: the system ran out of memory); free memory or give a smaller --batch."
        )
    measured = json.loads(done.stdout)
    return Alone(tuple(measured["times_ms"]), measured["peak_bytes"])


def run(job: Job) -> Alone:
    """Measures `job` in this process, which should have done nothing else."""
    torch.set_num_threads(job.num_threads)
    side = SIDES[job.side]
    # Libraries and thread pools, which are there once whatever the batch.
    side(draw(64, job.embed_dim, precision=job.precision))
    features = draw(job.num_pairs, job.embed_dim, precision=job.precision)
    gradients_bytes = 2 * features.image_BE.nbytes
    times = []

    def calls() -> None:
        for _ in range(job.num_calls):
            times.append(milliseconds(lambda: side(features), "cpu"))

    peak = peak_resident_bytes(calls)
    return Alone(tuple(times), max(0, peak - gradients_bytes))


def peak_resident_bytes(work: Callable[[], object]) -> int:
    """By how much `work` raised this process's resident memory at most, in bytes; of Linux's /proc."""
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts again from here
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, field
    return 1024 * int(found[1])


if __name__ == "__main__":
    print(json.dumps(asdict(run(Job(**json.loads(sys.argv[1]))))))
