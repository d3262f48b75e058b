"""The tables of names: ours by arithmetic, EVA's, timm's and open_clip's both ways, and which file is which."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents, Preprocess
from megaeva.checkpoint.convert.eva import MIM, NATIVE, rotary_tables
from megaeva.checkpoint.convert.format import Format, formats
from megaeva.checkpoint.convert.identify import candidates, identify, published, recognise, taken_by_name
from megaeva.checkpoint.convert.io import open_source
from megaeva.checkpoint.convert.open_clip import OPEN_CLIP
from megaeva.checkpoint.convert.openai import OPENAI
from megaeva.checkpoint.convert.ours import shapes
from megaeva.checkpoint.convert.rules import StateSource, convert_state, exported, plan_export
from megaeva.checkpoint.convert.sidecar import write_open_clip_config
from megaeva.checkpoint.convert.timm import TIMM
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import CheckpointError
from megaeva.model import MIMStudent, VisionTower, build_clip
from megaeva.model.rope2d import angle_table
from megaeva.parallel.grid import grid_of_one
from tests.helpers.exports import assert_same_bits, export
from tests.helpers.tiny import full_shapes, random_state, tiny
from tests.unit.model.test_count import COUNTS


class Announced:
    """A file of which only names and shapes are known."""

    def __init__(self, infos: dict[str, TensorInfo], path: Path = Path("some.pt")) -> None:
        self.path, self.infos = path, infos

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    def close(self) -> None:
        """Nothing to give up."""


def _contents(form: Format, model: ModelSection) -> Contents:
    kind = form.kinds[0]
    return Contents(kind, model, teacher_dim=12 if kind == "mim" else None)


def _announced(form: Format, what: Contents) -> Announced:
    """What a file of `what` holds."""
    ours = {name: TensorInfo(shape, torch.float16) for name, shape in shapes(what).items()}
    return Announced(plan_export(form.rules(what, None), ours, "ours"))


def _theirs(form: Format, what: Contents) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights in our names, and the same in theirs."""
    ours = random_state({name: torch.Size(shape) for name, shape in shapes(what).items()})
    return ours, dict(exported(form.rules(what, None), StateSource(ours)))


def _fitting() -> Iterator[tuple[Format, str]]:
    """Every format with every variant that it can hold."""
    for form in formats():
        for name in VARIANTS:
            if form.refusal(_contents(form, published(name))) is None:
                yield form, name


ALL = [pytest.param(form, name, id=f"{form.name}-{name}") for form, name in _fitting()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_shapes_are_the_built_models(variant: str) -> None:
    cfg, grid = tiny(variant), grid_of_one()
    clip = build_clip(cfg, vision_grid=grid, text_grid=grid, device="meta")
    assert shapes(Contents("clip", cfg)) == full_shapes(clip)
    tower = VisionTower(cfg.vision, cfg.embed_dim, grid=grid, device="meta")
    assert shapes(Contents("vision", cfg)) == {f"vision.{n}": s for n, s in full_shapes(tower).items()}
    student = MIMStudent(cfg.vision, 12, grid=grid, device="meta")
    assert shapes(Contents("mim", cfg, teacher_dim=12)) == full_shapes(student)


def test_shapes_of_a_siglip() -> None:
    cfg, grid = tiny("ViT-B-16"), grid_of_one()
    cfg = cfg.model_copy(update={"logit_scale": cfg.logit_scale.model_copy(update={"bias": -10.0})})
    clip = build_clip(cfg, vision_grid=grid, text_grid=grid, device="meta")
    assert shapes(Contents("clip", cfg)) == full_shapes(clip)


@pytest.mark.parametrize("variant", COUNTS)
def test_our_shapes_add_up_to_the_published_counts(variant: str) -> None:
    made = shapes(Contents("clip", ModelSection.model_validate(VARIANTS[variant])))

    def total(prefix: str) -> int:
        return sum(math.prod(shape) for name, shape in made.items() if name.startswith(prefix))

    assert (total("vision."), total("text."), total("")) == COUNTS[variant]


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("form", "variant"), ALL)
def test_round_trips_keep_every_bit(form: Format, variant: str) -> None:
    what = _contents(form, tiny(variant))
    ours, theirs = _theirs(form, what)
    back = convert_state(form.rules(what, theirs.keys()), theirs, shapes(what))
    assert_same_bits(back, ours)
    assert_same_bits(dict(exported(form.rules(what, None), StateSource(back))), theirs)


