"""Steps of other codebases' published runs by the formulae, each as it was run. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from megaeva.config.fp8 import NAMES
from megaeva.config.schema import Config, TextSection, VisionSection
from megaeva.config.variants import VARIANTS
from megaeva.planning import formulae as f
from megaeva.planning.estimate import Plan, plan
from megaeva.planning.formulae import Seconds, Work
from megaeva.planning.gpus import GPUS, Gpu


@dataclass(frozen=True)
class Kernels:
    """What layers are made of that are not Transformer Engine's with flash attention.

    Attributes:
        dropout: of attention's scores.
        fused_bias: bias and activation are one kernel.
        fp32: element-wise kernels read and write fp32, as under autocast with fp32 parameters.
    """

    dropout: bool
    fused_bias: bool = True
    fp32: bool = False


def layer_seconds(
    section: VisionSection | TextSection,
    work: Work,
    gpu: Gpu,
    kernels: Kernels | None,
    in_fp8: Sequence[str] = (),
    overlap: bool = False,
) -> tuple[Seconds, Seconds]:
    """(forward, backward) of one layer; with `kernels` None as `formulae.layer_seconds` has it.

    Without flash attention the S x S scores of each head go through memory in 16 bits. Each of the 2 products forward
    and 4 backward takes its FLOPs at attention_share or its bytes, whichever is longer, all S x S also where it is
    causal; the softmax (one kernel with its mask) reads and writes them, backward reads two and writes one; dropout
    reads and writes them and a mask of 1 byte, both ways. What a bias that is not fused is added to is read and written
    once more, both ways.
    """
    there, back = f.layer_seconds(section, work, gpu, in_fp8, overlap)
    if kernels is None:
        return there, back
    heads, width = section.num_heads / work.tp, section.hidden_size / work.tp
    scores = 2 * work.tokens**2 * work.sequences * heads
    flops = 2 * work.tokens**2 * work.sequences * width
    moved = scores + 2 * 2 * work.tokens * work.sequences * width
    product = max(flops / (gpu.peak_tflops["bf16"] * 1e12 * gpu.attention_share), f.memory_seconds(gpu, moved))
    dropout = 2.5 * kernels.dropout
    bias = 0.0 if kernels.fused_bias else f.memory_seconds(gpu, 2 * 2 * work.rows * section.ffn_hidden_size / work.tp)
    wide = 2 if kernels.fp32 else 1
    return (
        replace(
            there,
            attention=2 * product + f.memory_seconds(gpu, scores * (2 + dropout)),
            memory=wide * (there.memory + bias),
        ),
        replace(
            back,
            attention=4 * product + f.memory_seconds(gpu, scores * (3 + dropout)),
            memory=wide * (back.memory + bias),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------- GPT


@dataclass(frozen=True)
class Gpt:
    """A language model of a published table, plain multi-head attention and GELU.

    Attributes:
        length: tokens of a sequence.
        gpus, batch, micro: of them all, of them all, of one.
        recompute: of whole layers or of attention's scores.
        kernels: None: flash attention and Transformer Engine, with its transfers of tensor parallelism overlapped.
        data: how gradients are reduced: after the backward pass, as torch's DDP beside that of the last microbatch, or
            by a distributed optimizer beside the passes.
        counts_recomputed: the published FLOPs have the passes that recomputation adds.
    """

    layers: int
    width: int
    heads: int
    tp: int
    pp: int
    vpp: int
    gpus: int
    batch: int
    micro: int
    length: int = 2048
    vocabulary: int = 51_200
    recompute: Literal["none", "scores", "full"] = "none"
    sequence_parallel: bool = True
    kernels: Kernels | None = None
    data: Literal["after", "ddp", "distributed"] = "distributed"
    fp8: bool = False
    counts_recomputed: bool = False

    @property
    def layout(self) -> str:
        """As the table has it."""
        return f"{self.tp} x {self.pp} x {self.vpp}, {self.micro}, {self.recompute}"

    @property
    def section(self) -> TextSection:
        """The model as this project's text towers."""
        return TextSection(
            context_length=self.length, vocab_size=self.vocabulary, hidden_size=self.width, num_layers=self.layers,
            num_heads=self.heads, ffn_hidden_size=4 * self.width,
        )  # fmt: skip

    @property
    def flops(self) -> float:
        """Of a step, as its paper counts them: attention over the whole square."""
        linears, attention = f.layer_flops(self.section, self.length)
        passes = 4 if self.counts_recomputed else 3
        head = 6 * self.length * self.width * self.vocabulary
        return self.batch * (passes * self.layers * (linears + attention) + head)

    def step(self, gpu: Gpu) -> float:
        """Seconds."""
        precision: Literal["fp8", "bf16"] = "fp8" if self.fp8 else "bf16"
        work = Work(self.length, self.micro, self.tp, self.sequence_parallel, precision, True)
        in_fp8 = NAMES if self.fp8 else ()
        there, back = layer_seconds(self.section, work, gpu, self.kernels, in_fp8, overlap=self.kernels is None)
        again = {"none": 0.0, "scores": there.attention, "full": there.total}[self.recompute]
        layers = self.layers / self.pp
        head = f.matmul_seconds(gpu, "bf16", work.rows, self.width, self.vocabulary / self.tp)
        stage = layers * (there.total + back.total + again) + 3 * head
        if self.pp > 1 and self.vpp == 1:  # each rank of tp sends its part (scatter and gather)
            stage += 2 * (2 * work.rows * self.width / self.tp / (gpu.network_gb_s * 1e9 * gpu.link_share))
        microbatches = self.batch * self.tp * self.pp // (self.gpus * self.micro)
        busy, bubble = f.pipeline_seconds(stage, self.pp, self.vpp, microbatches)
        parameters = layers * f.layer_parameters(self.section, self.tp)
        ranks = self.gpus // (self.tp * self.pp)
        members = max(1, gpu.gpus_per_node // (self.tp * self.pp))
        # 16-bit gradients and parameters; otherwise 6 bytes, between an all-reduce of 16 bits and of 32, assumed.
        moved = (4 if self.data == "distributed" else 6) * parameters
        reduce = f.collective_seconds(gpu, moved, ranks, members)
        if self.data != "after":
            reduce = f.shown_seconds(reduce, min(microbatches, self.pp) * layers * back.total, gpu)
        shards = ranks if self.data == "distributed" else 1
        update = f.update_seconds(gpu, parameters / shards, "adamw", average=False)
        return (busy + bubble + reduce + update) * gpu.slowdown

    def tflops(self, gpu_name: str) -> float:
        """TFLOP/s of a GPU."""
        gpu = GPUS[gpu_name]
        return self.flops / (self.step(gpu) * self.gpus * 1e12)


# --------------------------------------------------------------------------------------------------------------- CLIP


@dataclass(frozen=True)
class Clip:
    """A CLIP model of a published run: data parallel, one microbatch of `micro` pairs a GPU.

    Attributes:
        recompute: layers of vision that are recomputed, or the layers of both towers.
        changes: of the variant's towers, by tower.
        average: a moving average of the weights is kept.
    """

    variant: str
    micro: int
    recompute: int | Literal["full"]
    kernels: Kernels
    changes: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    average: bool = False
    gpus_per_node: int = 8

    @property
    def layout(self) -> str:
        """As the table has it."""
        return f"1 x 1 x 1, {self.micro}, {self.recompute}"


@cache
def samples_per_gpu(clip: Clip, gpu_name: str, num_gpus: int) -> float:
    """samples/s of one of so many GPUs."""
    changes = dict(clip.changes)
    model = {"variant": clip.variant} | {
        name: value | dict(changes.get(name, ())) if isinstance(value, dict) else value
        for name, value in VARIANTS[clip.variant].items()
    }
    cfg = Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": "published",
            "model": model,
            "data": {"train": ["unused"], "num_workers": 8},
            "optim": {"name": "adamw", "vision": {"lr": 1e-3}, "ema_decay": 0.9999 if clip.average else None},
            "train": {
                "total_samples": 10**7,
                "global_batch_size": clip.micro * num_gpus,
                "micro_batch_size": clip.micro,
            },
            "parallel": {
                "vision": {"recompute": clip.recompute},
                "text": {"recompute": clip.recompute if clip.recompute == "full" else "none"},
                "distributed_optimizer": False,
                "overlap_grad_reduce": True,
            },
        }
    )
    gpu = GPUS[gpu_name].model_copy(update={"gpus_per_node": clip.gpus_per_node})
    planned = plan(cfg, num_gpus, gpu)
    return clip.micro / (planned.phases[0].step + _beyond(planned, gpu, clip.kernels) * gpu.slowdown)


