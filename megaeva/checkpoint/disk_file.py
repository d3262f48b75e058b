"""Files at offsets: written with their long stretches past the page cache, read into memory that is there.

Weights are written once and not read soon. The pages of the cache that they would fill are taken from what is read
again (shards of images), and cost more than the disk where the machine has to find them first: for 10 GB under Linux
6.18, 4 to 12 s of CPU against 0.5 s.
"""

import errno
import mmap
import os
from pathlib import Path

import numpy as np

_ALIGNMENT = 4096
_BLOCK_BYTES = 2**22
_CACHED_BYTES = 2**20  # for a larger write at once Linux looks for contiguous pages, at several times the cost


class DiskFile:
    """A file open for writing. Every method may raise an OSError of the disk."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; what it holds stays."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._direct = _open_direct(path)
        self._block: np.ndarray | None = None

    def write(self, data: memoryview, offset: int) -> None:
        """Writes all of `data` at `offset`."""
        start = -offset % _ALIGNMENT
        blocks = (len(data) - start) // _BLOCK_BYTES if self._direct is not None else 0
        if blocks <= 0:
            self._write_cached(data, offset)
            return
        end = start + blocks * _BLOCK_BYTES
        self._write_cached(data[:start], offset)
        for position in range(start, end, _BLOCK_BYTES):
            self._write_block(data[position : position + _BLOCK_BYTES], offset + position)
        self._write_cached(data[end:], offset + end)

    def sync(self) -> None:
        """Forces it to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Gives it up; a second time does nothing."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._descriptor, self._direct, self._block = -1, None, None

    def _write_block(self, data: memoryview, offset: int) -> None:
        if self._block is None:
            self._block = np.frombuffer(mmap.mmap(-1, _BLOCK_BYTES), np.uint8)  # begins on a page, as the disk wants it
        assert self._direct is not None
        np.copyto(self._block, np.frombuffer(data, np.uint8))  # other threads go on meanwhile, not so with memoryviews
        try:
            done = os.pwrite(self._direct, self._block.data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the disk wants another alignment
                raise
            done = 0
        if done < len(data):  # a disk that is full at some byte says so only for the next
            self._write_cached(data[done:], offset + done)

    def _write_cached(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done : done + _CACHED_BYTES], offset + done)


def _open_direct(path: Path) -> int | None:
    """A descriptor that goes past the page cache; None where the file system or the kernel has none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return None


def read_bytes(descriptor: int, target: memoryview, offset: int) -> int:
    """Fills `target` from a file; returns the bytes read, fewer only where the file ends."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
