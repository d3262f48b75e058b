"""Time, memory and rounding of the contrastive loss with its gradients on one process, beside open_clip's ClipLoss.

Both sides get the same unit rows and return the loss and its derivatives by both matrices and the logarithm of the
scale. `engine` is our operators alone, so it does what ClipLoss does; `clip_loss` is what training calls: it normalises
the rows as well, and its peer still does not.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaeva.bench.compare import Comparison, milliseconds, row, take_turns
from megaeva.bench.loss_errors import error_lines, measure_errors
from megaeva.bench.loss_memory import Alone, Job, measure_alone
from megaeva.bench.loss_sides import (
    SCALE,
    Features,
    Outcome,
    Precision,
    difference,
    draw,
    engine,
    open_clip_loss,
    through_normalisation,
    whole_loss,
)

Multiplication = Callable[[Tensor, Tensor], Tensor]

# Largest relative difference between sides that compute alike, of the loss and of a gradient's norm. Products of bf16
# are exact in fp32, so the loss is held to the same; gradients are rounded to bf16, and so may be the weights before.
LOSS_TOLERANCE = 1e-5
ROUNDED_AGAIN = 1e-3  # of the loss whose bf16 rows are normalised, and so rounded to bf16, once more
GRADIENT_TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "bf16": 1e-2}

# What the line of a side is the measure of.
_CARRIES = {
    "engine": "the operators alone, ClipLoss's own work: the bounds on time, products and memory are this line's",
    "clip_loss": "what training calls, which normalises the rows both ways as well: no bound is this line's",
}
_ERRORS_BATCH = 1024  # fp64 products of a larger one take longer than what is benchmarked


@dataclass(frozen=True)
class LossTimes:
    """What `benchmark_loss` measured; a side's name is one of `loss_sides.SIDES`.

    Attributes:
        times_ms: of each side and of "products", by round.
        alone: of each side in a process of its own.
        losses: of each side, and of "fp32", ClipLoss on the same features in fp32.
        gradient_difference: the largest between ours and ClipLoss in fp32, relative to the norm.
    """

    times_ms: dict[str, tuple[float, ...]]
    alone: dict[str, Alone]
    losses: dict[str, float]
    gradient_difference: float

    def report(self, command: str) -> Iterator[str]:
        """Sentences, and the rows of the log's table of losses, one for each of ours."""
        ours, theirs, exact = (self.losses[name] for name in ("engine", "open_clip", "fp32"))
        yield (
            f"loss {ours:.5f}, open_clip {theirs:.5f} ({theirs - exact:+.2g} to itself in fp32 on the same features); "
            f"our gradients are within {self.gradient_difference:.1e} of ClipLoss's in fp32"
        )
        peer_mib = self.alone["open_clip"].peak_mib
        for side in ("engine", "clip_loss"):
            by_peer = Comparison(self.times_ms[side], self.times_ms["open_clip"])
            by_products = Comparison(self.times_ms[side], self.times_ms["products"])
            mib = self.alone[side].peak_mib
            percent = 100 * mib / peer_mib if peer_mib else math.nan
            yield (
                f"{side} ({_CARRIES[side]}) {figure(by_peer.ours)} ms, four matrix products alone "
                f"{figure(by_products.peer)} ms (ours / products {by_products.ours_per_peer}), open_clip "
                f"{figure(by_peer.peer)} ms: {by_peer.peer_per_ours}x as fast; peak memory beyond inputs and gradients "
                f"{figure(mib)} MiB, open_clip {figure(peer_mib)} MiB: {percent:.1f} %"
            )
            yield row(
                f"`{command}`",
                side,
                figure(by_peer.ours),
                figure(by_products.peer),
                figure(by_peer.peer),
                str(by_peer.peer_per_ours),
                str(by_products.ours_per_peer),
                figure(mib),
                figure(peer_mib),
            )


