"""Saves whose files are written while training goes on.

Weights and optimizer state change in the optimizer's step and in what follows it at once, nowhere else. So a thread of
each rank copies them, into memory that is kept from save to save, while the next step's forward and backward passes
run; `gate` waits for the rest of the copy just before the optimizer's step; and the thread writes the file from it.
The threads use no collective: what ranks have to tell each other, their main threads do in `advance`.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from torch import Tensor

from megaeva.checkpoint.pieces import Piece
from megaeva.checkpoint.store import CheckpointStore, Save
from megaeva.checkpoint.torch_dist import FileIndex, first_line
from megaeva.errors import CheckpointError
from megaeva.parallel import watch
from megaeva.parallel.platform import copier_to_host, host_memory


class Saves:
    """The saves of a run, one at a time. A save has two parts, and all ranks must be through one before the next:
    every rank writes its file; rank 0 writes the index and gives the checkpoint its name.

    All methods but `is_over`, `gate` and `close` are called by all ranks together.

    Args:
        store: begins and completes them.
        step: that the run starts with; it needs no save.
        asynchronous: False: `start` returns when the checkpoint has its name, and no memory is used.

    Attributes:
        begun: the step of the last save that was started.
        finished: the step of the last that has its name.
    """

    def __init__(self, store: CheckpointStore, *, step: int, asynchronous: bool) -> None:
        self.begun = self.finished = step
        self._store, self._asynchronous = store, asynchronous
        self._thread = ThreadPoolExecutor(1, "save")
        self._copies: list[Tensor] = []
        self._copied, self._closed = threading.Event(), threading.Event()
        self._copied.set()
        self._save: Save | None = None
        self._part: Future[Any] = Future()
        self._completing = False

    @property
    def in_flight(self) -> bool:
        """Whether a save has no name yet; the same on all ranks."""
        return self._save is not None

    @property
    def is_over(self) -> bool:
        """Whether this rank is through its part of a save in flight. When all are, they should `advance`."""
        return self._save is not None and self._part.done()

    def start(self, save: Save) -> None:
        """Begin to write what `CheckpointStore.begin` returned, after `finish`.

        Raises:
            CheckpointError: not asynchronous, and a rank failed.
        """
        assert self._save is None, "one save at a time"
        copy = copier_to_host([piece.data for piece in save.pieces]) if self._asynchronous else None
        self._save, self.begun, self._completing = save, save.step, False
        self._copied.clear()
        self._part = self._thread.submit(self._write, save, copy)
        if not self._asynchronous:
            self.finish()

    def gate(self) -> None:
        """Returns when weights and optimizer state may change: before every optimizer step. Usually at once."""
        if not self._copied.is_set():
            watch.at("waiting until a save has copied the weights")
            self._copied.wait()

    def advance(self) -> None:
        """Go on to the next part of the save in flight, which `is_over` on every rank; after the last it is finished.

        Raises:
            CheckpointError: on every rank, when one failed (a full disk): the save is given up, its files are removed.
        """
        save, self._save = self._save, None
        assert save is not None
        result = self._part.result()
        if self._completing:
            self._store.conclude(save, result)
            self.finished = save.step
        else:
            indexes = self._store.collect(save, result)
            self._save, self._completing = save, True
            self._part = self._thread.submit(self._complete, save, indexes)

    def finish(self) -> None:
        """Wait until no save is in flight. Raises as `advance` does."""
        while self._save is not None:
            watch.at("waiting for the files of a save")
            wait([self._part])
            self.advance()

    def close(self) -> None:
        """End the thread, and give up a save in flight: what a run that ends with an error does. No collective."""
        self._closed.set()
        self._thread.shutdown(wait=True)
        if self._save is not None:
            self._store.discard(self._save)
            self._save = None

    # ----------------------------------------------------------------------------------------------- in the thread

    def _write(self, save: Save, copy: Callable[[Sequence[Tensor]], None] | None) -> FileIndex | Exception:
        pieces = save.pieces
        try:
            if copy is not None:
                self._copies = self._copies or _memory(pieces)
                copy(self._copies)
                pieces = [replace(piece, data=data) for piece, data in zip(pieces, self._copies, strict=True)]
            self._copied.set()
            return self._store.write(save, self._until_closed(pieces))
        except Exception as error:
            return error
        finally:
            self._copied.set()

    def _complete(self, save: Save, indexes: Sequence[FileIndex]) -> Exception | None:
        try:
            self._store.complete(save, indexes)
        except Exception as error:
            return error
        return None

    def _until_closed(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if self._closed.is_set():
                raise RuntimeError("the run has ended")
            yield piece


def _memory(pieces: Sequence[Piece]) -> list[Tensor]:
    try:
        return [host_memory(piece.data) for piece in pieces]
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"no host memory for a copy of what a rank saves ({first_line(error)}); save.asynchronous=false needs none"
        ) from error
