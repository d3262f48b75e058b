"""Files of a checkpoint: read back exactly, by torch and by mcore, and every damage named."""

import io
import json
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megaeva.checkpoint.pieces import Piece
from megaeva.checkpoint.record import DTYPES, memory, surroundings
from megaeva.checkpoint.torch_dist import FileWriter, Reader, write_index
from megaeva.errors import CheckpointError
from megaeva.parallel.runtime import Runtime

TENSORS = {
    "half": torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "scalar": torch.tensor(2.5),
    "counts": torch.arange(7),
    "cube": torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)),
}


def write(folder: Path) -> Path:
    """Two ranks' files; `half` is cut in columns and `cube` in three boxes over both."""
    folder.mkdir()
    first, second = FileWriter(folder, 0), FileWriter(folder, 1)
    half, cube = TENSORS["half"], TENSORS["cube"]
    first.write("half", half.shape, (0, 0), half[:, :3])  # strided
    second.write("half", half.shape, (0, 3), half[:, 3:])
    first.write("scalar", (), (), TENSORS["scalar"])
    second.write("counts", (7,), (0,), TENSORS["counts"])
    first.write("cube", cube.shape, (0, 0, 0), cube[:1])
    second.write("cube", cube.shape, (1, 0, 0), cube[1:, :2])
    first.write("cube", cube.shape, (1, 2, 0), cube[1:, 2:])
    write_index(folder, [first.close(), second.close()])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint")


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (3, 2), (0, 4)], ids=str)
def test_a_record_is_an_archive_of_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    content = bytes(memory(tensor))
    head, tail = surroundings(dtype, shape, crc32(content))
    archive = io.BytesIO(head + content + tail)
    assert zipfile.ZipFile(archive).testzip() is None
    archive.seek(0)
    loaded = torch.load(archive, weights_only=True)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)
    assert loaded.is_contiguous()


def test_read_whole_and_in_boxes(folder: Path) -> None:
    reader = Reader(folder)
    assert reader.infos.keys() == TENSORS.keys()
    assert reader.has_checksums
    for name, tensor in TENSORS.items():
        read = reader.read(name)
        assert torch.equal(read, tensor)
        assert read.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        assert (reader.infos[name].shape, reader.infos[name].dtype) == (tuple(tensor.shape), tensor.dtype)
    for low, high in ((0, 4), (1, 3), (2, 4)):
        # Any dtype, any strides.
        target = torch.zeros(5, high - low, 2, dtype=torch.float64).transpose(0, 1).transpose(1, 2)
        assert target.shape == (high - low, 2, 5)
        reader.read_into("cube", (low, 1, 0), target)
        assert torch.equal(target, TENSORS["cube"][low:high, 1:3].double())
    with pytest.raises(KeyError):
        reader.read("other")
    reader.verify()
    reader.close()


def test_pieces_are_read_with_each_record_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, whole = Reader(folder), torch.zeros(4, 3, 5)
    loads: list[Any] = []
    load = reader._load
    monkeypatch.setattr(reader, "_load", lambda record, *to: loads.append(record) or load(record, *to))
    reader.read_pieces(Piece("cube", whole[i : i + 1], (4, 3, 5), (i, 0, 0), False) for i in range(4))
    assert torch.equal(whole, TENSORS["cube"])
    assert len(loads) == 3


def test_torch_reads_the_folder(folder: Path) -> None:
    target = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(target, checkpoint_id=folder)
    for name, tensor in TENSORS.items():
        assert torch.equal(target[name], tensor)


def test_mcore_reads_the_folder(folder: Path, runtime: Runtime) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    wanted = {
        "half": ShardedTensor.from_rank_offsets("half", torch.zeros(6, 10, dtype=torch.bfloat16)),
        "low": ShardedTensor.from_rank_offsets("cube", torch.zeros(2, 3, 5), (0, 0, 2)),
        "high": ShardedTensor.from_rank_offsets("cube", torch.zeros(2, 3, 5), (0, 1, 2)),
    }
    loaded = dist_checkpointing.load(wanted, str(folder))
    assert torch.equal(loaded["half"], TENSORS["half"])
    assert torch.equal(torch.cat([loaded["low"], loaded["high"]]), TENSORS["cube"])
    plain = dist_checkpointing.load_plain_tensors(str(folder))
    for name, tensor in TENSORS.items():
        assert torch.equal(plain[name], tensor)


def fault_of(folder: Path) -> str:
    """What reading all of a folder says; "" if all is well."""
    reader = None
    try:
        reader = Reader(folder)
        reader.verify()
    except CheckpointError as error:
        return str(error)
    finally:
        if reader:
            reader.close()
    return ""


def test_every_flipped_byte_is_seen(folder: Path) -> None:
    """Of tensors, of what surrounds them, of the index, and of the checksums themselves."""
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "checksums.json"):
        path = folder / name
        content = path.read_bytes()
        for position in range(0, len(content), 7):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            fault = fault_of(folder)
            if name != "checksums.json" or position > 20:  # not the word for the algorithm
                assert name in fault or (name == "checksums.json" and fault), (name, position)
            if path.suffix == ".distcp":
                assert any(f"tensor {tensor}," in fault for tensor in TENSORS)
        path.write_bytes(content)
    assert fault_of(folder) == ""


