"""The second pass of a global step computes the features of the first, bit for bit."""

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import AxesSection, Config, OptimSection, ParallelSection, TowerOptimSection, TrainSection
from megaeva.data.batch import Batch
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.tasks.contrastive import Contrastive
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import example_images, example_tokens, tiny

NUM_SAMPLES = 8
MODEL = tiny("EVA02-CLIP-L-14", num_layers=4, drop_path=0.5)


def features_of_both_passes(runtime: Runtime, axes: AxesSection, forget_seed: bool) -> dict[str, list[Tensor]]:
    """{tower: outputs in the order they were computed} on ranks that compute outputs; hidden states elsewhere."""
    cfg = Config(
        task="contrastive",
        run_dir="unused",
        model=MODEL,
        parallel=ParallelSection(vision=axes, distributed_optimizer=False),
        optim=OptimSection(vision=TowerOptimSection(lr=1e-2)),
        train=TrainSection(total_samples=64, global_batch_size=NUM_SAMPLES, micro_batch_size=2, precision="fp32"),
    )
    task = Contrastive(cfg, runtime)
    seen: dict[str, list[Tensor]] = {"vision": [], "text": []}
    for name in seen:
        getattr(task, name).ddp.register_forward_hook(lambda *args, name=name: seen[name].append(args[2].detach()))
    whole = Batch(
        example_images(MODEL, NUM_SAMPLES), tuple(map(str, range(NUM_SAMPLES))), example_tokens(MODEL, NUM_SAMPLES)
    )
    drawn = iter(range(1000))
    task.step(whole, lambda index: seed_pass(0, next(drawn) if forget_seed else 0, index, 0))
    return seen


@pytest.mark.parametrize(
    ("num_ranks", "axes"),
    [
        pytest.param(1, AxesSection(), id="one_rank"),
        pytest.param(1, AxesSection(recompute="full"), id="recompute_full"),
        pytest.param(2, AxesSection(tp=2, sequence_parallel=True), id="tp2_sp"),
        pytest.param(2, AxesSection(pp=2), id="pp2"),
        pytest.param(2, AxesSection(pp=2, vpp=2), id="pp2_vpp2"),
    ],
)
def test_features_of_both_passes_are_equal_bit_for_bit(num_ranks: int, axes: AxesSection) -> None:
    for seen in run_ranks(features_of_both_passes, num_ranks, axes, False):
        for name, outputs in seen.items():
            # As a set: interleaved chunks run in another order when backward passes stand between them.
            bits = [output.numpy().tobytes() for output in outputs]
            assert len(bits) == (8 * axes.vpp if name == "vision" else 8 // num_ranks), (name, len(bits))
            assert sorted(bits[: len(bits) // 2]) == sorted(bits[len(bits) // 2 :]), name


def test_without_replayed_randomness_they_differ() -> None:
    """The comparison above can fail."""
    (seen,) = run_ranks(features_of_both_passes, 1, AxesSection(), True)
    outputs = seen["vision"]
    assert not torch.equal(torch.stack(outputs[:4]), torch.stack(outputs[4:]))
