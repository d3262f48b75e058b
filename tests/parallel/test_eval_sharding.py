"""One model, one set, any layout of ranks: the same features and figures on every rank, each sample once."""

import functools
import itertools
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor
from webdataset import TarWriter

from megaeva.config.schema import AxesSection, Config
from megaeva.config.topology import sharing_ranks, step_axes
from megaeva.data.evaluation import EvalBatch
from megaeva.data.synthetic import SHAPES, make_shards
from megaeva.data.tokenizer import Tokenizer
from megaeva.errors import DataError
from megaeva.eval import harness, masked
from megaeva.eval.features import encode_set, recipe_batches
from megaeva.eval.harness import evaluate
from megaeva.eval.masked import evaluate_masked
from megaeva.model.clip_model import build_clip
from megaeva.model.mim_student import MIMStudent
from megaeva.model.teacher import Teacher
from megaeva.model.vision_tower import VisionTower
from megaeva.parallel import grid as grid_module
from megaeva.parallel.grid import Grid, build_grids
from megaeva.parallel.runtime import Runtime
from tests.helpers.parallel_runs import fill
from tests.helpers.spawn import run_ranks

NUM_SAMPLES = 45
TP2, SP2, PP2 = {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}
# Axes of the vision tower or student, and of the text tower or teacher. Two data ranks have 23 and 22 samples, which
# are three batches and two; the short ones, of one sample, and the whole ones of 11 are filled up for two stages.
LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    2: {
        "dp2": ({}, {}),
        "tp2": (TP2, TP2),
        "tp2 sp": (SP2, SP2),
        "pp2": (PP2, {}),
        "pp2 vpp2": ({"pp": 2, "vpp": 2}, {}),
        "pp2, second tp2": (PP2, TP2),
        "tp2, second tp1": (TP2, {}),
        "tp1, second tp2": ({}, TP2),
    },
    4: {"pp2 dp2": (PP2, {}), "tp2 sp dp2": (SP2, SP2), "pp2 dp2, second tp2": (PP2, TP2)},
}


