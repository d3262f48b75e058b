"""Files of tensors in and out: torch.load, torch.jit, zipfile and the safetensors library are the oracles."""

import argparse
import contextlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.io import RunSink, SafetensorsSink, TorchSink, open_source
from megaeva.checkpoint.convert.sidecar import info_contents
from megaeva.checkpoint.layout import read_info, read_model_section
from megaeva.checkpoint.tensors import TensorInfo, TensorSink
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import CheckpointError


def some_state() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(7)
    return {
        "logit_scale": torch.tensor(4.6),
        "visual.half": torch.randn(33, 5, generator=draw).half(),
        "visual.bfloat": torch.randn(3, 5, 7, generator=draw).bfloat16(),
        "visual.float": torch.randn(100, generator=draw),
        "text.ids": torch.arange(9).view(1, 9),
        "text.mask": torch.tensor([True, False, True]),
        "text.bytes": torch.arange(5, dtype=torch.uint8),
        "text.none": torch.empty(0, 4),
    }


def infos_of(state: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def write_all(sink: TensorSink, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        sink.write(name, tensor)
    sink.finish()


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and one[k].shape == other[k].shape and torch.equal(one[k], other[k]) for k in one
    )


def read_all(path: Path) -> dict[str, Tensor]:
    source = open_source(path)
    try:
        read = {name: source.read(name) for name in source.infos}
        assert infos_of(read) == dict(source.infos)
        assert all(tensor.is_contiguous() for tensor in read.values())
        return read
    finally:
        source.close()


# ------------------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("keys", [(), ("model",), ("module",), ("state_dict",), ("model", "module")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_is_found_where_training_scripts_put_it(keys: tuple[str, ...], prefix: str, tmp_path: Path) -> None:
    state = some_state()
    saved: object = OrderedDict(
        (prefix + name, nn.Parameter(t) if t.is_floating_point() else t) for name, t in state.items()
    )
    for key in reversed(keys):
        args = argparse.Namespace(lr=1e-3, betas=(0.9, 0.98))
        saved = {"epoch": 3, "best": None, "args": args, "optimizer": {"state": {0: torch.ones(3)}}, key: saved}
    torch.save(saved, tmp_path / "weights.pt")
    assert same_bits(read_all(tmp_path / "weights.pt"), state)


def test_strided_and_shared_tensors(tmp_path: Path) -> None:
    whole = torch.arange(60.0).view(6, 10)
    state = {"t": whole.t(), "rows": whole[2:4], "column": whole[:, 3], "spread": torch.ones(1).expand(4, 3)}
    torch.save(state, tmp_path / "weights.bin")
    loaded = torch.load(tmp_path / "weights.bin", weights_only=True)
    assert same_bits(read_all(tmp_path / "weights.bin"), loaded)


def test_module_with_metadata_and_numpy_beside(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    best = torch.ones(1).numpy().max()
    torch.save({"state_dict": module.state_dict(), "best": best, "dtype": torch.float16}, tmp_path / "a.pth")
    assert same_bits(read_all(tmp_path / "a.pth"), module.state_dict())


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(12, 4).half())
        self.out_proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(x)


class _Archive(nn.Module):
    """Names and kinds of entries of OpenAI's archives."""

    def __init__(self) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(7, 4))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 4, 2, bias=False).half()
        self.visual.resblocks = nn.Sequential(_Attention(), _Attention())
        self.register_buffer("input_resolution", torch.tensor(224))
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.visual.resblocks:
            x = block(x)
        return x + len(self.sizes)


def test_torchscript_archive_is_read_without_torch_jit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Archive()
    path = tmp_path / "ViT-tiny.pt"
    torch.jit.save(torch.jit.trace(model, torch.ones(2, 4)), path)
    expected = torch.jit.load(path).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    monkeypatch.setattr(torch._C, "import_ir_module", None)
    read = read_all(path)
    assert set(read) == set(expected) == set(model.state_dict())
    assert same_bits({name: read[name] for name in expected}, dict(expected))


