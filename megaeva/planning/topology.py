"""Which rank holds which layers of which tower, and the bytes that takes; `megaeva train --topology` prints it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from megaeva.checkpoint.layout import read_model_section_if_there
from megaeva.config.schema import AxesSection, Config, ModelSection
from megaeva.config.topology import data_ranks, microbatches, sharing_ranks, step_axes, virtual_stages
from megaeva.config.validate import check_teacher
from megaeva.model.clip_model import LogitScale
from megaeva.model.mim_student import MIMStudent
from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.grid import grid_of_one
from megaeva.parallel.shards import is_sharded
from megaeva.planning.table import columns, in_bytes

_FIRST_STAGE = re.compile(r"(?:vision\.)?(patch_embed|cls_token|pos_embed|ln_pre|mask_token|token_embedding)\b")
_LAST_STAGE = re.compile(r"(?:vision\.)?(norm|head|lm_head|log_scale|logit_bias)\b")
_LAYER = re.compile(r"(?:vision\.)?blocks\.layers\.(\d+)\.")
_FEW_STAGES = 8  # more are drawn together where they are alike


@dataclass(frozen=True)
class Holding:
    """What each rank of one pipeline stage holds of one tower.

    Attributes:
        layers: global layer numbers, one range for each virtual stage on the rank.
        parameters: on one rank, after cutting over tp and pp.
        weight_bytes: in the run's precision.
        gradient_bytes: DDP's fp32 buffer, without its padding; 0 where nothing is trained.
        optimizer_bytes: two fp32 moments, an fp32 copy of 16-bit weights, and an fp32 average if one is kept. With the
            distributed optimizer the share of one data rank, the total over data ranks divided evenly; mcore pads its
            buffers and cuts them into pieces of equal length, so that a rank may hold more or less by that padding.
    """

    tower: str
    stage: int
    layers: tuple[range, ...]
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True)
class Spread:
    """A tower on the meta device, its axes, and the layers it has in all."""

    module: nn.Module
    axes: AxesSection
    num_layers: int


def topology_lines(cfg: Config, world_size: int) -> list[str]:
    """The layout of a recipe on `world_size` processes as lines below 100 columns.

    Towers are built on the meta device. Of a MIM run's teacher the checkpoint's JSON is read; where it is absent the
    teacher is left out and a line says so. `check_world` must have accepted the recipe.
    """
    spreads, notes = spread_towers(cfg)
    block = sharing_ranks(cfg)
    samples = cfg.train.global_batch_size * block // world_size
    lines = [
        f"topology: {world_size} ranks in blocks of {block}; a block reads {samples} of the "
        f"{cfg.train.global_batch_size} samples of a step"
    ]
    places: list[tuple[str, ...]] = [
        ("tower", "tp", "sp", "pp", "vpp", "dp", "place of rank r", "recompute", "microbatches")
    ]
    # Also of a teacher that could not be built.
    axes = step_axes(cfg) | {name: one.axes for name, one in spreads.items()}
    places += [_place_row(name, one, cfg, world_size) for name, one in axes.items()]
    lines += [*columns(places, right=(1, 3, 4, 5)), ""]
    held = {name: _holdings(name, one, cfg, world_size) for name, one in spreads.items()}
    table: list[tuple[str, ...]] = [
        ("holds", "ranks", "layers", "ends", "parameters", "weights", "gradients", "optimizer")
    ]
    for name, one in spreads.items():
        table += [row for group in _alike(held[name]) for row in _holding_rows(group, one.axes, world_size)]
    lines += columns(table, right=(4, 5, 6, 7))
    lines.append(f"{_model_states(held.values())}, activations not counted")
    pipelined = [name for name, one in axes.items() if one.pp > 1 and microbatches(cfg, one, world_size)[1] == 1]
    notes += [f"{name}: its stages wait for each other in a step of one microbatch" for name in pipelined]
    return [*lines, *notes]


def holdings(cfg: Config, world_size: int) -> dict[str, list[Holding]]:
    """What a rank holds of each tower, by name; one entry for each pipeline stage of the tower.

    Names are those of the run's towers (vision, text, scale; student), and "teacher".
    """
    spreads, _ = spread_towers(cfg)
    return {name: _holdings(name, one, cfg, world_size) for name, one in spreads.items()}


# ------------------------------------------------------------------------------------------------------ the towers


def spread_towers(cfg: Config) -> tuple[dict[str, Spread], list[str]]:
    """Every module of a step, and what has to be said about those that could not be built."""
    model, axes = cfg.model, step_axes(cfg)
    built: dict[str, Any] = {"grid": grid_of_one(), "precision": cfg.train.parameter_precision, "device": "meta"}
    if cfg.task == "contrastive":
        vision = VisionTower(model.vision, model.embed_dim, **built)
        text = TextTower(model.text, model.embed_dim, **built)
        scale = LogitScale(model.logit_scale, device="meta")
        for name in cfg.optim.frozen:
            (vision if name == "vision" else text).requires_grad_(False)
        return {
            "vision": Spread(vision, axes["vision"], model.vision.num_layers),
            "text": Spread(text, axes["text"], model.text.num_layers),
            "scale": Spread(scale, AxesSection(), 0),
        }, []
    teacher, note = _teacher_section(cfg)
    width = model.embed_dim if teacher is None else teacher.embed_dim
    student = MIMStudent(model.vision, width, **built)
    spreads = {"student": Spread(student, axes["student"], model.vision.num_layers)}
    if teacher is not None:
        frozen = VisionTower(teacher.vision, teacher.embed_dim, **built).requires_grad_(False)
        spreads["teacher"] = Spread(frozen, axes["teacher"], teacher.vision.num_layers)
    return spreads, note


def _teacher_section(cfg: Config) -> tuple[ModelSection | None, list[str]]:
    assert cfg.teacher is not None, "config.validate requires it for this task"
    path = Path(cfg.teacher.checkpoint)
    section = read_model_section_if_there(path)
    if section is None:
        return None, [
            f"not counted: the teacher, as {path} holds no checkpoint yet;",
            f"             the student's lm_head is taken to be {cfg.model.embed_dim} wide",
        ]
    check_teacher(cfg, section.vision)
    return section, []


def _holdings(name: str, spread: Spread, cfg: Config, world_size: int) -> list[Holding]:
    axes = spread.axes
    stages = virtual_stages(axes, spread.num_layers) if spread.num_layers else (range(0),)
    rank_of_layer = {layer: v % axes.pp for v, stage in enumerate(stages) for layer in stage}
    # [parameters, weight bytes, gradient bytes, optimizer bytes] of each pipeline rank
    sums = [[0, 0, 0, 0] for _ in range(axes.pp)]
    for key, parameter in spread.module.named_parameters():
        count = _count_on_rank(parameter, axes.tp)
        trained = count if parameter.requires_grad else 0
        state = (8 if parameter.element_size() == 4 else 12) + (4 if cfg.optim.ema_decay else 0)
        added = (count, count * parameter.element_size(), 4 * trained, state * trained)
        total = sums[_pipeline_rank(key, axes.pp, rank_of_layer)]
        for i, value in enumerate(added):
            total[i] += value
    shards = data_ranks(axes, world_size) if cfg.parallel.distributed_optimizer else 1
    return [
        Holding(name, rank, tuple(stages[rank :: axes.pp]), count, weights, gradients, -(-optimizer // shards))
        for rank, (count, weights, gradients, optimizer) in enumerate(sums)
    ]


def _count_on_rank(parameter: nn.Parameter, tp: int) -> int:
    """Elements of one tensor-parallel piece; a vocabulary that tp does not divide is whole on each rank."""
    whole: Any = parameter
    if is_sharded(whole) and whole.shape[whole.partition_dim] % tp == 0:
        return parameter.numel() // tp
    return parameter.numel()


def _pipeline_rank(key: str, pp: int, rank_of_layer: dict[int, int]) -> int:
    if match := _LAYER.match(key):
        return rank_of_layer[int(match[1])]
    if _FIRST_STAGE.match(key):
        return 0
    assert _LAST_STAGE.match(key), f"{key} is on no known stage"
    return pp - 1


# ---------------------------------------------------------------------------------------------------- the drawing


def _place_row(name: str, axes: AxesSection, cfg: Config, world_size: int) -> tuple[str, ...]:
    size, passes = microbatches(cfg, axes, world_size)
    place = [f"tp r%{axes.tp}"] if axes.tp > 1 else []
    place += [f"pp r//{axes.tp}%{axes.pp}" if axes.tp > 1 else f"pp r%{axes.pp}"] if axes.pp > 1 else []
    place += [f"dp r//{axes.tp * axes.pp}" if axes.tp * axes.pp > 1 else "dp r"]
    sp = "yes" if axes.sequence_parallel and axes.tp > 1 else "-"
    works = name != "scale"
    return (
        name, str(axes.tp), sp, str(axes.pp), str(axes.vpp), str(data_ranks(axes, world_size)), ", ".join(place),
        str(axes.recompute) if works and name != "teacher" else "-", f"{passes} of {size}" if works else "-",
    )  # fmt: skip


def _alike(held: Sequence[Holding]) -> list[list[Holding]]:
    """Stages to be drawn as one row: neighbours of the same sizes, where there are many stages."""
    if len(held) <= _FEW_STAGES:
        return [[one] for one in held]
    return [
        list(group) for _, group in groupby(held, key=lambda h: (h.parameters, tuple(len(part) for part in h.layers)))
    ]


def _holding_rows(group: Sequence[Holding], axes: AxesSection, world_size: int) -> list[tuple[str, ...]]:
    """One row for these stages, and more where the layers of its chunks need them."""
    first, last = group[0], group[-1]
    layers = [_range(range(a.start, b.stop)) for a, b in zip(first.layers, last.layers, strict=True) if len(a)]
    if len(group) > 1:
        layers = [f"{text}, {len(chunk)} each" for text, chunk in zip(layers, first.layers, strict=True)]
    per_line = 1 if len(group) > 1 else 2
    wrapped = [", ".join(layers[i : i + per_line]) for i in range(0, len(layers), per_line)] or ["-"]
    embeds, projects = first.stage == 0, last.stage == axes.pp - 1
    ends = {(True, True): "both", (True, False): "embeds", (False, True): "projects"}.get((embeds, projects), "-")
    ranks = range(first.stage * axes.tp, (last.stage + 1) * axes.tp)
    model_size = axes.tp * axes.pp
    if len(ranks) == model_size:
        where = "all"
    else:
        where = _range(ranks) + (f" mod {model_size}" if model_size < world_size else "")
    row = (
        first.tower, where, wrapped[0], ends if layers else "-", f"{first.parameters:,}", in_bytes(first.weight_bytes),
        in_bytes(first.gradient_bytes), in_bytes(first.optimizer_bytes),
    )  # fmt: skip
    return [row, *(("", "", more, "", "", "", "", "") for more in wrapped[1:])]


def _model_states(held: Iterable[Sequence[Holding]]) -> str:
    """The most that one rank holds of all towers."""
    heaviest = [max(one.weight_bytes + one.gradient_bytes + one.optimizer_bytes for one in stages) for stages in held]
    return f"weights, gradients and optimizer of a rank: at most {in_bytes(sum(heaviest))}"


def _range(values: range) -> str:
    return str(values.start) if len(values) == 1 else f"{values.start}-{values.stop - 1}"
