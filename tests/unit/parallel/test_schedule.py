"""Gradient scale of the second pass, where rounding would show it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import nn

from megaeva.config.schema import AxesSection
from megaeva.parallel.grid import build_grid
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.schedule import Part, _second_pass
from megaeva.parallel.wrap import Tower


@pytest.mark.parametrize("num_microbatches", [61, 64])
def test_bf16_features_lose_nothing_to_the_number_of_microbatches(runtime: Runtime, num_microbatches: int) -> None:
    """In bf16, 61 * (1 / 61) is 0.996. Each microbatch adds exactly 1 to the gradient here."""
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, cuda_graph_scope=[])
    module: Any = SimpleNamespace(config=config)
    tower = Tower("vision", module, module, build_grid(AxesSection(), runtime))
    batches = [torch.ones(1, 1)] * num_microbatches
    part = Part(tower, batches, lambda batch, hidden, chunk: weight * 1, num_stage_tokens=1, embed_dim=1)
    _second_pass(part, torch.ones(num_microbatches, 1, dtype=torch.bfloat16), lambda index: None)
    assert weight.grad is not None
    assert weight.grad.item() == num_microbatches
