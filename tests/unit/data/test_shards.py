"""Shard paths, what is read from a tar, the plan over workers, and positions in the stream."""

import io
import tarfile
from itertools import islice, pairwise
from pathlib import Path

import pytest

from megaeva.data.shards import Cursor, SampleStream, ShardReader, expand_shards, plan_epoch, read_shard, sample_rng
from megaeva.data.synthetic import make_shards
from megaeva.errors import DataError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_shards(tmp_path_factory.mktemp("shards"), num_shards=5, samples_per_shard=7, image_size=16)


def write_tar(path: Path, members: list[tuple[str, bytes]], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def names(stream: SampleStream, count: int) -> list[tuple[int, str]]:
    return [(placed.epoch, placed.sample.name) for placed in islice(stream, count)]


START = Cursor()


def open_stream(
    shards: list[Path],
    worker: int = 0,
    num_workers: int = 1,
    buffer: int = 4,
    *,
    seed: int = 3,
    cached_bytes: int = 0,
    cursor: Cursor = START,
) -> SampleStream:
    return SampleStream(
        shards,
        seed=seed,
        worker=worker,
        num_workers=num_workers,
        shuffle_buffer=buffer,
        cursor=cursor,
        reader=ShardReader(shards, cached_bytes),
    )


# ------------------------------------------------------------------------------------------------------ shard paths


def test_paths_globs_and_ranges_name_the_same_shards(shards: list[Path]) -> None:
    folder = shards[0].parent
    assert expand_shards([f"{folder}/{{000000..000004}}.tar"]) == shards
    assert expand_shards([f"{folder}/*.tar"]) == shards
    assert expand_shards(list(map(str, shards))) == shards
    assert expand_shards([f"{folder}/00000{{0,3}}.tar"]) == [shards[0], shards[3]]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("{000000..000005}.tar", "000005.tar does not exist"),
        ("nothing-*.tar", "nothing-[*].tar.*matches no file"),
        ("{000..12", "braces must be balanced"),
        (".", "is not a file"),
    ],
)
def test_a_wrong_pattern_names_the_path(shards: list[Path], pattern: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        expand_shards([f"{shards[0].parent}/{pattern}"])


def test_empty_twice_named_and_absent_shards_are_errors(shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "zero.tar").touch()
    with pytest.raises(DataError, match=r"zero\.tar is empty"):
        expand_shards([tmp_path / "zero.tar"])
    with pytest.raises(DataError, match=r"000000\.tar is named twice"):
        expand_shards([shards[0], f"{shards[0].parent}/*.tar"])
    with pytest.raises(DataError, match="list of shards is empty"):
        expand_shards([])


# ---------------------------------------------------------------------------------------------------- inside a shard


def test_unsafe_members_are_never_samples(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.txt", b"a"), ("../b.jpg", b"2"), ("/c.jpg", b"3"), ("d/../../e.txt", b"4")]
    path = write_tar(tmp_path / "x.tar", [*members, ("f.JPG", b"5"), ("f.txt", b"f")], links={"g.jpg": "/etc/passwd"})
    samples = list(read_shard(path))
    assert [(s.key, s.problem) for s in samples] == [
        ("a", None),
        ("../b.jpg", "unsafe_name"),
        ("/c.jpg", "unsafe_name"),
        ("d/../../e.txt", "unsafe_name"),
        ("f", None),
        ("g.jpg", "unsafe_name"),
    ]
    assert [s.index for s in samples] == list(range(6))
    assert samples[4].image == b"5"
    assert not any(s.files for s in samples if s.problem)


def test_a_huge_member_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaeva.data.shards._MAX_MEMBER_BYTES", 4)
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"12345"), ("a.txt", b"a"), ("b.jpg", b"1234"), ("b.txt", b"b")])
    assert [(s.key, s.problem, s.image) for s in read_shard(path)] == [("a", "too_large", None), ("b", None, b"1234")]


