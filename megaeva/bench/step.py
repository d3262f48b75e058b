"""Time of a training step of one rank through the Megatron path, beside a peer that does the same work.

A step is what `Trainer.step` does with a batch that is in memory: forward, backward, reduction, AdamW.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megaeva.bench import plain
from megaeva.bench.captions import end_tokens, typical_tokens
from megaeva.bench.compare import Comparison, alternate, milliseconds, row
from megaeva.config.schema import Config, ModelSection, OptimSection, TowerOptimSection, TrainSection
from megaeva.data.batch import Batch
from megaeva.model.text_tower import TextTower
from megaeva.optim.build import build_optimizer
from megaeva.parallel.runtime import Runtime, seed_pass, start, stop
from megaeva.parallel.shards import gather_full
from megaeva.tasks.contrastive import Contrastive

Peer = Literal["plain", "padded", "none"]
Part = Literal["both", "vision", "text"]
Precision = Literal["fp32", "bf16"]

# Largest relative difference of what both sides of a comparison must compute alike, before anything is timed.
# fp32: sums of some thousand terms in another order. bf16: seven bits are kept of every activation, and the plain peer
# rounds at other places (autocast leaves norms and the residual stream in fp32).
TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class StepTimes:
    """What `benchmark_step` measured.

    Attributes:
        peer: what ours was measured against.
        captions: what the text tower was fed.
        timed: milliseconds of a step; the peer's equal ours for peer "none".
    """

    peer: Peer
    captions: str
    timed: Comparison

    def report(self, command: str) -> list[str]:
        """A sentence, and the row for the log's table of steps: date, commit, command, ms, ms, ratio, machine."""
        ours, ratio = f"our step {self.timed.ours:.0f} ms", self.timed.ours_per_peer
        if self.peer == "none":
            return [f"{ours}; {self.captions}", row(f"`{command}`", f"{self.timed.ours:.0f}", "", "")]
        peer = {"plain": "plain PyTorch", "padded": "with the text tower at full length"}[self.peer]
        return [
            f"{ours}, {peer} {self.timed.peer:.0f} ms, ours / peer {ratio}; {self.captions}",
            row(f"`{command}`", f"{self.timed.ours:.0f}", f"{self.timed.peer:.0f}", str(ratio)),
        ]


def benchmark_step(
    model: ModelSection, *, batch_size: int, precision: Precision, peer: Peer, part: Part, num_rounds: int
) -> StepTimes:
    """Times our step of `model` and the peer's alternately, after checking that both compute the same.

    Memory: two models with gradients and Adam's moments for peer "plain", one otherwise.

    Args:
        peer: "plain": `plain.CLIP`, the same weights, torch's fused AdamW (bf16: autocast); captions fill the context,
            so that neither side can shorten them. "padded": our own step, its text tower computing the padding too;
            captions of typical lengths. "none": our step alone, on the same captions as "plain".
        part: one tower alone: of the other there is one layer of width 16, on both sides.
    """
    model = only(model, part)
    runtime = start("auto")
    try:
        cfg = recipe(model, batch_size, precision)
        token_BL, captions = (typical_tokens if peer == "padded" else end_tokens)(model.text, batch_size)
        batch = example_batch(model, token_BL).to(runtime.device)
        ours = MegatronStep(cfg, runtime, batch)
        other: Callable[[], float]
        if peer == "plain":
            other = PlainStep(cfg, ours.weights(), batch)
            first, others_first = ours(), other()
            assert math.isclose(first, others_first, rel_tol=TOLERANCE[precision]), (first, others_first)
        elif peer == "padded":
            other = _padded(ours)
            assert_same_embeddings(ours.task.model.text, token_BL.to(runtime.device), TOLERANCE[precision])
            ours(), other()
        else:
            ours()
            times = tuple(milliseconds(ours, runtime.device.type) for _ in range(num_rounds))
            return StepTimes(peer, captions, Comparison(times, times))
        return StepTimes(peer, captions, alternate(ours, other, device=runtime.device.type, num_rounds=num_rounds))
    finally:
        stop()


def recipe(model: ModelSection, batch_size: int, precision: Precision) -> Config:
    """A contrastive recipe with the schema's defaults, so long that the rate stays as it is."""
    return Config(
        task="contrastive",
        run_dir="unused",
        model=model,
        optim=OptimSection(vision=TowerOptimSection(lr=1e-5), logit_scale_lr=1e-5),
        train=TrainSection(total_samples=batch_size * 1_000_000_000, global_batch_size=batch_size, precision=precision),
    )


