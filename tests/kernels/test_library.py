"""Which kernels the loaded library is trusted with."""

import subprocess
import sys

import pytest
import torch

from megaeva import ops

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
