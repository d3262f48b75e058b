"""The FP8 rehearsal trains the same on any layout of ranks, and a step that runs twice repeats itself."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megaeva.config.schema import AxesSection, Config, Fp8Section, TrainSection
from megaeva.data.synthetic import make_shards
from megaeva.model.fp8 import ROLES, EmulatedFp8, fp8_figures, fp8_step
from megaeva.model.linear import ColumnLinear, RowLinear
from megaeva.observability.metrics import read_metrics
from megaeva.ops.fp8 import _DECODED
from megaeva.optim.build import build_optimizer
from megaeva.parallel import wrap
from megaeva.parallel.platform import DTYPES
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.tasks.contrastive import Contrastive
from megaeva.trainer import Trainer
from tests.helpers.layouts import Layout
from tests.helpers.parallel_runs import Case, fill, make_recipe, whole_batch, whole_weights
from tests.helpers.spawn import run_ranks
from tests.helpers.trainer_recipe import model, trainer_recipe

NUM_STEPS = 3
FP8 = Fp8Section(recipe="delayed", amax_history=2, first_layers_bf16=1, last_layers_bf16=0, rehearse=True)
ONE = Layout("one", microbatches=2)
SAME_BITS = (
    Layout("dp2", 2, distributed_optimizer=True),
    Layout("pp2_vpp2", 2, AxesSection(pp=2, vpp=2, recompute="full"), microbatches=2),
)
SAME_SUMS = (
    Layout("tp2", 2, AxesSection(tp=2), AxesSection(tp=2), microbatches=2),
    Layout("tp2_sp", 2, *2 * (AxesSection(tp=2, sequence_parallel=True, recompute="full"),), microbatches=2),
)
Run = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def recipe(layout: Layout, fp8: Fp8Section | None) -> Config:
    cfg = make_recipe(Case(layout, "contrastive", "EVA02-CLIP-bigE-14-plus"))
    precision = {"precision": "fp8", "fp8": fp8} if fp8 else {"precision": "bf16"}
    optim = cfg.optim.model_copy(update={"clip_grad_norm": None})  # mcore clips fp32 only
    return cfg.model_copy(update={"train": cfg.train.model_copy(update=precision), "optim": optim})


def train(runtime: Runtime, layout: Layout, fp8: Fp8Section | None, features: list[Tensor] | None = None) -> Run:
    """Losses, whole weights at the end, and the scales of this rank's linears."""
    cfg = recipe(layout, fp8)
    task = Contrastive(cfg, runtime)
    for tower in task.towers[:2]:
        fill(tower.module, tower.grid)
        if features is not None:
            tower.ddp.register_forward_hook(lambda *args: features.append(args[2].detach().clone()))
    optimizer, learning_rate = build_optimizer(task.towers, cfg)
    losses = []
    for step in range(NUM_STEPS):
        batch = whole_batch(cfg, step).split(layout.num_samples // task.grid.dp_size)[task.grid.dp_rank]
        learning_rate.set(step)
        with fp8_step(task.towers, cfg.train.fp8_in_use, "local"):
            losses.append(task.step(batch, lambda index, step=step: seed_pass(5, step, index)).item())
        assert optimizer.step()[0]
    scales = {
        f"{tower.name}.{name}": part.scale
        for tower in task.towers
        for name, part in tower.module.named_modules()
        if isinstance(part, EmulatedFp8)
    }
    figures = fp8_figures(task.towers)
    assert bool(figures) == bool(scales)
    for name, largest in figures.items():
        kind, tower, role = name.split("/")
        assert tower in ("vision", "text") and role in ROLES
        # Weights hardly move in a step; what goes through them may be larger than in the two steps before.
        assert 0 < largest < (1.1 if (kind, role) == ("fp8_filled", "weight") else 1e3), name
    return losses, whole_weights(task.towers), scales


def one_rank(runtime: Runtime) -> dict[str, Any]:
    """Runs of a single process: in bf16, in FP8, and in FP8 with fp64 around it; features of the one in FP8."""
    features: list[Tensor] = []
    runs: dict[str, Any] = {"bf16": train(runtime, ONE, None), "fp8": train(runtime, ONE, FP8, features)}
    runs["features"] = features
    with pytest.MonkeyPatch.context() as patch:
        fp64_around(patch)
        runs["fp64 fp8"] = train(runtime, ONE, FP8)
        runs["fp64"] = train(runtime, ONE, Fp8Section(first_layers_bf16=9, rehearse=True))
    return runs


def two_ranks(runtime: Runtime) -> dict[str, Run]:
    runs = {layout.name: train(runtime, layout, FP8) for layout in SAME_BITS}
    with pytest.MonkeyPatch.context() as patch:
        fp64_around(patch)
        runs |= {layout.name: train(runtime, layout, FP8) for layout in SAME_SUMS}
        patch.setattr(dist, "all_reduce", keeps_largest_values(dist.all_reduce))
        runs["each its own scales"] = train(runtime, SAME_SUMS[0], FP8)
    return runs


def fp64_around(patch: pytest.MonkeyPatch) -> None:
    """fp64 wherever there is no FP8: in fp32 the order of a sum moved a value across a border of FP8 now and then."""
    patch.setattr(TrainSection, "parameter_precision", property(lambda self: "fp32"))
    patch.setitem(DTYPES, "fp32", torch.float64)
    for dtype, table in _DECODED.items():
        patch.setitem(_DECODED, dtype, table.double())
    in_their_dtype = partial(DistributedDataParallelConfig, grad_reduce_in_fp32=False)
    patch.setattr(wrap, "DistributedDataParallelConfig", lambda grad_reduce_in_fp32, **other: in_their_dtype(**other))


def keeps_largest_values(all_reduce: Any) -> Any:
    def call(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **others: Any) -> Any:
        return None if op == dist.ReduceOp.MAX and tensor.shape[-1:] == (3,) else all_reduce(tensor, op, **others)

    return call


def distance(run: Run, reference: Run) -> float:
    """Between the weights at the end."""
    return torch.stack([(run[1][name] - weight).norm() for name, weight in reference[1].items()]).norm().item()


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    (runs,) = run_ranks(one_rank, 1)
    return runs


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[str, Run]]:
    return run_ranks(two_ranks, 2)


