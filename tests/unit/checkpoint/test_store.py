"""Saving, keeping, resuming and refusing checkpoints in one process."""

import json
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megaeva.checkpoint import layout, store, torch_dist
from megaeva.checkpoint.convert.sidecar import info_contents
from megaeva.checkpoint.convert.start import open_weights
from megaeva.checkpoint.layout import read_model_section
from megaeva.checkpoint.store import CheckpointStore, LoadedState
from megaeva.checkpoint.weights import load_weights
from megaeva.config.schema import Config
from megaeva.errors import CheckpointError
from megaeva.optim.build import build_optimizer
from megaeva.parallel.grid import Grid
from megaeva.parallel.runtime import Runtime
from tests.helpers.saving import save_now
from tests.helpers.toy_towers import build_towers, compute_gradients, make_config


class Run:
    """Toy towers, their optimizer and a store."""

    def __init__(self, runtime: Runtime, folder: Path, keep: int = 2, seed: int = 0, **optim: Any) -> None:
        towers = {key: optim.pop(key) for key in ("train_scale", "width") if key in optim}
        self.cfg = make_config(str(folder), **optim)
        self.towers = build_towers(runtime, self.cfg, seed=seed, **towers)
        self.optimizer, self.rate = build_optimizer(self.towers, self.cfg)
        self.store = CheckpointStore(folder, keep)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.rate.set(step)
            compute_gradients(self.towers, step)
            assert self.optimizer.step()[0]

    def save(self, step: int) -> Path:
        return save_now(
            self.store,
            step,
            self.towers,
            self.optimizer,
            config=self.cfg,
            loader_state={"at": step},
            extra={"a": 1},
            data_grid=self.towers[2].grid,
        )

    def load(self, path: Path, config: Config | None = None) -> LoadedState:
        return self.store.load(path, self.towers, self.optimizer, config=config or self.cfg)

    def vision(self) -> dict[str, tuple[nn.Module, Grid]]:
        """As `load_weights` takes it."""
        return {"vision": (self.towers[0].module, self.towers[0].grid)}

    def tensors(self) -> list[torch.Tensor]:
        return [t.detach().clone() for tower in self.towers for t in tower.module.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize(
    "optim",
    [
        {"name": "adamw"},
        {"name": "lamb"},
        {"name": "adamw", "precision": "bf16"},
        {"name": "lamb", "distributed_optimizer": False},
        {"name": "adamw", "distributed_optimizer": False, "precision": "bf16"},
        {"name": "adamw", "train_scale": False},
    ],
    ids=str,
)
def test_a_resumed_run_continues_bit_for_bit(runtime: Runtime, tmp_path: Path, optim: dict[str, Any]) -> None:
    run = Run(runtime, tmp_path, clip_grad_norm=0.5, **optim)
    run.train(0, 2)
    path = run.save(2)
    at_save = run.tensors()
    run.train(2, 5)

    resumed = Run(runtime, tmp_path, seed=1, clip_grad_norm=0.5, **optim)
    assert not equal(resumed.tensors(), at_save)
    assert resumed.load(path) == LoadedState(step=2, loader_states=[{"at": 2}], extra={"a": 1})
    assert equal(resumed.tensors(), at_save)
    resumed.train(2, 5)
    assert equal(resumed.tensors(), run.tensors())


def test_a_checkpoint_before_the_first_step(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(0)
    run.train(0, 2)
    resumed = Run(runtime, tmp_path, seed=1)
    resumed.load(path)
    resumed.train(0, 2)
    assert equal(resumed.tensors(), run.tensors())


def test_either_kind_of_optimizer_reads_the_others_state(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path, distributed_optimizer=True)
    run.train(0, 2)
    path = run.save(2)
    plain = Run(runtime, tmp_path, seed=1, distributed_optimizer=False)
    plain.load(path)
    run.train(2, 4)
    plain.train(2, 4)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(run.tensors(), plain.tensors()))


def test_keeps_the_newest_and_cleans_what_a_killed_save_left(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path, keep=2)
    assert run.store.newest() is None
    for step in (1, 2, 3):
        run.save(step)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".writing_step_00000009").mkdir()
    (checkpoints / ".writing_step_00000009" / "__0_0.distcp").write_bytes(b"half")
    (checkpoints / "step_00000007").mkdir()  # not ours: no megaeva.json
    assert run.store.newest() == checkpoints / "step_00000003"
    run.save(4)
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"step_00000003", "step_00000004", "step_00000007"}


