"""One optimizer step's forward and backward passes, carried by mcore's schedules.

Two kinds of loss. A *local* loss is a sum over samples: each microbatch's share is backpropagated at once. A *global*
loss (contrastive) needs the features of the whole batch before any gradient exists:

    (i)   forward every microbatch without gradients, keep the features;
    (ii)  the loss of all features gives dL/dfeature;
    (iii) forward and backward each microbatch again with the surrogate sum(feature * dL/dfeature).

`seed_pass` makes the randomness of a pass a function of (seed, step, microbatch, rank), so (iii) repeats (i) exactly.
With one microbatch and no pipeline, (i) and (iii) are one pass.

Gradient scale: shares sum (see wrap.py), so neither the number of microbatches nor a tower's data-parallel size
appears anywhere; `_undo_microbatch_mean` is the one place that cancels mcore's division.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megaeva.parallel.wrap import Tower, reduce_gradients, zero_gradients

Sample = TypeVar("Sample")
Sample_in = TypeVar("Sample_in", contravariant=True)
SeedPass = Callable[[int], None]


class LocalLoss(Protocol[Sample_in]):
    """A loss that decomposes over samples."""

    def loss(self, batch: Sample_in) -> Tensor:
        """This microbatch's share (0-dim); shares over microbatches and data ranks sum to the global loss."""
        ...


class GlobalLoss(Protocol[Sample_in]):
    """A loss over the features of the whole global batch."""

    def features(self, batch: Sample_in) -> tuple[Tensor, ...]:
        """One [B, E] tensor a modality, with gradients into the towers when they are enabled."""
        ...

    def loss(self, *features: Tensor) -> Tensor:
        """The global loss, equal on every rank; gradients of its inputs are shares. May reach parameters directly."""
        ...


@dataclass
class _Chunk(Generic[Sample]):
    """What mcore's schedules ask of a model."""

    towers: Sequence[Tower]
    config: TransformerConfig
    model_type: ModelType = ModelType.encoder_or_decoder
    inputs: list[Tensor | None] = field(default_factory=list)

    def set_input_tensor(self, inputs: list[Tensor | None]) -> None:
        self.inputs = inputs


def local_step(task: LocalLoss[Sample], towers: Sequence[Tower], batches: list[Sample], seed_pass: SeedPass) -> Tensor:
    """This rank's share of the loss (0-dim, detached); afterwards the towers hold the reduced gradients."""

    def forward(batch: Sample) -> tuple[Tensor, Callable[..., Any]]:
        return task.loss(batch), _undo_microbatch_mean(len(batches))

    zero_gradients(towers)
    shares = _run(towers, batches, forward, seed_pass)
    reduce_gradients(towers)
    return torch.stack(shares).sum()


def global_step(
    task: GlobalLoss[Sample], towers: Sequence[Tower], batches: list[Sample], seed_pass: SeedPass
) -> Tensor:
    """The global loss (0-dim, detached, equal on every rank); afterwards the towers hold the reduced gradients.

    Memory: features of the whole local batch, activations of one microbatch.
    """
    zero_gradients(towers)
    if len(batches) == 1:
        losses: list[Tensor] = []

        def forward_once(batch: Sample) -> tuple[Tensor, Callable[..., Any]]:
            features = task.features(batch)
            loss, gradients = _loss_and_feature_gradients(task, features)
            losses.append(loss)
            return _surrogate(features, gradients), _undo_microbatch_mean(1)

        _run(towers, batches, forward_once, seed_pass)
        loss = losses[0]
    else:
        with torch.no_grad():
            kept = _run(towers, batches, lambda batch: (task.features(batch), _keep), seed_pass, forward_only=True)
        joined = tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
        loss, gradients = _loss_and_feature_gradients(task, joined)
        sizes = [part[0].shape[0] for part in kept]
        pieces: Iterator[tuple[Tensor, ...]] = zip(*(gradient.split(sizes) for gradient in gradients), strict=True)

        def forward_again(batch: Sample) -> tuple[Tensor, Callable[..., Any]]:
            return _surrogate(task.features(batch), next(pieces)), _undo_microbatch_mean(len(batches))

        _run(towers, batches, forward_again, seed_pass)
    reduce_gradients(towers)
    return loss


def _loss_and_feature_gradients(
    task: GlobalLoss[Any], features: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and dL/dfeature; the same backward adds gradients of parameters the loss uses itself (the logit scale)."""
    with torch.enable_grad():
        leaves = tuple(feature.detach().requires_grad_() for feature in features)
        loss = task.loss(*leaves)
        loss.backward()
    return loss.detach(), tuple(leaf.grad for leaf in leaves)  # type: ignore[misc]


def _surrogate(features: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """sum(feature * dL/dfeature): its gradient at the parameters is the loss's."""
    return torch.stack(
        [(feature * gradient).sum() for feature, gradient in zip(features, gradients, strict=True)]
    ).sum()


def _undo_microbatch_mean(num_microbatches: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """mcore divides what it backpropagates by the number of microbatches, in place; shares must sum instead."""

    def reduce(loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss * num_microbatches, loss.detach()

    return reduce


def _keep(output: tuple[Tensor, ...], non_loss_data: bool = True) -> tuple[Tensor, ...]:
    return output


def _run(
    towers: Sequence[Tower],
    batches: list[Sample],
    forward: Callable[[Sample], tuple[Any, Callable[..., Any]]],
    seed_pass: SeedPass,
    forward_only: bool = False,
) -> list[Any]:
    """Drive the passes with mcore's schedule; returns what each microbatch kept."""
    grid = towers[0].grid
    config = towers[0].module.config
    numbered = enumerate(batches)

    def forward_step(iterator: Iterator[tuple[int, Sample]], model: nn.Module) -> tuple[Any, Callable[..., Any]]:
        index, batch = next(iterator)
        seed_pass(index)
        return forward(batch)

    forward_backward = get_forward_backward_func(pp_size=grid.pp_size, vp_size=None)
    return forward_backward(
        forward_step_func=forward_step,
        data_iterator=numbered,
        model=_Chunk(towers, config),
        num_microbatches=len(batches),
        seq_length=1,  # unused without a pipeline
        micro_batch_size=1,  # unused without a pipeline
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        pg_collection=grid.groups,
    )
