"""open_clip and timm load our exports unchanged, from the folder alone, and give our outputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.openai import load_openai_model
from PIL import Image
from timm.models.eva import _create_eva  # the peers' builder, for a tower of test size

from megaeva.checkpoint.convert import sidecar
from megaeva.checkpoint.convert.contents import Contents, Preprocess
from megaeva.checkpoint.convert.io import open_source
from megaeva.checkpoint.convert.open_clip import OPEN_CLIP
from megaeva.checkpoint.convert.openai import OPENAI
from megaeva.checkpoint.convert.rules import Imported
from megaeva.checkpoint.convert.timm import TIMM
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.data.tokenizer import Tokenizer, build_subset
from megaeva.errors import CheckpointError
from tests.helpers.exports import assert_same_bits, export, random_clip, returned, state_of
from tests.helpers.tiny import example_images, example_tokens, tiny

TOLERANCE = 1e-5  # fp32, outputs of order one


def _assert_outputs(ours: Any, theirs: Any, cfg: ModelSection) -> None:
    image, token = example_images(cfg), example_tokens(cfg)
    with torch.no_grad():
        expected = theirs.encode_image(image)
        assert expected.abs().max() > 0.5
        assert (ours.encode_image(image) - expected).abs().max() < TOLERANCE
        assert (ours.encode_text(token) - theirs.encode_text(token)).abs().max() < TOLERANCE
    assert theirs.logit_scale.item() == ours.scale.log_scale.item()


def _assert_close(ours: Any, theirs: Any, cfg: ModelSection) -> None:
    """Of towers at full size, whose outputs are of any size."""
    image, token = example_images(cfg, 1), example_tokens(cfg, 1)
    with torch.no_grad():
        for mine, their in (
            (ours.encode_image(image), theirs.encode_image(image)),
            (ours.encode_text(token), theirs.encode_text(token)),
        ):
            assert (mine - their).abs().max() < TOLERANCE * their.abs().max()


@pytest.mark.parametrize("variant", ["ViT-B-32-quickgelu", "ViT-bigG-14"])
def test_open_clip_from_a_local_folder(variant: str, tmp_path: Path) -> None:
    cfg = tiny(variant, norm_epsilon=3e-5)
    scale = cfg.logit_scale.model_copy(update={"bias": -10.0})
    what = Contents("clip", cfg.model_copy(update={"logit_scale": scale}), Preprocess(resize="squash"))
    ours = random_clip(what.model)
    folder = export(OPEN_CLIP, what, state_of(ours), tmp_path / "export")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    _assert_outputs(ours, theirs.eval(), what.model)
    assert ours.scale.logit_bias is not None and theirs.logit_bias.item() == ours.scale.logit_bias.item()
    assert "size=(16, 16)" in str(transform)  # squash
    assert OPEN_CLIP.read_config(folder) == what
    assert_same_bits(returned(OPEN_CLIP, what, theirs.state_dict(), state_of(ours)), state_of(ours))


@timm.models.register_model
def megaeva_test_eva(pretrained: bool = False, **kwargs: Any) -> Any:
    """EVA02-CLIP-L-14 at the size of `tiny`, registered as open_clip can only name towers."""
    arguments = sidecar.timm_config(Contents("vision", tiny("EVA02-CLIP-L-14")))["model_args"]
    return _create_eva("eva02_large_patch14_clip_224", pretrained=pretrained, **arguments | kwargs)


def test_open_clip_with_a_timm_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = Contents("clip", tiny("EVA02-CLIP-L-14"))
    monkeypatch.setitem(sidecar._OPEN_CLIP_TOWERS, "megaeva_test_eva", what.model.vision)
    ours = random_clip(what.model)
    folder = export(OPEN_CLIP, what, state_of(ours), tmp_path / "export")
    theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0]
    assert type(theirs) is open_clip.model.CustomTextCLIP
    _assert_outputs(ours, theirs.eval(), what.model)
    assert OPEN_CLIP.read_config(folder) == what


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", ["EVA02-CLIP-B-16", "ViT-B-32-quickgelu"])
def test_full_size_in_open_clip(variant: str, tmp_path: Path) -> None:
    what = Contents("clip", ModelSection.model_validate(VARIANTS[variant]))
    ours = random_clip(what.model)
    folder = export(OPEN_CLIP, what, state_of(ours), tmp_path / "export")
    theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()
    _assert_close(ours, theirs, what.model)


CAPTIONS = ["a red panda", "naïve café — 数字 123 &amp; it's", "grinning face " * 20]


def test_tokens_and_pixels_of_a_part_of_the_vocabulary(tmp_path: Path) -> None:
    """A run over a part of CLIP's vocabulary, read by open_clip's own tokenizer, transforms and model."""
    subset: dict[str, Any] = build_subset(CAPTIONS)
    (tmp_path / "vocab.json").write_text(json.dumps(subset))
    tokenizer = Tokenizer(16, tmp_path / "vocab.json")
    cfg = tiny("Demo-Teacher")
    text = cfg.text.model_copy(update={"context_length": 16, "vocab_size": tokenizer.vocab_size + 3})
    what = Contents("clip", cfg.model_copy(update={"text": text}), clip_ids=tuple(subset["clip_ids"]))
    ours = random_clip(what.model)
    folder = export(OPEN_CLIP, what, state_of(ours), tmp_path / "export")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    token = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert token.shape == (3, 16) and torch.equal(token, Tokenizer(16)(CAPTIONS))
    with torch.no_grad():
        expected = theirs.eval().encode_text(token)
        assert (ours.encode_text(tokenizer(CAPTIONS)) - expected).abs().max() < TOLERANCE
        pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
        image = transform(Image.fromarray(pixels))[None]
        assert (ours.encode_image(image) - theirs.encode_image(image)).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", ["EVA01-CLIP-g-14", "EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14"])
def test_timm_from_a_local_folder(variant: str, tmp_path: Path) -> None:
    model = tiny(variant)
    what = Contents("vision", model.model_copy(update={"text": sidecar.NO_TEXT}), Preprocess(crop_share=0.9))
    ours = random_clip(model)
    state = {name: tensor for name, tensor in state_of(ours).items() if name.startswith("vision.")}
    folder = export(TIMM, what, state, tmp_path / "export")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = example_images(model)
    with torch.no_grad():
        expected = theirs(image)
        assert expected.abs().max() > 0.5
        assert (ours.encode_image(image) - expected).abs().max() < TOLERANCE
    data = timm.data.resolve_model_data_config(theirs)
    assert data["input_size"] == (3, 16, 16) and data["crop_pct"] == 0.9 and data["interpolation"] == "bicubic"
    assert tuple(data["mean"]) == what.preprocess.mean and tuple(data["std"]) == what.preprocess.std
    assert TIMM.read_config(folder) == what


def _openai(dtype: torch.dtype = torch.float32) -> tuple[Contents, Any, dict[str, torch.Tensor]]:
    """A tiny model of OpenAI's proportions: heads 64 wide, MLPs of four widths."""
    cfg = tiny("ViT-B-32-quickgelu", hidden_size=128, num_heads=2, ffn_hidden_size=512)
    text = cfg.text.model_copy(update={"hidden_size": 64, "num_heads": 1, "ffn_hidden_size": 256})
    what = Contents("clip", cfg.model_copy(update={"text": text}))
    model = random_clip(what.model)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.half())  # OpenAI's code casts most of them so, whatever the file holds
    state = {
        name: tensor.to(dtype) if tensor.ndim > 1 and "embed" not in name else tensor
        for name, tensor in state_of(model).items()
    }
    return what, model, state