def test_saving_a_step_again_replaces_it(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    run.save(1)
    run.train(0, 1)
    path = run.save(1)
    resumed = Run(runtime, tmp_path, seed=1)
    resumed.load(path)
    assert equal(resumed.tensors(), run.tensors())
    assert [p.name for p in path.parent.iterdir()] == ["step_00000001"]


def test_killed_between_the_two_renames_of_a_replacement(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(1)
    path.rename(path.with_name(".replaced_step_00000001"))
    assert run.store.newest() == path.with_name(".replaced_step_00000001")
    run.save(2)
    assert {p.name for p in path.parent.iterdir()} == {"step_00000001", "step_00000002"}


def test_a_full_disk_leaves_the_last_good_checkpoint(runtime: Runtime, tmp_path: Path) -> None:
    """The file size limit makes real writes fail part-way, as a full disk does."""
    run = Run(runtime, tmp_path, width=64)
    good = run.save(1)
    before = {path.name: path.stat().st_mtime_ns for path in good.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            run.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = str(caught.value)
    assert "step_00000002" in text
    assert os.strerror(27) in text  # EFBIG, as ENOSPC would be named
    assert "MiB free" in text
    assert str(good) in text
    assert {path.name for path in good.parent.iterdir()} == {"step_00000001"}
    assert {path.name: path.stat().st_mtime_ns for path in good.iterdir()} == before
    run.save(3)
    Run(runtime, tmp_path, width=64, seed=1).load(good)


@pytest.mark.parametrize("place", ["FileWriter", "write_index"])
def test_no_space_outside_the_tensors(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = Run(runtime, tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(store, place, full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*no earlier checkpoint"):
        run.save(1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_another_model_is_refused_before_any_tensor_is_read(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(1)
    data = run.cfg.model_dump()
    data["model"]["vision"]["num_heads"] = 4
    data["model"]["embed_dim"] = 8
    data["model"]["variant"] = "another name is no difference"
    before = run.tensors()
    (path / ".metadata").unlink()  # reading on would fail differently
    with pytest.raises(CheckpointError) as caught:
        run.load(path, Config.model_validate(data))
    text = str(caught.value)
    assert "model.vision.num_heads: checkpoint 2, recipe 4" in text
    assert "model.embed_dim: checkpoint 4, recipe 8" in text
    assert "variant" not in text
    assert equal(run.tensors(), before)


def test_another_batch_size_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(3)
    batch = run.cfg.train.global_batch_size
    train = run.cfg.train.model_copy(update={"global_batch_size": 2 * batch})
    with pytest.raises(CheckpointError, match=f"train.global_batch_size: checkpoint {batch}, recipe {2 * batch}"):
        run.load(path, run.cfg.model_copy(update={"train": train}))


def test_another_optimizer_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(3)
    other = {"adamw": "lamb", "lamb": "adamw"}[run.cfg.optim.name]
    optim = run.cfg.optim.model_copy(update={"name": other})
    with pytest.raises(CheckpointError, match=f"optim.name: checkpoint {run.cfg.optim.name}, recipe {other}"):
        run.load(path, run.cfg.model_copy(update={"optim": optim}))


@pytest.mark.parametrize(("before", "after"), [([], ["vision"]), (["vision"], []), (["text"], ["vision"])])
def test_other_frozen_towers_are_refused(runtime: Runtime, tmp_path: Path, before: list[str], after: list[str]) -> None:
    path = Run(runtime, tmp_path, frozen=before).save(3)
    run = Run(runtime, tmp_path, frozen=after)
    weights = run.tensors()
    with pytest.raises(CheckpointError) as caught:
        run.load(path)
    assert f"optim.frozen: checkpoint {before}, recipe {after}" in str(caught.value)
    assert "must have the same task, model, batch, optimizer and frozen towers; set" in str(caught.value)
    assert equal(run.tensors(), weights)


def test_what_a_recipe_changed_is_told(runtime: Runtime, tmp_path: Path) -> None:
    path = Run(runtime, tmp_path, ema_decay=0.5).save(1)
    state = Run(runtime, tmp_path, weight_decay=0.2).load(path)
    assert (state.average_ends, state.average_begins) == (True, False)
    expected = ("optim.ema_decay: checkpoint 0.5, recipe None", "optim.weight_decay: checkpoint 0.1, recipe 0.2")
    assert state.changed == expected


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(("before", "after"), [("bf16", "fp16"), ("bf16", "fp32"), ("fp32", "bf16")])
def test_weights_in_another_precision_are_those_of_the_main_parameters(
    runtime: Runtime, tmp_path: Path, before: str, after: str, distributed: bool
) -> None:
    run = Run(runtime, tmp_path, precision=before, distributed_optimizer=distributed)
    run.train(0, 2)
    path = run.save(2)
    resumed = Run(runtime, tmp_path, seed=1, precision=after, distributed_optimizer=distributed)
    assert resumed.load(path).changed == (f"train.precision: checkpoint {before!r}, recipe {after!r}",)
    for tower, trained in zip(resumed.towers, run.towers, strict=True):
        mains = [state["param"] for _, _, state, _ in run.optimizer.held_state(trained.name)]
        for weight, main in zip(tower.module.parameters(), mains, strict=True):
            assert torch.equal(weight.flatten(), main.flatten().to(weight.dtype))


def test_a_damaged_checkpoint_is_named(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(1)
    (data,) = path.glob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"step_00000001.__0_0.distcp has \d+ bytes.*the file must be whole"):
        run.load(path)
    (path / "megaeva.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"megaeva\.json cannot be read"):
        run.load(path)


def test_a_checkpoint_that_its_run_deletes_meanwhile(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path, other = run.save(1), run.save(2)
    reader = torch_dist.Reader(path)
    layout.remove(path)
    for read in (
        lambda: reader.read("vision.pos_embed"),
        lambda: torch_dist.Reader(path),
        lambda: layout.read_info(path),
        lambda: torch_dist._read_checksums(path / torch_dist.CHECKSUMS_NAME),
        lambda: open_weights(path),
        lambda: layout.find_checkpoint(path),
    ):
        with pytest.raises(
            CheckpointError, match=r"is not there, or not any more: .*save.keep.* run the command again"
        ):
            read()
    with pytest.raises(CheckpointError, match=rf"name another one \({other.name} here\)\.$"):
        layout.find_checkpoint(path)


def test_what_to_do_about_a_damaged_checkpoint(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(7)
    flip(next(path.glob("*.distcp")), 70)
    with pytest.raises(CheckpointError, match=rf"; --resume .*: delete {path} and start again, there is no earlier"):
        run.load(path)
    path = run.save(12)
    (path / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=rf"; --resume .*: delete {path} and it continues from step_00000007\.$"):
        run.load(path)
    (path / layout.INFO_NAME).write_text("[]")
    with pytest.raises(CheckpointError, match=rf"; --resume .*: delete {path} and it continues from step_00000007\.$"):
        run.load(path)


def test_another_vocabulary_of_as_many_words_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for file, word in zip(files, (600, 601, 600)):
        file.write_text(json.dumps({"clip_ids": [*range(512), word, 49406, 49407]}))
    run = Run(runtime, tmp_path)

    def with_vocabulary(file: Path) -> Config:
        return run.cfg.model_copy(update={"data": run.cfg.data.model_copy(update={"tokenizer_subset": str(file)})})

    run.cfg = with_vocabulary(files[0])
    path = run.save(1)
    assert run.load(path, with_vocabulary(files[2])).step == 1, "the words count, not the file's name"
    with pytest.raises(CheckpointError, match=r"b\.json is not the saved run's vocabulary"):
        run.load(path, with_vocabulary(files[1]))


def test_an_edited_megaeva_json_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    """Step, position in the data and Adam's t have no other copy that would show a change."""
    run = Run(runtime, tmp_path)
    path = run.save(1) / layout.INFO_NAME
    text = path.read_text()
    info = json.loads(text)
    path.write_text(json.dumps(info))  # the same values
    assert run.load(path.parent).step == 1
    for place, (before, after) in {
        "a flipped bit of Adam's t": ('"optimizer_steps": 0', '"optimizer_steps": 1'),
        "a position": ('"at": 1', '"at": 3'),
        "a key": ('"samples"', '"sampler"'),
    }.items():
        assert before in text, place
        path.write_text(text.replace(before, after))
        with pytest.raises(CheckpointError, match=r"megaeva\.json: the CRC-32 of its values is .*, expected"):
            run.load(path.parent)
    del info[layout.CHECKSUM]
    path.write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match=r"megaeva\.json has no 'crc32'.*init\.clip"):
        run.load(path.parent)


def test_metadata_runs_no_code(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(1)
    victim = tmp_path / "written by the pickle"

    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(victim),)

    (path / "checksums.json").unlink()  # they would give it away before
    (path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"names (posix|os)\.mkdir"):
        run.load(path)
    assert not victim.exists()


def test_mcore_itself_reads_the_folder(runtime: Runtime, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    run = Run(runtime, tmp_path)
    path = run.save(1)
    tensors = dist_checkpointing.load_plain_tensors(str(path))
    whole = run.towers[0].module.state_dict()
    assert torch.equal(tensors["vision.head.weight"], whole["head.weight"])
    assert tensors["scale.log_scale"].shape == ()


def test_torch_itself_reads_the_folder(runtime: Runtime, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    run = Run(runtime, tmp_path)
    run.train(0, 1)
    path = run.save(1)
    (held,) = (h for h in run.optimizer.held_state("vision") if h.parameter is run.towers[0].module.head.weight)
    expected = {"vision.head.weight": held.parameter}
    for name, tensor in held.state.items():
        expected[f"optimizer.state.{name}.vision.head.weight"] = tensor.view(held.parameter.shape)
    state = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    dcp.load(state, checkpoint_id=path)
    for key, tensor in expected.items():
        assert tensor.any()
        assert torch.equal(state[key], tensor), key


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_an_error_that_names_file_and_tensor(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(1)
    flip(path / "__0_0.distcp", 70)
    for read in (run.load, lambda path: load_weights(path, run.vision())):
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp, tensor vision\.pos_embed, .*CRC-32.*expected"):
            read(path)


def test_a_frozen_tower_cannot_be_resumed_as_a_trained_one(runtime: Runtime, tmp_path: Path) -> None:
    path = Run(runtime, tmp_path, train_scale=False).save(1)
    with pytest.raises(
        CheckpointError, match=r"optimizer\.state\.param\.scale\.log_scale: checkpoint has none, run \[\]"
    ):
        Run(runtime, tmp_path).load(path)


def test_a_converted_folder_has_nothing_to_resume(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(0)
    info = json.loads((path / layout.INFO_NAME).read_text())
    del info["optimizer"], info["optimizer_steps"]
    (path / layout.INFO_NAME).write_text(layout.info_text(info))
    with pytest.raises(CheckpointError, match=r"was converted .* no optimizer state.*init\.clip"):
        run.load(path)


def test_a_checkpoint_before_checksums_gives_weights_only(runtime: Runtime, tmp_path: Path) -> None:
    """As megaeva 1 wrote it: by torch."""
    import torch.distributed.checkpoint as dcp

    run = Run(runtime, tmp_path)
    path = run.save(1)
    info = json.loads((path / layout.INFO_NAME).read_text()) | {"format": 1}
    for key in ("kind", "preprocess", "clip_ids", "teacher_dim", "config", layout.CHECKSUM):
        del info[key]
    tensors = {f"vision.{name}": tensor.detach() for name, tensor in run.towers[0].module.named_parameters()}
    for file in path.iterdir():
        file.unlink()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    (path / layout.INFO_NAME).write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match=r"has format 1, without checksums .*init\.clip"):
        run.load(path)
    other = Run(runtime, tmp_path, seed=1)
    report = load_weights(path, other.vision())
    assert any("note: no checksums" in line for line in report.lines())
    assert torch.equal(other.towers[0].module.head.weight, run.towers[0].module.head.weight)


def test_a_newer_format_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    path = run.save(1)
    info = json.loads((path / layout.INFO_NAME).read_text()) | {"format": 99}
    (path / layout.INFO_NAME).write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match="has format 99"):
        run.load(path)


def test_information_beside_the_tensors(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    info = json.loads((run.save(3) / layout.INFO_NAME).read_text())
    assert (info["step"], info["samples"], info["task"]) == (3, 24, "contrastive")
    assert info["loader"] == [{"at": 3}]
    assert info["grids"] == {name: {"tp": 1, "pp": 1, "vpp": 1, "dp": 1} for name in ("vision", "text", "scale")}
    assert (info["kind"], info["clip_ids"], info["teacher_dim"]) == ("clip", None, None)
    assert info_contents(tmp_path, info).model == run.cfg.model
    assert Config.model_validate(info["config"]) == run.cfg
    assert read_model_section(tmp_path) == run.cfg.model
    assert read_model_section(tmp_path / "checkpoints" / "step_00000003") == run.cfg.model


# ------------------------------------------------------------------------------------------------------ load_weights


def test_weights_of_chosen_towers(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    run.train(0, 1)
    run.save(1)
    other = Run(runtime, tmp_path, seed=1)
    fresh_head = other.towers[0].module.head.weight.clone()
    text_before = [p.clone() for p in other.towers[1].module.parameters()]
    report = load_weights(tmp_path, other.vision(), skip=("vision.head", "vision.blocks.*.bias"))
    source, target = (dict(r.towers[0].module.named_parameters()) for r in (run, other))
    for name, tensor in target.items():
        kept = name == "head.weight" or (name.startswith("blocks.") and name.endswith(".bias"))
        assert torch.equal(tensor, source[name]) != kept, name
        assert (f"vision.{name}" in report.fresh) == kept
        assert (f"vision.{name}" in report.loaded) != kept
    assert torch.equal(target["head.weight"], fresh_head)
    assert equal(list(other.towers[1].module.parameters()), text_before)
    assert {"text.head.weight", "scale.log_scale", "vision.head.weight"} <= set(report.unused)
    assert not any(key.startswith("optimizer") for key in report.unused)
    assert report.lines()[0].endswith(f"{len(report.loaded)} tensors loaded")
    assert any("fresh: vision.blocks.layers.0.mlp.linear_fc1.bias" in line for line in report.lines())


def test_weights_are_cast_to_the_modules_dtype(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    run.save(1)
    other = Run(runtime, tmp_path, seed=1, precision="bf16")
    load_weights(tmp_path, other.vision())
    expected = run.towers[0].module.head.weight.bfloat16()
    assert torch.equal(other.towers[0].module.head.weight, expected)


def test_unexplained_tensors_are_errors_on_either_side(runtime: Runtime, tmp_path: Path) -> None:
    run = Run(runtime, tmp_path)
    run.save(1)
    deeper = Run(runtime, tmp_path, num_layers=3).vision()
    with pytest.raises(CheckpointError, match=r"vision\.blocks\.layers\.2\.mlp\.linear_fc1\.weight: not in the check"):
        load_weights(tmp_path, deeper)
    load_weights(tmp_path, deeper, skip=("vision.blocks.layers.2",))

    del run.towers[0].module.norm
    before = [p.clone() for p in run.towers[0].module.parameters()]
    with pytest.raises(CheckpointError, match=r"vision\.norm\.weight: not in the model"):
        load_weights(tmp_path, run.vision())
    assert equal(list(run.towers[0].module.parameters()), before)
    load_weights(tmp_path, run.vision(), skip=("vision.norm",))


def test_another_shape_is_an_error_that_shows_both(runtime: Runtime, tmp_path: Path) -> None:
    Run(runtime, tmp_path).save(1)
    wider = Run(runtime, tmp_path, width=16).vision()
    with pytest.raises(CheckpointError, match=r"vision\.norm\.weight: checkpoint \[8\], model \[16\]"):
        load_weights(tmp_path, wider)


def test_a_path_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_model_section(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no"):
        read_model_section(tmp_path)
