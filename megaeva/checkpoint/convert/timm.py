"""timm's `Eva` (EVA-01, EVA-02; also the trunk of open_clip's EVA models) to our vision tower."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megaeva.checkpoint.convert.rules import Rule, both, convert, copies, for_layers, interleaved, stacked
from megaeva.config.schema import VisionSection


def vision_rules(cfg: VisionSection) -> list[Rule]:
    """Returns the table for a tower of `cfg` with head. Source: timm/models/eva.py, facts.md 2c."""
    has_norm_bias = cfg.norm == "layernorm"
    post = cfg.norm_position == "post"
    first, second = (
        ("post_attention_layernorm", "post_mlp_layernorm") if post else ("input_layernorm", "pre_mlp_layernorm")
    )
    ours, theirs = "blocks.layers.{i}.", "blocks.{i}."
    attention = ours + "self_attention."
    # timm keeps q, k and v apart in the models with sub-LN and fuses them in the others.
    apart = cfg.sub_ln_attention
    names = ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight") if apart else ("attn.qkv.weight",)
    layer = [
        *both(ours + first, theirs + "norm1", has_norm_bias),
        *both(ours + second, theirs + "norm2", has_norm_bias),
        Rule(attention + "linear_qkv.weight", tuple(theirs + n for n in names), interleaved(cfg.num_heads)),
        *both(attention + "linear_proj", theirs + "attn.proj"),
        *both(ours + "mlp.linear_fc2", theirs + "mlp.fc2"),
    ]
    if cfg.qkv_bias == "qv":
        sources = ("attn.q_proj.bias", "attn.v_proj.bias") if apart else ("attn.q_bias", "attn.v_bias")
        layer += copies(zip((attention + "q_bias", attention + "v_bias"), (theirs + s for s in sources)))
    if cfg.sub_ln_attention:
        layer += both(attention + "inner_norm", theirs + "attn.norm", has_norm_bias)
    if cfg.sub_ln_mlp:
        layer += both(ours + "mlp.inner_norm", theirs + "mlp.norm", has_norm_bias)
    if cfg.activation == "swiglu":
        layer += [
            Rule(f"{ours}mlp.linear_fc1.{p}", (f"{theirs}mlp.fc1_g.{p}", f"{theirs}mlp.fc1_x.{p}"), stacked)
            for p in ("weight", "bias")
        ]
    else:
        layer += both(ours + "mlp.linear_fc1", theirs + "mlp.fc1")
    return [
        *copies((name, name) for name in ("cls_token", "pos_embed")),
        *both("patch_embed", "patch_embed.proj", cfg.patch_bias),
        *for_layers(layer, cfg.num_layers),
        *both("norm", "norm", has_norm_bias),
        *both("head", "head", cfg.head_bias),
    ]


def from_timm(state: Mapping[str, Tensor], cfg: VisionSection, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Returns a VisionTower's tp=1 state dict from timm's.

    Args:
        expected: names and shapes of the tower's parameters.

    Raises:
        CheckpointError: a tensor unexplained on either side.
    """
    return convert(vision_rules(cfg), state, expected)
