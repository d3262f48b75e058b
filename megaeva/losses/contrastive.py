"""Contrastive losses over the global batch, exact on any number of ranks, without a batch x batch matrix.

Both losses go one way. Every rank owns B pairs of the G = ranks * B. It multiplies its images by all texts, one tile at
a time; after an exchange of numbers (no features) the loss is known, alike on all ranks. Backward makes the same tiles
again, which give the gradient of this rank's images and a part of that of its texts; the rest of it comes from this
rank's texts times the other ranks' images. So no gradient of a feature is ever sent. Matrix products of B x G x E on
each rank: 1 forward; 2 + 1/R and 2 (1 - 1/R) backward; on one rank 4 in all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megaeva.losses.agreement import require_agreement
from megaeva.ops import accumulate_dtype
from megaeva.ops.contrastive import infonce_backward, infonce_forward, sigmoid_backward, sigmoid_forward
from megaeva.ops.normalize_pack import normalize_pack
from megaeva.parallel.collectives import RowsInFlight, all_gather_rows, all_logsumexp, start_gather_rows

_BLOCK = 1024  # rows that are converted to the accumulation dtype at once


def start_gather(text_BE: Tensor, group: ProcessGroup | None) -> RowsInFlight:
    """Begin to gather the unit rows of the texts while the other tower still computes; for the losses below.

    All ranks of `group` call it. They are sent in their own dtype. Nothing is differentiated here: the loss gets the
    features themselves as well.

    Raises:
        FeatureError: on every rank, if the texts of one are empty, not finite or unlike another rank's.
    """
    require_agreement(group, "start_gather", text_BE=text_BE)
    with torch.no_grad():
        return start_gather_rows(normalize_pack(text_BE), group)


def clip_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    log_scale: Tensor,
    *,
    group: ProcessGroup | None = None,
    text_in_flight: RowsInFlight | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The mean of InfoNCE over all pairs of the global batch and both directions (0-dim), the same bits on every rank.

    Row i of `image_BE` and of `text_BE` is a pair. Rows need not be normalised, nor contiguous. Logits, their sums and
    the loss are float32 (float64 for float64 features) whatever the dtype of the features. Source: Radford et al. 2021,
    figure 3; EVA-CLIP uses the same. All ranks of `group` must call it and its backward; without a group the batch is
    this process's alone.

    Gradient: of `image_BE` and `text_BE` exactly d(mean over the global batch)/d(this rank's rows), in their dtype; of
    `log_scale` this rank's share, so that the sum over the group is the derivative. Differentiable once.

    Communication: one all-gather of both modalities in the features' dtype (of images only with `text_in_flight`); 26
    integers that tell a bad input; 2 numbers of each pair, and the texts' log-sum-exps reduced twice, in float64.
    Backward sends nothing. Memory: unit rows of this rank, or where ranks are several, of the whole batch, O(G * E), in
    the features' dtype; tiles of logits; never batch^2.

    Args:
        log_scale: 0-dim, floating, of the same value on all ranks.
        text_in_flight: of `start_gather(text_BE, group)`, on all ranks or on none.
        label_smoothing: as of torch's cross_entropy, in both directions; in [0, 1).

    Raises:
        FeatureError: a ValueError, on every rank with the same text: the features of a rank are empty, no matrices of
            one shape and floating dtype, not finite, or unlike another rank's; or another argument is.
    """
    require_agreement(
        group,
        "clip_loss",
        image_BE=image_BE,
        text_BE=text_BE,
        text_in_flight=text_in_flight,
        log_scale=log_scale,
        label_smoothing=label_smoothing,
    )
    units = _unit_rows(image_BE, text_BE)
    return _InfoNCE.apply(*units, log_scale, group, text_in_flight, label_smoothing)  # type: ignore[no-any-return]


