"""The FP8 rehearsal: numbers of Transformer Engine's definitions, and of an H100 where mmaemu knows them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import ml_dtypes
import mmaemu
import numpy as np
import pytest
import torch
from torch import Tensor

from megaeva.bench.fp8_gemm import compare, h100
from megaeva.config.schema import Fp8Section
from megaeva.model.fp8 import EmulatedFp8
from megaeva.ops import fp8 as ops
from megaeva.ops.fp8 import E4M3, E5M2, Quantised, transposed

Recipe = Literal["delayed", "current", "mxfp8", "blockwise"]
RECIPES = get_args(Recipe)
NUMPY = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


# ----------------------------------------------------------------------------------------------------- one matrix


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_cast_of_every_bf16_value(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = every[~every.isnan()]
    limit = {E4M3: 448.0, E5M2: 57344.0}[dtype]
    expected = np.clip(numbers.float().numpy(), -limit, limit).astype(NUMPY[dtype])
    assert np.array_equal(bits(ops.cast(numbers, dtype)).numpy(), expected.view(np.uint8))
    assert ops.cast(every[every.isnan()], dtype).float().isnan().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_table_holds_every_fp8_value(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)
    for values in (every, every.T, every[:, ::2]):
        assert torch.equal(ops.decoded(values).nan_to_num(1e9), values.float().nan_to_num(1e9))


def test_current_scale_is_largest_by_amax() -> None:
    amax = torch.tensor([0.0, math.inf, math.nan, 1e-45, 3.0, 448.0, 500.0])
    huge = torch.finfo(torch.bfloat16).max
    exact = [1.0, 1.0, 1.0, huge, *(float(np.float32(448) / np.float32(x)) for x in (3, 448, 500))]
    assert ops.current_scale(amax, E4M3, of=torch.bfloat16).tolist() == exact
    powers = ops.current_scale(amax, E4M3, of=torch.bfloat16, power_of_two=True)
    assert powers.tolist() == [2.0 ** math.floor(math.log2(scale)) for scale in exact]


def test_mx_scale_is_the_power_of_two_that_fits() -> None:
    amax = torch.cat([torch.logspace(-30, 30, 997), torch.tensor([448.0, 449.0, 0.0, math.inf])])
    scale = ops.mx_scale(amax, E4M3)
    ordinary, got = amax[:-2].double(), scale[:-2].double()
    assert torch.equal(got.log2(), got.log2().round())
    assert (ordinary * got <= 448 * (1 + 1e-6)).all()
    assert (ordinary * got * 2 > 448).all(), "a power of two more fits too"
    assert scale[-2:].tolist() == [2.0**127, 2.0**-127]


def history_by_hand(entries: list[float], length: int, algorithm: str, margin: int) -> float:
    """The scale after these largest values, as the documentation of DelayedScaling has it."""
    scale = 1.0
    for step in range(1, len(entries) + 1):
        amax = entries[step - 1] if algorithm == "most_recent" else max(entries[max(0, step - length) : step])
        if 0 < amax < math.inf:
            scale = min(float(np.float32(448 / 2**margin) / np.float32(amax)), float(np.finfo(np.float32).max))
    return scale


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize(("length", "margin"), [(1, 0), (3, 0), (3, 2)])
@pytest.mark.filterwarnings("ignore:overflow")
def test_delayed_scale_looks_back_on_the_last_steps(
    algorithm: Literal["max", "most_recent"], length: int, margin: int
) -> None:
    columns = [[2.0, 8.0, 1.0, 1.0, 1.0, 4.0], [0.0, 0.0, 5.0, 0.0, 0.0, 0.0], [1.0, math.inf, 3.0, 3.0, 3.0, 1e-45]]
    history, scale = torch.zeros(length, 3), torch.ones(3)
    for step in range(6):
        amax = torch.tensor([column[step] for column in columns])
        before = history.clone(), scale.clone()
        new = ops.delayed_scale(history, amax, scale, torch.full((3,), 448.0), margin=margin, algorithm=algorithm)
        assert torch.equal(history, before[0]) and torch.equal(scale, before[1]), "a save may still read them"
        history, scale = new
        assert scale.tolist() == [
            pytest.approx(history_by_hand(column[: step + 1], length, algorithm, margin), rel=1e-7)
            for column in columns
        ]


@pytest.mark.parametrize("block", [(1, 32), (32, 1), (128, 128)])
def test_blocks_are_quantised_alone(block: tuple[int, int]) -> None:
    x = normal(257, 200) * torch.logspace(-3, 3, 200).bfloat16()

    def scale_of(amax: Tensor) -> Tensor:
        return ops.current_scale(amax, E4M3, of=torch.bfloat16, power_of_two=True)

    whole = ops.quantise_blocks(x, block, E4M3, scale_of).dequantised()
    for row in range(0, 257, block[0]):
        for column in range(0, 200, block[1]):
            here = slice(row, row + block[0]), slice(column, column + block[1])
            alone = ops.quantise(x[here], scale_of(ops.amax(x[here])), E4M3).dequantised()
            assert torch.equal(whole[here], alone)


# ----------------------------------------------------------------------------------------------------- one linear


def passes(fp8: EmulatedFp8, x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor) -> list[Tensor]:
    """Output, and gradients of what there is."""
    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
    out = fp8(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    out.backward(gradient)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def emulated(recipe: Recipe, **keys: Any) -> EmulatedFp8:
    """After a step on normal values, so that recipe=delayed has scales."""
    fp8 = EmulatedFp8(Fp8Section.model_validate({"recipe": recipe} | keys))
    fp8.begin_step()
    passes(fp8, normal(96, 64), normal(80, 64, scale=0.1), None, normal(96, 80, scale=1e-3))
    fp8.leave_step()
    fp8.end_step(fp8.amax)
    return fp8


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
def test_three_products_of_quantised_factors(recipe: Recipe, fp8_format: str) -> None:
    fp8 = emulated(recipe, format=fp8_format)
    x, weight, bias = normal(3, 257, 64, seed=1), normal(80, 64, scale=0.1, seed=2), normal(80, seed=3)
    gradient = normal(3, 257, 80, scale=1e-3, seed=4)
    out, of_x, of_weight, of_bias = passes(fp8, x, weight, bias, gradient)
    rows = {"input": x.view(-1, 64), "weight": weight, "gradient": gradient.view(-1, 80)}
    (x_q, x_t), (w_q, w_t), (g_q, g_t) = (fp8.operands(role, rows[role]) for role in ("input", "weight", "gradient"))
    assert {q.values.dtype for q in (x_q, x_t, w_q, w_t)} == {E4M3}
    assert {q.values.dtype for q in (g_q, g_t)} == {E5M2 if fp8_format == "hybrid" else E4M3}
    X, Xt, W, Wt, G, Gt = (q.dequantised().double() for q in (x_q, x_t, w_q, w_t, g_q, g_t))
    for ours, exact in (
        (out.view(-1, 80), X @ W.T + bias.double()),
        (of_x.view(-1, 64), G @ Wt),
        (of_weight, Gt.T @ Xt),
    ):
        rounded = exact.float().bfloat16()
        assert (bits(ours) == bits(rounded)).double().mean() > 0.99
        assert torch.allclose(ours.float(), rounded.float(), rtol=2**-7, atol=1e-6 * exact.abs().max().item())
    assert torch.equal(of_bias, rows["gradient"].sum(0)), "of what is not quantised"
    for q, role in ((x_q, "input"), (w_q, "weight")):
        error = (q.dequantised() - rows[role].float()).norm() / rows[role].float().norm()
        assert 0.01 < error < 0.04, f"E4M3 has three bits: {role} {error}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_rows_change_nothing(recipe: Recipe) -> None:
    """A GPU pads 257 rows to a multiple of 32; its padding is zero."""
    fp8 = emulated(recipe)
    x, weight, gradient = normal(257, 64, seed=1), normal(80, 64, scale=0.1), normal(257, 80, scale=1e-3)
    out, of_x, of_weight = passes(fp8, x, weight, None, gradient)
    pad = (0, 0, 0, 31)
    padded = passes(fp8, torch.nn.functional.pad(x, pad), weight, None, torch.nn.functional.pad(gradient, pad))
    assert torch.equal(padded[0][:257], out) and torch.equal(padded[1][:257], of_x)
    assert torch.equal(padded[0][257:], torch.zeros(31, 80).bfloat16())
    assert torch.allclose(padded[2].float(), of_weight.float(), rtol=2**-7, atol=1e-9)


def test_weight_is_quantised_once_a_step_and_not_kept_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = EmulatedFp8(Fp8Section(recipe="current"))
    seen: list[str] = []
    original = EmulatedFp8.operands
    monkeypatch.setattr(EmulatedFp8, "operands", lambda self, role, x: seen.append(role) or original(self, role, x))
    x, weight, gradient = normal(32, 64), normal(80, 64), normal(32, 80)
    for changed in (weight, 2 * weight):
        fp8.begin_step()
        outs = [passes(fp8, x, changed, None, gradient)[0] for _ in range(3)]
        fp8.leave_step()
        assert torch.equal(outs[0], outs[2])
        assert torch.allclose(outs[0].float(), x.float() @ changed.float().T, rtol=0.2, atol=3.0)
    assert seen.count("weight") == 2 and seen.count("input") == 6


# ------------------------------------------------------------------------------------------------------- an H100


@contextmanager
def accumulator_of_an_h100(*, fast: bool) -> Iterator[None]:
    def accumulated(a_MK: Tensor, b_KN: Tensor) -> Tensor:
        b_NK = b_KN.T.contiguous()
        return mmaemu.accumulate(a_MK.contiguous(), b_NK, use_fast_accum=fast, profile="hopper-te", splitk=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "accumulated", accumulated)
        yield


def independent(x: Tensor, dtype: torch.dtype) -> Quantised:
    """Current scaling by numpy and ml_dtypes."""
    values = x.float().numpy()
    scale = np.float32(ops.largest(dtype)) / np.abs(values).max()
    cast = (values * scale).clip(-ops.largest(dtype), ops.largest(dtype)).astype(NUMPY[dtype])
    return Quantised(torch.from_numpy(cast.view(np.uint8)).view(dtype), torch.tensor(np.float32(1) / scale))


def test_linear_has_the_bits_of_an_h100_but_for_the_accumulator() -> None:
    fp8 = EmulatedFp8(Fp8Section(recipe="current"))
    x, weight, gradient = normal(64, 192), normal(96, 192, scale=0.07, seed=1), normal(64, 96, scale=1e-3, seed=2)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with accumulator_of_an_h100(fast=True):
        out = fp8(*leaves, None)
    with accumulator_of_an_h100(fast=False):
        out.backward(gradient)
    x_q, w_q, g_q = independent(x, E4M3), independent(weight, E4M3), independent(gradient, E5M2)
    for ours, theirs in (
        (out.detach(), h100(x_q, transposed(w_q), fast=True)),
        (leaves[0].grad, h100(g_q, w_q, fast=False)),
        (leaves[1].grad, h100(transposed(g_q), x_q, fast=False)),
    ):
        assert ours is not None and torch.equal(bits(ours), bits(theirs))


def test_linear_has_the_bits_of_an_h100_where_no_sum_is_cut_off() -> None:
    for comparison in compare("delayed", 64, 192, 96):
        assert comparison.equal == 1 and comparison.units == 0, comparison


def test_elsewhere_it_is_a_unit_in_the_last_place_from_an_h100() -> None:
    for comparison in compare("current", 64, 192, 96):
        print(comparison)
        assert comparison.units <= 1, comparison
        assert 0.9 < comparison.equal < 1, comparison
        assert comparison.error < 1, "an H100 is further from the exact sum"
