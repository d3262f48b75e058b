"""Batches: what is in them, exact resume, broken samples, workers, evaluation."""

import io
import json
import os
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megaeva.config.schema import AugmentSection, Config
from megaeva.data import builder as builder_module
from megaeva.data import loader as loader_module
from megaeva.data.batch import Batch
from megaeva.data.evaluation import EvalBatch, eval_batches
from megaeva.data.loader import Loader
from megaeva.data.shards import SampleStream, ShardReader, expand_shards
from megaeva.data.synthetic import make_shards
from megaeva.data.tokenizer import Tokenizer
from megaeva.errors import DataError
from tests.helpers.data_recipe import NUM_PATCHES, data_recipe

EPOCH = 6 * 10  # samples


def recipe(
    shards: object, *, task: str = "contrastive", batch: int = 8, patch_dropout: float = 0.5, **data: object
) -> Config:
    """Every sample is augmented in its own way."""
    augment = AugmentSection(scale=(0.4, 1.0), horizontal_flip=0.5)
    data = {"shuffle_buffer": 9, "augment": augment, "decoder": "pillow"} | data
    return data_recipe(shards, task=task, batch=batch, patch_dropout=patch_dropout, **data)


def open_loader(cfg: Config, data_rank: int = 0, data_size: int = 1) -> Loader:
    return Loader(cfg, data_rank=data_rank, data_size=data_size, num_patches=NUM_PATCHES)


