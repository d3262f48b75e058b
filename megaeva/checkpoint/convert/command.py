"""One set of weights from one format into another, tensor by tensor."""

import difflib
import errno
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megaeva.checkpoint.convert import identify, ours
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.destination import refuse_existing
from megaeva.checkpoint.convert.format import MAX_SHARD_BYTES, Format, formats
from megaeva.checkpoint.convert.io import RunSink, open_source
from megaeva.checkpoint.convert.resize import Method, resized
from megaeva.checkpoint.convert.rules import exported, plan_export
from megaeva.checkpoint.convert.run_folder import RunSource, run_contents
from megaeva.checkpoint.convert.streaming import Finite, stream
from megaeva.checkpoint.tensors import TensorInfo, TensorSink, TensorSource
from megaeva.config.schema import ModelSection
from megaeva.errors import CheckpointError, listed

MEGAEVA = "megaeva"
"""The format of runs, by name; `formats()` has the others."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        source: of a run the checkpoint.
        source_format, target_format: names.
        contents: of the destination.
        num_bytes: of the tensors written.
        notes: what could not be told from the file and how it was taken, what the format cannot hold.
    """

    source: Path
    source_format: str
    destination: Path
    target_format: str
    contents: Contents
    num_tensors: int
    num_parameters: int
    num_bytes: int
    seconds: float
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the user."""
        speed = self.num_bytes / max(self.seconds, 1e-9) / 1e9
        return [
            f"{self.source} ({self.source_format}) -> {self.destination} ({self.target_format})",
            f"{self.num_tensors} tensors, {self.num_parameters:,} parameters, {self.num_bytes / 1e9:.2f} GB in "
            f"{self.seconds:.1f} s ({speed:.2f} GB/s)",
            *(f"note: {note}" for note in self.notes),
        ]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    model: ModelSection | str | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    resize: Method = "upstream",
    shard_bytes: int = MAX_SHARD_BYTES,
    averaged: bool = False,
) -> Converted:
    """Writes the weights of a file, folder or run in another format. Never is more than a few tensors in memory.

    What can be refused is refused before the first byte; after that any error removes what was written.

    Args:
        destination: a file or a folder, as the format has it; must not exist.
        to: "megaeva" or a name of `formats()`.
        model: what the source is, where neither it nor the configuration beside it says so: section or published name.
        image_size, patch_size: of the destination; None as the source.
        resize: how position embeddings and patch kernels follow; see resize.py.
        shard_bytes: most bytes of a file, of formats that may have several.
        averaged: the averages of a run's weights, fp32, in their place.

    Raises:
        CheckpointError: of one of the two, or of the pair: says which, what must be and what to do.
    """
    start = time.perf_counter()
    source, destination = Path(source), Path(destination)
    target = find_format(to)
    refuse_existing(destination)
    weights, contents, source_format, notes = open_in_ours(source, model, averaged=averaged)
    try:
        before = contents.model.vision
        sizes = image_size or before.image_size, patch_size or before.patch_size
        if sizes != (before.image_size, before.patch_size):
            weights, contents = resized(weights, contents, *sizes, resize)
            notes = [
                *notes,
                f"resized ({resize}) from images of {before.image_size} px in patches of {before.patch_size} px to "
                f"{sizes[0]} px in patches of {sizes[1]} px",
            ]
        if target is None:
            plan, tensors = weights.infos, _all(weights)
        else:
            weights, contents, left_out = _part(weights, contents, target)
            rules = target.rules(contents, None)
            plan, tensors = plan_export(rules, weights.infos, weights.path), exported(rules, weights)
            notes = [*notes, *left_out, *target.notes(contents)]
        num_bytes = sum(info.num_bytes for info in plan.values())
        _check_space(destination, num_bytes)
        _write(tensors, plan, destination, contents, target, shard_bytes, num_bytes)
    finally:
        weights.close()
    return Converted(
        source=weights.path,
        source_format=source_format,
        destination=destination,
        target_format=to,
        contents=contents,
        num_tensors=len(plan),
        num_parameters=sum(math.prod(info.shape) for info in weights.infos.values()),
        num_bytes=num_bytes,
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
    )


def find_format(name: str, *others: str) -> Format | None:
    """The format of that name, None for megaeva's own and for `others`, which the caller knows.

    Raises:
        CheckpointError: there is none; names the nearest.
    """
    known = {form.name: form for form in formats()}
    names = [MEGAEVA, *known, *others]
    if name in names:
        return known.get(name)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    raise CheckpointError(
        f"format {name!r} is not known; it must be one of {', '.join(names)}; "
        + (f"did you mean {near[0]}?" if near else "name one of them.")
    )


def open_in_ours(
    path: Path, model: ModelSection | str | None, *, averaged: bool = False
) -> tuple[TensorSource, Contents, str, list[str]]:
    """Returns a source in our names, what it is, its format's name, and what has to be said about that.

    Args:
        model: what it is, where neither it nor the configuration beside it says so.
        averaged: of a run, the averages of its weights in their place.

    Raises:
        CheckpointError: as `convert`.
    """
    opened = open_source(path, averaged=averaged)
    try:
        source = Finite(opened)
        if isinstance(opened, RunSource):
            if model is not None:
                raise CheckpointError(
                    f"{path} is a run, whose megaeva.json says which model it is; no other may be given; "
                    "leave the variant out."
                )
            contents = run_contents(opened.path, opened.infos)
            _check_shapes(source, contents)
            return source, contents, MEGAEVA, []
        form = identify.recognise(source)
        contents, notes = identify.settled(source, form, model)
        return identify.in_ours(source, form, contents), contents, form.name, notes
    except BaseException:
        opened.close()
        raise


def _check_shapes(source: TensorSource, contents: Contents) -> None:
    must = ours.shapes(contents)
    found = {name: info.shape for name, info in source.infos.items()}
    faults = [
        f"{name}: is {list(found[name]) if name in found else 'missing'}, must be {list(shape)}"
        for name, shape in must.items()
        if found.get(name) != shape
    ]
    faults += [f"{name}: {list(shape)} is not explained" for name, shape in found.items() if name not in must]
    if faults:
        raise CheckpointError(
            f"{source.path} does not hold what its megaeva.json says, {len(faults)} differences:\n"
            f"{listed(faults)}\nEvery tensor must be of the model there; the checkpoint is damaged, use another one."
        )


class _VisionAlone:
    """The vision tower of both, as a `TensorSource`."""

    def __init__(self, source: TensorSource) -> None:
        self.path = source.path
        self.infos: Mapping[str, TensorInfo] = {n: i for n, i in source.infos.items() if n.startswith("vision.")}
        self.read, self.close = source.read, source.close


def _part(weights: TensorSource, contents: Contents, target: Format) -> tuple[TensorSource, Contents, list[str]]:
    """What the format can hold of the weights, and a note of what is left out."""
    notes = []
    if contents.kind == "clip" and target.kinds == ("vision",):
        weights, contents = _VisionAlone(weights), replace(contents, kind="vision")
        notes = [f"{target.name} holds a vision tower: text tower and logit scale are left out"]
    if contents.kind not in target.kinds:
        able = [MEGAEVA, *(form.name for form in formats() if contents.kind in form.kinds)]
        raise CheckpointError(
            f"{weights.path} holds weights of kind {contents.kind}, {target.name} holds {' or '.join(target.kinds)}; "
            f"the format must be able to hold them; use one of {', '.join(able)}."
        )
    if reason := target.refusal(contents):
        raise CheckpointError(
            f"{weights.path} cannot be written as {target.name}: {reason}; the format must be able to say what the "
            f"model is; use another one ({MEGAEVA} holds every model)."
        )
    return weights, contents, notes


def _all(source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    return ((name, source.read(name)) for name in source.infos)


def _write(
    tensors: Iterator[tuple[str, Tensor]],
    plan: Mapping[str, TensorInfo],
    destination: Path,
    contents: Contents,
    target: Format | None,
    shard_bytes: int,
    num_bytes: int,
) -> None:
    sink: TensorSink | None = None
    try:
        sink = (
            RunSink(destination, contents, plan)
            if target is None
            else target.open_sink(destination, contents, plan, shard_bytes)
        )
        stream(tensors, sink)
        sink.finish()
    except BaseException as error:
        if sink is not None:
            sink.abort()
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{destination} cannot be written ({os.strerror(error.errno) if error.errno else error}); its disk "
                f"must take {num_bytes / 2**20:,.0f} MiB; "
                + ("free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that")
                + " or name a destination elsewhere; nothing was left behind."
            ) from error
        raise


def _check_space(destination: Path, num_bytes: int) -> None:
    there = next(parent for parent in destination.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise CheckpointError(
            f"{destination} needs {num_bytes / 2**20:,.0f} MiB and its disk has {free / 2**20:,.0f} MiB; it must fit; "
            "free space or name a destination elsewhere."
        )
