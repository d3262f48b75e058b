"""Checkpoints of a run: saved whole or not at all, continued bit for bit, readable on another topology."""

import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megaeva import __version__
from megaeva.checkpoint import layout
from megaeva.checkpoint.convert.contents import Contents, Preprocess
from megaeva.checkpoint.convert.sidecar import contents_info
from megaeva.checkpoint.pieces import AVERAGE, MAIN, RUN_STATE, Piece, module_pieces, run_state_pieces, state_pieces
from megaeva.checkpoint.torch_dist import FileIndex, FileWriter, Reader, first_line, write_index
from megaeva.config.schema import Config
from megaeva.data.tokenizer import read_subset
from megaeva.errors import CheckpointError, UserError, is_lost_peer, listed
from megaeva.parallel.collectives import RemoteError, gather_or_raise, raise_together, together
from megaeva.parallel.grid import Grid
from megaeva.parallel.wrap import Tower


class Optimizer(Protocol):
    """What a checkpoint needs of `megaeva.optim`; see TowerOptimizers."""

    num_steps: int

    def held_state(self, tower: str) -> Iterable[tuple[torch.Tensor, int, Mapping[str, torch.Tensor], bool]]: ...

    def set_num_steps(self, num_steps: int) -> None: ...


@dataclass(frozen=True)
class LoadedState:
    """What a resumed run continues from.

    Attributes:
        step: finished optimizer steps; the next one has this number.
        loader_states: what each data block passed to `begin`, in their order; the number of blocks is the saving run's.
        extra: what was passed to `begin`.
        begun_anew: how many tensors of `pieces.run_state_pieces` the checkpoint does not have, or has in another shape.
        average_begins: the run keeps an average of the weights and the checkpoint has none; it is now a copy of them.
        average_ends: the checkpoint has one and the run keeps none.
        changed: a line for each key of the recipe that the run which saved had otherwise.
    """

    step: int
    loader_states: list[dict[str, Any]]
    extra: dict[str, Any]
    begun_anew: int = 0
    average_begins: bool = False
    average_ends: bool = False
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Save:
    """A save that has begun: a hidden folder that every rank writes its file into.

    Attributes:
        pieces: what this rank writes: views of the live tensors.
        info: the text of megaeva.json, as of the beginning.
        num_bytes: of all ranks' pieces.
    """

    step: int
    folder: Path
    pieces: list[Piece]
    info: str
    num_bytes: int


