"""open_clip: its own towers (OpenAI's names, text at the top or under "text."), or a timm trunk (EVA) with text."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import Format
from megaeva.checkpoint.convert.io import SafetensorsSink
from megaeva.checkpoint.convert.rules import (
    BATCH_DIM,
    CLS_TOKEN,
    TRANSPOSED,
    Rule,
    both,
    copies,
    dropped,
    for_layers,
    interleaved,
    prefixed,
)
from megaeva.checkpoint.convert.sidecar import (
    open_clip_notes,
    open_clip_refusal,
    read_open_clip_config,
    write_open_clip_config,
)
from megaeva.checkpoint.convert.timm import ONE_FILE
from megaeva.checkpoint.convert.timm import vision_rules as timm_vision_rules
from megaeva.checkpoint.convert.vocabulary import embedding_rows
from megaeva.checkpoint.tensors import TensorInfo, TensorSink
from megaeva.config.schema import VisionSection


def _block_rules(num_heads: int) -> list[Rule]:
    ours, theirs = "blocks.layers.{i}.", "transformer.resblocks.{i}."
    attention = ours + "self_attention."
    return [
        *both(ours + "input_layernorm", theirs + "ln_1"),
        *both(ours + "pre_mlp_layernorm", theirs + "ln_2"),
        Rule((attention + "linear_qkv.weight",), (theirs + "attn.in_proj_weight",), interleaved(num_heads)),
        Rule((attention + "linear_qkv.bias",), (theirs + "attn.in_proj_bias",), interleaved(num_heads)),
        *both(attention + "linear_proj", theirs + "attn.out_proj"),
        *both(ours + "mlp.linear_fc1", theirs + "mlp.c_fc"),
        *both(ours + "mlp.linear_fc2", theirs + "mlp.c_proj"),
    ]


def vision_rules(cfg: VisionSection) -> list[Rule]:
    """Returns the table of OpenAI's vision tower with projection, names without "vision." and "visual."."""
    return [
        Rule(("cls_token",), ("class_embedding",), CLS_TOKEN),
        Rule(("pos_embed",), ("positional_embedding",), BATCH_DIM),
        *both("patch_embed", "conv1", cfg.patch_bias),
        *both("ln_pre", "ln_pre"),
        *for_layers(_block_rules(cfg.num_heads), cfg.num_layers),
        *both("norm", "ln_post"),
        Rule(("head.weight",), ("proj",), TRANSPOSED),
    ]


def text_rules(what: Contents) -> list[Rule]:
    """Returns the table of the text tower, names without "text."; OpenAI's, open_clip's and EVA-CLIP's."""
    cfg = what.model.text
    return [
        Rule(("token_embedding.weight",), ("token_embedding.weight",), embedding_rows(what)),
        *copies([("pos_embed", "positional_embedding")]),
        *for_layers(_block_rules(cfg.num_heads), cfg.num_layers),
        *both("norm", "ln_final"),
        Rule(("head.weight",), ("text_projection",), TRANSPOSED),
        *dropped("attn_mask"),
    ]


def _rules(what: Contents, names: Collection[str] | None) -> list[Rule]:
    cfg = what.model
    if names is None:  # as open_clip builds the model: EVA towers need a CustomTextCLIP
        text_prefix = "" if cfg.vision.ln_pre else "text."
    else:
        text_prefix = "text." if "text.text_projection" in names else ""
    if cfg.vision.ln_pre:
        vision = prefixed(vision_rules(cfg.vision), "vision.", "visual.")
    else:
        vision = prefixed(timm_vision_rules(cfg.vision), "vision.", "visual.trunk.")
    return [
        *copies([("scale.log_scale", "logit_scale")]),
        *copies([("scale.logit_bias", "logit_bias")] if cfg.logit_scale.bias is not None else []),  # of a SigLIP
        *vision,
        *prefixed(text_rules(what), "text.", text_prefix),
    ]


def _recognises(names: Collection[str]) -> bool:
    # OpenAI's names are open_clip's plus three integers.
    if "input_resolution" in names:
        return False
    return "visual.conv1.weight" in names or any(name.startswith("visual.trunk.") for name in names)


def _open_sink(folder: Path, what: Contents, infos: Mapping[str, TensorInfo], shard_bytes: int) -> TensorSink:
    beside = partial(write_open_clip_config, what=what)
    return SafetensorsSink(folder, infos, ONE_FILE, stem="open_clip_model", beside=beside)


OPEN_CLIP = Format(
    name="open_clip",
    title='open_clip: a folder for open_clip.create_model_and_transforms("local-dir:FOLDER")',
    kinds=("clip",),
    recognises=_recognises,
    rules=_rules,
    open_sink=_open_sink,
    read_config=read_open_clip_config,
    refusal=open_clip_refusal,
    notes=open_clip_notes,
)
