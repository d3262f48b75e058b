"""Published runs beside what the formulae say of them: what was fitted, what is predicted, and how far off it is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from megaeva.planning.gpus import GPUS
from megaeva.planning.published import Clip, Gpt, Kernels, eva_clip_18b, samples_per_gpu
from megaeva.planning.table import columns, in_bytes


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        what: of which run.
        layout: tp x pp x vpp, sequences of a microbatch, what is recomputed.
        unit: of the figures; more is better.
        published: the figure.
        predict: what the formulae say.
        basis: fitted: the GPU's `slowdown` was chosen to make the two equal. assumed: predicted, of a layout, or of a
            part of it, that no source says.
    """

    what: str
    layout: str
    unit: str
    published: float
    predict: Callable[[], float]
    basis: Literal["fitted", "predicted", "assumed"] = "predicted"


# NeMo: docs.nvidia.com/nemo-framework, CLIP, performance (2308): samples/s on 1 to 16 nodes of 8, and that H100 ran the
# configuration of A100, taken to be NVIDIA/NeMo-Framework-Launcher's conf/training/clip/vit_g_14.yaml (10f3b9a): micro
# batch 80 ("limited by GPU memory"), 8 of 40 vision layers recomputed, fused softmax and no flash attention, bias and
# activation apart, O2 off (fp32 parameters under autocast), 22 heads, 80 text tokens, an average of the weights.
_NEMO = Clip(
    "EVA01-CLIP-g-14-plus", 80, 8, Kernels(dropout=False, fused_bias=False, fp32=True),
    changes=(("vision", (("num_heads", 22),)), ("text", (("context_length", 80),))), average=True,
)  # fmt: skip
_NEMO_SAMPLES = {
    "a100-80": {1: 559, 2: 1115, 4: 2190, 8: 4407, 16: 8633},
    "h100-80": {1: 935, 2: 1795, 4: 3502, 8: 6771, 16: 13829},
}

# open_clip, docs/PRETRAINED.md: L/14 on LAION-400M, 400 A100-40 for about 127 hours, 96 a GPU, with grad checkpointing;
# 32 epochs of 407,332,084 (LAION-AI/scaling-laws-openclip, trained_models_info.csv). Nodes of 4 (JUWELS Booster).
_OPEN_CLIP = Clip("ViT-L-14", 96, "full", Kernels(dropout=False, fused_bias=False, fp32=True), gpus_per_node=4)
_OPEN_CLIP_SAMPLES = 32 * 407_332_084 / (127 * 3600 * 400)

_MEGATRON = Kernels(dropout=True)


# Narayanan et al. 2021 (arXiv 2104.04473), table 1, TFLOP/s that count the recomputation; read in three summaries that
# agree. Micro batches, virtual stages, DDP: NVIDIA/Megatron-LM, examples/sc21/run_table_1.sh (79a3bb6).
def _first(
    tflops: int, layers: int, width: int, heads: int, tp: int, pp: int, vpp: int, gpus: int, batch: int, micro: int
) -> tuple[float, Gpt]:
    return tflops, Gpt(
        layers, width, heads, tp, pp, vpp, gpus, batch, micro, recompute="full", sequence_parallel=False,
        kernels=_MEGATRON, data="ddp" if pp == 1 else "after", counts_recomputed=True,
    )  # fmt: skip


_FIRST = {
    "GPT 1.7B": _first(137, 24, 2304, 24, 1, 1, 1, 32, 512, 16),
    "GPT 3.6B": _first(138, 30, 3072, 32, 2, 1, 1, 64, 512, 16),
    "GPT 7.5B": _first(142, 36, 4096, 32, 4, 1, 1, 128, 512, 16),
    "GPT 18.4B": _first(135, 40, 6144, 48, 8, 1, 1, 256, 1024, 8),
    "GPT 39.1B": _first(138, 48, 8192, 64, 8, 2, 1, 512, 1536, 4),
    "GPT 76.1B": _first(140, 60, 10240, 80, 8, 4, 3, 1024, 1792, 2),
    "GPT 145.6B": _first(148, 80, 12288, 96, 8, 8, 2, 1536, 2304, 2),
    "GPT 310.1B": _first(155, 96, 16384, 128, 8, 16, 2, 1920, 2160, 1),
    "GPT 529.6B": _first(163, 105, 20480, 128, 8, 35, 3, 2520, 2520, 1),
    "GPT 1008B": _first(163, 128, 25600, 160, 8, 64, 1, 3072, 3072, 1),
}


