"""The contrastive losses' CUDA source, run on a CPU: the passes on the emulator, tile after tile as in launch.h."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaeva.ops import accumulate_dtype
from tests.kernels import simt_build
from tests.kernels.simt_build import CSRC, SEEDS, KernelFault, Kernels, compile_kernels

pytestmark = pytest.mark.slow
# In the order of csrc/common/scalar.h.
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF_WEIGHT_GAIN = 4096  # kHalfWeightGain of contrastive_cuda.h

# Rows, columns, rows and columns of a tile. A block takes 128 x 256: several blocks in a tile, several tiles, uneven
# ones last. Tiles 300 and 140 wide are read 16 bytes at once, those 253 and 1 wide element by element.
SHAPES = [(197, 440, 150, 300), (5, 506, 5, 253), (140, 1, 300, 300), (1, 7, 1, 3)]
FIRST = [-3, 250, 10_000]  # the first query's pair: left of the keys, in the first tile, nowhere


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compile_kernels("contrastive_on_cpu.cpp", tmp_path_factory.mktemp("simt"))


@dataclass
class Passes:
    """One pass over every tile of a matrix of inner products; running sums go from tile to tile."""

    kernels: Kernels
    features: torch.dtype
    product_BG: Tensor
    tile: tuple[int, int]
    seed: int

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        for rows in _slices(self.product_BG.shape[0], self.tile[0]):
            for columns in _slices(self.product_BG.shape[1], self.tile[1]):
                yield rows, columns, self.product_BG[rows, columns].clone(memory_format=torch.contiguous_format)

    def run(self, name: str, product_XY: Tensor, *arguments: Tensor | None, last: tuple[int | float, ...] = ()) -> None:
        rows, columns = product_XY.shape
        scalar, num_bytes = DTYPES.index(self.features), torch.tensor(0)
        self.kernels.call("scratch_for", rows, columns, num_bytes, seed=0)
        scratch = torch.empty(int(num_bytes) // 8, dtype=torch.float64)
        self.kernels.call(name, scalar, product_XY, *arguments, rows, columns, *last, scratch, seed=self.seed)

    def infonce_forward(self, scale: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        maxima = [torch.full((n,), -torch.inf, dtype=scale.dtype) for n in self.product_BG.shape]
        sums = [torch.zeros(n, dtype=torch.float64) for n in self.product_BG.shape]
        pair_query_B = torch.zeros(len(self.product_BG), dtype=scale.dtype)
        for rows, columns, product_XY in self.tiles():
            views = maxima[0][rows], sums[0][rows], maxima[1][columns], sums[1][columns], pair_query_B[rows]
            last = (first + rows.start - columns.start,)
            self.run("infonce_forward", product_XY, scale, *views, last=last)
        lse_query_B, lse_key_G = (s.log() + m for m, s in zip(maxima, sums, strict=True))
        return lse_query_B, lse_key_G, pair_query_B

    def infonce_backward(
        self, scale: Tensor, lse_query_B: Tensor, lse_key_G: Tensor, pair_query_B: Tensor, pair_key_G: Tensor,
        first: int, pair_weight: float, uniform: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight_BG = torch.empty_like(self.product_BG, dtype=torch.float64)
        share_B = torch.zeros(len(lse_query_B), dtype=torch.float64)
        of_queries, of_keys = _in_two(lse_query_B, scale.dtype), _in_two(lse_key_G, scale.dtype)
        for rows, columns, product_XY in self.tiles():
            numbers = [*(x[rows] for x in of_queries), *(x[columns] for x in of_keys)]
            numbers += [pair_query_B[rows], pair_key_G[columns], share_B[rows]]
            weight_XY = self.new_weight(product_XY)
            last = (first + rows.start - columns.start, pair_weight, uniform)
            self.run("infonce_backward", product_XY, weight_XY, scale, *numbers, last=last)
            weight_BG[rows, columns] = product_XY if weight_XY is None else weight_XY
        return self.without_gain(weight_BG), share_B

    def sigmoid_forward(self, scale: Tensor, bias: Tensor, first: int) -> Tensor:
        total_B = torch.zeros(self.product_BG.shape[0], dtype=torch.float64)
        for rows, columns, product_XY in self.tiles():
            last = (first + rows.start - columns.start,)
            self.run("sigmoid_forward", product_XY, scale, bias, total_B[rows], last=last)
        return total_B

    def sigmoid_backward(self, scale: Tensor, bias: Tensor, first: int) -> tuple[Tensor, Tensor]:
        weight_BG = torch.empty_like(self.product_BG, dtype=torch.float64)
        share_2B = torch.zeros(2, self.product_BG.shape[0], dtype=torch.float64)
        for rows, columns, product_XY in self.tiles():
            weight_XY = self.new_weight(product_XY)
            last = (first + rows.start - columns.start,)
            shares = share_2B[0, rows], share_2B[1, rows]
            self.run("sigmoid_backward", product_XY, weight_XY, scale, bias, *shares, last=last)
            weight_BG[rows, columns] = product_XY if weight_XY is None else weight_XY
        return self.without_gain(weight_BG), share_2B

    def new_weight(self, product_XY: Tensor) -> Tensor | None:
        if self.features == product_XY.dtype:
            return None  # in place of the product
        return torch.full_like(product_XY, torch.nan, dtype=self.features)

    def without_gain(self, weight_BG: Tensor) -> Tensor:
        return weight_BG / (HALF_WEIGHT_GAIN if self.features == torch.float16 else 1)


def _in_two(lse: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    return lse.to(wide), (lse - lse.to(wide)).to(wide)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _products(dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Products of features of `dtype`; a few are far above the others, as after training."""
    generator = torch.Generator().manual_seed(rows)
    product_BG = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    product_BG.diagonal(1 if columns > 1 else 0).add_(5)
    return product_BG.to(accumulate_dtype(dtype))


