"""Published runs beside what the formulae say of them: what was fitted, what is predicted, and how far off it is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from megaeva.config.schema import Config, TextSection
from megaeva.config.variants import VARIANTS
from megaeva.planning import formulae as f
from megaeva.planning.estimate import plan
from megaeva.planning.formulae import Work
from megaeva.planning.gpus import GPUS
from megaeva.planning.table import columns


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        what: of which run.
        unit: of the figures.
        published: the figure.
        predict: what the formulae say.
        fitted: the GPU's `slowdown` was chosen to make the two equal.
    """

    what: str
    unit: str
    published: float
    predict: Callable[[], float]
    fitted: bool = False


@cache
def nemo_clip(gpu: str, nodes: int) -> float:
    """samples/s on a GPU of NeMo's CLIP g/14 with bf16, data parallel, micro batch 80, without recomputation.

    Towers: open_clip's ViT-g-14, EVA01-CLIP-g-14-plus here. That one pass holds the batch of a step is assumed.
    """
    variant = "EVA01-CLIP-g-14-plus"
    cfg = Config.model_validate(
        {
            "task": "contrastive",
            "run_dir": "nemo",
            "model": {"variant": variant} | VARIANTS[variant],
            "data": {"train": ["unused"]},
            "optim": {"vision": {"lr": 1e-3}},
            "train": {"total_samples": 10**6, "global_batch_size": 640 * nodes, "micro_batch_size": 80},
        }
    )
    return plan(cfg, 8 * nodes, GPUS[gpu]).samples_per_second / (8 * nodes)


