"""ONNX graphs of our towers run in onnxruntime and give the towers' outputs; they hold no operator of ours."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.rules import StateSource
from megaeva.errors import CheckpointError
from megaeva.export import onnx as onnx_export
from megaeva.export.onnx import INFO_NAME, Parity, write_onnx
from tests.helpers.exports import random_clip, state_of
from tests.helpers.tiny import example_images, example_tokens, tiny

TOLERANCE = 1e-4  # fp32; seen: 5e-6


def _outputs(path: Path, batch: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    (source,) = session.get_inputs()
    return torch.from_numpy(np.asarray(session.run(None, {source.name: batch.numpy()})[0]))


def _domains(path: Path) -> set[str]:
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return {node.domain for node in model.graph.node}


def _check(path: Path, batch: Tensor, expected: Tensor) -> None:
    for rows in (1, 3):  # neither is the batch that was traced
        assert (_outputs(path, batch[:rows]) - expected[:rows]).abs().max() < TOLERANCE
    assert _domains(path) == {""}


# RoPE, sub-LN and SwiGLU; ln_pre, a bias of all of q, k and v, QuickGELU.
@pytest.mark.parametrize("variant", ["EVA02-CLIP-B-16", "ViT-B-16-quickgelu"])
@torch.no_grad()
def test_both_towers(variant: str, tmp_path: Path) -> None:
    cfg = tiny(variant)
    model = random_clip(cfg)
    report = write_onnx(StateSource(state_of(model)), Contents("clip", cfg), tmp_path / "out")
    assert [line.split(":")[0] for line in report] == ["vision", "text"]
    images, tokens = example_images(cfg), example_tokens(cfg)
    _check(tmp_path / "out" / "vision.onnx", images, model.encode_image(images))
    _check(tmp_path / "out" / "text.onnx", tokens, model.encode_text(tokens))
    info = json.loads((tmp_path / "out" / INFO_NAME).read_text())
    assert info["kind"] == "clip" and info["model"]["vision"]["image_size"] == cfg.vision.image_size
    assert info["logit_scale"] == pytest.approx(model.scale().exp().item())
    assert info["preprocess"]["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


@torch.no_grad()
def test_a_vision_tower_alone(tmp_path: Path) -> None:
    cfg = tiny("EVA-CLIP-18B")  # RMSNorm, post-norm
    model = random_clip(cfg)
    write_onnx(StateSource(state_of(model)), Contents("vision", cfg), tmp_path / "out")
    images = example_images(cfg)
    _check(tmp_path / "out" / "vision.onnx", images, model.encode_image(images))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [INFO_NAME, "vision.onnx"]


@torch.no_grad()
def test_a_student_without_head_gives_tokens(tmp_path: Path) -> None:
    cfg = tiny("EVA02-CLIP-bigE-14")  # LayerNorm, post-norm
    model = random_clip(cfg)
    write_onnx(StateSource(state_of(model)), Contents("mim", cfg), tmp_path / "out")
    images = example_images(cfg)
    _check(tmp_path / "out" / "vision.onnx", images, model.vision.tokens(images))


@torch.no_grad()
def test_a_part_of_the_vocabulary_takes_the_whole_ones_ids(tmp_path: Path) -> None:
    cfg = tiny("ViT-B-16")
    model = random_clip(cfg)
    ids = (*range(0, 57 * 800, 800), 49406, 49407)  # 59 of the 60 rows: the last is padding
    what = Contents("clip", cfg, clip_ids=ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_write_vision", lambda *_: Parity("vision", 0.0, 1.0))
        write_onnx(StateSource(state_of(model)), what, tmp_path / "out")
    own = torch.tensor([[57, 3, 9, 58, 0, 0, 0, 0, 0, 0], [57, 50, 2, 7, 31, 58, 0, 0, 0, 0], [57, 58] + [0] * 8])
    _check(tmp_path / "out" / "text.onnx", torch.tensor(ids)[own], model.encode_text(own))
    assert (tmp_path / "out" / "vocab.json").is_file()
    assert json.loads((tmp_path / "out" / INFO_NAME).read_text())["model"]["text"]["vocab_size"] == 49408


def test_other_outputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_write_vision", lambda *_: Parity("vision", float("nan"), 1.0))
    with pytest.raises(CheckpointError, match=r"out: vision: onnxruntime and megaeva differ by nan"):
        write_onnx(StateSource({}), Contents("vision", tiny("ViT-B-16")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
