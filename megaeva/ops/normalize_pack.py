"""L2-normalise the embeddings of one or two modalities into one contiguous buffer: one all-gather moves it all."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megaeva.ops import DTYPES, accumulate_dtype, differentiate_once, native_devices

EPSILON = 1e-12  # torch.nn.functional.normalize's
_NATIVE_DEVICES = native_devices("normalize_pack")


def normalize_pack(image_BE: Tensor, text_BE: Tensor | None = None, *, epsilon: float = EPSILON) -> Tensor:
    """Returns packed_2BE: rows [0:B] are the L2-normalised image rows, rows [B:2B] the text rows.

    One read and one write of each row, instead of the norm, the division and the concatenation of plain PyTorch.
    Where the extension has no kernel for the device, `reference` runs: the same definition, other summation order.

    Args:
        image_BE: embeddings, float32, float64, bfloat16 or float16; any row stride.
        text_BE: same shape, dtype and device; None where one modality is packed alone.
        epsilon: rows are divided by max(norm, epsilon).

    Returns:
        packed_2BE [2B, E] ([B, E] without text), contiguous, of the input dtype; sums are accumulated in float32
        (float64 for float64).

    The gradient is the exact derivative and is not scaled; it is defined once (no double backward). Every rank
    works on its own rows: no communication. Source: the first lines of open_clip's and EVA-CLIP's forward.
    """
    if image_BE.device.type in _NATIVE_DEVICES and image_BE.dtype in DTYPES:
        packed_2BE, _ = torch.ops.megaeva.normalize_pack(image_BE, text_BE, epsilon)
        return packed_2BE
    return reference(image_BE, text_BE, epsilon=epsilon)


def reference(image_BE: Tensor, text_BE: Tensor | None = None, *, epsilon: float = EPSILON) -> Tensor:
    """packed_2BE as `normalize_pack` defines it, in plain PyTorch."""
    wide = accumulate_dtype(image_BE.dtype)
    modalities = (image_BE,) if text_BE is None else (image_BE, text_BE)
    rows = [functional.normalize(x_BE.to(wide), dim=-1, eps=epsilon) for x_BE in modalities]
    return torch.cat(rows).to(image_BE.dtype)


def _fake(image_BE: Tensor, text_BE: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    torch._check(image_BE.dim() == 2, lambda: "image_BE must be a matrix")
    num_samples, embed_dim = image_BE.shape
    num_rows = num_samples if text_BE is None else 2 * num_samples
    wide = accumulate_dtype(image_BE.dtype)
    return image_BE.new_empty(num_rows, embed_dim), image_BE.new_empty(num_rows, dtype=wide)


def _fake_backward(
    grad_packed: Tensor, image_BE: Tensor, text_BE: Tensor | None, inverse_norm: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    num_samples, embed_dim = image_BE.shape
    return image_BE.new_empty(image_BE.shape), image_BE.new_empty(0 if text_BE is None else num_samples, embed_dim)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
    image_BE, text_BE, ctx.epsilon = inputs
    inverse_norm = output[1]
    ctx.mark_non_differentiable(inverse_norm)
    ctx.save_for_backward(image_BE, text_BE, inverse_norm)


def _backward(ctx: Any, grad_packed: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    image_BE, text_BE, inverse_norm = ctx.saved_tensors
    grad_image_BE, grad_text_BE = torch.ops.megaeva.normalize_pack_backward(
        grad_packed, image_BE, text_BE, inverse_norm, ctx.epsilon
    )
    image_wanted, text_wanted, _ = ctx.needs_input_grad
    return (grad_image_BE if image_wanted else None), (grad_text_BE if text_wanted else None), None


if _NATIVE_DEVICES:
    torch.library.register_fake("megaeva::normalize_pack", _fake)
    torch.library.register_fake("megaeva::normalize_pack_backward", _fake_backward)
    torch.library.register_autograd("megaeva::normalize_pack", _backward, setup_context=_setup_context)
    differentiate_once("normalize_pack")
