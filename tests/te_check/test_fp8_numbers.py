"""The rehearsal's quantisation against Transformer Engine's own in Python, which stands beside its kernels."""

import math
from typing import Any

import pytest
import torch
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch.custom_recipes.reference_current_scaling import (
    CurrentScalingQuantizerRef,
    _scale_from_amax_tensor,
)
from transformer_engine.pytorch.quantization import _amax_and_scale_update

from megaeva.ops.fp8 import E4M3, E5M2, amax, current_scale, delayed_scale, largest, quantise


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize(("length", "margin"), [(1, 0), (4, 0), (4, 3)])
def test_histories_and_scales_of_delayed_scaling(algorithm: Any, length: int, margin: int) -> None:
    recipe = recipes.DelayedScaling(margin=margin, amax_history_len=length, amax_compute_algo=algorithm)
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(9, 5, generator=generator) * 10
    steps[2:7, 1], steps[4, 2], steps[:, 3] = 0.0, math.inf, 1e-45
    history, scale = torch.zeros(length, 5), torch.ones(5)
    their_history, their_scale = history.clone(), scale.clone()
    for step in steps:
        their_history[0] = step  # where its kernels leave the largest value of the step
        _amax_and_scale_update(their_history, their_scale, 448.0, recipe)
        history, scale = delayed_scale(
            history, step, scale, torch.full((5,), 448.0), margin=margin, algorithm=algorithm
        )
        # Its Python divides a number by a tensor, which torch rounds twice; its kernel once, as ours.
        assert torch.allclose(scale, their_scale, rtol=2e-7, atol=0.0)
        if length > 1:
            assert torch.equal(history, their_history)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_values_of_current_scaling(dtype: torch.dtype) -> None:
    x = (torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.3).bfloat16()
    theirs, their_inverse, *_ = CurrentScalingQuantizerRef(dtype)._quantize(x)
    ours = quantise(x, current_scale(amax(x), dtype, of=x.dtype), dtype)
    assert theirs is not None
    assert torch.equal(ours.values.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(ours.inverse, their_inverse.squeeze())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_from_largest_values(power_of_two: bool) -> None:
    values = torch.cat([torch.logspace(-37, 38, 400), torch.tensor([0.0, 448.0])])
    theirs, _, _ = _scale_from_amax_tensor(torch.float32, values, E4M3, eps=0.0, pow_2_scales=power_of_two)
    ours = current_scale(values, E4M3, of=torch.float32, power_of_two=power_of_two)
    assert torch.allclose(ours, theirs, rtol=0.0 if power_of_two else 2e-7, atol=0.0)
    assert largest(E4M3) == 448
