"""Small collectives of the training loop: agreement on flags, sums, and errors that every rank learns about."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megaeva.errors import UserError
from megaeva.parallel.grid import Grid
from megaeva.parallel.runtime import Runtime

T = TypeVar("T")


class RemoteError(UserError):
    """Another rank failed; this one stops with it instead of waiting in a collective."""


def all_sum(values: list[float], runtime: Runtime, group: dist.ProcessGroup | None = None) -> list[float]:
    """Element-wise fp64 sums over the ranks of `group` (the world if None), which all call it; no call on one rank."""
    if (group.size() if group is not None else runtime.world_size) == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=runtime.device)
    dist.all_reduce(total, group=group)
    return total.tolist()


def all_max(values: list[float], runtime: Runtime) -> list[float]:
    """Element-wise maxima over all ranks, which all call it; NaN where one rank has NaN. No call on one rank."""
    if runtime.world_size == 1:
        return values
    flags = [float(math.isnan(value)) for value in values]
    found = torch.tensor([-math.inf if math.isnan(value) else value for value in values] + flags, dtype=torch.float64)
    found = found.to(runtime.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    peaks, flags = found[: len(values)].tolist(), found[len(values) :].tolist()
    return [math.nan if flag else peak for peak, flag in zip(peaks, flags, strict=True)]


@dataclass(frozen=True)
class RowsInFlight:
    """Rows of all ranks that may still be on their way; not differentiable."""

    _gathered: Tensor
    _work: dist.Work | None

    @property
    def rows(self) -> Tensor:
        """[ranks * X, D], of which only shape and dtype are certain before `wait`."""
        return self._gathered

    def wait(self) -> Tensor:
        """The rows in rank order, [ranks * X, D]."""
        if self._work is not None:
            self._work.wait()
        return self._gathered


def start_gather_rows(rows_XD: Tensor, group: dist.ProcessGroup | None) -> RowsInFlight:
    """Begin `all_gather_rows` and return at once; `rows_XD` must stay as it is until `wait`."""
    if group is None or group.size() == 1:
        return RowsInFlight(rows_XD, None)
    gathered = rows_XD.new_empty(group.size() * rows_XD.shape[0], *rows_XD.shape[1:])
    return RowsInFlight(
        gathered, dist.all_gather_into_tensor(gathered, rows_XD.contiguous(), group=group, async_op=True)
    )


def all_gather_rows(rows_XD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks in rank order, [ranks * X, D]; all ranks pass the same shape. Not differentiable.

    `group` None: this process alone.
    """
    return start_gather_rows(rows_XD, group).wait()


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """One picklable value from every rank of `group` (the world if None), in rank order, on each of them.

    Values are pickled, between our own processes only.
    """
    values: list[Any] = [value] * dist.get_world_size(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank."""
    return gather_objects(value)[0]


def gather_or_raise(
    value: T, error: Exception | None, failed: Callable[[int, str], Exception], group: dist.ProcessGroup | None = None
) -> list[T]:
    """`gather_objects` if no rank of `group` has an error; otherwise raise on every one. All its ranks must call it.

    The failing rank raises its own error, the others `failed(rank in the group, the error in words)`.
    """
    gathered = gather_objects((value, None if error is None else f"{type(error).__name__}: {error}"), group)
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(gathered):
        if text is not None:
            raise failed(rank, text)
    return [value for value, _ in gathered]


def raise_together(error: Exception | None, what: str) -> None:
    """Return if no rank has an error; otherwise raise on every rank. All ranks must call it.

    The failing rank raises its own error, the others a `RemoteError` that names the rank and quotes it.
    """
    gather_or_raise(None, error, lambda rank, text: RemoteError(f"rank {rank} failed while {what}: {text}"))


@contextmanager
def together(what: str) -> Iterator[None]:
    """Run a block on every rank; if it fails on one, it fails on all. Not for blocks that contain collectives."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error, what)


def all_logsumexp(value_X: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log sum over the ranks of `group` (None: this process alone) of exp(value), element by element, floating.

    The same bits on every rank, which all call it; not differentiable. NaN on one rank is NaN on all.
    """
    if group is None or group.size() == 1:
        return value_X
    peak_X = value_X.clone()
    dist.all_reduce(peak_X, op=dist.ReduceOp.MAX, group=group)
    # exp(value) itself where no finite peak can be subtracted: -inf - -inf is NaN; and NaN lost by MAX is in the sum.
    peak_X.masked_fill_(~peak_X.isfinite(), 0)
    total_X = torch.exp(value_X - peak_X)
    dist.all_reduce(total_X, group=group)
    return total_X.log_().add_(peak_X)


def broadcast_from_last_stage(value: Tensor, grid: Grid) -> Tensor:
    """The last pipeline stage's tensor on every stage, which all call it with one shape and dtype, perhaps in place."""
    if grid.pp_size > 1:
        value = value.contiguous()
        dist.broadcast(value, dist.get_global_rank(grid.groups.pp, grid.pp_size - 1), group=grid.groups.pp)
    return value