def _rounding(dtype: torch.dtype, logit_BG: Tensor) -> float:
    """What rounding the largest logit, and the arithmetic with it, may change a logit by."""
    return 4 * torch.finfo(accumulate_dtype(dtype)).eps * max(1.0, float(logit_BG.abs().max()))


def _assert_weights(dtype: torch.dtype, weight_BG: Tensor, exact_BG: Tensor, rounding: float) -> None:
    # A probability is off by itself times its logit's error, and is rounded to the weights' type.
    tolerance_BG = 2 * rounding + torch.finfo(dtype).eps * exact_BG.abs()
    assert bool(((weight_BG - exact_BG).abs() <= tolerance_BG).all())


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_sum_exps(kernels: Kernels, shape: tuple[int, int, int, int], dtype: torch.dtype, scale: float) -> None:
    rows, columns, *tile = shape
    product_BG = _products(dtype, rows, columns)
    scale_tensor = torch.tensor(scale, dtype=dtype)
    logit_BG = scale_tensor.double() * product_BG.double()
    for seed, first in zip(SEEDS if scale == 100 else FIRST, itertools.cycle(FIRST), strict=False):
        passes = Passes(kernels, dtype, product_BG, tuple(tile), seed)
        lse_query_B, lse_key_G, pair_query_B = passes.infonce_forward(scale_tensor, first)
        exact_pair_B = torch.zeros_like(pair_query_B)
        exact_pair_B[max(0, -first) :][: max(0, columns - max(0, first))] = (scale_tensor * product_BG).diagonal(first)
        assert torch.equal(pair_query_B, exact_pair_B)
        rounding = _rounding(dtype, logit_BG)
        torch.testing.assert_close(lse_query_B, logit_BG.logsumexp(1), rtol=0, atol=rounding)
        torch.testing.assert_close(lse_key_G, logit_BG.logsumexp(0), rtol=0, atol=rounding)


@pytest.mark.parametrize(
    "case", ["equal", "huge", "huge negative", "infinite", "minus infinite", "not a number", "nothing but infinite"]
)
def test_log_sum_exps_of_what_training_never_sees(kernels: Kernels, case: str) -> None:
    product_BG = _products(torch.float32, 150, 280)
    values = {"huge": 1e30, "huge negative": -1e30, "infinite": torch.inf, "not a number": torch.nan}
    if case == "equal":
        product_BG.fill_(-7.5)
    elif case == "minus infinite":
        product_BG[3] = -torch.inf
        product_BG[:, 5] = -torch.inf
    elif case == "nothing but infinite":
        product_BG[3] = torch.inf
        product_BG[:, 5] = torch.inf
    else:
        product_BG[3, 5] = product_BG[140, 279] = values[case]
    logit_BG = 100 * product_BG.double()
    passes = Passes(kernels, torch.float32, product_BG, (140, 200), 0)
    lse_query_B, lse_key_G, pair_query_B = passes.infonce_forward(torch.tensor(100.0), 2)
    for mine, exact in (
        (lse_query_B, logit_BG.logsumexp(1)),
        (lse_key_G, logit_BG.logsumexp(0)),
        (pair_query_B.double(), logit_BG.diagonal(2)),
    ):
        torch.testing.assert_close(mine, exact, rtol=4 * torch.finfo(torch.float32).eps, atol=2e-4, equal_nan=True)


