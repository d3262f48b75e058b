"""The two passes of a global step: drop path is replayed, and overlapped communication changes nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaeva.config.schema import Config, OptimSection, ParallelSection, TowerOptimSection, TrainSection
from megaeva.data.batch import Batch
from megaeva.optim.build import build_optimizer
from megaeva.parallel.grid import Grid
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.parallel.shards import gather_full
from megaeva.parallel.wrap import finish_parameter_gather
from megaeva.tasks.contrastive import Contrastive
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import example_images, example_tokens, tiny

MODEL = tiny("EVA02-CLIP-L-14", drop_path=0.5)
NUM_SAMPLES, STEPS = 8, 4


def recipe(parallel: ParallelSection, precision: str, micro_batch_size: int) -> Config:
    return Config(
        task="contrastive",
        run_dir="unused",
        model=MODEL,
        parallel=parallel,
        optim=OptimSection(vision=TowerOptimSection(lr=1e-2), clip_grad_norm=1.0),
        train=TrainSection(
            total_samples=64, global_batch_size=NUM_SAMPLES, micro_batch_size=micro_batch_size, precision=precision
        ),
    )


def own_batch(grid: Grid) -> Batch:
    """This data block's share of the same eight samples."""
    whole = Batch(
        example_images(MODEL, NUM_SAMPLES), tuple(map(str, range(NUM_SAMPLES))), example_tokens(MODEL, NUM_SAMPLES)
    )
    return whole.split(NUM_SAMPLES // grid.dp_size)[grid.dp_rank]


def replayed_and_direct(runtime: Runtime) -> tuple[dict[str, Tensor], dict[str, Tensor], float, float]:
    """Gradients and loss of four microbatches by `global_step`, and by one graph over all of them."""
    task = Contrastive(recipe(ParallelSection(distributed_optimizer=False), "fp32", 2), runtime)
    batch = own_batch(task.grid)
    loss = task.step(batch, lambda index: seed_pass(0, 5, index))
    parameters = {f"{t.name}.{n}": p for t in task.towers for n, p in t.module.named_parameters()}
    by_step = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}
    features = []
    for index, part in enumerate(batch.split(2)):
        seed_pass(0, 5, index)
        # Text first, as in the step's loss.
        features.append((task.model.encode_text(part.token_BL), task.model.encode_image(part.image_BCHW)))
    exact = task.loss(*(torch.cat(modality) for modality in zip(*features, strict=True)))
    direct = dict(zip(parameters, torch.autograd.grad(exact, list(parameters.values())), strict=True))
    return by_step, direct, loss.item(), exact.item()


def test_drop_path_is_the_same_in_both_passes() -> None:
    ((by_step, direct, loss, exact),) = run_ranks(replayed_and_direct, 1)
    assert abs(loss - exact) <= 1e-6 * abs(exact)
    whole = torch.cat([gradient.flatten() for gradient in direct.values()]).norm()
    for name, gradient in direct.items():
        difference = (by_step[name] - gradient).norm()
        assert difference <= 1e-5 * max(gradient.norm(), 1e-3 * whole), name


OVERLAPS: tuple[dict[str, bool], ...] = (
    {},
    {"overlap_grad_reduce": True},
    {"overlap_grad_reduce": True, "overlap_param_gather": True},
)


class Names(set[str], TorchDispatchMode):
    """Names of the operators that ran in the context."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def train(runtime: Runtime, precision: str, micro_batch_size: int) -> list[dict[str, Tensor]]:
    """Whole weights after some steps with reduction at the end, with reduction during the backward pass, and with the
    gather of parameters during the forward pass as well."""
    results = []
    for overlap in OVERLAPS:
        cfg = recipe(ParallelSection(distributed_optimizer=True, **overlap), precision, micro_batch_size)
        task = Contrastive(cfg, runtime)
        optimizer, rate = build_optimizer(task.towers, cfg)
        batch = own_batch(task.grid)
        with Names() as names:
            for step in range(STEPS):
                rate.set(step)
                task.step(batch, lambda index, step=step: seed_pass(0, step, index))
                assert optimizer.step()[0]
                task.after_step()
            finish_parameter_gather(task.towers)
        # torch 2.14's gloo corrupts the heap where several coalesced gathers are in flight, one run in thousands.
        assert not {name for name in names if "gather" in name and "coalesced" in name}, names
        assert "allgather_" in names
        results.append(
            {
                f"{tower.name}.{name}": gather_full(parameter, parameter, tower.grid).clone()
                for tower in task.towers
                for name, parameter in tower.module.named_parameters()
            }
        )
    return results


def assert_same_on_all(per_rank: Sequence[Any]) -> None:
    plain = per_rank[0][0]
    assert plain["scale.log_scale"].dtype == torch.float32
    for results in per_rank:
        for weights in results:
            assert weights.keys() == plain.keys()
            # Two summands: their order cannot matter, so not a bit may differ.
            unequal = [name for name, weight in weights.items() if not torch.equal(weight, plain[name])]
            assert not unequal, unequal


def train_in_both(runtime: Runtime) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    return train(runtime, "fp32", 2), train(runtime, "bf16", 4)


def test_overlap_gives_the_same_weights_on_every_rank() -> None:
    fp32, bf16 = zip(*run_ranks(train_in_both, 2), strict=True)
    assert_same_on_all(fp32)
    assert_same_on_all(bf16)
