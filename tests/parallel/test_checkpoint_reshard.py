"""A checkpoint of any grids is read exactly by any others, and continues on its own to the last bit."""

from functools import cache
from math import lcm
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megaeva.checkpoint import store, torch_dist
from megaeva.checkpoint.store import CheckpointStore
from megaeva.checkpoint.weights import load_weights
from megaeva.config.schema import AxesSection
from megaeva.errors import CheckpointError, UserError
from megaeva.optim.build import build_optimizer
from megaeva.optim.tower_optimizer import STATE_KEYS, main_state
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.wrap import count_parameters
from tests.helpers.saving import save_now
from tests.helpers.spawn import run_ranks
from tests.helpers.toy_towers import (
    Axes,
    build_towers,
    compute_gradients,
    grid_of,
    make_config,
    whole_tensors,
    whole_weights,
)

from megatron.core import dist_checkpointing  # isort: skip

NUM_LAYERS = 5
TP2, PP2, VPP2 = AxesSection(tp=2), AxesSection(pp=2), AxesSection(pp=2, vpp=2, layers_per_stage=(1, 2, 1, 1))
# {ranks: {name: towers' grids}}
TOPOLOGIES: dict[int, dict[str, Axes]] = {
    1: {"one": {}},
    2: {
        "vision tp2, text tp1": {"vision": TP2},
        "pp2": {"vision": PP2},
        "pp2 vpp2, text tp2": {"vision": VPP2, "text": TP2},
    },
    4: {
        "tp2 pp2, text tp2": {"vision": AxesSection(tp=2, pp=2), "text": TP2},
        "vision tp2, text tp4": {"vision": TP2, "text": AxesSection(tp=4)},
    },
}
# Whoever reads a checkpoint on other grids does so with the other kind of optimizer.
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16 sharded": {"name": "lamb", "precision": "bf16", "distributed_optimizer": True},
    "fp32 plain": {"name": "adamw", "precision": "fp32", "distributed_optimizer": False},
}


class Run:
    """Toy towers on some grids and their optimizer."""

    def __init__(self, runtime: Runtime, axes: Axes, seed: int = 0, **optim: Any) -> None:
        self.cfg = make_config(num_layers=NUM_LAYERS, clip_grad_norm=2.0, **optim)
        self.towers = build_towers(runtime, self.cfg, axes, seed=seed)
        self.optimizer, self.rate = build_optimizer(self.towers, self.cfg)
        self.data_grid = grid_of(AxesSection(tp=lcm(*(a.tp * a.pp for a in axes.values()))), runtime)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.rate.set(step)
            compute_gradients(self.towers, step)
            self.optimizer.step()

    def save(self, folder: Path, step: int) -> Path:
        return save_now(
            CheckpointStore(folder, 2),
            step,
            self.towers,
            self.optimizer,
            config=self.cfg,
            loader_state={"block": self.data_grid.dp_rank},
            extra={"blocks": self.data_grid.dp_size},
            data_grid=self.data_grid,
        )

    def load(self, path: Path) -> None:
        state = CheckpointStore(path.parents[1], 2).load(path, self.towers, self.optimizer, config=self.cfg)
        assert state.step == self.optimizer.num_steps == 2
        assert state.loader_states == [{"block": block} for block in range(state.extra["blocks"])]

    def whole(self) -> dict[str, Tensor]:
        """Weights, main weights and moments, put together without the code that saves them."""
        whole = {f"weight {name}": tensor for name, tensor in whole_weights(self.towers).items()}
        for tower in self.towers:
            optimizer = self.optimizer.optimizers[tower.name]
            for key in STATE_KEYS:
                tensors = {}
                for name, parameter in tower.module.named_parameters():
                    if tower.sharded_optimizer:
                        tensors[name] = torch.zeros(parameter.shape)
                        if parameter in optimizer.model_param_group_index_map:
                            here = optimizer._get_model_param_range_map(parameter)["param"]
                            own = main_state(optimizer, parameter)[key]
                            tensors[name].view(-1)[here.start : here.end] = own.detach()
                        dist.all_reduce(tensors[name], group=tower.grid.groups.dp)
                    else:
                        tensors[name] = main_state(optimizer, parameter)[key]
                whole |= {f"{key} {name}": t for name, t in whole_tensors(tower, tensors).items()}
        return whole


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert got.keys() == expected.keys(), (what, got.keys() ^ expected.keys())
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), f"{what}: {name} is not equal bit for bit"


