"""The contrastive loss with its gradients, as we and others compute it from the same features."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from megaeva.losses.contrastive import clip_loss
from megaeva.ops import accumulate_dtype
from megaeva.ops.contrastive import infonce_backward, infonce_forward

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCALE = 1 / 0.07  # where training starts; Radford et al. 2021, section 2.5
PAIR_COSINE = 0.3  # of a pair: what trained towers give; unpaired rows are at 0 +- 1 / sqrt(E)


@dataclass(frozen=True)
class Features:
    """Rows of both modalities [B, E], row i of each a pair, and the logarithm of the scale (0-dim, fp32 or fp64)."""

    image_BE: Tensor
    text_BE: Tensor
    log_scale: Tensor

    def to(self, dtype: torch.dtype) -> "Features":
        """The same in `dtype`; the scale stays at least fp32."""
        scale_dtype = accumulate_dtype(dtype)
        return Features(self.image_BE.to(dtype), self.text_BE.to(dtype), self.log_scale.to(scale_dtype))


@dataclass(frozen=True)
class Outcome:
    """The loss (0-dim) and its derivatives by each part of the features, in the dtypes of those."""

    loss: Tensor
    image_BE: Tensor
    text_BE: Tensor
    log_scale: Tensor


Side = Callable[[Features], Outcome]


def draw(
    num_pairs: int, embed_dim: int, *, precision: Precision = "fp32", scale: float = SCALE, seed: int = 0
) -> Features:
    """Random unit rows, a pair's at a cosine of about PAIR_COSINE; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    image_BE = _unit_rows(torch.randn(num_pairs, embed_dim, generator=generator))
    text_BE = _unit_rows(torch.randn(num_pairs, embed_dim, generator=generator))
    text_BE = _unit_rows(text_BE.mul_(math.sqrt(1 - PAIR_COSINE**2)).add_(image_BE, alpha=PAIR_COSINE))
    return Features(image_BE, text_BE, torch.tensor(math.log(scale))).to(DTYPES[precision])


def _unit_rows(rows_BE: Tensor) -> Tensor:
    return F.normalize(rows_BE, dim=1, out=rows_BE)


def engine(features: Features) -> Outcome:
    """Of our operators alone, on rows as they are: what `clip_loss` runs between normalisation and collectives."""
    image_BE, text_BE = features.image_BE, features.text_BE
    num_pairs, scale = len(image_BE), features.log_scale.exp()
    lse_image_B, lse_text_B, pair_B = infonce_forward(image_BE, text_BE, scale, 0)
    loss = ((lse_image_B - pair_B) + (lse_text_B - pair_B)).mean().to(scale.dtype) / 2
    factor = scale / (2 * num_pairs)
    grad_image_BE, grad_text_BE, share = infonce_backward(
        image_BE, text_BE, scale, factor, lse_image_B, lse_text_B, pair_B, pair_B,
        0, 2.0, 0.0, 0, num_pairs, image_BE.dtype,
    )  # fmt: skip
    return Outcome(loss, grad_image_BE, grad_text_BE, share / (2 * num_pairs))


def whole_loss(features: Features) -> Outcome:
    """Of `clip_loss`: it normalises the rows, and its derivatives go through that."""
    return differentiate(clip_loss, features)


def open_clip_loss(features: Features) -> Outcome:
    """Of open_clip's ClipLoss, on rows as they are."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return differentiate(lambda image_BE, text_BE, log_scale: loss(image_BE, text_BE, log_scale.exp()), features)


def plain_formula(features: Features) -> Outcome:
    """Of two cross entropies of one matrix of logits, in the features' dtype."""

    def loss(image_BE: Tensor, text_BE: Tensor, log_scale: Tensor) -> Tensor:
        logits_BB = log_scale.exp() * (image_BE @ text_BE.T)
        target_B = torch.arange(len(image_BE), device=image_BE.device)
        return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2

    return differentiate(loss, features)


SIDES: dict[str, Side] = {"engine": engine, "clip_loss": whole_loss, "open_clip": open_clip_loss}


def differentiate(loss: Callable[[Tensor, Tensor, Tensor], Tensor], features: Features) -> Outcome:
    """`loss(image_BE, text_BE, log_scale)` and what autograd makes of it."""
    parts = (features.image_BE, features.text_BE, features.log_scale)
    leaves = [part.detach().requires_grad_() for part in parts]
    value = loss(*leaves)
    return Outcome(value.detach(), *torch.autograd.grad(value, leaves))


def difference(one: Outcome, other: Outcome) -> tuple[float, float]:
    """Of the losses, and the largest of the three gradients' differences, each relative to `other`'s norm."""
    return (
        relative(one.loss, other.loss),
        max(
            relative(one.image_BE, other.image_BE),
            relative(one.text_BE, other.text_BE),
            relative(one.log_scale, other.log_scale),
        ),
    )


def relative(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|, Euclidean norms; 0 where nothing is apart."""
    apart = torch.linalg.vector_norm(one.to(other.dtype) - other, dtype=torch.float64).item()
    size = torch.linalg.vector_norm(other, dtype=torch.float64).item()
    return 0.0 if apart == 0 else apart / size if size else math.inf


def through_normalisation(outcome: Outcome, features: Features) -> Outcome:
    """`outcome` of unit rows with the derivatives that rows normalised first have: the part along each is gone."""
    return Outcome(
        outcome.loss,
        _across(outcome.image_BE, features.image_BE),
        _across(outcome.text_BE, features.text_BE),
        outcome.log_scale,
    )


def _across(gradient_BE: Tensor, rows_BE: Tensor) -> Tensor:
    rows_BE = F.normalize(rows_BE.to(gradient_BE.dtype), dim=1)
    return gradient_BE - torch.linalg.vecdot(gradient_BE, rows_BE)[:, None] * rows_BE
