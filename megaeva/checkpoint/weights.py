"""Weights of a run or a file as the start of a run: tensors by name, every one of them accounted for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaeva.checkpoint import layout
from megaeva.checkpoint.convert.resize import PATCHES, POSITIONS, Method, Resized
from megaeva.checkpoint.convert.start import Weights, open_weights
from megaeva.checkpoint.pieces import Piece, module_pieces
from megaeva.checkpoint.tensors import TensorSource
from megaeva.checkpoint.torch_dist import Reader
from megaeva.errors import CheckpointError, listed
from megaeva.parallel.collectives import broadcast_object, gather_objects, together
from megaeva.parallel.grid import Grid


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, as checkpoint keys.

    Attributes:
        path: of the weights; of a run its checkpoint.
        form: name of their format.
        loaded: read from the weights.
        resized: those of `loaded` that were read at another size, "key: [1, 17, 8] to [1, 26, 8], method".
        fresh: in the modules and skipped; they keep the values they had.
        unused: in the weights and not wanted: skipped, of a part that was not asked for, or (under the file's own
            name) no weight of ours.
        notes: what the weights do not say, and where the model differs from theirs.
    """

    path: Path
    form: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For the start of a run: one line, and one more for each kind of tensor that was not just loaded."""
        lines = [f"weights of {self.path} ({self.form}): {len(self.loaded)} tensors loaded"]
        for what, keys in (("resized", self.resized), ("fresh", self.fresh), ("not used", self.unused)):
            if keys:
                lines.append(f"  {what}: {_short(keys)}")
        return lines + [f"  note: {note}" for note in self.notes]

    def record(self) -> dict[str, Any]:
        """All of it, for the run's manifest."""
        return asdict(self) | {"path": str(self.path)}


def agreed_path(path: str | Path) -> Path:
    """What all ranks open: a file as it is, of a run the checkpoint that is its newest on rank 0. All ranks call it.

    A run that trains meanwhile may finish a checkpoint, or delete one, between two ranks' looks.

    Raises:
        CheckpointError: on every rank: the run has none.
    """
    path = Path(path)
    with together("looking for weights"):
        found = layout.find_checkpoint(path) if layout.is_run(path) else path
    return broadcast_object(found)


def load_weights(
    weights: Weights | str | Path,
    modules: Mapping[str, tuple[nn.Module, Grid]],
    *,
    skip: Sequence[str] = (),
    resize: Method | None = None,
) -> LoadReport:
    """Read weights into modules, in their dtype and cut as they are. All ranks call it.

    Of a run each rank reads its own boxes; of a file every tensor that it holds a part of. What is missing or too much
    is judged over all pipeline stages. Call it before `build_optimizer`: fp32 main copies are made from the weights
    found there.

    Args:
        weights: stay open; or a path that `open_weights` reads without more knowledge.
        modules: {"vision": (tower, its grid)} reads the keys `vision.*` into that tower.
        skip: keys left as they are, with everything below them: "vision.head" covers "vision.head.weight"; `*` matches
            any characters. A skipped key may be missing on either side.
        resize: how position embeddings and patch kernel of the vision tower get another size; None: they must fit.

    Returns:
        What became of the whole modules' tensors, alike on every rank.

    Raises:
        CheckpointError: on every rank: a tensor of a module that the weights lack, one of the weights that the
            module lacks, or one of another shape, not covered by `skip`; all are listed, and nothing has been read.
    """
    if not isinstance(weights, Weights):
        path = agreed_path(weights)
        with together("opening weights"):
            opened = open_weights(path)
        try:
            return load_weights(opened, modules, skip=skip, resize=resize)
        finally:
            opened.close()
    own: list[Piece] = []
    wanted: dict[str, tuple[int, ...]] = {}
    for name, (module, grid) in modules.items():
        pieces = module_pieces(module, name + ".", grid)
        own += pieces
        wanted |= _shapes_on_all_stages(pieces, grid)
    to_load = {key for key in wanted if not _skipped(key, skip)}
    resized = None if resize is None else _resized(weights, wanted, resize)
    _check(weights, resized, wanted, to_load, tuple(name + "." for name in modules), skip)
    changed = [] if resized is None else [key for key in (POSITIONS, PATCHES) if _changes(weights, resized, key)]
    with together("reading weights"):
        plain = [piece for piece in own if piece.key in to_load and piece.key not in changed]
        if isinstance(weights.source, Reader):
            weights.source.read_pieces(plain)
        else:
            _read_whole(weights.source, plain)
        if resized is not None:
            _read_whole(resized, [piece for piece in own if piece.key in to_load and piece.key in changed])
    shapes = {key: list(info.shape) for key, info in weights.infos.items()}
    return LoadReport(
        weights.path,
        weights.form,
        loaded=tuple(sorted(to_load)),
        resized=tuple(f"{key}: {shapes[key]} to {list(wanted[key])}, {resize}" for key in changed if key in to_load),
        fresh=tuple(sorted(wanted.keys() - to_load)),
        unused=(*sorted(weights.infos.keys() - to_load), *weights.dropped),
        notes=weights.notes,
    )