def test_safetensors_single_and_sharded(tmp_path: Path) -> None:
    state = some_state()
    save_file(state, tmp_path / "model.safetensors")
    read = read_all(tmp_path / "model.safetensors")
    assert set(read) == set(state) and all(torch.equal(read[name], state[name]) for name in state)
    assert same_bits(read_all(tmp_path), read)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_of_hugging_face(kind: str, tmp_path: Path) -> None:
    state = some_state()
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    weight_map = {}
    for number in (1, 2, 3):
        file = f"{stem}-{number:05d}-of-00003.{kind}"
        shard = dict(list(state.items())[number - 1 :: 3])
        save(shard, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    weight_map = {name: weight_map[name] for name in state}
    index = tmp_path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same_bits(read_all(tmp_path), state)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=f"names {file}; 1 of 3 shards are not in its folder"):
        open_source(index)


def test_a_folder_with_one_file_is_that_file_and_several_are_asked_about(tmp_path: Path) -> None:
    torch.save(some_state(), tmp_path / "EVA02_CLIP.pt")
    assert same_bits(read_all(tmp_path), some_state())
    torch.save(some_state(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"several files of weights \(EVA02_CLIP.pt, other.pt\).*name the file"):
        open_source(tmp_path)


def test_reading_does_not_keep_memory_of_the_file(tmp_path: Path) -> None:
    """400 MB in 8 tensors: peak resident memory grows by two of them at most."""
    script = (
        "import sys, resource, torch\n"
        "from megaeva.checkpoint.convert.io import open_source, TorchSink\n"
        "from pathlib import Path\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for file in sys.argv[1:]:\n"
        "    source = open_source(file)\n"
        "    for name in source.infos: source.read(name)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    state = {str(i): torch.zeros(12_500_000) for i in range(8)}
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    command = [sys.executable, "-c", script, str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")]
    grown_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown_kib < 110 * 1000


# -------------------------------------------------------------------------------------------------------------- sinks


@pytest.mark.parametrize("name", ["weights.pt", "gewichte_ü.pt"])
def test_torch_sink_writes_what_torch_save_writes(name: str, tmp_path: Path) -> None:
    state = some_state()
    path = tmp_path / "new" / name
    write_all(TorchSink(path, infos_of(state)), state)
    for mmap in (False, True):
        assert same_bits(torch.load(path, weights_only=True, mmap=mmap), state)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every CRC-32
        torch.save(state, tmp_path / "theirs.pt")
        with zipfile.ZipFile(tmp_path / "theirs.pt") as theirs:
            alike = [(i.filename.partition("/")[2], i.file_size, i.CRC) for i in archive.infolist()]
            expected = [(i.filename.partition("/")[2], i.file_size, i.CRC) for i in theirs.infolist()]
            assert [a for a in alike if "data/" in a[0][:5]] == [e for e in expected if "data/" in e[0][:5]]
    assert same_bits(read_all(path), state)
    assert sorted(os.listdir(path.parent)) == [name]


@pytest.mark.parametrize("shard_bytes", [1, 300, 10**9])
def test_safetensors_sink_is_read_by_the_library(shard_bytes: int, tmp_path: Path) -> None:
    state = some_state()
    folder = tmp_path / "out"
    write_all(SafetensorsSink(folder, infos_of(state), shard_bytes, stem="weights"), state)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == {1: 8, 300: 5, 10**9: 1}[shard_bytes]
    loaded: dict[str, Tensor] = {}
    for file in files:
        loaded |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":  # every tensor is aligned to its element
                assert (8 + length + entry["data_offsets"][0]) % state[name].element_size() == 0
    assert same_bits({name: loaded[name] for name in state}, state)
    if len(files) > 1:
        index = json.loads((folder / "weights.safetensors.index.json").read_text())
        assert list(index["weight_map"]) == list(state)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
        read = read_all(folder / "weights.safetensors.index.json")
        assert same_bits(read, state)
        sizes = [sum(state[n].nbytes for n in state if index["weight_map"][n] == f.name) for f in files]
        assert max(sizes) <= max(shard_bytes, max(t.nbytes for t in state.values()))


def _sinks(folder: Path, beside: object) -> list[tuple[Path, object]]:
    infos = infos_of(some_state())
    return [
        (folder / "a.pt", lambda: TorchSink(folder / "a.pt", infos, beside)),
        (folder / "b", lambda: SafetensorsSink(folder / "b", infos, beside=beside)),
    ]


def _run_sink(folder: Path) -> RunSink:
    model = ModelSection.model_validate(VARIANTS["EVA02-CLIP-B-16"])
    return RunSink(folder, Contents("clip", model), infos_of(some_state()))


def test_files_beside_the_weights(tmp_path: Path) -> None:
    for _, make in _sinks(tmp_path, lambda folder: (folder / "config.json").write_text("{}")):
        sink = make()
        assert not any(not name.startswith(".") for name in os.listdir(tmp_path) if name not in ("a.pt", "config.json"))
        write_all(sink, some_state())
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b", "config.json"]
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match=r"config.json exists; a conversion replaces nothing"):
        write_all(
            TorchSink(tmp_path / "c.pt", infos_of(some_state()), lambda f: (f / "config.json").touch()), some_state()
        )


def test_an_aborted_sink_leaves_nothing(tmp_path: Path) -> None:
    deep = tmp_path / "new" / "deep"
    for path, make in [*_sinks(deep, None), (deep / "c", lambda: _run_sink(deep / "c"))]:
        sink = make()
        sink.write("logit_scale", torch.tensor(1.0))
        assert not path.exists()
        sink.abort()
        assert os.listdir(tmp_path) == []


def test_a_destination_that_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    for path, make in [*_sinks(tmp_path, None), (tmp_path / "c", lambda: _run_sink(tmp_path / "c"))]:
        path.write_text("mine")
        with pytest.raises(CheckpointError, match=f"{path.name} exists; a conversion replaces nothing; name a"):
            make()
        assert path.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b", "c"]


def test_the_rest_of_a_killed_conversion_is_replaced_and_a_running_one_is_not(tmp_path: Path) -> None:
    hidden = tmp_path / ".writing_a.pt"
    hidden.mkdir()
    (hidden / "a.pt").write_bytes(b"half")
    (hidden / "old_config.json").touch()
    (path, make), _ = _sinks(tmp_path, None)
    sink = make()
    with pytest.raises(CheckpointError, match=r"a.pt is being written by another conversion"):
        make()
    write_all(sink, some_state())
    assert same_bits(read_all(path), some_state()) and os.listdir(tmp_path) == ["a.pt"]


def test_run_sink_is_read_back_by_torch_and_by_a_run(tmp_path: Path) -> None:
    names = ("vision.half", "vision.float", "text.ids", "scale.log_scale")
    values = some_state()
    state = dict(zip(names, (values["visual.half"], values["visual.float"], values["text.ids"], torch.tensor(1.5))))
    model = ModelSection.model_validate(VARIANTS["EVA02-CLIP-B-16"])
    contents = Contents("clip", model, clip_ids=(3, 5), source=Path("there.pt"))
    folder = tmp_path / "new" / "run"
    write_all(RunSink(folder, contents, infos_of(state)), state)
    assert os.listdir(tmp_path / "new") == ["run"]
    loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, checkpoint_id=folder)
    assert same_bits(loaded, state)
    assert same_bits(read_all(folder), state)
    info = read_info(folder)
    assert info["step"] == 0 and info["source"] == "there.pt" and "optimizer" not in info
    assert info_contents(folder, info) == replace(contents, source=folder)
    assert read_model_section(folder) == model


def test_of_a_run_the_newest_checkpoint_is_read_without_its_optimizer(tmp_path: Path) -> None:
    model = ModelSection.model_validate(VARIANTS["EVA02-CLIP-B-16"])
    for step, number in ((9, 1.0), (10, 2.0)):
        state = {"vision.w": torch.tensor(number), "optimizer.state.exp_avg.vision.w": torch.ones(1)}
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        write_all(RunSink(folder, Contents("clip", model), infos_of(state)), state)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", folder):
        assert same_bits(read_all(path), {"vision.w": torch.tensor(2.0)})
        assert open_source(path).path == folder
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        open_source(tmp_path / "young")


def test_run_sink_refuses_what_no_run_holds(tmp_path: Path) -> None:
    model = ModelSection.model_validate(VARIANTS["EVA02-CLIP-B-16"])
    with pytest.raises(CheckpointError, match=r"there.pt: text.ids is torch.int8; weights of a run must be one of"):
        RunSink(
            tmp_path / "run",
            Contents("clip", model, source=Path("there.pt")),
            {"text.ids": TensorInfo((3,), torch.int8)},
        )
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- bad input


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    text = str(caught.value)
    assert str(path) in text
    return text


@pytest.mark.parametrize("share", [0.2, 0.7, 0.999])
def test_truncated_files(share: float, tmp_path: Path) -> None:
    torch.save(some_state(), tmp_path / "a.pt")
    save_file(some_state(), tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[: int(share * len(raw))])
        text = refusal(tmp_path / name)
        assert f"({int(share * len(raw))} bytes)" in text and "cut short or damaged, copy it again" in text


def test_a_file_cut_short_while_it_is_open(tmp_path: Path) -> None:
    state = {"a": torch.ones(1000), "b": torch.ones(1000)}
    save_file(state, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 6000)
    source.read("a")
    with pytest.raises(CheckpointError, match=r"a.safetensors: b has 1\d\d\d of its 4000 bytes"):
        source.read("b")


class _Code:
    def __reduce__(self) -> object:
        return os.mkdir, (os.environ["MEGAEVA_TEST_MARK"],)


@pytest.mark.parametrize("name", ["model", "weight"])
def test_code_in_a_pickle_is_named_and_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAEVA_TEST_MARK", str(tmp_path / "ran"))
    torch.save({"w": torch.ones(3), name: _Code()}, tmp_path / "a.pt")
    text = refusal(tmp_path / "a.pt")
    assert "names posix.mkdir, which weights do not need" in text and "weights_only=False" in text
    assert not (tmp_path / "ran").exists()


def test_old_files_of_torch_save_come_with_the_command_that_rewrites_them(tmp_path: Path) -> None:
    torch.save(some_state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    text = refusal(tmp_path / "old.pt")
    code = text.split('python -c "')[1].split('"\n')[0]
    exec(code)
    assert same_bits(read_all(tmp_path / "old_weights.pt"), some_state())
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert "is a pickle, not a zip file" in refusal(tmp_path / "plain.pkl")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"w": torch.ones(2), "step": 3, "name": "x"}, "its top holds step (int), name (str) that is no tensor"),
        ({"model": {"w": torch.ones(2), "step": 3}}, "`model` holds step (int) that is no tensor"),
        ([torch.ones(2)], "its top holds a list that is no tensor"),
        (torch.ones(2), "holds one tensor without a name; it must hold a state dict"),
        ({"w": torch.ones(2).to(torch.float8_e4m3fn)}, "a tensor that is sparse, quantized, or of an unusual dtype"),
        ({"w": torch.ones(2).to_sparse()}, "a tensor that is sparse, quantized, or of an unusual dtype"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "or of an unusual dtype (torch.ComplexFloatStorage)"),
        ({}, "holds no tensor"),
    ],
)
def test_what_is_no_state_dict(saved: object, words: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "a.pt")
    assert words in refusal(tmp_path / "a.pt")


