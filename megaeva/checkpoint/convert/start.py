"""Weights as a start: a run's folder or a file of any supported format, open for reading in our names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Literal

from megaeva.checkpoint import layout
from megaeva.checkpoint.average import checkpoint_reader
from megaeva.checkpoint.convert import identify
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import Format
from megaeva.checkpoint.convert.io import open_source
from megaeva.checkpoint.convert.resize import PATCHES, POSITIONS
from megaeva.checkpoint.convert.run_folder import run_contents
from megaeva.checkpoint.convert.streaming import Finite
from megaeva.checkpoint.convert.vocabulary import CLIP_VOCABULARY
from megaeva.checkpoint.tensors import TensorInfo, TensorSource
from megaeva.config.schema import ModelSection
from megaeva.errors import CheckpointError

Part = Literal["vision", "text"]

# No shape shows these, and weights trained with one value mean nothing with another.
_DECIDING: Mapping[Part, tuple[str, ...]] = {
    "vision": ("num_heads", "norm", "norm_position", "qkv_bias", "rope", "rope_pretrain_grid"),
    "text": ("num_heads",),
}
# Neither do these, but training adapts to them: EVA-CLIP goes on from OpenAI's text, QuickGELU, with the exact GELU.
_ADAPTED = ("activation", "norm_epsilon")


@dataclass(frozen=True)
class Weights:
    """Weights that can be read tensor by tensor.

    Attributes:
        source: in our names; of a run the reader of its checkpoint, which has its optimizer too.
        infos: the weights.
        contents: the model that they are of.
        form: name of the file's format, "megaeva" of a run.
        notes: what the file does not say, and how it was taken.
        dropped: tensors of the file that hold no weight, under its names.
    """

    source: TensorSource
    infos: Mapping[str, TensorInfo]
    contents: Contents
    form: str
    notes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """As named; of a run folder the checkpoint that is read."""
        return self.source.path

    def close(self) -> None:
        """Gives up files and maps."""
        self.source.close()


def open_weights(
    path: str | Path,
    *,
    model: ModelSection | None = None,
    parts: Sequence[Part] = (),
    clip_ids: tuple[int, ...] | None = None,
    averaged: bool = False,
) -> Weights:
    """Opens a run's newest checkpoint, one checkpoint, or a file of any supported format. Each rank for itself.

    A file is of the model that the configuration beside it says, else of the published variant that its tensors are.

    Args:
        model: of the recipe that starts here. It decides where nothing else does: between variants that the tensors
            fit alike; and where they fit none, a file that fits this model, at its own image and patch size, is of it.
        parts: towers that the recipe takes from the file, which decide between variants.
        clip_ids: the part of CLIP's vocabulary that the recipe has; those rows are taken of a file that has all.
        averaged: of a run, the averages of its weights in their place.

    Raises:
        CheckpointError: it cannot be read, is of no known format, of a model that cannot be told, or has no averages.
    """
    path = Path(path)
    if layout.is_run(path):
        return _open_run(path, averaged)
    source = Finite(open_source(path, averaged=averaged))
    try:
        form = identify.recognise(source)
        contents, notes = _identified(source, form, model, parts)
        if model is not None and clip_ids is not None and contents.model.text.vocab_size == CLIP_VOCABULARY:
            text = contents.model.text.model_copy(update={"vocab_size": model.text.vocab_size})
            contents = replace(contents, clip_ids=clip_ids, model=contents.model.model_copy(update={"text": text}))
            notes.append(f"text.token_embedding.weight: {len(clip_ids):,} of its {CLIP_VOCABULARY:,} rows")
        imported = identify.in_ours(source, form, contents)
    except BaseException:
        source.close()
        raise
    return Weights(imported, imported.infos, contents, form.name, tuple(notes), imported.dropped)


def _open_run(path: Path, averaged: bool) -> Weights:
    checkpoint = layout.find_checkpoint(path)
    reader = checkpoint_reader(checkpoint, averaged=averaged)
    notes = () if reader.has_checksums else ("no checksums: it was written before there were any",)
    return Weights(reader, reader.weights, run_contents(checkpoint, reader.weights), "megaeva", notes)


# -------------------------------------------------------------------------------------------------- what a file is of


def _identified(
    source: TensorSource, form: Format, model: ModelSection | None, parts: Sequence[Part]
) -> tuple[Contents, list[str]]:
    """What a file holds, and what has to be said about how that was found."""
    try:
        return identify.settled(source, form, None)
    except CheckpointError as error:
        if model is None or form.read_config(source.path) is not None:
            raise
        unsettled = error
    names = identify.candidates(source, form)
    for name in names:
        if not any(differing_flags(identify.published(name), model, part) for part in parts):
            note = f"its tensors fit {' and '.join(names)}; taken for {name}, which is as this recipe"
            return identify.identify(source, form, model=name), [note]
    if names:
        raise unsettled
    try:
        contents = identify.identify(source, form, model=_at_size_of(source, form, model))
    except CheckpointError:
        raise unsettled from None
    note = "no published variant and no configuration beside it: what shapes do not show is taken to be as this recipe"
    return contents, [note]


def _at_size_of(source: TensorSource, form: Format, model: ModelSection) -> ModelSection:
    """The recipe's model with a file's image and patch size, and with what the file's format implies."""
    their_names = {
        our_name: rule.theirs[0]
        for rule in form.rules(Contents(form.kinds[0], model), source.infos.keys())
        for our_name in rule.ours
    }
    patches, positions = (source.infos.get(their_names.get(name, "")) for name in (PATCHES, POSITIONS))
    implied = dict(form.implied)
    if patches is not None and positions is not None and len(patches.shape) == 4 and len(positions.shape) > 1:
        patch, num_tokens = patches.shape[-1], positions.shape[-2]
        implied |= {"vision.patch_size": patch, "vision.image_size": patch * isqrt(max(0, num_tokens - 1))}
    for key, value in implied.items():
        part, name = key.split(".")
        model = model.model_copy(update={part: getattr(model, part).model_copy(update={name: value})})
    return model


