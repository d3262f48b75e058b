"""`megaeva convert`: a conversion, or ONNX graphs, and what other implementations make of the result."""

from collections.abc import Iterator
from pathlib import Path

from megaeva.checkpoint.convert.command import MEGAEVA, convert, find_format, open_in_ours
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.destination import refuse_existing
from megaeva.checkpoint.convert.resize import Method, resized
from megaeva.checkpoint.convert.vocabulary import exported_text, vocabulary_notes
from megaeva.config.schema import ModelSection
from megaeva.errors import CheckpointError
from megaeva.export.check import Side, compare
from megaeva.export.onnx import write_onnx

ONNX = "onnx"


def run_convert(
    source: Path,
    destination: Path,
    to: str,
    *,
    model: ModelSection | str | None,
    image_size: int | None,
    patch_size: int | None,
    resize: Method,
    shard_bytes: int,
    averaged: bool,
    check: bool,
) -> Iterator[str]:
    """Does it, and yields the lines for the user.

    Args:
        model: what the source is, where neither it nor the configuration beside it says so.
        averaged: write the averages of a run's weights in their place.
        check: run source and destination in the implementations of their formats too, and compare.

    Raises:
        UserError: the source, the destination or the pair of them; says which, what must be and what to do.
    """
    find_format(to, ONNX)
    if to == ONNX:
        refuse_existing(destination)
        weights, what, source_format, notes = open_in_ours(source, model, averaged=averaged)
        try:
            vision = what.model.vision
            sizes = (image_size or vision.image_size, patch_size or vision.patch_size)
            weights, what = resized(weights, what, *sizes, resize)
            yield f"{source} ({source_format}) -> {destination} ({ONNX})"
            try:
                yield from write_onnx(weights, what, destination)
            except OSError as error:
                raise CheckpointError(
                    f"{destination} cannot be written ({error.strerror or error}); its disk must take the graphs and "
                    "their weights; free space or name a destination elsewhere; nothing was left behind."
                ) from error
            yield from (f"note: {note}" for note in [*notes, *vocabulary_notes(what)])
        finally:
            weights.close()
    else:
        report = convert(
            source,
            destination,
            to=to,
            model=model,
            image_size=image_size,
            patch_size=patch_size,
            resize=resize,
            shard_bytes=shard_bytes,
            averaged=averaged,
        )
        yield from report.lines()
        what = report.contents
    if check:
        yield from _check(source, model, averaged, destination, to, what)


def _check(
    source: Path, model: ModelSection | str | None, averaged: bool, destination: Path, to: str, made: Contents
) -> Iterator[str]:
    """Compares what was converted: outputs of megaeva with those of the implementations of both formats.

    Args:
        made: what the destination holds.
    """
    weights, what, source_format, _ = open_in_ours(source, model, averaged=averaged)
    weights.close()
    given = Side(source, source_format, model, averaged)
    others = []
    same_size = _size(what) == _size(made)
    if source_format != MEGAEVA and (same_size or to == ONNX):
        others.append(given)
    elif not same_size:
        yield f"{source} is not compared: its images or patches are of another size than those of {destination}"
    ours = given
    if to == MEGAEVA:
        ours = Side(destination, MEGAEVA)
    elif to != ONNX:
        written = Side(destination, to, made.model.model_copy(update={"text": exported_text(made)}))
        others.append(written)
        if source_format != MEGAEVA or not same_size:
            ours = written
    if not others:
        yield f"nothing to check: {source} and {destination} are both megaeva's own"
    else:
        yield from compare(ours, others, what.clip_ids if ours is given else None)


def _size(what: Contents) -> tuple[int, int]:
    return what.model.vision.image_size, what.model.vision.patch_size
