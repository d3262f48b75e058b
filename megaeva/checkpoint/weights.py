"""Weights of one run as the start of another: tensors by name, every one of them accounted for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from megaeva.checkpoint.layout import find_checkpoint
from megaeva.checkpoint.pieces import Piece, module_pieces
from megaeva.checkpoint.torch_dist import Reader
from megaeva.errors import CheckpointError
from megaeva.parallel.collectives import gather_objects, together
from megaeva.parallel.grid import Grid

_OPTIMIZER_PREFIX = "optimizer."


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, as checkpoint keys.

    Attributes:
        loaded: read from the checkpoint.
        fresh: in the modules and skipped; they keep the values they had.
        unused: in the checkpoint and not wanted: skipped, or of a part that was not asked for.
        has_checksums: whether what was read was held against checksums; a megaeva before them wrote none.
    """

    path: Path
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    has_checksums: bool = True

    def lines(self) -> list[str]:
        """For the start of a run: one line, and one more for each kind of tensor that was not loaded."""
        lines = [
            f"weights of {self.path}: {len(self.loaded)} tensors loaded{'' if self.has_checksums else ' (no checksums)'}"
        ]
        if self.fresh:
            lines.append(f"  fresh: {_short(self.fresh)}")
        if self.unused:
            lines.append(f"  not used: {_short(self.unused)}")
        return lines


def load_weights(
    path: str | Path, modules: Mapping[str, tuple[nn.Module, Grid]], *, skip: Sequence[str] = ()
) -> LoadReport:
    """Read a checkpoint's weights into modules, in their dtype and cut as they are. All ranks call it.

    A pipeline stage reads its own tensors; what is missing or too much is judged over all stages. Call it before
    `build_optimizer`: fp32 main copies are made from the weights found there.

    Args:
        path: a run folder (its newest checkpoint) or one checkpoint folder; any topology.
        modules: {"vision": (tower, its grid)} reads the keys `vision.*` into that tower.
        skip: keys left as they are, with everything below them: "vision.head" covers "vision.head.weight"; `*` matches
            any characters. A skipped key may be missing on either side.

    Returns:
        What became of the whole modules' tensors, alike on every rank.

    Raises:
        CheckpointError: on every rank: a tensor of a module that the checkpoint lacks, one of the checkpoint that the
            module lacks, or one of another shape, not covered by `skip`; all are listed, and nothing has been read.
    """
    with together("opening a checkpoint"):
        checkpoint = find_checkpoint(path)
        reader = Reader(checkpoint)
    shapes = {key: info.shape for key, info in reader.infos.items() if not key.startswith(_OPTIMIZER_PREFIX)}
    own: list[Piece] = []
    wanted: dict[str, tuple[int, ...]] = {}
    for name, (module, grid) in modules.items():
        pieces = module_pieces(module, name + ".", grid)
        own += pieces
        wanted |= _shapes_on_all_stages(pieces, grid)
    prefixes = tuple(name + "." for name in modules)
    offered = {key for key in shapes if key.startswith(prefixes)}
    to_load = {key for key in wanted if not _skipped(key, skip)}

    problems = [f"{key}: not in the checkpoint" for key in sorted(to_load - shapes.keys())]
    problems += [f"{key}: not in the model" for key in sorted(offered - wanted.keys()) if not _skipped(key, skip)]
    problems += [
        f"{key}: checkpoint {list(shapes[key])}, model {list(wanted[key])}"
        for key in sorted(to_load & shapes.keys())
        if shapes[key] != wanted[key]
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint} does not fit the model; {len(problems)} tensors differ:\n  "
            + "\n  ".join(problems[:20])
            + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
            + "\nEvery tensor must be in both with one shape; use a checkpoint of this model section."
        )
    with together("reading a checkpoint"):
        reader.read_pieces(piece for piece in own if piece.key in to_load)
    reader.close()
    return LoadReport(
        checkpoint,
        has_checksums=reader.has_checksums,
        loaded=tuple(sorted(to_load)),
        fresh=tuple(sorted(wanted.keys() - to_load)),
        unused=tuple(sorted(shapes.keys() - to_load)),
    )


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
