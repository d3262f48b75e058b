"""The formats by name: how a file is recognised, its table, and how it is written."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaeva.checkpoint.convert.contents import Contents, Kind
from megaeva.checkpoint.convert.rules import Rule
from megaeva.checkpoint.tensors import TensorInfo, TensorSink

MAX_SHARD_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Format:
    """One layout of names. A module of this package holds one or two, and `FORMATS` lists them.

    Attributes:
        name: as after --to.
        title: one line for help and messages.
        kinds: what it can hold; the first is what a recognised file is taken for unless `kind_of` says otherwise.
        recognises: true of the tensor names of a file of this format, of no other's.
        rules: (what, names of the file or None when writing) -> the table.
        read_config: (file or folder of the weights) -> what the configuration beside it says, in the terms of
            `Contents`; None where there is none. Raises CheckpointError on one that cannot be understood.
        refusal: why a model cannot be written in this format (a norm it does not know), or None.
        open_sink: (destination, what, tensors to come, bytes of a shard) -> writer of tensors and configuration.
        implied: keys of `ModelSection` that the format itself decides, {"vision.activation": "quick_gelu"}.
        notes: what the report of an export must say: tokens never trained, preprocessing that the format cannot hold.
    """

    name: str
    title: str
    kinds: tuple[Kind, ...]
    recognises: Callable[[Collection[str]], bool]
    rules: Callable[[Contents, Collection[str] | None], list[Rule]]
    open_sink: Callable[[Path, Contents, Mapping[str, TensorInfo], int], TensorSink]
    read_config: Callable[[Path], Contents | None] = lambda path: None
    refusal: Callable[[Contents], str | None] = lambda contents: None
    implied: Mapping[str, Any] = field(default_factory=dict)
    notes: Callable[[Contents], list[str]] = lambda contents: []


def formats() -> Sequence[Format]:
    """All formats but megaeva's own, in the order in which they are tried."""
    from megaeva.checkpoint.convert import eva, hf, open_clip, openai, timm

    return (eva.NATIVE, eva.MIM, open_clip.OPEN_CLIP, openai.OPENAI, hf.HF_CLIP, hf.HF_EVA, timm.TIMM)
