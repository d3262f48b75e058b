"""Communication that overlaps with computation changes no bit: losses, weights, moments and checkpoints."""

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaeva.checkpoint.store import CheckpointStore
from megaeva.config.schema import AxesSection, Config
from megaeva.model.clip_model import build_clip
from megaeva.model.mim_student import MIMStudent
from megaeva.optim.build import build_optimizer
from megaeva.parallel import wrap
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.wrap import Tower, finish_parameter_gather, reduce_gradients, zero_gradients
from tests.helpers.saving import save_now
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import example_images, example_tokens, tiny
from tests.helpers.toy_towers import Axes, build_towers, compute_gradients, grid_of, make_config, whole_weights

STEPS = 4
SWITCHES = ("overlap_grad_reduce", "overlap_param_gather")
OVERLAPS = {
    "none": {},
    "gradients": {"overlap_grad_reduce": True},
    "parameters": {"overlap_param_gather": True},
    "both": dict.fromkeys(SWITCHES, True),
}
TP2, SP2 = AxesSection(tp=2), AxesSection(tp=2, sequence_parallel=True)
# Vision and text sum over two data ranks, so that it does not show in which order.
TOPOLOGIES: dict[int, dict[str, Axes]] = {
    2: {"dp2": {}, "pp2": {"vision": AxesSection(pp=2)}},
    4: {
        "tp2 dp2": {"vision": TP2, "text": TP2},
        "pp2 vpp2 dp2, text sp2": {"vision": AxesSection(pp=2, vpp=2, layers_per_stage=(1, 1, 2, 1)), "text": SP2},
    },
}
Config_ = wrap.DistributedDataParallelConfig


@pytest.fixture(params=[2, 4])
def num_ranks(request: pytest.FixtureRequest) -> int:
    return request.param


def make_buckets_small() -> None:
    """A bucket for each parameter, where mcore's 40 million would put all into one."""
    wrap.DistributedDataParallelConfig = functools.partial(Config_, bucket_size=1)  # type: ignore[misc, assignment]


def values(tower: Tower) -> Tensor:
    """All parameters as this rank has them, in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in tower.module.parameters()])


def train(runtime: Runtime, axes: Axes, folder: Path | None, **switches: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and whole weights and moments after STEPS steps; moments as a plain optimizer reads them from a save."""
    # Unclipped AdamW: norms over shards, as clipping and LAMB take them, depend on where the shards are cut.
    cfg = make_config(num_layers=5, clip_grad_norm=None, **switches)
    towers = build_towers(runtime, cfg, axes)
    optimizer, rate = build_optimizer(towers, cfg)
    losses = []
    late = 0
    for step in range(STEPS):
        rate.set(step)
        losses.append(compute_gradients(towers, step, micro_batches=2, two_passes=step != 1))
        before = values(towers[0])
        assert optimizer.step()[0]
        if step == 2:
            continue  # the next forward pass gathers
        stale = values(towers[0])
        if step == 0:
            finish_parameter_gather(towers)
        elif towers[0].grid.pp_size == 1:
            # The bare module gathers as well, here as in an evaluation.
            towers[0].module(torch.ones(2, towers[0].module.width))
            finish_parameter_gather(towers[1:])
        else:
            finish_parameter_gather(towers)
        assert not torch.equal(before, values(towers[0]))
        late += not torch.equal(stale, values(towers[0]))
    # Or this tests nothing.
    assert late == (STEPS - 1 if "overlap_param_gather" in switches and towers[0].grid.dp_size > 1 else 0)
    finish_parameter_gather(towers)
    whole = whole_weights(towers)
    if folder is not None:
        saved = {"config": cfg, "data_grid": towers[2].grid}
        save_now(CheckpointStore(folder, 1), STEPS, towers, optimizer, loader_state={}, extra={}, **saved)
        plain_cfg = make_config(num_layers=5, clip_grad_norm=None, distributed_optimizer=False)
        plain = build_towers(runtime, plain_cfg, axes, seed=1)
        plain_optimizer, _ = build_optimizer(plain, plain_cfg)
        store = CheckpointStore(folder, 1)
        newest = store.newest()
        assert newest is not None
        store.load(newest, plain, plain_optimizer, config=plain_cfg)
        assert all(torch.equal(t, whole[n]) for n, t in whole_weights(plain).items())
        for tower in plain:
            state = plain_optimizer.optimizers[tower.name].optimizer.state
            for name, parameter in tower.module.named_parameters():
                for key in ("exp_avg", "exp_avg_sq"):
                    whole[f"{runtime.rank} {key} {tower.name}.{name}"] = state[parameter][key]
    return losses, whole


