"""The contrastive losses in tiles: log-sum-exps, weights and gradients of a logits matrix that is never built.

Logits are l_ij = scale * <query_i, key_j>, plus `bias` for the sigmoid loss, accumulated in float32 (float64 for
float64 inputs) whatever the dtype of the rows, which need not be normalised. Query i is paired with key `first` + i; a
pair whose key lies outside the given ones is not there. `scale`, `bias` and `factor` are 0-dim, of the accumulation
dtype. Nothing here communicates or is differentiable: `megaeva.losses` joins ranks, and forward with backward.

Where the extension has no kernel for the device, `reference` runs: the same tiles in plain PyTorch.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from megaeva.ops import DTYPES, accumulate_dtype, native_devices

_R = TypeVar("_R")

TILE = 1024  # rows and columns of a tile of the reference

_NATIVE_DEVICES = native_devices("infonce_forward")


def infonce_forward(query_BE: Tensor, key_GE: Tensor, scale: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """(lse_query_B, lse_key_G, pair_query_B): log sum_j exp(l_ij), log sum_i exp(l_ij), and the logits of pairs.

    Over all keys, and over these queries only. One matrix product: all come from the same tile. Log-sum-exps are
    float64 whatever the rows are, and -inf over nothing; a pair's logit is of the accumulation dtype, and 0 where there
    is no pair. Where training ends both are large and their difference, the loss, is small: a float32 of the size of a
    logit would not hold its digits, nor would a pair's logit from another product, which rounds differently.
    Source: Radford et al. 2021, figure 3.
    """
    return _ops(query_BE).infonce_forward(query_BE, key_GE, scale, first)  # type: ignore[no-any-return]


def infonce_backward(
    query_BE: Tensor,
    key_GE: Tensor,
    scale: Tensor,
    factor: Tensor,
    lse_query_B: Tensor,
    lse_key_G: Tensor,
    pair_query_B: Tensor,
    pair_key_G: Tensor,
    first: int,
    pair_weight: float,
    uniform: float,
    key_begin: int,
    key_end: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_query_BE, grad_key_KE, scale_share): two or three matrix products from tiles computed again.

    Log-sum-exps are float64, pairs' logits of the accumulation dtype, both as `infonce_forward` gave them.

    With w_ij = exp(l_ij - lse_query_i) + exp(l_ij - lse_key_j) - `pair_weight` [j = first + i] - `uniform`:
    grad_query_i = factor * sum_j w_ij key_j; grad_key_j = factor * sum_i w_ij query_i for the K = key_end - key_begin
    keys from key_begin on; both in `dtype`, summed in the accumulation dtype. Pairs are subtracted from the weights,
    not from their products: the difference is small where training ends, and would be lost in rounding.

    scale_share (0-dim) = sum_ij [exp(l_ij - lse_query_i) - uniform] (l_ij - pair_query_i)
    + exp(l_ij - lse_key_j) (l_ij - pair_key_j). With the pairs' logits, lse_key over all queries of the batch and
    uniform = (2 - pair_weight) / (number of keys), it sums over all keys and ranks to sum_ij w_ij l_ij, the derivative
    by the scale's logarithm.
    """
    return _ops(query_BE).infonce_backward(  # type: ignore[no-any-return]
        query_BE, key_GE, scale, factor, lse_query_B, lse_key_G, pair_query_B, pair_key_G,
        first, pair_weight, uniform, key_begin, key_end, dtype,
    )  # fmt: skip


