"""timm's `Eva` (EVA-01, EVA-02; also the trunk of open_clip's EVA models): a vision tower with its head.

Source: timm 1.0.31 models/eva.py, facts.md 2c.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import Format
from megaeva.checkpoint.convert.io import SafetensorsSink
from megaeva.checkpoint.convert.ours import layer_norms
from megaeva.checkpoint.convert.rules import STACKED, Rule, both, copies, for_layers, interleaved, prefixed
from megaeva.checkpoint.convert.sidecar import read_timm_config, timm_refusal, write_timm_config
from megaeva.checkpoint.tensors import TensorInfo, TensorSink
from megaeva.config.schema import VisionSection

ONE_FILE = 2**63 - 1
"""Bytes of a shard for readers that take a single file only: timm and open_clip from a folder."""


@dataclass(frozen=True)
class BlockNames:
    """What an EVA block's tensors are called where timm and EVA's own code differ.

    Attributes:
        q_bias, v_bias: of attention.
        inner_norm: of attention.
        gate, up, down: of a gated MLP; a plain one has fc1 and fc2.
        mlp_norm: of the MLP.
    """

    q_bias: str
    v_bias: str
    inner_norm: str
    gate: str
    up: str
    down: str
    mlp_norm: str


def tower_rules(cfg: VisionSection, names: BlockNames, *, qkv_apart: bool) -> list[Rule]:
    """Returns the table of an EVA tower without head, names without "vision."; q, k and v are one tensor or three."""
    has_norm_bias = cfg.norm == "layernorm"
    first, second = layer_norms(cfg)
    ours, theirs = "blocks.layers.{i}.", "blocks.{i}."
    attention, mlp = ours + "self_attention.", ours + "mlp."
    qkv = [f"{theirs}attn.{part}_proj.weight" for part in "qkv"] if qkv_apart else [theirs + "attn.qkv.weight"]
    layer = [
        *both(ours + first, theirs + "norm1", has_norm_bias),
        *both(ours + second, theirs + "norm2", has_norm_bias),
        Rule((attention + "linear_qkv.weight",), tuple(qkv), interleaved(cfg.num_heads, len(qkv))),
        *both(attention + "linear_proj", theirs + "attn.proj"),
    ]
    if cfg.qkv_bias == "qv":
        layer += copies([(attention + "q_bias", theirs + names.q_bias), (attention + "v_bias", theirs + names.v_bias)])
    if cfg.sub_ln_attention:
        layer += both(attention + "inner_norm", theirs + names.inner_norm, has_norm_bias)
    if cfg.sub_ln_mlp:
        layer += both(mlp + "inner_norm", theirs + names.mlp_norm, has_norm_bias)
    if cfg.activation == "swiglu":
        layer += [
            Rule((f"{mlp}linear_fc1.{p}",), (f"{theirs}{names.gate}.{p}", f"{theirs}{names.up}.{p}"), STACKED)
            for p in ("weight", "bias")
        ]
    else:
        layer += both(mlp + "linear_fc1", theirs + "mlp.fc1")
    layer += both(mlp + "linear_fc2", theirs + (names.down if cfg.activation == "swiglu" else "mlp.fc2"))
    return [
        *copies((name, name) for name in ("cls_token", "pos_embed")),
        *both("patch_embed", "patch_embed.proj", cfg.patch_bias),
        *for_layers(layer, cfg.num_layers),
        *both("norm", "norm", has_norm_bias),
    ]


_FUSED = BlockNames("attn.q_bias", "attn.v_bias", "attn.norm", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2", "mlp.norm")
_APART = replace(_FUSED, q_bias="attn.q_proj.bias", v_bias="attn.v_proj.bias")


def vision_rules(cfg: VisionSection) -> list[Rule]:
    """Returns the table of a tower with head, names without "vision."."""
    apart = cfg.sub_ln_attention  # timm keeps q, k and v apart in the models with sub-LN and fuses them in the others
    return [
        *tower_rules(cfg, _APART if apart else _FUSED, qkv_apart=apart),
        *both("head", "head", cfg.head_bias),
    ]


def _rules(what: Contents, names: Collection[str] | None) -> list[Rule]:
    return prefixed(vision_rules(what.model.vision), "vision.", "")


def _recognises(names: Collection[str]) -> bool:
    # A distilled tower of EVA's own has the same blocks without head, or other names in its MLPs.
    has_blocks = any(name.startswith("blocks.") for name in names)
    return has_blocks and ("head.weight" in names or "blocks.0.mlp.fc1_g.weight" in names)


def _open_sink(folder: Path, what: Contents, infos: Mapping[str, TensorInfo], shard_bytes: int) -> TensorSink:
    return SafetensorsSink(folder, infos, ONE_FILE, beside=partial(write_timm_config, what=what))


TIMM = Format(
    name="timm",
    title='timm Eva, the vision tower alone: a folder for timm.create_model("local-dir:FOLDER", pretrained=True)',
    kinds=("vision",),
    recognises=_recognises,
    rules=_rules,
    open_sink=_open_sink,
    read_config=read_timm_config,
    refusal=timm_refusal,
)
