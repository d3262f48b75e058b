"""Megatron-core's parallel linears, with a bias given from outside and no detours on a single rank."""

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megaeva.config.schema import Fp8Section
from megaeva.model.attributes import mark_sharded
from megaeva.model.fp8 import EmulatedFp8


class ColumnLinear(ColumnParallelLinear):
    """Linear whose output features are cut over tp. `stride` 2: the weight is a gated [w1; w2].

    With `fp8` it multiplies in emulated FP8 while it is in training mode; what goes between ranks is not quantised.
    Under sequence parallelism Transformer Engine's blocks of rows begin anew with each rank's tokens, these do not.
    """

    def __init__(self, *args: Any, stride: int = 1, fp8: Fp8Section | None = None, **kwargs: Any) -> None:
        super().__init__(*args, stride=stride, **kwargs)
        # mcore marks a weight only while it initialises it; ours are initialised by init.py.
        mark_sharded(self.weight, 0, stride)
        self._alone = self.tp_group is None or self.tp_group.size() == 1
        self.fp8 = None if fp8 is None else EmulatedFp8(fp8)

    def forward(self, input_: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Returns this rank's features of x W^T + bias; `bias` (this rank's piece) stands in for an own one.

        Under sequence parallelism `input_` is this rank's tokens and the output has those of all.
        """
        if self.fp8 is not None and self.training:
            # As Transformer Engine: its own bias within the product, one from outside after the product is rounded.
            output = self.fp8(self._whole(input_), self.weight, self.bias)
            return output if bias is None else output + bias
        bias = self.bias if bias is None else bias
        if self._alone and not self.gradient_accumulation_fusion:
            # One addmm where mcore's autograd function multiplies, adds, and sums the bias gradient apart.
            return F.linear(input_, self.weight, bias)
        output = super().forward(input_)[0]
        return output if bias is None or self.bias is not None else output + bias

    def _whole(self, input_: Tensor) -> Tensor:
        """The input of all tokens; its gradient is summed over tp."""
        if self._alone:
            return input_
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group)


class RowLinear(RowParallelLinear):
    """Linear whose input features are cut over tp; the output is summed over tp, its bias added once.

    Under sequence parallelism mcore marks that bias: each rank adds it to its own tokens, so its gradients are shares.
    `fp8` as in `ColumnLinear`.
    """

    def __init__(self, *args: Any, fp8: Fp8Section | None = None, **kwargs: Any) -> None:
        super().__init__(*args, input_is_parallel=True, skip_bias_add=False, **kwargs)
        mark_sharded(self.weight, 1)
        self._alone = self.tp_group is None or self.tp_group.size() == 1
        self.fp8 = None if fp8 is None else EmulatedFp8(fp8)

    def forward(self, input_: Tensor) -> Tensor:
        """Returns x W^T + bias, the same on all tp ranks; under sequence parallelism each gets its own tokens."""
        if self.fp8 is not None and self.training:
            return self._in_fp8(input_, self.fp8)
        if self._alone and not self.gradient_accumulation_fusion:
            return F.linear(input_, self.weight, self.bias)
        return super().forward(input_)[0]

    def _in_fp8(self, input_: Tensor, fp8: EmulatedFp8) -> Tensor:
        out = fp8(input_, self.weight, None)
        if self.sequence_parallel:
            out = reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        elif not self._alone:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        # After the product is rounded, on a single rank too: so does Transformer Engine.
        return out if self.bias is None else out + self.bias


def no_init(weight: nn.Parameter) -> None:
    """mcore asks for an initialiser; init.py sets all weights, independent of the topology."""
