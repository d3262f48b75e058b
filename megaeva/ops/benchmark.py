"""Times each native operator beside its plain-PyTorch reference, alternately, on the machine at hand."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

from megaeva.ops import native_devices
from megaeva.ops.normalize_pack import normalize_pack, reference


@dataclass(frozen=True)
class Comparison:
    """Medians of alternating runs of one piece of work.

    Attributes:
        work: what was run, with its sizes.
        native_ms: median milliseconds of the native operator.
        reference_ms: median milliseconds of plain PyTorch.
        ratio: median over rounds of reference / native; above 1 the native operator is faster.
        ratio_low, ratio_high: smallest and largest ratio of a single round.
    """

    work: str
    native_ms: float
    reference_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def row(self) -> str:
        """The row for benchmarks/log.md: date, commit, work, both medians, ratio with its range, machine."""
        return (
            f"| {datetime.now(UTC):%Y-%m-%d} | {_commit()} | {self.work} | {self.native_ms:.2f} | "
            f"{self.reference_ms:.2f} | {self.ratio:.2f} ({self.ratio_low:.2f}-{self.ratio_high:.2f}) | {_machine()} |"
        )


def benchmark_normalize_pack(
    *, num_samples: int, embed_dim: int, dtype: torch.dtype, device: str, num_rounds: int
) -> list[Comparison]:
    """Comparisons of `normalize_pack` with `reference`: forward alone, and forward with backward.

    Raises RuntimeError where the extension has no kernel for `device`: there is nothing to compare.
    """
    if device not in native_devices():
        raise RuntimeError(f"no native operator for {device} is built (have: {sorted(native_devices())})")
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, embed_dim, generator=generator).to(device, dtype)

    image_BE, text_BE, grad_2BE = draw(num_samples), draw(num_samples), draw(2 * num_samples)

    def forward_backward(function: Callable[[Tensor, Tensor], Tensor]) -> None:
        leaves = (image_BE.detach().requires_grad_(), text_BE.detach().requires_grad_())
        torch.autograd.grad(function(*leaves), leaves, grad_2BE)

    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    sizes = f"B={num_samples} E={embed_dim} {str(dtype).removeprefix('torch.')} {device}{threads}"
    return [
        _compare(
            f"normalize_pack forward, {sizes}",
            lambda: normalize_pack(image_BE, text_BE),
            lambda: reference(image_BE, text_BE),
            device,
            num_rounds,
        ),
        _compare(
            f"normalize_pack forward+backward, {sizes}",
            lambda: forward_backward(normalize_pack),
            lambda: forward_backward(reference),
            device,
            num_rounds,
        ),
    ]


def _compare(
    work: str, native: Callable[[], object], plain: Callable[[], object], device: str, num_rounds: int
) -> Comparison:
    for warm_up in (native, plain):
        _milliseconds(warm_up, device)
    native_ms: list[float] = []
    reference_ms: list[float] = []
    for number in range(num_rounds):
        # Alternately, and in turn first, so that a slow spell of the machine meets both.
        pair = [(native, native_ms), (plain, reference_ms)]
        for function, times in pair if number % 2 == 0 else reversed(pair):
            times.append(_milliseconds(function, device))
    ratios = [slow / fast for fast, slow in zip(native_ms, reference_ms, strict=True)]
    return Comparison(
        work,
        statistics.median(native_ms),
        statistics.median(reference_ms),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def _milliseconds(function: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return 1e3 * (time.perf_counter() - start)


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
