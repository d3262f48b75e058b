"""EVA's own files: EVA-CLIP's `CustomCLIP` ("eva"), and bare towers out of masked feature distillation ("eva-mim").

Source: facts.md 2a and 2b; EVA-CLIP/rei/eva_clip and EVA-02/asuka/modeling_pretrain.py for the names of sub-LN towers.
Files hold a plain state dict. Upstream keeps the model's configuration in its own code, so ours lies beside the file.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import Format
from megaeva.checkpoint.convert.io import TorchSink
from megaeva.checkpoint.convert.open_clip import text_rules
from megaeva.checkpoint.convert.rules import Rule, Tensors, Transform, both, copies, dropped, prefixed
from megaeva.checkpoint.convert.sidecar import contents_info, info_contents, read_json, unmet, write_json
from megaeva.checkpoint.convert.timm import BlockNames, tower_rules
from megaeva.checkpoint.convert.vocabulary import exported_text, vocabulary_notes
from megaeva.checkpoint.tensors import TensorInfo, TensorSink
from megaeva.config.schema import VisionSection
from megaeva.errors import CheckpointError

OF_DISTILLATION = ("mask_token", "lm_head.weight", "lm_head.bias")
"""What a distilled tower has beside a tower's own tensors; whoever trains a CLIP from it drops all three."""

CONFIG_SUFFIX = ".megaeva.json"
_THETA = 10_000


# ------------------------------------------------------------------------------------------------------------- tables


_NAMES = BlockNames("attn.q_bias", "attn.v_bias", "attn.inner_attn_ln", "mlp.w1", "mlp.w2", "mlp.w3", "mlp.ffn_ln")


def _tower_rules(cfg: VisionSection) -> list[Rule]:
    """Names without "vision." and "visual."; without head and rotary tables."""
    return tower_rules(cfg, _NAMES, qkv_apart=cfg.sub_ln_mlp)  # upstream's flag `subln` decides both


def _native_rules(what: Contents, names: Collection[str] | None) -> list[Rule]:
    vision = what.model.vision
    return [
        *copies([("scale.log_scale", "logit_scale")]),
        *prefixed(_tower_rules(vision), "vision.", "visual."),
        *prefixed(_rotary_rules(vision, written=True), "", "visual."),
        *both("vision.head", "visual.head", vision.head_bias),
        *prefixed(text_rules(what), "text.", "text."),
    ]


def _mim_rules(what: Contents, names: Collection[str] | None) -> list[Rule]:
    vision = what.model.vision
    # interpolate_patch_14to16.py leaves the tables of the old grid, and asuka builds them for the grid it has.
    written = names is None and vision.grid_size == vision.rope_pretrain_grid
    return [
        *prefixed(_tower_rules(vision), "vision.", ""),
        *_rotary_rules(vision, written),
        *(dropped(*OF_DISTILLATION) if what.teacher_dim is None else copies((n, n) for n in OF_DISTILLATION)),
    ]


# ------------------------------------------------------------------------------------------------------ rotary tables


