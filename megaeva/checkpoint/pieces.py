"""What a rank holds of named whole tensors: boxes of them, whatever the topology."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any
from zlib import crc32

from torch import Tensor, nn

from megaeva.parallel.grid import Grid
from megaeva.parallel.shards import full_shape, is_sharded

OPTIMIZER = "optimizer."
"""With what the keys of optimizer state begin, and no weight's."""
RUN_STATE = OPTIMIZER + "run."
"""Of what a run continues with where a checkpoint has it, and begins anew without."""
MAIN = OPTIMIZER + "state.param."
"""Before a parameter's key: its fp32 main copy."""
AVERAGE = OPTIMIZER + "state.ema."
"""Before a parameter's key: its average over the run, of a run that keeps one (optim.ema_decay)."""


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor that this rank holds.

    Attributes:
        key: the whole tensor's name.
        data: a view of the live tensor, of the box's shape: written from, read into.
        whole: shape of the whole (tp=1) tensor.
        offset: the box's first element in it.
        is_main: of all copies of the box, the one that is written.
    """

    key: str
    data: Tensor
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    is_main: bool


def module_pieces(module: nn.Module, prefix: str, grid: Grid) -> list[Piece]:
    """A module's parameters and persistent buffers, by prefix + name.

    How a tensor is cut is read from mcore's attributes on it (see megaeva/parallel/shards.py); without them it is a
    replica. A gated weight is two pieces. Copies are written by all ranks in turn: it is a name's checksum that says by
    which, so that no rank writes much more than another.
    """
    pieces: list[Piece] = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name.endswith("_extra_state"):  # Transformer Engine's fp8 bookkeeping, a pickle and no weight
            continue
        key = prefix + name
        is_main = _is_writer(key, tensor, grid)
        pieces += [
            Piece(key, tensor.detach()[box.slices], box.whole, box.offset, is_main) for box in _boxes(tensor, grid)
        ]
    return pieces


def state_pieces(
    key: str, parameter: Any, start: int, state: Mapping[str, Tensor], grid: Grid, *, is_shard: bool
) -> list[Piece]:
    """The optimizer's state of one parameter, as `optimizer.state.<name of the state>.<key>` of the parameter's shape.

    Args:
        key: the parameter's own.
        start: the first of this rank's elements in the flattened local parameter.
        state: {name: the whole local tensor, or a flat one of the elements from `start` on}.
        is_shard: no other data-parallel rank has these elements; otherwise all have all.
    """
    pieces = []
    local = tuple(parameter.shape)
    boxes = _boxes(parameter, grid)
    for name, tensor in state.items():
        own_key = f"{OPTIMIZER}state.{name}.{key}"
        is_main = (is_sharded(parameter) or grid.tp_rank == 0) if is_shard else _is_writer(own_key, parameter, grid)
        data = tensor.detach()
        if data.shape == local:
            parts = [((0,) * len(local), data)]
        else:
            flat = data.view(-1)
            parts = [
                (offset, flat[elements].view(shape))
                for offset, shape, elements in flat_boxes(local, start, start + flat.numel())
            ]
        for (offset, part), box in product(parts, boxes):
            shared = overlap(offset, part.shape, box.local, box.shape)
            if shared is not None:
                begin, size = shared
                slices = tuple(slice(b - o, b - o + n) for b, o, n in zip(begin, offset, size, strict=True))
                place = tuple(w + b - o for w, b, o in zip(box.offset, begin, box.local, strict=True))
                pieces.append(Piece(own_key, part[slices], box.whole, place, is_main))
    return pieces


def run_state_pieces(module: nn.Module, prefix: str, grid: Grid) -> list[Piece]:
    """What parts of a module keep for their run beside weights, as `optimizer.run.<name of the state>.<part>`.

    A part has a method `run_state` that returns {name: tensor}, the same on all ranks that hold pieces or copies of it.
    """
    pieces = []
    for part_name, part in module.named_modules():
        run_state = getattr(part, "run_state", None)
        for name, tensor in run_state().items() if run_state else ():
            key, shape = f"{RUN_STATE}{name}.{prefix}{part_name}", tuple(tensor.shape)
            pieces.append(Piece(key, tensor, shape, (0,) * len(shape), _is_writer(key, tensor, grid)))
    return pieces


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...], slice]]:
    """The elements start..stop-1 of a flattened tensor as boxes of it, at most 2 * ndim - 1.

    Returns:
        (offset in the tensor, shape, slice of the range start..stop-1), in flat order.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), (), slice(0, 1))]
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last and (start, stop) != (first * row, first * row + row):
        # Within one row: boxes of the rest.
        inner = flat_boxes(shape[1:], start - first * row, stop - first * row)
        return [((first, *offset), (1, *size), part) for offset, size, part in inner]
    begin, end = -(-start // row) * row, stop // row * row  # of the whole rows
    boxes = flat_boxes(shape, start, begin)
    if begin < end:
        offset, size = (begin // row, *(0,) * (len(shape) - 1)), ((end - begin) // row, *shape[1:])
        boxes.append((offset, size, slice(begin - start, end - start)))
    skipped = end - start
    return boxes + [
        (offset, size, slice(part.start + skipped, part.stop + skipped))
        for offset, size, part in flat_boxes(shape, end, stop)
    ]


@dataclass(frozen=True)
class _Box:
    """A box of the local tensor and its place in the whole one."""

    local: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.local, self.shape, strict=True))


def _boxes(tensor: Any, grid: Grid) -> list[_Box]:
    """What the local tensor is of the whole one: itself, a slab of it, or of a gated weight a slab of each half."""
    shape = tuple(tensor.shape)
    whole = tuple(full_shape(tensor, grid.tp_size))
    zeros = (0,) * len(shape)
    if grid.tp_size == 1 or not is_sharded(tensor):
        return [_Box(zeros, shape, whole, zeros)]
    dim, count = tensor.partition_dim, tensor.partition_stride
    size = shape[dim] // count

    def along(at: int, rest: tuple[int, ...]) -> tuple[int, ...]:
        return (*rest[:dim], at, *rest[dim + 1 :])

    # Slab i of this rank is slab i * tp_size + tp_rank of the whole.
    return [
        _Box(along(i * size, zeros), along(size, shape), whole, along((i * grid.tp_size + grid.tp_rank) * size, zeros))
        for i in range(count)
    ]


def _is_writer(key: str, tensor: Any, grid: Grid) -> bool:
    """Whether this rank is the one of all that hold its local tensor that writes it."""
    if is_sharded(tensor):
        return crc32(key.encode()) % grid.dp_size == grid.dp_rank
    return crc32(key.encode()) % (grid.dp_size * grid.tp_size) == grid.dp_rank * grid.tp_size + grid.tp_rank


def overlap(
    offset: Sequence[int], shape: Sequence[int], other_offset: Sequence[int], other_shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offset and shape of what two boxes of one tensor share; None if that is nothing."""
    begin = tuple(max(a, b) for a, b in zip(offset, other_offset, strict=True))
    end = tuple(min(a + n, b + m) for a, n, b, m in zip(offset, shape, other_offset, other_shape, strict=True))
    if any(b >= e for b, e in zip(begin, end, strict=True)):
        return None
    return begin, tuple(e - b for b, e in zip(begin, end, strict=True))
