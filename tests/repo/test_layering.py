"""Who may import whom, and what may be touched where: the rules of CONTRIBUTING.md, read from the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megaeva"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))

LEVELS: dict[str, int] = {
    name: level
    for level, names in enumerate(
        [
            ("errors", "config", "ops"),
            ("parallel", "observability", "data", "options"),
            ("model", "losses", "optim", "checkpoint"),
            ("tasks", "eval", "planning", "doctor", "export"),
            ("trainer",),
            ("train", "loop", "cli", "bench"),
        ]
    )
    for name in names
}

# Imports between units of one level, each with its reason. A new one is argued for here or not made.
SIBLINGS: dict[tuple[str, str], str] = {
    ("config", "errors"): "a recipe's mistakes are user errors",
    ("cli", "loop"): "`megaeva loop` and `megaeva demo` run it",
    ("cli", "bench"): "`megaeva bench` runs it",
    ("bench", "loop"): "`megaeva bench layouts` launches runs as the loop does",
    ("tasks", "eval"): "the contrastive task evaluates its own model",
}

CUDA_ALLOWED = ("megaeva/parallel/", "megaeva/data/decode_dali.py", "megaeva/bench/compare.py")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Full dotted name and line of everything imported at any depth; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def dotted(node: ast.AST) -> str:
    """`a.b.c` for an attribute chain on a name, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return ""


def layer_faults(source: str, unit: str, package: str) -> list[str]:
    """What is wrong with the imports of a file that belongs to `unit`, a name in LEVELS."""
    faults = []
    for module, line in imported_modules(ast.parse(source), package):
        parts = module.split(".")
        if parts[0] != "megaeva" or len(parts) < 2 or parts[1] == "__version__":
            continue
        target = parts[1]
        if target == unit:
            continue
        if target not in LEVELS:
            faults.append(f"line {line}: {module} is in no level of this test; give megaeva.{target} one")
        elif LEVELS[target] > LEVELS[unit]:
            faults.append(f"line {line}: {unit} (level {LEVELS[unit]}) imports upward: {module}")
        elif LEVELS[target] == LEVELS[unit] and (unit, target) not in SIBLINGS:
            faults.append(f"line {line}: {unit} imports its sibling {module}, which SIBLINGS does not list")
    return faults


def cuda_uses(tree: ast.AST) -> list[int]:
    """Lines that reach for torch.cuda or call .cuda()."""
    lines = [line for module, line in imported_modules(tree, "") if module.startswith("torch.cuda")]
    for node in ast.walk(tree):
        is_module = isinstance(node, ast.Attribute) and dotted(node) == "torch.cuda"
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
        if is_module or is_call:
            lines.append(node.lineno)
    return lines


def parallel_state_uses(tree: ast.AST) -> list[int]:
    """Lines that reach for Megatron-core's global process groups."""
    lines = [line for module, line in imported_modules(tree, "") if "megatron.core.parallel_state" in module]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("parallel_state", "mpu"):
            lines.append(node.lineno)
    return lines


def imports_transformer_engine(source: str) -> bool:
    """Whether a file imports it, itself or by Megatron-core's classes on it."""
    if "transformer_engine" not in source and "extensions" not in source:
        return False
    names = ("transformer_engine.", "megatron.core.extensions.")
    return any(f"{module}.".startswith(names) for module, _ in imported_modules(ast.parse(source), ""))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    unit = parts[0]
    if unit == "__init__":
        modules = [m for m, _ in imported_modules(_tree(path), "megaeva") if m.startswith("megaeva")]
        assert not modules, "megaeva/__init__.py imports nothing, so that no import of a part loads another"
        return
    assert unit in LEVELS, f"megaeva/{unit} is in no level; add it to LEVELS"
    package = ".".join(("megaeva", *parts[:-1]))
    faults = layer_faults(path.read_text(encoding="utf-8"), unit, package)
    assert not faults, "\n".join(f"{_name(path)} {fault}" for fault in faults)


