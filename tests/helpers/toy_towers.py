"""Towers of linears with every kind of parameter: replicated, column-, row-split and gated, and a 0-dim scale.

For tests of the optimizer, of reductions and of checkpoints, which must not wait for a real tower's forward pass. A
tower may be cut over tp, with sequence parallelism, and into (virtual) pipeline stages; names are the whole tower's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaeva.config.schema import AxesSection, Config
from megaeva.config.topology import virtual_stages
from megaeva.parallel.collectives import all_gather_rows, gather_objects
from megaeva.parallel.grid import Grid, build_grid
from megaeva.parallel.platform import DTYPES
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.shards import full_shape, gather_full, slice_full
from megaeva.parallel.wrap import Tower, reduce_gradients, wrap, zero_gradients

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # isort: skip
from megatron.core.tensor_parallel.mappings import (  # isort: skip
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip

SAMPLES = 8
Axes = Mapping[str, AxesSection]
"""Of "vision" and "text"; a tower that is not named lives on tp=1 and all ranks."""


def make_config(run_dir: str = "unused", num_layers: int = 2, **optim: Any) -> Config:
    """A recipe of whose model section the towers here follow the numbers of layers only."""
    vision: dict[str, Any] = {
        "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_layers": num_layers, "num_heads": 2,
        "ffn_hidden_size": 16, "activation": "gelu", "qkv_bias": "none",
    }  # fmt: skip
    text = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 16}
    switches = ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    parallel = {switch: optim.pop(switch) for switch in switches if switch in optim}
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
    """[B, width] -> [B, 4] over all of its stages; `forward` runs one chunk of this rank.

    Under sequence parallelism the norm sees this rank's share of the rows, so its gradients are shares over tp.
    """

    def __init__(self, grid: Grid, width: int, num_layers: int, precision: Literal["fp32", "bf16", "fp16"]) -> None:
        dtype = DTYPES[precision]
        config = TransformerConfig(
            num_layers=num_layers, hidden_size=width, num_attention_heads=4, tensor_model_parallel_size=grid.tp_size,
            params_dtype=dtype, bf16=precision == "bf16", fp16=precision == "fp16", use_cpu_initialization=True,
            gradient_accumulation_fusion=False, sequence_parallel=grid.sequence_parallel,
        )  # fmt: skip
        super().__init__(config=config)
        self.grid, self.width, self.dtype = grid, width, dtype
        self.stages = virtual_stages(grid.axes, num_layers)
        # The linears take whole rows here.
        config = dataclasses.replace(config, sequence_parallel=False)
        if grid.is_first_stage:
            self.pos_embed = nn.Parameter(torch.empty(1, width, dtype=dtype))
            self.patch_embed = nn.Linear(width, width, dtype=dtype)
        here = [number for stage in self.stages[grid.pp_rank :: grid.pp_size] for number in stage]
        self.blocks = nn.Module()
        self.blocks.layers = nn.ModuleDict({str(number): _Block(width, config, grid) for number in here})
        if grid.is_last_stage:
            self.norm = nn.LayerNorm(width, dtype=dtype)
            for parameter in self.norm.parameters():
                parameter.sequence_parallel = grid.sequence_parallel
            self.head = nn.Linear(width, 4, bias=False, dtype=dtype)

    def forward(self, x: Tensor, chunk: int = 0) -> Tensor:
        number = chunk * self.grid.pp_size + self.grid.pp_rank
        if number == 0:
            x = self.patch_embed(x) + self.pos_embed
        for layer in self.stages[number]:
            x = self.blocks.layers[str(layer)](x)
        if number < len(self.stages) - 1:
            return x
        tp = self.grid.groups.tp
        if self.grid.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x, group=tp)
        x = self.norm(x)
        if self.grid.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=tp)
        return self.head(x)


class ToyScale(MegatronModule):
    def __init__(self, *, trainable: bool) -> None:
        super().__init__(config=TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=4))
        self.log_scale = nn.Parameter(torch.tensor(0.3), requires_grad=trainable)

    def forward(self) -> Tensor:
        return self.log_scale.exp()


_grids: dict[Any, Grid] = {}


def grid_of(axes: AxesSection, runtime: Runtime) -> Grid:
    """As `build_grid`, with the groups that an earlier call made for the same sizes: gloo starts two threads for each
    group, and with hundreds of towers in a process there would be thousands. All ranks must call it alike."""
    key = dist.group.WORLD, axes.tp, axes.pp
    if key not in _grids:
        _grids[key] = build_grid(axes, runtime)
    return dataclasses.replace(_grids[key], axes=axes)


def build_towers(
    runtime: Runtime,
    cfg: Config,
    axes: Axes | None = None,
    *,
    width: int = 8,
    seed: int = 0,
    train_scale: bool = True,
) -> list[Tower]:
    """Towers vision, text and scale, each on its own grid, with the same whole weights on any topology."""
    axes = axes or {}
    grids = {name: grid_of(axes.get(name, AxesSection()), runtime) for name in ("vision", "text", "scale")}
    assert cfg.model.text is not None
    modules: dict[str, Any] = {
        "vision": ToyTower(grids["vision"], width, cfg.model.vision.num_layers, cfg.train.parameter_precision),
        "text": ToyTower(grids["text"], width, cfg.model.text.num_layers, cfg.train.parameter_precision),
        "scale": ToyScale(trainable=train_scale),
    }
    for tower in ("vision", "text"):
        for name, parameter in modules[tower].named_parameters():
            generator = torch.Generator().manual_seed(crc32(f"{seed} {tower} {name}".encode()))
            grid = grids[tower]
            full = torch.randn(full_shape(parameter, grid.tp_size), generator=generator) * 0.3
            parameter.data.copy_(slice_full(full, parameter, grid.tp_rank, grid.tp_size))
    return [wrap(name, module, grids[name], cfg.parallel) for name, module in modules.items()]


def whole_tensors(tower: Tower, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{tower.name: clone of the whole tensor} over all tp ranks and stages, on every rank.

    Args:
        tensors: this rank's, by the name of the parameter as which they are cut.
    """
    parameters = dict(tower.module.named_parameters())
    grid = tower.grid
    here = {f"{tower.name}.{n}": gather_full(t, parameters[n], grid).clone() for n, t in tensors.items()}
    whole: dict[str, Tensor] = {}
    for stage in gather_objects(here, grid.groups.pp):
        assert not whole.keys() & stage.keys(), "two stages hold one parameter"
        whole |= stage
    return whole


