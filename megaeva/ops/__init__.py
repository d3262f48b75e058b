"""Native operators, each beside its plain-PyTorch reference; this module loads the library of csrc/ once.

Where the library is missing or has no kernel for the device, the reference runs, and one log line says so.
"""

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY_PATH = Path(__file__).with_name("libmegaeva.so")
VERSION = 1  # of the schemas in csrc/bindings.cpp, which says the same: raised when one of them changes
BUILD_COMMAND = "pip install -e . --no-build-isolation --no-deps"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # what every operator takes

_log = logging.getLogger("megaeva.ops")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over elements of `dtype` are kept in: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


@cache
def native_devices(operator: str | None = None) -> frozenset[str]:
    """Device types ("cpu", "cuda") that the library was built for; empty when it is missing or does not load.

    The first call loads the library and, where it cannot, logs one line on rank 0 with the command that builds it.

    Args:
        operator: only the devices this operator has a kernel for.
    """
    devices = _load()
    if operator is None:
        return devices
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(device for device in devices if has_kernel(f"megaeva::{operator}", device.upper()))


@cache
def _load() -> frozenset[str]:
    try:
        if not LIBRARY_PATH.exists():
            raise FileNotFoundError(f"{LIBRARY_PATH} has not been built")
        torch.ops.load_library(str(LIBRARY_PATH))
        version = torch.ops.megaeva.version() if hasattr(torch.ops.megaeva, "version") else 0
        if version != VERSION:
            raise RuntimeError(f"{LIBRARY_PATH} was built from other sources (version {version}, not {VERSION})")
        return frozenset(torch.ops.megaeva.built_for().split(","))
    except (OSError, RuntimeError, AttributeError) as error:
        # OSError is also what a library compiled against another torch gives (an undefined symbol).
        _say(str(error).splitlines()[0])
        return frozenset()


def differentiate_once(operator: str) -> None:
    """Makes a second derivative of `operator` an error; without it there would be none, or zeros, and no error."""

    def second_backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{operator} is differentiated twice; its gradient is defined once; drop create_graph, or use "
            f"megaeva.ops.{operator}.reference"
        )

    torch.library.register_autograd(f"megaeva::{operator}_backward", second_backward)


def _say(reason: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        _log.warning("plain-PyTorch references run instead of native operators: %s; %s", reason, BUILD_COMMAND)
