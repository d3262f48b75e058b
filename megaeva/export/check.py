"""Outputs of a converted file in megaeva and in implementations that this project did not write."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from megaeva.checkpoint.convert.command import open_in_ours
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.io import open_source
from megaeva.checkpoint.tensors import TensorSource
from megaeva.config.schema import ModelSection
from megaeva.errors import CheckpointError
from megaeva.export.peers import peers
from megaeva.export.towers import build_text, build_vision

TOLERANCE = 1e-4
"""Of the largest output. Both sides compute in fp32 from the same numbers; seen: 1e-6."""


@dataclass(frozen=True)
class Side:
    """A file as it is compared: where, in which format, and the model it is of (None: what lies beside it says so).

    Attributes:
        averaged: of a run, the averages of its weights.
    """

    path: Path
    format_name: str
    model: ModelSection | str | None = None
    averaged: bool = False


@torch.no_grad()
def compare(ours: Side, others: list[Side], clip_ids: tuple[int, ...] | None = None) -> Iterator[str]:
    """Yields a line for each tower of `others`: how far its own implementation's outputs are from megaeva's.

    Both get the same two images and captions, of noise. One tower at a time is in memory, in fp32.

    Args:
        ours: runs in megaeva.
        others: each runs in the implementation of its format.
        clip_ids: CLIP's ids of the vocabulary of `ours`, where the others have the whole of it.

    Raises:
        CheckpointError: they differ by more than rounding does.
    """
    source, what, _, _ = open_in_ours(ours.path, ours.model, averaged=ours.averaged)
    try:
        batches = _inputs(what)
        results = {"vision": _vision(source, what, batches["vision"])}
        if what.kind == "clip":
            results["text"] = build_text(source, what)(batches["text"])
    finally:
        source.close()
    if clip_ids is not None:
        batches["text"] = torch.tensor(clip_ids)[batches["text"]]
    for other in others:
        yield from _compared(other, ours, batches, results)


def _compared(other: Side, ours: Side, batches: dict[str, Tensor], results: dict[str, Tensor]) -> Iterator[str]:
    opened, what, _, _ = open_in_ours(other.path, other.model)
    opened.close()
    raw = open_source(other.path)
    try:
        for tower, build in peers(other.format_name, raw, what).items():
            if tower not in results:
                continue
            try:
                peer, reason = (None, build) if isinstance(build, str) else (build(), "")
            except ModuleNotFoundError as error:
                peer, reason = None, f"{error.name} is not installed"
            if peer is None:
                yield f"{tower}: {other.path} is not checked, nothing here runs {other.format_name} files: {reason}"
                continue
            theirs, mine = peer.run(batches[tower]), results[tower]
            difference, largest = (theirs - mine).abs().max().item(), mine.abs().max().item()
            cosine = functional.cosine_similarity(theirs.double(), mine.double(), dim=-1).min().item()
            line = (
                f"{tower}: {other.path} in {peer.name} and {ours.path} in megaeva differ by {difference:.1e} at most, "
                f"outputs are up to {largest:.3g}; cosine {cosine:.9f}"
            )
            if not difference <= TOLERANCE * max(1.0, largest):
                raise CheckpointError(
                    f"{line}; they must agree to {TOLERANCE:.0e} of it: one of the files is of another model than it "
                    "was taken for (activation, heads or place of norms, which shapes do not show); "
                    "remove what was written, and give the right --variant or --model-config."
                )
            yield line
    finally:
        raw.close()


def _vision(source: TensorSource, what: Contents, images: Tensor) -> Tensor:
    tower = build_vision(source, what)
    return tower.tokens(images) if what.kind == "mim" else tower(images)


def _inputs(what: Contents) -> dict[str, Tensor]:
    """Two images, and two captions of different lengths in ids of the model's own vocabulary."""
    generator = torch.Generator().manual_seed(0)
    size = what.model.vision.image_size
    batches = {"vision": torch.randn(2, 3, size, size, generator=generator)}
    if what.kind == "clip":
        text = what.model.text
        end = (text.vocab_size if what.clip_ids is None else len(what.clip_ids)) - 1
        tokens = torch.randint(1, end, (2, text.context_length), generator=generator)
        for row, place in enumerate((text.context_length - 1, text.context_length // 2)):
            tokens[row, place] = end
            tokens[row, place + 1 :] = 0
        batches["text"] = tokens
    return batches
