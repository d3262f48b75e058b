"""Pieces of parameters: cutting and joining are inverse, gated weights keep w1 and w2 apart."""

import pytest
import torch
from torch import nn

from megaeva.parallel.shards import full_shape, gather_full, join, slice_full
from tests.helpers.tiny import single_grid


def _param(shape: tuple[int, ...], dim: int, stride: int = 1, sharded: bool = True) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(shape))
    param.tensor_model_parallel, param.partition_dim, param.partition_stride = sharded, dim, stride  # type: ignore
    return param


@pytest.mark.parametrize(("dim", "stride"), [(0, 1), (1, 1), (0, 2)])
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_slice_and_join_are_inverse(dim: int, stride: int, tp_size: int) -> None:
    full = torch.randn(12, 6)
    shape = [12, 6]
    shape[dim] //= tp_size
    param = _param((shape[0], shape[1]), dim, stride)
    assert full_shape(param, tp_size) == full.shape
    pieces = [slice_full(full, param, rank, tp_size) for rank in range(tp_size)]
    assert all(piece.shape == param.shape for piece in pieces)
    assert torch.equal(join(pieces, param), full)


def test_a_gated_piece_holds_both_weights() -> None:
    full = torch.cat([torch.arange(4), 100 + torch.arange(4)])  # [w1; w2]
    param = _param((4,), 0, stride=2)
    assert slice_full(full, param, 1, 2).tolist() == [2, 3, 102, 103]


def test_a_replicated_parameter_is_left_whole() -> None:
    param = _param((4, 3), -1, sharded=False)
    full = torch.randn(4, 3)
    assert slice_full(full, param, 1, 2) is full
    assert full_shape(param, 2) == (4, 3)
    bare = nn.Parameter(torch.zeros(2))  # no attributes at all
    assert full_shape(bare, 2) == (2,)


def test_an_uneven_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be cut into 4"):
        slice_full(torch.zeros(6), _param((3,), 0, stride=2), 0, 2)


def test_gather_on_one_rank_is_the_tensor() -> None:
    param = _param((4, 3), 0)
    assert torch.equal(gather_full(param, param, single_grid()), param)