def test_a_packed_zip_and_other_files(tmp_path: Path) -> None:
    torch.save(some_state(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as archive,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in archive.infolist():
            packed.writestr(info.filename, archive.read(info))
    assert "uncompressed in the zip" in refusal(tmp_path / "packed.pt")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert "zip file without data.pkl" in refusal(tmp_path / "b.zip")
    (tmp_path / "c.pt").write_text("<html>not found</html>")
    assert "is no file of weights" in refusal(tmp_path / "c.pt")
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_a_tensor_that_reaches_beyond_its_storage(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(4), "x": torch.ones(300)}, tmp_path / "a.pt")
    shape_of_w = b"K\x04\x85"
    with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(tmp_path / "b.pt", "w") as other:
        pickled = archive.read("a/data.pkl")
        assert pickled.count(shape_of_w) == 1
        for info in archive.infolist():
            crafted = pickled.replace(shape_of_w, b"K\xc8\x85")
            other.writestr(info.filename, crafted if info.filename == "a/data.pkl" else archive.read(info))
    assert "w [200] is not where the pickle says (data/0 of the zip, 16 bytes)" in refusal(tmp_path / "b.pt")


def test_damaged_pickles_never_end_in_a_traceback(tmp_path: Path) -> None:
    torch.save(some_state(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        pickled = archive.read("a/data.pkl")
    draw = torch.Generator().manual_seed(3)
    for _ in range(300):
        damaged = bytearray(pickled)
        damaged[int(torch.randint(len(pickled), (), generator=draw))] = int(torch.randint(256, (), generator=draw))
        with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(tmp_path / "b.pt", "w") as other:
            for info in archive.infolist():
                other.writestr(info.filename, damaged if info.filename == "a/data.pkl" else archive.read(info))
        with contextlib.suppress(CheckpointError):
            read_all(tmp_path / "b.pt")