def test_both_passes_of_a_global_step_have_the_same_features(single: dict[str, Any]) -> None:
    """In each step: text and vision, two passes each, and the four again."""
    features = single["features"]
    assert len(features) == NUM_STEPS * 8
    steps = [features[start : start + 8] for start in range(0, len(features), 8)]
    for step in steps:
        assert all(torch.equal(first, again) for first, again in zip(step[:4], step[4:], strict=True))
    assert not torch.equal(steps[0][0], steps[1][0])


@pytest.mark.parametrize("layout", SAME_BITS, ids=lambda layout: layout.name)
def test_same_bits(single: dict[str, Any], of_ranks: list[dict[str, Run]], layout: Layout) -> None:
    """Whoever has the samples or the layers: losses, weights after three steps, scales."""
    losses, weights, scales = single["fp8"]
    assert losses != single["bf16"][0]
    for runs in of_ranks:
        assert runs[layout.name][0] == losses
        assert all(torch.equal(weight, weights[name]) for name, weight in runs[layout.name][1].items())
        assert all(torch.equal(scale, scales[name]) for name, scale in runs[layout.name][2].items())
    assert set().union(*(runs[layout.name][2] for runs in of_ranks)) == set(scales)


@pytest.mark.parametrize("layout", SAME_SUMS, ids=lambda layout: layout.name)
def test_same_but_for_the_order_of_sums(single: dict[str, Any], of_ranks: list[dict[str, Run]], layout: Layout) -> None:
    """With fp64 around the products, so that a sum over tp moves nothing across a border of FP8.

    Measured: no weight differs; 0.35 of what FP8 changes in them where each rank goes by its own largest values.
    """
    reference = single["fp64 fp8"]
    effect = distance(reference, single["fp64"])
    for runs in of_ranks:
        assert runs[layout.name][0] == pytest.approx(reference[0], rel=1e-12)
        assert distance(runs[layout.name], reference) < 1e-5 * effect
        assert distance(runs["each its own scales"], reference) > 0.1 * effect
        for name, scale in runs[layout.name][2].items():
            assert torch.allclose(scale, reference[2][name], rtol=1e-5)


