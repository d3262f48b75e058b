"""GPUs as plain data, what a recipe is planned for. Nothing in here was measured by this project."""

import difflib
import json
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from megaeva.config.explain import explain
from megaeva.config.schema import Section
from megaeva.config.source import gather
from megaeva.errors import ConfigError

Precision = Literal["fp32", "fp16", "bf16", "fp8"]
# Far beyond any GPU, and so that seconds, days and bytes stay finite.
_Positive = Annotated[float, Field(ge=1e-3, le=1e9)]
_Share = Annotated[float, Field(ge=1e-4, le=1)]
_Size = Annotated[int, Field(ge=1, le=1 << 20)]

_EXAMPLE = "\n".join(
    [
        "name: my-gpu",
        "memory_gib: 79.1        # what torch calls total_memory",
        "memory_gb_s: 3350",
        "peak_tflops: {bf16: 989, fp16: 989, fp8: 1979, fp32: 67}    # dense, without sparsity",
        "link_gb_s: 450          # to the GPUs of the node, each way",
        "network_gb_s: 50        # of one GPU to other nodes, each way",
    ]
)


class Gpu(Section):
    """What the formulae know of a GPU and its cluster.

    Peaks, bandwidths and sizes are the vendor's. Every share (`*_share`, `matmul_share`) is assumed, and says what part
    of the peak is reached; `slowdown` is fitted, to one published run, see `calibration`. Hopper's largest matmul_share
    was chosen between two sources with that fit in view, see below.
    """

    name: str
    memory_gib: _Positive = Field(description="as torch's out-of-memory messages give the capacity")
    memory_gb_s: _Positive
    peak_tflops: dict[Precision, _Positive] = Field(min_length=1, description="dense matrix products")
    link_gb_s: _Positive = Field(description="to other GPUs of the node, one direction")
    network_gb_s: _Positive = Field(description="of one GPU to other nodes, one direction")
    gpus_per_node: int = Field(8, ge=1, le=1024)
    matmul_share: dict[_Size, _Share] = Field(
        {128: 0.08, 256: 0.18, 512: 0.36, 1024: 0.56, 2048: 0.70, 4096: 0.78, 8192: 0.80},
        min_length=1,
        description="of the peak, by the smallest of a product's three sizes; between them by its logarithm",
    )
    fp8_share: _Share = Field(0.80, description="FP8 reaches this share of `matmul_share` (casts, scales)")
    attention_share: _Share = Field(0.45, description="of the 16-bit peak in flash attention")
    memory_share: _Share = Field(0.80, description="of memory_gb_s in element-wise kernels")
    link_share: _Share = Field(0.75, description="of link_gb_s and network_gb_s in NCCL's collectives")
    latency_us: float = Field(15.0, ge=0, le=1e6, description="of one collective")
    launch_us: float = Field(
        5.0, ge=0, le=1e6, description="of one kernel: a layer takes at least that for each of its kernels"
    )
    hidden_share: float = Field(0.8, ge=0, le=1, description="of a transfer that can be behind what it overlaps with")
    host_gb_s: _Positive = Field(20.0, description="from the host's memory, of tensors that are not pinned; assumed")
    decoded_images_s: _Positive = Field(3000.0, description="JPEGs that DALI decodes on one GPU; assumed")
    slowdown: float = Field(1.0, ge=1, le=100, description="of everything; what no formula says. Fitted or 1")
    reserved_gib: float = Field(
        2.0, ge=0, le=1e6, description="CUDA context, cuBLAS workspaces, NCCL's buffers of a dozen groups; assumed"
    )
    fragmentation: float = Field(
        0.06, ge=0, le=1, description="of activations, lost between the allocator's blocks; assumed"
    )
    transformer_engine: bool = Field(
        True, description="False: layers in plain PyTorch and this project's CPU operators"
    )

    @field_validator("peak_tflops")
    @classmethod
    def _has_bf16_beside_fp8(cls, peaks: dict[Precision, float]) -> dict[Precision, float]:
        if "fp8" in peaks and "bf16" not in peaks:
            raise ValueError("must have bf16 beside fp8: an FP8 run multiplies in both, and its MFU is of bf16's peak")
        return peaks


