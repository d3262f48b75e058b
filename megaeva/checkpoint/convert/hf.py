"""Hugging Face layouts: transformers' CLIPModel ("hf-clip"), and the remote code of BAAI's EVA-CLIP ("hf-eva").

Source: transformers 5.23 models/clip; for EVA facts.md 2c. Both are folders of sharded safetensors with config.json,
preprocessor_config.json and CLIP's tokenizer beside them (`hf_config.py`).
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import Format
from megaeva.checkpoint.convert.hf_config import (
    UNCONFIRMED,
    hf_clip_refusal,
    hf_eva_refusal,
    read_hf_clip_config,
    read_hf_eva_config,
    write_hf_clip_folder,
    write_hf_eva_folder,
)
from megaeva.checkpoint.convert.io import SafetensorsSink
from megaeva.checkpoint.convert.ours import layer_norms
from megaeva.checkpoint.convert.rules import (
    BATCH_DIM,
    CLS_TOKEN,
    STACKED,
    Rule,
    Tensors,
    Transform,
    both,
    copies,
    dropped,
    for_layers,
    interleaved,
    prefixed,
)
from megaeva.checkpoint.convert.vocabulary import embedding_rows, vocabulary_notes
from megaeva.checkpoint.tensors import TensorInfo, TensorSink
from megaeva.config.schema import VisionSection
from megaeva.errors import CheckpointError


def _must_be_zero(bias: Tensor) -> Tensors:
    if bias.count_nonzero():
        raise CheckpointError(
            "a k_proj.bias is not zero; this variant has no key bias; "
            "leave --variant out, so that config.json decides, or name the file's own."
        )
    return ()


_ZERO = Transform(_must_be_zero, lambda: ())


def _layer_rules(heads: int, qkv_bias: str, norms: tuple[str, str], norm_bias: bool) -> list[Rule]:
    """The rows that the layers of all towers have in common; `norms` are ours of layer_norm1 and layer_norm2."""
    ours, theirs = "blocks.layers.{i}.", "encoder.layers.{i}."
    attention = theirs + "self_attn."
    qkv = [f"{attention}{part}_proj" for part in "qkv"]
    rules = [
        *both(ours + norms[0], theirs + "layer_norm1", norm_bias),
        *both(ours + norms[1], theirs + "layer_norm2", norm_bias),
        Rule(
            (ours + "self_attention.linear_qkv.weight",),
            tuple(name + ".weight" for name in qkv),
            interleaved(heads, len(qkv)),
        ),
        *both(ours + "self_attention.linear_proj", attention + "out_proj"),
    ]
    if qkv_bias == "qkv":
        rules += [
            Rule(
                (ours + "self_attention.linear_qkv.bias",),
                tuple(name + ".bias" for name in qkv),
                interleaved(heads, len(qkv)),
            )
        ]
    elif qkv_bias == "qv":
        rules += copies((f"{ours}self_attention.{part}_bias", f"{attention}{part}_proj.bias") for part in "qv")
        rules += [Rule((), (attention + "k_proj.bias",), _ZERO, optional=True, written=False)]
    return rules


def _mlp_rules() -> list[Rule]:
    ours, theirs = "blocks.layers.{i}.mlp.", "encoder.layers.{i}.mlp."
    return [*both(ours + "linear_fc1", theirs + "fc1"), *both(ours + "linear_fc2", theirs + "fc2")]


def _swiglu_rules() -> list[Rule]:
    ours, theirs = "blocks.layers.{i}.mlp.", "encoder.layers.{i}.mlp."
    return [
        *(
            Rule((f"{ours}linear_fc1.{p}",), (f"{theirs}fc1.{p}", f"{theirs}fc2.{p}"), STACKED)
            for p in ("weight", "bias")
        ),
        *both(ours + "linear_fc2", theirs + "fc3"),
    ]


def _vision_rules(cfg: VisionSection) -> list[Rule]:
    """Names without "vision." and "vision_model."; without head."""
    has_norm_bias = cfg.norm == "layernorm"
    layer = [
        *_layer_rules(cfg.num_heads, cfg.qkv_bias, layer_norms(cfg), has_norm_bias),
        *(_swiglu_rules() if cfg.activation == "swiglu" else _mlp_rules()),
    ]
    ours, theirs = "blocks.layers.{i}.", "encoder.layers.{i}."
    if cfg.sub_ln_attention:
        layer += both(ours + "self_attention.inner_norm", theirs + "self_attn.inner_attn_ln", has_norm_bias)
    if cfg.sub_ln_mlp:
        layer += both(ours + "mlp.inner_norm", theirs + "mlp.ffn_ln", has_norm_bias)
    return [
        Rule(("cls_token",), ("embeddings.class_embedding",), CLS_TOKEN),
        Rule(("pos_embed",), ("embeddings.position_embedding.weight",), BATCH_DIM),
        *both("patch_embed", "embeddings.patch_embedding", cfg.patch_bias),
        *(both("ln_pre", "pre_layrnorm") if cfg.ln_pre else ()),  # transformers' spelling
        *for_layers(layer, cfg.num_layers),
        *both("norm", "post_layernorm", has_norm_bias),
    ]


def _text_rules(what: Contents) -> list[Rule]:
    """Names without "text." and "text_model."; without projection."""
    cfg = what.model.text
    layer = [*_layer_rules(cfg.num_heads, "qkv", ("input_layernorm", "pre_mlp_layernorm"), True), *_mlp_rules()]
    return [
        Rule(("token_embedding.weight",), ("embeddings.token_embedding.weight",), embedding_rows(what)),
        *copies([("pos_embed", "embeddings.position_embedding.weight")]),
        *for_layers(layer, cfg.num_layers),
        *both("norm", "final_layer_norm"),
    ]


def rules(what: Contents, names: Collection[str] | None) -> list[Rule]:
    """Returns the table of either layout; the model's own flags tell them apart."""
    return [
        *copies([("scale.log_scale", "logit_scale")]),
        *prefixed(_text_rules(what), "text.", "text_model."),
        *prefixed(_vision_rules(what.model.vision), "vision.", "vision_model."),
        *both("vision.head", "visual_projection", what.model.vision.head_bias),
        *copies([("text.head.weight", "text_projection.weight")]),
        *dropped("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    ]


def _open_sink(
    write_beside: Callable[..., None], folder: Path, what: Contents, infos: Mapping[str, TensorInfo], shard_bytes: int
) -> TensorSink:
    return SafetensorsSink(folder, infos, shard_bytes, beside=partial(write_beside, what=what, infos=infos))


def _eva_notes(what: Contents) -> list[str]:
    return [*vocabulary_notes(what), f"config.json: {UNCONFIRMED}"]


HF_CLIP = Format(
    name="hf-clip",
    title="Hugging Face CLIPModel: a folder that CLIPModel.from_pretrained loads",
    kinds=("clip",),
    recognises=lambda names: "vision_model.pre_layrnorm.weight" in names and "logit_scale" in names,
    rules=rules,
    open_sink=partial(_open_sink, write_hf_clip_folder),
    read_config=read_hf_clip_config,
    refusal=hf_clip_refusal,
    notes=vocabulary_notes,
)

HF_EVA = Format(
    name="hf-eva",
    title="Hugging Face EVA-CLIP (BAAI's remote code): sharded safetensors",
    kinds=("clip",),
    recognises=lambda names: "vision_model.embeddings.patch_embedding.bias" in names and "logit_scale" in names,
    rules=rules,
    open_sink=partial(_open_sink, write_hf_eva_folder),
    read_config=read_hf_eva_config,
    refusal=hf_eva_refusal,
    notes=_eva_notes,
)
