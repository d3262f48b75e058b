"""Boxes: of flat ranges, of pieces cut over tensor-parallel ranks, and of optimizer shards of such pieces."""

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaeva.checkpoint.pieces import Piece, flat_boxes, module_pieces, overlap, state_pieces
from megaeva.parallel.shards import slice_full


def grid(tp_size: int = 1, tp_rank: int = 0, dp_size: int = 1, dp_rank: int = 0) -> Any:
    return SimpleNamespace(tp_size=tp_size, tp_rank=tp_rank, dp_size=dp_size, dp_rank=dp_rank)


def parameter(data: Tensor, dim: int | None, stride: int = 1) -> Any:
    made = nn.Parameter(data)
    if dim is not None:
        made.tensor_model_parallel, made.partition_dim, made.partition_stride = True, dim, stride  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (1, 4), (4, 1), (2, 3, 4), (2, 1, 3, 2)])
def test_flat_ranges_are_few_boxes(shape: tuple[int, ...]) -> None:
    numel = prod(shape)
    whole = torch.arange(numel).view(shape)
    for start in range(numel + 1):
        for stop in range(start, numel + 1):
            boxes = flat_boxes(shape, start, stop)
            assert len(boxes) <= max(1, 2 * len(shape) - 1)
            flat = torch.arange(start, stop)
            seen = []
            for offset, size, part in boxes:
                box = whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
                assert torch.equal(flat[part].view(size), box)
                seen += flat[part].tolist()
            assert seen == flat.tolist()


def put_together(pieces: list[Piece]) -> Tensor:
    """The whole tensor of the pieces that are written; -1 where none is, an error where two are."""
    whole = torch.full(pieces[0].whole, -1.0)
    for piece in pieces:
        if piece.is_main:
            part = whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.data.shape, strict=True))]
            assert (part == -1).all(), "written twice"
            part.copy_(piece.data)
    return whole


CUTS = [(None, 1), (0, 1), (1, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize(("dim", "stride"), CUTS)
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (2, 3), (4, 2)])
def test_a_module_over_ranks_is_written_once(dim: int | None, stride: int, tp: int, dp: int) -> None:
    full = torch.arange(8.0 * 16).view(8, 16)
    pieces = []
    for tp_rank in range(tp):
        for dp_rank in range(dp):
            module = nn.Module()
            module.w = parameter(slice_full(full, parameter(full, dim, stride), tp_rank, tp).clone(), dim, stride)
            module.register_buffer("b", torch.ones(2))
            own = module_pieces(module, "vision.", grid(tp, tp_rank, dp, dp_rank))
            assert {p.key for p in own} == {"vision.w", "vision.b"}
            for piece in own:
                live = module.w if piece.key == "vision.w" else module.b
                assert piece.data.untyped_storage().data_ptr() == live.untyped_storage().data_ptr()
            pieces += own
    assert torch.equal(put_together([p for p in pieces if p.key == "vision.w"]), full)
    assert torch.equal(put_together([p for p in pieces if p.key == "vision.b"]), torch.ones(2))


def test_copies_are_written_by_all_ranks_in_turn() -> None:
    module = nn.ParameterDict({str(i): nn.Parameter(torch.zeros(3)) for i in range(64)})
    counts = [sum(p.is_main for p in module_pieces(module, "", grid(2, r % 2, 2, r // 2))) for r in range(4)]
    assert sum(counts) == 64
    assert min(counts) >= 8


@pytest.mark.parametrize(("dim", "stride"), CUTS)
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_state_over_ranks_is_written_once(dim: int | None, stride: int, tp: int, dp: int) -> None:
    full = torch.arange(8.0 * 12).view(8, 12)
    for is_shard in (True, False):
        pieces = []
        for tp_rank in range(tp):
            local = slice_full(full, parameter(full, dim, stride), tp_rank, tp).clone()
            model = parameter(local, dim, stride)
            for dp_rank in range(dp):
                size = -(-local.numel() // dp) if is_shard else local.numel()
                start = dp_rank * size if is_shard else 0
                state = {"exp_avg": local.view(-1)[start : start + size].clone()}
                own = state_pieces("w", model, start, state, grid(tp, tp_rank, dp, dp_rank), is_shard=is_shard)
                assert {p.key for p in own} == {"optimizer.state.exp_avg.w"}
                for piece in own:
                    storage = state["exp_avg"].untyped_storage()
                    assert piece.data.untyped_storage().data_ptr() == storage.data_ptr(), "a view, to be read into"
                pieces += own
        assert torch.equal(put_together(pieces), full)


def test_a_scalar_has_one_piece() -> None:
    scale = nn.Parameter(torch.tensor(3.0))
    (piece,) = state_pieces("s", scale, 0, {"param": torch.ones(1)}, grid(), is_shard=True)
    assert (piece.offset, piece.whole, piece.data.shape) == ((), (), ())


def test_overlap() -> None:
    assert overlap((0, 2), (3, 2), (1, 0), (4, 3)) == ((1, 2), (2, 1))
    assert overlap((0, 2), (3, 2), (3, 0), (4, 3)) is None
    assert overlap((), (), (), ()) == ((), ())
