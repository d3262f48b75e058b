"""Checkpoints of a run: saved whole or not at all, continued bit for bit, readable on another topology."""

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megaeva import __version__
from megaeva.checkpoint import layout, torch_dist
from megaeva.checkpoint.sharded import sharded_tensors
from megaeva.checkpoint.weights import assign, open_checkpoint, reading
from megaeva.config.schema import Config
from megaeva.errors import CheckpointError, is_lost_peer
from megaeva.parallel.collectives import gather_objects, together
from megaeva.parallel.grid import Grid
from megaeva.parallel.wrap import Tower


class Optimizer(Protocol):
    """What a checkpoint needs of `megaeva.optim`."""

    num_steps: int

    def sharded_state_dict(self, model_state: Any, is_loading: bool = False) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any, num_steps: int) -> None: ...


@dataclass(frozen=True)
class LoadedState:
    """What a resumed run continues from.

    Attributes:
        step: finished optimizer steps; the next one has this number.
        loader_states: what every data block passed to `save`, in their order; there may be another number now.
        extra: what was passed to `save`.
    """

    step: int
    loader_states: list[dict[str, Any]]
    extra: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run folder. Every rank has one; `save` and `load` are called by all ranks together.

    A save is written to a hidden folder, forced to the disk and renamed, so a folder called step_* is always whole.
    Tensors are stored whole by name, so that any grids of the towers and either kind of optimizer read them.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        """Args:
        keep: newest checkpoints that survive a save.
        """
        self.folder = Path(run_dir) / layout.FOLDER_NAME
        self.keep = keep

    def newest(self) -> Path | None:
        """The newest finished checkpoint. Any rank may call it alone; it only looks."""
        found = layout.complete_checkpoints(self.folder)
        return found[-1] if found else None

    def save(
        self,
        step: int,
        towers: Sequence[Tower],
        optimizer: Optimizer,
        *,
        config: Config,
        loader_state: dict[str, Any],
        extra: dict[str, Any],
        data_grid: Grid,
    ) -> Path:
        """Write a checkpoint, then delete those beyond `keep`; returns its folder. All ranks call it.

        A checkpoint of the same step is replaced. Cost: the state gathered over data-parallel ranks once, and as many
        bytes of disk as weights plus 12 a parameter, beside what is kept.

        Args:
            step: finished optimizer steps.
            loader_state: JSON-able, alike on the ranks that read the same samples; one entry for each data block.
            extra: JSON-able, rank 0's is stored.
            data_grid: its dp axis numbers the data blocks, its tp axis the ranks of one.

        Raises:
            CheckpointError: on every rank, when one cannot write (a full disk). The half-written folder is removed,
                older checkpoints are untouched.
        """
        final = self.folder / layout.step_name(step)
        writing = self.folder / (layout.WRITING + final.name)
        error: Exception | CheckpointException | None = None
        size = 0
        try:
            # Each part ends with every rank knowing whether all got through it, before a collective of the next part.
            with _agreed():
                if _is_main():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    layout.clean(self.folder)
                    writing.mkdir()
            loader_states = gather_objects((data_grid.dp_rank, loader_state) if data_grid.tp_rank == 0 else None)
            state = _model_state(towers)
            state["optimizer"] = optimizer.sharded_state_dict({t.name: state[t.name] for t in towers})
            size = torch_dist.num_bytes(state)
            with _agreed():
                plan = torch_dist.plan_write(state)
            torch_dist.write(plan, writing)
            with _agreed():
                if _is_main():
                    info = _info(step, towers, optimizer, config, loader_states, extra)
                    torch_dist.write_mcore_files(writing)
                    layout.write_durably(writing / layout.INFO_NAME, json.dumps(info, indent=1))
                    layout.sync_folder(writing)
                    layout.publish(writing, final)
        except (Exception, CheckpointException) as caught:  # torch's is a BaseException
            error = caught
        if error is not None:
            if _is_main():
                shutil.rmtree(writing, ignore_errors=True)
            if is_lost_peer(error):
                raise error
            raise self._save_error(writing, error, size) from error
        if _is_main():
            self._drop_old()
        return final

    def load(
        self,
        path: Path,
        towers: Sequence[Tower],
        optimizer: Optimizer,
        *,
        config: Config,
    ) -> LoadedState:
        """Read a checkpoint of this model into towers and optimizer, exactly. All ranks call it.

        Args:
            path: from `newest()`.
            config: its task and model must be the checkpoint's.

        Raises:
            CheckpointError: another task or model (before any tensor is read), or a damaged checkpoint.
        """
        with together("opening a checkpoint"):
            info = layout.read_info(path)
            _check_same_run(path, info, config)
            metadata = open_checkpoint(path)
        state = _model_state(towers)
        model_keys = {tower.name: dict(state[tower.name]) for tower in towers}
        state["optimizer"] = optimizer.sharded_state_dict(model_keys, is_loading=True)
        with reading(path):
            loaded = torch_dist.read(state, path, metadata)
        for tower in towers:
            assign(model_keys[tower.name], loaded[tower.name])
        optimizer.load_state_dict(loaded.get("optimizer", {}), info["optimizer_steps"])
        return LoadedState(info["step"], info["loader"], info["extra"])

    def _drop_old(self) -> None:
        for path in layout.complete_checkpoints(self.folder)[: -self.keep]:
            # A checkpoint that cannot be deleted is no reason to stop the run.
            try:
                layout.remove(path)
            except OSError as error:
                print(f"warning: cannot delete the old checkpoint {path}: {error}", flush=True)

    def _save_error(self, writing: Path, error: BaseException, size: int) -> CheckpointError:
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free
        newest = self.newest()
        return CheckpointError(
            f"cannot write checkpoint {writing}: {_first_cause(error)} ({_mib(free)} free, about {_mib(size)} needed "
            f"by each rank) and must fit beside {self.keep} others; free space, lower save.keep or move run_dir. "
            + (f"The last good checkpoint is untouched: {newest}" if newest else "There is no earlier checkpoint.")
        )


