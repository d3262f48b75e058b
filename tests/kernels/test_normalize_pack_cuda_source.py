"""The CUDA kernels' own source, run on a CPU: the nearest a machine without a GPU gets to testing them."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaeva.ops.normalize_pack import EPSILON, reference

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    include = ["-I", str(CSRC), "-I", str(HERE / "cuda_on_cpu")]
    source = str(HERE / "normalize_pack_on_cpu.cpp")
    subprocess.run(
        [compiler, "-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", *include, source, "-o", str(library)],
        check=True,
        timeout=120,
    )
    return ctypes.CDLL(str(library))


def _call(function: Callable[..., int], *arguments: Tensor | int | float) -> bool:
    """Whether the 16-byte path ran."""
    converted: list[object] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            converted.append(ctypes.c_double(argument))
        else:
            converted.append(ctypes.c_int64(argument))
    return bool(function(*converted))


@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.get)
@pytest.mark.parametrize(
    ("batch", "width", "stride", "wide"),
    [(1, 64, 64, True), (5, 96, 112, True), (3, 37, 37, False), (2, 64, 65, False), (3, 1, 1, False)],
)
def test_kernel_source_agrees_with_the_reference(
    kernels: ctypes.CDLL, dtype: torch.dtype, batch: int, width: int, stride: int, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, stride, generator=generator, dtype=torch.float64).to(dtype)[:, :width]

    image_BE, text_BE, grad_2BE = draw(batch), draw(batch), draw(2 * batch)
    image_BE[0] = 0  # epsilon wins
    grad_2BE[0] = 0  # its gradient would be 1e12 times larger than what can be compared; tested on the CPU operator
    accumulate = torch.promote_types(dtype, torch.float32)
    packed_2BE = torch.full((2 * batch, width), -7, dtype=dtype)
    inverse_norm_2B = torch.full((2 * batch,), -7, dtype=accumulate)
    forward, backward = (getattr(kernels, f"{half}_{NAMES[dtype]}") for half in ("forward", "backward"))
    was_wide = _call(
        forward, image_BE, text_BE, packed_2BE, inverse_norm_2B, stride, stride, batch, width, EPSILON
    )  # fmt: skip
    assert was_wide == wide

    exact = [x.double().requires_grad_() for x in (image_BE, text_BE)]
    exact_packed_2BE = reference(*exact)
    exact_grads = torch.autograd.grad(exact_packed_2BE, exact, grad_2BE.double())
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(packed_2BE.double(), exact_packed_2BE.detach(), rtol=tolerance, atol=tolerance)
    assert inverse_norm_2B[0] == pytest.approx(1 / EPSILON)

    grad_image_BE, grad_text_BE = (torch.full((batch, width), -7, dtype=dtype) for _ in range(2))
    was_wide = _call(
        backward, grad_2BE, image_BE, text_BE, inverse_norm_2B, grad_image_BE, grad_text_BE,
        stride, stride, stride, batch, width, EPSILON,
    )  # fmt: skip
    assert was_wide == wide
    for grad, exact_grad in zip((grad_image_BE, grad_text_BE), exact_grads, strict=True):
        scale = grad_2BE.double().abs().max() * inverse_norm_2B[1:].double().max()  # what cancels in g - x <g, x>
        assert (grad.double() - exact_grad).abs().max() <= tolerance * scale
