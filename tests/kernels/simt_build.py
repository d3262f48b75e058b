"""Compiles a CUDA source with g++ against simt/, the emulator, and calls it with tensors that guard pages surround."""

import ctypes
import mmap
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SEEDS = [0, *range(1, 8)]  # 0: threads in order. Others: drawn order, with interruptions.

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Misaligned vectors and indices outside a local array trap, and simt.h turns the trap into a text.
_FLAGS = [
    "-std=c++20", "-O1", "-g1", "-Wall", "-shared", "-fPIC", "-fno-gnu-unique",
    "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error",
    "-U_FORTIFY_SOURCE",  # its longjmp forbids a jump to another stack
]  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


class KernelFault(Exception):
    """What the emulator found: the kernel would misbehave, or could, on a GPU."""


class Kernels:
    """The `extern "C"` functions of a compiled source, each of which returns what `megaeva::launch` returned."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.simt_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Tensor | int | float | None, seed: int) -> None:
        """Runs a function and copies what it wrote into `arguments`; raises KernelFault with the emulator's text.

        Tensors become `void*` (None: a null pointer), in memory that ends at a page no one may touch and that otherwise
        holds NaN around them; int becomes `std::int64_t`, float `double`.
        """
        guarded: list[tuple[Tensor, _Guarded]] = []
        converted: list[object] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                copy = _Guarded(argument)
                guarded.append((argument, copy))
                converted.append(ctypes.c_void_p(copy.view.data_ptr()))
            elif argument is None:
                converted.append(ctypes.c_void_p(None))
            else:
                converted.append((ctypes.c_double if isinstance(argument, float) else ctypes.c_int64)(argument))
        self._library.simt_start(ctypes.c_uint64(seed))
        status = getattr(self._library, name)(*converted)
        text = self._library.simt_error().decode()
        if text or status != 0:
            raise KernelFault(text or f"{name} returned {status}")
        for argument, copy in guarded:
            argument.copy_(copy.view)
        for position, (_, copy) in enumerate(guarded):
            if copy.was_written_around():
                raise KernelFault(f"{name} wrote outside tensor {position}, between its rows or just beside it")


class _Guarded:
    """A copy of a tensor, strides and alignment to 16 bytes included, that ends at a page which may not be touched."""

    def __init__(self, tensor: Tensor) -> None:
        item = tensor.element_size()
        span = 0 if tensor.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        page = mmap.PAGESIZE
        usable = (span * item + 15 + page - 1) // page * page
        self._memory = mmap.mmap(-1, usable + page)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8, count=usable)
        self._bytes.fill_(0xFF)  # NaN in every floating-point type
        start = usable - span * item
        start -= (start - tensor.data_ptr()) % 16
        storage = self._bytes[start : start + span * item].view(tensor.dtype)
        self.view = torch.as_strided(storage, tensor.shape, tensor.stride(), storage.storage_offset())
        self.view.copy_(tensor)
        if _libc.mprotect(ctypes.c_void_p(self._bytes.data_ptr() + usable), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")

    def was_written_around(self) -> bool:
        """Whether anything but the tensor's own elements changed; the elements are lost by asking."""
        self.view.view(_INTEGERS[self.view.element_size()]).fill_(-1 if self.view.element_size() > 1 else 255)
        return bool((self._bytes != 0xFF).any())


def compile_kernels(source: str, folder: Path) -> Kernels:
    """The functions of tests/kernels/<source>, compiled into `folder`; skips the test without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = folder / (Path(source).stem + ".so")
    include = ["-I", str(CSRC), "-I", str(HERE / "simt")]
    command = [compiler, *_FLAGS, *include, str(HERE / source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{source} does not compile for the emulator:\n{done.stderr}"
    return Kernels(library)