def tower_prefix(name: str) -> str:
    """The prefix of a tower's checkpoint keys; a student's module already names its tower."""
    return "" if name == "student" else name + "."


def _model_state(towers: Sequence[Tower]) -> dict[str, Any]:
    return {t.name: sharded_tensors(t.module, tower_prefix(t.name), t.grid) for t in towers}


def _info(
    step: int,
    towers: Sequence[Tower],
    optimizer: Optimizer,
    config: Config,
    loader_states: list[tuple[int, dict[str, Any]] | None],
    extra: dict[str, Any],
) -> dict[str, Any]:
    by_rank = dict(entry for entry in loader_states if entry is not None)
    grids = {
        t.name: {"tp": t.grid.tp_size, "pp": t.grid.pp_size, "vpp": t.grid.axes.vpp, "dp": t.grid.dp_size}
        for t in towers
    }
    return {
        "format": layout.FORMAT,
        "step": step,
        "samples": step * config.train.global_batch_size,
        "task": config.task,
        "model": config.model.model_dump(mode="json"),
        "optimizer": config.optim.name,
        "optimizer_steps": optimizer.num_steps,
        "versions": {
            "megaeva": __version__,
            "megatron-core": version("megatron-core"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "grids": grids,
        "loader": [by_rank[rank] for rank in sorted(by_rank)],
        "extra": extra,
    }


def _check_same_run(path: Path, info: dict[str, Any], config: Config) -> None:
    different = [] if info["task"] == config.task else [f"task: checkpoint {info['task']!r}, recipe {config.task!r}"]
    different += layout.differing_keys(info["model"], config.model.model_dump(mode="json"), "model")
    batch = config.train.global_batch_size
    if info["samples"] != info["step"] * batch:
        # Steps are the run's clock: with another batch they would mean other samples and another learning rate.
        before = info["samples"] // max(1, info["step"])
        different.append(f"train.global_batch_size: checkpoint {before}, recipe {batch}")
    if info["optimizer"] != config.optim.name:
        # AdamW and LAMB keep moments of the same names that mean different things.
        different.append(f"optim.name: checkpoint {info['optimizer']}, recipe {config.optim.name}")
    if different:
        raise CheckpointError(
            f"{path} belongs to another run:\n  " + "\n  ".join(different) + "\nA resumed run must have the same task, "
            "model, batch and optimizer; set these keys back, or start a new run_dir with init.clip, init.vision or "
            "init.text."
        )


# ------------------------------------------------------------------------------------------------------ between ranks


def _is_main() -> bool:
    return dist.get_rank() == 0


class _agreed:
    """A block that, if it raises on one rank, raises on all; for blocks that raise after their collectives."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        texts = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is None and any(texts):
            rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
            raise RuntimeError(f"rank {rank}: {text}")


def _first_cause(error: BaseException) -> str:
    """The line that says what went wrong: torch wraps the failures of all ranks in one exception."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {_first_cause(cause)}"
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    line = torch_dist.first_line(error)
    # torch's zip writer only notices that fewer bytes arrived than it gave.
    return "a file was cut short, as on a full disk" if "inline_container" in line else line


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