@lru_cache
def rotary_tables(grid_size: int, pretrain_grid: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Returns freqs_cos and freqs_sin of upstream's VisionRotaryEmbeddingFast to the bit: fp32 [N, K], no cls row."""
    axis_width = head_width // 2
    frequencies = 1.0 / (_THETA ** (torch.arange(0, axis_width, 2).float() / axis_width))
    positions = torch.arange(grid_size) / grid_size * pretrain_grid
    angles = (positions[:, None] * frequencies).repeat_interleave(2, -1)
    shape = (grid_size, grid_size, axis_width)
    both_axes = torch.cat([angles[:, None].expand(shape), angles[None].expand(shape)], -1)
    angle_NK = both_axes.reshape(grid_size**2, head_width)
    return angle_NK.cos(), angle_NK.sin()


def _rotary_rules(cfg: VisionSection, written: bool) -> list[Rule]:
    """The tables that upstream registers as buffers of the tower and of every block: held against the formula."""
    if not cfg.rope:
        return []
    modules = ["rope", *(f"blocks.{i}.attn.rope" for i in range(cfg.num_layers))]
    # model.half() casts buffers and bare parameters, upstream's convert_weights_to_lp neither.
    like = "vision.cls_token"
    return [
        Rule((), (f"{module}.freqs_cos", f"{module}.freqs_sin"), _rotary(cfg, module), True, written, like)
        for module in modules
    ]


def _rotary(cfg: VisionSection, module: str) -> Transform:
    pretrain_grid, head_width = cfg.rope_pretrain_grid, cfg.hidden_size // cfg.num_heads

    def check(*theirs: Tensor) -> Tensors:
        for table, right in zip(theirs, rotary_tables(isqrt(theirs[0].shape[0]), pretrain_grid, head_width)):
            # fp32 cosines of other machines differ in the last bits, narrower tables by their rounding.
            near = max(1e-5, torch.finfo(table.dtype).eps)
            if table.shape != right.shape or not torch.allclose(table.float(), right, rtol=0, atol=near):
                raise CheckpointError(
                    f"{module}.freqs_cos and freqs_sin {list(table.shape)} are not the rotary angles of "
                    f"heads {head_width} wide, rescaled onto a grid of {pretrain_grid} x {pretrain_grid}; the model it "
                    "is taken for has those; name the file's own variant or configuration."
                )
        return ()

    def make() -> Tensors:
        return rotary_tables(cfg.grid_size, pretrain_grid, head_width)

    return Transform(check, make)


# ----------------------------------------------------------------------------------------------- refusal, configuration


def _refusal(what: Contents) -> str | None:
    model, vision = what.model, what.model.vision
    must: dict[str, tuple[Any, ...]] = {
        "ln_pre": (False,), "patch_bias": (True,), "qkv_bias": ("none", "qv"), "activation": ("gelu", "swiglu"),
        "norm_epsilon": (1e-6,),
    }  # fmt: skip
    if what.kind == "clip":  # one flag of upstream's for each pair
        must["head_bias"] = (vision.qkv_bias == "qv",)
        must["sub_ln_attention"] = (vision.sub_ln_mlp,)
        if model.logit_scale.bias is not None:
            return "EVA-CLIP has no bias of the logits, this model (trained with the sigmoid loss) has"
    fault = unmet(vision, must)
    return fault and f"EVA's towers have {fault[0]}, this one has {fault[1]}"


def _mim_notes(what: Contents) -> list[str]:
    if not what.model.vision.sub_ln_attention:
        return []
    return ["attn.inner_attn_ln: BAAI's files of distilled towers have none; EVA-CLIP reads these, asuka has no place"]


def _write_config(folder: Path, name: str, what: Contents) -> None:
    # The file holds the whole vocabulary.
    model = what.model.model_copy(update={"text": exported_text(what)})
    write_json(folder / name, contents_info(replace(what, model=model, clip_ids=None)))


def _read_config(path: Path) -> Contents | None:
    """What `_write_config` wrote beside a file, or in the folder of one."""
    file = path.with_suffix(CONFIG_SUFFIX)
    if path.is_dir():
        found = sorted(path.glob("*" + CONFIG_SUFFIX))
        if len(found) != 1:
            return None
        file = found[0]
    content = read_json(file)
    return None if content is None else info_contents(file, content)


def _open_sink(path: Path, what: Contents, infos: Mapping[str, TensorInfo], shard_bytes: int) -> TensorSink:
    beside = partial(_write_config, name=path.with_suffix(CONFIG_SUFFIX).name, what=what)
    return TorchSink(path, infos, beside)


NATIVE = Format(
    name="eva",
    title="EVA-CLIP's own layout: a file that its factory loads",
    kinds=("clip",),
    recognises=lambda names: any(name.startswith("visual.blocks.") for name in names),
    rules=_native_rules,
    open_sink=_open_sink,
    read_config=_read_config,
    refusal=_refusal,
    notes=vocabulary_notes,
)

MIM = Format(
    name="eva-mim",
    title="EVA's bare tower out of masked feature distillation: a file for --pretrained-image",
    kinds=("mim",),
    # timm names the parts of sub-LN towers otherwise, and has a head.
    recognises=lambda names: (
        any(name.startswith("blocks.") for name in names)
        and "head.weight" not in names
        and "blocks.0.mlp.fc1_g.weight" not in names
    ),
    rules=_mim_rules,
    open_sink=_open_sink,
    read_config=_read_config,
    refusal=_refusal,
    notes=_mim_notes,
)
