"""Hidden states cut over tp along the sequence (sequence parallelism), and whole again; nothing happens without it.

What comes before `scatter_tokens` and after the gathers is computed alike on all tp ranks, so gradients there are whole
on each and only the parameters in between that act on a rank's own tokens have shares to be summed: mcore sums those
marked `sequence_parallel`.
"""

import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from torch import Tensor

from megaeva.parallel.grid import Grid


def padded_length(num_tokens: int, grid: Grid) -> int:
    """Returns the length that tp ranks cut into equal parts: rounded up to a multiple of tp."""
    return -(-num_tokens // grid.tp_size) * grid.tp_size if grid.sequence_parallel else num_tokens


def scatter_tokens(hidden_SBD: Tensor, grid: Grid) -> Tensor:
    """Returns this rank's tokens [padded_length / tp, B, D]; zeros are appended where tp does not divide S."""
    if not grid.sequence_parallel:
        return hidden_SBD
    padding = padded_length(len(hidden_SBD), grid) - len(hidden_SBD)
    if padding:
        hidden_SBD = F.pad(hidden_SBD, (0, 0, 0, 0, 0, padding))
    own: Tensor = scatter_to_sequence_parallel_region(hidden_SBD, group=grid.groups.tp)
    return own


def gather_tokens(hidden_SBD: Tensor, num_tokens: int, grid: Grid) -> Tensor:
    """Returns all tokens [num_tokens, B, D] without the padding; all tp ranks must call it."""
    if not grid.sequence_parallel:
        return hidden_SBD
    whole: Tensor = gather_from_sequence_parallel_region(
        hidden_SBD, tensor_parallel_output_grad=False, group=grid.groups.tp
    )
    return whole[:num_tokens]


def first_token(hidden_SBD: Tensor, grid: Grid) -> Tensor:
    """Returns the sequence's first token [B, D]; all tp ranks must call it."""
    if not grid.sequence_parallel:
        return hidden_SBD[0]
    # One row of each rank travels, as it is the gather that mcore has; a whole sequence would be S / tp times as much.
    first: Tensor = gather_from_sequence_parallel_region(
        hidden_SBD[:1], tensor_parallel_output_grad=False, group=grid.groups.tp
    )
    return first[0]


def pad_runs(x_SBX: Tensor, runs: int, multiple: int) -> Tensor:
    """Returns the rows of `x_SBX` as [R, X], each of its `runs` equal parts with zeros up to a multiple of rows.

    What needs no padding is returned as it is, [S, B, X]. The parts are the tokens of one tp rank each.
    """
    run = x_SBX.shape[0] * x_SBX.shape[1] // runs
    padding = -run % multiple
    if not padding:
        return x_SBX
    return F.pad(x_SBX.reshape(runs, run, -1), (0, 0, 0, padding)).flatten(0, 1)


def unpad_runs(x_RX: Tensor, runs: int, length: int, batch: int) -> Tensor:
    """Returns [length, batch, X] without the rows that `pad_runs` put behind each of `runs` parts."""
    run = length * batch // runs
    return x_RX.unflatten(0, (runs, -1))[:, :run].reshape(length, batch, -1)
