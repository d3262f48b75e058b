"""Bytes at their offsets, whatever goes past the page cache and whatever through it."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from megaeva.checkpoint import disk_file
from megaeva.checkpoint.disk_file import DiskFile

MIB = 2**20


def written(path: Path) -> tuple[bytes, bytes]:
    """What was meant to be in the file and what is: stretches of all lengths at odd and even offsets."""
    draw = np.random.default_rng(3)
    expected = bytearray(40 * MIB)
    file = DiskFile(path)
    offset = 5
    for length in (1, 4096, 9 * MIB, 0, 4 * MIB, 4 * MIB + 4095, 12 * MIB + 77, 30_000):
        data = draw.bytes(length)
        file.write(memoryview(data), offset)
        expected[offset : offset + length] = data
        offset += length
    for patched in (7, 5 * MIB + 3, offset - 2):  # as a checksum that is known last
        file.write(memoryview(b"##"), patched)
        expected[patched : patched + 2] = b"##"
    file.sync()
    file.close()
    file.close()
    return bytes(expected[:offset]), path.read_bytes()


def test_everything_is_where_it_belongs(tmp_path: Path) -> None:
    expected, found = written(tmp_path / "file")
    assert found[:5] == bytes(5) and found == expected


@pytest.mark.parametrize("refusal", ["opening", "writing", "short"])
def test_a_file_system_that_takes_no_direct_writes(
    refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct: set[int] = set()
    really_open, really_write = os.open, os.pwrite

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and refusal == "opening":
            raise OSError(errno.EINVAL, "no direct writes")
        descriptor = really_open(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor in direct and refusal == "writing":
            raise OSError(errno.EINVAL, "another alignment")
        return really_write(descriptor, data[:1234] if descriptor in direct else data, offset)

    monkeypatch.setattr(disk_file.os, "open", open_)
    monkeypatch.setattr(disk_file.os, "pwrite", write)
    expected, found = written(tmp_path / "file")
    assert found == expected and bool(direct) == (refusal != "opening")
