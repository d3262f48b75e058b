"""Bytes that tensors take, and what collectives send, while a block runs."""

import ctypes
import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

_C10D = torch.ops.c10d


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _size(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(tree))


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


# Of a c10d operator: (name, place of the process group, (arguments, ranks) -> bytes this rank sends, rings assumed).
_SENT: dict[Any, tuple[str, int, Callable[[Any, int], float]]] = {
    _C10D.allreduce_.default: ("all-reduce", 1, lambda a, n: 2 * _size(a[0]) * (n - 1) / n),
    _C10D.broadcast_.default: ("broadcast", 1, lambda a, n: _size(a[0])),
    _C10D.allgather_.default: ("all-gather", 2, lambda a, n: _size(a[1]) * (n - 1)),
    _C10D._allgather_base_.default: ("all-gather", 2, lambda a, n: _size(a[1]) * (n - 1)),
    _C10D.allgather_into_tensor_coalesced_.default: ("all-gather", 2, lambda a, n: _size(a[1]) * (n - 1)),
    _C10D.allreduce_coalesced_.default: ("all-reduce", 1, lambda a, n: 2 * _size(a[0]) * (n - 1) / n),
    _C10D._reduce_scatter_base_.default: ("reduce-scatter", 2, lambda a, n: _size(a[1]) * (n - 1) / n),
    _C10D.reduce_scatter_tensor_coalesced_.default: ("reduce-scatter", 2, lambda a, n: _size(a[1]) * (n - 1) / n),
}

# PyTorch has no meta kernel of these; they work in place and return nothing but their handle.
_WITHOUT_META = (_C10D.allreduce_coalesced_.default, _C10D.reduce_scatter_tensor_coalesced_.default)
_ATEN = torch.ops.aten
_SCRATCH = 1 << 24  # numbers: 64 MiB
_META = torch.device("meta")
_ALLOCATION = torch._C._profiler._EventType.Allocation


class Meter(TorchDispatchMode):
    """Counts while it is entered. Of memory inside an operator it sees nothing, `allocations` does.

    With `meta` every tensor that is made under it is on the meta device, whichever was asked for: shapes and dtypes
    only, no memory, no values.

    Attributes:
        flops: of matrix products, by the formulae of PyTorch's FlopCounterMode and `formulae`. That itself watches
            modules through hooks, which keep what a recomputed layer gave until all of a backward pass is done.
        live: bytes of tensors that were made under it and still exist.
        peak: the most so far; set it to `live` to measure a block.
        calls, sent: of collectives by (name, ranks of the group); groups of one rank are left out.
    """

    def __init__(self, formulae: Mapping[Any, Callable[..., int]], *, meta: bool = False) -> None:
        """`formulae` of operators that PyTorch does not know: from shapes to FLOPs."""
        super().__init__()
        self.meta = meta
        self.flops = self.live = self.peak = 0
        self._formulae = flop_registry | {key: shape_wrapper(formula) for key, formula in formulae.items()}
        self.calls: Counter[tuple[str, int]] = Counter()
        self.sent: Counter[tuple[str, int]] = Counter()
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator.

        Raises:
            NotImplementedError: a collective that has no row here; a count without it would be wrong.
        """
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._count(func, args)
            if self.meta and func in _WITHOUT_META:
                return FakeWork().boxed()
        elif self.meta and _takes_device(func) and (kwargs.get("device") is not None or not _tensors(args)):
            kwargs = {**kwargs, "device": _META}
        out = func(*args, **kwargs)
        if func._overloadpacket in self._formulae:
            self.flops += self._formulae[func._overloadpacket](*args, **kwargs, out_val=out)
        for tensor in _tensors(out):
            self._add(tensor.untyped_storage())
        return out

    def _count(self, func: Any, args: Any) -> None:
        if func not in _SENT:
            raise NotImplementedError(f"{func} has no row in megaeva/planning/meter.py; add one")
        name, place, sent = _SENT[func]
        ranks = ProcessGroup.unbox(args[place]).size()
        if ranks > 1:
            self.calls[name, ranks] += 1
            self.sent[name, ranks] += round(sent(args, ranks))

    def _add(self, storage: Any) -> None:
        key = id(storage)
        known = self._storages.get(key)
        if known is not None and known() is storage:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            self.live -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


class Products16(TorchDispatchMode):
    """Products of two 16-bit matrices in fp32, piece by piece in a scratch of its own; sums are fp32's either way.

    For a CPU that multiplies no 16-bit numbers: with AVX2 alone PyTorch's own loop makes 0.3 to 9 GFLOP/s of a core,
    slowest for the gradient of a linear's input, where fp32 makes 50.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scratch = torch.empty(_SCRATCH)

    @staticmethod
    def helps() -> bool:
        """Whether this CPU is such a one."""
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator."""
        if not kwargs and func in (_ATEN.mm.default, _ATEN.addmm.default) and args[-1].dtype is torch.bfloat16:
            out = self._product(*args[-2:])
            return out if func is _ATEN.mm.default else out.add_(args[0])
        return func(*args, **(kwargs or {}))

    def _product(self, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        (m, k), n = a_MK.shape, b_KN.shape[1]
        side = max(1, min(_SCRATCH // (4 * max(k, 1)), isqrt(_SCRATCH // 2)))
        out_MN = a_MK.new_empty(m, n)
        for rows in range(0, m, side):
            a = self._wide(a_MK[rows : rows + side], 0)
            for columns in range(0, n, side):
                b = self._wide(b_KN[:, columns : columns + side], a.numel())
                piece = self._scratch[a.numel() + b.numel() :][: len(a) * b.shape[1]].view(len(a), -1)
                out_MN[rows : rows + side, columns : columns + side] = torch.mm(a, b, out=piece)
        return out_MN

    def _wide(self, matrix: Tensor, start: int) -> Tensor:
        return self._scratch[start : start + matrix.numel()].view(matrix.shape).copy_(matrix)


@dataclass
class Allocations:
    """What torch's allocator gave out and did not get back while a block ran, in bytes.

    Attributes:
        kept: at its end.
        peak: at the most.
        before: what was given out when the block began, as far as it had been counted.
    """

    kept: int = 0
    peak: int = 0
    before: int = 0


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Counts what torch's CPU allocator does for the block, inside operators too, to the byte; known at its end.

    Not counted: what libraries allocate by themselves, and Python's objects. Blocks cannot be nested.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and that there is no GPU
    gc.collect()  # garbage from before would be freed, and counted, at any moment
    found = Allocations()
    counted = count_in_all_threads(True)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield found
    finally:
        count_in_all_threads(counted)
    start = None
    for total, size in _counts(profiler.profiler.kineto_results.experimental_event_tree()):  # type: ignore[union-attr]
        found.before = start = total - size if start is None else start
        found.kept = total - start
        found.peak = max(found.peak, found.kept)


def count_in_all_threads(on: bool) -> bool:
    """Whether torch's CPU allocator counts from here on what any thread allocates and frees; returns whether it did.

    The profiler alone counts in the threads that it knows, and others, gloo's say, free what was allocated there.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    flag = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")
    before, flag.value = flag.value, on
    return before


def _counts(events: Any) -> Iterator[tuple[int, int]]:
    """(bytes that are given out after it, its own) of each allocation and, below 0, of each release."""
    for event in events:
        if event.tag == _ALLOCATION:
            yield event.typed[1].total_allocated, event.typed[1].alloc_size
        yield from _counts(event.children)
