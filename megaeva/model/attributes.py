"""The attributes by which Megatron-core, checkpoints and tests know how a parameter is cut."""

from torch import nn


def mark_sharded(param: nn.Parameter, dim: int, stride: int = 1) -> None:
    """Says that each tensor-parallel rank holds a piece along `dim`; stride 2 for a gated [w1; w2]."""
    param.tensor_model_parallel = True  # type: ignore[attr-defined]
    param.partition_dim = dim  # type: ignore[attr-defined]
    param.partition_stride = stride  # type: ignore[attr-defined]


def mark_rest_replicated(module: nn.Module) -> None:
    """Says of every parameter not marked yet that all tensor-parallel ranks hold it whole."""
    for param in module.parameters():
        if not hasattr(param, "tensor_model_parallel"):
            param.tensor_model_parallel = False  # type: ignore[attr-defined]
            param.partition_dim = -1  # type: ignore[attr-defined]
            param.partition_stride = 1  # type: ignore[attr-defined]
