"""Files as starting points: what is read into a recipe's towers, resized, left fresh, not used, and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megaeva.checkpoint.convert.command import convert
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.eva import MIM, NATIVE
from megaeva.checkpoint.convert.format import Format
from megaeva.checkpoint.convert.hf import HF_CLIP
from megaeva.checkpoint.convert.io import RunSink
from megaeva.checkpoint.convert.open_clip import OPEN_CLIP
from megaeva.checkpoint.convert.openai import OPENAI
from megaeva.checkpoint.convert.ours import shapes
from megaeva.checkpoint.convert.rules import StateSource, exported
from megaeva.checkpoint.convert.start import open_weights
from megaeva.checkpoint.convert.timm import TIMM
from megaeva.checkpoint.layout import read_model_section
from megaeva.checkpoint.weights import load_weights
from megaeva.config.schema import AxesSection, Config, ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import CheckpointError
from megaeva.model import build_clip
from megaeva.parallel.grid import build_grid
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.shards import gather_full
from megaeva.tasks.contrastive import Contrastive
from megaeva.tasks.mim import MIM as MIMTask
from tests.helpers.exports import export, state_of
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import random_state, tiny
from tests.helpers.trainer_recipe import trainer_recipe

B16, E14, OPENAI_B32 = "EVA02-CLIP-B-16", "EVA02-CLIP-bigE-14", "ViT-B-32-quickgelu"
TEACHER_DIM = 12


def random_weights(what: Contents, seed: int = 0) -> dict[str, Tensor]:
    return random_state({name: torch.Size(shape) for name, shape in shapes(what).items()}, seed)


def mim_contents(variant: str, **vision: Any) -> Contents:
    """A tower as EVA's code distils it: without the inner norm."""
    return Contents("mim", tiny(variant, sub_ln_attention=False, **vision), teacher_dim=TEACHER_DIM)


def write(form: Format, what: Contents, path: Path, seed: int = 0) -> dict[str, Tensor]:
    """Writes a bare file of random weights as published ones are, without configuration; returns them by our names."""
    ours = random_weights(what, seed)
    torch.save(dict(exported(form.rules(what, None), StateSource(ours))), path)
    return ours


def recipe(folder: Path, model: ModelSection, **sections: Any) -> Config:
    return trainer_recipe(folder, "run", 1, model=model.model_dump(), optim={"vision": {"lr": 1e-3}}, **sections)


def task_with(
    runtime: Runtime, folder: Path, model: ModelSection, **init: Any
) -> tuple[Contrastive, dict[str, Tensor]]:
    """A contrastive task that starts as the recipe says, and its weights then."""
    task = Contrastive(recipe(folder, model, init={key: str(value) for key, value in init.items()}), runtime)
    return task, state_of(task.model)


def assert_loaded(state: dict[str, Tensor], ours: dict[str, Tensor], part: str, *but: str) -> None:
    names = [name for name in state if name.startswith(part + ".") and not any(b in name for b in but)]
    assert names
    for name in names:
        assert torch.equal(state[name], ours[name]), name


# -------------------------------------------------------------------------------------------------- every format