def sigmoid_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    group: ProcessGroup | None = None,
    text_in_flight: RowsInFlight | None = None,
) -> Tensor:
    """The sum of SigLIP's loss over all image-text combinations of the global batch, divided by its pairs (0-dim).

    Logits are exp(log_scale) * cosine + bias, and each combination is a yes-no question of its own: log(1 + exp(-l))
    for a pair, log(1 + exp(l)) otherwise. Source: Zhai et al. 2023, algorithm 1. Ranks, dtypes, gradients (`bias` like
    `log_scale`: shares that sum), communication (1 number of each rank beside the features), memory and errors are
    `clip_loss`'s.
    """
    require_agreement(
        group,
        "sigmoid_loss",
        image_BE=image_BE,
        text_BE=text_BE,
        text_in_flight=text_in_flight,
        log_scale=log_scale,
        bias=bias,
    )
    units = _unit_rows(image_BE, text_BE)
    return _Sigmoid.apply(*units, log_scale, bias, group, text_in_flight)  # type: ignore[no-any-return]


def _unit_rows(image_BE: Tensor, text_BE: Tensor) -> tuple[Tensor, ...]:
    """Unit rows of the images and of the texts, differentiable; halves of one buffer."""
    return normalize_pack(image_BE, text_BE).view(2, *image_BE.shape).unbind()


class _InfoNCE(torch.autograd.Function):
    """Loss of unit rows."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        log_scale: Tensor,
        group: ProcessGroup | None,
        text_in_flight: RowsInFlight | None,
        smoothing: float,
    ) -> Tensor:
        image_GE, text_GE, first = _gather(image_BE, text_BE, group, text_in_flight)
        num_local, num_pairs = len(image_BE), len(image_GE)
        scale = log_scale.to(accumulate_dtype(image_BE.dtype)).exp()
        lse_image_B, lse_text_G, pair_B = infonce_forward(image_BE, text_GE, scale, first)
        numbers = [lse_image_B, pair_B]
        if smoothing:  # this rank's share of the sum of all logits
            numbers.append((scale * (_sum_of_rows(image_BE) * _sum_of_rows(text_GE)).sum())[None])
        # From here on all ranks compute with the same numbers.
        gathered = all_gather_rows(torch.cat(numbers)[None], group)
        lse_image_G, pair_G = (gathered[:, i * num_local : (i + 1) * num_local].flatten() for i in range(2))
        lse_text_G = all_logsumexp(lse_text_G, group)
        total = (lse_image_G - pair_G + (lse_text_G - pair_G)).sum()
        if smoothing:
            total += 2 * smoothing * (pair_G.sum() - gathered[:, -1].sum() / num_pairs)
        ctx.save_for_backward(image_GE, text_GE, scale, lse_image_G, lse_text_G, pair_G.to(scale.dtype))
        ctx.first, ctx.num_local, ctx.smoothing, ctx.log_scale_dtype = first, num_local, smoothing, log_scale.dtype
        return (total / (2 * num_pairs)).to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image_GE, text_GE, scale, lse_image_G, lse_text_G, pair_G = ctx.saved_tensors
        first, num_pairs = ctx.first, len(image_GE)
        here = slice(first, first + ctx.num_local)
        mean = grad_loss / (2 * num_pairs)
        weights = (2 * (1 - ctx.smoothing), 2 * ctx.smoothing / num_pairs)
        dtype = _strip_dtype(ctx.num_local, image_GE)
        grad_image_BE, grad_text_BE, scale_share = infonce_backward(
            image_GE[here], text_GE, scale, mean * scale, lse_image_G[here], lse_text_G, pair_G[here], pair_G,
            first, *weights, here.start, here.stop, dtype,
        )  # fmt: skip

        def strip(keys: slice) -> Tensor:
            return infonce_backward(
                text_GE[here], image_GE[keys], scale, mean * scale, lse_text_G[here], lse_image_G[keys], pair_G[here],
                pair_G[keys], first - keys.start, *weights, 0, 0, dtype,
            )[0]  # fmt: skip

        _add_strips(grad_text_BE, here, num_pairs, strip)
        grads = grad_image_BE.to(image_GE.dtype), grad_text_BE.to(text_GE.dtype)
        return *grads, (mean * scale_share).to(ctx.log_scale_dtype), None, None, None


class _Sigmoid(torch.autograd.Function):
    """Loss of unit rows."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        group: ProcessGroup | None,
        text_in_flight: RowsInFlight | None,
    ) -> Tensor:
        image_GE, text_GE, first = _gather(image_BE, text_BE, group, text_in_flight)
        wide = accumulate_dtype(image_BE.dtype)
        scale, wide_bias = log_scale.to(wide).exp(), bias.to(wide, copy=True)
        total = sigmoid_forward(image_BE, text_GE, scale, wide_bias, first)
        totals = all_gather_rows(total[None], group)
        ctx.save_for_backward(image_GE, text_GE, scale, wide_bias)
        ctx.first, ctx.num_local = first, len(image_BE)
        ctx.log_scale_dtype, ctx.bias_dtype = log_scale.dtype, bias.dtype
        return (totals.double().sum() / len(image_GE)).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image_GE, text_GE, scale, bias = ctx.saved_tensors
        first, num_pairs = ctx.first, len(image_GE)
        here = slice(first, first + ctx.num_local)
        mean = grad_loss / num_pairs
        dtype = _strip_dtype(ctx.num_local, image_GE)
        grad_image_BE, grad_text_BE, scale_share, bias_share = sigmoid_backward(
            image_GE[here], text_GE, scale, bias, mean * scale, first, here.start, here.stop, dtype
        )

        def strip(keys: slice) -> Tensor:
            return sigmoid_backward(
                text_GE[here], image_GE[keys], scale, bias, mean * scale, first - keys.start, 0, 0, dtype
            )[0]

        _add_strips(grad_text_BE, here, num_pairs, strip)
        grads = grad_image_BE.to(image_GE.dtype), grad_text_BE.to(text_GE.dtype)
        shares = (mean * scale_share).to(ctx.log_scale_dtype), (mean * bias_share).to(ctx.bias_dtype)
        return *grads, *shares, None, None


