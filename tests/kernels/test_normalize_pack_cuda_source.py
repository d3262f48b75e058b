"""The CUDA kernels' own source, run on a CPU: the nearest a machine without a GPU gets to testing them."""

import pytest
import torch
from torch import Tensor

from megaeva.ops.normalize_pack import EPSILON, reference
from tests.kernels.simt_build import SEEDS, Kernels, compile_kernels

# In the order of csrc/common/scalar.h.
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compile_kernels("normalize_pack_on_cpu.cpp", tmp_path_factory.mktemp("simt"))


@pytest.mark.parametrize("with_text", [True, False], ids=["pair", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "width", "stride", "wide"),
    [(1, 64, 64, True), (5, 96, 112, True), (3, 37, 37, False), (2, 64, 65, False), (3, 1, 1, False)],
)
def test_kernel_source_agrees_with_the_reference(
    kernels: Kernels, dtype: torch.dtype, batch: int, width: int, stride: int, wide: bool, with_text: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, stride, generator=generator, dtype=torch.float64).to(dtype)[:, :width]

    inputs = [draw(batch) for _ in range(2 if with_text else 1)]
    num_rows = batch * len(inputs)
    grad_packed = draw(num_rows)
    inputs[0][0] = 0  # epsilon wins
    grad_packed[0] = 0  # its gradient would be 1e12 times larger than what can be compared; tested on the CPU operator
    exact = [x_BE.to(torch.float64, copy=True).requires_grad_() for x_BE in inputs]
    exact_packed = reference(*exact)
    exact_grads = torch.autograd.grad(exact_packed, exact, grad_packed.double())
    tolerance = 4 * torch.finfo(dtype).eps
    sizes = (batch, num_rows, width)
    image_and_text = (*inputs, None)[:2]

    for seed in SEEDS:
        was_wide = torch.tensor(-1)
        packed = torch.full((num_rows, width), torch.nan, dtype=dtype)
        inverse_norm = torch.full((num_rows,), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
        kernels.call(
            "forward", DTYPES.index(dtype), was_wide, *image_and_text, packed, inverse_norm, stride, stride, *sizes,
            EPSILON, seed=seed,
        )  # fmt: skip
        assert was_wide == wide
        torch.testing.assert_close(packed.double(), exact_packed.detach(), rtol=tolerance, atol=tolerance)
        assert inverse_norm[0] == pytest.approx(1 / EPSILON)

        grads = [torch.full((batch, width), torch.nan, dtype=dtype) for _ in inputs]
        kernels.call(
            "backward", DTYPES.index(dtype), was_wide, grad_packed, *image_and_text, inverse_norm, *(*grads, None)[:2],
            stride, stride, stride, *sizes, EPSILON, seed=seed,
        )  # fmt: skip
        assert was_wide == wide
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            # What cancels in g - x <g, x>. The one row of a batch of one image has a gradient of zero.
            largest_inverse = inverse_norm[1:].double().max() if num_rows > 1 else 0
            scale = grad_packed.double().abs().max() * largest_inverse
            assert (grad.double() - exact_grad).abs().max() <= tolerance * scale
