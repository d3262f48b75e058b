"""From a recipe's `optim` section and the towers to one optimizer and its learning rates."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from torch import Tensor

from megaeva.config.schema import Config, OptimSection
from megaeva.optim.ema import start_average
from megaeva.optim.lamb import Lamb, ShardMap, multi_tensor_package
from megaeva.optim.loss_scale import LossScale
from megaeva.optim.param_groups import find_rule, param_groups
from megaeva.optim.schedule import LearningRate
from megaeva.optim.tower_optimizer import TowerOptimizers, init_state, main_state
from megaeva.parallel.collectives import together
from megaeva.parallel.grid import Grid
from megaeva.parallel.platform import DTYPES
from megaeva.parallel.wrap import Tower


def build_optimizer(towers: Sequence[Tower], cfg: Config) -> tuple[TowerOptimizers, LearningRate]:
    """The optimizer of all trained towers, and the schedule that sets its rates. All ranks call it together.

    Load weights into the towers before: main parameters are copied from them here. A tower without a trained parameter
    (optim.frozen, model.logit_scale.trainable) has no optimizer. mcore's own builder is not used, as it knows neither
    LAMB nor layer decay.

    Where a tower is wrapped for it (`Tower.sharded_optimizer`) each data-parallel rank updates its share (ZeRO-1).
    Parameters in bf16 or fp16 have an fp32 main copy, held by the optimizer; of fp16, gradients are those of a scaled
    loss.

    Raises:
        ParameterRuleError: on every rank: a parameter of some tower that the table of rules does not cover.
    """
    with together("assigning learning rates"):
        for tower in towers:
            for name, _ in tower.module.named_parameters():
                find_rule(name)
    config = _mcore_config(cfg)
    scale = LossScale(cfg.train.fp16) if config.fp16 else None
    optimizers: dict[str, MegatronOptimizer] = {}
    parameters: dict[str, list[Tensor]] = {}
    for tower in towers:
        if not tower.trained:
            continue
        parameters[tower.name] = [p for p in tower.module.parameters() if p.requires_grad]
        optimizers[tower.name] = _tower_optimizer(tower, parameters[tower.name], config, cfg, scale)
    optimizer = TowerOptimizers(optimizers, parameters, scale)
    if cfg.optim.ema_decay is not None:
        start_average(optimizer)
    return optimizer, LearningRate(optimizer, cfg)


def kernels_line(optim: OptimSection, device: torch.device) -> str:
    """For the start of a run: what computes the optimizer's step on that device."""
    adamw, lamb = "AdamW, torch's fused kernel", f"LAMB ({optim.lamb}), torch's fused Adam kernel and foreach"
    package = multi_tensor_package() if device.type == "cuda" else None
    norms = f"{package}'s multi-tensor kernels" if package else "plain torch"
    return f"optimizer: {lamb if optim.name == 'lamb' else adamw}; norms and clipping by {norms}"


def _mcore_config(cfg: Config) -> OptimizerConfig:
    precision = cfg.train.parameter_precision
    return OptimizerConfig(
        optimizer="adam",
        lr=cfg.optim.vision.lr,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        clip_grad=cfg.optim.clip_grad_norm or 0.0,
    )


def _tower_optimizer(
    tower: Tower, parameters: Sequence[Tensor], config: OptimizerConfig, cfg: Config, scale: LossScale | None
) -> MegatronOptimizer:
    named_parameters = tower.module.named_parameters()
    inner = _inner_optimizer(
        param_groups(tower.name, named_parameters, cfg.optim, num_blocks=_num_blocks(tower, cfg)), cfg.optim
    )
    groups: Any = tower.grid.groups
    wrapped: MegatronOptimizer
    if tower.sharded_optimizer:
        wrapped = DistributedOptimizer(
            inner,
            config,
            grad_scaler=scale,
            init_state_fn=None,
            model_chunks=[tower.ddp],
            per_model_buffers={0: tower.ddp.buffers},
            data_parallel_group=groups.dp_cp,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=groups.mp.rank(),
            distributed_optimizer_instance_id=0,
        )
        # The world: with this one group for all towers mcore adds up one norm over both.
        wrapped.grad_stats_parallel_group = None
    elif config.bf16 or config.fp16:
        wrapped = Float16OptimizerWithFloat16Params(inner, config, scale, lambda *_: None)
        wrapped.grad_stats_parallel_group = groups.mp
    else:
        wrapped = FP32Optimizer(inner, config, lambda *_: None)
        wrapped.grad_stats_parallel_group = groups.mp
    wrapped.tp_group = groups.tp
    init_state(inner)
    if isinstance(inner, Lamb):
        inner.shard_map = _shard_map(wrapped, parameters, tower.grid, sharded=tower.sharded_optimizer)
    return wrapped


def _num_blocks(tower: Tower, cfg: Config) -> int:
    """Of the whole tower: a pipeline stage does not see how deep it is."""
    if tower.name == "scale":
        return 0
    section = cfg.model.text if tower.name == "text" else cfg.model.vision
    return section.num_layers


def _inner_optimizer(groups: list[dict[str, Any]], optim: OptimSection) -> torch.optim.AdamW:
    """Decoupled weight decay in both; `fused` is one pass over memory, on CPU too."""
    if optim.name == "lamb":
        return Lamb(groups, form=optim.lamb, betas=optim.betas, eps=optim.epsilon)
    return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.epsilon, fused=True)


def _shard_map(optimizer: MegatronOptimizer, parameters: Sequence[Tensor], grid: Grid, *, sharded: bool) -> ShardMap:
    """Where the pieces of each parameter are: over tp if it is split there, over dp under the distributed optimizer."""
    index: dict[Tensor, int] = {}
    for i, parameter in enumerate(parameters):
        if sharded and parameter not in optimizer.model_param_group_index_map:
            continue
        index[main_state(optimizer, parameter)["param"]] = i
    groups: Any = grid.groups
    return ShardMap(
        len(parameters),
        index,
        device=parameters[0].device,
        group=groups.tp_dp_cp if sharded else groups.tp,
    )
