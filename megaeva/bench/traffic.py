"""Bytes that a rank sends: collectives are counted as the ring algorithms move them, whatever the backend does."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

Arguments = Mapping[str, Any]


def _size(tensors: Tensor | Iterable[Tensor]) -> int:
    one = [tensors] if isinstance(tensors, Tensor) else tensors
    return sum(tensor.numel() * tensor.element_size() for tensor in one)


def _scattered(arguments: Arguments, num_ranks: int) -> float:
    # The rank that sends gives a list, the others give None.
    return _size(arguments["scatter_list"] or ()) * (num_ranks - 1) / num_ranks


# Function of torch.distributed: (its arguments by name, ranks of the group) -> bytes this rank sends.
_SENT: dict[str, Callable[[Arguments, int], float]] = {
    "all_gather": lambda a, ranks: _size(a["tensor"]) * (ranks - 1),
    "all_gather_into_tensor": lambda a, ranks: _size(a["input_tensor"]) * (ranks - 1),
    "all_reduce": lambda a, ranks: 2 * _size(a["tensor"]) * (ranks - 1) / ranks,
    "reduce_scatter": lambda a, ranks: _size(a["input_list"]) * (ranks - 1) / ranks,
    "reduce_scatter_tensor": lambda a, ranks: _size(a["input"]) * (ranks - 1) / ranks,
    "all_to_all": lambda a, ranks: _size(a["input_tensor_list"]) * (ranks - 1) / ranks,
    "all_to_all_single": lambda a, ranks: _size(a["input"]) * (ranks - 1) / ranks,
    "scatter": _scattered,
    "barrier": lambda a, ranks: 0,
}
# Others that send; a count that left them out would be wrong.
_NOT_COUNTED = (
    "all_gather_coalesced", "all_reduce_coalesced", "batch_isend_irecv", "broadcast", "gather", "isend", "reduce",
    "send",
)  # fmt: skip


def count_traffic(work: Callable[[], object]) -> int:
    """Bytes that this rank sends in the collectives of `work`, backward passes in it included.

    With R ranks an all-gather of n bytes each sends n (R - 1), a reduce-scatter of n bytes in all n (R - 1) / R, an
    all-reduce both, 2 n (R - 1) / R. open_clip's gradient of a gather is a reduce-scatter over NCCL and a scatter from
    each rank over gloo; both count the same. Not seen: functions that a module imported by name, and megatron-core's
    own groups' methods.

    Raises:
        NotImplementedError: `work` sends by a function that has no row here.
    """
    sent, depth = 0.0, 0

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent, depth
            if depth == 0:
                if name in _NOT_COUNTED:
                    raise NotImplementedError(
                        f"torch.distributed.{name} has no row in megaeva/bench/traffic.py; add one"
                    )
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                sent += _SENT[name](bound.arguments, dist.get_world_size(bound.arguments["group"]))
            depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth -= 1

        return call

    modules = (dist, distributed_c10d)
    originals = {(module, name): getattr(module, name) for module in modules for name in (*_SENT, *_NOT_COUNTED)}
    try:
        for (module, name), original in originals.items():
            setattr(module, name, counted(name, original))
        work()
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)
    return round(sent)
