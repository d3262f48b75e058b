"""The trainer on Transformer Engine's modules: losses and checkpoints of the local spec, and FP8 steps on ranks."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaeva.data.synthetic import make_shards
from megaeva.observability.metrics import read_metrics
from megaeva.parallel.runtime import Runtime
from megaeva.trainer import Trainer
from tests.helpers.spawn import run_ranks
from tests.helpers.trainer_recipe import model, trainer_recipe
from tests.te_check.without_gpu import bookkeeping, computable

TP2_SP = {name: {"tp": 2, "sequence_parallel": True, "recompute": "full"} for name in ("vision", "text")}
TOWERS = model(vision_layers=3, text_layers=2)
MODEL = TOWERS | {"vision": TOWERS["vision"] | {"ffn_hidden_size": 64}}


def _trainer(
    runtime: Runtime, folder: str, name: str, layer_spec: str, steps: int, resume: bool = False, **train: Any
) -> Trainer:
    sizes = {"total_samples": 32, "global_batch_size": 8, "micro_batch_size": 2, "log_every_steps": 1}
    cfg = trainer_recipe(
        Path(folder), name, 4, model=MODEL, optim={"vision": {"lr": 1e-2}}, parallel=TP2_SP,
        train=sizes | {"precision": "fp32"} | train, save={"asynchronous": False},
    )  # fmt: skip
    trainer = Trainer(cfg, runtime, resume=resume, recipe_changes=[])
    kinds = {type(m).__name__ for tower in trainer.task.towers for m in tower.module.modules()}
    assert ("TransformerEngineColumn" in kinds) == (layer_spec == "te")
    while trainer.next_step < steps:
        trainer.log(trainer.step(trainer.next_batch()[0]))
    return trainer


def _train(runtime: Runtime, folder: str) -> None:
    for name, before, after in (
        ("local", "local", "local"), ("te", "te", "te"), ("to te", "local", "te"), ("from te", "te", "local"),
    ):  # fmt: skip
        for layer_spec, steps, resume in ((before, 2, False), (after, 4, True)):
            with computable(), mock.patch.object(Runtime, "layer_spec", layer_spec):
                trainer = _trainer(runtime, folder, name, layer_spec, steps, resume)
                trainer.position = trainer.loader.state_dict()
                trainer.save()
                trainer.saves.close()
                trainer.loader.close()
                trainer.record.close()


def test_a_run_moves_between_backends(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=2, samples_per_shard=16, image_size=40, seed=0)
    run_ranks(_train, 2, str(tmp_path), timeout=500)
    losses = {n: [row["loss"] for row in read_metrics(tmp_path / n)] for n in ("local", "te", "to te", "from te")}
    assert len(losses["local"]) == 4 and len(set(losses["local"])) == 4
    for name, values in losses.items():
        assert values == pytest.approx(losses["local"], rel=1e-4), name


def _fp8(runtime: Runtime, folder: str) -> tuple[list[float], dict[str, list[float]]]:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    section = {"first_layers_bf16": 1, "last_layers_bf16": 0, "amax_history": 3}
    with bookkeeping(), mock.patch.object(Runtime, "layer_spec", "te"):
        trainer = _trainer(runtime, folder, "fp8", "te", 0, precision="fp8", fp8=section)
        losses = []
        for _ in range(3):
            losses.append(trainer.step(trainer.next_batch()[0])["loss"])
        scales = {}
        for tower in trainer.task.towers:
            for name, part in tower.module.named_modules():
                for key, tensor in part.run_state().items() if hasattr(part, "run_state") else ():
                    scales[f"{tower.name}.{name}.{key}"] = tensor.flatten().tolist()
        trainer.loader.close()
        trainer.record.close()
    return losses, scales


def test_fp8_steps_on_two_ranks_agree_on_scales(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", num_shards=2, samples_per_shard=16, image_size=40, seed=0)
    (losses, scales), (other_losses, other_scales) = run_ranks(_fp8, 2, str(tmp_path), timeout=500)
    assert losses == other_losses and len(set(losses)) == 3
    assert scales == other_scales, (
        "each rank multiplies with its own pieces, and all with the largest value of them all"
    )
    histories = {key: torch.tensor(value).view(3, -1) for key, value in scales.items() if "history" in key}
    assert len(histories) == 2 * 4 * (2 + 1), "both ways of four linears in two layers of vision and one of text"
    for key, history in histories.items():
        assert (history[0] == 0).all(), key
        assert (history[1:, 0] > 0).all(), key  # two of three steps are left in it