def _gather(
    image_BE: Tensor, text_BE: Tensor, group: ProcessGroup | None, text_in_flight: RowsInFlight | None
) -> tuple[Tensor, Tensor, int]:
    """The global batch's images and texts in rank order, and the place of this rank's first pair."""
    if group is None or group.size() == 1:
        return image_BE, text_BE, 0
    first = group.rank() * len(image_BE)
    if text_in_flight is not None:
        return all_gather_rows(image_BE, group), text_in_flight.wait(), first
    # Side by side: each modality of all ranks is then one matrix, with a row stride, and needs no copy of the batch.
    pair_G2E = all_gather_rows(torch.cat([image_BE, text_BE], dim=1), group)
    image_GE, text_GE = pair_G2E.chunk(2, dim=1)
    return image_GE, text_GE, first


def _strip_dtype(num_local: int, image_GE: Tensor) -> torch.dtype:
    """The dtype of a strip's gradients: the features' own where one strip is all, else that of sums."""
    return image_GE.dtype if num_local == len(image_GE) else accumulate_dtype(image_GE.dtype)


def _add_strips(grad_text_BE: Tensor, here: slice, num_pairs: int, strip: Callable[[slice], Tensor]) -> None:
    """Add, in place, the gradients of this rank's texts by the images before and after this rank's own."""
    for keys in (slice(0, here.start), slice(here.stop, num_pairs)):
        if keys.start < keys.stop:
            grad_text_BE += strip(keys)


def _sum_of_rows(rows_XE: Tensor) -> Tensor:
    """[E], in the accumulation dtype."""
    wide = accumulate_dtype(rows_XE.dtype)
    return torch.stack([block.sum(0, dtype=wide) for block in rows_XE.split(_BLOCK)]).sum(0)
