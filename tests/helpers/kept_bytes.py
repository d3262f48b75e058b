"""What autograd keeps of a forward pass."""

import torch
from torch import Tensor, nn


def kept_bytes(tower: nn.Module, batch: Tensor) -> int:
    """Bytes of the storages that `tower(batch)` saves for its backward pass, each once; parameters are not counted."""
    weights = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    seen: dict[int, int] = {}
    held = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(x)  # so that no storage takes the place of a freed one
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        tower(batch)
    return sum(seen.values())