class CheckpointStore:
    """The checkpoints of one run folder. Every rank has one; what any may call alone says so.

    A save is written to a hidden folder, forced to the disk and renamed, so a folder called step_* is always whole.
    Tensors are stored by their whole names and shapes, so that any grids of the towers and either kind of optimizer
    read them.
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

    def begin(
        self,
        step: int,
        towers: Sequence[Tower],
        optimizer: Optimizer,
        *,
        config: Config,
        loader_state: dict[str, Any],
        extra: dict[str, Any],
        data_grid: Grid,
    ) -> Save:
        """Make the hidden folder, and note everything but the tensors as it is now. All ranks call it.

        Cost: no tensor is touched; one exchange of a few kilobytes between ranks. No other save may be in progress.

        Args:
            step: finished optimizer steps.
            loader_state: JSON-able, alike on the ranks that read the same samples; one entry for each data block.
            extra: JSON-able, rank 0's is stored.
            data_grid: its dp axis numbers the data blocks, its tp axis the ranks of one.

        Raises:
            CheckpointError: on every rank, when the folder cannot be made.
        """
        folder = self.folder / (layout.WRITING + layout.step_name(step))
        error: Exception | None = None
        pieces = [piece for piece in _pieces(towers, optimizer) if piece.is_main]
        size = sum(piece.data.numel() * piece.data.element_size() for piece in pieces)
        clip_ids = None
        try:
            if _is_main():
                clip_ids = _clip_ids(config)
                self.folder.mkdir(parents=True, exist_ok=True)
                layout.clean(self.folder)
                folder.mkdir()
        except Exception as caught:
            error = caught
        dims = [piece.whole[0] for piece in pieces if piece.key == "lm_head.weight"]
        note = (data_grid.dp_rank, loader_state) if data_grid.tp_rank == 0 else None
        try:
            gathered = gather_or_raise((note, size, dims), error, _of_rank)
        except Exception as caught:
            raise self._failure(folder, caught, size) from caught
        by_block = dict(note for note, _, _ in gathered if note is not None)
        teacher_dim = next((dim for _, _, dims in gathered for dim in dims), None)
        image = Preprocess(resize=config.eval.resize, crop_share=config.eval.crop_share)
        contents = Contents("clip" if config.task == "contrastive" else "mim", config.model, image, clip_ids=clip_ids)
        info = {
            "format": layout.FORMAT,
            "step": step,
            "samples": step * config.train.global_batch_size,
            "task": config.task,
            **contents_info(contents),
            "teacher_dim": teacher_dim,
            "optimizer": config.optim.name,
            "optimizer_steps": optimizer.num_steps,
            "versions": versions(),
            "grids": {
                t.name: {"tp": t.grid.tp_size, "pp": t.grid.pp_size, "vpp": t.grid.axes.vpp, "dp": t.grid.dp_size}
                for t in towers
            },
            "loader": [by_block[block] for block in sorted(by_block)],
            "extra": extra,
            "config": config.model_dump(mode="json"),
        }
        return Save(step, folder, pieces, layout.info_text(info), sum(size for _, size, _ in gathered))

    @staticmethod
    def write(save: Save, pieces: Iterable[Piece]) -> FileIndex:
        """Write this rank's file. Any thread of a rank may call it, on its own; no collective, no message.

        Args:
            pieces: those of `save`, or the same with copies as their data.

        Raises:
            OSError: the disk; pass it to `collect`.
        """
        writer = FileWriter(save.folder, dist.get_rank())
        try:
            for piece in pieces:
                writer.write(piece.key, piece.whole, piece.offset, piece.data)
            return writer.close()
        finally:
            writer.abort()

    def collect(self, save: Save, written: FileIndex | Exception) -> list[FileIndex]:
        """What the files of all ranks hold. All ranks call it. Cost: one exchange of about 300 bytes a box.

        Args:
            written: what this rank's `write` returned or raised.

        Raises:
            CheckpointError: on every rank, when one has failed (a full disk). The half-written folder is removed,
                older checkpoints are untouched.
        """
        own, failed = ([], written) if isinstance(written, Exception) else (written, None)
        try:
            return gather_or_raise(own, failed, _of_rank)
        except Exception as caught:
            raise self._failure(save.folder, caught, save.num_bytes) from caught

    def complete(self, save: Save, indexes: Sequence[FileIndex]) -> None:
        """On rank 0 write the index, give the checkpoint its name, and delete those beyond `keep`; no collective.

        A checkpoint of the same step is replaced. Any thread of a rank may call it; on other ranks it does nothing.

        Raises:
            OSError: the disk; pass it to `conclude`.
        """
        if _is_main():
            write_index(save.folder, indexes)
            layout.write_durably(save.folder / layout.INFO_NAME, save.info)
            layout.sync_folder(save.folder)
            layout.publish(save.folder, self.folder / layout.step_name(save.step))
            self._drop_old()

    def conclude(self, save: Save, failed: Exception | None) -> Path:
        """The folder of a completed save. All ranks call it.

        Args:
            failed: what this rank's `complete` raised.

        Raises:
            CheckpointError: as in `collect`.
        """
        try:
            raise_together(failed, "completing a checkpoint")
        except Exception as caught:
            raise self._failure(save.folder, caught, save.num_bytes) from caught
        return self.folder / layout.step_name(save.step)

    @staticmethod
    def discard(save: Save) -> None:
        """Remove what is left of a save that will not be concluded. Rank 0 does it; no collective."""
        if _is_main():
            shutil.rmtree(save.folder, ignore_errors=True)

    def load(
        self,
        path: Path,
        towers: Sequence[Tower],
        optimizer: Optimizer,
        *,
        config: Config,
    ) -> LoadedState:
        """Read a checkpoint of this model into towers and optimizer, exactly. All ranks call it.

        Every box that is read is held against its checksum. In another precision than the checkpoint's, weights are
        those that the main parameters give, as after a step.

        Args:
            path: from `newest()`.
            config: its task, model, batch, optimizer and frozen towers must be the checkpoint's.

        Raises:
            CheckpointError: on every rank: another task or model (before any tensor is read), or a damaged checkpoint.
        """
        with together("opening a checkpoint"):
            with self._another_instead(path):
                info = layout.read_info(path)
            _check_resumable(path, info)
            _check_same_run(path, info, config, _clip_ids(config))
            with self._another_instead(path):
                reader = Reader(path)
            averaged = any(key.startswith(AVERAGE) for key in reader.infos)
            wanted = [p for p in _pieces(towers, optimizer) if averaged or not p.key.startswith(AVERAGE)]
            pieces = [piece for piece in wanted if not piece.key.startswith(RUN_STATE) or _has(reader, piece)]
            _check_pieces(reader, pieces)
            pieces = [_of_main_parameter(reader, piece) for piece in pieces]
        with together("reading a checkpoint"), self._another_instead(path):
            reader.read_pieces(pieces)
        reader.close()
        optimizer.set_num_steps(info["optimizer_steps"])
        begins = config.optim.ema_decay is not None and not averaged
        if begins:
            _begin_averages(towers, optimizer)
        return LoadedState(
            info["step"],
            info["loader"],
            info["extra"],
            begun_anew=len(wanted) - len(pieces),
            average_begins=begins,
            average_ends=averaged and config.optim.ema_decay is None,
            changed=tuple(_changed_keys(info["config"], config)),
        )

    @contextmanager
    def _another_instead(self, path: Path) -> Iterator[None]:
        """Where a damaged checkpoint is found: says how to continue from the one before."""
        try:
            yield
        except CheckpointError as error:
            older = [p for p in layout.complete_checkpoints(self.folder) if p.name < path.name]
            then = f"and it continues from {older[-1].name}" if older else "and start again, there is no earlier one"
            advice = f"--resume takes the newest checkpoint: delete {path} {then}"
            raise CheckpointError(f"{str(error).rstrip('.')}; {advice}.") from error

    def _drop_old(self) -> None:
        for path in layout.complete_checkpoints(self.folder)[: -self.keep]:
            # A checkpoint that cannot be deleted is no reason to stop the run.
            try:
                layout.remove(path)
            except OSError as error:
                print(f"warning: cannot delete the old checkpoint {path}: {error}", flush=True)

    def _failure(self, writing: Path, error: Exception, size: int) -> Exception:
        """Removes what was written; returns what to raise."""
        if _is_main():
            shutil.rmtree(writing, ignore_errors=True)
        if is_lost_peer(error):
            return error
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free
        newest = self.newest()
        return CheckpointError(
            f"cannot write checkpoint {writing}: {_cause(error)} ({_mib(free)} free, about {_mib(size)} needed) and "
            f"must fit beside {self.keep} others; free space, lower save.keep or move run_dir. "
            + (f"The last good checkpoint is untouched: {newest}" if newest else "There is no earlier checkpoint.")
        )


def tower_prefix(name: str) -> str:
    """The prefix of a tower's checkpoint keys; a student's module already names its tower."""
    return "" if name == "student" else name + "."


def versions() -> dict[str, str]:
    """Of what wrote a checkpoint, for its megaeva.json."""
    return {
        "megaeva": __version__,
        "megatron-core": version("megatron-core"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _pieces(towers: Sequence[Tower], optimizer: Optimizer) -> list[Piece]:
    """All that this rank holds of weights and optimizer state."""
    pieces: list[Piece] = []
    for tower in towers:
        prefix = tower_prefix(tower.name)
        pieces += module_pieces(tower.module, prefix, tower.grid)
        keys = {parameter: prefix + name for name, parameter in tower.module.named_parameters()}
        for parameter, start, state, is_shard in optimizer.held_state(tower.name):
            pieces += state_pieces(keys[parameter], parameter, start, state, tower.grid, is_shard=is_shard)
        pieces += run_state_pieces(tower.module, prefix, tower.grid)
    return pieces


def _begin_averages(towers: Sequence[Tower], optimizer: Optimizer) -> None:
    for tower in towers:
        for _, _, state, _ in optimizer.held_state(tower.name):
            state["ema"].copy_(state["param"].detach())


def _has(reader: Reader, piece: Piece) -> bool:
    return piece.key in reader.infos and reader.infos[piece.key].shape == piece.whole


def _of_main_parameter(reader: Reader, piece: Piece) -> Piece:
    """Of a weight whose dtype in the checkpoint is another, the same box of its fp32 main parameter, where it has one.

    Else each rank would go on with the saved weight, rounded, and with its own shard of the main parameters.
    """
    main = f"{MAIN}{piece.key}"
    if main in reader.infos and reader.infos[piece.key].dtype != piece.data.dtype:
        return replace(piece, key=main)
    return piece


def _changed_keys(saved: Mapping[str, Any], config: Config) -> list[str]:
    wanted = config.model_dump(mode="json")
    return [line for key in wanted for line in layout.differing_keys(saved.get(key), wanted[key], key)]


def _check_pieces(reader: Reader, pieces: Sequence[Piece]) -> None:
    """That the checkpoint has every tensor of this rank, in its shape."""
    found = {key: info.shape for key, info in reader.infos.items()}
    faults = [
        f"{key}: checkpoint {list(found[key]) if key in found else 'has none'}, run {list(whole)}"
        for key, whole in dict.fromkeys((piece.key, piece.whole) for piece in pieces)
        if found.get(key) != whole
    ]
    if faults:
        raise CheckpointError(
            f"{reader.path} does not have what this run continues with; {len(faults)} tensors differ:\n"
            f"{listed(faults)}\n"
            "A resumed run must train the same parameters; set the recipe back, or start a new run_dir with init.clip, "
            "init.vision or init.text."
        )


def _check_resumable(path: Path, info: dict[str, Any]) -> None:
    advice = f"start a new run_dir from its weights with init.clip={path} (init.vision in task=mim)."
    if info["format"] < layout.FORMAT:
        raise CheckpointError(
            f"{path} has format {info['format']}, without checksums and with another position in the data; a run can "
            f"be resumed from format {layout.FORMAT}; finish it with the megaeva that wrote it "
            f"({info.get('versions', {}).get('megaeva', 'unknown')}), or {advice}"
        )
    if "optimizer_steps" not in info:
        raise CheckpointError(
            f"{path} was converted from other weights and has no optimizer state; --resume needs a checkpoint that a "
            f"run saved; {advice}"
        )
    if layout.CHECKSUM not in info:
        raise CheckpointError(
            f"{path / layout.INFO_NAME} has no {layout.CHECKSUM!r}: it was edited, or saved before it had one; step, "
            f"position in the data and optimizer steps must be as they were saved; {advice}"
        )


def _clip_ids(config: Config) -> tuple[int, ...] | None:
    """The part of CLIP's vocabulary that a run uses; None is all of it."""
    subset = config.data.tokenizer_subset
    return None if subset is None else tuple(read_subset(Path(subset)))


