"""Weights of one run as the start of another: tensors by name, every one of them accounted for."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megaeva.checkpoint import torch_dist
from megaeva.checkpoint.layout import find_checkpoint
from megaeva.checkpoint.sharded import Sharded, full_shape, sharded_tensors
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
    """

    path: Path
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the start of a run: one line, and one more for each kind of tensor that was not loaded."""
        lines = [f"weights of {self.path}: {len(self.loaded)} tensors loaded"]
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
        metadata = open_checkpoint(checkpoint)
    shapes = {k: s for k, s in torch_dist.tensor_shapes(metadata).items() if not k.startswith(_OPTIMIZER_PREFIX)}
    own: dict[str, Sharded] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, (module, grid) in modules.items():
        tensors = sharded_tensors(module, name + ".", grid)
        own |= tensors
        wanted |= _shapes_on_all_stages(tensors, grid)
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
    own_to_load = {key: sharded for key, sharded in own.items() if key in to_load}
    with reading(checkpoint):
        loaded = torch_dist.read(own_to_load, checkpoint, metadata)
    assign(own_to_load, loaded)
    return LoadReport(
        checkpoint,
        loaded=tuple(sorted(to_load)),
        fresh=tuple(sorted(wanted.keys() - to_load)),
        unused=tuple(sorted(shapes.keys() - to_load)),
    )


def _shapes_on_all_stages(tensors: Mapping[str, Sharded], grid: Grid) -> dict[str, tuple[int, ...]]:
    """Whole shapes of a module's tensors on all its pipeline stages, which call it together."""
    here = {key: full_shape(sharded) for key, sharded in tensors.items()}
    if grid.pp_size == 1:
        return here
    return {key: shape for stage in gather_objects(here, grid.groups.pp) for key, shape in stage.items()}


def open_checkpoint(checkpoint: Path) -> Metadata:
    """The metadata of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, damaged or not a checkpoint's.
    """
    try:
        return torch_dist.read_metadata(checkpoint)
    except (OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{checkpoint / '.metadata'} cannot be used: {error}; it must be what megaeva wrote; "
            f"the checkpoint is damaged or not ours, use another one."
        ) from error


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn a failure to read tensors into a CheckpointError that names the checkpoint and the first cause."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(
            f"{checkpoint} cannot be read (rank {rank}: {torch_dist.first_line(cause)}); its "
            f"files must be complete and of this model; it is damaged or another model's, use another checkpoint."
        ) from error


@torch.no_grad()
def assign(targets: Mapping[str, Sharded], loaded: Mapping[str, Tensor]) -> None:
    """Copy what was not read in place (strided pieces, other storage) into the targets' own tensors."""
    for key, target in targets.items():
        if target.data.data_ptr() != loaded[key].data_ptr():
            target.data.copy_(loaded[key])


def _skipped(key: str, skip: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, pattern + ".*") for pattern in skip)


def _short(keys: Sequence[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
