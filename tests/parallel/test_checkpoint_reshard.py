"""A checkpoint of any topology continues on any other, and on its own to the last bit."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaeva.checkpoint import torch_dist
from megaeva.checkpoint.store import CheckpointStore
from megaeva.checkpoint.weights import load_weights
from megaeva.errors import CheckpointError
from megaeva.optim.build import build_optimizer
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.shards import gather_full
from tests.helpers.spawn import run_ranks
from tests.helpers.toy_towers import build_towers, compute_gradients, make_config

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 2)]


class Run:
    """Toy towers on one topology and their optimizer."""

    def __init__(self, runtime: Runtime, tp: int, seed: int = 0) -> None:
        self.cfg = make_config(name="lamb", clip_grad_norm=2.0)
        self.towers = build_towers(runtime, self.cfg, tp, seed=seed)
        self.optimizer, self.rate = build_optimizer(self.towers, self.cfg)
        self.data_rank = self.towers[0].grid.dp_rank

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.rate.set(step)
            compute_gradients(self.towers, step)
            self.optimizer.step()

    def save(self, folder: Path, step: int) -> Path:
        return CheckpointStore(folder, 2).save(
            step, self.towers, self.optimizer, config=self.cfg, loader_state={"rank": self.data_rank}, extra={}
        )

    def load(self, path: Path) -> Any:
        store = CheckpointStore(path.parents[1], 2)
        return store.load(path, self.towers, self.optimizer, config=self.cfg, data_rank=self.data_rank)

    def whole(self) -> dict[str, Tensor]:
        return {
            f"{tower.name}.{name}": gather_full(parameter, parameter, tower.grid).clone()
            for tower in self.towers
            for name, parameter in tower.module.named_parameters()
        }


def save_and_continue(runtime: Runtime, tp: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Weights at step 2, where it saves, and at step 4; and at step 4 of a run resumed from the save."""
    run = Run(runtime, tp)
    run.train(0, 2)
    at_save = run.whole()
    path = run.save(folder, 2)
    run.train(2, 4)
    resumed = Run(runtime, tp, seed=1)
    state = resumed.load(path)
    assert (state.step, state.loader_state) == (2, {"rank": run.data_rank})
    resumed.train(2, 4)
    return {"at save": at_save, "end": run.whole(), "resumed": resumed.whole()}


def load_others(runtime: Runtime, tp: int, folders: list[Path]) -> list[dict[str, dict[str, Tensor]]]:
    """For each checkpoint: weights as loaded, as loaded by `load_weights`, and after two steps more."""
    results = []
    for folder in folders:
        run = Run(runtime, tp, seed=2)
        loaded = run.load(folder / "checkpoints" / "step_00000002")
        as_loaded = run.whole()
        same_split = folder.name.endswith(f"dp{run.towers[0].grid.dp_size}")
        assert loaded.loader_state == ({"rank": run.data_rank} if same_split else None)
        run.train(2, 4)
        end = run.whole()
        fresh = Run(runtime, tp, seed=3)
        load_weights(folder, {tower.name: tower.module for tower in fresh.towers}, fresh.towers[0].grid)
        results.append({"as loaded": as_loaded, "weights": fresh.whole(), "end": end})
    return results


def save_and_load_others(
    runtime: Runtime, tp: int, folder: Path, others: list[Path]
) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, dict[str, Tensor]]]]:
    return save_and_continue(runtime, tp, folder), load_others(runtime, tp, others)


def fail_on_one_rank(runtime: Runtime, folder: Path) -> list[str]:
    """A disk that is full for the last rank only: what every rank is told, and that a later save works."""
    run = Run(runtime, 1)
    good = run.save(folder, 1)
    texts = []
    original = torch_dist.plan_write, torch_dist.dcp.FileSystemWriter.write_data
    for place in ("plan_write", "write_data"):

        def full(*args: Any, **kwargs: Any) -> Any:
            if args[0:1] and isinstance(args[0], dict):
                original[0](*args)  # its collective is behind it
            raise OSError(28, "No space left on device")

        if runtime.rank == runtime.world_size - 1:
            owner = torch_dist if place == "plan_write" else torch_dist.dcp.FileSystemWriter
            setattr(owner, place, full)
        try:
            run.save(folder, 2)
        except CheckpointError as error:
            texts.append(str(error))
        torch_dist.plan_write, torch_dist.dcp.FileSystemWriter.write_data = original  # type: ignore[method-assign]
        torch.distributed.barrier()  # rank 0 removes the half-written folder before it raises
        assert [path.name for path in good.parent.iterdir()] == [good.name]
        torch.distributed.barrier()
    run.save(folder, 3)
    return texts


def test_resume_and_reshard(tmp_path: Path) -> None:
    folders = [tmp_path / f"tp{tp}_dp{ranks // tp}" for ranks, tp in TOPOLOGIES]
    saved: list[dict[str, dict[str, Tensor]]] = []
    # Each topology reads those before it; one process reads all in the end.
    for (ranks, tp), folder in zip([*TOPOLOGIES, (1, 1)], [*folders, tmp_path / "last_dp1"], strict=True):
        own, others = run_ranks(save_and_load_others, ranks, tp, folder, folders[: len(saved)])[0]
        for name, tensor in own["end"].items():
            assert torch.equal(own["resumed"][name], tensor), f"{name}: not bit for bit"
        for origin, source, result in zip(folders, saved, others, strict=False):
            for name, tensor in source["at save"].items():
                assert torch.equal(result["as loaded"][name], tensor), (origin.name, ranks, tp, name)
                assert torch.equal(result["weights"][name], tensor), (origin.name, ranks, tp, name)
                error = (result["end"][name] - source["end"][name]).norm() / source["end"][name].norm()
                assert error < 1e-5, (origin.name, ranks, tp, name, error.item())
        assert len(others) == len(saved)
        saved.append(own)


def test_a_failure_of_one_rank_is_told_to_all(tmp_path: Path) -> None:
    for texts in run_ranks(fail_on_one_rank, 2, tmp_path):
        assert len(texts) == 2
        for text in texts:
            assert "rank 1" in text or "No space" in text
            assert "No space left on device" in text
            assert "step_00000001" in text