def take(loader: Loader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [b.keys for b in ours] == [b.keys for b in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("image_BCHW", "token_BL", "mask_BN", "keep_BK"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b), name


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, num_shards=6, samples_per_shard=10, image_size=32)
    return folder / "*.tar"


def jpeg(seed: int = 0, size: tuple[int, int] = (32, 32)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


# ----------------------------------------------------------------------------------------------------------- content


def test_a_contrastive_batch(shards: Path) -> None:
    batch = next(open_loader(recipe(shards)))
    assert batch.image_BCHW.shape == (8, 3, 24, 24)
    assert batch.image_BCHW.dtype == torch.float32
    assert batch.image_BCHW.is_contiguous()
    assert -2.5 < batch.image_BCHW.min() < batch.image_BCHW.max() < 2.7
    assert batch.mask_BN is None
    assert batch.keep_BK is not None
    assert batch.keep_BK.shape == (8, NUM_PATCHES // 2)
    captions: dict[str, str] = {}
    for read in eval_batches(
        [shards],
        image_size=24,
        resize="crop",
        batch_size=16,
        data_rank=0,
        data_size=1,
        tokenizer=None,
        decoder="pillow",
    ):
        captions |= dict(zip(read.keys, read.captions))
    assert batch.token_BL is not None
    assert torch.equal(batch.token_BL, Tokenizer(12)([captions[key] for key in batch.keys]))


def test_a_mim_batch_needs_no_caption(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", [{"jpg": jpeg(i)} for i in range(10)])
    batch = next(open_loader(recipe(path, task="mim")))
    assert batch.token_BL is None
    assert batch.keep_BK is None
    assert batch.mask_BN is not None
    assert batch.mask_BN.shape == (8, NUM_PATCHES)
    assert batch.mask_BN.dtype == torch.bool
    assert ((batch.mask_BN.sum(1) >= 1) & (batch.mask_BN.sum(1) <= 6)).all()
    assert len({tuple(row.tolist()) for row in batch.mask_BN}) > 3


def test_crops_are_a_function_of_the_sample_and_the_epoch(shards: Path) -> None:
    """The same on one rank and on two; different in the next epoch."""

    def by_key(loaders: list[Loader], skip: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for loader in loaders:
            for batch in take(loader, EPOCH // 6 // len(loaders) + skip)[skip:]:
                found |= dict(zip(batch.keys, batch.image_BCHW))
        return found

    cfg = recipe(shards, batch=6)
    alone = by_key([open_loader(cfg)], 0)
    pair_cfg = recipe(shards, batch=12)
    pair = by_key([open_loader(pair_cfg, rank, 2) for rank in range(2)], 0)
    assert len(alone) == len(pair) == EPOCH
    assert all(torch.equal(alone[key], pair[key]) for key in alone)
    second = by_key([open_loader(cfg)], EPOCH // 6)
    assert second.keys() == alone.keys()
    assert sum(torch.equal(alone[key], second[key]) for key in alone) < 3


def test_dali_batches_hold_the_same_samples(shards: Path) -> None:
    pytest.importorskip("nvidia.dali")
    ours, theirs = (take(open_loader(recipe(shards, decoder=d)), 2) for d in ("dali", "pillow"))
    for one, other in zip(ours, theirs):
        assert one.keys == other.keys
        assert torch.equal(one.keep_BK, other.keep_BK)  # type: ignore[arg-type]
        assert (one.image_BCHW - other.image_BCHW).abs().mean() < 0.01


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("task", ["contrastive", "mim"])
@pytest.mark.parametrize("data_size", [1, 2])
def test_resume_continues_with_the_very_same_batches(shards: Path, task: str, data_size: int) -> None:
    cfg = recipe(shards, task=task, batch=7 * data_size)
    for data_rank in range(data_size):
        loader = open_loader(cfg, data_rank, data_size)
        states, batches = [loader.state_dict()], []
        for _ in range(20):  # over two epoch borders, none at the end of a batch
            batches += take(loader, 1)
            states.append(loader.state_dict())
        for k in (0, 1, 4, 8, 9, 13, 17):
            resumed = open_loader(cfg, data_rank, data_size)
            # Each block has its own streams here, and what it saved is enough for it.
            resumed.load_state_dicts([json.loads(json.dumps(states[k]))])
            assert resumed.state_dict() == states[k]
            assert_equal(take(resumed, 3), batches[k : k + 3])
        assert len(json.dumps(states[-1])) < 1000


def test_loading_a_state_goes_back_in_the_same_loader(shards: Path) -> None:
    loader = open_loader(recipe(shards))
    take(loader, 2)
    state = loader.state_dict()
    expected = take(loader, 2)
    loader.load_state_dicts([state])
    assert_equal(take(loader, 2), expected)


def test_each_row_and_turn_has_a_stream_of_its_own(shards: Path) -> None:
    """The order of every run that there has been: worker t of data rank r reads stream r * workers + t."""
    cfg = recipe(shards, batch=6, num_workers=2)
    start = [open_loader(cfg, rank, 2).state_dict() for rank in range(2)]
    paths = expand_shards([str(shards)])
    for rank in range(2):
        loader = open_loader(recipe(shards, batch=6), rank, 2)
        loader.load_state_dicts(start)
        streams = [
            SampleStream(
                paths,
                seed=cfg.seed,
                worker=2 * rank + turn,
                num_workers=4,
                shuffle_buffer=9,
                reader=ShardReader(paths, 0),
            )
            for turn in range(2)
        ]
        for step in range(12):
            assert next(loader).keys == tuple(next(streams[step % 2]).sample.name for _ in range(3))


def test_worker_processes_resume_and_cover_the_epoch(shards: Path) -> None:
    cfg = recipe(shards, batch=6, num_workers=2)
    loader = open_loader(cfg)
    states, batches = [loader.state_dict()], []
    for _ in range(10 + 5):
        batches += take(loader, 1)
        states.append(loader.state_dict())
    loader.close()
    assert len({key for batch in batches[:10] for key in batch.keys}) == EPOCH
    k = 9  # the second worker's turn, and the epoch border right after it
    resumed = open_loader(cfg)
    resumed.load_state_dicts([states[k]])
    assert_equal(take(resumed, 4), batches[k : k + 4])
    assert resumed.state_dict() == states[k + 4]
    resumed.close()
    # One worker, or the trainer itself, takes both turns; here as the second of two blocks.
    for num_workers in (0, 1):
        moved = open_loader(recipe(shards, batch=6, num_workers=num_workers), 1, 2)
        moved.load_state_dicts([states[k]])
        assert_equal(take(moved, 4), [batch.in_parts(2)[1] for batch in batches[k : k + 4]])
        moved.close()
    with pytest.raises(DataError, match=r"num_workers=3 must divide the 2 turns .* set it to 1, 2, or 0"):
        open_loader(recipe(shards, batch=6, num_workers=3)).load_state_dicts([states[k]])


def test_the_thread_builds_what_the_trainer_would(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(open_loader(recipe(shards)), 6)
    # Reading as beside a GPU decoder; Pillow still decodes.
    monkeypatch.setattr(loader_module, "gpu_index", lambda platform: 0)
    loader = open_loader(recipe(shards, num_workers=3, decoder="auto"))
    ours = take(loader, 3)
    state = loader.state_dict()
    assert_equal(ours + take(loader, 3), expected)
    loader.load_state_dicts([state])
    assert_equal(take(loader, 3), expected[3:])
    loader.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda cfg, shards: recipe(shards, shuffle_buffer=10), "shuffle_buffer=9 then, 10 now"),
        (lambda cfg, shards: recipe(shards, num_workers=2), "num_workers=2 must divide the 1 turns"),
        (lambda cfg, shards: recipe(shards, batch=16), "global_batch_size=8 then, 16 now"),
        (lambda cfg, shards: cfg.model_copy(update={"seed": 6}), "seed=5 then, 6 now"),
        (lambda cfg, shards: recipe(str(shards).replace("*", "{000000..000004}")), "num_shards=6 then, 5 now"),
    ],
    ids=["buffer", "workers", "batch", "seed", "shards"],
)
def test_a_position_of_another_run_is_refused(
    shards: Path, change: Callable[[Config, Path], Config], named: str
) -> None:
    cfg = recipe(shards)
    state = open_loader(cfg).state_dict()
    with pytest.raises(DataError, match=named):
        open_loader(change(cfg, shards)).load_state_dicts([state])
    with pytest.raises(DataError, match="of version 1; this megaeva reads version 3"):
        open_loader(cfg).load_state_dicts([state | {"version": 1}])


# ----------------------------------------------------------------------------------------- other numbers of data blocks

EPOCH_STEPS = 4  # of 12 samples


@pytest.fixture(scope="module")
def broken_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 shards of 6 samples, of which 4 can be used: one caption is no text, one image ends early."""
    folder = tmp_path_factory.mktemp("broken_shards")
    for shard in range(12):
        samples = [{"jpg": jpeg(6 * shard + i), "txt": f"number {6 * shard + i}".encode()} for i in range(6)]
        samples[shard % 6]["txt"] = b"\xff"
        samples[(shard + 2) % 6]["jpg"] = WHOLE[: len(WHOLE) // 2]
        write_shard(folder / f"{shard:02d}.tar", samples)
    return folder / "*.tar"


class Blocks:
    """The loaders of all data blocks."""

    def __init__(self, shards: Path, size: int, states: list[dict[str, object]] | None = None) -> None:
        cfg = recipe(shards, batch=12, shuffle_buffer=7, max_dropped_share=0.5)
        self.loaders = [open_loader(cfg, rank, size) for rank in range(size)]
        if states is not None:
            for loader in self.loaders:
                loader.load_state_dicts(states)

    def states(self) -> list[dict[str, object]]:
        return json.loads(json.dumps([loader.state_dict() for loader in self.loaders]))

    def take(self) -> Batch:
        """The next global batch."""
        parts = [next(loader) for loader in self.loaders]
        assert {len(part) for part in parts} == {12 // len(parts)}
        whole = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("image_BCHW", "token_BL", "keep_BK")
        }
        return Batch(keys=tuple(key for part in parts for key in part.keys), **whole)

    def dropped(self) -> dict[str, int]:
        return dict(sum((loader.dropped for loader in self.loaders), start=Counter()))


@pytest.mark.parametrize(
    ("first", "num_workers", "moves"),
    [
        (1, 1, {2: 2, 5: 4, 7: 2}),
        (1, 4, {1: 12, 2: 3, 9: 1}),
        (2, 1, {0: 4, 3: 1, 6: 2}),
        (2, 2, {1: 3, 3: 4, 6: 1, 9: 6}),
        (3, 2, {3: 2, 5: 4, 6: 3}),
        (4, 1, {1: 3, 2: 6, 7: 1}),
        (6, 2, {5: 1, 6: 4}),
    ],
)
def test_a_run_that_moves_sees_the_global_batches_of_one_that_never_does(
    broken_shards: Path, first: int, num_workers: int, moves: dict[int, int]
) -> None:
    """`moves`: step -> number of data blocks from there on; broken samples stay replaced and counted as they were."""
    cfg = recipe(broken_shards, batch=12, shuffle_buffer=7, max_dropped_share=0.5, num_workers=num_workers)
    # Not started: no worker process is needed for the streams that a run of these workers has.
    start = [open_loader(cfg, rank, first).state_dict() for rank in range(first)]
    home, moving = Blocks(broken_shards, first, start), Blocks(broken_shards, first, start)
    seen: list[str] = []
    for step in range(3 * EPOCH_STEPS):
        if step in moves:
            moving = Blocks(broken_shards, moves[step], moving.states())
        expected, found = home.take(), moving.take()
        assert_equal([found], [expected])
        assert moving.dropped() == home.dropped(), step
        seen += found.keys
    epochs = [sorted(seen[at : at + 48]) for at in range(0, len(seen), 48)]
    assert len(set(epochs[0])) == 48
    assert epochs[1] == epochs[2] == epochs[0]
    merged = {name: stream for state in moving.states() for name, stream in state["streams"].items()}  # type: ignore[attr-defined]
    assert merged == {name: stream for state in home.states() for name, stream in state["streams"].items()}  # type: ignore[attr-defined]
    names = [name for state in moving.states() for name in state["streams"]]  # type: ignore[attr-defined]
    assert len(names) == len(set(names)) == first * num_workers, "a stream is counted by one block"


def test_blocks_that_share_a_row_say_what_it_costs(broken_shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    home = Blocks(broken_shards, 2)
    home.take()
    assert "data blocks" not in caplog.text
    Blocks(broken_shards, 1, home.states()).take()
    assert "this run began with 2 data blocks, now 1 read its streams: global batches stay the same\n" in caplog.text
    caplog.clear()
    Blocks(broken_shards, 3, home.states()).take()
    assert caplog.text.count("some share a row, so one decodes up to 12 images a step to use 4") == 1


# ------------------------------------------------------------------------------------------------------ broken input

WHOLE = jpeg()
BROKEN: list[tuple[str, dict[str, bytes]]] = [
    ("truncated_image", {"jpg": WHOLE[: len(WHOLE) // 2], "txt": b"x"}),
    ("decompression_bomb", {"jpg": jpeg(1, (200, 200)), "txt": b"x"}),
    ("bad_caption", {"jpg": WHOLE, "txt": b"\xff\xfe caf\xe9"}),
    ("empty_caption", {"jpg": WHOLE, "txt": b" \n"}),
    ("missing_caption", {"jpg": WHOLE}),
    ("missing_image", {"txt": b"x"}),
    ("not_an_image", {"png": b"<html>404</html>", "txt": b"x"}),
]


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_broken_samples_are_skipped_and_counted(tmp_path: Path, decoder: str, caplog: pytest.LogCaptureFixture) -> None:
    good = [{"jpg": jpeg(i), "txt": f"number {i}".encode()} for i in range(21)]
    path = write_shard(tmp_path / "x.tar", [*good[:10], *(sample for _, sample in BROKEN), *good[10:]])
    cfg = recipe(path, batch=7, max_dropped_share=0.5, max_image_pixels=32 * 32, decoder=decoder)
    loader = open_loader(cfg)
    batches = take(loader, 3)
    keys = [key for batch in batches for key in batch.keys]
    broken_keys = {f"x/{number:04d}" for number in range(10, 17)}
    assert len(set(keys)) == 21
    assert not broken_keys & set(keys)
    next(loader)
    assert loader.dropped.keys() == {reason for reason, _ in BROKEN}
    assert set(loader.first_dropped["bad_caption"]) == {"x/0012"}
    assert caplog.text.count("is skipped") == len(BROKEN)
    # tokens, pixels and keys still belong together
    by_key = {f"x/{n:04d}": f"number {n if n < 10 else n - 7}" for n in range(28)}
    for batch in batches:
        assert torch.equal(batch.token_BL, Tokenizer(12)([by_key[key] for key in batch.keys]))  # type: ignore[arg-type]
    # and resume is exact among them
    for k in range(1, 8):
        fresh = open_loader(cfg)
        take(fresh, k)
        resumed = open_loader(cfg)
        resumed.load_state_dicts([fresh.state_dict()])
        assert_equal(take(resumed, 3), take(fresh, 3))
        assert resumed.dropped == fresh.dropped


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_broken_samples_stop_the_run(tmp_path: Path, num_workers: int) -> None:
    samples = [{"jpg": jpeg(i), "txt": b"x"} for i in range(9)] + [{"jpg": WHOLE, "txt": b"\xff"}] * 3
    loader = open_loader(recipe(write_shard(tmp_path / "x.tar", samples), batch=4, num_workers=num_workers))
    message = (
        r"3 of 12 samples are broken: 3 bad_caption \(not UTF-8; first: x/\d+, x/\d+, x/\d+\); "
        r"at most .*max_dropped_share=0.01"
    )
    with pytest.raises(DataError, match=message):
        take(loader, 10)


def test_only_broken_samples_never_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shard(tmp_path / "x.tar", [{"jpg": WHOLE} for _ in range(50)])
    with pytest.raises(DataError, match="11 of 11 samples are broken: 11 missing_caption"):
        next(open_loader(recipe(path)))
    monkeypatch.setattr(builder_module, "MIN_SEEN", 10)
    with pytest.raises(DataError, match="1 of 1 samples are broken"):
        next(open_loader(recipe(path)))
    with pytest.raises(DataError, match="6 of 6 samples are broken"):
        next(open_loader(recipe(path, max_dropped_share=0.5)))


def test_fewer_shards_than_workers(shards: Path) -> None:
    with pytest.raises(DataError, match=r"names 6 shards; 2 data ranks x 4 workers .* 8 in all"):
        next(open_loader(recipe(shards, num_workers=4), 0, 2))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_no_tar_is_named(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "odd.tar").write_text("hello" * 1000)
    with pytest.raises(DataError, match=r"odd\.tar cannot be read.*data rank 0, worker 0"):
        next(open_loader(recipe(tmp_path / "odd.tar", num_workers=num_workers)))


def test_a_killed_worker_is_an_error(shards: Path) -> None:
    loader = open_loader(recipe(shards, num_workers=1))
    next(loader)
    workers = torch.multiprocessing.active_children()
    assert workers
    for worker in workers:
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # nothing is raised here, between two batches: a step may be running
    with pytest.raises(DataError, match=r"a data worker of data rank 0 died.*lower data.num_workers"):
        take(loader, 10)


def test_a_stop_of_the_job_leaves_the_trainer_its_batches(shards: Path) -> None:
    loader = open_loader(recipe(shards, num_workers=1))
    next(loader)
    (worker,) = torch.multiprocessing.active_children()
    assert worker.pid
    assert os.getpgid(worker.pid) != os.getpgid(0)  # where Ctrl-C and torchrun's SIGTERM go
    os.kill(worker.pid, signal.SIGTERM)
    take(loader, 10)
    loader.close()  # ends it, and others would hang here
    worker.join(20)
    assert not worker.is_alive()


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate(shards: object, data_rank: int = 0, data_size: int = 1, **other: object) -> list[EvalBatch]:
    arguments = {"image_size": 24, "resize": "crop", "batch_size": 16, "tokenizer": Tokenizer(12), "decoder": "pillow"}
    return list(
        eval_batches([str(shards)], data_rank=data_rank, data_size=data_size, **(arguments | other))  # type: ignore[arg-type]
    )


def test_evaluation_sees_each_sample_once_over_all_ranks(shards: Path) -> None:
    alone = evaluate(shards)
    assert [len(batch) for batch in alone] == [16, 16, 16, 12]
    keys = [key for batch in alone for key in batch.keys]
    assert keys == sorted(set(keys))
    assert all(c == m["name"] for batch in alone for c, m in zip(batch.captions, batch.metas))
    pixels = dict(zip(keys, torch.cat([b.image_BCHW for b in alone])))
    seen: list[str] = []
    for rank in range(7):
        for batch in evaluate(shards, rank, 7):
            seen += batch.keys
            assert [i % 7 for i in batch.indices] == [rank] * len(batch)
            assert all(torch.equal(pixels[key], image) for key, image in zip(batch.keys, batch.image_BCHW))
    assert sorted(seen) == keys


def test_evaluation_refuses_broken_samples(tmp_path: Path) -> None:
    for reason, sample in [
        BROKEN[0],
        BROKEN[2],
        BROKEN[4],
        BROKEN[5],
        ("bad_json", {"jpg": WHOLE, "txt": b"x", "json": b"["}),
    ]:
        path = write_shard(tmp_path / "x.tar", [{"jpg": WHOLE, "txt": b"x"}, sample])
        with pytest.raises(DataError, match=rf"sample 0001 of the evaluation shard .*x\.tar is broken: {reason}"):
            evaluate(path)
    path = write_shard(tmp_path / "y.tar", [{"jpg": WHOLE}])
    assert evaluate(path, tokenizer=None)[0].captions == ("",)