def _check(
    weights: Weights,
    resized: TensorSource | None,
    wanted: Mapping[str, tuple[int, ...]],
    to_load: set[str],
    prefixes: tuple[str, ...],
    skip: Sequence[str],
) -> None:
    shapes = {key: (weights if resized is None else resized).infos[key].shape for key in weights.infos}
    offered = {key for key in shapes if key.startswith(prefixes)}
    problems = [f"{key}: not in the checkpoint" for key in sorted(to_load - shapes.keys())]
    problems += [f"{key}: not in the model" for key in sorted(offered - wanted.keys()) if not _skipped(key, skip)]
    problems += [
        f"{key}: checkpoint {list(weights.infos[key].shape)}, model {list(wanted[key])}"
        for key in sorted(to_load & shapes.keys())
        if shapes[key] != wanted[key]
    ]
    if problems:
        raise CheckpointError(
            f"{weights.path} ({weights.form}) does not fit the model; {len(problems)} tensors differ:\n"
            f"{listed(problems)}\n"
            "Every tensor must be in both with one shape; use weights of this model section."
        )


def _resized(weights: Weights, wanted: Mapping[str, tuple[int, ...]], method: Method) -> Resized | None:
    """The weights seen at the image and patch size of a vision tower; None where none is wanted."""
    if POSITIONS not in wanted or PATCHES not in wanted:
        return None
    grid, patch = isqrt(wanted[POSITIONS][1] - 1), wanted[PATCHES][-1]
    return Resized(weights.source, grid, patch, method, weights.contents.model.vision.ln_pre)


def _changes(weights: Weights, resized: Resized, key: str) -> bool:
    return key in weights.infos and weights.infos[key].shape != resized.infos[key].shape


@torch.no_grad()
def _read_whole(source: TensorSource, pieces: Iterable[Piece]) -> None:
    """Fill pieces from whole tensors, each of which is read once."""
    by_key: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_key.setdefault(piece.key, []).append(piece)
    for key, boxes in by_key.items():
        whole = source.read(key)
        for box in boxes:
            slices = tuple(slice(o, o + n) for o, n in zip(box.offset, box.data.shape, strict=True))
            box.data.copy_(whole[slices])


def _shapes_on_all_stages(pieces: Sequence[Piece], grid: Grid) -> dict[str, tuple[int, ...]]:
    """Whole shapes of a module's tensors on all its pipeline stages, which call it together."""
    here = {piece.key: piece.whole for piece in pieces}
    if grid.pp_size == 1:
        return here
    return {key: shape for stage in gather_objects(here, grid.groups.pp) for key, shape in stage.items()}


def _skipped(key: str, skip: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, pattern + ".*") for pattern in skip)


def _short(keys: Sequence[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