def only(model: ModelSection, part: Part) -> ModelSection:
    """`model` with the tower that is not `part` shrunk until it costs nothing."""
    tiny = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "ffn_hidden_size": 16}
    if part == "vision":
        text = model.text.model_copy(update=tiny | {"context_length": 2, "vocab_size": 4})
        return model.model_copy(update={"text": text})
    if part == "text":
        vision = model.vision.model_copy(update=tiny | {"image_size": model.vision.patch_size})
        return model.model_copy(update={"vision": vision})
    return model


def example_batch(model: ModelSection, token_BL: Tensor) -> Batch:
    """Random images beside the captions; all patches are kept."""
    size, num_samples = model.vision.image_size, len(token_BL)
    image_BCHW = torch.randn(num_samples, 3, size, size, generator=torch.Generator().manual_seed(1), device="cpu")
    return Batch(image_BCHW, tuple(map(str, range(num_samples))), token_BL)


class MegatronStep:
    """Calling it makes one training step on `batch`, as the trainer does, and returns its loss."""

    def __init__(self, cfg: Config, runtime: Runtime, batch: Batch) -> None:
        self.cfg, self.batch = cfg, batch
        self.task = Contrastive(cfg, runtime)
        self.optimizer, self.learning_rate = build_optimizer(self.task.towers, cfg)
        self.num_steps = 0

    def __call__(self) -> float:
        self.learning_rate.set(self.num_steps)
        loss = self.task.step(self.batch, lambda index: seed_pass(self.cfg.seed, self.num_steps, index, 0)).item()
        self.optimizer.step()
        self.task.after_step()
        self.num_steps += 1
        return loss

    def weights(self) -> dict[str, Tensor]:
        """Every parameter as `tower.name`."""
        return self._gather(lambda parameter: parameter.detach())

    def gradients(self) -> dict[str, Tensor]:
        """What DDP reduced for each parameter in the last step."""
        return self._gather(lambda parameter: parameter.main_grad)  # type: ignore[attr-defined]  # set by DDP

    def _gather(self, read: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {
            f"{tower.name}.{name}": gather_full(read(parameter), parameter, tower.grid)
            for tower in self.task.towers
            for name, parameter in tower.module.named_parameters()
        }


class PlainStep:
    """The same step of `plain.CLIP`; `weights` are of `MegatronStep.weights`."""

    def __init__(self, cfg: Config, weights: dict[str, Tensor], batch: Batch) -> None:
        self.batch, self.device = batch, batch.image_BCHW.device
        self.model = plain.CLIP(cfg.model).to(self.device)
        self.model.load_state_dict(plain.from_megatron(weights, cfg.model))
        self.optimizer = plain.adamw([self.model.vision, self.model.text], self.model.log_scale, cfg.optim)
        self.autocast = cfg.train.precision == "bf16"

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.model(self.batch.image_BCHW, self.batch.token_BL)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()


# ----------------------------------------------------------------------------------------- the price of padded captions


def _padded(ours: MegatronStep) -> Callable[[], float]:
    """Our step with the text tower at full length. It goes on from the same weights: both sides train one model."""

    def step() -> float:
        with full_length(ours.task.model.text):
            return ours()

    return step


@contextmanager
def full_length(tower: TextTower) -> Iterator[None]:
    """Inside, `tower` computes every token of its context, the padding after the end tokens too."""

    def forward(token_BL: Tensor) -> Tensor:
        return tower.encode(token_BL, token_BL.argmax(-1), token_BL.shape[1])

    tower.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del tower.forward


@torch.no_grad()
def assert_same_embeddings(tower: nn.Module, token_BL: Tensor, tolerance: float) -> None:
    """Fails when `full_length` changes an embedding by more than `tolerance` of its norm."""
    assert isinstance(tower, TextTower)
    short_BE = tower(token_BL).float()
    with full_length(tower):
        full_BE = tower(token_BL).float()
    difference = ((short_BE - full_BE).norm(dim=-1) / full_BE.norm(dim=-1)).max().item()
    assert difference <= tolerance, f"shortened captions differ by {difference:.1e}"
