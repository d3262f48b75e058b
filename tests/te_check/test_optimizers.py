"""What LAMB takes from Transformer Engine: norms of tensors, found by Megatron-core, with the arguments it passes."""

from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm

from megaeva.optim import lamb


def test_norms_of_tensors_by_transformer_engine() -> None:
    assert lamb.multi_tensor_package() == "Transformer Engine"
    assert lamb.clip_grads.multi_tensor_applier is multi_tensor_applier
    assert lamb.clip_grads.l2_norm_impl is multi_tensor_l2norm
    # A built-in has no signature but its first line: (chunk size, overflow flag, lists of tensors, per tensor).
    signature = multi_tensor_l2norm.__doc__.splitlines()[0]
    assert "arg3: bool | None) -> tuple[torch.Tensor, torch.Tensor]" in signature
    assert "arg4" not in signature