@dataclass(frozen=True)
class Gpt:
    """A language model of a published table; MFU counts the model's FLOPs once."""

    layers: int
    width: int
    heads: int
    length: int
    vocabulary: int
    tp: int
    pp: int
    vpp: int
    gpus: int
    batch: int
    micro: int
    recompute: bool  # of whole layers
    sequence_parallel: bool

    def mfu(self, gpu_name: str, recompute_counts: bool = False) -> float:
        """In percent, of bf16's peak.

        Args:
            recompute_counts: as in the paper of 2021, where the forward pass that recomputation adds is counted.
        """
        gpu = GPUS[gpu_name]
        section = TextSection(
            context_length=self.length, vocab_size=self.vocabulary, hidden_size=self.width, num_layers=self.layers,
            num_heads=self.heads, ffn_hidden_size=4 * self.width,
        )  # fmt: skip
        work = Work(self.length, self.micro, self.tp, self.sequence_parallel, "bf16", True)
        forward, backward = f.layer_seconds(section, work, gpu)
        per_stage = self.layers / self.pp
        microbatches = self.batch * self.tp * self.pp // (self.gpus * self.micro)
        head = f.matmul_seconds(gpu, "bf16", work.rows, self.width, self.vocabulary / self.tp)
        stage = per_stage * (forward.total * (1 + self.recompute) + backward.total) + 3 * head
        busy, bubble = f.pipeline_seconds(stage, self.pp, self.vpp, microbatches)
        parameters = self.layers * f.layer_parameters(section, self.tp) / self.pp
        ranks = self.gpus // (self.tp * self.pp)
        members = max(1, gpu.gpus_per_node // (self.tp * self.pp))
        reduce = f.collective_seconds(gpu, 6 * parameters, ranks, members)
        update = f.update_seconds(gpu, parameters / ranks, "adamw", average=False)
        step = (busy + bubble + reduce + update) * gpu.slowdown
        linears, attention = f.layer_flops(section, self.length)
        passes = 4 if self.recompute and recompute_counts else 3
        flops = self.batch * (
            passes * self.layers * (linears + attention) + 6 * self.length * self.width * self.vocabulary
        )
        return 100 * flops / (step * self.gpus * gpu.peak_tflops["bf16"] * 1e12)


# Narayanan et al. 2021 (arXiv 2104.04473), table 1: A100-80, length 2048, vocabulary 51,200, whole layers recomputed;
# its percentages count the recomputation. The micro batch is not in that table: 4 at tp only, 1 with pp, assumed.
def _first(layers: int, width: int, heads: int, tp: int, pp: int, gpus: int, batch: int, micro: int) -> Gpt:
    return Gpt(layers, width, heads, 2048, 51_200, tp, pp, 1, gpus, batch, micro, True, False)


# Korthikanti et al. 2022 (arXiv 2205.05198), table 5 and abstract (2240 GPUs; a batch of 2240 is assumed): A100-80,
# sequence parallelism, attention alone recomputed; and whole layers without it. Shapes, and the tables of both papers,
# are from memory; the abstract and NeMo's page were read.
def _second(layers: int, width: int, heads: int, pp: int, vpp: int, gpus: int, batch: int, micro: int) -> Gpt:
    return Gpt(layers, width, heads, 2048, 51_200, 8, pp, vpp, gpus, batch, micro, False, True)


# Megatron-LM's README: 175B on H100, length 4096, vocabulary 131,072, batch 1152, from 96 GPUs (47 %) to 4608 (42 %).
# It does not say tp and pp: 8 and 12 on 96 (one copy), vpp 8, assumed; 4608 are 48 copies of it.
def _hopper(gpus: int) -> Gpt:
    return Gpt(96, 12288, 96, 4096, 131_072, 8, 12, 8, gpus, 1152, 1, False, True)


_NEMO_A100 = {2: 1.99, 4: 3.92, 8: 7.88, 16: 15.43}
_FIRST = {
    "1.7B, 32": (44, _first(24, 2304, 24, 1, 1, 32, 512, 4)),
    "7.5B, 128": (46, _first(36, 4096, 32, 4, 1, 128, 512, 4)),
    "18.4B, 256": (43, _first(40, 6144, 48, 8, 1, 256, 1024, 4)),
    "39.1B, 512": (44, _first(48, 8192, 64, 8, 2, 512, 1536, 1)),
    "145.6B, 1536": (47, _first(80, 12288, 96, 8, 8, 1536, 2304, 1)),
}
_SECOND = {
    "22B, 8": (41.5, _second(48, 6144, 64, 1, 1, 8, 4, 4)),
    "175B, 64": (51.4, _second(96, 12288, 96, 8, 3, 64, 64, 1)),
    "530B, 280": (56.0, _second(105, 20480, 128, 35, 3, 280, 280, 1)),
    "530B, 2240": (54.2, _second(105, 20480, 128, 35, 3, 2240, 2240, 1)),
    "530B, 2240, recomputed": (42.1, Gpt(105, 20480, 128, 2048, 51_200, 8, 35, 3, 2240, 2240, 1, True, False)),
}
_FITTED = ("18.4B, 256", 96)  # what the slowdown of A100 and of H100 in gpus.py was fitted to


def _scaling(gpu: str, nodes: int) -> float:
    return nodes * nemo_clip(gpu, nodes) / nemo_clip(gpu, 1)


# NeMo: docs.nvidia.com/nemo-framework, CLIP, performance (2308), samples/s on 1 to 16 nodes of 8.
RUNS: tuple[Published, ...] = (
    Published("NeMo CLIP g/14, 8 A100", "samples/s/GPU", 559 / 8, partial(nemo_clip, "a100-80", 1)),
    *(Published(f"  on {n} nodes", "x", speedup, partial(_scaling, "a100-80", n)) for n, speedup in _NEMO_A100.items()),
    Published("NeMo CLIP g/14, 8 H100", "samples/s/GPU", 935 / 8, partial(nemo_clip, "h100-80", 1)),
    Published("  on 16 nodes", "x", 14.8, partial(_scaling, "h100-80", 16)),
    *(
        Published(f"Megatron 2021 {name} A100", "% of peak", value, partial(gpt.mfu, "a100-80", True), name in _FITTED)
        for name, (value, gpt) in _FIRST.items()
    ),
    *(
        Published(f"Megatron 2022 {name} A100", "MFU %", value, partial(gpt.mfu, "a100-80"))
        for name, (value, gpt) in _SECOND.items()
    ),
    *(
        Published(
            f"Megatron-LM 175B, {gpus} H100", "MFU %", value, partial(_hopper(gpus).mfu, "h100-80"), gpus in _FITTED
        )
        for gpus, value in ((96, 47), (4608, 42))
    ),
)


def calibration_lines() -> list[str]:
    """The table and what is to be known about it."""
    rows: list[tuple[str, ...]] = [("run", "unit", "published", "formulae", "error", "")]
    for one in RUNS:
        value = one.predict()
        error = f"{100 * (value / one.published - 1):+.0f} %"
        rows.append((one.what, one.unit, f"{one.published:.4g}", f"{value:.4g}", error, "fitted" if one.fitted else ""))
    return [*columns(rows, right=(2, 3, 4)), "", *_REMARKS]


_REMARKS = (
    "Fitted is one number of each generation, `slowdown` in gpus.py, to the marked row; the other rows are",
    "predicted, from efficiencies that are assumed. NeMo says of its H100 run that it is the A100's configuration",
    "as it is (20 % MFU); its batch and that nothing is recomputed are assumed here. Megatron of 2021 had no flash",
    "attention, which the smallest model feels most. No published speed of EVA-CLIP-18B was found: nothing here says",
    "how far off its days are.",
)
