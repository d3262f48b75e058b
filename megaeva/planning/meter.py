"""Bytes that tensors take, and what collectives send, while a block runs."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses import FakeTensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_C10D = torch.ops.c10d


def _size(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))


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


class Meter(TorchDispatchMode):
    """Counts while it is entered; of real and of fake tensors. Memory inside an operator is not seen.

    Attributes:
        live: bytes of tensors that were made under it and still exist.
        peak: the most so far; set it to `live` to measure a block.
        calls, sent: of collectives by (name, ranks of the group); groups of one rank are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.calls: Counter[tuple[str, int]] = Counter()
        self.sent: Counter[tuple[str, int]] = Counter()
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator.

        Raises:
            NotImplementedError: a collective that has no row here; a count without it would be wrong.
        """
        if func.namespace == "c10d":
            self._count(func, args)
        if func in _WITHOUT_META and any(isinstance(x, FakeTensor) for x in tree_leaves(args)):
            return FakeWork().boxed()
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
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