def save_and_resume(runtime: Runtime, axes: Axes, folder: Path, **optim: Any) -> None:
    """Saves at step 2, beside a file of the whole tensors, and continues from there as if it had never stopped."""
    run = Run(runtime, axes, **optim)
    run.train(0, 2)
    at_save = run.whole()
    path = run.save(folder, 2)
    if runtime.is_main:
        torch.save(at_save, folder / "whole.pt")
    run.train(2, 4)
    resumed = Run(runtime, axes, seed=1, **optim)
    resumed.load(path)
    assert_equal(resumed.whole(), at_save, f"{folder.name}, resumed")
    resumed.train(2, 4)
    assert_equal(resumed.whole(), run.whole(), f"{folder.name}, continued")


@cache
def whole_tensors_of(folder: Path) -> dict[str, Tensor]:
    """What was saved there, read once by each process."""
    whole: dict[str, Tensor] = torch.load(folder / "whole.pt")
    return whole


def load_from_others(runtime: Runtime, axes: Axes, folder: Path, **optim: Any) -> None:
    """Reads a checkpoint of other grids with the other kind of optimizer, and its weights alone."""
    expected = whole_tensors_of(folder)
    other_kind = optim | {"distributed_optimizer": not optim["distributed_optimizer"]}
    run = Run(runtime, axes, seed=2, **other_kind)
    run.load(folder / "checkpoints" / "step_00000002")
    assert_equal(run.whole(), expected, f"{folder.name} on {axes}")
    for tower, count in count_parameters(run.towers).items():
        whole = [t for name, t in expected.items() if name.startswith(f"weight {'' if tower == 'total' else tower}")]
        assert count == sum(tensor.numel() for tensor in whole), tower
    fresh = build_towers(runtime, run.cfg, axes, seed=3)
    report = load_weights(folder, {tower.name: (tower.module, tower.grid) for tower in fresh})
    weights = {name: tensor for name, tensor in expected.items() if name.startswith("weight ")}
    assert_equal({f"weight {n}": t for n, t in whole_weights(fresh).items()}, weights, folder.name)
    # Every rank reports the whole towers, not its stage.
    assert [f"weight {key}" for key in report.loaded] == sorted(weights)
    assert report.fresh == report.unused == ()


def read_by_others(folder: Path) -> None:
    """torch's and mcore's own readers find the whole tensors in what several ranks wrote in boxes."""
    path = folder / "checkpoints" / "step_00000002"
    expected = {}
    for name, tensor in whole_tensors_of(folder).items():
        kind, key = name.split(" ")
        expected[key if kind == "weight" else f"optimizer.state.{kind}.{key}"] = tensor
    by_torch = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    dcp.load(by_torch, checkpoint_id=path)
    assert_equal(by_torch, expected, f"{folder.name} by torch")
    assert_equal(dist_checkpointing.load_plain_tensors(str(path)), expected, f"{folder.name} by mcore")


def save_and_load(runtime: Runtime, folder: Path, saving: dict[str, Axes], loading: dict[str, Axes]) -> None:
    """Saves on each of `saving`; then each of `loading` reads every checkpoint that there is of other grids."""
    for variant, optim in VARIANTS.items():
        for name, axes in saving.items():
            save_and_resume(runtime, axes, folder / variant / name, **optim)
        dist.barrier()
        for name, axes in loading.items():
            for other in sorted((folder / variant).iterdir()):
                if other.name != name:
                    load_from_others(runtime, axes, other, **optim)
                if not saving:
                    read_by_others(other)


def fail_on_one_rank(runtime: Runtime, folder: Path) -> list[str]:
    """A disk that is full for one rank only: what every rank is told, and that a later save works."""
    run = Run(runtime, {})
    good = run.save(folder, 1)
    texts = []

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    last = runtime.world_size - 1
    for owner, name, rank in (
        (store.layout, "clean", 0),
        (torch_dist.FileWriter, "write", last),
        (torch_dist.FileWriter, "close", last),
        (store, "write_index", 0),
    ):
        original = getattr(owner, name)
        if runtime.rank == rank:
            setattr(owner, name, full)
        try:
            run.save(folder, 2)
        except CheckpointError as error:
            texts.append(str(error))
        setattr(owner, name, original)
        torch.distributed.barrier()  # rank 0 removes the half-written folder before it raises
        assert [path.name for path in good.parent.iterdir()] == [good.name]
        torch.distributed.barrier()
    run.save(folder, 3)
    return texts