def test_duplicate_members_and_a_cut_tar_are_problems(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3" * 3000), ("b.txt", b"b")])
    assert [s.problem for s in read_shard(path)] == ["duplicate_member", None]
    path.write_bytes(path.read_bytes()[:4000])
    assert [(s.key, s.problem) for s in read_shard(path)][1:] == [("b", "damaged_shard")]


def test_what_is_no_tar_or_holds_no_sample_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("not a tar " * 200)
    with pytest.raises(DataError, match=r"text\.tar cannot be read.*must be a tar file"):
        list(read_shard(tmp_path / "text.tar"))
    with pytest.raises(DataError, match=r"none\.tar is empty"):
        list(read_shard(write_tar(tmp_path / "none.tar", [])))


# ------------------------------------------------------------------------------------------------- plan and position


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_each_epoch_deals_every_shard_to_one_worker(num_workers: int) -> None:
    plans = [
        [plan_epoch(5, seed=1, epoch=epoch, worker=w, num_workers=num_workers).tolist() for w in range(num_workers)]
        for epoch in range(4)
    ]
    for plan in plans:
        assert sorted(shard for part in plan for shard in part) == list(range(5))
        assert all(plan)
    assert len({str(plan) for plan in plans}) == 4


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_each_sample_once_in_an_epoch_over_all_workers(shards: list[Path], num_workers: int) -> None:
    epochs: dict[int, list[str]] = {0: [], 1: []}
    for worker in range(num_workers):
        stream = open_stream(shards, worker, num_workers)
        while (placed := next(stream)).epoch < 2:
            epochs[placed.epoch].append(placed.sample.name)
    for seen in epochs.values():
        assert len(seen) == 35
        assert len(set(seen)) == 35
    assert epochs[0] != epochs[1]


def test_the_order_is_shuffled_across_shards(shards: list[Path]) -> None:
    order = [name for _, name in names(open_stream(shards, buffer=100), 35)]
    shard_of = [name.split("/")[0] for name in order]
    assert sum(a != b for a, b in pairwise(shard_of)) > 15  # 4 if only shards were permuted
    other = open_stream(shards, buffer=100, seed=4)
    assert order != [name for _, name in names(other, 35)]


@pytest.mark.parametrize("buffer", [1, 4, 7, 10, 100])
@pytest.mark.parametrize("cached", [0, 1 << 30], ids=["streamed", "cached"])
def test_any_position_continues_exactly(shards: list[Path], buffer: int, cached: int) -> None:
    stream = open_stream(shards, 1, 2, buffer, cached_bytes=cached)
    cursors, order = [stream.cursor], []
    for _ in range(45):  # over two epoch borders
        order += names(stream, 1)
        cursors.append(stream.cursor)
    for place, cursor in enumerate(cursors[:40]):
        resumed = open_stream(shards, 1, 2, buffer, cursor=Cursor(**cursor.as_dict()))
        assert resumed.cursor == cursor
        assert names(resumed, 45 - place) == order[place:]


def test_a_position_in_shrunken_data_is_an_error(shards: list[Path], tmp_path: Path) -> None:
    stream = open_stream(shards, buffer=30)
    names(stream, 29)
    small = make_shards(tmp_path, num_shards=5, samples_per_shard=2, image_size=16)
    with pytest.raises(DataError, match="must be the ones of the run that saved it"):
        open_stream(small, buffer=30, cursor=stream.cursor)


def test_memory_is_one_buffer(shards: list[Path]) -> None:
    stream = open_stream(shards, buffer=10)
    for _ in range(60):
        next(stream)
        held = [s for s in [*stream._current.samples, *stream._next.samples] if s.files]
        assert len(held) <= 10 + 1


def test_random_numbers_depend_on_every_argument() -> None:
    draws = {
        sample_rng(*arguments).integers(1 << 62)
        for arguments in [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    }
    assert len(draws) == 5
    assert sample_rng(7, 2, "a", 5).random() == sample_rng(7, 2, "a", 5).random()