@pytest.mark.parametrize(("form", "variant"), ALL)
def test_a_file_is_recognised_as_what_it_is_and_nothing_else(form: Format, variant: str) -> None:
    names = _announced(form, _contents(form, tiny(variant))).infos.keys()
    assert [other.name for other in formats() if other.recognises(names)] == [form.name]


def test_a_clip_model_with_custom_text_is_read_too() -> None:
    what = Contents("clip", tiny("ViT-B-16"))
    ours, theirs = _theirs(OPEN_CLIP, what)
    custom = {n if n.startswith(("visual.", "logit_")) else f"text.{n}": tensor for n, tensor in theirs.items()}
    custom["text.attn_mask"] = torch.zeros(10, 10)
    assert recognise(StateSource(custom)) is OPEN_CLIP
    assert_same_bits(convert_state(OPEN_CLIP.rules(what, custom.keys()), custom, shapes(what)), ours)


@pytest.mark.parametrize("form", [NATIVE, MIM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_tables_of_narrow_files_keep_their_dtype(form: Format, dtype: torch.dtype) -> None:
    """As upstream's model.half() casts them with everything else."""
    what = _contents(form, tiny("EVA02-CLIP-B-16", rope_pretrain_grid=4))
    _, theirs = _theirs(form, what)
    assert any(name.endswith("rope.freqs_cos") for name in theirs)
    theirs = {name: tensor.to(dtype) for name, tensor in theirs.items()}
    back = convert_state(form.rules(what, theirs.keys()), theirs, shapes(what))
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in back.items()}
    again = dict(exported(form.rules(what, None), StateSource(back)))
    assert_same_bits(again, theirs)
    assert {name: info.dtype for name, info in plan_export(form.rules(what, None), infos, "ours").items()} == {
        name: tensor.dtype for name, tensor in again.items()
    }


# ------------------------------------------------------------------------------------------------------ EVA's layouts


@pytest.mark.parametrize(
    ("variant", "count"), [("EVA-CLIP-18B", 828), ("EVA02-CLIP-L-14", 712), ("EVA02-CLIP-bigE-14-plus", 1230)]
)
def test_tensors_of_eva_files(variant: str, count: int) -> None:
    """facts.md 2a."""
    infos = _announced(NATIVE, Contents("clip", published(variant))).infos
    assert len(infos) == count
    if variant == "EVA-CLIP-18B":
        expected = {
            "logit_scale": (), "visual.cls_token": (1, 1, 5120), "visual.pos_embed": (1, 257, 5120),
            "visual.patch_embed.proj.weight": (5120, 3, 14, 14), "visual.patch_embed.proj.bias": (5120,),
            "visual.blocks.47.norm1.weight": (5120,), "visual.blocks.47.norm2.weight": (5120,),
            "visual.blocks.47.attn.qkv.weight": (15360, 5120), "visual.blocks.47.attn.proj.weight": (5120, 5120),
            "visual.blocks.47.attn.proj.bias": (5120,), "visual.blocks.47.mlp.fc1.weight": (25600, 5120),
            "visual.blocks.47.mlp.fc1.bias": (25600,), "visual.blocks.47.mlp.fc2.weight": (5120, 25600),
            "visual.blocks.47.mlp.fc2.bias": (5120,), "visual.norm.weight": (5120,),
            "visual.head.weight": (1536, 5120), "text.positional_embedding": (77, 1280),
            "text.text_projection": (1280, 1536), "text.token_embedding.weight": (49408, 1280),
            "text.ln_final.weight": (1280,), "text.ln_final.bias": (1280,),
        }  # fmt: skip
        block = "text.transformer.resblocks.31."
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.out_proj.bias", "mlp.c_proj.bias"):
            expected[block + name] = (1280,)
        expected |= {
            block + "attn.in_proj_weight": (3840, 1280), block + "attn.in_proj_bias": (3840,),
            block + "attn.out_proj.weight": (1280, 1280), block + "mlp.c_fc.weight": (5120, 1280),
            block + "mlp.c_fc.bias": (5120,), block + "mlp.c_proj.weight": (1280, 5120),
        }  # fmt: skip
        last = {name for name in infos if ".blocks." not in name and ".resblocks." not in name}
        last |= {name for name in infos if name.startswith(("visual.blocks.47.", block))}
        assert {name: infos[name].shape for name in last} == expected


@pytest.mark.parametrize(
    ("variant", "total"),
    [
        ("EVA-CLIP-18B", 17_627_879_424), ("EVA-CLIP-8B", 7_525_045_248), ("EVA02-CLIP-bigE-14", 4_350_558_720),
    ],
)  # fmt: skip
def test_numbers_in_distilled_towers(variant: str, total: int) -> None:
    """facts.md 2b: with mask token and a projection onto E/14+'s 1024 features."""
    infos = _announced(MIM, Contents("mim", published(variant), teacher_dim=1024)).infos
    assert sum(math.prod(info.shape) for info in infos.values()) == total


@pytest.mark.parametrize(("grid", "head_width"), [(16, 64), (24, 64), (4, 8)])
def test_rotary_tables_are_those_of_our_towers(grid: int, head_width: int) -> None:
    """Beside timm's, which the towers are held against; upstream divides where we take a negative power."""
    ours = angle_table(grid, 16, head_width)[:, 1:]
    for one, other in zip(rotary_tables(grid, 16, head_width), ours, strict=True):
        assert one.shape == (grid**2, head_width) and (one - other).abs().max() < 1e-5


def test_rotary_tables_of_a_file_are_checked() -> None:
    what = Contents("clip", tiny("EVA02-CLIP-L-14"))
    ours, theirs = _theirs(NATIVE, what)
    tables = [name for name in theirs if ".freqs_" in name]
    assert len(tables) == 2 * (1 + 3) and "visual.blocks.2.attn.rope.freqs_sin" in tables
    assert theirs["visual.rope.freqs_cos"].shape == (16, 8) and theirs["visual.rope.freqs_cos"].dtype == torch.float32

    def read(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert_state(NATIVE.rules(what, state.keys()), state, shapes(what))

    assert_same_bits(read({name: tensor for name, tensor in theirs.items() if name not in tables}), ours)
    half = {name: tensor.half() if name in tables else tensor for name, tensor in theirs.items()}
    assert_same_bits(read(half), ours)
    turned = theirs | {"visual.blocks.1.attn.rope.freqs_cos": theirs["visual.blocks.1.attn.rope.freqs_sin"]}
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.rope\.freqs_cos .* not the rotary angles"):
        read(turned)
    other_grid = theirs | {"visual.rope.freqs_cos": torch.zeros(25, 8)}
    with pytest.raises(CheckpointError, match=r"visual\.rope\.freqs_cos: is \[25, 8\], must be \[16, 8\]"):
        read(other_grid)


def test_a_distilled_tower_may_have_tables_of_an_older_grid() -> None:
    """interpolate_patch_14to16.py resizes positions and kernels, and leaves them."""
    what = Contents("mim", tiny("EVA02-CLIP-B-16"), teacher_dim=12)
    ours, theirs = _theirs(MIM, what)
    cos, sin = rotary_tables(16, 16, 8)
    old = theirs | {"rope.freqs_cos": cos, "rope.freqs_sin": sin}
    assert_same_bits(convert_state(MIM.rules(what, old.keys()), old, shapes(what)), ours)
    with pytest.raises(CheckpointError, match="not the rotary angles"):
        convert_state(MIM.rules(what, old.keys()), old | {"rope.freqs_cos": sin}, shapes(what))


@pytest.mark.parametrize("gone", [("mask_token", "lm_head"), ("mask_token",), ("lm_head.bias",)])
def test_a_distilled_tower_may_lack_what_a_clip_has_no_use_for(gone: tuple[str, ...]) -> None:
    what = Contents("mim", tiny("EVA-CLIP-8B"), teacher_dim=12)
    ours, theirs = _theirs(MIM, what)
    bare = {name: tensor for name, tensor in theirs.items() if not name.startswith(gone)}
    found = identify(StateSource(bare), MIM, model=what.model)
    assert found.teacher_dim is None
    back = convert_state(MIM.rules(found, bare.keys()), bare, shapes(found))
    assert_same_bits(back, {name: tensor for name, tensor in ours.items() if name.startswith("vision.")})


def test_an_eva_file_brings_its_model(tmp_path: Path) -> None:
    """Sizes of no published variant, preprocessing, and a vocabulary that the file has whole."""
    model = tiny("EVA-CLIP-8B", norm_position="post", image_size=20)
    ids = tuple(range(3, 60))
    what = Contents("clip", model, Preprocess(resize="squash"), clip_ids=ids)
    ours = random_state({name: torch.Size(shape) for name, shape in shapes(what).items()})
    file = export(NATIVE, what, ours, tmp_path / "model.v1.pt")
    source = open_source(file)
    assert recognise(source) is NATIVE
    found = identify(source, NATIVE)
    assert (found.model.vision, found.preprocess) == (model.vision, what.preprocess)
    assert found.clip_ids is None and found.model.text.vocab_size == 49408
    assert identify(open_source(tmp_path), NATIVE).model == found.model
    config = tmp_path / "model.v1.megaeva.json"
    content = json.loads(config.read_text())
    content["model"]["vision"]["hidden_size"] = 64
    config.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"contradicts the configuration beside it.*\n.*visual\.cls_token: is \["):
        identify(source, NATIVE)


# --------------------------------------------------------------------------------------------------- which model it is


@pytest.mark.parametrize(("form", "variant"), ALL)
def test_candidates_of_full_size_files(form: Format, variant: str) -> None:
    """Without reading a tensor, nor building a model; GELU and QuickGELU are twins where the format has both."""
    what = _contents(form, published(variant))
    source = _announced(form, what)
    twins = {variant, variant.removesuffix("-quickgelu"), variant + "-quickgelu"}
    if form in (TIMM, MIM):
        twins |= {variant + "-plus", variant.removesuffix("-plus")}
    expected = [n for n in VARIANTS if n in twins and form.refusal(_contents(form, published(n))) is None]
    assert candidates(source, form) == expected
    if len(expected) == 1 or form in (TIMM, MIM):
        found = identify(source, form)
        assert found.model.vision == what.model.vision and found.teacher_dim == what.teacher_dim
    else:
        with pytest.raises(CheckpointError, match=r"(?s)fits several models.*activation=gelu.*--variant"):
            identify(source, form)
    assert identify(source, form, model=variant).model == what.model


def test_what_the_name_decides_is_said() -> None:
    what = Contents("clip", published("EVA-CLIP-18B"))
    source = _announced(NATIVE, what)
    (line,) = taken_by_name(source, NATIVE, identify(source, NATIVE))
    assert "EVA-CLIP-18B" in line and "vision.norm_position=post" in line and "text.activation=gelu" in line
    what = Contents("clip", published("ViT-B-32-quickgelu"))
    source = _announced(OPENAI, what)
    (line,) = taken_by_name(source, OPENAI, identify(source, OPENAI))
    assert "activation" not in line  # OpenAI's code has one


def test_distilled_towers_without_inner_norm() -> None:
    """As EVA-02's: identified as the tower that they are, one without it."""
    model = published("EVA02-CLIP-B-16")
    bare = model.model_copy(update={"vision": model.vision.model_copy(update={"sub_ln_attention": False})})
    source = _announced(MIM, Contents("mim", bare, teacher_dim=1024))
    found = identify(source, MIM)
    assert found.model.vision == bare.vision and found.teacher_dim == 1024
    assert identify(source, MIM, model="EVA02-CLIP-B-16").model.vision == bare.vision


def test_a_file_of_no_variant_names_the_nearest() -> None:
    source = _announced(OPEN_CLIP, Contents("clip", published("ViT-H-14")))
    lost = source.infos.pop("visual.ln_post.bias")
    source.infos["visual.surprise"] = lost
    with pytest.raises(CheckpointError) as error:
        identify(source, OPEN_CLIP)
    text = str(error.value)
    assert "nearest is ViT-H-14, 2 differences" in text and "`megaeva convert --model-config`" in text
    assert "visual.ln_post.bias: missing, must be [1280]" in text and "visual.surprise: [1280] is not explained" in text


def test_a_file_of_no_format() -> None:
    names = ["conv1.weight", "layer1.0.bn1.bias"]
    with pytest.raises(
        CheckpointError, match=r"some\.pt holds conv1\.weight, layer1\.0\.bn1\.bias: no format .*eva-mim"
    ):
        recognise(Announced({name: TensorInfo((2,), torch.float32) for name in names}))


def test_the_user_s_word_is_checked() -> None:
    source = _announced(OPEN_CLIP, Contents("clip", published("ViT-B-16")))
    with pytest.raises(CheckpointError, match=r"contradicts the model given \(ViT-B-32\)"):
        identify(source, OPEN_CLIP, model="ViT-B-32")
    with pytest.raises(CheckpointError, match=r"ViT-B16 is not a known variant.*ViT-B-16"):
        identify(source, OPEN_CLIP, model="ViT-B16")
    odd = published("ViT-B-16")
    odd = odd.model_copy(update={"text": odd.text.model_copy(update={"num_heads": 7})})
    with pytest.raises(CheckpointError, match=r"text\.num_heads: is 7, must divide text\.hidden_size, 512"):
        identify(source, OPEN_CLIP, model=odd)
    # A model that the format has no names for, too.
    with pytest.raises(CheckpointError, match="contradicts the model given"):
        identify(source, NATIVE, model="ViT-B-16")


def test_the_user_s_word_and_the_configuration(tmp_path: Path) -> None:
    quick = Contents("clip", published("ViT-B-16-quickgelu"), Preprocess(resize="squash"))
    write_open_clip_config(tmp_path, quick)
    source = _announced(OPEN_CLIP, quick)
    source.path = tmp_path
    found = identify(source, OPEN_CLIP)
    assert found == replace(quick, source=tmp_path, model=found.model)
    assert found.model.text.activation == "quick_gelu" and taken_by_name(source, OPEN_CLIP, found) == []
    assert identify(source, OPEN_CLIP, model="ViT-B-16-quickgelu").preprocess == quick.preprocess
    with pytest.raises(CheckpointError, match=r"text\.activation: is gelu, the configuration says quick_gelu"):
        identify(source, OPEN_CLIP, model="ViT-B-16")
    # One that cannot be read is no hindrance to a model that is given.
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        identify(source, OPEN_CLIP)
    assert identify(source, OPEN_CLIP, model="ViT-B-16").preprocess == Preprocess()


def test_a_siglip_is_told_by_its_bias() -> None:
    cfg = tiny("ViT-B-16")
    biased = cfg.model_copy(update={"logit_scale": cfg.logit_scale.model_copy(update={"bias": -10.0})})
    _, theirs = _theirs(OPEN_CLIP, Contents("clip", biased))
    theirs["logit_bias"] = torch.tensor(-7.5)
    assert identify(StateSource(theirs), OPEN_CLIP, model=cfg).model.logit_scale.bias == -7.5
    del theirs["logit_bias"]
    assert identify(StateSource(theirs), OPEN_CLIP, model=biased).model.logit_scale.bias is None


@pytest.mark.parametrize(
    ("form", "variant", "change", "message"),
    [
        (NATIVE, "EVA-CLIP-8B", {"head_bias": True}, "head_bias=False"),
        (NATIVE, "EVA02-CLIP-B-16", {"sub_ln_attention": False}, "sub_ln_attention=True"),
        (NATIVE, "ViT-B-16", {}, "ln_pre=False"),
        (MIM, "EVA01-CLIP-g-14", {"norm_epsilon": 1e-5}, "norm_epsilon=1e-06"),
        (TIMM, "EVA-CLIP-8B", {}, "norm=layernorm"),
        (OPEN_CLIP, "EVA-CLIP-18B", {}, "timm's names only"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    form: Format, variant: str, change: dict[str, bool], message: str
) -> None:
    model = published(variant)
    model = model.model_copy(update={"vision": model.vision.model_copy(update=change)})
    assert message in str(form.refusal(_contents(form, model)))