def whole_weights(towers: Sequence[Tower]) -> dict[str, Tensor]:
    """Every parameter of all towers, whole, on every rank."""
    return {n: t for tower in towers for n, t in whole_tensors(tower, dict(tower.module.named_parameters())).items()}


def compute_gradients(towers: Sequence[Tower], step: int, *, micro_batches: int = 1, two_passes: bool = False) -> float:
    """Gradients of a sum over SAMPLES samples into the towers' reduced main gradients; returns the sum.

    Each tower's data ranks take their own slice of the samples; features meet over all of them, as in a contrastive
    step. All ranks call it.

    Args:
        two_passes: forward once without gradients for the features, and again for the gradients.
    """
    vision, text, scale = towers
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, SAMPLES, vision.module.width, generator=generator).to(vision.module.dtype)
    zero_gradients(towers)
    own = [_own_batches(tower, rows, micro_batches) for tower, rows in zip((vision, text), x, strict=True)]
    passes = []
    for tower, batches in zip((vision, text), own, strict=True):
        if two_passes:
            with torch.no_grad():
                passes.append([_Pass(tower, batch) for batch in batches])
        else:
            passes.append([_Pass(tower, batch) for batch in batches])
    features = [
        all_gather_rows(torch.cat([p.output.detach() for p in tower_passes]), tower.grid.groups.dp)
        for tower, tower_passes in zip((vision, text), passes, strict=True)
    ]
    product = (features[0] * features[1]).float().sum(dim=1)
    ranks = scale.grid.dp_size
    share = scale.ddp() * product[scale.grid.dp_rank :: ranks].sum() / SAMPLES
    if scale.trained:
        share.backward()
    factor = scale.module().detach() / SAMPLES
    for tower, batches, tower_passes, other in zip((vision, text), own, passes, features[::-1], strict=True):
        gradients = _own_batches(tower, other * factor.to(other.dtype), micro_batches)
        for batch, done, gradient in zip(batches, tower_passes, gradients, strict=True):
            (_Pass(tower, batch) if two_passes else done).backward(gradient)
    reduce_gradients(towers)
    return (product.sum() * factor).item()


def _own_batches(tower: Tower, rows: Tensor, micro_batches: int) -> list[Tensor]:
    own = rows.chunk(tower.grid.dp_size)[tower.grid.dp_rank]
    return list(own.chunk(micro_batches))


class _Pass:
    """One microbatch through all stages of a tower, one after the other; the output is known on all of them."""

    def __init__(self, tower: Tower, x: Tensor) -> None:
        self.grid, self.width = tower.grid, tower.module.width
        self.done: list[tuple[Tensor, Tensor] | None] = []
        for number in range(self.grid.pp_size * self.grid.axes.vpp):
            here = number % self.grid.pp_size == self.grid.pp_rank
            if here:
                start = x.detach().requires_grad_(torch.is_grad_enabled() and number > 0)
                x = tower.ddp(start, chunk=number // self.grid.pp_size)
                self.done.append((start, x))
            else:
                last = number == self.grid.pp_size * self.grid.axes.vpp - 1
                x = x.new_empty(x.shape[0], 4 if last else tower.module.width)
                self.done.append(None)
            self._from_stage(number, x)
        self.output = x

    def backward(self, gradient: Tensor) -> None:
        """Adds this microbatch's share, given dL/doutput."""
        for number in reversed(range(len(self.done))):
            done = self.done[number]
            if done is not None:
                start, end = done
                end.backward(gradient)
                gradient = torch.empty_like(start) if start.grad is None else start.grad
            elif number > 0:
                gradient = gradient.new_empty(gradient.shape[0], self.width)
            if number > 0:
                self._from_stage(number, gradient)

    def _from_stage(self, number: int, tensor: Tensor) -> None:
        if self.grid.pp_size > 1:
            group = self.grid.groups.pp
            dist.broadcast(tensor.data, dist.get_global_rank(group, number % self.grid.pp_size), group=group)