# Random features, and matched ones: where training ends, and InfoNCE's loss is 0.003 at scale 14.3.
@pytest.mark.parametrize("scale_value", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("matched", [0.0, 1.0], ids=["random", "matched"])
@pytest.mark.parametrize("bias_value", [None, -10.0], ids=["infonce", "sigmoid"])
def test_error_against_fp64_is_at_most_twice_plain_pytorch(
    kernels: Kernels, bias_value: float | None, matched: float, scale_value: float
) -> None:
    scale, count, losses = torch.tensor(scale_value), 0, []
    bias = None if bias_value is None else torch.tensor(bias_value)
    squares = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(12):  # sums are single numbers: compared over many draws
        num = 270 + seed
        product_BB = 0.13 * torch.randn(num, num, generator=torch.Generator().manual_seed(seed))
        product_BB.diagonal().add_(1.05 * matched)
        exact = _plain(product_BB.double(), scale.double(), None if bias is None else bias.double())
        passes = Passes(kernels, torch.float32, product_BB, (150, 300), seed)
        for side, outputs in enumerate((_of_passes(passes, scale, bias), _plain(product_BB, scale, bias))):
            count = len(outputs)
            for i, (value, true) in enumerate(zip(outputs, exact, strict=True)):
                squares[side, i] += (value.double() - true).square().sum()
        losses.append(float(exact[0].mean()))
    if matched and scale_value == 14.3 and bias is None:
        assert sum(losses) / len(losses) == pytest.approx(0.003, rel=0.3)
    mine, plain = squares.sqrt()[:, :count]
    assert bool((mine <= 2 * plain).all()), (sum(losses) / len(losses), mine, plain)


def test_a_small_loss_keeps_its_digits(kernels: Kernels) -> None:
    # 2e-4: next to the 1 of a pair, the rest of a float sum has three digits left.
    product_BB = 0.01 * torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    product_BB.diagonal().add_(1)
    scale = torch.tensor(14.3)
    exact_2B, _, _ = _plain(product_BB.double(), scale.double(), None)
    losses_2B = _of_passes(Passes(kernels, torch.float32, product_BB, (150, 280), 1), scale, None)[0]
    assert float(exact_2B.mean()) == pytest.approx(2e-4, rel=0.2)
    assert bool(((losses_2B - exact_2B).abs() <= _rounding(torch.float32, scale * product_BB) * exact_2B).all())


def _plain(product_BB: Tensor, scale: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Losses (or their total), gradient of their sum by logit, derivatives by log(scale) and bias."""
    leaves = [x.clone().requires_grad_() for x in (scale, bias) if x is not None]
    logit_BB = leaves[0] * product_BB
    if bias is None:
        here = torch.arange(len(product_BB))
        sides = (torch.nn.functional.cross_entropy(x_BB, here, reduction="none") for x_BB in (logit_BB, logit_BB.T))
        losses = torch.cat([*sides])
    else:
        logit_BB = logit_BB + leaves[1]
        sign_BB = 2 * torch.eye(len(product_BB), dtype=product_BB.dtype) - 1
        losses = -torch.nn.functional.logsigmoid(sign_BB * logit_BB).sum()[None]
    weight_BB, by_scale, *by_bias = torch.autograd.grad(losses.sum(), [logit_BB, *leaves])
    return [losses.detach(), weight_BB, by_scale * scale, *by_bias]


def _of_passes(passes: Passes, scale: Tensor, bias: Tensor | None) -> list[Tensor]:
    """What `_plain` returns, from the passes."""
    if bias is not None:
        weight_BB, share_2B = passes.sigmoid_backward(scale, bias, 0)
        return [passes.sigmoid_forward(scale, bias, 0).sum()[None], weight_BB, *share_2B.sum(1)]
    lse_query_B, lse_key_B, pair_B = passes.infonce_forward(scale, 0)
    weight_BB, share_B = passes.infonce_backward(scale, lse_query_B, lse_key_B, pair_B, pair_B, 0, 2.0, 0.0)
    return [torch.cat([lse_query_B - pair_B, lse_key_B - pair_B]), weight_BB, share_B.sum()]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_of_infonce(kernels: Kernels, shape: tuple[int, int, int, int], dtype: torch.dtype, first: int) -> None:
    rows, columns, *tile = shape
    wide = accumulate_dtype(dtype)
    product_BG = _products(dtype, rows, columns)
    scale = torch.tensor(14.3, dtype=wide)
    logit_BG = scale.double() * product_BG.double()
    # Vectors as the operator gets them: of more keys than these, and logits of pairs that may lie elsewhere.
    lse_query_B, lse_key_G = (logit_BG.logsumexp(dim).add(0.7) for dim in (1, 0))
    pair_query_B, pair_key_G = logit_BG[:, 0].to(wide).contiguous(), logit_BG[0].to(wide).contiguous()
    pair_weight, uniform = 1.9, 0.1 / columns

    by_query_BG = (logit_BG - lse_query_B[:, None]).exp() - uniform
    by_key_BG = (logit_BG - lse_key_G).exp()
    exact_share_B = (by_query_BG * (logit_BG - pair_query_B.double()[:, None])).sum(1)
    exact_share_B += (by_key_BG * (logit_BG - pair_key_G.double())).sum(1)
    exact_BG = by_query_BG + by_key_BG
    exact_BG.diagonal(first).sub_(pair_weight)

    rounding = _rounding(dtype, logit_BG)
    largest = max(1.0, 2 * float(logit_BG.abs().max()))
    results = []
    for seed in SEEDS[:2]:
        passes = Passes(kernels, dtype, product_BG, tuple(tile), seed)
        weight_BG, share_B = passes.infonce_backward(
            scale, lse_query_B, lse_key_G, pair_query_B, pair_key_G, first, pair_weight, uniform
        )
        _assert_weights(dtype, weight_BG, exact_BG, rounding)
        absolute_B = (by_query_BG.abs() + by_key_BG.abs()).sum(1)  # of what is multiplied by a logit and summed
        assert bool(((share_B - exact_share_B).abs() <= rounding * (1 + 2 * largest) * absolute_B).all())
        results.append((weight_BG, share_B))
    for weight_BG, share_B in results[1:]:
        assert torch.equal(weight_BG, results[0][0])
        assert torch.equal(share_B, results[0][1])


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid(kernels: Kernels, shape: tuple[int, int, int, int], dtype: torch.dtype, first: int) -> None:
    rows, columns, *tile = shape
    wide = accumulate_dtype(dtype)
    product_BG = _products(dtype, rows, columns)
    scale, bias = torch.tensor(14.3, dtype=wide), torch.tensor(-9.7, dtype=wide)
    without_bias_BG = scale.double() * product_BG.double()
    logit_BG = without_bias_BG + bias.double()
    sign_BG = torch.full_like(logit_BG, -1)
    sign_BG.diagonal(first).fill_(1)
    loss_BG = -torch.nn.functional.logsigmoid(sign_BG * logit_BG)
    exact_BG = -sign_BG * torch.sigmoid(-sign_BG * logit_BG)

    rounding = _rounding(dtype, torch.maximum(logit_BG.abs(), without_bias_BG.abs()))
    results = []
    for seed in SEEDS[:2]:
        passes = Passes(kernels, dtype, product_BG, tuple(tile), seed)
        total_B = passes.sigmoid_forward(scale, bias, first)
        # The loss's slope by its logit is at most 1, and is the weight.
        total_tolerance_B = rounding * exact_BG.abs().sum(1) + rounding * loss_BG.sum(1)
        assert bool(((total_B - loss_BG.sum(1)).abs() <= total_tolerance_B).all())
        weight_BG, share_2B = passes.sigmoid_backward(scale, bias, first)
        _assert_weights(dtype, weight_BG, exact_BG, rounding)
        exact_share_2B = torch.stack([(exact_BG * without_bias_BG).sum(1), exact_BG.sum(1)])
        share_tolerance_2B = rounding * (1 + without_bias_BG.abs().max()) * exact_BG.abs().sum(1)
        assert bool(((share_2B - exact_share_2B).abs() <= share_tolerance_2B).all())
        results.append((total_B, weight_BG, share_2B))
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(later, results[0], strict=True))


def test_half_weights_of_a_large_batch_are_not_lost(kernels: Kernels) -> None:
    # One of 262,144 keys: two probabilities of 4e-6, where half has two digits left.
    product_BG = torch.zeros(4, 8)
    lse, pair = torch.full((8,), 262_144.0, dtype=torch.float64).log(), torch.zeros(8)
    passes = Passes(kernels, torch.float16, product_BG, (4, 8), 0)
    weight_BG, _ = passes.infonce_backward(torch.tensor(1.0), lse[:4], lse, pair[:4], pair, 100, 2.0, 0.0)
    assert weight_BG.numpy() == pytest.approx(2 / 262_144, rel=torch.finfo(torch.float16).eps)


def test_a_missing_barrier_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (CSRC / "contrastive" / "contrastive_cuda.cu").read_text(encoding="utf-8")
    assert source.count("__syncthreads();") == 1
    (tmp_path / "contrastive").mkdir()
    broken = tmp_path / "contrastive" / "contrastive_cuda.cu"
    broken.write_text(source.replace("__syncthreads();", ""), encoding="utf-8")
    monkeypatch.setattr(simt_build, "CSRC", tmp_path)
    for folder in ("common", "contrastive"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for header in (CSRC / folder).glob("*.h"):
            (tmp_path / folder / header.name).write_text(header.read_text(encoding="utf-8"), encoding="utf-8")
    passes = Passes(compile_kernels("contrastive_on_cpu.cpp", tmp_path), torch.float32, torch.ones(40, 9), (40, 9), 1)
    with pytest.raises(KernelFault, match="shared_max"):
        passes.infonce_forward(torch.tensor(1.0), 0)
