"""The gradient buffers: written by the first gradient of a step, added to by the next, zero where none comes."""

import pytest
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megaeva.config.schema import ParallelSection
from megaeva.parallel.wrap import Tower, reduce_gradients, wrap, zero_gradients
from tests.helpers.tiny import single_grid


class TwoPaths(MegatronModule):
    """y = (left or right) * x."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, cuda_graph_scope=[]))
        self.left = nn.Parameter(torch.ones(3, dtype=dtype))
        self.right = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, x: Tensor, path: str) -> Tensor:
        return (getattr(self, path) * x).sum()


def _step(tower: Tower, *passes: tuple[float, str]) -> tuple[list[float], list[float]]:
    zero_gradients([tower])
    for factor, path in passes:
        tower.ddp(torch.full((3,), factor, dtype=tower.module.left.dtype), path).backward()
    reduce_gradients([tower])
    assert tower.module.left.grad is None and tower.module.right.grad is None
    left, right = (p.main_grad.tolist() for p in (tower.module.left, tower.module.right))
    return left, right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_step_alone(dtype: torch.dtype) -> None:
    tower = wrap("both", TwoPaths(dtype), single_grid(), ParallelSection())
    assert tower.module.left.main_grad.dtype == torch.float32
    assert _step(tower, (2.0, "left"), (3.0, "right")) == ([2.0] * 3, [3.0] * 3)
    assert _step(tower, (5.0, "left"), (7.0, "left")) == ([12.0] * 3, [0.0] * 3)
    assert _step(tower, (0.5, "right")) == ([0.0] * 3, [0.5] * 3)
    assert _step(tower) == ([0.0] * 3, [0.0] * 3)


def test_microbatches_add_up_in_fp32() -> None:
    tower = wrap("both", TwoPaths(torch.bfloat16), single_grid(), ParallelSection())
    left, _ = _step(tower, (256.0, "left"), *[(1.0, "left")] * 3)  # in bf16 256 + 1 is 256
    assert left == [259.0] * 3