# Korthikanti et al. 2022 (arXiv 2205.05198), tables 3 and 5: seconds of a step with sequence parallelism and the scores
# of attention recomputed, and with whole layers recomputed; no data parallelism. Read in one summary of the paper, with
# the utilisations of Megatron-LM's README. 530B on 2240 GPUs: MFU of the abstract; its batch, 8 x 280, is assumed.
def _second(layers: int, width: int, heads: int, pp: int, vpp: int, batch: int, micro: int, data: int = 1) -> Gpt:
    return Gpt(
        layers, width, heads, 8, pp, vpp, 8 * pp * data, batch * data, micro, recompute="scores", kernels=_MEGATRON,
        data="after",
    )  # fmt: skip


def _recomputed(gpt: Gpt) -> Gpt:
    return replace(gpt, recompute="full", sequence_parallel=False)


_SECOND = {
    "GPT 22B": ((1.10, 1.42), _second(48, 6144, 64, 1, 1, 4, 4)),
    "GPT 175B": ((13.75, 18.13), _second(96, 12288, 96, 8, 3, 64, 1)),
    "GPT 530B": ((37.83, 49.05), _second(105, 20480, 128, 35, 3, 280, 1)),
    "GPT 1T": ((71.49, 94.42), _second(128, 25600, 160, 64, 1, 512, 1)),
}
_LARGEST = _second(105, 20480, 128, 35, 3, 280, 1, data=8)
_LARGEST_MFU = (54.2, 42.1)

# NVIDIA/dgxc-benchmarking, nemo_megatron/README_175b.md and gpt3_175b_hydra.yaml (0b71cfd): seconds of a step.
_DGXC_SECONDS = {"bf16": {128: 8.309, 512: 8.42, 2048: 8.49}, "fp8": {128: 5.626, 512: 5.774, 2048: 5.96}}
# NVIDIA/NeMo, docs/source/performance/performance_summary.md (070a0bb; NeMo 24.07, FP8): TFLOP/s, sizes and layouts;
# widths: NeMo-Framework-Launcher, conf/training/gpt3, and the other settings from there. No recomputation: assumed.
_NEMO_GPT = {
    "GPT 5B": (736, Gpt(24, 4096, 32, 1, 1, 1, 64, 2048, 4, fp8=True)),
    "GPT 20B": (750, Gpt(44, 6144, 48, 2, 1, 1, 64, 256, 2, fp8=True)),
    "GPT 175B": (842, Gpt(96, 12288, 96, 4, 8, 6, 512, 2048, 2, fp8=True)),
}
# Megatron-LM's README: 175B, length 4096, vocabulary 131,072, batch 1152, MFU on 96 and 4608 H100, all transfers
# overlapped. The layout is assumed.
_README_MFU = {96: 47, 4608: 42}

_H100_PEAK, _A100_PEAK = GPUS["h100-80"].peak_tflops["bf16"], GPUS["a100-80"].peak_tflops["bf16"]


def _dgxc(precision: str, gpus: int) -> Gpt:
    return Gpt(96, 12288, 96, 4, 8, 12, gpus, 2 * gpus, 1, fp8=precision == "fp8")


def _readme(gpus: int) -> Gpt:
    return Gpt(96, 12288, 96, 8, 12, 8, gpus, 1152, 1, length=4096, vocabulary=131_072)


def _gpt(
    what: str, published: float, gpt: Gpt, gpu: str, basis: Literal["fitted", "predicted", "assumed"]
) -> Published:
    name = f"{what}, {gpt.gpus} {gpu.split('-')[0].upper()}"
    return Published(name, gpt.layout, "TFLOP/s", published, partial(gpt.tflops, gpu), basis)


