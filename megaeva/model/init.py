"""Fresh weights, the same for every topology."""

import hashlib
import math
import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from megaeva.config.schema import VisionSection
from megaeva.model.clip_model import LogitScale
from megaeva.model.mim_student import MIMStudent
from megaeva.model.text_tower import TextTower
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel.grid import Grid
from megaeva.parallel.shards import full_shape, slice_full

Task = Literal["mim", "contrastive"]
# (hidden size, number of layers, number of the parameter's layer from 1) -> standard deviation
Deviation = Callable[[int, int, int], float]


def _constant(value: float) -> Deviation:
    return lambda width, layers, layer: value


def _eva_out(width: int, layers: int, layer: int) -> float:
    return 0.02 / math.sqrt(2 * layer)


def _clip_in(width: int, layers: int, layer: int) -> float:
    return width**-0.5


def _clip_out(width: int, layers: int, layer: int) -> float:
    return width**-0.5 * (2 * layers) ** -0.5


def _clip_fc1(width: int, layers: int, layer: int) -> float:
    return (2 * width) ** -0.5


# First match of the name within its tower decides; what no row matches is an error. Biases and norms come before.
# A norm's weight is 1. All draws are normal, cut at +-2 (timm's trunc_normal_, in practice uncut at these deviations).
#
# EVA: BEiT's scheme, attn.proj and the last MLP projection rescaled by depth (asuka/modeling_pretrain.py).
# EVA-CLIP multiplies a fresh head by 0.001 (facts.md 4c); that factor is left out. The loss normalises embeddings, so
# the forward pass does not feel it, but Adam's first steps overwrite the head with the signs of one batch's gradient.
# Measured from scratch, AdamW lr 2e-3 without warm-up on 6 pairs: loss 0.65 after 60 steps with it, 0.005 without; with
# warm-up, clipping and 512 pairs, 240 steps, two seeds: 0.52, 0.63 with it, 0.51, 0.50 without. Upstream starts from
# pretrained towers with 2,000 steps of LAMB warm-up; not measured here.
_EVA_VISION: tuple[tuple[str, Deviation], ...] = (
    (r"pos_embed|cls_token|mask_token|patch_embed\.weight", _constant(0.02)),
    (r"self_attention\.linear_proj\.weight|mlp\.linear_fc2\.weight", _eva_out),
    (r"self_attention\.linear_qkv\.weight|mlp\.linear_fc1\.weight", _constant(0.02)),
    (r"head\.weight|lm_head\.weight", _constant(0.02)),
)
# EVA-02 B and L, the towers with sub-LN, start distillation otherwise (`jax_init` and `subln` in asuka): Xavier, where
# q, k, v and w1, w2 are matrices of their own; v and every later linear of a layer are enlarged by sqrt(ln(2L)), not
# shrunk with depth. Rows: pattern, matrices stacked in the tensor, enlarged. Upstream's patch embedding is
# Xavier-uniform; here it is normal with the same deviation.
_SUB_LN_MIM: tuple[tuple[str, int, bool], ...] = (
    (r"self_attention\.linear_qkv\.weight", 3, False),
    (r"mlp\.linear_fc1\.weight", 2, True),
    (r"self_attention\.linear_proj\.weight|mlp\.linear_fc2\.weight", 1, True),
    (r"patch_embed\.weight|lm_head\.weight", 1, False),
)
# Not copied: BEiT cuts its draws at one deviation, which leaves 0.54 of it; EVA-CLIP's own code, as here, at +-2.
# OpenAI and open_clip draw the embeddings and the projection with width^-0.5 and leave the vision blocks to PyTorch's
# defaults; their text scheme, written for the same blocks, is used for both towers here.
_CLIP_BLOCKS: tuple[tuple[str, Deviation], ...] = (
    (r"self_attention\.linear_qkv\.weight", _clip_in),
    (r"self_attention\.linear_proj\.weight|mlp\.linear_fc2\.weight", _clip_out),
    (r"mlp\.linear_fc1\.weight", _clip_fc1),
    (r"head\.weight|lm_head\.weight", _clip_in),
)
_CLIP_VISION: tuple[tuple[str, Deviation], ...] = (
    (r"pos_embed|cls_token", _clip_in),
    (r"mask_token|patch_embed\.weight", _constant(0.02)),
    *_CLIP_BLOCKS,
)
_TEXT: tuple[tuple[str, Deviation], ...] = (
    (r"token_embedding\.weight", _constant(0.02)),
    (r"pos_embed", _constant(0.01)),
    *_CLIP_BLOCKS,
)
_NORM = re.compile(r"(layernorm|norm|ln_pre)\.(weight|bias)$")
_POST_NORM = re.compile(r"post_(attention|mlp)_layernorm\.(weight|bias)$")


