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
from megaeva.bench.captions import end_tokens, real_tokens, typical_tokens
from megaeva.bench.compare import Comparison, alternate, milliseconds, row
from megaeva.bench.matrix_work import PRODUCT, ceiling, step_flops
from megaeva.bench.open_clip_peer import OpenClipStep, converted_weights
from megaeva.config.schema import Config, ModelSection, OptimSection, TowerOptimSection, TrainSection
from megaeva.config.variants import OPEN_CLIP_NAMES
from megaeva.data.batch import Batch
from megaeva.model.text_tower import TextTower
from megaeva.optim.build import build_optimizer
from megaeva.parallel.runtime import Runtime, seed_pass, start, stop
from megaeva.parallel.shards import gather_full
from megaeva.tasks.contrastive import Contrastive

Peer = Literal["open_clip", "plain", "padded", "none"]
Part = Literal["both", "vision", "text"]
Precision = Literal["fp32", "bf16"]

# Largest relative difference of what both sides of a comparison must compute alike, before anything is timed.
# fp32: sums of some thousand terms in another order. bf16: seven bits are kept of every activation, and the plain peer
# rounds at other places (autocast leaves norms and the residual stream in fp32).
TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class Work:
    """Matrix products of a step.

    Attributes:
        ours, peer: operations a step, the captions as long as each side computes them.
        ceiling: operations a second that the machine's products reach, in the same run and precision.
    """

    ours: float
    peer: float
    ceiling: float


@dataclass(frozen=True)
class StepTimes:
    """What `benchmark_step` measured.

    Attributes:
        peer: what ours was measured against.
        captions: what the text tower was fed.
        timed: milliseconds of a step; the peer's equal ours for peer "none".
        batch_size: samples of a step.
        work: what the steps have to multiply.
    """

    peer: Peer
    captions: str
    timed: Comparison
    batch_size: int
    work: Work

    def report(self, command: str) -> list[str]:
        """Sentences, and the row for the log's table of steps: date, commit, command, ms, ms, ratio, machine."""
        ours, ratio = f"our step {self.timed.ours:.0f} ms", self.timed.ours_per_peer
        product = " x ".join(map(str, PRODUCT))
        ceiling = f"of the {self.work.ceiling / 1e9:.0f} GFLOP/s that products of {product} reach here"
        multiplied = f"matrix products: ours {self._share(self.work.ours, self.timed.ours)} {ceiling}"
        if self.peer == "none":
            return [f"{ours}; {self.captions}", multiplied, row(f"`{command}`", f"{self.timed.ours:.0f}", "", "")]
        peer = {
            "open_clip": "open_clip",
            "plain": "plain PyTorch",
            "padded": "with the text tower at full length",
        }[self.peer]
        per_second = [f"{1e3 * self.batch_size / ms:.2f}" for ms in (self.timed.ours, self.timed.peer)]
        return [
            f"{ours}, {peer} {self.timed.peer:.0f} ms, ours / peer {ratio}; {self.captions}",
            f"samples/s: ours {per_second[0]}, peer {per_second[1]}, ours / peer {self.timed.peer_per_ours}",
            f"{multiplied}; peer {self._share(self.work.peer, self.timed.peer)}",
            row(f"`{command}`", f"{self.timed.ours:.0f}", f"{self.timed.peer:.0f}", str(ratio)),
        ]

    def _share(self, flops: float, ms: float) -> str:
        return f"{flops / 1e12:.2f} TFLOP a step, {100 * flops / (1e-3 * ms) / self.work.ceiling:.0f} %"


