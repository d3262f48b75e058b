"""One optimizer step's forward and backward passes, carried by mcore's schedules.

Two kinds of loss. A *local* loss is a sum over samples: each microbatch's share is backpropagated at once. A *global*
loss (contrastive) needs the features of the whole batch before any gradient exists:

    (i)   forward every microbatch without gradients, keep the features;
    (ii)  the loss of all features gives dL/dfeature;
    (iii) forward and backward each microbatch again with the surrogate sum(feature * dL/dfeature).

`seed_pass` makes the randomness of a pass a function of (seed, step, microbatch), so (iii) repeats (i) exactly.
A tower with one microbatch and no pipeline gains nothing by that and keeps the graph of (i) for (iii).

Gradient scale: shares sum (see wrap.py), so neither the number of microbatches nor a tower's data-parallel size
appears anywhere; `_undo_microbatch_mean` is the one place that cancels mcore's division. A loss scale (fp16) multiplies
the loss before its backward pass, of a global step that of (ii), whose dL/dfeature carries it into (iii).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from megaeva.parallel import watch
from megaeva.parallel.collectives import all_gather_rows, broadcast_from_last_stage
from megaeva.parallel.grid import Grid
from megaeva.parallel.wrap import Tower, reduce_gradients, zero_gradients

Sample = TypeVar("Sample")
SeedPass = Callable[[int], None]


@dataclass(frozen=True)
class Part(Generic[Sample]):
    """One tower's work in a step: the samples of its own data rank.

    Attributes:
        tower: what runs; only its name, config, grid and whether it is trained are read here.
        batches: microbatches, at least one; of one size where the tower has stages.
        forward: (microbatch, hidden of the previous stage, chunk) -> hidden [S, B, D] for the next virtual stage, or on
            the last one the tower's output.
        num_stage_tokens: S of the hidden states between stages, before it is cut over tp.
        embed_dim: width of the output rows.
        first_index: number of the first microbatch in the global batch, for the seeds.
        rows_per_sample: B of the hidden states between stages, for each sample of a microbatch.
        send: called with this rank's rows of a global step as soon as they are known, before the next part runs.
    """

    tower: Tower
    batches: Sequence[Sample]
    forward: Callable[[Sample, Tensor | None, int], Tensor]
    num_stage_tokens: int
    embed_dim: int
    first_index: int = 0
    rows_per_sample: int = 1
    send: Callable[[Tensor], None] | None = None

    @property
    def in_one_pass(self) -> bool:
        """Whether a second forward pass would gain nothing, and the graph of the first is kept for the gradients."""
        return len(self.batches) == 1 and self.tower.grid.pp_size == 1 and self.tower.trained


class GlobalLoss(Protocol):
    """A loss over the features of the whole global batch."""

    def loss(self, *features: Tensor) -> Tensor:
        """The global loss of this rank's rows, equal on every rank; gradients are shares. May reach parameters."""
        ...


def local_step(
    part: Part[Sample],
    loss: Callable[[int, Tensor], Tensor],
    towers: Sequence[Tower],
    seed_pass: SeedPass,
    loss_scale: float = 1.0,
) -> Tensor:
    """This data rank's share of the loss (0-dim, detached), on every rank of the tower; gradients are left reduced.

    Args:
        loss: (microbatch number, output) -> its share (0-dim); shares over microbatches and data ranks sum to the loss.
        loss_scale: gradients are those of loss_scale times the loss.
    """
    zero_gradients(towers)
    undo = _undo_microbatch_mean(len(part.batches), loss_scale)
    shares = _run(part, lambda index, output: undo(loss(index, output)), seed_pass)
    reduce_gradients(towers)
    device = next(part.tower.module.parameters()).device
    share = torch.stack(shares).sum() if shares else torch.zeros((), device=device)
    return broadcast_from_last_stage(share, part.tower.grid)


def global_step(
    task: GlobalLoss,
    parts: Sequence[Part[Any]],
    towers: Sequence[Tower],
    seed_pass: SeedPass,
    loss_scale: float = 1.0,
) -> Tensor:
    """The global loss (0-dim, detached, equal on every rank); afterwards the towers hold the reduced gradients.

    They are those of loss_scale times the loss.

    Every rank owns the same number of rows of the global batch, the same ones in every part: the ranks that hold one
    copy of a tower share out its rows for the loss and gather the gradients. Memory: features of the parts' whole
    batches, activations of one microbatch (of the pipeline's depth). A tower that is not trained makes pass (i) only.
    """
    zero_gradients(towers)
    features, own = [], []
    for part in parts:
        features.append(_forward_once(part, seed_pass) if part.in_one_pass else _first_pass(part, seed_pass))
        own.append(_own_rows(features[-1], part.tower.grid))
        if part.send is not None:
            part.send(own[-1])
    watch.at("the loss of the global batch")
    loss, own_gradients = _loss_and_feature_gradients(task, own, loss_scale)
    trained = [
        (part, feature, all_gather_rows(gradient, part.tower.grid.groups.mp))
        for part, feature, gradient in zip(parts, features, own_gradients, strict=True)
        if part.tower.trained
    ]
    for part, feature, gradient in trained:
        if part.in_one_pass:
            feature.backward(gradient)
        else:
            _second_pass(part, gradient, seed_pass)
    watch.at("the reduction of gradients")
    reduce_gradients(towers)
    return loss


@torch.no_grad()
def forward_rows(part: Part[Any], num_rows: int) -> Tensor:
    """The output rows of all microbatches [num_rows, E] without gradient, on every rank of the tower; all call it."""
    return _on_all_stages(part, torch.cat(rows) if (rows := _run(part, _keep)) else None, num_rows)


