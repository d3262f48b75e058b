"""Symmetric InfoNCE over the global batch, exact on any number of ranks, without a batch x batch matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megaeva.ops.normalize_pack import normalize_pack
from megaeva.parallel.collectives import RowsInFlight, all_gather_rows, all_reduce_sum, start_gather_rows

TILE = 1024  # rows of the global batch in one tile of logits


def start_gather(feature_BE: Tensor, group: ProcessGroup | None) -> RowsInFlight:
    """Begin to gather one modality's unit rows, fp32, while the other tower still computes; for `clip_loss`.

    All ranks of `group` call it. Nothing is differentiated here: `clip_loss` gets the features themselves as well.
    """
    with torch.no_grad():
        return start_gather_rows(normalize_pack(feature_BE, feature_BE)[: len(feature_BE)].float(), group)


def clip_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    log_scale: Tensor,
    *,
    group: ProcessGroup | None = None,
    text_in_flight: RowsInFlight | None = None,
) -> Tensor:
    """The fp32 mean over all pairs of the global batch and both directions (0-dim), identical on every rank.

    Inputs need not be normalised; every rank passes the same B. Logits are fp32 whatever the input dtype. Row i of
    `image_BE` and of `text_BE` is a pair. Source: Radford et al. 2021, figure 3; EVA-CLIP uses the same.

    Communication: one all-gather of both modalities and one of the log-sum-exps; no reduce-scatter of gradients,
    since once all log-sum-exps are known each rank computes its own. Extra memory: the gathered rows of both
    modalities in fp32, O(G * E), and O(B * tile), never batch^2.

    Gradient: of `image_BE` and `text_BE` exactly d(global mean)/d(this rank's inputs); of `log_scale` this rank's
    share, so that the sum over the group is the derivative. All ranks of `group` must call it and its backward; without
    a group the batch is this process's alone.

    Args:
        text_in_flight: of `start_gather(text_BE, group)`; the all-gather then moves images only.
    """
    packed_2BE = normalize_pack(image_BE, text_BE)
    return _StreamingInfoNCE.apply(packed_2BE, log_scale, group, text_in_flight)


class _StreamingInfoNCE(torch.autograd.Function):
    """Loss of packed unit rows [2B, E]: images first, then their texts."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        packed_2BE: Tensor,
        log_scale: Tensor,
        group: ProcessGroup | None,
        text_in_flight: RowsInFlight | None,
    ) -> Tensor:
        local = packed_2BE.shape[0] // 2
        num_ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        first = rank * local
        scale = log_scale.float().exp()
        rows = packed_2BE.float()
        if text_in_flight is None:
            every = all_gather_rows(rows, group).view(num_ranks, 2, local, -1)
            image_GE, text_GE = every[:, 0].flatten(0, 1), every[:, 1].flatten(0, 1)
        else:
            image_GE, text_GE = all_gather_rows(rows[:local], group), text_in_flight.wait()
        lse_image_B = _row_logsumexp(rows[:local], text_GE, scale)
        lse_text_B = _row_logsumexp(rows[local:], image_GE, scale)
        paired_B = scale * (rows[:local] * rows[local:]).sum(-1)
        total = (lse_image_B + lse_text_B - 2 * paired_B).sum()
        loss = all_reduce_sum(total, group) / (2 * image_GE.shape[0])
        lse_2B = torch.cat([lse_image_B, lse_text_B])
        lse = all_gather_rows(lse_2B, group).view(num_ranks, 2, local)
        ctx.save_for_backward(packed_2BE, image_GE, text_GE, lse[:, 0].flatten(), lse[:, 1].flatten(), scale)
        ctx.first, ctx.log_scale_dtype = first, log_scale.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        packed_2BE, image_GE, text_GE, lse_image_G, lse_text_G, scale = ctx.saved_tensors
        local, first = packed_2BE.shape[0] // 2, ctx.first
        rows = packed_2BE.float()
        here = slice(first, first + local)
        grad_2BE = torch.empty_like(rows)
        grad_2BE[:local], image_share = _rows_backward(
            rows[:local], text_GE, scale, lse_image_G[here], lse_text_G, first
        )
        grad_2BE[local:], text_share = _rows_backward(
            rows[local:], image_GE, scale, lse_text_G[here], lse_image_G, first
        )
        factor = grad_loss / (2 * image_GE.shape[0])
        grad_log_scale = factor * (image_share + text_share)
        return (grad_2BE * (factor * scale)).to(packed_2BE.dtype), grad_log_scale.to(ctx.log_scale_dtype), None, None


def _row_logsumexp(query_BE: Tensor, key_GE: Tensor, scale: Tensor) -> Tensor:
    """log sum_j exp(scale * query_i . key_j), [B], over tiles of keys."""
    parts = [torch.logsumexp(scale * (query_BE @ keys.T), dim=1) for keys in key_GE.split(TILE)]
    return torch.logsumexp(torch.stack(parts), dim=0) if len(parts) > 1 else parts[0]


def _rows_backward(
    query_BE: Tensor, key_GE: Tensor, scale: Tensor, lse_query_B: Tensor, lse_key_G: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """(softmax over keys + softmax over queries - 2 * pairs) @ keys, [B, E], and the log scale's share, 0-dim.

    Query i is paired with key `first` + i. Pairs are subtracted from the weights, not from their products: the
    difference is small where training ends, and would be lost in rounding.
    """
    grad_BE = torch.zeros_like(query_BE)
    paired_B1 = scale * (query_BE * key_GE[first : first + len(query_BE)]).sum(-1, keepdim=True)
    share = query_BE.new_zeros(())
    start = 0
    for keys, lse_keys in zip(key_GE.split(TILE), lse_key_G.split(TILE), strict=True):
        logits = scale * (query_BE @ keys.T)
        weights = torch.exp(logits - lse_query_B[:, None])
        share += (weights * (logits - paired_B1)).sum()
        weights += torch.exp(logits - lse_keys[None, :])
        if -len(query_BE) < first - start < len(keys):
            weights.diagonal(first - start).sub_(2)
        grad_BE.addmm_(weights, keys)
        start += len(keys)
    return grad_BE, share