def _config(folder: Path, vision: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> dict[str, Any]:
    tower = {"hidden_size": 32, "num_heads": 2, "ffn_hidden_size": 64, "activation": "gelu"}
    return {
        "task": "contrastive",
        "run_dir": str(folder / "run"),
        "platform": "cpu",
        "model": {
            "embed_dim": 16,
            "vision": tower | {"image_size": 48, "patch_size": 12, "qkv_bias": "qkv", "num_layers": 4},
            "text": tower | {"context_length": 24, "num_layers": 2},
        },
        "data": {"decoder": "pillow"},
        "parallel": {"vision": vision or {}, "text": second or {}},
        "optim": {"vision": {"lr": 1e-3}},
        "train": {"total_samples": 8, "global_batch_size": 8, "precision": "fp32"},
        "eval": {
            "batch_size": 11,
            "retrieval": {"shapes": {"shards": [str(folder / "shards" / "*.tar")]}},
            "zero_shot": {
                "shapes": {"shards": [str(folder / "shards" / "*.tar")], "classes": str(folder / "classes.json")}
            },
        },
    }


class Evaluated(NamedTuple):
    """What one rank knows afterwards; the files only the main one."""

    results: dict[str, dict[str, float]]
    keys: tuple[str, ...]
    image_XE: Tensor
    text_XE: Tensor
    predictions: Any


def _evaluate(runtime: Runtime, raw: dict[str, Any]) -> Evaluated:
    cfg = Config.model_validate(raw)
    grids = build_grids(step_axes(cfg) | {"data": AxesSection(tp=sharing_ranks(cfg))}, runtime)
    model = build_clip(cfg.model, vision_grid=grids["vision"], text_grid=grids["text"])
    fill(model.vision, grids["vision"])
    fill(model.text, grids["text"])
    model.train()
    path = Path(cfg.run_dir) / "predictions.json"
    common = {"grid": grids["data"], "device": runtime.device}
    results = evaluate(model, cfg, **common, predictions=path)
    assert model.training, "the mode it was found in"
    batches = recipe_batches(cfg, cfg.eval.retrieval["shapes"].shards, grids["data"], Tokenizer(24))
    features = encode_set(model.eval(), batches, **common, batch_size=cfg.eval.batch_size, num_pictures=0)
    assert features.text_XE is not None
    predictions = json.loads(path.read_text()) if runtime.is_main else None
    return Evaluated(results, features.keys, features.image_XE, features.text_XE, predictions)


def _evaluate_masked(runtime: Runtime, raw: dict[str, Any]) -> tuple[float, Any]:
    """The score, and the examples as the main rank reads them."""
    raw = raw | {"task": "mim", "mim": {"mask": {"num_masked": 6, "min_block": 1}}, "teacher": {"checkpoint": "x"}}
    raw["parallel"] = {"vision": raw["parallel"]["vision"], "teacher": raw["parallel"]["text"]}
    cfg = Config.model_validate(raw)
    grids = build_grids(step_axes(cfg) | {"data": AxesSection(tp=sharing_ranks(cfg))}, runtime)
    student = MIMStudent(cfg.model.vision, cfg.model.embed_dim, grid=grids["student"])
    fill(student, grids["student"])
    teacher = VisionTower(cfg.model.vision, cfg.model.embed_dim, grid=grids["teacher"])
    fill(teacher, grids["teacher"])
    path = Path(cfg.run_dir) / "masked.json"
    results = evaluate_masked(student, Teacher(teacher), cfg, grid=grids["data"], device=runtime.device, examples=path)
    return results["mim/shapes"]["cosine"], json.loads(path.read_text()) if runtime.is_main else None


Both = tuple[Evaluated, tuple[float, Any]]


def _evaluate_both(runtime: Runtime, folder: Path, vision: dict[str, Any], second: dict[str, Any]) -> Both:
    raw = _config(folder, vision, second)
    return _evaluate(runtime, raw), _evaluate_masked(runtime, raw)


def _evaluate_layouts(runtime: Runtime, folder: Path, num_ranks: int) -> tuple[dict[str, Both], str]:
    """What each layout finds, and what the first one says of a set with a broken sample of the second data rank."""
    # Process groups hold threads as long as the process lives; layouts of equal axes share them.
    grid_module.build_grid = functools.cache(grid_module.build_grid)
    layouts = LAYOUTS[num_ranks]
    found = {name: _evaluate_both(runtime, folder, *axes) for name, axes in layouts.items()}
    raw = _config(folder, *next(iter(layouts.values())))
    raw["eval"]["retrieval"] = {"shapes": {"shards": [str(folder / "broken.tar")]}}
    with pytest.raises(DataError) as caught:
        _evaluate(runtime, raw)
    return found, str(caught.value)


def _cut_short(failing: bool) -> Callable[..., Iterator[EvalBatch]]:
    """`recipe_batches`, but rank 1 of each data block fails at its second batch, or finds the set to end before it."""

    def batches(cfg: Config, shards: Any, grid: Grid, tokenizer: Tokenizer | None) -> Iterator[EvalBatch]:
        found = recipe_batches(cfg, shards, grid, tokenizer)
        if grid.tp_rank == 0:
            yield from found
            return
        yield from itertools.islice(found, 1)
        if failing:
            raise OSError("the disk is gone")

    return batches


def _evaluate_cut_short(runtime: Runtime, folder: Path) -> list[tuple[str, float]]:
    """What is said, and after how many seconds: contrastive and masked, of a rank that fails and one that ends."""
    # Process groups hold threads as long as the process lives; layouts of equal axes share them.
    grid_module.build_grid = functools.cache(grid_module.build_grid)
    raw = _config(folder, TP2, TP2)
    found = []
    for failing in (True, False):
        harness.recipe_batches = masked.recipe_batches = _cut_short(failing)
        for evaluate_one in (_evaluate, _evaluate_masked):
            start = time.monotonic()
            with pytest.raises((DataError, OSError)) as caught:
                evaluate_one(runtime, raw)
            found.append((f"{caught.type.__name__}: {caught.value}", time.monotonic() - start))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    make_shards(folder / "shards", num_shards=3, samples_per_shard=NUM_SAMPLES // 3)
    classes = {"classes": list(SHAPES), "templates": ["a {}.", "a picture of a {}.", "{}"]}
    (folder / "classes.json").write_text(json.dumps(classes))
    with TarWriter(str(folder / "broken.tar")) as writer:
        writer.write({"__key__": "good", "jpg": _first_jpeg(folder), "txt": b"a red circle", "json": b"{}"})
        writer.write({"__key__": "bad", "jpg": b"not an image", "txt": b"a blue square", "json": b"{}"})
    return folder


def _first_jpeg(folder: Path) -> bytes:
    with tarfile.open(folder / "shards" / "000000.tar") as tar:
        member = next(m for m in tar if m.name.endswith(".jpg"))
        file = tar.extractfile(member)
        assert file is not None
        return file.read()


@pytest.fixture(scope="module")
def alone(runtime: Runtime, folder: Path) -> Both:
    return _evaluate_both(runtime, folder, {}, {})


@pytest.fixture(scope="module", params=LAYOUTS)
def job(folder: Path, request: pytest.FixtureRequest) -> list[tuple[dict[str, Both], str]]:
    return run_ranks(_evaluate_layouts, request.param, folder, request.param)


@pytest.fixture
def ranks(job: list[tuple[dict[str, Both], str]]) -> list[dict[str, Both]]:
    return [found for found, _ in job]


def test_figures_could_differ(alone: Both) -> None:
    evaluated, (cosine, _) = alone
    assert set(evaluated.results) == {"retrieval/shapes", "zero_shot/shapes"}
    assert 0 < evaluated.results["retrieval/shapes"]["image_to_text_r10"] < 1
    assert 0 < evaluated.results["zero_shot/shapes"]["top1"] < 1
    assert 0 < abs(cosine) < 0.9
    for feature_XE in (evaluated.image_XE, evaluated.text_XE):
        spread = (feature_XE - feature_XE.mean(0)).norm() / feature_XE.norm()
        assert spread > 0.01, "samples apart by much more than is tolerated below"


def test_each_sample_once_and_the_same_figures(alone: Both, ranks: list[dict[str, Both]]) -> None:
    exact, _ = alone
    assert len(set(exact.keys)) == NUM_SAMPLES
    for found in ranks:
        for layout, (evaluated, _) in found.items():
            assert evaluated.keys == exact.keys, layout
            assert evaluated.results == exact.results, layout


def test_features_are_those_of_one_rank(alone: Both, ranks: list[dict[str, Both]]) -> None:
    exact, _ = alone
    for found in ranks:
        for layout, (evaluated, _) in found.items():
            for name in ("image_XE", "text_XE"):
                here, there = getattr(evaluated, name), getattr(exact, name)
                # fp32 sums in another order.
                assert ((here - there).norm(dim=1) < 1e-5 * there.norm(dim=1)).all(), (layout, name)


def test_predictions_show_the_same_pictures_and_ranks(alone: Both, ranks: list[dict[str, Both]]) -> None:
    exact, _ = alone
    for layout, (evaluated, _) in ranks[0].items():
        if layout == "dp2":
            assert evaluated.predictions == exact.predictions, "the same sums in the same order"
        for here, there in zip(evaluated.predictions["shapes"], exact.predictions["shapes"], strict=True):
            assert [here[key] for key in ("key", "captions", "ahead", "png")] == [
                there[key] for key in ("key", "captions", "ahead", "png")
            ], layout


def test_the_masked_score_is_that_of_one_rank(alone: Both, ranks: list[dict[str, Both]]) -> None:
    _, (exact, stored) = alone
    for found in ranks:
        for layout, (_, (cosine, _)) in found.items():
            assert cosine == pytest.approx(exact, rel=1e-5), layout
    for layout, (_, (_, here)) in ranks[0].items():
        for example, other in zip(here["examples"], stored["examples"], strict=True):
            assert [example[key] for key in ("key", "caption", "png")] == [
                other[key] for key in ("key", "caption", "png")
            ]
            # Rounded to three digits in the file.
            assert example["cosine"] == [c if c is None else pytest.approx(c, abs=1.1e-3) for c in other["cosine"]], (
                layout
            )


def test_broken_sample_of_one_rank_stops_all(job: list[tuple[dict[str, Both], str]]) -> None:
    texts = [text for _, text in job]
    assert all("bad" in text for text in texts)
    others, own = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    assert all("data rank 1 failed" in text for text in others)
    assert not any("data rank" in text for text in own)


def test_a_rank_that_reads_less_than_its_block_stops_all_at_once(folder: Path) -> None:
    first, second = run_ranks(_evaluate_cut_short, 2, folder)
    # The timeout of their collectives is a minute.
    assert all(seconds < 10 for _, seconds in first + second)
    for task in range(2):
        assert second[task][0] == "OSError: the disk is gone"
        assert first[task][0].startswith("DataError: rank 1 of this data block failed while reading: OSError: the disk")
    for task in range(2, 4):
        assert "rank 1 of this data block has read the end of the evaluation set where rank 0" in first[task][0]
        assert "rank 0 of this data block has read 11 samples from " in second[task][0]