@pytest.mark.parametrize("path", [*SOURCES, *TOOLS], ids=_name)
def test_cuda_is_touched_only_where_it_is_allowed(path: Path) -> None:
    if not _name(path).startswith(CUDA_ALLOWED):
        lines = cuda_uses(_tree(path))
        assert not lines, f"{_name(path)}: torch.cuda or .cuda() in lines {lines}; ask the Runtime for the device"


@pytest.mark.parametrize("path", [*SOURCES, *TOOLS], ids=_name)
def test_process_groups_are_passed_not_fetched(path: Path) -> None:
    if not _name(path).startswith("megaeva/parallel/"):
        lines = parallel_state_uses(_tree(path))
        assert not lines, f"{_name(path)}: parallel_state in lines {lines}; take a Grid as an argument"


def test_transformer_engine_is_imported_in_one_place() -> None:
    """What is broken or absent on most machines stays behind one door; the platform looks whether it opens."""
    found = {_name(path) for path in [*SOURCES, *TOOLS] if imports_transformer_engine(path.read_text("utf-8"))}
    assert found == {"megaeva/model/transformer_engine.py"}


@pytest.mark.parametrize("source", ["import transformer_engine.pytorch as te", "from megatron.core import extensions"])
def test_an_import_of_transformer_engine_is_seen(source: str) -> None:
    assert imports_transformer_engine(source)


def test_there_is_no_drawer_for_everything() -> None:
    names = ("utils", "util", "helpers", "helper", "misc", "common")
    assert not [_name(path) for path in SOURCES if path.stem in names or path.parent.name in names]


def test_classes_are_not_managers() -> None:
    faults = [
        f"{_name(path)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Manager", "Helper", "Utils"))
    ]
    assert not faults


@pytest.mark.parametrize("module", ["megaeva.config", "megaeva.config.load", "megaeva.config.validate", "megaeva.cli"])
def test_starts_without_torch(module: str) -> None:
    script = f"import {module}, sys; sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"importing {module} loads torch, megatron or numpy\n{done.stderr}"


def test_every_exception_is_needed() -> None:
    used = {
        (path.relative_to(PACKAGE).with_suffix("").parts[0], module.split(".")[1])
        for path in SOURCES
        for module, _ in imported_modules(_tree(path), ".".join(("megaeva", *path.relative_to(PACKAGE).parts[:-1])))
        if module.startswith("megaeva.")
    }
    assert set(SIBLINGS) <= used, f"no import needs {set(SIBLINGS) - used} any more; take it off SIBLINGS"


# The rules above must be able to fail.


@pytest.mark.parametrize(
    ("source", "unit", "package"),
    [
        ("import megaeva.trainer", "data", "megaeva.data"),
        ("from megaeva import trainer", "tasks", "megaeva.tasks"),
        ("def f():\n    from megaeva.model.init import init_weights", "losses", "megaeva.losses"),
        ("from ..trainer import Trainer", "model", "megaeva.model"),
        ("from megaeva.unheard_of import x", "cli", "megaeva"),
    ],
)
def test_a_wrong_import_is_seen(source: str, unit: str, package: str) -> None:
    assert len(layer_faults(source, unit, package)) == 1


def test_a_right_import_is_left_alone() -> None:
    source = "import torch\nfrom megaeva.errors import UserError\nfrom megaeva.losses import x\nfrom . import y"
    assert layer_faults(source, "losses", "megaeva.losses") == []


@pytest.mark.parametrize(
    "source", ["torch.cuda.synchronize()", "x.cuda()", "from torch import cuda", "import torch.cuda.amp"]
)
def test_cuda_is_seen(source: str) -> None:
    assert cuda_uses(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "from megatron.core import parallel_state",
        "from megatron.core import parallel_state as mpu",
        "from megatron.core.parallel_state import get_data_parallel_group",
        "import megatron.core\nmegatron.core.parallel_state.is_initialized()",
    ],
)
def test_parallel_state_is_seen(source: str) -> None:
    assert parallel_state_uses(ast.parse(source))
