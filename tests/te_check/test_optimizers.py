"""What LAMB takes from Transformer Engine: norms of tensors, found by Megatron-core, with the arguments it passes."""

import importlib.util
from unittest import mock

from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm

from megaeva.optim import lamb


def test_norms_of_tensors_by_transformer_engine() -> None:
    # Afresh, as on a GPU: the shim of CPU runs puts plain PyTorch in their place.
    spec = importlib.util.find_spec(lamb.clip_grads.__name__)
    assert spec is not None and spec.loader is not None
    clip_grads = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clip_grads)
    with mock.patch.object(lamb, "clip_grads", clip_grads):
        assert lamb.multi_tensor_package() == "Transformer Engine"
    assert clip_grads.multi_tensor_applier is multi_tensor_applier
    assert clip_grads.l2_norm_impl is multi_tensor_l2norm
    # A built-in has no signature but its first line: (chunk size, overflow flag, lists of tensors, per tensor).
    signature = multi_tensor_l2norm.__doc__.splitlines()[0]
    assert "arg3: bool | None) -> tuple[torch.Tensor, torch.Tensor]" in signature
    assert "arg4" not in signature