def benchmark_loss(num_pairs: int, embed_dim: int, *, precision: Precision, num_rounds: int) -> LossTimes:
    """Times `engine`, `clip_loss`, ClipLoss and four matrix products in turn, after checking that all compute the same.

    Before that each side runs once in a process of its own for its memory.
    """
    jobs = {side: _job(side, num_pairs, embed_dim, precision, 1) for side in ("engine", "clip_loss", "open_clip")}
    alone = {side: measure_alone(job) for side, job in jobs.items()}
    features = draw(num_pairs, embed_dim, precision=precision)
    losses, apart = check_sides(features, precision)
    works: dict[str, Callable[[], object]] = {
        "engine": lambda: engine(features),
        "clip_loss": lambda: whole_loss(features),
        "products": MatrixProducts(features.image_BE, features.text_BE),
        "open_clip": lambda: open_clip_loss(features),
    }
    times = take_turns(list(works.values()), device="cpu", num_rounds=num_rounds)
    return LossTimes(dict(zip(works, times, strict=True)), alone, losses, apart)


def check_sides(features: Features, precision: Precision) -> tuple[dict[str, float], float]:
    """The loss of each side, and the largest relative difference of a gradient. Runs, and so warms up, all of them.

    The standard is ClipLoss in fp32: in bf16 its logits are bf16, ours are not.
    """
    exact = open_clip_loss(features.to(torch.float32))
    losses = {"fp32": exact.loss.item(), "open_clip": exact.loss.item()}
    if precision != "fp32":
        losses["open_clip"] = open_clip_loss(features).loss.item()
    apart = 0.0
    checks: dict[str, tuple[Outcome, Outcome]] = {"engine": (engine(features), exact)}
    checks["clip_loss"] = (whole_loss(features), through_normalisation(exact, features))
    for side, (ours, expected) in checks.items():
        loss_apart, gradients_apart = difference(ours, expected)
        tolerance = ROUNDED_AGAIN if side == "clip_loss" and precision == "bf16" else LOSS_TOLERANCE
        assert loss_apart <= tolerance, f"{side}: the loss differs by {loss_apart:.1e} of ClipLoss's"
        assert gradients_apart <= GRADIENT_TOLERANCE[precision], f"{side}: gradients differ by {gradients_apart:.1e}"
        losses[side], apart = ours.loss.item(), max(apart, gradients_apart)
    return losses, apart


def size_lines(
    batches: Sequence[int], embed_dim: int, *, precision: Precision, num_rounds: int, command: str
) -> Iterator[str]:
    """Rows of `engine` by itself at each size, in a process each, and how its memory grows."""
    measured: list[tuple[int, Alone]] = []
    for num_pairs in batches:
        alone = measure_alone(_job("engine", num_pairs, embed_dim, precision, num_rounds))
        measured.append((num_pairs, alone))
        yield (
            f"{num_pairs} pairs: {figure(alone.ms)} ms, peak memory beyond inputs and gradients "
            f"{figure(alone.peak_mib)} MiB; one matrix of logits is {figure(4 * num_pairs**2 / 2**20)} MiB in fp32"
        )
        side = f"engine, {num_pairs} pairs"
        yield row(f"`{command}`", side, figure(alone.ms), "", "", "", "", figure(alone.peak_mib), "")
    (first, small), (last, large) = measured[0], measured[-1]
    if first != last and small.peak_bytes:
        power = math.log(large.peak_bytes / small.peak_bytes) / math.log(last / first)
        yield f"from {first} to {last} pairs memory grows as B^{power:.2f}"


def accuracy_lines(num_pairs: int, embed_dim: int) -> Iterator[str]:
    """The table of rounding errors, on at most 1,024 pairs."""
    num_pairs = min(num_pairs, _ERRORS_BATCH)
    yield f"error against fp64 with {num_pairs} pairs, fp32, root mean square over draws:"
    yield from error_lines(measure_errors(num_pairs, embed_dim))


