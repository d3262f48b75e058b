"""The loader of a training run: batches with an exact position.

The streams that samples come from belong to the run (`builder.Spec`): a run that goes on with another number of data
blocks gets the global batches that it would have had. One `BatchBuilder` makes the batches of one turn. Builders run in
the trainer (num_workers=0), in worker processes (each has its own turns; batches are taken from them in rotation), or,
where DALI decodes on the GPU, in a thread of the trainer that keeps ahead of it. In all three a global batch is a
function of (seed, number of data blocks and workers at the start of the run, step) alone.
"""

import itertools
import json
import logging
import os
import queue
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.autograd.profiler import record_function
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megaeva.config.schema import Config
from megaeva.data.batch import Batch
from megaeva.data.builder import BatchBuilder, Spec, Tools, check_enough_shards, make_tools, stream_name
from megaeva.data.decode import Decoder, make_decoder
from megaeva.data.decode_dali import gpu_index
from megaeva.data.shards import expand_shards
from megaeva.data.video import VideoDecoder
from megaeva.errors import DataError, UserError

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 2  # of each worker
_STATE_VERSION = 3
_VIDEOS = "{} frames of each video are decoded by PyAV on the CPU (data.decoder is for images)"

_States = dict[str, dict[str, Any]]  # by `stream_name`; of streams that have given a sample


class _Item(NamedTuple):
    """What a source gives: a batch and the states of its streams after it, or the text of a user's error."""

    batch: Batch | None
    turn: int
    states: _States
    error: str | None = None


def _build_items(spec: Spec, make: Callable[[], Tools], states: _States, turns: Sequence[int]) -> Iterator[_Item]:
    """Endless items of `turns` in rotation; a UserError ends them as an item, so that its text crosses a process or
    thread unchanged."""
    builders: dict[int, BatchBuilder] = {}
    tools: Tools | None = None
    for turn in itertools.cycle(turns):
        try:
            tools = tools or make()
            if turn not in builders:
                builders[turn] = BatchBuilder(spec, tools, turn, states)
            yield _Item(builders[turn].build(), turn, builders[turn].state())
        except UserError as error:
            yield _Item(None, turn, {}, str(error))
            return


def _rotation(spec: Spec, first: int, worker: int, num_workers: int) -> list[int]:
    """Turns of one of `num_workers` (a divisor of the turns), from step `first` on."""
    return [(first + step) % spec.turns for step in range(worker, spec.turns, num_workers)]


class _WorkerItems(IterableDataset[_Item]):
    """The items of one worker process; batches are taken from worker 0 first, where a resumed rotation goes on."""

    def __init__(self, spec: Spec, states: _States, first: int) -> None:
        self._spec, self._states, self._first = spec, states, first

    def __iter__(self) -> Iterator[_Item]:
        _outlive_a_stop()
        info = get_worker_info()
        assert info is not None
        turns = _rotation(self._spec, self._first, info.id, info.num_workers)
        return _build_items(self._spec, lambda: self._tools(info.num_workers), self._states, turns)

    def _tools(self, num_workers: int) -> Tools:
        # Never the GPU: it is the trainer's.
        return make_tools(self._spec, _decoder(self._spec, platform="cpu"), num_workers)


