"""From a source to a sink tensor by tensor: one thread reads, checks and converts, another writes."""

import ctypes
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megaeva.checkpoint.tensors import TensorInfo, TensorSink, TensorSource
from megaeva.errors import CheckpointError

AHEAD_BYTES = 2**27
"""Of tensors that wait between the threads: a few large ones, or a small one would leave one of the threads idle. With
those being made and written they are what is in memory."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_KEPT_BYTES = 2**30


def stream(tensors: Iterator[tuple[str, Tensor]], sink: TensorSink) -> int:
    """Writes tensors as they are made, without finishing the sink; returns their bytes.

    Raises:
        OSError: the disk; and what `tensors` raises.
    """
    _keep_freed_memory()
    ready: queue.Queue[tuple[str, Tensor] | BaseException | None] = queue.Queue()
    room = threading.Condition()
    waiting = 0
    stopped = False

    def has_room() -> bool:
        return stopped or waiting < AHEAD_BYTES

    def produce() -> None:
        nonlocal waiting
        try:
            for name, tensor in tensors:
                with room:
                    room.wait_for(has_room)
                    if stopped:
                        return
                    waiting += tensor.nbytes
                ready.put((name, tensor))
                del tensor  # before the next one is made
            ready.put(None)
        except BaseException as error:  # raised where the sink is
            ready.put(error)

    producer = threading.Thread(target=produce, name="reading tensors", daemon=True)
    producer.start()
    num_bytes = 0
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            name, tensor = item
            sink.write(name, tensor)
            num_bytes += tensor.nbytes
            with room:
                waiting -= tensor.nbytes
                room.notify()
            del item, tensor  # before the next one comes
    finally:
        with room:
            stopped = True
            room.notify()
        producer.join()
    return num_bytes


class Finite:
    """A `TensorSource` that gives only finite numbers."""

    def __init__(self, source: TensorSource) -> None:
        self.path: Path = source.path
        self.infos: Mapping[str, TensorInfo] = source.infos
        self._source = source

    def read(self, name: str) -> Tensor:
        """See `TensorSource.read`. CheckpointError: a NaN or infinity; says how many and where the first is."""
        tensor = self._source.read(name)
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        # Both ends are NaN where one element is, and infinite where one is: ten times as fast as isfinite.
        if all(end.isfinite() for end in torch.aminmax(tensor)):
            return tensor
        bad = ~tensor.isfinite()
        first = bad.nonzero()[0].tolist()
        raise CheckpointError(
            f"{self.path}: {name} {list(tensor.shape)} has {int(bad.sum())} elements that are not finite, the first "
            f"{tensor[tuple(first)].item()} at {first}; weights must be finite; the file is damaged or its training "
            "diverged, use another one."
        )

    def close(self) -> None:
        """See `TensorSource.close`."""
        self._source.close()


def _keep_freed_memory() -> None:
    """Has glibc give freed tensors' memory to the next ones: fresh pages from the kernel halve the speed of reading."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_THRESHOLD, _KEPT_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_ARENA_MAX, 1)):
            mallopt(option, value)
