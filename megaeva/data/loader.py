"""The loader of a training run: batches with an exact position.

One `BatchBuilder` turns one stream of raw samples into batches. It runs in the trainer (num_workers=0), in worker
processes (each has its own stream; batches are taken from them in turn), or, where DALI decodes on the GPU, in a thread
of the trainer that keeps ahead of it. In all three the batches are a function of (seed, data rank, position) alone.
"""

import json
import logging
import queue
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megaeva.config.schema import Config
from megaeva.data.batch import Batch
from megaeva.data.builder import BatchBuilder, Spec, check_enough_shards
from megaeva.data.decode import make_decoder
from megaeva.data.decode_dali import gpu_index
from megaeva.data.shards import expand_shards
from megaeva.errors import DataError, UserError

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 2  # of each worker
_STATE_VERSION = 1


class _Item(NamedTuple):
    """What a source gives: a batch and the builder's state after it, or the text of a user's error."""

    batch: Batch | None
    worker: int
    state: dict[str, Any] | None
    error: str | None = None


def _build_items(make_builder: Callable[[], BatchBuilder], worker: int) -> Iterator[_Item]:
    """Endless items; a UserError ends them as an item, so that its text crosses a process or thread unchanged."""
    try:
        builder = make_builder()
        while True:
            yield _Item(builder.build(), worker, builder.state())
    except UserError as error:
        yield _Item(None, worker, None, str(error))


class _WorkerItems(IterableDataset[_Item]):
    """The items of one worker process. Process p plays worker (p + first) % num_workers, so that a resumed round of
    turns begins where the saved one stood."""

    def __init__(self, spec: Spec, states: Sequence[dict[str, Any] | None], first: int) -> None:
        self._spec, self._states, self._first = spec, states, first

    def __iter__(self) -> Iterator[_Item]:
        info = get_worker_info()
        assert info is not None
        worker = (info.id + self._first) % self._spec.num_workers
        return _build_items(lambda: self._builder(worker), worker)

    def _builder(self, worker: int) -> BatchBuilder:
        cfg, batch_size = self._spec.cfg, self._spec.batch_size
        # Never the GPU: it is the trainer's.
        decoder = make_decoder(cfg.data.decoder, cfg.model.vision.image_size, batch_size=batch_size, platform="cpu")
        return BatchBuilder(self._spec, worker, decoder, self._states[worker])


def _from_processes(spec: Spec, states: Sequence[dict[str, Any] | None], first: int) -> Iterator[_Item]:
    # spawn: the trainer has threads, process groups and perhaps a CUDA context, none of which survive a fork.
    items = DataLoader(
        _WorkerItems(spec, states, first),
        batch_size=None,
        num_workers=spec.num_workers,
        prefetch_factor=_BATCHES_AHEAD,
        multiprocessing_context="spawn",
    )
    chld_handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(items)
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises in the main thread wherever it is, in the middle of a step too, when a worker dies. Put
        # back what was there: `next` looks at the workers itself every few seconds, so the error comes from `next`.
        signal.signal(signal.SIGCHLD, chld_handler)
    try:
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a data worker of data rank {spec.data_rank} died ({str(error).splitlines()[0]}); "
            "workers must outlive the run; lower data.num_workers or data.shuffle_buffer if memory or /dev/shm ran out"
        ) from error


