"""The second pass of a global step computes the features of the first, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import AxesSection
from megaeva.data.batch import Batch
from megaeva.losses.contrastive import start_gather
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.tasks import contrastive
from tests.helpers.parallel_runs import contrastive_task
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import example_images, example_tokens, tiny

NUM_SAMPLES = 8
MODEL = tiny("EVA02-CLIP-L-14", num_layers=4, drop_path=0.5)


def whole_batch() -> Batch:
    return Batch(
        example_images(MODEL, NUM_SAMPLES), tuple(map(str, range(NUM_SAMPLES))), example_tokens(MODEL, NUM_SAMPLES)
    )


def features_of_both_passes(runtime: Runtime, axes: AxesSection, forget_seed: bool) -> dict[str, list[Tensor]]:
    """{tower: outputs in the order they were computed} on ranks that compute outputs; hidden states elsewhere."""
    task = contrastive_task(runtime, MODEL, axes, num_samples=NUM_SAMPLES, micro_batch_size=2)
    seen: dict[str, list[Tensor]] = {"vision": [], "text": []}
    for name in seen:
        getattr(task, name).ddp.register_forward_hook(lambda *args, name=name: seen[name].append(args[2].detach()))
    drawn = iter(range(1000))
    task.step(whole_batch(), lambda index: seed_pass(0, next(drawn) if forget_seed else 0, index))
    return seen


ONE_RANK = (AxesSection(), AxesSection(recompute="full"))
TWO_RANKS = (AxesSection(tp=2, sequence_parallel=True), AxesSection(pp=2), AxesSection(pp=2, vpp=2))


def on_each(runtime: Runtime, every: tuple[AxesSection, ...]) -> list[dict[str, list[Tensor]]]:
    return [features_of_both_passes(runtime, axes, False) for axes in every]


@pytest.mark.parametrize("every", [ONE_RANK, TWO_RANKS], ids=["one_rank", "two_ranks"])
def test_features_of_both_passes_are_equal_bit_for_bit(every: tuple[AxesSection, ...]) -> None:
    num_ranks = every[0].tp * every[0].pp
    for of_rank in run_ranks(on_each, num_ranks, every):
        for axes, seen in zip(every, of_rank, strict=True):
            for name, outputs in seen.items():
                # As a set: interleaved chunks run in another order when backward passes stand between them.
                bits = [output.numpy().tobytes() for output in outputs]
                assert len(bits) == (8 * axes.vpp if name == "vision" else 8 // num_ranks), (axes, name)
                assert sorted(bits[: len(bits) // 2]) == sorted(bits[len(bits) // 2 :]), (axes, name)


def test_without_replayed_randomness_they_differ() -> None:
    """The comparison above can fail."""
    (seen,) = run_ranks(features_of_both_passes, 1, AxesSection(), True)
    outputs = seen["vision"]
    assert not torch.equal(torch.stack(outputs[:4]), torch.stack(outputs[4:]))


def events_of_a_step(runtime: Runtime) -> list[str]:
    task = contrastive_task(runtime, MODEL, AxesSection(pp=2), num_samples=NUM_SAMPLES, micro_batch_size=2)
    events: list[str] = []
    for name in ("vision", "text"):
        getattr(task, name).ddp.register_forward_hook(lambda *_, name=name: events.append(name))

    def gather(*args: Any) -> Any:
        events.append("gather of text")
        return start_gather(*args)

    contrastive.start_gather = gather  # type: ignore[attr-defined]
    task.step(whole_batch(), lambda index: seed_pass(0, 0, index))
    return events


def test_text_is_gathered_while_vision_runs() -> None:
    for events in run_ranks(events_of_a_step, 2):
        assert events.count("gather of text") == 1
        assert set(events[: events.index("gather of text")]) == {"text"}
        assert events[events.index("gather of text") + 1] == "vision"
