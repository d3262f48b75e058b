"""One model, one set, one and several ranks: the same figures to the last digit, on every rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megaeva.config.schema import Config
from megaeva.data.synthetic import SHAPES, make_shards
from tests.helpers.spawn import run_ranks


def _config(folder: Path, tp: int = 1) -> dict[str, Any]:
    tower = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 64, "activation": "gelu"}
    return {
        "task": "contrastive",
        "run_dir": str(folder / "run"),
        "platform": "cpu",
        "model": {
            "embed_dim": 16,
            "vision": tower | {"image_size": 48, "patch_size": 12, "qkv_bias": "qkv"},
            "text": tower | {"context_length": 24},
        },
        "data": {"decoder": "pillow"},
        "parallel": {"vision": {"tp": tp}, "text": {"tp": tp}},
        "optim": {"vision": {"lr": 1e-3}},
        "train": {"total_samples": 8, "global_batch_size": 8, "precision": "fp32"},
        "eval": {
            "batch_size": 8,  # divides neither the set nor a rank's share of it
            "retrieval": {"shapes": {"shards": [str(folder / "shards" / "*.tar")]}},
            "zero_shot": {
                "shapes": {"shards": [str(folder / "shards" / "*.tar")], "classes": str(folder / "classes.json")}
            },
        },
    }


def _evaluate(runtime: Any, raw: dict[str, Any]) -> tuple[dict[str, dict[str, float]], Any]:
    from megaeva.eval.harness import evaluate
    from megaeva.model import build_clip, init_weights
    from megaeva.parallel.grid import build_grid

    cfg = Config.model_validate(raw)
    grid = build_grid(cfg.parallel.vision, runtime)
    model = build_clip(
        cfg.model, vision_grid=grid, text_grid=grid, precision="fp32", layer_spec="local", device=torch.device("cpu")
    )
    init_weights(model, seed=0, task="contrastive", grid=grid)
    model.train()
    path = Path(cfg.run_dir) / "predictions.json"
    results = evaluate(model, cfg, grid=grid, device=runtime.device, predictions=path)
    assert model.training, "the mode it was found in"
    return results, json.loads(path.read_text()) if runtime.is_main else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    make_shards(folder / "shards", num_shards=3, samples_per_shard=15)
    classes = {"classes": list(SHAPES), "templates": ["a {}.", "a picture of a {}.", "{}"]}
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    return run_ranks(_evaluate, 1, _config(folder))[0]


def test_two_data_ranks_give_the_figures_of_one(folder: Path, alone: Any) -> None:
    results, predictions = alone
    assert set(results) == {"retrieval/shapes", "zero_shot/shapes"}
    assert 0 < results["retrieval/shapes"]["image_to_text_r10"] < 1  # figures that could differ
    assert 0 < results["zero_shot/shapes"]["top1"] < 1
    ranks = run_ranks(_evaluate, 2, _config(folder))
    assert [r for r, _ in ranks] == [results, results]
    assert ranks[0][1] == predictions


def test_tensor_parallel_ranks_give_the_figures_of_one(folder: Path, alone: Any) -> None:
    ranks = run_ranks(_evaluate, 2, _config(folder, tp=2))
    assert [r for r, _ in ranks] == [alone[0], alone[0]]


def _evaluate_broken(runtime: Any, raw: dict[str, Any]) -> str:
    try:
        _evaluate(runtime, raw)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_broken_sample_of_one_rank_stops_all(folder: Path) -> None:
    from webdataset import TarWriter

    path = folder / "broken.tar"
    with TarWriter(str(path)) as writer:
        writer.write({"__key__": "good", "jpg": _first_jpeg(folder), "txt": b"a red circle", "json": b"{}"})
        writer.write({"__key__": "bad", "jpg": b"not an image", "txt": b"a blue square", "json": b"{}"})
    raw = _config(folder)
    raw["eval"]["retrieval"] = {"shapes": {"shards": [str(path)]}}
    first, second = run_ranks(_evaluate_broken, 2, raw)
    assert "bad" in first
    assert "rank 1" in first
    assert "bad" in second


def _first_jpeg(folder: Path) -> bytes:
    import tarfile

    with tarfile.open(folder / "shards" / "000000.tar") as tar:
        member = next(m for m in tar if m.name.endswith(".jpg"))
        file = tar.extractfile(member)
        assert file is not None
        return file.read()
