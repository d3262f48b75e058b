"""The feed-forward part of a layer: GELU, QuickGELU, or SwiGLU with a norm before the second projection."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaeva.model.linear import no_init
from megaeva.model.norm import build_inner_norm
from megaeva.ops.swiglu import swiglu


def quick_gelu(x: Tensor) -> Tensor:
    """Returns x * sigmoid(1.702 x), OpenAI's approximation; written as one SiLU, whose backward is fused."""
    return F.silu(1.702 * x) * (1 / 1.702)


# gelu is the exact erf form: mcore's fused bias-GELU is the tanh approximation and stays off.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu, "swiglu": swiglu}


@dataclass
class MLPSubmodules:
    """Parts of `MLP`.

    Attributes:
        inner_norm: sub-LN before linear_fc2; None: none.
    """

    linear_fc1: type | ModuleSpec
    linear_fc2: type | ModuleSpec
    inner_norm: type | ModuleSpec | None = None


class MLP(MegatronModule):
    """fc2(norm(act(fc1 x))), its hidden features cut over tp.

    swiglu: fc1 is [w1; w2] (each cut over tp, then joined on the rank) and the hidden is silu(w1 x) * (w2 x).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        activation: Literal["gelu", "quick_gelu", "swiglu"],
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.activation = _ACTIVATIONS[activation]
        width = config.ffn_hidden_size
        shared = {"config": config, "init_method": no_init, "bias": True, "tp_group": pg_collection.tp}
        gates = 2 if activation == "swiglu" else 1
        self.linear_fc1 = build_module(submodules.linear_fc1, config.hidden_size, gates * width, stride=gates, **shared)
        self.inner_norm = build_inner_norm(submodules.inner_norm, config, width, pg_collection)
        self.linear_fc2 = build_module(submodules.linear_fc2, width, config.hidden_size, **shared)

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        """Returns [S, B, D], the same on all tp ranks or this rank's tokens as `hidden_SBD` is; all must call it."""
        inner = self.activation(self.linear_fc1(hidden_SBD))
        if self.inner_norm is not None:
            inner = self.inner_norm(inner)
        out: Tensor = self.linear_fc2(inner)
        return out