def _draw(shape: torch.Size, deviation: float, seed: int, key: str) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return nn.init.trunc_normal_(torch.empty(shape), std=deviation, generator=generator)


def _sub_ln_value(name: str, shape: torch.Size, section: VisionSection, seed: int) -> Tensor | None:
    """A weight of the start of a sub-LN tower's distillation; None where the general table holds."""
    for pattern, stacked, enlarged in _SUB_LN_MIM:
        if re.search(rf"(^|\.)({pattern})$", name):
            gain = math.sqrt(math.log(2 * section.num_layers))
            deviation = math.sqrt(2 / (shape[0] // stacked + shape[1:].numel()))
            full = _draw(shape, deviation * (gain if enlarged else 1.0), seed, f"vision/{name}")
            if stacked == 3:  # rows [q, k, v] of head 0, then of head 1, ...
                full.view(section.num_heads, 3, -1)[:, 2] *= gain
            return full
    return None


def _full_value(name: str, shape: torch.Size, tower: VisionTower | TextTower, task: Task, seed: int) -> Tensor:
    section = tower.cfg
    if _POST_NORM.search(name) and task == "mim":
        # EVA's res-post-norm starts distillation as the identity (_reinit_respostnorm_ln in asuka).
        return torch.zeros(shape)
    if _NORM.search(name):
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    table = _TEXT
    if isinstance(section, VisionSection):
        if task == "mim" and section.sub_ln_mlp and (drawn := _sub_ln_value(name, shape, section, seed)) is not None:
            return drawn
        table = _CLIP_VISION if section.ln_pre else _EVA_VISION
    for pattern, deviation in table:
        if re.search(rf"(^|\.)({pattern})$", name):
            layer = re.search(r"layers\.(\d+)\.", name)
            std = deviation(section.hidden_size, section.num_layers, int(layer[1]) + 1 if layer else 0)
            return _draw(shape, std, seed, f"{'text' if table is _TEXT else 'vision'}/{name}")
    raise AssertionError(f"no row of the initialisation table matches {name}; add one")


@torch.no_grad()
def init_weights(module: nn.Module, *, seed: int, task: Task, grid: Grid) -> None:
    """Fills every parameter of the towers inside `module` (a tower, a student, or a CLIPModel).

    Each tensor is drawn full-size on the CPU in fp32 from a generator seeded by (seed, tower, name) and then cut: the
    same weights for every tp, whichever module holds the tower. A logit scale keeps its constructor's value.

    Args:
        grid: of the towers in `module`; for a CLIPModel with two grids call it on each tower.
        task: "mim" starts post-norm layers as the identity, and sub-LN towers from Xavier's deviations.

    Raises:
        AssertionError: a parameter that no row of the tables explains.
    """
    students = [m for m in module.modules() if isinstance(m, MIMStudent)]
    owners: list[tuple[VisionTower | TextTower, nn.Module]] = [
        (m, m) for m in module.modules() if isinstance(m, VisionTower | TextTower)
    ]
    owners += [(student.vision, student) for student in students]
    done: set[nn.Parameter] = set()
    for tower, owner in owners:
        for name, param in owner.named_parameters():
            if param in done:
                continue
            done.add(param)
            full = _full_value(name, full_shape(param, grid.tp_size), tower, task, seed)
            param.copy_(slice_full(full, param, grid.tp_rank, grid.tp_size))
    done.update(p for m in module.modules() if isinstance(m, LogitScale) for p in m.parameters())
    rest = [name for name, param in module.named_parameters() if param not in done]
    assert not rest, f"parameters of no known tower: {rest}"