@pytest.mark.parametrize(
    ("form", "variant"),
    [(NATIVE, B16), (NATIVE, E14), (OPEN_CLIP, E14), (OPEN_CLIP, OPENAI_B32), (OPENAI, OPENAI_B32)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_whole_clip_of_a_file(runtime: Runtime, tmp_path: Path, form: Format, variant: str) -> None:
    # OpenAI's heads are 64 wide in its own code, which its format does not say; here they are the recipe's.
    ours = write(form, Contents("clip", tiny(variant)), tmp_path / "clip.pt")
    task, state = task_with(runtime, tmp_path, tiny(variant), clip=tmp_path / "clip.pt")
    assert state.keys() == ours.keys()
    for name, value in state.items():
        assert torch.equal(value, ours[name]), name
    (report,) = task.start_reports
    assert (report.loaded, report.fresh, report.resized) == (tuple(sorted(ours)), (), ())
    assert any("no published variant" in note for note in report.notes)
    if variant == B16:
        assert "visual.rope.freqs_cos" in report.unused


@pytest.mark.parametrize("form", [TIMM, HF_CLIP], ids=lambda form: form.name)
def test_a_folder_with_its_configuration(runtime: Runtime, tmp_path: Path, form: Format) -> None:
    """Towers of a file are read into other towers' company: here only vision has the recipe's sizes."""
    variant = B16 if form is TIMM else OPENAI_B32
    model = tiny(variant)
    what = Contents(form.kinds[0], model)
    ours = random_weights(what)
    export(form, what, ours, tmp_path / "weights")
    other = model.model_copy(update={"text": model.text.model_copy(update={"num_layers": 1, "hidden_size": 24})})
    task, state = task_with(runtime, tmp_path, other, vision=tmp_path / "weights")
    assert_loaded(state, ours, "vision", "vision.head")
    (report,) = task.start_reports
    assert report.fresh == tuple(sorted(name for name in state if name.startswith("vision.head.")))
    assert set(report.unused) >= {name for name in ours if name.startswith(("vision.head.", "text."))}
    assert report.notes == ()


def test_the_start_of_a_published_clip(runtime: Runtime, tmp_path: Path) -> None:
    """EVA-02-CLIP's: a distilled tower of EVA, text of OpenAI; heads, scale and the inner norm are fresh."""
    model = tiny(B16, rope_pretrain_grid=4)
    mim = write(MIM, mim_contents(B16, rope_pretrain_grid=4), tmp_path / "EVA02.pt")
    assert "blocks.0.attn.rope.freqs_cos" in torch.load(tmp_path / "EVA02.pt")
    clip_text = model.text.model_copy(update={"activation": "quick_gelu"})
    openai = Contents("clip", tiny(OPENAI_B32).model_copy(update={"text": clip_text, "embed_dim": 24}))
    ours = random_weights(openai, seed=1)
    export(OPEN_CLIP, openai, ours, tmp_path / "openai")
    task, state = task_with(runtime, tmp_path, model, vision=tmp_path / "EVA02.pt", text=tmp_path / "openai")
    assert_loaded(state, mim, "vision", "vision.head", "inner_norm.")
    assert any(".mlp.inner_norm." in name for name in mim)
    assert_loaded({n: v for n, v in state.items() if ".mlp.inner_norm." in n}, mim, "vision")
    assert_loaded(state, ours, "text", "text.head")
    assert state["scale.log_scale"].item() == pytest.approx(2.6592600369327783)
    norms = {name: value for name, value in state.items() if "self_attention.inner_norm" in name}
    assert len(norms) == 6
    assert all(torch.all(value == (1 if name.endswith("weight") else 0)) for name, value in norms.items())

    vision, text = task.start_reports
    assert vision.fresh == tuple(sorted([*norms, "vision.head.bias", "vision.head.weight"]))
    assert set(vision.loaded) | set(vision.fresh) == {name for name in state if name.startswith("vision.")}
    assert {"mask_token", "lm_head.weight", "lm_head.bias", "rope.freqs_sin"} <= set(vision.unused)
    assert text.fresh == ("text.head.weight",)
    assert "scale.log_scale" in text.unused
    assert text.notes == ("text.activation is quick_gelu in the weights, gelu in the recipe",)
    assert any(line.startswith("  fresh: vision.blocks.layers.0.self") for line in vision.lines())
    # The lines are short, the record is not, and it is JSON.
    assert set(json.loads(json.dumps(vision.record()))["unused"]) == set(vision.unused)


def test_a_teacher_of_a_file(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(E14)
    what = Contents("clip", model)
    ours = random_weights(what)
    export(NATIVE, what, ours, tmp_path / "teacher.pt")
    sections = {"task": "mim", "mim": {"mask": {"num_masked": 6, "min_block": 4}}}
    task = MIMTask(recipe(tmp_path, model, teacher={"checkpoint": str(tmp_path / "teacher.pt")}, **sections), runtime)
    assert_loaded({f"vision.{n}": p for n, p in task.teacher.vision.named_parameters()}, ours, "vision")
    assert task.teacher_dim == model.embed_dim
    assert read_model_section(tmp_path / "teacher.pt") == model, "as the command line reads it"

    write(MIM, mim_contents(E14), tmp_path / "mim.pt")
    monkeypatch.setitem(VARIANTS, "Tiny-E", model.model_dump(exclude={"variant"}))
    cfg = recipe(tmp_path, model, teacher={"checkpoint": str(tmp_path / "mim.pt")}, **sections)
    with pytest.raises(CheckpointError, match=r"without projection head; a teacher must have one"):
        MIMTask(cfg, runtime)


# ------------------------------------------------------------------------------------------------------ other sizes


@pytest.mark.parametrize("method", ["upstream", "timm"])
@pytest.mark.parametrize("variant", [B16, OPENAI_B32])
def test_resized_at_load(runtime: Runtime, tmp_path: Path, method: str, variant: str) -> None:
    """A grid of 4 x 4 patches of 4 px into one of 3 x 3 of 6 px, as interpolate_patch_14to16.py does."""
    kind = "mim" if variant == B16 else "clip"
    what = mim_contents(B16) if kind == "mim" else Contents("clip", tiny(variant))
    ours = write(MIM if kind == "mim" else OPEN_CLIP, what, tmp_path / "weights.pt")
    model = tiny(variant, image_size=18, patch_size=6)
    task, state = task_with(runtime, tmp_path, model, vision=tmp_path / "weights.pt", resize=method)
    old = ours["vision.pos_embed"]
    square = old[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    corners = method == "upstream" and variant == OPENAI_B32
    square = functional.interpolate(square, (3, 3), mode="bicubic", align_corners=corners, antialias=method == "timm")
    expected = torch.cat([old[:, :1], square.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    assert torch.equal(state["vision.pos_embed"], expected)
    if method == "upstream":
        kernel = functional.interpolate(ours["vision.patch_embed.weight"], (6, 6), mode="bicubic", align_corners=False)
        assert torch.equal(state["vision.patch_embed.weight"], kernel)
    assert_loaded(state, ours, "vision", "pos_embed", "patch_embed.weight", "head", "self_attention.inner_norm")
    (report,) = task.start_reports
    assert report.resized == (
        f"vision.pos_embed: [1, 17, 32] to [1, 10, 32], {method}",
        f"vision.patch_embed.weight: [32, 3, 4, 4] to [32, 3, 6, 6], {method}",
    )
    assert "  resized: vision.pos_embed: [1, 17, 32]" in "\n".join(report.lines())


def test_a_run_of_another_size(runtime: Runtime, tmp_path: Path) -> None:
    """A checkpoint is read box by box, and only what changes its size whole."""
    what = Contents("clip", tiny(B16))
    ours = random_weights(what)
    export(NATIVE, what, ours, tmp_path / "clip.pt")
    convert(tmp_path / "clip.pt", tmp_path / "run", to="megaeva")
    model = tiny(B16, image_size=24)
    task, state = task_with(runtime, tmp_path, model, clip=tmp_path / "run")
    assert [line.partition(":")[0] for line in task.start_reports[0].resized] == ["vision.pos_embed"]
    assert_loaded(state, ours, "vision", "pos_embed")
    assert_loaded(state, ours, "text")
    with pytest.raises(CheckpointError, match=r"vision\.pos_embed: checkpoint \[1, 17, 32\], model \[1, 37, 32\]"):
        load_weights(tmp_path / "run", {"vision": (task.model.vision, task.grids["vision"])})


# ------------------------------------------------------------------------------------------------------------ refused


def test_flags_that_no_shape_shows(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A post-norm tower under a pre-norm recipe would load silently: facts.md 8, quirk 10."""
    what = Contents("clip", tiny(E14))
    export(NATIVE, what, random_weights(what), tmp_path / "clip.pt")
    pre = tiny(E14, norm_position="pre", num_heads=8)
    with pytest.raises(CheckpointError) as caught:
        task_with(runtime, tmp_path, pre, vision=tmp_path / "clip.pt")
    assert "vision.num_heads is 4 in the weights, 8 in the recipe" in str(caught.value)
    assert "vision.norm_position is post in the weights, pre in the recipe" in str(caught.value)


def test_the_recipe_decides_between_variants(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, exact = tiny("ViT-B-32-quickgelu"), tiny("ViT-B-32")
    ours = write(OPEN_CLIP, Contents("clip", quick), tmp_path / "clip.pt")
    for name, model in (("Tiny-quick", quick), ("Tiny-exact", exact)):
        monkeypatch.setitem(VARIANTS, name, model.model_dump(exclude={"variant"}))
    with pytest.raises(CheckpointError, match="fits several models"):
        open_weights(tmp_path / "clip.pt")
    for name, model in (("Tiny-quick", quick), ("Tiny-exact", exact)):
        task, state = task_with(runtime, tmp_path, model, clip=tmp_path / "clip.pt")
        assert_loaded(state, ours, "vision")
        (note,) = task.start_reports[0].notes
        assert f"taken for {name}, which is as this recipe" in note
    wider = tiny("ViT-B-32", num_heads=8)
    with pytest.raises(CheckpointError, match="fits several models"):
        task_with(runtime, tmp_path, wider, vision=tmp_path / "clip.pt")


def test_mistakes_are_told(runtime: Runtime, tmp_path: Path) -> None:
    mim = mim_contents(B16)
    write(MIM, mim, tmp_path / "mim.pt")
    with pytest.raises(CheckpointError, match=r"mim\.pt \(eva-mim\) has no text tower; .* let init\.text out"):
        task_with(runtime, tmp_path, tiny(B16), text=tmp_path / "mim.pt")
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; it must be a file of weights"):
        task_with(runtime, tmp_path, tiny(B16), vision=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"mim\.pt \(eva-mim\) is no published variant"):
        task_with(runtime, tmp_path, tiny(B16, num_layers=4), vision=tmp_path / "mim.pt")

    state = torch.load(tmp_path / "mim.pt")
    state["blocks.1.mlp.w1.weight"][3, 4] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"nan\.pt: blocks\.1\.mlp\.w1\.weight .* nan at \[3, 4\]"):
        task_with(runtime, tmp_path, tiny(B16), vision=tmp_path / "nan.pt")


def test_another_vocabulary_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    """Rows of two vocabularies may be as many: only the ids tell."""
    model = tiny(B16)
    model = model.model_copy(update={"text": model.text.model_copy(update={"vocab_size": 600})})
    folders = []
    for name, more in (("one", [1000, 1001]), ("two", [1000, 2000])):
        ids = [*range(512), *more, 49406, 49407]
        (tmp_path / f"{name}.json").write_text(json.dumps({"clip_ids": ids}))
        folders.append(tmp_path / name)
        what = Contents("clip", model, clip_ids=tuple(ids))
        state = StateSource(random_weights(what))
        sink = RunSink(folders[-1], what, state.infos)
        for key in state.infos:
            sink.write(key, state.read(key))
        sink.finish()
    data = {"data": {"train": ["x"], "tokenizer_subset": str(tmp_path / "one.json")}}
    Contrastive(recipe(tmp_path, model, init={"text": str(folders[0])}, **data), runtime)
    with pytest.raises(CheckpointError, match=r"two has embeddings of another vocabulary than .*one\.json"):
        Contrastive(recipe(tmp_path, model, init={"text": str(folders[1])}, **data), runtime)


def test_a_part_of_a_files_vocabulary(runtime: Runtime, tmp_path: Path) -> None:
    """A file has all of CLIP's tokens; a recipe with a subset takes the rows of its own."""
    ids = [*range(512), 1000, 49406, 49407]
    (tmp_path / "vocab.json").write_text(json.dumps({"clip_ids": ids}))
    model = tiny(OPENAI_B32)
    sized = {
        n: model.model_copy(update={"text": model.text.model_copy(update={"vocab_size": n})}) for n in (520, 49408)
    }
    what = Contents("clip", sized[49408])
    ours = random_weights(what)
    export(OPEN_CLIP, what, ours, tmp_path / "clip")
    data = {"data": {"train": ["x"], "tokenizer_subset": str(tmp_path / "vocab.json")}}
    for key in ("text", "clip"):
        task = Contrastive(recipe(tmp_path, sized[520], init={key: str(tmp_path / "clip")}, **data), runtime)
        state, name = state_of(task.model), "text.token_embedding.weight"
        assert torch.equal(state[name][:515], ours[name][ids])
        assert_loaded(state, ours, "text", "token_embedding", "head")
        assert f"{name}: 515 of its 49,408 rows" in task.start_reports[0].notes


# ------------------------------------------------------------------------------------------------------- several ranks


def load_cut(runtime: Runtime, path: str) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """This rank's parts of a tower that is cut in two, read from a file of the whole."""
    grid, model = build_grid(AxesSection(tp=2), runtime), tiny(B16, image_size=24)
    clip = build_clip(model, vision_grid=grid, text_grid=grid)
    with pytest.raises(CheckpointError, match=r"vision\.pos_embed"):
        load_weights(path, {"vision": (clip.vision, grid), "text": (clip.text, grid)})
    report = load_weights(path, {"vision": (clip.vision, grid), "text": (clip.text, grid)}, resize="upstream")
    assert len(report.resized) == 1
    whole = {name: gather_full(param.detach(), param, grid) for name, param in clip.named_parameters()}
    return {name: value.numpy() for name, value in whole.items() if not name.startswith("scale")}


def test_a_file_cut_over_two_ranks(tmp_path: Path) -> None:
    what = Contents("clip", tiny(B16))
    ours = random_weights(what)
    export(NATIVE, what, ours, tmp_path / "clip.pt")
    for rank in run_ranks(load_cut, 2, str(tmp_path / "clip.pt")):
        assert len(rank) == len(ours) - 1
        for name, value in rank.items():
            if name != "vision.pos_embed":
                assert torch.equal(torch.from_numpy(value), ours[name]), name