def load_damaged(runtime: Runtime, folder: Path) -> list[str]:
    """Messages of this rank for a byte flipped in the last rank's file, a file too short, and one too few."""
    run = Run(runtime, {"vision": TP2})
    path = run.save(folder, 2)
    file = path / f"__{runtime.world_size - 1}_0.distcp"
    content = file.read_bytes()
    texts = []
    for damaged in (content[:70] + bytes([content[70] ^ 1]) + content[71:], content[:-1], None):
        dist.barrier()
        if runtime.is_main:
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
        dist.barrier()
        for read in (
            lambda: run.load(path),
            lambda: load_weights(folder, {tower.name: (tower.module, tower.grid) for tower in run.towers}),
        ):
            try:
                read()
            except UserError as error:
                texts.append(str(error))
    return texts


def count_collectives(runtime: Runtime, folder: Path) -> int:
    """How often a save of towers in shards calls on other ranks."""
    run = Run(runtime, {"vision": TP2}, name="lamb", precision="bf16", distributed_optimizer=True)
    run.train(0, 1)
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    names = [n for n in dir(dist) if n.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "send", "recv"))]
    for name in ["barrier", *names]:
        if callable(getattr(dist, name)):
            setattr(dist, name, counted(getattr(dist, name)))
    run.save(folder, 1)
    return calls


def load_what_does_not_fit(runtime: Runtime, folder: Path) -> list[str]:
    """Messages of this rank for a model with a layer more than the checkpoint, and for one with a layer less."""
    run = Run(runtime, {"vision": PP2})
    run.save(folder, 1)
    texts = []
    for num_layers in (NUM_LAYERS + 1, NUM_LAYERS - 1):
        vision = build_towers(runtime, make_config(num_layers=num_layers), {"vision": PP2}, seed=1)[0]
        before = whole_weights([vision])
        try:
            load_weights(folder, {"vision": (vision.module, vision.grid)})
        except CheckpointError as error:
            texts.append(str(error))
        assert_equal(whole_weights([vision]), before, "refused")
        # A skipped layer stays as it was, on whichever stage it is.
        report = load_weights(folder, {"vision": (vision.module, vision.grid)}, skip=("vision.blocks.layers.[45]",))
        assert len(report.fresh) == (8 if num_layers > NUM_LAYERS else 0)
    return texts


def meet_faults(runtime: Runtime, folder: Path) -> dict[str, Any]:
    return {
        "does not fit": load_what_does_not_fit(runtime, folder / "fit"),
        "cannot save": fail_on_one_rank(runtime, folder / "save"),
        "damaged": load_damaged(runtime, folder / "damage"),
        "calls": count_collectives(runtime, folder / "count"),
    }


def test_resume_and_reshard(tmp_path: Path) -> None:
    # Each reads what is there by then, and one process everything in the end.
    for ranks, topologies in TOPOLOGIES.items():
        run_ranks(save_and_load, ranks, tmp_path, topologies, topologies, timeout=240)
    run_ranks(save_and_load, 1, tmp_path, {}, TOPOLOGIES[1], timeout=240)
    assert len(list(tmp_path.glob("*/*/whole.pt"))) == 12


def test_faults_of_one_rank_are_errors_of_all(tmp_path: Path) -> None:
    for faults in run_ranks(meet_faults, 2, tmp_path):
        check_faults(faults)


def check_faults(found: dict[str, Any]) -> None:
    """The same of every rank, apart from which says "rank 1" of the other and how much space it saw."""
    more, fewer = found["does not fit"]
    assert "4 tensors differ" in more and "vision.blocks.layers.5.mlp.linear_fc1.weight: not in the checkpoint" in more
    assert "4 tensors differ" in fewer and "vision.blocks.layers.4.mlp.linear_fc2.bias: not in the model" in fewer
    assert len(found["cannot save"]) == 4
    for text in found["cannot save"]:
        assert "No space left on device" in text
        assert "step_00000001" in text
        assert "step_00000002" in text
    flipped, short, missing = found["damaged"][:2], found["damaged"][2:4], found["damaged"][4:]
    assert len(missing) == 2
    assert all("__1_0.distcp" in text and "tensor " in text for text in found["damaged"])
    assert all("CRC-32 is" in text for text in flipped)
    assert all("the file must be whole" in text for text in short)
    assert all("cannot be opened: No such file" in text for text in missing)
    # What each rank notes at the beginning, the index, and whether it was written.
    assert found["calls"] == 3