def test_a_flipped_byte_is_named_with_both_checksums(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[70] ^= 1
    path.write_bytes(content)
    expected = json.loads((folder / "checksums.json").read_text())["files"]["__1_0.distcp"]["0"]
    with pytest.raises(CheckpointError, match=rf"__1_0\.distcp, tensor half, .*CRC-32 is \w{{8}}, expected {expected}"):
        Reader(folder).read("half")
    assert torch.equal(Reader(folder).read("counts"), TENSORS["counts"])


def replace_metadata(folder: Path, value: Any) -> None:
    """An index of other content, with its checksum: what an attacker, not a bad disk, would leave."""
    raw = pickle.dumps(value)
    (folder / ".metadata").write_bytes(raw)
    checksums = json.loads((folder / "checksums.json").read_text())
    checksums[".metadata"] = f"{crc32(raw):08x}"
    (folder / "checksums.json").write_text(json.dumps(checksums))


def spoil_checksum(path: Path) -> None:
    content = json.loads(path.read_text())
    next(iter(content["files"].values()))["0"] = "6e0b`957"
    path.write_text(json.dumps(content))


def edit_metadata(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        change(metadata)
        replace_metadata(folder, metadata)

    return edit


def first_box_twice(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata["half"].chunks
    chunks.append(chunks[0])


def place(metadata: Any, **changes: Any) -> None:
    vars(next(iter(metadata.storage_data.values()))).update(changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "__1_0.distcp").unlink(), r"__1_0.distcp cannot be opened: No such file.*tensor half"),
        (lambda f: os.truncate(f / "__1_0.distcp", 900), r"__1_0.distcp has 900 bytes, and tensor \w+"),
        (lambda f: (f / ".metadata").unlink(), r"\.metadata cannot be used: No such file"),
        (lambda f: (f / ".metadata").write_bytes(b""), r"\.metadata: its CRC-32 is 00000000, expected"),
        (lambda f: replace_metadata(f, [1]), r"holds a list where a Metadata belongs"),
        (lambda f: (f / "checksums.json").unlink(), r"checksums.json is missing"),
        (lambda f: (f / "checksums.json").write_text("[]"), r"checksums.json cannot be used"),
        (lambda f: spoil_checksum(f / "checksums.json"), r"checksums.json cannot be used .*base 16"),
        (edit_metadata(lambda m: m.state_dict_metadata["cube"].chunks.pop()), r"tensor cube has 30 of its 60 elements"),
        (edit_metadata(lambda m: m.state_dict_metadata["cube"].chunks.clear()), r"tensor cube has no part"),
        (edit_metadata(first_box_twice), r"tensor half holds the box \[6, 3\] at \[0, 0\] twice"),
        (edit_metadata(lambda m: setattr(m.state_dict_metadata["half"], "size", torch.Size((5, 10)))), r"has a box"),
        (edit_metadata(lambda m: place(m, relative_path="../other")), r"'../other', which is no name of a file"),
        (edit_metadata(lambda m: place(m, offset=-5)), r"negative"),
        (edit_metadata(lambda m: place(m, length=1 << 60)), r"has \d+ bytes, and tensor half"),
        (edit_metadata(lambda m: place(m, offset="a")), r"holds a str where a int belongs"),
        (edit_metadata(lambda m: m.storage_data.clear()), r"\.metadata cannot be used"),
        (edit_metadata(lambda m: m.state_dict_metadata.update(half=m.state_dict_metadata["cube"])), r"cannot be used"),
    ],
)  # fmt: skip
def test_damage_is_one_message(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Reader(folder)
    assert "use another one" in str(caught.value)


def test_an_index_says_nothing_that_the_file_does_not_hold(folder: Path) -> None:
    """Two records of one length and their checksums exchanged: the bytes around them still tell."""

    def exchange(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["counts"]
        entry.properties.dtype = torch.float64  # of the same size

    edit_metadata(exchange)(folder)
    with pytest.raises(CheckpointError, match=r"tensor counts, .*the bytes around it|tensor counts"):
        Reader(folder).read("counts")


def test_the_index_runs_no_code(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "made by the pickle"

    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(victim),)

    replace_metadata(folder, Attack())
    with pytest.raises(CheckpointError, match=r"names (posix|os)\.mkdir"):
        Reader(folder)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([((4,), (0,), 2)], "has 2 of its 4 elements"),
        ([((4,), (0,), 3), ((4,), (2,), 2)], "twice"),
        ([((4,), (0,), 2), ((5,), (2,), 2)], "two shapes"),
        ([((4,), (3,), 2)], "has a box"),
    ],
)
def test_boxes_that_do_not_make_up_a_tensor_are_not_published(
    tmp_path: Path, boxes: list[tuple[tuple[int], tuple[int], int]], message: str
) -> None:
    writer = FileWriter(tmp_path, 0)
    for whole, offset, count in boxes:
        writer.write("a", whole, offset, torch.zeros(count))
    with pytest.raises(CheckpointError, match=message):
        write_index(tmp_path, [writer.close()])
    assert not (tmp_path / ".metadata").exists()


def write_small(writer: FileWriter) -> None:
    for i in range(40):  # what the buffer holds is refused at the end
        writer.write(f"a{i}", (1,), (0,), torch.zeros(1))
    writer.close()


def test_a_full_disk_is_an_oserror(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        large = FileWriter(tmp_path, 0)
        with pytest.raises(OSError, match="File too large"):
            large.write("a", (10_000,), (0,), torch.zeros(10_000))
        small = FileWriter(tmp_path, 1)
        with pytest.raises(OSError, match="File too large"):
            write_small(small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def old_folder(path: Path, tensors: dict[str, Tensor]) -> Path:
    """As megaeva wrote it before checksums: by torch."""
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    return path


def test_a_folder_without_checksums_is_read(tmp_path: Path) -> None:
    reader = Reader(old_folder(tmp_path / "old", TENSORS))
    assert not reader.has_checksums
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor)
    (data,) = (tmp_path / "old").glob("*.distcp")
    shutil.copy(data, tmp_path / "copy")
    content = bytearray(data.read_bytes())
    content[:4] = b"junk"
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.distcp, tensor half"):
        Reader(tmp_path / "old").verify()
