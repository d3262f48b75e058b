"""The CUDA kernels' own source, run on a CPU: the nearest a machine without a GPU gets to testing them."""

from dataclasses import dataclass

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


@dataclass
class Case:
    """Arguments of both passes; `outputs` are filled with NaN, `text_BE` and `grad_text_BE` may be None."""

    image_BE: Tensor
    text_BE: Tensor | None
    grad_packed: Tensor
    packed: Tensor
    inverse_norm: Tensor
    grad_image_BE: Tensor
    grad_text_BE: Tensor | None

    @classmethod
    def draw(cls, dtype: torch.dtype, batch: int, width: int, stride: int, with_text: bool = True) -> "Case":
        generator = torch.Generator().manual_seed(0)
        num_rows = 2 * batch if with_text else batch

        def drawn(rows: int) -> Tensor:
            return torch.randn(rows, stride, generator=generator, dtype=torch.float64).to(dtype)[:, :width]

        def unwritten(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.full(shape, torch.nan, dtype=dtype)

        case = cls(
            image_BE=drawn(batch),
            text_BE=drawn(batch) if with_text else None,
            grad_packed=drawn(num_rows),
            packed=unwritten(num_rows, width),
            inverse_norm=unwritten(num_rows, dtype=torch.promote_types(dtype, torch.float32)),
            grad_image_BE=unwritten(batch, width),
            grad_text_BE=unwritten(batch, width) if with_text else None,
        )
        case.image_BE[0] = 0  # epsilon wins
        # Its gradient would be 1e12 times larger than what can be compared; tested on the CPU operator.
        case.grad_packed[0] = 0
        return case

    def run(self, kernels: Kernels, seed: int) -> tuple[bool, bool]:
        """Whether the forward and the backward pass took the 16-byte path."""
        scalar = DTYPES.index(self.image_BE.dtype)
        text_stride = self.image_BE.stride(0) if self.text_BE is None else self.text_BE.stride(0)
        strides = (self.image_BE.stride(0), text_stride)
        sizes = (len(self.image_BE), len(self.packed), self.image_BE.size(1), EPSILON)
        wide_forward, wide_backward = torch.tensor(-1), torch.tensor(-1)
        inputs = (self.image_BE, self.text_BE)
        outputs = (self.packed, self.inverse_norm)
        kernels.call("forward", scalar, wide_forward, *inputs, *outputs, *strides, *sizes, seed=seed)
        inputs = (self.grad_packed, self.image_BE, self.text_BE, self.inverse_norm)
        outputs = (self.grad_image_BE, self.grad_text_BE)
        strides = (self.grad_packed.stride(0), *strides)
        kernels.call("backward", scalar, wide_backward, *inputs, *outputs, *strides, *sizes, seed=seed)
        return bool(wide_forward), bool(wide_backward)

    def check(self) -> None:
        """Compares both passes with the reference in float64."""
        inputs = [x for x in (self.image_BE, self.text_BE) if x is not None]
        exact = [x_BE.to(torch.float64, copy=True).requires_grad_() for x_BE in inputs]
        exact_packed = reference(*exact)
        exact_grads = torch.autograd.grad(exact_packed, exact, self.grad_packed.double())
        tolerance = 4 * torch.finfo(self.image_BE.dtype).eps
        torch.testing.assert_close(self.packed.double(), exact_packed.detach(), rtol=tolerance, atol=tolerance)
        assert self.inverse_norm[0] == pytest.approx(1 / EPSILON)
        # What cancels in g - x <g, x>. The one row of a batch of one image has a gradient of zero.
        largest_inverse = self.inverse_norm[1:].double().max() if len(self.inverse_norm) > 1 else 0
        scale = self.grad_packed.double().abs().max() * largest_inverse
        grads = [grad for grad in (self.grad_image_BE, self.grad_text_BE) if grad is not None]
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            assert (grad.double() - exact_grad).abs().max() <= tolerance * scale


@pytest.mark.parametrize("with_text", [True, False], ids=["pair", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "width", "stride", "wide"),
    [(1, 64, 64, True), (5, 96, 112, True), (3, 37, 37, False), (2, 64, 65, False), (3, 1, 1, False)],
)
def test_kernel_source_agrees_with_the_reference(
    kernels: Kernels, dtype: torch.dtype, batch: int, width: int, stride: int, wide: bool, with_text: bool
) -> None:
    for seed in SEEDS:
        case = Case.draw(dtype, batch, width, stride, with_text)
        assert case.run(kernels, seed) == (wide, wide)
        case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("image_BE", False, False),
        ("text_BE", False, False),
        ("grad_packed", True, False),
        ("packed", False, True),
        ("grad_image_BE", True, False),
        ("grad_text_BE", True, False),
    ],
)
def test_one_matrix_out_of_line_stops_16_byte_loads(
    kernels: Kernels, dtype: torch.dtype, name: str, forward: bool, backward: bool
) -> None:
    def moved(x: Tensor, row_stride: int, offset: int) -> Tensor:
        storage = torch.full((len(x) * row_stride + offset,), torch.nan, dtype=dtype)
        return storage.as_strided(x.shape, (row_stride, 1), offset).copy_(x)

    # Either the first row starts 1 element late or, in matrices whose stride is free, only the others do.
    free_stride = name in ("image_BE", "text_BE", "grad_packed")
    for row_stride, offset in [(64, 1), (65, 0)] if free_stride else [(64, 1)]:
        case = Case.draw(dtype, 3, 64, 64)
        setattr(case, name, moved(getattr(case, name), row_stride, offset))
        assert case.run(kernels, seed=1) == (forward, backward)
        case.check()