def figure(value: float) -> str:
    """Milliseconds or MiB with three digits at least, without an exponent where they are many."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def describe(num_pairs: int, embed_dim: int) -> str:
    """The sizes and the scale, in words."""
    return f"{num_pairs} pairs of {embed_dim} features, scale {SCALE:.1f}, {torch.get_num_threads()} threads"


def _job(side: str, num_pairs: int, embed_dim: int, precision: Precision, num_calls: int) -> Job:
    return Job(side, num_pairs, embed_dim, precision, num_calls, torch.get_num_threads())


# ------------------------------------------------------------------------------------------- the products by themselves


@dataclass(frozen=True)
class Way:
    """How a product is multiplied: by what, in blocks of how many rows and columns of the logits."""

    multiply: Multiplication
    rows: int
    columns: int


class MatrixProducts:
    """Calling it multiplies as the loss must, no more: image @ text^T twice, weights @ text, weights^T @ image.

    In the features' dtype and in blocks, so that no B x B matrix is kept. When it is made each product is tried in
    every shape of SHAPES with every multiplication that torch has, and is done in the fastest way from then on: a loss
    in tiles has no easier measure than its own tiles, nor one that multiplies better than torch.mm than torch.mm.
    """

    SHAPES = ((512, 512), (1024, 1024), (2048, 512), (2048, 2048), (1024, None), (2048, None), (None, 1024))

    def __init__(self, image_BE: Tensor, text_BE: Tensor) -> None:
        self.image_BE, self.text_BE = image_BE, text_BE
        self.grad_image_BE, self.grad_text_BE = torch.zeros_like(image_BE), torch.zeros_like(text_BE)
        size = len(image_BE)
        shapes = sorted({(min(rows or size, size), min(columns or size, size)) for rows, columns in self.SHAPES})
        multiplications: list[Multiplication] = [torch.mm]
        if onednn_multiplies(image_BE.dtype):
            multiplications.append(_onednn)
        ways = [Way(multiply, *shape) for shape in shapes for multiply in multiplications]
        # The weights of any block, flat.
        largest = max(way.rows * way.columns for way in ways)
        self._weights = torch.rand(largest, generator=torch.Generator().manual_seed(1)).to(image_BE.dtype)
        self.ways = {
            product: min(ways, key=lambda way: self._pace(product, way))
            for product in (self.logits, self.grad_image, self.grad_text)
        }

    def __call__(self) -> None:
        for product in (self.logits, self.logits, self.grad_image, self.grad_text):
            way = self.ways[product]
            for rows in _blocks(len(self.image_BE), way.rows):
                for columns in _blocks(len(self.text_BE), way.columns):
                    product(way, rows, columns)

    def logits(self, way: Way, rows: slice, columns: slice) -> None:
        """One block of image @ text^T, which is dropped."""
        way.multiply(self.image_BE[rows], self.text_BE[columns].T)

    def grad_image(self, way: Way, rows: slice, columns: slice) -> None:
        """One block of weights @ text."""
        product_XE = way.multiply(self._block(rows, columns), self.text_BE[columns])
        _accumulate(self.grad_image_BE[rows], product_XE, columns.start == 0)

    def grad_text(self, way: Way, rows: slice, columns: slice) -> None:
        """One block of weights^T @ image."""
        product_YE = way.multiply(self._block(rows, columns).T, self.image_BE[rows])
        _accumulate(self.grad_text_BE[columns], product_YE, rows.start == 0)

    def _block(self, rows: slice, columns: slice) -> Tensor:
        shape = rows.stop - rows.start, columns.stop - columns.start
        return self._weights[: shape[0] * shape[1]].view(shape)

    def _pace(self, product: Callable[[Way, slice, slice], None], way: Way) -> float:
        """Milliseconds for each logit of one block, the better of two."""
        rows, columns = slice(0, way.rows), slice(0, way.columns)
        times = [milliseconds(lambda: product(way, rows, columns), "cpu") for _ in range(2)]
        return min(times) / (way.rows * way.columns)


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether it is there and has products of this dtype: of bf16 not on a CPU without AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn(one: Tensor, other: Tensor) -> Tensor:
    """one @ other by oneDNN, which torch.mm uses for bf16 only: float32 goes to MKL, slow on some machines."""
    return torch.ops.mkldnn._linear_pointwise(one, other.T, None, "none", [], "")  # type: ignore[no-any-return]


def _accumulate(total_XE: Tensor, product_XE: Tensor, is_first: bool) -> None:
    if is_first:
        total_XE.copy_(product_XE)
    else:
        total_XE.add_(product_XE)


def _blocks(size: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, size)) for start in range(0, size, length)]
