"""The loader of a run whose data change on the way: what each phase gives, and where it continues."""

import functools
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megaeva.config.phases import run_phases
from megaeva.config.schema import Config
from megaeva.data import builder
from megaeva.data.batch import Batch
from megaeva.data.loader import Loader
from megaeva.data.phases import PhasedLoader
from megaeva.data.preflight import preflight
from megaeva.data.synthetic import make_shards
from megaeva.errors import DataError
from tests.helpers.trainer_recipe import model, trainer_recipe

NUM_PATCHES = 16
STEPS = (3, 2, 2)


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 49,408 words are read once, not for every loader."""
    monkeypatch.setattr(builder, "Tokenizer", _tokenizer)


_tokenizer = functools.cache(builder.Tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    make_shards(folder / "first", num_shards=4, samples_per_shard=9, image_size=32, seed=0)
    make_shards(folder / "second", num_shards=4, samples_per_shard=9, image_size=32, seed=1)
    with tarfile.open(folder / "first" / "broken.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))  # a sample without an image
    return folder


def recipe(folder: Path, **data: Any) -> Config:
    """Batches of 8; samples are cut to whole steps: 3, then 2 and 2."""
    first, second = ([str(folder / name / "*.tar")] for name in ("first", "second"))
    phases = [
        {"samples": 31, "train": first},
        {"samples": 12, "train": [*first, *second], "patch_dropout": 0.0},
        {"samples": 18, "train": first, "patch_dropout": 0.5},
    ]
    sections = {"phases": phases, "shuffle_buffer": 8, "decoder": "pillow", "max_dropped_share": 1.0}
    cfg = trainer_recipe(
        folder, "run", 7, model=model(1, 1), optim={"vision": {"lr": 1e-3}}, data=sections | data, seed=5
    )
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"total_samples": 61})})


def open_loader(cfg: Config, data_rank: int = 0, data_size: int = 1) -> PhasedLoader:
    return PhasedLoader(cfg, data_rank=data_rank, data_size=data_size, num_patches=NUM_PATCHES)


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_each_phase_gives_the_batches_of_its_own_recipe(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = recipe(folder)
    loader = open_loader(cfg)
    expected, counted, figures = [], 0, []
    for phase, steps in zip(run_phases(cfg), STEPS, strict=True):
        alone = Loader(phase.cfg, data_rank=0, data_size=1, num_patches=NUM_PATCHES)
        assert phase.steps == steps
        expected += [next(alone) for _ in range(steps)]
        counted += alone.dropped.total()
    with caplog.at_level(logging.INFO):
        for batch in expected:
            found = next(loader)
            figures.append(loader.figures["phase"])
            assert found.keys == batch.keys and torch.equal(found.image_BCHW, batch.image_BCHW)
            for name in ("token_BL", "keep_BK"):
                one, other = getattr(found, name), getattr(batch, name)
                assert one is other is None or torch.equal(one, other)
    assert [None if b.keep_BK is None else b.keep_BK.shape[1] for b in expected] == [12] * 3 + [None] * 2 + [8] * 2
    assert figures == [1] * 3 + [2] * 2 + [3] * 2
    told = [record.message for record in caplog.records if record.message.startswith("phase")]
    assert [line.split(",")[0] for line in told] == ["phase 2 of 3: steps 4 to 5", "phase 3 of 3: steps 6 to 7"]
    assert "patch dropout 0, " in told[0] and "16 samples in whole steps" in told[0]
    assert loader.dropped.total() == counted > 0
    assert len(keys([next(loader) for _ in range(5)])) == 40, "the last phase has no end"


def test_shards_read_again_come_in_another_order_and_other_crops(folder: Path) -> None:
    first, _, third = (phase.cfg for phase in run_phases(recipe(folder)))
    one, other = (Loader(cfg, data_rank=0, data_size=1, num_patches=NUM_PATCHES) for cfg in (first, third))
    assert keys([next(one) for _ in range(4)]) != keys([next(other) for _ in range(4)])


def test_a_run_without_phases_is_as_its_loader(folder: Path) -> None:
    cfg = recipe(folder, phases=(), train=[str(folder / "first" / "*.tar")])
    alone = Loader(cfg, data_rank=0, data_size=1, num_patches=NUM_PATCHES)
    loader = open_loader(cfg)
    assert keys([next(loader) for _ in range(9)]) == keys([next(alone) for _ in range(9)])
    assert (loader.figures, loader.phases) == ({}, [])


@pytest.mark.parametrize("blocks", [1, 2], ids=["same blocks", "fewer blocks"])
@pytest.mark.parametrize("saved_at", [0, 2, 3, 4, 5, 7])
def test_a_saved_position_continues_in_any_phase(folder: Path, saved_at: int, blocks: int) -> None:
    cfg = recipe(folder)
    before = [open_loader(cfg, rank, blocks) for rank in range(blocks)]
    for loader in before:
        for _ in range(saved_at):
            next(loader)
    states = [loader.state_dict() for loader in before]
    resumed = open_loader(cfg)
    resumed.load_state_dicts(states)
    assert resumed.dropped == sum((loader.dropped for loader in before), start=type(resumed.dropped)())
    for _ in range(10 - saved_at):
        expected = keys([next(loader) for loader in before])
        assert list(next(resumed).keys) == expected
    assert resumed.dropped == sum((loader.dropped for loader in before), start=type(resumed.dropped)())


def test_a_position_in_a_phase_that_is_gone_is_refused(folder: Path) -> None:
    cfg = recipe(folder)
    loader = open_loader(cfg)
    for _ in range(6):
        next(loader)
    shorter = cfg.model_copy(update={"data": cfg.data.model_copy(update={"phases": cfg.data.phases[:2]})})
    with pytest.raises(DataError, match=r"is in phase 3; data\.phases has 2; resume with the phases of that run"):
        open_loader(shorter).load_state_dicts([loader.state_dict()])


def test_a_phase_to_come_with_too_few_shards_is_told_on_resuming(folder: Path) -> None:
    cfg = recipe(folder)
    states = []
    for rank in range(2):
        loader = open_loader(cfg, rank, 2)
        next(loader)
        states.append(loader.state_dict())
    last = cfg.data.phases[2].model_copy(update={"train": (str(folder / "second" / "000000.tar"),)})
    data = cfg.data.model_copy(update={"phases": (*cfg.data.phases[:2], last)})
    with pytest.raises(DataError, match=r"^data\.phases\.2: .* names 1 shards; 2 data ranks"):
        open_loader(cfg.model_copy(update={"data": data})).load_state_dicts(states)


def test_the_look_before_a_run_goes_into_every_phase(folder: Path, tmp_path: Path) -> None:
    lines = preflight(recipe(folder), 1).splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [
        "phase 1 of 3", "data", "phase 2 of 3", "data", "phase 3 of 3", "data",
    ]  # fmt: skip
    phases = [{"samples": 30, "train": [str(folder / "first" / "*.tar")]}, {"samples": 31, "train": ["no/*.tar"]}]
    with pytest.raises(DataError, match=r"^data\.phases\.1: .*no/\*\.tar"):
        preflight(recipe(folder, phases=phases), 1)