# Peaks, bandwidths: NVIDIA's data sheets of A100, H100 and H200 SXM and HGX B200, dense. Memory: capacities in torch's
# out-of-memory messages. Networks: DGX's, 8 x 200 Gbit/s (A100) and 8 x 400 Gbit/s.
# matmul_share: no more than ml-engineering's benchmark found of each GPU's best shape (Bekman: A100 0.86, H100 0.80).
# Hopper and Blackwell throttle under sustained products, so theirs is lower: 720 of 989 TFLOP/s at a language model's
# sizes (SemiAnalysis 2024, MI300X vs H100 vs H200); for smaller ones assumed. With 0.68 in place of that 0.73, and the
# smaller ones as much less, the fit of H100 would ask for a slowdown below 1.
# slowdown: A100 fitted to Megatron's 22B on 8 GPUs, H100 to NVIDIA's bf16 175B on 128 (calibration.py); H200 and B200
# take H100's.
_HOPPER = {128: 0.05, 256: 0.13, 512: 0.28, 1024: 0.47, 2048: 0.62, 4096: 0.71, 8192: 0.73}
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100-40", memory_gib=39.4, memory_gb_s=1555, link_gb_s=300, network_gb_s=25, slowdown=1.07,
            peak_tflops={"bf16": 312, "fp16": 312, "fp32": 19.5},
        ),
        Gpu(
            name="a100-80", memory_gib=79.2, memory_gb_s=2039, link_gb_s=300, network_gb_s=25, slowdown=1.07,
            peak_tflops={"bf16": 312, "fp16": 312, "fp32": 19.5},
        ),
        Gpu(
            name="h100-80", memory_gib=79.1, memory_gb_s=3350, link_gb_s=450, network_gb_s=50, slowdown=1.03,
            peak_tflops={"bf16": 989, "fp16": 989, "fp8": 1979, "fp32": 67}, matmul_share=_HOPPER,
        ),
        Gpu(
            name="h200", memory_gib=139.7, memory_gb_s=4800, link_gb_s=450, network_gb_s=50, slowdown=1.03,
            peak_tflops={"bf16": 989, "fp16": 989, "fp8": 1979, "fp32": 67}, matmul_share=_HOPPER,
        ),
        Gpu(
            name="b200", memory_gib=178.3, memory_gb_s=7700, link_gb_s=900, network_gb_s=50, slowdown=1.03,
            peak_tflops={"bf16": 2250, "fp16": 2250, "fp8": 4500, "fp32": 75}, matmul_share=_HOPPER,
        ),
    )
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, or the one a YAML file at that path describes.

    Raises:
        ConfigError: no such name and no such file, with the nearest names; or the file has mistakes, all of them told.
    """
    if name in GPUS:
        return GPUS[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _read(path)
    near = difflib.get_close_matches(name.lower(), GPUS, n=2, cutoff=0.3)
    meant = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ConfigError(
        f"--gpu {name} is not a known GPU ({', '.join(GPUS)}); it must be one of them or a YAML file{meant} "
        f"Another one is described in a file, --gpu my-gpu.yaml, with:\n{_EXAMPLE}"
    )


def _read(path: Path) -> Gpu:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--gpu {path} cannot be read ({error}); it must be YAML; write for example:\n{_EXAMPLE}"
        ) from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"--gpu {path} holds no keys; it must describe a GPU; write for example:\n{_EXAMPLE}")
    source, _ = gather(path, ())
    values = {"name": path.stem} | source.values
    gpu = None
    try:
        gpu = Gpu.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            explain(source, Gpu, values, one)
    if gpu is None or source.errors:
        faults = "\n".join(f"  {fault}" for fault in dict.fromkeys(source.errors))
        raise ConfigError(f"--gpu {path} has mistakes:\n{faults}\na whole file is for example:\n{_EXAMPLE}")
    return gpu