def test_only_what_the_recipe_names_is_in_fp8() -> None:
    (names,) = run_ranks(linears_in_fp8, 1)
    assert names == {
        f"vision.blocks.layers.{number}.{name}"
        for number in (1, 2, 3)
        for name in ("self_attention.linear_qkv", "mlp.linear_fc2")
    } | {f"text.blocks.layers.1.{name}" for name in ("self_attention.linear_qkv", "mlp.linear_fc2")}


def linears_in_fp8(runtime: Runtime) -> set[str]:
    """Names of the linears whose output a step in FP8 changes; evaluation changes none."""
    fp8 = FP8.model_copy(update={"linears": ("qkv", "fc2")})
    changed = set()
    tasks = [Contrastive(recipe(ONE, section), runtime) for section in (fp8, None)]
    for name in ("vision", "text"):
        pairs = []
        for task in tasks:
            tower = getattr(task, name)
            fill(tower.module, tower.grid)
            pairs.append({k: m for k, m in tower.module.named_modules() if isinstance(m, ColumnLinear | RowLinear)})
        for linear, ours in pairs[0].items():
            x = torch.randn(5, 2, ours.weight.shape[1]).bfloat16()
            bias = (torch.zeros(ours.weight.shape[0]).bfloat16(),) if isinstance(ours, ColumnLinear) else ()
            plain = pairs[1][linear](x, *bias)
            assert torch.equal(ours.eval()(x, *bias), plain)
            if not torch.equal(ours.train()(x, *bias), plain):
                changed.add(f"{name}.{linear}")
    return changed


def continued(runtime: Runtime, folder: str) -> list[str]:
    """Trains 4 steps from a save after 2, in several ways; returns what the last way has no state for."""
    fp8 = {"recipe": "delayed", "amax_history": 3, "first_layers_bf16": 0, "rehearse": True}
    said: list[str] = []

    def run(name: str, parallel: dict[str, Any], precision: str, *, stop: int = 4, resume: bool = False) -> None:
        train = {
            "total_samples": 32, "global_batch_size": 8, "micro_batch_size": 2, "log_every_steps": 1,
            "precision": precision, "fp8": fp8,
        }  # fmt: skip
        cfg = trainer_recipe(
            Path(folder),
            name,
            4,
            model=model(vision_layers=4, text_layers=2),
            optim={"vision": {"lr": 1e-2}},
            parallel=parallel,
            train=train,
            save={"every_steps": 2, "asynchronous": False},
        )
        trainer = Trainer(cfg, runtime, resume=resume, recipe_changes=[])
        said[:] = trainer.begun_anew
        if stop == 4:
            trainer.fit()
        else:
            while trainer.next_step < stop:
                trainer.log(trainer.step(trainer.next_batch()[0]))
            trainer.position = trainer.loader.state_dict()
            trainer.save()
            trainer.loader.close()
            trainer.record.close()

    pp2: dict[str, Any] = {"vision": {"pp": 2}}
    run("whole", pp2, "fp8")
    for name, after in (("same", pp2), ("elsewhere", {})):
        run(name, pp2, "fp8", stop=2)
        run(name, after, "fp8", resume=True)
    run("from bf16", pp2, "bf16", stop=2)
    run("from bf16", pp2, "fp8", resume=True)
    return said


def test_a_resumed_run_continues_bit_for_bit_with_its_scales(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=2, samples_per_shard=16, image_size=40, seed=0)
    # Scales and histories of 8 linears in the first stage, of 4 in the second, whose last layer is bf16; 4 of text.
    line = "FP8 scales and histories begin anew: the checkpoint lacks {} of them"
    assert run_ranks(continued, 2, str(tmp_path)) == [[line.format(24)], [line.format(16)]]
    losses = {name: [row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "same", "elsewhere")}
    assert losses["same"] == losses["whole"]
    assert losses["elsewhere"] == losses["whole"]