def test_a_reader_of_openai_s_files_takes_ours(tmp_path: Path) -> None:
    """open_clip's port of `clip.load`, which knows sizes from shapes alone."""
    what, ours, state = _openai()
    file = export(OPENAI, what, state, tmp_path / "model.pt")
    theirs = load_openai_model(str(file), precision="fp32", device="cpu")
    _assert_outputs(ours, theirs.eval(), what.model)
    source = open_source(file)
    assert OPENAI.recognises(source.infos.keys()) and not OPEN_CLIP.recognises(source.infos.keys())
    assert source.read("input_resolution").item() == 16 and source.read("vocab_size").item() == 60


@pytest.mark.exhaustive
def test_openai_b_32_at_full_size(tmp_path: Path) -> None:
    """fp16 as released: the same bits back, and through a reader of OpenAI's files our outputs."""
    what = Contents("clip", ModelSection.model_validate(VARIANTS["ViT-B-32-quickgelu"]))
    ours = random_clip(what.model)
    with torch.no_grad():
        for param in ours.parameters():
            param.copy_(param.half())
    state = {name: tensor.half() for name, tensor in state_of(ours).items()}
    file = export(OPENAI, what, state, tmp_path / "ViT-B-32.pt")
    assert_same_bits(returned(OPENAI, what, torch.load(file, mmap=True), state), state)
    theirs = load_openai_model(str(file), precision="fp32", device="cpu").eval()
    _assert_close(ours, theirs, what.model)


def test_dtypes_of_an_openai_file_come_back_from_a_jit_archive(tmp_path: Path) -> None:
    what, _, state = _openai(torch.float16)
    theirs = torch.load(export(OPENAI, what, state, tmp_path / "model.pt"))
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float16, torch.float32, torch.int64}
    assert_same_bits(returned(OPENAI, what, theirs, state), state)
    archive = _Archive(theirs)
    torch.jit.save(torch.jit.script(archive), tmp_path / "jit.pt")
    source = open_source(tmp_path / "jit.pt")
    imported = Imported(source, OPENAI.rules(what, source.infos.keys()), {n: tuple(t.shape) for n, t in state.items()})
    assert_same_bits({name: imported.read(name) for name in imported.infos}, state)


class _Archive(torch.nn.Module):
    """Tensors by their dotted names, as attributes of nested modules: what an archive of a whole model holds."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        inner: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            head, _, rest = name.partition(".")
            if rest:
                inner.setdefault(head, {})[rest] = tensor
            elif tensor.is_floating_point():
                self.register_parameter(name, torch.nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        for head, tensors in inner.items():
            self.add_module(head, _Archive(tensors))

    def forward(self) -> int:
        return 0


def test_what_openai_s_code_would_misread(tmp_path: Path) -> None:
    what, _, state = _openai()
    assert OPENAI.refusal(what) is None
    for change, message in (
        ({"vision": what.model.vision.model_copy(update={"num_heads": 4})}, "width of vision heads=64"),
        ({"text": what.model.text.model_copy(update={"activation": "gelu"})}, "text.activation=quick_gelu"),
        ({"text": what.model.text.model_copy(update={"ffn_hidden_size": 128})}, "text.ffn_hidden_size=256"),
    ):
        model = what.model.model_copy(update=change)
        assert message in str(OPENAI.refusal(Contents("clip", model)))
    theirs = torch.load(export(OPENAI, what, state, tmp_path / "model.pt"))
    with pytest.raises(CheckpointError, match=r"context_length is 77; .* has 10"):
        returned(OPENAI, what, theirs | {"context_length": torch.tensor(77)}, state)
