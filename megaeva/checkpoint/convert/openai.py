"""OpenAI's CLIP weights ("openai"): the jit archive they were released as, or its plain state dict.

Names and layout are open_clip's native ones, with three numbers of the model beside the weights. Source: openai/CLIP
clip/model.py, whose `build_model` reads the other sizes from shapes: heads are 64 wide, MLPs four times the width.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import Format
from megaeva.checkpoint.convert.io import TorchSink
from megaeva.checkpoint.convert.open_clip import OPEN_CLIP
from megaeva.checkpoint.convert.rules import Rule, Tensors, Transform
from megaeva.checkpoint.convert.vocabulary import exported_text, vocabulary_notes
from megaeva.checkpoint.tensors import TensorInfo, TensorSink
from megaeva.errors import CheckpointError

_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_HEAD_WIDTH = 64


def _number(name: str, value: int) -> Rule:
    """The row of a number that the file states beside its weights, and that must be the model's."""

    def to_ours(theirs: Tensor) -> Tensors:
        if theirs.item() != value:
            raise CheckpointError(
                f"{name} is {theirs.item()}; the model it is taken for has {value}; "
                "name the file's own variant with --variant."
            )
        return ()

    return Rule((), (name,), Transform(to_ours, lambda: (torch.tensor(value),)), optional=True)


def _rules(what: Contents, names: Collection[str] | None) -> list[Rule]:
    text = exported_text(what)
    values = (what.model.vision.image_size, text.context_length, text.vocab_size)
    return [*OPEN_CLIP.rules(what, names), *map(_number, _NUMBERS, values)]


def _refusal(what: Contents) -> str | None:
    """`clip.load` would take anything else for a model of these proportions, and give other numbers."""
    model, vision, text = what.model, what.model.vision, what.model.text
    must: dict[str, tuple[Any, Any]] = {
        "vision.ln_pre": (vision.ln_pre, True),
        "vision.activation": (vision.activation, "quick_gelu"),
        "text.activation": (text.activation, "quick_gelu"),
        "vision.norm_epsilon": (vision.norm_epsilon, 1e-5),
        "text.norm_epsilon": (text.norm_epsilon, 1e-5),
        "width of vision heads": (vision.hidden_size // vision.num_heads, _HEAD_WIDTH),
        "width of text heads": (text.hidden_size // text.num_heads, _HEAD_WIDTH),
        "vision.ffn_hidden_size": (vision.ffn_hidden_size, 4 * vision.hidden_size),
        "text.ffn_hidden_size": (text.ffn_hidden_size, 4 * text.hidden_size),
        "logit_scale.bias": (model.logit_scale.bias, None),
    }
    wrong = [f"{key}={value}, this model has {has}" for key, (has, value) in must.items() if has != value]
    return f"OpenAI's CLIP has {wrong[0]}" if wrong else OPEN_CLIP.refusal(what)


def _open_sink(path: Path, what: Contents, infos: Mapping[str, TensorInfo], shard_bytes: int) -> TensorSink:
    return TorchSink(path, infos)


OPENAI = Format(
    name="openai",
    title="OpenAI CLIP: a file that clip.load reads",
    kinds=("clip",),
    recognises=lambda names: set(_NUMBERS) <= set(names) and "visual.class_embedding" in names,
    rules=_rules,
    open_sink=_open_sink,
    refusal=_refusal,
    implied={"vision.activation": "quick_gelu", "text.activation": "quick_gelu"},
    notes=vocabulary_notes,
)
