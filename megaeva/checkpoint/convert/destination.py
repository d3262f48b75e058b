"""A destination has its name only when it is whole: it is written in a hidden folder beside, which is then renamed."""

import fcntl
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megaeva.checkpoint.layout import WRITING, sync_folder
from megaeva.errors import CheckpointError

Beside = Callable[[Path], None]
"""Writes the files that belong beside weights (configuration, tokenizer) into the folder it is given."""


class Destination:
    """A file or folder to be. Whatever a killed conversion left at the same place is removed first.

    Attributes:
        folder: hidden; what is written there is published under the final name.
    """

    def __init__(self, final: Path) -> None:
        """Makes the hidden folder, and the folders above it that are missing.

        Raises:
            CheckpointError: the destination exists, or another conversion writes it.
            OSError: the disk.
        """
        self.final = final
        refuse_existing(final)
        self._made = [parent for parent in final.parents if not parent.exists()]
        there = next(parent for parent in final.absolute().parents if parent.exists())
        if not there.is_dir():
            raise CheckpointError(
                f"{final} cannot be made: {there} is a file; it must be a folder; name another destination."
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        self.folder = final.with_name(WRITING + final.name)
        self._lock = self._lock_folder()

    def publish_folder(self) -> None:
        """The hidden folder becomes the destination."""
        _sync_tree(self.folder)
        refuse_existing(self.final)
        self.folder.rename(self.final)
        self._end()

    def publish_file(self) -> None:
        """The hidden folder's files move beside each other, the one called as the destination last."""
        _sync_tree(self.folder)
        others = sorted(path.name for path in self.folder.iterdir() if path.name != self.final.name)
        for name in (*others, self.final.name):
            refuse_existing(self.final.with_name(name))
        for name in (*others, self.final.name):
            (self.folder / name).rename(self.final.with_name(name))
        self.folder.rmdir()
        self._end()

    def remove(self) -> None:
        """Nothing is left of it, nor of the folders made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        with suppress(OSError):  # somebody else's files are in it by now
            for parent in self._made:
                parent.rmdir()

    def _end(self) -> None:
        sync_folder(self.final.parent)
        os.close(self._lock)

    def _lock_folder(self) -> int:
        self.folder.mkdir(exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise CheckpointError(
                f"{self.final} is being written by another conversion; one must end before the next; wait, or name "
                "another destination."
            ) from error
        for path in self.folder.iterdir():  # of a conversion that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return lock


def refuse_existing(path: Path) -> None:
    """Raises a CheckpointError where something is at `path` already."""
    if path.exists() or path.is_symlink():
        raise CheckpointError(
            f"{path} exists; a conversion replaces nothing; name a destination that does not exist, or move this away."
        )


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_folder(folder)
