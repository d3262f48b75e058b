"""Rows padded for products that take multiples only."""

import pytest
import torch

from megaeva.model.sequence import pad_runs, unpad_runs


@pytest.mark.parametrize(("length", "batch", "runs", "multiple"), [(17, 3, 1, 16), (18, 3, 2, 16), (258, 1, 2, 128)])
def test_padded_runs_come_back_as_they_were(length: int, batch: int, runs: int, multiple: int) -> None:
    x = torch.arange(1.0, length * batch * 4 + 1).view(length, batch, 4)
    padded = pad_runs(x, runs, multiple)
    assert padded.dim() == 2 and len(padded) % (runs * multiple) == 0
    assert len(padded) - length * batch < runs * multiple
    for run in padded.unflatten(0, (runs, -1)):
        real = length * batch // runs
        assert (run[:real] > 0).all() and (run[real:] == 0).all()
    assert torch.equal(unpad_runs(padded, runs, length, batch), x)


def test_what_fits_is_not_copied() -> None:
    x = torch.ones(16, 2, 4)
    assert pad_runs(x, 2, 16) is x


def test_a_gathered_sequence_loses_the_padding_between_its_parts() -> None:
    parts = [torch.randn(9, 3, 4) for _ in range(2)]
    gathered = torch.cat([pad_runs(part, 1, 16) for part in parts])
    assert torch.equal(unpad_runs(gathered, 2, 18, 3), torch.cat(parts))
