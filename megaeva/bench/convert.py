"""How fast weights go from EVA's file into a run's folder and from there to Hugging Face, beside the disk's plain copy.

Each conversion is a process of its own, whose peak memory is read when it ends. In every round it and `cp` take turns
on the same source, which has been read just before, and in the same state of memory and disk; both end when the disk
has everything.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaeva.bench.compare import Comparison, row
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.eva import NATIVE
from megaeva.checkpoint.convert.format import MAX_SHARD_BYTES
from megaeva.checkpoint.convert.ours import shapes
from megaeva.checkpoint.convert.rules import exported, plan_export
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import UserError

SPEED_BOUND = 0.6
"""Smallest share of the copy's speed."""
MEMORY_BOUND = 2e9
"""Largest peak of resident memory, bytes, the interpreter and torch included."""
PLANNED = "EVA-CLIP-18B"
_POOL = 2**26
_CHILD = """
import json, sys
from megaeva.checkpoint.convert.command import convert
report = convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps([report.seconds, 1024 * peak]))
"""


@dataclass(frozen=True)
class ConvertTimes:
    """One conversion.

    Attributes:
        name: "eva -> megaeva".
        times: ours from opening the source to the last byte on the disk; the peer `cp` and sync.
        process_ms: median of the whole process, imports included.
        peaks: bytes of resident memory, by round.
        num_bytes: of the tensors.
    """

    name: str
    times: Comparison
    process_ms: float
    peaks: tuple[int, ...]
    num_bytes: int

    def report(self, command: str) -> list[str]:
        """A sentence, and the row for the log: date, commit, conversion, command, s, s, ratio, peak, machine."""
        ours, copy, share = self.times.ours / 1e3, self.times.peer / 1e3, self.times.peer_per_ours
        peak = max(self.peaks)
        return [
            f"{self.name}: {self.num_bytes / 1e9:.2f} GB in {ours:.1f} s ({self.num_bytes / 1e9 / ours:.2f} GB/s; "
            f"{self.process_ms / 1e3:.1f} s with the start of Python), cp {copy:.1f} s; {share} of its speed (bound "
            f"{SPEED_BOUND}: {_verdict(share.median >= SPEED_BOUND)}); peak resident memory {peak / 1e9:.2f} GB (bound "
            f"{MEMORY_BOUND / 1e9:.0f}: {_verdict(peak < MEMORY_BOUND)})",
            row(f"{self.name}, `{command}`", f"{ours:.1f}", f"{copy:.1f}", str(share), f"{peak / 1e9:.2f}"),
        ]


def benchmark_convert(model: ModelSection, *, num_rounds: int, folder: Path) -> Iterator[ConvertTimes]:
    """Measures in a new folder inside `folder`, which needs three times the weights' bytes.

    Raises:
        UserError: the disk has not that much.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = 3 * 2 * sum(map(math.prod, shapes(Contents("clip", model)).values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.0f} GB free, the bench needs {needed / 1e9:.0f}; "
            "free space, name another --folder or a smaller --model."
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix="convert_") as scratch:
        eva, run, hf = Path(scratch) / "eva.pt", Path(scratch) / "run", Path(scratch) / "hf"
        num_bytes = write_eva_file(eva, model)
        yield _measure("eva -> megaeva", eva, run, "megaeva", num_rounds, num_bytes)
        eva.unlink()
        yield _measure("megaeva -> hf-eva", run, hf, "hf-eva", num_rounds, num_bytes)


class RandomWeights:
    """Random fp16 weights in our names, every tensor another stretch of the same numbers. A `TensorSource`."""

    path = Path("the bench")

    def __init__(self, model: ModelSection) -> None:
        self._draw = torch.Generator().manual_seed(0)
        self._pool = torch.randn(_POOL, generator=self._draw).mul_(0.02).half()
        ours = shapes(Contents("clip", model))
        self.infos: Mapping[str, TensorInfo] = {name: TensorInfo(shape, torch.float16) for name, shape in ours.items()}

    def read(self, name: str) -> Tensor:
        """See `TensorSource.read`."""
        shape = self.infos[name].shape
        count = math.prod(shape)
        start = int(torch.randint(_POOL, (), generator=self._draw))
        return torch.cat([self._pool[start:], *[self._pool] * (count // _POOL + 1)])[:count].view(shape).contiguous()

    def close(self) -> None:
        """See `TensorSource.close`."""


def write_eva_file(path: Path, model: ModelSection) -> int:
    """A file in EVA's own layout; returns the bytes of its tensors."""
    what = Contents("clip", model)
    rules, source = NATIVE.rules(what, None), RandomWeights(model)
    plan = plan_export(rules, source.infos, source.path)
    sink = NATIVE.open_sink(path, what, plan, MAX_SHARD_BYTES)
    for name, tensor in exported(rules, source):
        sink.write(name, tensor)
    sink.finish()
    return sum(info.num_bytes for info in plan.values())


def plan_lines(timed: Sequence[ConvertTimes], model: ModelSection) -> list[str]:
    """What the same speed and memory mean for the largest model."""
    planned = ModelSection.model_validate(VARIANTS[PLANNED])
    sizes, own_sizes = (
        [2 * math.prod(shape) for shape in shapes(Contents("clip", m)).values()] for m in (planned, model)
    )
    lines = []
    for one in timed:
        seconds = sum(sizes) / one.num_bytes * one.times.ours / 1e3
        # One is read, three are made of it on the way (joined, laid out, the result), one more than the bound may wait.
        more = 5 * max(0, max(sizes) - max(own_sizes))
        lines.append(
            f"planned: {PLANNED} in half precision, {sum(sizes) / 1e9:.2f} GB, {one.name} in {seconds:.0f} s with "
            f"at most {(max(one.peaks) + more) / 1e9:.1f} GB of resident memory"
        )
    return lines


def _measure(name: str, source: Path, target: Path, to: str, num_rounds: int, num_bytes: int) -> ConvertTimes:
    """Leaves the last conversion."""
    ours_ms: list[float] = []
    copies_ms: list[float] = []
    processes_ms: list[float] = []
    peaks: list[int] = []

    copied = source.with_name("copy")

    # Both begin with neither's output on the disk or in memory: a guest's pages that the host has to find first cost
    # several times as much to write to as those that a file left behind.
    def convert() -> None:
        _remove(copied)
        _remove(target)
        _settle(source)
        start = time.perf_counter()
        command = [sys.executable, "-c", _CHILD, str(source), str(target), to]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the conversion {name} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
        processes_ms.append(1e3 * (time.perf_counter() - start))
        seconds, peak = json.loads(done.stdout)
        ours_ms.append(1e3 * seconds)
        peaks.append(peak)

    def copy() -> None:
        _remove(copied)
        _remove(target)
        _settle(source)
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(copied)], check=True)
        _sync(copied)
        copies_ms.append(1e3 * (time.perf_counter() - start))

    for number in reversed(range(num_rounds)):  # the last round ends with a conversion
        for side in (convert, copy) if number % 2 else (copy, convert):
            side()
    times = Comparison(tuple(ours_ms), tuple(copies_ms))
    return ConvertTimes(name, times, statistics.median(processes_ms), tuple(peaks), num_bytes)


def _settle(source: Path) -> None:
    """Nothing is left to write, and the source has been read."""
    os.sync()
    for file in [source] if source.is_file() else source.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _verdict(kept: bool) -> str:
    return "kept" if kept else "MISSED"