def _runs() -> list[Published]:
    runs = []
    for gpu, samples in _NEMO_SAMPLES.items():
        one = partial(samples_per_gpu, _NEMO, gpu)
        name = f"NeMo CLIP g/14, 8 {gpu.split('-')[0].upper()}"
        runs.append(Published(name, _NEMO.layout, "samples/s", samples[1] / 8, partial(one, 8), "assumed"))
        for nodes in list(samples)[1:]:
            scaling = partial(_scaling, one, nodes)
            runs.append(Published(f"  on {nodes} nodes", "", "x", samples[nodes] / samples[1], scaling))
    runs.append(
        Published(
            "OpenCLIP L/14, 400 A100-40", _OPEN_CLIP.layout, "samples/s", _OPEN_CLIP_SAMPLES,
            partial(samples_per_gpu, _OPEN_CLIP, "a100-40", 400),
        )
    )  # fmt: skip
    runs += [_gpt(f"2021 {what}", tflops, gpt, "a100-80", "predicted") for what, (tflops, gpt) in _FIRST.items()]
    for what, (seconds, gpt) in _SECOND.items():
        for second, model in zip(seconds, (gpt, _recomputed(gpt)), strict=True):
            fitted = (what, model.recompute) == ("GPT 22B", "scores")
            published = model.flops / (second * model.gpus * 1e12)
            runs.append(_gpt(f"2022 {what}", published, model, "a100-80", "fitted" if fitted else "predicted"))
    for mfu, model in zip(_LARGEST_MFU, (_LARGEST, _recomputed(_LARGEST)), strict=True):
        runs.append(_gpt("2022 GPT 530B", mfu / 100 * _A100_PEAK, model, "a100-80", "assumed"))
    for precision, by_gpus in _DGXC_SECONDS.items():
        for gpus, second in by_gpus.items():
            model = _dgxc(precision, gpus)
            published = model.flops / (second * gpus * 1e12)
            fitted = (precision, gpus) == ("bf16", 128)
            runs.append(
                _gpt(f"DGXC GPT 175B {precision}", published, model, "h100-80", "fitted" if fitted else "predicted")
            )
    runs += [_gpt(f"NeMo {what} fp8", tflops, gpt, "h100-80", "assumed") for what, (tflops, gpt) in _NEMO_GPT.items()]
    runs += [
        _gpt("Megatron-LM GPT 175B", mfu / 100 * _H100_PEAK, _readme(gpus), "h100-80", "assumed")
        for gpus, mfu in _README_MFU.items()
    ]
    return runs


def _scaling(samples: Callable[[int], float], nodes: int) -> float:
    return nodes * samples(8 * nodes) / samples(8)


RUNS = tuple(_runs())


def calibration_lines() -> list[str]:
    """The table and what is to be known about it."""
    rows: list[tuple[str, ...]] = [("run", "layout", "unit a GPU", "published", "formulae", "error", "basis")]
    for one in RUNS:
        value = one.predict()
        error = f"{100 * (value / one.published - 1):+.0f} %"
        rows.append((one.what, one.layout, one.unit, f"{one.published:.4g}", f"{value:.4g}", error, one.basis))
    planned = eva_clip_18b()
    name = "EVA-CLIP-18B, 360 A100-40"
    rows.append((name, "8 x 1 x 1, 60, full", "days", "not told", f"{planned.days:.1f}", "", "assumed"))
    most, fits = planned.worst.total, "fits" if planned.fits else "does not fit"
    feasible = (
        f"EVA-CLIP-18B, batch 108,000, 6.04 B samples: {fits}, {in_bytes(most)} of {in_bytes(planned.capacity)} a GPU; "
        f"{planned.days:.1f} days, {planned.gpu_hours:,.0f} GPU-hours."
    )
    return [*columns(rows, right=(3, 4, 5)), "", feasible, *_REMARKS]


_REMARKS = (
    "Its paper (arXiv 2402.04252) tells GPUs, batch and samples, not how long it took: how far off these days are is",
    "not known. It trained with ZeRO-3; the layout is that of recipes/clip_eva_18b.yaml.",
    "",
    "layout: tp x pp x vpp, sequences of a microbatch, what is recomputed (layers of vision, all, attention's scores).",
    "basis:  fitted     `slowdown` in gpus.py, one number of a GPU's generation, was chosen so that this row is right.",
    "        predicted  from the layout that the source tells. Nothing was fitted to it.",
    "        assumed    predicted, but of the layout or the settings something is in no source that was read.",
    "Assumed are all efficiencies in gpus.py, matmul_share of Hopper's largest products after a benchmark of others;",
    "peaks, bandwidths and sizes are the vendor's. Each row is computed as it was run: Megatron of 2021 and 2022 and",
    "both CLIP codebases without flash attention, the latter with element-wise kernels in fp32.",
    "Known to be off: matmul_share looks at a product's smallest size alone, so 1T comes out slow. On H100, NeMo's",
    "CLIP ran the A100's configuration: its products take some 0.3 s of a step of 0.68 s, and the other 0.4 s are no",
    "shorter than on A100, so neither products nor memory explain them; what the host does is in no formula. Nor are",
    "stragglers, hence the scaling. OpenCLIP's is a whole run by the clock, with evaluation, restarts and data, of",
    "code of 2021: a run can be that much slower than its plan.",
)
