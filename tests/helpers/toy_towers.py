"""Towers of three linears with every kind of parameter: replicated, column-, row-split and gated, and a 0-dim scale.

For tests of the optimizer and of checkpoints, which must not wait for a real tower's forward pass.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megaeva.config.schema import AxesSection, Config, ParallelSection
from megaeva.parallel.grid import Grid, build_grid
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.shards import full_shape, slice_full
from megaeva.parallel.wrap import Tower, reduce_gradients, wrap, zero_gradients

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip

SAMPLES = 8


def make_config(run_dir: str = "unused", **optim: Any) -> Config:
    """A recipe whose model section is a label only; towers here do not follow it."""
    vision: dict[str, Any] = {
        "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 16,
        "activation": "gelu", "qkv_bias": "none",
    }  # fmt: skip
    text = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 16}
    parallel = {"distributed_optimizer": optim.pop("distributed_optimizer", True)}
    precision = optim.pop("precision", "fp32")
    return Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": run_dir,
            "model": {"embed_dim": 4, "vision": vision, "text": text},
            "parallel": parallel,
            "optim": {
                "vision": {"lr": 1e-2, "layer_decay": 0.8},
                "text": {"lr": 2e-2, "layer_decay": 0.5},
                "weight_decay": 0.1,
            }
            | optim,
            "train": {"total_samples": 80, "global_batch_size": SAMPLES, "precision": precision},
        }
    )


class _Block(nn.Module):
    def __init__(self, width: int, config: TransformerConfig, grid: Grid) -> None:
        super().__init__()
        common: dict[str, Any] = {
            "config": config, "init_method": nn.init.normal_, "bias": True, "skip_bias_add": False,
            "tp_group": grid.groups.tp,
        }  # fmt: skip
        self.mlp = nn.Module()
        self.mlp.linear_fc1 = ColumnParallelLinear(width, 4 * width, gather_output=False, stride=2, **common)
        self.mlp.linear_fc1.bias.partition_stride = 2
        self.mlp.linear_fc2 = RowParallelLinear(2 * width, width, input_is_parallel=True, **common)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.mlp.linear_fc1(x)[0].chunk(2, dim=-1)
        return x + self.mlp.linear_fc2(torch.tanh(gate) * value)[0]


class ToyTower(MegatronModule):
    """[B, width] -> [B, 4]."""

    def __init__(self, grid: Grid, width: int, num_layers: int, precision: Literal["fp32", "bf16"]) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        config = TransformerConfig(
            num_layers=1, hidden_size=width, num_attention_heads=4, tensor_model_parallel_size=grid.tp_size,
            params_dtype=dtype, bf16=precision == "bf16", use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )  # fmt: skip
        super().__init__(config=config)
        self.patch_embed = nn.Linear(width, width, dtype=dtype)
        self.blocks = nn.Module()
        self.blocks.layers = nn.ModuleList(_Block(width, config, grid) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.head = nn.Linear(width, 4, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.blocks.layers:
            x = layer(x)
        return self.head(self.norm(x))


class ToyScale(MegatronModule):
    def __init__(self, *, trainable: bool) -> None:
        super().__init__(config=TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=4))
        self.log_scale = nn.Parameter(torch.tensor(0.3), requires_grad=trainable)

    def forward(self) -> Tensor:
        return self.log_scale.exp()


def build_towers(
    runtime: Runtime,
    cfg: Config,
    tp: int,
    *,
    width: int = 8,
    num_layers: int = 2,
    seed: int = 0,
    train_scale: bool = True,
) -> list[Tower]:
    """Towers vision, text and scale with the same whole weights on any topology."""
    grid = build_grid(AxesSection(tp=tp), runtime)
    parallel = ParallelSection(distributed_optimizer=cfg.parallel.distributed_optimizer)
    modules: dict[str, Any] = {
        "vision": ToyTower(grid, width, num_layers, cfg.train.precision),
        "text": ToyTower(grid, width, 1, cfg.train.precision),
        "scale": ToyScale(trainable=train_scale),
    }
    for index, module in enumerate((modules["vision"], modules["text"])):
        for number, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(1000 * seed + 100 * index + number)
            full = torch.randn(full_shape(parameter, tp), generator=generator) * 0.3
            parameter.data.copy_(slice_full(full, parameter, grid.tp_rank, tp))
    return [wrap(name, module, grid, parallel) for name, module in modules.items()]


def compute_gradients(towers: Sequence[Tower], step: int) -> None:
    """Gradients of a sum over SAMPLES samples, shared out over data ranks, into the towers' reduced main gradients."""
    vision, text, scale = towers
    width = vision.module.patch_embed.in_features
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, SAMPLES, width, generator=generator).to(vision.module.patch_embed.weight.dtype)
    here = slice(vision.grid.dp_rank, None, vision.grid.dp_size)
    zero_gradients(towers)
    product = (vision.ddp(x[0, here]) * text.ddp(x[1, here])).float().sum()
    (scale.ddp() * product / SAMPLES).backward()
    reduce_gradients(towers)
