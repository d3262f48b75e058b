"""Parameter groups: which learning rate and weight decay every parameter gets, read from one table of names.

The table covers the names that `megaeva.model` gives its parameters; a name it does not cover is an error, so a new
parameter cannot slip into a default. Sources: EVA-CLIP-18B shinji/training/optim.py (layer decay, no-decay set) and
EVA-02 asuka modeling_pretrain.py (`no_weight_decay` of the MIM student).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from megaeva.config.schema import OptimSection
from megaeva.errors import ParameterRuleError


class Depth(Enum):
    """Where a parameter sits for layer decay: i of ld^(L + 1 - i), with L the number of blocks of its tower."""

    EMBEDDING = "i = 0"
    BLOCK = "i = block index + 1"
    TOP = "i = L + 1: the full learning rate"


@dataclass(frozen=True)
class Rule:
    """One row: a full-match pattern over the parameter name, its depth, and whether weight decay applies."""

    pattern: str
    depth: Depth
    decayed: bool


_LAYER = r"blocks\.layers\.(?P<block>\d+)\."
_LINEAR = r"(self_attention\.linear_qkv|self_attention\.linear_proj|mlp\.linear_fc1|mlp\.linear_fc2)\."
_NORM = (
    r"(input_layernorm|pre_mlp_layernorm|post_attention_layernorm|post_mlp_layernorm"
    r"|self_attention\.inner_norm|mlp\.inner_norm)\."
)

RULES: tuple[Rule, ...] = (
    Rule(r"patch_embed\.weight", Depth.EMBEDDING, True),
    Rule(r"patch_embed\.bias", Depth.EMBEDDING, False),
    Rule(r"cls_token|pos_embed", Depth.EMBEDDING, False),
    Rule(r"token_embedding\.weight", Depth.EMBEDDING, True),
    # [1, 1, D]: upstream's skip list is {pos_embed, cls_token} and its test is on the number of axes, so the mask
    # token is decayed; its layer-0 list names it.
    Rule(r"mask_token", Depth.EMBEDDING, True),
    Rule(_LAYER + _LINEAR + r"weight", Depth.BLOCK, True),
    Rule(_LAYER + _LINEAR + r"bias", Depth.BLOCK, False),
    # Transformer Engine keeps the norm before a linear inside that linear.
    Rule(_LAYER + _LINEAR + r"layer_norm_(weight|bias)", Depth.BLOCK, False),
    Rule(_LAYER + r"self_attention\.(q_bias|v_bias)", Depth.BLOCK, False),
    Rule(_LAYER + _NORM + r"(weight|bias)", Depth.BLOCK, False),
    # Upstream: whatever is neither an embedding nor in a block has scale 1, ln_pre included.
    Rule(r"(ln_pre|norm)\.(weight|bias)", Depth.TOP, False),
    Rule(r"(head|lm_head)\.weight", Depth.TOP, True),
    Rule(r"(head|lm_head)\.bias", Depth.TOP, False),
    Rule(r"log_scale|logit_bias", Depth.TOP, False),
)
_COMPILED = tuple((re.compile(rule.pattern), rule) for rule in RULES)
# The MIM student holds its tower under this name.
_STUDENT_PREFIX = "vision."


def find_rule(name: str) -> tuple[Rule, int | None]:
    """The rule of a parameter, and its block index when it sits in a block.

    Raises:
        ParameterRuleError: no rule, or more than one, covers the name.
    """
    found = [(rule, match) for pattern, rule in _COMPILED if (match := pattern.fullmatch(_without_prefix(name)))]
    if len(found) != 1:
        raise ParameterRuleError(
            f"{len(found)} rules for learning rate and weight decay cover parameter {name!r}; exactly one must; "
            "add or mend its row in RULES of megaeva/optim/param_groups.py."
        )
    rule, match = found[0]
    return rule, int(match["block"]) if rule.depth is Depth.BLOCK else None


def _without_prefix(name: str) -> str:
    return name.removeprefix(_STUDENT_PREFIX)


def peak_rate(tower: str, optim: OptimSection) -> tuple[float, float]:
    """(learning rate, layer decay) of a tower, by its name: vision, text, scale or student."""
    if tower == "scale":
        return optim.logit_scale_lr, 1.0
    section = {"vision": optim.vision, "student": optim.vision, "text": optim.text or optim.vision}[tower]
    return section.lr, section.layer_decay


def param_groups(
    tower: str, named_parameters: Iterable[tuple[str, Tensor]], optim: OptimSection, num_blocks: int | None = None
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: trained parameters with the same rate, decay and dtype together.

    `lr_mult` is the layer-decay scale, `lr` the tower's peak rate times it; `wd_mult` is 0 for what is not decayed.
    The order of groups and of parameters in them follows `named_parameters`, so it is equal on every rank. The dtype
    is part of the key because mcore's distributed optimizer numbers the shards of a group one dtype after the other.

    Args:
        named_parameters: this stage's, blocks numbered as in the whole tower.
        num_blocks: of the whole tower, from which layer decay counts; None: the last one is among the parameters.

    Raises:
        ParameterRuleError: a parameter that the table does not cover, frozen ones included.
    """
    ruled = [(name, parameter, *find_rule(name)) for name, parameter in named_parameters]
    if num_blocks is None:
        num_blocks = max((block + 1 for *_, block in ruled if block is not None), default=0)
    lr, layer_decay = peak_rate(tower, optim)
    groups: dict[tuple[float, bool, torch.dtype], dict[str, Any]] = {}
    for name, parameter, rule, block in ruled:
        if not parameter.requires_grad:
            continue
        assert parameter.ndim > 1 or not rule.decayed, f"{name} has one axis and must not be decayed"
        i = {Depth.EMBEDDING: 0, Depth.BLOCK: (block or 0) + 1, Depth.TOP: num_blocks + 1}[rule.depth]
        scale = layer_decay ** (num_blocks + 1 - i)
        group = groups.setdefault(
            (scale, rule.decayed, parameter.dtype),
            {
                "params": [],
                "tower": tower,
                "lr": lr * scale,
                "lr_mult": scale,
                "weight_decay": optim.weight_decay if rule.decayed else 0.0,
                "wd_mult": float(rule.decayed),
                # mcore reads these two of every group.
                "is_expert_parallel": False,
                "is_decoupled_lr": False,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