def _outlive_a_stop() -> None:
    """What stops a job reaches all its processes, and its trainer takes one more batch before it saves.

    Ctrl-C and torchrun signal the trainer's process group, which a worker leaves; Slurm signals each process, so the
    first SIGTERM is not for a worker. The second is DataLoader's, when it is closed.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _decoder(spec: Spec, **others: Any) -> Decoder | VideoDecoder:
    """The decoder of images or, with `data.frames` above 1, of videos; `others`: as of `make_decoder`."""
    cfg = spec.cfg
    size = cfg.model.vision.image_size
    if cfg.data.frames == 1:
        return make_decoder(cfg.data.decoder, size, batch_size=spec.num_decoded, **others)
    if others.get("log"):
        logger.info(_VIDEOS.format(cfg.data.frames))
    pixels, threads = cfg.data.max_image_pixels, others.get("num_threads", 1)
    return VideoDecoder(size, cfg.data.frames, max_pixels=pixels, num_threads=threads)


def _from_processes(spec: Spec, states: _States, first: int) -> Iterator[_Item]:
    # spawn: the trainer has threads, process groups and perhaps a CUDA context, none of which survive a fork.
    items = DataLoader(
        _WorkerItems(spec, states, first),
        batch_size=None,
        num_workers=spec.cfg.data.num_workers,
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
    """An endless iterator of this data block's batches, `train.global_batch_size / data_size` samples each.

    Every sample of an epoch is given out once over all data blocks and workers; epochs follow each other without a
    break, nothing is dropped or repeated at the border. Ranks of one data block (tensor or pipeline ranks) build the
    same loader and get the same batches.

    Attributes:
        wait_seconds: time the caller has spent waiting in `next`, in total.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        data_rank: int,
        data_size: int,
        num_patches: int,
        streams: tuple[int, int] | None = None,
    ) -> None:
        """Finds the shards; nothing is read before the first batch.

        Args:
            streams: rows and turns of the run that this is a later phase of; None: of a run that starts.

        Raises:
            DataError: shards are missing or empty.
        """
        shards = tuple(expand_shards(cfg.data.train))
        self._on_gpu = cfg.data.decoder != "pillow" and gpu_index(cfg.platform) is not None
        # On a GPU the decoding threads are DALI's; one turn feeds them.
        turns = 1 if self._on_gpu else max(1, cfg.data.num_workers)
        rows, turns = streams or (data_size, turns)
        self._spec = Spec(cfg, shards, data_rank, data_size, num_patches, rows=rows, turns=turns)
        self._states: _States = {}
        self._next_turn = 0
        self._items: Iterator[_Item] | None = None
        self.wait_seconds = 0.0

    @property
    def streams(self) -> tuple[int, int]:
        """Rows and turns of the run, fixed when it starts (see `Spec`)."""
        return self._spec.rows, self._spec.turns

    @property
    def dropped(self) -> Counter[str]:
        """Broken samples skipped since the start of the run, by reason; their sum over data blocks is the run's."""
        total: Counter[str] = Counter()
        for state in self._counted().values():
            total.update(state["dropped"])
        return total

    @property
    def first_dropped(self) -> dict[str, list[str]]:
        """Keys of the first dropped samples of each stream, by reason."""
        found: dict[str, list[str]] = {}
        for state in self._counted().values():
            for reason, names in state["first_dropped"].items():
                found.setdefault(reason, []).extend(names)
        return found

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if self._items is None:
            self._items = self._start()
        with record_function("megaeva::data"):  # for train.profile
            item = next(self._items)
        self.wait_seconds += time.perf_counter() - started
        if item.error is not None or item.batch is None:
            self.close()
            raise DataError(f"{item.error} [data rank {self._spec.data_rank}, worker {item.turn}]")
        self._states.update(item.states)
        self._next_turn = (item.turn + 1) % self._spec.turns
        return item.batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch given out: small, JSON-able; batches built ahead are not counted.

        It has the streams that this block answers for: those of all blocks together are the run's.
        """
        return {
            "version": _STATE_VERSION,
            "run": self._identity(),
            "rows": self._spec.rows,
            "turns": self._spec.turns,
            "next_turn": self._next_turn,
            "streams": self._counted(),
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Goes to the position of a run with the same shards, seed and batch; the next batch is its next.

        Args:
            states: `state_dict` of every data block, of which there may have been another number.

        Raises:
            DataError: the states are of another version or run, or data.num_workers does not divide the run's turns.
        """
        states = json.loads(json.dumps(states))
        first = states[0]
        if first.get("version") != _STATE_VERSION:
            raise DataError(
                f"the saved data position is of version {first.get('version')}; this megaeva reads version "
                f"{_STATE_VERSION}; resume with the megaeva that saved it, or start a new run from the weights (init.*)"
            )
        saved = first["run"]
        differing = [f"{k}={saved[k]!r} then, {v!r} now" for k, v in self._identity().items() if saved[k] != v]
        if differing:
            raise DataError(
                f"the saved data position belongs to another run: {', '.join(differing)}; they must be equal to "
                "continue exactly; resume with the old values, or start a new run from the weights (init.*)"
            )
        spec = self._spec._replace(rows=first["rows"], turns=first["turns"])
        workers = spec.cfg.data.num_workers
        if not self._on_gpu and spec.turns % max(1, workers):
            possible = [str(n) for n in range(1, spec.turns + 1) if spec.turns % n == 0]
            raise DataError(
                f"data.num_workers={workers} must divide the {spec.turns} turns in which this run reads its shards, "
                f"as many as workers when it began; set it to {', '.join(possible)}, or 0 to read in the trainer"
            )
        self.close()
        self._spec = spec
        rows = {str(row) for row in spec.own_rows}
        streams = {name: stream for state in states for name, stream in state["streams"].items()}
        self._states = {name: stream for name, stream in streams.items() if name.split(".")[0] in rows}
        self._next_turn = first["next_turn"]

    def close(self) -> None:
        """Stops workers and threads; the next batch starts them again from the current position."""
        items, self._items = self._items, None
        if items is not None and hasattr(items, "close"):
            items.close()

    def _counted(self) -> _States:
        """States of the streams that this block answers for, of those it reads."""
        spec = self._spec
        names = (stream_name(row, turn) for row in spec.counted_rows for turn in range(spec.turns))
        return {name: self._states[name] for name in names if name in self._states}

    def _identity(self) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        spec = self._spec
        names = "\n".join(path.name for path in spec.shards)
        return {
            "seed": spec.cfg.seed,
            "global_batch_size": spec.cfg.train.global_batch_size,
            "shuffle_buffer": spec.cfg.data.shuffle_buffer,
            "num_shards": len(spec.shards),
            "shard_names_crc32": zlib.crc32(names.encode()),
        }

    def _start(self) -> Iterator[_Item]:
        spec = self._spec
        check_enough_shards(len(spec.shards), spec.rows, spec.turns)
        if spec.rows != spec.data_size and spec.data_rank == 0:
            self._log_other_blocks()
        if spec.cfg.data.num_workers > 0 and not self._on_gpu:
            how = f"images are decoded by {'dali' if spec.cfg.data.decoder == 'dali' else 'pillow'}"
            if spec.cfg.data.frames > 1:
                how = _VIDEOS.format(spec.cfg.data.frames)
            if spec.data_rank == 0:
                logger.info("%s in %d worker processes", how, spec.cfg.data.num_workers)
            return _from_processes(spec, self._states, self._next_turn)
        if spec.cfg.data.num_workers > 0:
            return _Thread(self._build_here)
        return self._build_here()

    def _log_other_blocks(self) -> None:
        spec = self._spec
        used = len(spec.own)
        most = max(s.num_decoded for s in (spec._replace(data_rank=rank) for rank in range(spec.data_size)))
        cost = "" if most == used else f"; some share a row, so one decodes up to {most} images a step to use {used}"
        logger.info(
            "this run began with %d data blocks, now %d read its streams: global batches stay the same%s",
            spec.rows, spec.data_size, cost,
        )  # fmt: skip

    def _build_here(self) -> Iterator[_Item]:
        turns = _rotation(self._spec, self._next_turn, 0, 1)
        # The states as they are now: a thread's builders start later, one by one.
        return _build_items(self._spec, self._tools, dict(self._states), turns)

    def _tools(self) -> Tools:
        cfg = self._spec.cfg
        threads, log = max(1, cfg.data.num_workers), self._spec.data_rank == 0
        decoder = _decoder(self._spec, platform=cfg.platform, num_threads=threads, log=log)
        return make_tools(self._spec, decoder, 1)
