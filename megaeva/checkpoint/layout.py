"""Names and JSON of a run's checkpoints; no torch import for them, so the command line reads them at once.

run_dir/checkpoints/step_00001000/   megaeva.json (written last) and the files of torch_dist.py
run_dir/checkpoints/.writing_*       a save in progress, or one that was killed
run_dir/checkpoints/.replaced_*      the former step_* of the same number, until the new one has its name
run_dir/checkpoints/.removing_*      an old one on its way out
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

from pydantic import ValidationError

from megaeva.config.schema import ModelSection
from megaeva.errors import CheckpointError

FORMAT = 2
OLDEST_FORMAT = 1  # without checksums and without what says how weights are used; readable as weights, not resumable
INFO_NAME = "megaeva.json"
FOLDER_NAME = "checkpoints"
RECIPE_NAME = "config.yaml"
CHECKSUM = "crc32"
WRITING, REPLACED, REMOVING = ".writing_", ".replaced_", ".removing_"
_STEP = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """step_00001000"""
    return f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a `checkpoints/` folder, oldest first; empty when there is no such folder."""
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):  # ".replaced_step_N" sorts before "step_N", which wins
        match = _STEP.fullmatch(path.name.removeprefix(REPLACED))
        if match and (path / INFO_NAME).is_file():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, also one without a finished checkpoint, or one of its checkpoints, perhaps gone."""
    names = (path / INFO_NAME, path / FOLDER_NAME, path / RECIPE_NAME)
    return any(name.exists() for name in names) or bool(complete_checkpoints(path)) or _is_named_as_one(path)


def _is_named_as_one(path: Path) -> bool:
    return path.parent.name == FOLDER_NAME and _STEP.fullmatch(path.name) is not None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or the newest of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / INFO_NAME).is_file():
        return path
    found = complete_checkpoints(path / FOLDER_NAME) or complete_checkpoints(path)
    if not found and not path.exists() and _is_named_as_one(path):
        raise _gone(path)
    if not found:
        what = (
            "does not exist"
            if not path.exists()
            else f"holds no finished checkpoint ({FOLDER_NAME}/step_*/{INFO_NAME})"
        )
        raise CheckpointError(
            f"checkpoint {path} {what}; it must be a run folder, one checkpoint of it, or a file of weights; "
            f"check the path, or run the stage that writes it."
        )
    return found[-1]


def info_text(info: Mapping[str, Any]) -> str:
    """megaeva.json of these keys and, under `CHECKSUM`, the CRC-32 of them that `read_info` expects."""
    return json.dumps({**info, CHECKSUM: _checksum(info)}, indent=1)


def _checksum(info: Mapping[str, Any]) -> str:
    """Of keys and values, however they are spaced."""
    content = json.dumps({key: value for key, value in info.items() if key != CHECKSUM})
    return f"{crc32(content.encode()):08x}"


def read_info(checkpoint: Path) -> dict[str, Any]:
    """megaeva.json of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, damaged, edited, or written by a newer megaeva; or see `still_there`.
    """
    path = checkpoint / INFO_NAME
    try:
        with still_there(checkpoint):
            info = json.loads(path.read_text(encoding="utf-8"))
        written = int(info["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it must be the JSON that megaeva wrote; "
            f"the checkpoint is damaged, use another one of the run."
        ) from error
    if not OLDEST_FORMAT <= written <= FORMAT:
        raise CheckpointError(
            f"{path} has format {written}, this megaeva reads formats {OLDEST_FORMAT} to {FORMAT}; "
            f"use the megaeva that wrote it ({info.get('versions', {}).get('megaeva', 'unknown')})."
        )
    expected, found = info.get(CHECKSUM), _checksum(info)
    if expected is not None and expected != found:
        raise CheckpointError(
            f"{path}: the CRC-32 of its values is {found}, expected {expected}; it must be as it was saved; "
            f"the checkpoint is damaged or was edited, use another one of the run."
        )
    return info


@contextmanager
def still_there(checkpoint: Path) -> Iterator[None]:
    """For opening files of a checkpoint that was found: says so where its run has deleted it since.

    Raises:
        CheckpointError: in place of an OSError, where the folder is gone.
    """
    try:
        yield
    except OSError as error:
        if checkpoint.exists():
            raise
        raise _gone(checkpoint) from error


def _gone(checkpoint: Path) -> CheckpointError:
    others = [path.name for path in complete_checkpoints(checkpoint.parent)]
    return CheckpointError(
        f"checkpoint {checkpoint} is not there, or not any more: a run that goes on deletes all but its newest "
        "save.keep checkpoints; one must stay until it is read; run the command again on the run folder: its newest "
        "is taken" + (f", or name another one ({', '.join(others)} here)." if others else ".")
    )


def read_model_section(path: str | Path) -> ModelSection:
    """The model that a checkpoint was trained with, or that a file of another format holds.

    Args:
        path: a run folder (its newest checkpoint), one checkpoint folder, or a file or folder that
            `convert.start.open_weights` opens. Only of that torch is imported.

    Raises:
        CheckpointError: no finished checkpoint there, or its section is not one of this version; or it cannot be told.
    """
    path = Path(path)
    if path.exists() and not is_run(path):
        from megaeva.checkpoint.convert.start import open_weights

        with closing(open_weights(path)) as weights:
            return weights.contents.model
    checkpoint = find_checkpoint(path)
    try:
        return ModelSection.model_validate(read_info(checkpoint).get("model"))
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint / INFO_NAME}: `model` is not a model section of this megaeva: {error}; "
            f"use the megaeva that wrote it."
        ) from error


def read_model_section_if_there(path: str | Path) -> ModelSection | None:
    """As `read_model_section`; None where nothing is yet: no folder, an empty one, a run before its first save."""
    path = Path(path)
    if is_run(path) or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        try:
            find_checkpoint(path)
        except CheckpointError:
            return None
    return read_model_section(path)


def differing_keys(saved: Any, wanted: Any, path: str) -> list[str]:
    """One line a key whose values differ, e.g. `model.vision.hidden_size: checkpoint 96, recipe 192`.

    `variant` is a name, not a value, and left out.
    """
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = [key for key in dict.fromkeys([*wanted, *saved]) if key != "variant"]
        return [line for key in keys for line in differing_keys(saved.get(key), wanted.get(key), f"{path}.{key}")]
    return [] if saved == wanted else [f"{path}: checkpoint {saved!r}, recipe {wanted!r}"]


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a small file and force it to the disk."""
    with path.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a checkpoint so that it never looks complete while half of it is gone."""
    hidden = path if path.name.startswith(".") else path.with_name(REMOVING + path.name)
    if hidden != path:
        path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what killed saves left behind. Only one process may do so, and no save may be in progress."""
    for path in folder.iterdir():
        if path.name.startswith((WRITING, REMOVING)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(REPLACED):
            named = path.with_name(path.name.removeprefix(REPLACED))
            if (named / INFO_NAME).is_file():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(named)


def publish(writing: Path, final: Path) -> None:
    """Give a finished save its name, replacing a checkpoint of the same step; at every moment one of them is whole."""
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        final.rename(replaced)
    writing.rename(final)
    sync_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)