# ------------------------------------------------------------------------------------------------------ what must agree


def differing_flags(
    theirs: ModelSection, ours: ModelSection, part: Part, keys: Sequence[str] | None = None
) -> list[str]:
    """One line for each flag of a tower that no shape shows and that is another in the recipe, `ours`."""
    one, other = getattr(theirs, part), getattr(ours, part)
    lines = []
    for key in keys or (*_DECIDING[part], *_ADAPTED):
        counts = key != "rope_pretrain_grid" or one.rope
        if counts and getattr(one, key) != getattr(other, key):
            lines.append(f"{part}.{key} is {getattr(one, key)} in the weights, {getattr(other, key)} in the recipe")
    return lines


def for_tower(weights: Weights, model: ModelSection, part: Part) -> Weights:
    """`weights`, with a note of what this tower must adapt to.

    Raises:
        CheckpointError: they have no such tower, or one that computes something else with the same shapes.
    """
    if not any(name.startswith(part + ".") for name in weights.infos):
        raise CheckpointError(
            f"{weights.path} ({weights.form}) has no {part} tower; it must have one to be its start; "
            f"use a CLIP's weights, or let init.{part} out."
        )
    if faults := differing_flags(weights.contents.model, model, part, _DECIDING[part]):
        raise CheckpointError(
            f"{weights.path} ({weights.form}) is another model than the recipe's, though shapes may agree:\n  "
            + "\n  ".join(faults)
            + "\nWeights trained with one mean nothing with the other, so these must be equal; use the weights' own "
            f"model.{part}, or other weights."
        )
    adapted = differing_flags(weights.contents.model, model, part, _ADAPTED)
    return replace(weights, notes=(*weights.notes, *adapted))