class _Thread:
    """Items built by a thread, at most two ahead."""

    def __init__(self, make_items: Callable[[], Iterator[_Item]]) -> None:
        self._items: queue.Queue[_Item | BaseException] = queue.Queue(_BATCHES_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(make_items,), name="megaeva-data", daemon=True)
        self._thread.start()

    def _fill(self, make_items: Callable[[], Iterator[_Item]]) -> None:
        try:
            for item in make_items():
                if not self._put(item):
                    return
        except BaseException as error:  # raised again in the trainer
            self._put(error)

    def _put(self, item: _Item | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[_Item]:
        return self

    def __next__(self) -> _Item:
        item = self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join()


class Loader:
    """An endless iterator of this data rank's batches, `train.global_batch_size / data_size` samples each.

    Every sample of an epoch is given out once over all data ranks and workers; epochs follow each other without a
    break, nothing is dropped or repeated at the border. Ranks of one data-parallel group member (tensor or pipeline
    ranks) build the same loader and get the same batches.

    Attributes:
        wait_seconds: time the caller has spent waiting in `next`, in total.
    """

    def __init__(self, cfg: Config, *, data_rank: int, data_size: int, num_patches: int) -> None:
        """Finds the shards; nothing is read before the first batch.

        Raises:
            DataError: shards are missing or empty, or fewer than data ranks x max(1, data.num_workers).
        """
        shards = tuple(expand_shards(cfg.data.train))
        self._on_gpu = cfg.data.decoder != "pillow" and gpu_index(cfg.platform) is not None
        # On a GPU the decoding threads are DALI's; one stream feeds them.
        num_streams = 1 if self._on_gpu else max(1, cfg.data.num_workers)
        check_enough_shards(cfg, len(shards), data_size)
        self._spec = Spec(cfg, shards, data_rank, data_size, num_patches, num_streams)
        self._states: list[dict[str, Any] | None] = [None] * num_streams
        self._next_worker = 0
        self._items: Iterator[_Item] | None = None
        self.wait_seconds = 0.0

    @property
    def dropped(self) -> Counter[str]:
        """Broken samples skipped by this data rank since the start of the run, by reason."""
        total: Counter[str] = Counter()
        for state in self._states:
            total.update(state["dropped"] if state else {})
        return total

    @property
    def first_dropped(self) -> dict[str, list[str]]:
        """Keys of the first dropped samples of each worker, by reason."""
        found: dict[str, list[str]] = {}
        for state in self._states:
            for reason, names in (state["first_dropped"] if state else {}).items():
                found.setdefault(reason, []).extend(names)
        return found

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if self._items is None:
            self._items = self._start()
        item = next(self._items)
        self.wait_seconds += time.perf_counter() - started
        if item.error is not None or item.batch is None:
            self.close()
            raise DataError(f"{item.error} [data rank {self._spec.data_rank}, worker {item.worker}]")
        self._states[item.worker] = item.state
        self._next_worker = (item.worker + 1) % len(self._states)
        return item.batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch given out: small, JSON-able; batches built ahead are not counted."""
        return {
            "version": _STATE_VERSION,
            "run": self._identity(),
            "next_worker": self._next_worker,
            "workers": list(self._states),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the position of a loader with the same shards, seed, ranks and workers; the next batch is its next.

        Raises:
            DataError: the state is of another version or another division of the data.
        """
        state = json.loads(json.dumps(state))
        saved = {"version": state.get("version"), **state.get("run", {})}
        mine = {"version": _STATE_VERSION, **self._identity()}
        differing = [f"{k}={saved.get(k)!r} then, {v!r} now" for k, v in mine.items() if saved.get(k) != v]
        if differing:
            raise DataError(
                f"the saved data position belongs to another run: {', '.join(differing)}; they must be equal to "
                "continue exactly; resume with the old values, or start a new run from the weights (init.*)"
            )
        self.close()
        self._states = state["workers"]
        self._next_worker = state["next_worker"]

    def close(self) -> None:
        """Stops workers and threads; the next batch starts them again from the current position."""
        items, self._items = self._items, None
        if items is not None and hasattr(items, "close"):
            items.close()

    def _identity(self) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        spec = self._spec
        names = "\n".join(path.name for path in spec.shards)
        return {
            "seed": spec.cfg.seed,
            "data_rank": spec.data_rank,
            "data_size": spec.data_size,
            "num_workers": spec.num_workers,
            "shuffle_buffer": spec.cfg.data.shuffle_buffer,
            "num_shards": len(spec.shards),
            "shard_names_crc32": zlib.crc32(names.encode()),
        }

    def _start(self) -> Iterator[_Item]:
        spec = self._spec
        if spec.cfg.data.num_workers > 0 and not self._on_gpu:
            log_decoder = spec.cfg.data.decoder if spec.cfg.data.decoder != "auto" else "pillow"
            if spec.data_rank == 0:
                logger.info("images are decoded by %s in %d worker processes", log_decoder, spec.num_workers)
            return _from_processes(spec, self._states, self._next_worker)
        if spec.cfg.data.num_workers > 0:
            return _Thread(self._build_here)
        return self._build_here()

    def _build_here(self) -> Iterator[_Item]:
        return _build_items(self._builder, 0)

    def _builder(self) -> BatchBuilder:
        cfg = self._spec.cfg
        decoder = make_decoder(
            cfg.data.decoder,
            cfg.model.vision.image_size,
            batch_size=self._spec.batch_size,
            platform=cfg.platform,
            num_threads=max(1, cfg.data.num_workers),
            log=self._spec.data_rank == 0,
        )
        return BatchBuilder(self._spec, 0, decoder, self._states[0])