def train_on_all(runtime: Runtime, topologies: dict[str, Axes], folder: Path) -> list[str]:
    """What differs between the overlaps and none."""
    make_buckets_small()
    # mcore's way to say that a gather was not dispatched by the one before it.
    warnings.filterwarnings("error", message="The next bucket's parameter all-gather operation")
    differences = []
    for topology, axes in topologies.items():
        expected_losses, expected = train(runtime, axes, folder / topology / "none")
        for overlap, switches in OVERLAPS.items():
            losses, whole = train(runtime, axes, folder / topology / overlap, **switches)
            if losses != expected_losses:
                differences.append(f"{topology}, {overlap}: losses {losses}, not {expected_losses}")
            assert whole.keys() == expected.keys()
            differences += [f"{topology}, {overlap}: {n}" for n in whole if not torch.equal(whole[n], expected[n])]
    return differences


def test_overlaps_change_no_bit(num_ranks: int, tmp_path: Path) -> None:
    for differences in run_ranks(train_on_all, num_ranks, TOPOLOGIES[num_ranks], tmp_path):
        assert differences == []


def real_towers(runtime: Runtime, cfg: Config, section: Any) -> dict[str, tuple[Tower, tuple[Any, ...]]]:
    """Towers of megaeva.model and arguments of their forward."""
    grid = grid_of(AxesSection(), runtime)
    torch.manual_seed(0)
    clip = build_clip(section, vision_grid=grid, text_grid=grid)
    student = MIMStudent(section.vision, 12, grid=grid, stop_grad_patch_embed=0.1)
    modules: dict[str, nn.Module] = {"vision": clip.vision, "text": clip.text, "student": student}
    for parameter in (p for module in modules.values() for p in module.parameters()):
        nn.init.normal_(parameter, std=0.1)
    images, tokens = example_images(section, 4), example_tokens(section, 4)
    mask_BN = torch.zeros(4, section.vision.num_patches, dtype=torch.bool)
    mask_BN[:, ::2] = True
    arguments = {"vision": (images,), "text": (tokens,), "student": (images, mask_BN)}
    return {name: (wrap.wrap(name, module, grid, cfg.parallel), arguments[name]) for name, module in modules.items()}


def train_real(runtime: Runtime, variants: list[str]) -> list[str]:
    """Weights that differ; a parameter that is read outside its module's forward would be read before it arrived."""
    make_buckets_small()
    differences = []
    for variant in variants:
        results = []
        for switches in (OVERLAPS["none"], OVERLAPS["both"]):
            section = tiny(variant)
            cfg = make_config(clip_grad_norm=None, **switches).model_copy(update={"model": section})
            parts = real_towers(runtime, cfg, section)
            towers = [tower for tower, _ in parts.values()]
            optimizer, rate = build_optimizer(towers, cfg)
            for step in range(3):
                rate.set(step + 1)
                zero_gradients(towers)
                for tower, arguments in parts.values():
                    own = slice(runtime.rank, None, runtime.world_size)
                    tower.ddp(*(argument[own] for argument in arguments)).square().sum().backward()
                reduce_gradients(towers)
                assert optimizer.step()[0]
            finish_parameter_gather(towers)
            results.append(whole_weights(towers))
        differences += [f"{variant}: {n}" for n, t in results[0].items() if not torch.equal(t, results[1][n])]
    return differences


def test_real_towers_read_no_parameter_before_it_arrived() -> None:
    for differences in run_ranks(train_real, 2, ["EVA02-CLIP-B-16", "EVA-CLIP-18B"]):
        assert differences == []