def _forward_once(part: Part[Any], seed_pass: SeedPass) -> Tensor:
    """The output of the only microbatch, with its graph."""
    watch.at(f"the forward pass of {part.tower.name}")
    seed_pass(part.first_index)
    return part.forward(part.batches[0], None, 0)


@torch.no_grad()
def _first_pass(part: Part[Any], seed_pass: SeedPass) -> Tensor:
    """Features of all microbatches, on all ranks of the tower."""
    kept = _run(part, _keep, seed_pass, name="pass (i)")
    return _on_all_stages(part, torch.cat(kept) if kept else None, sum(map(len, part.batches)))


def _second_pass(part: Part[Any], gradient_BE: Tensor, seed_pass: SeedPass) -> None:
    """Forward again, and backward from dL/dfeature."""
    pieces = gradient_BE.split([len(batch) for batch in part.batches])
    undo = _undo_microbatch_mean(len(part.batches))

    # sum(feature * dL/dfeature): its gradient at the parameters is the loss's.
    # In fp32: mcore divides by the number of microbatches, which in bf16 is off by 0.4 % for some numbers.
    def surrogate(index: int, feature: Tensor) -> tuple[Tensor, Tensor]:
        return undo((feature.float() * pieces[index].float()).sum())

    _run(part, surrogate, seed_pass, name="pass (iii)")


def _loss_and_feature_gradients(
    task: GlobalLoss, features: Sequence[Tensor], loss_scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Loss, and loss_scale dL/dfeature; the same backward adds those of what the loss uses itself: the logit scale."""
    with torch.enable_grad():
        leaves = [feature.detach().requires_grad_() for feature in features]
        loss = task.loss(*leaves)
        (loss * loss_scale).backward()
    return loss.detach(), [leaf.grad for leaf in leaves]  # type: ignore[misc]


def _own_rows(feature_BE: Tensor, grid: Grid) -> Tensor:
    """This rank's share of the rows that all ranks of its copy of the tower hold."""
    return feature_BE.detach().chunk(grid.model_size)[grid.model_rank]


def _undo_microbatch_mean(num_microbatches: int, loss_scale: float = 1.0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """mcore divides what it backpropagates by the number of microbatches, in place; shares must sum instead."""

    def reduce(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss * (num_microbatches * loss_scale), loss.detach()

    return reduce


def _keep(index: int, output: Tensor) -> Tensor:
    return output


def _on_all_stages(part: Part[Any], rows_XE: Tensor | None, num_rows: int) -> Tensor:
    """The last pipeline stage's rows on all stages of the tower, which all call it; the others pass None."""
    module, grid = part.tower.module, part.tower.grid
    if rows_XE is None:
        device = next(module.parameters()).device
        rows_XE = torch.empty(num_rows, part.embed_dim, dtype=module.config.params_dtype, device=device)
    return broadcast_from_last_stage(rows_XE, grid)


class _Chunk(nn.Module):
    """What mcore's schedules ask of a model, for one chunk of a tower: the tower itself is called by `Part.forward`."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.config, self.number = config, number
        self.hidden: Tensor | None = None

    def set_input_tensor(self, inputs: list[Tensor | None]) -> None:
        """Takes the previous stage's output; None on the first."""
        (self.hidden,) = inputs


def _run(
    part: Part[Sample], keep: Callable[[int, Tensor], Any], seed_pass: SeedPass | None = None, name: str = "pass"
) -> list[Any]:
    """Drives the microbatches through all stages with mcore's schedule, without backward where gradients are off.

    Returns what `keep` made of each microbatch's output, in order; on the last stage only, elsewhere nothing. With
    gradients `keep` must return (what to backpropagate, what to return).
    """
    grid, num_microbatches = part.tower.grid, len(part.batches)
    # A copy: these describe the schedule, and mcore's layers would cut themselves by them.
    config = copy.copy(part.tower.module.config)
    if grid.vpp_size > 1:
        config.virtual_pipeline_model_parallel_size = grid.vpp_size
        config.microbatch_group_size_per_vp_stage = grid.pp_size
        # Transfers overlap with the other chunks' work. Batched ones would also be wrong at pp=2: a hidden state and a
        # gradient then travel between the same two ranks in one batch, and are matched by their order alone.
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
    chunks = [_Chunk(config, number) for number in range(grid.vpp_size)]
    with_gradients = torch.is_grad_enabled()

    def forward_step(iterator: Iterator[tuple[int, Sample]], chunk: _Chunk) -> tuple[Tensor, Callable[..., Any]]:
        index, batch = next(iterator)
        watch.at(f"{name} of {part.tower.name}, microbatch {index + 1} of {num_microbatches}")
        if seed_pass is not None:
            seed_pass(part.first_index + index)
        output = part.forward(batch, chunk.hidden, chunk.number)
        return output, lambda output, non_loss_data=False: keep(index, output)

    kept: list[Any] = get_forward_backward_func(
        pp_size=grid.pp_size, vp_size=grid.vpp_size if grid.vpp_size > 1 else None
    )(
        forward_step_func=forward_step,
        data_iterator=[enumerate(part.batches) for _ in chunks],
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=part.num_stage_tokens,
        micro_batch_size=len(part.batches[0]) * part.rows_per_sample,  # type: ignore[arg-type]
        forward_only=not with_gradients,
        collect_non_loss_data=not with_gradients,
        p2p_communicator=P2PCommunicator(grid.groups.pp, config) if grid.pp_size > 1 else None,
        pg_collection=grid.groups,
    )
    return kept