def benchmark_step(
    model: ModelSection, *, batch_size: int, precision: Precision, peer: Peer, part: Part, num_rounds: int
) -> StepTimes:
    """Times our step of `model` and the peer's alternately, after checking that both compute the same.

    Memory: two models with gradients and Adam's moments for peers "open_clip" and "plain", one otherwise.

    Args:
        peer: "open_clip": its own model of that name with its own weights, which ours takes over, ClipLoss and AdamW
            (bf16: autocast); real captions, which open_clip computes to their full length. "plain": `plain.CLIP`, the
            same weights, torch's fused AdamW (bf16: autocast); captions fill the context, so that neither side can
            shorten them. "padded": our own step, its text tower computing the padding too; captions of typical lengths.
            "none": our step alone, on the same captions as "plain".
        part: one tower alone: of the other there is one layer of width 16, on both sides; not with peer "open_clip".
    """
    model = only(model, part)
    runtime = start("auto")
    try:
        cfg = recipe(model, batch_size, precision)
        draw = {"open_clip": real_tokens, "plain": end_tokens, "padded": typical_tokens, "none": end_tokens}[peer]
        token_BL, captions = draw(model.text, batch_size)
        batch = example_batch(model, token_BL).to(runtime.device)
        other: Callable[[], float]
        if peer == "open_clip":
            theirs = _open_clip_model(model).to(runtime.device)
            ours = MegatronStep(cfg, runtime, batch, converted_weights(theirs, model))
            other = OpenClipStep(theirs, cfg, batch)
            assert_same_loss(ours(), other(), precision)
        else:
            ours = other = MegatronStep(cfg, runtime, batch)
        if peer == "plain":
            other = PlainStep(cfg, ours.weights(), batch)
            assert_same_loss(ours(), other(), precision)
        elif peer == "padded":
            other = _padded(ours)
            assert_same_embeddings(ours.task.model.text, token_BL.to(runtime.device), TOLERANCE[precision])
            ours(), other()
        elif peer == "none":
            ours()
        device = runtime.device
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        before = ceiling(dtype, device)
        if peer == "none":
            times = tuple(milliseconds(ours, device.type) for _ in range(num_rounds))
            timed = Comparison(times, times)
        else:
            timed = alternate(ours, other, device=device.type, num_rounds=num_rounds)
        work = Work(
            step_flops(model, batch_size, num_text_tokens=int(token_BL.argmax(-1).max()) + 1),
            step_flops(model, batch_size, num_text_tokens=model.text.context_length),
            max(before, ceiling(dtype, device)),
        )
        return StepTimes(peer, captions, timed, batch_size, work)
    finally:
        stop()


def _open_clip_model(model: ModelSection) -> nn.Module:
    import open_clip

    assert model.variant is not None
    made: nn.Module = open_clip.create_model(OPEN_CLIP_NAMES[model.variant])
    return made


def assert_same_loss(ours: float, peer: float, precision: Precision) -> None:
    """Fails when the losses of both sides' first steps differ by more than TOLERANCE."""
    assert math.isclose(ours, peer, rel_tol=TOLERANCE[precision]), (ours, peer)


def recipe(
    model: ModelSection, batch_size: int, precision: Precision, optimizer: Literal["adamw", "lamb"] = "adamw"
) -> Config:
    """A contrastive recipe with the schema's defaults, so long that the rate stays as it is."""
    return Config(
        task="contrastive",
        run_dir="unused",
        model=model,
        optim=OptimSection(name=optimizer, vision=TowerOptimSection(lr=1e-5), logit_scale_lr=1e-5),
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
    """Calling it makes one training step on `batch`, as the trainer does, and returns its loss.

    Args:
        weights: whole tensors to start from, under the names of a CLIPModel; None: fresh ones.
    """

    def __init__(self, cfg: Config, runtime: Runtime, batch: Batch, weights: dict[str, Tensor] | None = None) -> None:
        self.cfg, self.batch = cfg, batch
        self.task = Contrastive(cfg, runtime)
        if weights is not None:
            self.task.model.load_state_dict(weights)
        self.optimizer, self.learning_rate = build_optimizer(self.task.towers, cfg)
        self.num_steps = 0

    def __call__(self) -> float:
        self.learning_rate.set(self.num_steps)
        loss = self.task.step(self.batch, lambda index: seed_pass(self.cfg.seed, self.num_steps, index)).item()
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
