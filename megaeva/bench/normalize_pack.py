"""`normalize_pack`, the native operator, beside its plain-PyTorch reference."""

from collections.abc import Callable

import torch
from torch import Tensor

from megaeva.bench.compare import Comparison, alternate, row
from megaeva.errors import UserError
from megaeva.ops import native_devices
from megaeva.ops.normalize_pack import normalize_pack, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def benchmark_normalize_pack(
    *, num_samples: int, embed_dim: int, dtype: str, device: str, num_rounds: int
) -> dict[str, Comparison]:
    """Native (ours) and reference (peer), under their description: forward alone, and forward with backward.

    Args:
        dtype: a key of DTYPES.

    Raises:
        UserError: the extension has no kernel for `device`.
    """
    if device not in native_devices("normalize_pack"):
        raise UserError(
            f"no native operator is built for --device {device} (built for: {sorted(native_devices()) or 'none'}), "
            "there is nothing to compare; `megaeva doctor` says how to build it."
        )
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, embed_dim, generator=generator).to(device, DTYPES[dtype])

    image_BE, text_BE, grad_2BE = draw(num_samples), draw(num_samples), draw(2 * num_samples)

    def forward_backward(function: Callable[[Tensor, Tensor], Tensor]) -> None:
        leaves = (image_BE.detach().requires_grad_(), text_BE.detach().requires_grad_())
        torch.autograd.grad(function(*leaves), leaves, grad_2BE)

    works: dict[str, Callable[[Callable[[Tensor, Tensor], Tensor]], object]] = {
        "forward": lambda function: function(image_BE, text_BE),
        "forward+backward": forward_backward,
    }
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    sizes = f"B={num_samples} E={embed_dim} {str(DTYPES[dtype]).removeprefix('torch.')} {device}{threads}"
    comparisons = {}
    for name, work in works.items():

        def native(work: Callable[..., object] = work) -> object:
            return work(normalize_pack)

        def plain(work: Callable[..., object] = work) -> object:
            return work(reference)

        native(), plain()
        timed = alternate(native, plain, device=device, num_rounds=num_rounds)
        comparisons[f"normalize_pack {name}, {sizes}"] = timed
    return comparisons


def report(comparisons: dict[str, Comparison]) -> list[str]:
    """What is printed: for each work a sentence and the row of the log's table of native operators."""
    lines = []
    for work, timed in comparisons.items():
        ratio = timed.peer_per_ours
        lines.append(f"{work}: {ratio.median:.2f}x as fast as plain PyTorch")
        lines.append(row(work, f"{timed.ours:.2f}", f"{timed.peer:.2f}", str(ratio)))
    return lines
