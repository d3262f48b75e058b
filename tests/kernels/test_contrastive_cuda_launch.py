"""The contrastive losses' CUDA launcher, run on a CPU: loop and products on CPU tensors, kernels on the emulator.

What only a GPU can show stays open: the stream, the device guard, cuBLAS. torch has no product of bfloat16 or half into
float on a CPU, so here is one, which asserts what the CUDA one demands of its arguments.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.ops import accumulate_dtype
from megaeva.ops.contrastive import reference
from tests.kernels import test_contrastive
from tests.kernels.simt_build import CSRC, HERE

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TILES = {"kTileRows = 4096": "kTileRows = 150", "kTileColumns = 8192": "kTileColumns = 300"}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The operators, with tiles of 150 x 300."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("launch")
    shutil.copytree(CSRC, folder / "csrc")
    launcher = folder / "csrc" / "contrastive" / "contrastive_cuda_launch.cpp"
    text = launcher.read_text(encoding="utf-8")
    for size, small in TILES.items():
        assert text.count(size) == 1
        text = text.replace(size, small)
    launcher.write_text(text, encoding="utf-8")
    home = Path(torch.__file__).parent
    include = ["-I", str(folder / "csrc"), "-I", str(HERE / "simt"), "-I", str(HERE / "cuda_for_aten")]
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-fno-gnu-unique", *include]
    command += ["-isystem", str(home / "include"), str(HERE / "contrastive_launch_on_cpu.cpp"), "-o", "launch.so"]
    command += ["-L", str(home / "lib"), "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(folder / "launch.so")
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", _mm, "CPU")
    library.impl("addmm.dtype_out", _addmm, "CPU")
    yield torch.ops.megaeva_launch
    library._destroy()


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    _check_dtypes(a, b, out_dtype, out)
    return out.copy_(a.float() @ b.float())


def _addmm(
    c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    _check_dtypes(a, b, out_dtype, out)
    assert c.data_ptr() == out.data_ptr()  # else the CUDA one copies c first
    return out.copy_(beta * c + alpha * (a.float() @ b.float()))


def _check_dtypes(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.dtype in (torch.bfloat16, torch.float16)
    assert out.dtype == out_dtype == torch.float32


def _features(rows: int, columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query_BE = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    key_GE = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    pairs = min(rows, columns)
    key_GE[:pairs] += query_BE[:pairs]
    return tuple(torch.nn.functional.normalize(x_BE, dim=-1).to(dtype) for x_BE in (query_BE, key_GE))  # type: ignore[return-value]


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).abs().max()) if exact.numel() else 0.0


def _assert_close(value: Tensor, plain: Tensor, exact: Tensor, rounding: float) -> None:
    """No further from float64 than twice what plain PyTorch is, or than `rounding`."""
    assert value.shape == exact.shape
    assert value.dtype == plain.dtype
    assert _error(value, exact) <= max(2 * _error(plain, exact), rounding)


@pytest.mark.parametrize("grad_dtype", ["features", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(197, 440, 33), (310, 299, 64), (4, 6, 0), (0, 5, 8), (5, 0, 8)], ids=str)
def test_launcher(launched: Any, shape: tuple[int, int, int], dtype: torch.dtype, grad_dtype: str) -> None:
    query_BE, key_GE = _features(*shape, dtype)
    num_keys = len(key_GE)
    wide = accumulate_dtype(dtype)
    out = dtype if grad_dtype == "features" else torch.float32
    # bias: logits below 20, where torch's softplus of the reference is exact
    scale, factor, bias = (torch.tensor(x, dtype=wide) for x in (14.3, 0.37, -4.0))
    logit_rounding = 4 * torch.finfo(wide).eps * 14.3
    # Weights of bfloat16 and half features have their type: a gradient in float32 is no better than they are.
    grad_eps = max(torch.finfo(dtype).eps, torch.finfo(out).eps)

    def exactly(*arguments: Any) -> list[Any]:
        return [x.double() if isinstance(x, Tensor) else torch.float64 if x is out else x for x in arguments]

    def compare(name: str, num_grads: int, *arguments: Any) -> None:
        values, plain = getattr(launched, name)(*arguments), getattr(reference, name)(*arguments)
        exact = getattr(reference, name)(*exactly(*arguments))
        if isinstance(values, Tensor):
            values, plain, exact = (values,), (plain,), (exact,)
        for i, (value, plain_value, exact_value) in enumerate(zip(values, plain, exact, strict=True)):
            largest = float(exact_value.abs().max()) if exact_value.numel() else 0.0
            rounding = grad_eps * largest if i < num_grads else 0.0
            is_sum = value.dim() == 0  # over rows, each as far off as its logits
            _assert_close(value, plain_value, exact_value, max(rounding, logit_rounding * max(1.0, largest * is_sum)))

    lse_query_B, lse_key_G, _ = reference.infonce_forward(query_BE, key_GE, scale, 0)
    pairs = [lse.nan_to_num(neginf=0.0).to(wide) + shift for lse, shift in ((lse_query_B, -1), (lse_key_G, 1))]
    for first in (0, 100, -50):
        if query_BE.numel() and key_GE.numel():
            compare("infonce_forward", 0, query_BE, key_GE, scale, first)
        else:
            empty = launched.infonce_forward(query_BE, key_GE, scale, first)
            for value, plain in zip(empty, reference.infonce_forward(query_BE, key_GE, scale, first), strict=True):
                torch.testing.assert_close(value, plain)
        compare("sigmoid_forward", 0, query_BE, key_GE, scale, bias, first)
        for keys in ((0, num_keys), (num_keys // 3, num_keys // 2), (num_keys, num_keys)):
            compare("sigmoid_backward", 2, query_BE, key_GE, scale, bias, factor, first, *keys, out)
            compare(
                "infonce_backward", 2, query_BE, key_GE, scale, factor, lse_query_B, lse_key_G, *pairs, first, 1.9,
                0.1 / max(num_keys, 1), *keys, out,
            )  # fmt: skip


@pytest.mark.parametrize("bias_value", [None, -10.0], ids=["infonce", "sigmoid"])
@pytest.mark.parametrize("scale_value", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("make", ["_random", "_matched", "_equal", "_one_huge", "_long", "_one_sided"])
def test_the_cpu_kernels_error_bound(
    launched: Any, monkeypatch: pytest.MonkeyPatch, make: str, scale_value: float, bias_value: float | None
) -> None:
    monkeypatch.setattr(test_contrastive, "_native", lambda: launched)
    draw = getattr(test_contrastive, make)
    test_contrastive.test_error_against_fp64_is_at_most_twice_plain_pytorch(draw, scale_value, bias_value)


def test_features_may_require_gradients(launched: Any) -> None:
    query_BE, key_GE = _features(5, 7, 8, torch.float32)
    scale = torch.tensor(3.0)
    expected = launched.infonce_forward(query_BE, key_GE, scale, 0)
    lse_query_B, lse_key_G, pair_query_B = launched.infonce_forward(
        query_BE.requires_grad_(), key_GE, scale.requires_grad_(), 0
    )
    assert torch.equal(lse_query_B, expected[0])
    grads = launched.infonce_backward(
        query_BE, key_GE, scale, scale, lse_query_B, lse_key_G, pair_query_B, torch.zeros(7),
        0, 2.0, 0.0, 0, 7, torch.float32,
    )  # fmt: skip
    assert not grads[0].requires_grad
