"""open_clip's state dicts to our CLIPModel: its own towers (OpenAI's layout), or a timm trunk (EVA) with its text."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megaeva.checkpoint.convert.rules import (
    Rule,
    as_cls_token,
    both,
    convert,
    copies,
    for_layers,
    interleaved,
    prefixed,
    transposed,
    with_batch_dim,
)
from megaeva.checkpoint.convert.timm import vision_rules as timm_vision_rules
from megaeva.config.schema import ModelSection, TextSection, VisionSection


def _block_rules(num_heads: int) -> list[Rule]:
    ours, theirs = "blocks.layers.{i}.", "transformer.resblocks.{i}."
    return [
        *both(ours + "input_layernorm", theirs + "ln_1"),
        *both(ours + "pre_mlp_layernorm", theirs + "ln_2"),
        Rule(ours + "self_attention.linear_qkv.weight", (theirs + "attn.in_proj_weight",), interleaved(num_heads)),
        Rule(ours + "self_attention.linear_qkv.bias", (theirs + "attn.in_proj_bias",), interleaved(num_heads)),
        *both(ours + "self_attention.linear_proj", theirs + "attn.out_proj"),
        *both(ours + "mlp.linear_fc1", theirs + "mlp.c_fc"),
        *both(ours + "mlp.linear_fc2", theirs + "mlp.c_proj"),
    ]


def vision_rules(cfg: VisionSection) -> list[Rule]:
    """Returns the table of open_clip's own vision tower, names without "visual."."""
    return [
        Rule("cls_token", ("class_embedding",), as_cls_token),
        Rule("pos_embed", ("positional_embedding",), with_batch_dim),
        *both("patch_embed", "conv1", cfg.patch_bias),
        *both("ln_pre", "ln_pre"),
        *for_layers(_block_rules(cfg.num_heads), cfg.num_layers),
        *both("norm", "ln_post"),
        Rule("head.weight", ("proj",), transposed),
    ]


def text_rules(cfg: TextSection) -> list[Rule]:
    """Returns the table of the text tower, names without "text."."""
    return [
        *copies([("token_embedding.weight", "token_embedding.weight"), ("pos_embed", "positional_embedding")]),
        *for_layers(_block_rules(cfg.num_heads), cfg.num_layers),
        *both("norm", "ln_final"),
        Rule("head.weight", ("text_projection",), transposed),
    ]


def from_open_clip(
    state: Mapping[str, Tensor], cfg: ModelSection, expected: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Returns a CLIPModel's tp=1 state dict from open_clip's.

    Understands both of its layouts: text tensors at the top level (CLIP) or under "text." (CustomTextCLIP), vision
    tensors its own or a timm trunk.

    Args:
        expected: names and shapes of the CLIPModel's parameters.

    Raises:
        CheckpointError: a tensor unexplained on either side.
    """
    has_trunk = any(name.startswith("visual.trunk.") for name in state)
    text_prefix = "text." if any(name.startswith("text.") for name in state) else ""
    if has_trunk:
        vision = prefixed(timm_vision_rules(cfg.vision), "vision.", "visual.trunk.")
    else:
        vision = prefixed(vision_rules(cfg.vision), "vision.", "visual.")
    rules = [
        *vision,
        *prefixed(text_rules(cfg.text), "text.", text_prefix),
        *copies([("scale.log_scale", "logit_scale")]),
        *copies([("scale.logit_bias", "logit_bias")] if "logit_bias" in state else []),  # of a SigLIP
    ]
    return convert(rules, state, expected, ignore=lambda name: name.endswith("attn_mask"))