def _beyond(planned: Plan, gpu: Gpu, kernels: Kernels) -> float:
    """Seconds of a step that these kernels take longer than this project's."""
    step, beyond = planned.steps[0], 0.0
    for tower in (step.vision, step.text):
        assert tower is not None
        theirs = layer_seconds(tower.section, tower.work, gpu, kernels)
        ours = layer_seconds(tower.section, tower.work, gpu, None)
        forward, backward = (a.total - b.total for a, b in zip(theirs, ours, strict=True))
        layers, mode = tower.section.num_layers, tower.axes.recompute
        again = layers if mode == "full" else 0 if isinstance(mode, str) else mode
        beyond += tower.microbatches * (layers * (forward + backward) + again * forward)
    return beyond


def eva_clip_18b() -> Plan:
    """EVA-CLIP-18B on its 360 A100-40, in the layout of recipes/clip_eva_18b.yaml."""
    variant = "EVA-CLIP-18B"
    model: dict[str, Any] = {"variant": variant} | VARIANTS[variant]
    phases = [
        {"samples": 5_400_000_000, "train": ["unused"]},
        {"samples": 620_000_000, "train": ["unused"], "patch_dropout": 0.0},
        {"samples": 24_000_000, "train": ["unused"], "frames": 8},
    ]
    cfg = Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": "published",
            "model": model | {"vision": model["vision"] | {"patch_dropout": 0.5}},
            "data": {"phases": phases, "num_workers": 8},
            "optim": {"name": "lamb", "vision": {"lr": 4e-4}},
            "train": {"total_samples": 6_044_000_000, "global_batch_size": 108_000, "micro_batch_size": 60},
            "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}
            | {
                name: {"tp": tp, "sequence_parallel": True, "recompute": "full"}
                for name, tp in (("vision", 8), ("text", 4))
            },
        }
    )
    return plan(cfg, 360, GPUS["a100-40"])