def _check_same_run(path: Path, info: dict[str, Any], config: Config, clip_ids: tuple[int, ...] | None) -> None:
    different = [] if info["task"] == config.task else [f"task: checkpoint {info['task']!r}, recipe {config.task!r}"]
    different += layout.differing_keys(info["model"], config.model.model_dump(mode="json"), "model")
    if config.task == "contrastive" and info["clip_ids"] != (None if clip_ids is None else list(clip_ids)):
        # As many rows, but of other words.
        different.append(f"data.tokenizer_subset: {config.data.tokenizer_subset} is not the saved run's vocabulary")
    batch = config.train.global_batch_size
    if info["samples"] != info["step"] * batch:
        # Steps are the run's clock: with another batch they would mean other samples and another learning rate.
        before = info["samples"] // max(1, info["step"])
        different.append(f"train.global_batch_size: checkpoint {before}, recipe {batch}")
    if info["optimizer"] != config.optim.name:
        # AdamW and LAMB keep moments of the same names that mean different things.
        different.append(f"optim.name: checkpoint {info['optimizer']}, recipe {config.optim.name}")
    frozen = sorted(info["config"]["optim"].get("frozen", ()))
    if frozen != sorted(config.optim.frozen):
        # A tower that begins to be trained has no moments, and one that stops would lose them at the next save.
        different.append(f"optim.frozen: checkpoint {frozen}, recipe {sorted(config.optim.frozen)}")
    if different:
        raise CheckpointError(
            f"{path} belongs to another run:\n  " + "\n  ".join(different) + "\nA resumed run must have the same task, "
            "model, batch, optimizer and frozen towers; set these keys back, or start a new run_dir with "
            "init.clip, init.vision or init.text."
        )


# ------------------------------------------------------------------------------------------------------ between ranks


def _is_main() -> bool:
    return dist.get_rank() == 0


def _of_rank(rank: int, text: str) -> Exception:
    return RemoteError(f"rank {rank}: {text}")


def _cause(error: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) if isinstance(error, UserError) else first_line(error)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
