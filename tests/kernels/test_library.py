"""Which kernels the loaded library is trusted with."""

import json
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


# Each decides at the import of megaeva.ops what runs; torch, which takes longer, is imported once for all.
SCRIPTS = {
    "no library": """
import pathlib, torch, megaeva.ops as ops
ops.LIBRARY_PATH = pathlib.Path("/nowhere/libmegaeva.so")
from megaeva.ops import contrastive, normalize_pack
x, y, z, scale = torch.randn(2, 4), torch.randn(2, 4), torch.randn(3, 4), torch.tensor(2.0)
assert torch.equal(normalize_pack.normalize_pack(x, y), normalize_pack.reference(x, y))
plain = contrastive.reference
for mine, true in zip(contrastive.infonce_forward(x, z, scale, 0), plain.infonce_forward(x, z, scale, 0)):
    assert torch.equal(mine, true)
assert torch.equal(contrastive.sigmoid_forward(x, z, scale, scale, 0), plain.sigmoid_forward(x, z, scale, scale, 0))
assert not any(hasattr(torch.ops.megaeva, name) for name in ("normalize_pack", "infonce_forward"))
""",
    "other sources": """
import megaeva.ops as ops
ops.VERSION += 1
from megaeva.ops import attention, contrastive, layer_norm, normalize_pack, swiglu
assert not any(m._NATIVE_DEVICES for m in (attention, contrastive, layer_norm, normalize_pack, swiglu))
""",
    "CUDA kernels of others": """
import megaeva.ops as ops
load = ops._load
ops._load = lambda: load() | {"cuda"}
from megaeva.ops import attention, layer_norm, swiglu
assert "cuda" in ops.native_devices()
for module in (attention, layer_norm, swiglu):
    assert module._NATIVE_DEVICES == {"cpu"}, module
""",
}
FORK_FOR_EACH = """
import json, os, sys, torch, traceback
assert not any(name.startswith("megaeva") for name in sys.modules)
for name, script in json.loads(sys.argv[1]).items():
    if not os.fork():
        status = 1
        try:
            os.dup2(os.open(os.path.join(sys.argv[2], name), os.O_WRONLY | os.O_CREAT), 2)
            exec(script, {})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each script printed to stderr; all of them ended well."""
    folder = tmp_path_factory.mktemp("said")
    command = [sys.executable, "-c", FORK_FOR_EACH, json.dumps(SCRIPTS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    printed = {name: (folder / name).read_text() for name in SCRIPTS}
    assert done.stdout.split() == ["0"] * len(SCRIPTS), printed
    return printed


def test_without_the_library_the_reference_runs_and_one_line_says_how_to_build(said: dict[str, str]) -> None:
    (line,) = said["no library"].strip().splitlines()
    assert "/nowhere/libmegaeva.so" in line
    assert "pip install -e . --no-build-isolation" in line


def test_a_library_of_other_sources_is_refused_with_one_line(said: dict[str, str]) -> None:
    (line,) = said["other sources"].strip().splitlines()
    assert "built from other sources" in line and "pip install" in line


def test_a_library_with_cuda_kernels_of_others_leaves_rows_to_torch(said: dict[str, str]) -> None:
    assert said["CUDA kernels of others"] == ""


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
