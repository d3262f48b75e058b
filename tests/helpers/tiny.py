"""Shrunken copies of the variants: every flag kept, every width tiny. And what tests do with towers."""

from typing import Any

import torch
from torch import Tensor, nn

from megaeva.config.schema import AxesSection, ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.parallel import runtime
from megaeva.parallel.grid import Grid, build_grid
from megaeva.parallel.shards import full_shape, gather_full, slice_full


def tiny(variant: str, **vision: Any) -> ModelSection:
    """VARIANTS[variant] at 3 + 2 layers of width 32, a 4 x 4 grid of patches and 60 words; `vision` keys on top.

    tp may be 1 or 2. Numbers that could be confused (widths, heads, hidden sizes) differ.
    """
    full = ModelSection.model_validate(VARIANTS[variant])
    size: dict[str, Any] = {
        "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "ffn_hidden_size": 44,
    }  # fmt: skip
    text = {"context_length": 10, "vocab_size": 60, "hidden_size": 48, "num_layers": 2, "num_heads": 6}
    return full.model_copy(
        update={
            "embed_dim": 20,
            "vision": full.vision.model_copy(update=size | vision),
            "text": full.text.model_copy(update=text | {"ffn_hidden_size": 4 * 48}),
        }
    )


def single_grid() -> Grid:
    """The grid of a process that is a job of one; starts the runtime where it does not run yet."""
    return build_grid(AxesSection(), runtime.start("cpu"))


def full_shapes(module: nn.Module, tp_size: int = 1) -> dict[str, torch.Size]:
    """Names and tp=1 shapes of all parameters."""
    return {name: full_shape(param, tp_size) for name, param in module.named_parameters()}


@torch.no_grad()
def load_full(module: nn.Module, state: dict[str, Tensor], grid: Grid) -> None:
    """Fills every parameter from a tp=1 state dict; a name that is missing or too many fails."""
    params = dict(module.named_parameters())
    assert params.keys() == state.keys(), params.keys() ^ state.keys()
    for name, param in params.items():
        param.copy_(slice_full(state[name], param, grid.tp_rank, grid.tp_size))


def random_state(shapes: dict[str, torch.Size], seed: int = 0) -> dict[str, Tensor]:
    """Weights that hide nothing: norms are not one, biases not zero, products of tensors stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in sorted(shapes.items()):
        value = torch.randn(shape, generator=generator)
        fan_in = shape[1:].numel() if len(shape) > 1 else 1
        if len(shape) < 2:
            value = 0.3 * value + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "embed" not in name and "token" not in name:
            value = value / fan_in**0.5
        else:
            value = 0.5 * value
        state[name] = value
    return state


def full_gradients(module: nn.Module, grid: Grid) -> dict[str, Tensor]:
    """The tp=1 gradient of every parameter; all tp ranks must call it."""
    grads = {}
    for name, param in module.named_parameters():
        assert param.grad is not None, f"no gradient reached {name}"
        grads[name] = gather_full(param.grad, param, grid)
    return grads


def example_images(cfg: ModelSection, batch: int = 3) -> Tensor:
    """Fixed random images [batch, 3, H, W] for the model."""
    size = cfg.vision.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def example_tokens(cfg: ModelSection, batch: int = 3) -> Tensor:
    """Captions of different lengths [batch, L]: the end token is the largest id, the rest is 0."""
    generator = torch.Generator().manual_seed(2)
    length = cfg.text.context_length
    token_BL = torch.randint(1, cfg.text.vocab_size - 1, (batch, length), generator=generator)
    for row in range(batch):
        end = length - 2 - row
        token_BL[row, end] = cfg.text.vocab_size - 1
        token_BL[row, end + 1 :] = 0
    return token_BL
