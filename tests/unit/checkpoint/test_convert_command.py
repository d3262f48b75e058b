"""One conversion end to end, and everything that is refused, before or while it writes."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megaeva.checkpoint import layout
from megaeva.checkpoint.convert import command
from megaeva.checkpoint.convert.command import convert
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.format import formats
from megaeva.checkpoint.convert.inspect import inspect
from megaeva.checkpoint.convert.io import RunSink, open_source
from megaeva.checkpoint.convert.ours import shapes
from megaeva.checkpoint.convert.resize import resize_positions
from megaeva.checkpoint.convert.rules import StateSource, exported, plan_export
from megaeva.checkpoint.convert.run_folder import run_contents
from megaeva.checkpoint.convert.start import open_weights
from megaeva.checkpoint.tensors import TensorInfo
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import CheckpointError
from tests.helpers.tiny import random_state, tiny

EVA, CLIP = "EVA02-CLIP-B-16", "ViT-B-32-quickgelu"
FORMATS = {form.name: form for form in formats()}


def weights(what: Contents) -> dict[str, Tensor]:
    """Random, in our names, of both widths that files mix."""
    state = random_state({name: torch.Size(shape) for name, shape in shapes(what).items()})
    return {name: tensor.half() if "blocks" in name else tensor for name, tensor in state.items()}


def write_run(folder: Path, what: Contents, state: Mapping[str, Tensor] | None = None) -> Path:
    state = weights(what) if state is None else state
    sink = RunSink(folder, what, {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()})
    for name, tensor in state.items():
        sink.write(name, tensor)
    sink.finish()
    return folder


def write_eva(path: Path, what: Contents) -> dict[str, Tensor]:
    """A file as upstream saves it, without configuration."""
    theirs = dict(exported(FORMATS["eva"].rules(what, None), StateSource(weights(what))))
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in theirs.items()}}, path)
    return theirs


def read(path: Path) -> dict[str, Tensor]:
    source = open_source(path)
    state = {name: source.read(name) for name in source.infos}
    source.close()
    return state


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].shape == other[k].shape and torch.equal(one[k], other[k]) for k in one
    )


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def what_of(name: str, kind: str = "clip") -> Contents:
    return Contents(kind, tiny(name), teacher_dim=12 if kind == "mim" else None)


# ------------------------------------------------------------------------------------------------------ what it makes


@pytest.mark.parametrize(
    ("to", "name", "kind"),
    [
        ("eva", EVA, "clip"),
        ("eva-mim", EVA, "mim"),
        ("openai", CLIP, "clip"),
        ("open_clip", CLIP, "clip"),
        ("hf-clip", CLIP, "clip"),
        ("hf-eva", EVA, "clip"),
        ("megaeva", EVA, "clip"),
    ],
)
def test_there_and_back_is_bit_equal_and_keeps_what_it_is(to: str, name: str, kind: str, tmp_path: Path) -> None:
    what = what_of(name, kind)
    if to == "openai":  # its loader knows heads of 64 only
        size = {"hidden_size": 128, "num_heads": 2, "ffn_hidden_size": 512}
        towers = {part: getattr(what.model, part).model_copy(update=size) for part in ("vision", "text")}
        what = replace(what, model=what.model.model_copy(update=towers))
    run = write_run(tmp_path / "run", what)
    report = convert(run, tmp_path / "there", to=to)
    assert report.target_format == to and report.source_format == "megaeva"
    back = convert(tmp_path / "there", tmp_path / "back", to="megaeva", model=what.model if to == "openai" else None)
    assert back.source_format == to
    assert same_bits(read(tmp_path / "back"), read(run))
    made = run_contents(tmp_path / "back")
    assert replace(made, source=None) == replace(run_contents(run), source=None)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_file_of_upstream_into_another_format_and_the_report(tmp_path: Path) -> None:
    what = what_of(EVA)
    theirs = write_eva(tmp_path / "EVA02.pt", what)
    report = convert(tmp_path / "EVA02.pt", tmp_path / "hf", to="hf-eva", model=what.model, shard_bytes=20_000)
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    loaded: dict[str, Tensor] = {}
    for shard in shards:
        loaded |= load_file(shard)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert loaded.keys() == index["weight_map"].keys() and len(shards) > 2
    assert torch.equal(loaded["vision_model.encoder.layers.1.mlp.fc3.weight"], theirs["visual.blocks.1.mlp.w3.weight"])
    assert torch.equal(loaded["text_projection.weight"], theirs["text.text_projection"].t())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["projection_dim"] == what.model.embed_dim
    assert report.num_tensors == len(loaded) and report.num_bytes == sum(t.nbytes for t in loaded.values())
    assert report.num_parameters == sum(t.numel() for t in weights(what).values())
    first, second, *notes = report.lines()
    assert first == f"{tmp_path}/EVA02.pt (eva) -> {tmp_path}/hf (hf-eva)"
    assert f"{len(loaded)} tensors, {report.num_parameters:,} parameters" in second
    assert any("config.json" in note for note in notes)


@pytest.mark.parametrize(("name", "kind", "to"), [(EVA, "clip", "eva"), (EVA, "mim", "eva-mim")])
def test_a_run_of_format_1_says_its_task_only(name: str, kind: str, to: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", what_of(name, kind))
    info = json.loads((run / "megaeva.json").read_text())
    old = {"format": 1, "task": "mim" if kind == "mim" else "contrastive", "model": info["model"], "step": 3}
    (run / "megaeva.json").write_text(json.dumps(old))
    convert(run, tmp_path / "there", to=to)
    convert(tmp_path / "there", tmp_path / "back", to="megaeva")
    assert same_bits(read(tmp_path / "back"), read(run))
    lines = list(inspect(run, model=None, tensors=False, verify=False))
    assert any(line.startswith("holds: " + ("a distilled" if kind == "mim" else "both towers")) for line in lines)
    weights_of = open_weights(run)
    assert weights_of.contents.kind == kind and weights_of.contents.teacher_dim == (12 if kind == "mim" else None)
    weights_of.close()


def test_a_published_variant_is_told_by_its_shapes_and_the_report_says_so(tmp_path: Path) -> None:
    """At full size: 150 M parameters of zeros, in a file of holes."""
    what = Contents("clip", ModelSection.model_validate(VARIANTS[EVA]))
    plan = plan_export(
        [rule for rule in FORMATS["eva"].rules(what, None) if rule.ours],  # without rotary tables
        {name: TensorInfo(shape, torch.float16) for name, shape in shapes(what).items()},
        "ours",
    )
    with FakeTensorMode():
        holes = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in plan.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(holes, tmp_path / "a.pt")
    report = convert(tmp_path / "a.pt", tmp_path / "tower", to="timm")
    assert report.contents.model.vision == what.model.vision
    assert any("EVA02-CLIP-B-16" in note and "not shown" in note for note in report.notes)
    assert any("holds a vision tower: text tower and logit scale are left out" in note for note in report.notes)
    assert set(load_file(tmp_path / "tower" / "model.safetensors")) >= {"head.weight", "blocks.11.mlp.fc2.weight"}


def test_another_image_size(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", what_of(EVA))
    report = convert(run, tmp_path / "large", to="megaeva", image_size=24)
    assert report.notes == ("resized (upstream) from images of 16 px in patches of 4 px to 24 px in patches of 4 px",)
    before, after = read(run), read(tmp_path / "large")
    expected = resize_positions(before["vision.pos_embed"], 6, method="upstream", ln_pre=False)
    assert torch.equal(after["vision.pos_embed"], expected)
    assert same_bits(after | {"vision.pos_embed": before["vision.pos_embed"]}, before)
    assert run_contents(tmp_path / "large").model.vision.image_size == 24


# ------------------------------------------------------------------------------------------- refused before it writes


def refusal(tmp_path: Path, call: Callable[[], object]) -> str:
    """The message of a call that fails and leaves everything as it was."""
    before = everything_in(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        call()
    assert everything_in(tmp_path) == before
    return str(caught.value)


def test_a_format_that_is_not_known(tmp_path: Path) -> None:
    text = refusal(tmp_path, lambda: convert(tmp_path / "a", tmp_path / "b", to="hf_clip"))
    assert "format 'hf_clip' is not known; it must be one of megaeva, eva" in text and "did you mean hf-clip?" in text


def test_a_source_that_is_not_there_and_a_destination_that_is(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path, lambda: convert(tmp_path / "a", tmp_path / "b", to="eva"))
    write_eva(tmp_path / "a.pt", what_of(EVA))
    text = refusal(tmp_path, lambda: convert(tmp_path / "a.pt", tmp_path / "a.pt", to="megaeva"))
    assert "a.pt exists; a conversion replaces nothing" in text


def test_a_destination_below_a_file(tmp_path: Path) -> None:
    write_eva(tmp_path / "a.pt", what_of(EVA))
    model = what_of(EVA).model
    text = refusal(tmp_path, lambda: convert(tmp_path / "a.pt", tmp_path / "a.pt" / "b", to="megaeva", model=model))
    assert f"{tmp_path}/a.pt/b cannot be made: {tmp_path}/a.pt is a file; it must be a folder" in text


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    what = what_of(EVA)
    theirs = write_eva(tmp_path / "a.pt", what)
    torch.save(theirs | {"visual.head.bias": torch.zeros(20, dtype=torch.int64)}, tmp_path / "a.pt")
    text = refusal(tmp_path, lambda: convert(tmp_path / "a.pt", tmp_path / "b", to="eva", model=what.model))
    assert "visual.head.bias: is torch.int64, must be of floating point" in text


def test_rotary_tables_of_another_model(tmp_path: Path) -> None:
    what = what_of(EVA)
    theirs = write_eva(tmp_path / "a.pt", what)
    name = "visual.rope.freqs_cos"
    torch.save(theirs | {name: torch.zeros_like(theirs[name])}, tmp_path / "a.pt")
    text = refusal(tmp_path, lambda: convert(tmp_path / "a.pt", tmp_path / "b", to="eva", model=what.model))
    assert text.startswith(f"{tmp_path}/a.pt: rope.freqs_cos and freqs_sin [")


def test_names_of_no_format(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    text = refusal(tmp_path, lambda: convert(tmp_path / "a.safetensors", tmp_path / "b", to="eva"))
    assert f"{tmp_path}/a.safetensors holds layer.weight: no format has these names" in text


def test_the_wrong_variant_a_wrong_shape_and_a_missing_tensor(tmp_path: Path) -> None:
    what = what_of(EVA)
    theirs = write_eva(tmp_path / "a.pt", what)
    text = refusal(tmp_path, lambda: convert(tmp_path / "a.pt", tmp_path / "b", to="megaeva", model="EVA-CLIP-8B"))
    assert "a.pt (eva) contradicts the model given (EVA-CLIP-8B)" in text
    name = "visual.blocks.1.attn.proj.weight"
    for wrong, words in ((theirs[name][:-1], "is [31, 32], must be [32, 32]"), (None, "missing, must be [32, 32]")):
        state = {k: wrong if k == name else t for k, t in theirs.items() if k != name or wrong is not None}
        torch.save(state, tmp_path / "a.pt")
        text = refusal(tmp_path, lambda: convert(tmp_path / "a.pt", tmp_path / "b", to="megaeva", model=what.model))
        assert f"{name}: {words}" in text and "a.pt" in text
    text = refusal(tmp_path, lambda: convert(tmp_path / "a.pt", tmp_path / "b", to="megaeva"))
    assert "is no published variant; the nearest is" in text and "--model-config" in text


def test_a_configuration_that_contradicts_the_tensors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", what_of(CLIP))
    convert(run, tmp_path / "hf", to="hf-clip")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 64
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    text = refusal(tmp_path, lambda: convert(tmp_path / "hf", tmp_path / "b", to="megaeva"))
    assert "contradicts the configuration beside it" in text
    assert "vision_model.encoder.layers.0.mlp.fc1.weight: is [44, 32], must be [64, 32]" in text
    # And of a run.
    info = json.loads((run / "megaeva.json").read_text())
    info["model"]["text"]["context_length"] = 11
    (run / "megaeva.json").write_text(json.dumps(info))
    assert "was edited" in refusal(tmp_path, lambda: convert(run, tmp_path / "b", to="hf-clip"))
    (run / "megaeva.json").write_text(layout.info_text(info))
    text = refusal(tmp_path, lambda: convert(run, tmp_path / "b", to="hf-clip"))
    assert (
        "does not hold what its megaeva.json says, 1 differences:\n  text.pos_embed: is [10, 48], must be [11, 48]"
        in text
    )
    text = refusal(tmp_path, lambda: convert(run, tmp_path / "b", to="hf-clip", model=CLIP))
    assert "is a run, whose megaeva.json says which model it is" in text


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    mim = write_run(tmp_path / "mim", what_of(EVA, "mim"))
    text = refusal(tmp_path, lambda: convert(mim, tmp_path / "b", to="hf-eva"))
    assert "holds weights of kind mim, hf-eva holds clip" in text and "use one of megaeva, eva-mim" in text
    eva = write_run(tmp_path / "eva", what_of(EVA))
    text = refusal(tmp_path, lambda: convert(eva, tmp_path / "b", to="hf-clip"))
    assert "cannot be written as hf-clip: " in text and "(megaeva holds every model)" in text


def test_a_disk_that_is_too_small_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", what_of(EVA))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: usage._replace(free=2**16))
    text = refusal(tmp_path, lambda: convert(run, tmp_path / "new" / "b", to="hf-eva"))
    assert "MiB and its disk has 0 MiB; it must fit; free space" in text


# ------------------------------------------------------------------------------------------------- while it is writing


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_number_that_is_not_finite(value: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in weights(what_of(EVA)).items()}
    state["text.blocks.layers.1.mlp.linear_fc2.weight"][3, 5] = float(value)
    run = write_run(tmp_path / "run", what_of(EVA), state)
    text = refusal(tmp_path, lambda: convert(run, tmp_path / "new" / "b", to="hf-eva"))
    assert f"{run}: text.blocks.layers.1.mlp.linear_fc2.weight [48, 192] has 1 elements that are not finite" in text
    assert f"the first {value} at [3, 5]" in text


@pytest.mark.parametrize("to", ["megaeva", "eva", "hf-eva"])
def test_a_disk_that_fills_up(to: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", what_of(EVA))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            convert(run, tmp_path / "new" / "b", to=to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    text = refusal(tmp_path, limited)
    assert re.search(
        r"/new/b cannot be written \((File too large|the file was cut short.*)\); its disk must take", text
    )
    assert "nothing was left behind" in text


def test_a_damaged_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", what_of(EVA))
    file = run / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    text = refusal(tmp_path, lambda: convert(run, tmp_path / "b", to="eva"))
    assert "__0_0.distcp" in text


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", what_of(EVA))
    before = everything_in(tmp_path)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(run, tmp_path / "b", to="hf-eva")
    assert everything_in(tmp_path) == before