def sigmoid_forward(query_BE: Tensor, key_GE: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
    """The sum of log(1 + exp(-z_ij l_ij)), z = 1 for a pair and -1 else (0-dim, the accumulation dtype).

    Source: Zhai et al. 2023 (SigLIP), algorithm 1.
    """
    return _ops(query_BE).sigmoid_forward(query_BE, key_GE, scale, bias, first)  # type: ignore[no-any-return]


def sigmoid_backward(
    query_BE: Tensor,
    key_GE: Tensor,
    scale: Tensor,
    bias: Tensor,
    factor: Tensor,
    first: int,
    key_begin: int,
    key_end: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_query_BE, grad_key_KE, scale_share, bias_share) for w_ij = sigmoid(l_ij) - [j = first + i].

    Gradients as in `infonce_backward`; scale_share = sum_ij w_ij (l_ij - bias), bias_share = sum_ij w_ij (0-dim), where
    l_ij - bias is the logit before the bias took digits from it.
    """
    return _ops(query_BE).sigmoid_backward(  # type: ignore[no-any-return]
        query_BE, key_GE, scale, bias, factor, first, key_begin, key_end, dtype
    )


def _ops(rows_BE: Tensor) -> Any:
    native = rows_BE.device.type in _NATIVE_DEVICES and rows_BE.dtype in DTYPES
    return torch.ops.megaeva if native else reference


# ------------------------------------------------------------------------------------------------- plain PyTorch


def _infonce_forward(query_BE: Tensor, key_GE: Tensor, scale: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulate_dtype(query_BE.dtype)
    lse_query_B = torch.full(query_BE.shape[:1], -torch.inf, dtype=torch.float64, device=query_BE.device)
    lse_key_G = torch.full(key_GE.shape[:1], -torch.inf, dtype=torch.float64, device=query_BE.device)
    pair_query_B = torch.zeros(query_BE.shape[:1], dtype=wide, device=query_BE.device)
    for rows, query_XE in _tiles(query_BE):
        for columns, key_YE in _tiles(key_GE):
            logits_XY = scale * (query_XE.to(wide) @ key_YE.to(wide).T)
            exact_XY = logits_XY.double()
            lse_query_B[rows] = torch.logaddexp(lse_query_B[rows], exact_XY.logsumexp(1))
            lse_key_G[columns] = torch.logaddexp(lse_key_G[columns], exact_XY.logsumexp(0))
            offset = first + rows.start - columns.start
            pairs = logits_XY.diagonal(offset)
            if len(pairs):
                pair_query_B[rows].narrow(0, max(0, -offset), len(pairs)).copy_(pairs)
    return lse_query_B, lse_key_G, pair_query_B


def _infonce_backward(
    query_BE: Tensor,
    key_GE: Tensor,
    scale: Tensor,
    factor: Tensor,
    lse_query_B: Tensor,
    lse_key_G: Tensor,
    pair_query_B: Tensor,
    pair_key_G: Tensor,
    first: int,
    pair_weight: float,
    uniform: float,
    key_begin: int,
    key_end: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    shares = []

    def minus(logits_XY: Tensor, lse: Tensor) -> Tensor:
        rounded = lse.to(logits_XY.dtype)
        return (logits_XY - rounded).sub_((lse - rounded).to(logits_XY.dtype))

    def weigh(logits_XY: Tensor, rows: slice, columns: slice) -> Tensor:
        by_query_XY = torch.exp(minus(logits_XY, lse_query_B[rows, None])) - uniform
        by_key_XY = torch.exp(minus(logits_XY, lse_key_G[None, columns]))
        by_query_share = (by_query_XY * (logits_XY - pair_query_B[rows, None])).sum()
        shares.append(by_query_share + (by_key_XY * (logits_XY - pair_key_G[None, columns])).sum())
        weight_XY = by_query_XY.add_(by_key_XY)
        weight_XY.diagonal(first + rows.start - columns.start).sub_(pair_weight)
        return weight_XY

    grads = _gradients(query_BE, key_GE, scale, factor, key_begin, key_end, dtype, weigh)
    return *grads, torch.stack(shares).sum() if shares else torch.zeros_like(scale)


def _sigmoid_forward(query_BE: Tensor, key_GE: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
    wide = accumulate_dtype(query_BE.dtype)
    total = torch.zeros((), dtype=torch.float64, device=query_BE.device)
    for rows, query_XE in _tiles(query_BE):
        for columns, key_YE in _tiles(key_GE):
            logits_XY = scale * (query_XE.to(wide) @ key_YE.to(wide).T) + bias
            logits_XY.diagonal(first + rows.start - columns.start).neg_()
            total += torch.nn.functional.softplus(logits_XY).sum(dtype=torch.float64)
    return total.to(wide)


def _sigmoid_backward(
    query_BE: Tensor,
    key_GE: Tensor,
    scale: Tensor,
    bias: Tensor,
    factor: Tensor,
    first: int,
    key_begin: int,
    key_end: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shares = [torch.zeros((2,), dtype=scale.dtype, device=scale.device)]

    def weigh(scaled_XY: Tensor, rows: slice, columns: slice) -> Tensor:
        offset = first + rows.start - columns.start
        logits_XY = scaled_XY + bias
        # sigmoid(l) - 1 = -sigmoid(-l), without the difference of two numbers near 1
        pairs = logits_XY.diagonal(offset)
        pair_weights = -torch.sigmoid(-pairs)
        weight_XY = torch.sigmoid(logits_XY)
        weight_XY.diagonal(offset).copy_(pair_weights)
        shares.append(torch.stack([(weight_XY * scaled_XY).sum(), weight_XY.sum()]))
        return weight_XY

    grads = _gradients(query_BE, key_GE, scale, factor, key_begin, key_end, dtype, weigh)
    scale_share, bias_share = torch.stack(shares).sum(0)
    return *grads, scale_share, bias_share


def _gradients(
    query_BE: Tensor,
    key_GE: Tensor,
    scale: Tensor,
    factor: Tensor,
    key_begin: int,
    key_end: int,
    dtype: torch.dtype,
    weigh: Any,
) -> tuple[Tensor, Tensor]:
    """Both gradients, from the weights that `weigh` makes of each tile of scaled products."""
    wide = accumulate_dtype(query_BE.dtype)
    grad_query_BE = torch.zeros(query_BE.shape, dtype=wide, device=query_BE.device)
    grad_key_KE = torch.zeros((key_end - key_begin, key_GE.shape[1]), dtype=wide, device=query_BE.device)
    for rows, query_XE in _tiles(query_BE):
        for columns, key_YE in _tiles(key_GE):
            logits_XY = scale * (query_XE.to(wide) @ key_YE.to(wide).T)
            weight_XY = weigh(logits_XY, rows, columns)
            grad_query_BE[rows].addmm_(weight_XY, key_YE.to(wide))
            begin, end = max(key_begin, columns.start), min(key_end, columns.stop)
            if begin < end:
                own = weight_XY[:, begin - columns.start : end - columns.start]
                grad_key_KE[begin - key_begin : end - key_begin].addmm_(own.T, query_XE.to(wide))
    return grad_query_BE.mul_(factor).to(dtype), grad_key_KE.mul_(factor).to(dtype)


def _tiles(rows_XE: Tensor) -> list[tuple[slice, Tensor]]:
    return [
        (slice(start, min(start + TILE, len(rows_XE))), rows_XE[start : start + TILE])
        for start in range(0, len(rows_XE), TILE)
    ]


def _without_autocast(function: Callable[..., _R]) -> Callable[..., _R]:
    """`function` of the query and more, with products in the dtype of its operands, as native operators have them."""

    @functools.wraps(function)
    def run(query_BE: Tensor, *rest: Any) -> _R:
        with torch.autocast(query_BE.device.type, enabled=False):
            return function(query_BE, *rest)

    return run


reference = SimpleNamespace(
    infonce_forward=_without_autocast(_infonce_forward),
    infonce_backward=_without_autocast(_infonce_backward),
    sigmoid_forward=_without_autocast(_sigmoid_forward),
    sigmoid_backward=_without_autocast(_sigmoid_backward),
)


# --------------------------------------------------------------------------------------------- shapes for tracing


def _fake_infonce_forward(query_BE: Tensor, key_GE: Tensor, scale: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_shapes(query_BE, key_GE)
    num_queries, num_keys = query_BE.shape[0], key_GE.shape[0]
    lse_query_B, lse_key_G = (query_BE.new_empty(num, dtype=torch.float64) for num in (num_queries, num_keys))
    return lse_query_B, lse_key_G, query_BE.new_empty(num_queries, dtype=accumulate_dtype(query_BE.dtype))


def _fake_infonce_backward(query_BE: Tensor, key_GE: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    key_begin, key_end, dtype = rest[-3:]
    return *_fake_gradients(query_BE, key_end - key_begin, dtype), scale.new_empty(())


def _fake_sigmoid_forward(query_BE: Tensor, key_GE: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
    _check_shapes(query_BE, key_GE)
    return scale.new_empty(())


def _fake_sigmoid_backward(query_BE: Tensor, key_GE: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    key_begin, key_end, dtype = rest[-3:]
    return *_fake_gradients(query_BE, key_end - key_begin, dtype), scale.new_empty(()), scale.new_empty(())


def _fake_gradients(query_BE: Tensor, num_keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return query_BE.new_empty(query_BE.shape, dtype=dtype), query_BE.new_empty(num_keys, query_BE.shape[1], dtype=dtype)


def _check_shapes(query_BE: Tensor, key_GE: Tensor) -> None:
    torch._check(query_BE.dim() == 2 and key_GE.dim() == 2, lambda: "query_BE and key_GE must be matrices")
    torch._check(query_BE.shape[1] == key_GE.shape[1], lambda: "query_BE and key_GE must have one width")


if _NATIVE_DEVICES:
    torch.library.register_fake("megaeva::infonce_forward", _fake_infonce_forward)
    torch.library.register_fake("megaeva::infonce_backward", _fake_infonce_backward)
    torch.library.register_fake("megaeva::sigmoid_forward", _fake_sigmoid_forward)
    torch.library.register_fake("megaeva::sigmoid_backward", _fake_sigmoid_backward)
