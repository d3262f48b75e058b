"""Which kernels the loaded library is trusted with."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaeva import ops
from megaeva.ops.attention import attention
from megaeva.ops.layer_norm import layer_norm
from megaeva.ops.swiglu import swiglu

pytestmark = pytest.mark.skipif(not ops.native_devices(), reason="the extension is not built")
OPERATORS = sorted(
    name.removeprefix("megaeva::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("megaeva::") and name not in ("megaeva::version", "megaeva::built_for")
)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_device_without_a_kernel_is_not_native(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A library that was built for CUDA has no attention there: the reference must run, not a missing kernel.
    monkeypatch.setattr(ops, "_load", lambda: frozenset({"cpu", "xpu"}))
    assert ops.native_devices.__wrapped__(operator) == {"cpu"}


def test_a_library_of_other_sources_is_refused_with_one_line() -> None:
    script = (
        "import megaeva.ops as ops\n"
        "ops.VERSION += 1\n"
        "from megaeva.ops import attention, contrastive, layer_norm, normalize_pack, swiglu\n"
        "assert not any(m._NATIVE_DEVICES for m in (attention, contrastive, layer_norm, normalize_pack, swiglu))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "built from other sources" in line and "pip install" in line


@pytest.mark.parametrize(
    "operator",
    [lambda x: attention(x, 1), swiglu, lambda x: layer_norm(x, torch.ones(12), torch.ones(12), 1e-6)],
    ids=["attention", "swiglu", "layer_norm"],
)
def test_a_second_derivative_is_an_error(operator: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 2, 12, requires_grad=True)
    (first,) = torch.autograd.grad(operator(x)[..., 0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        first.pow(2).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_where_onednn_has_no_bf16_blocks_operators_multiply_in_float(instructions: str) -> None:
    # It says so by another exception on each; the machine itself may have the instructions.
    script = (
        "import torch\n"
        "from megaeva.ops import contrastive\n"
        "from megaeva.ops.attention import attention, reference\n"
        "qkv = torch.randn(20, 2, 96).bfloat16()\n"
        "torch.testing.assert_close(attention(qkv, 2), reference(qkv, 2))\n"
        "rows = torch.nn.functional.normalize(torch.randn(70, 16), dim=1).bfloat16()\n"
        "arguments = rows, rows, torch.tensor(14.3), 0\n"
        "native, plain = contrastive.infonce_forward(*arguments), contrastive.reference.infonce_forward(*arguments)\n"
        "torch.testing.assert_close(native, plain, rtol=1e-6, atol=1e-6)\n"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
