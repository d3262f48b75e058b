"""Everything public says what it is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "megaeva").rglob("*.py")) + sorted((ROOT / "tools").glob("*.py"))
# Their meaning is fixed by torch; what a module's forward takes and gives is said here or in the class.
FIXED_BY_TORCH = {"backward", "extra_repr", "jvp", "setup_context", "vmap", "main"}

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _overrides(node: Documented) -> bool:
    names = {decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)}
    names |= {decorator.attr for decorator in node.decorator_list if isinstance(decorator, ast.Attribute)}
    return bool(names & {"override", "overload", "setter"})


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Line and name of each public class, function and method without a docstring.

    `forward`, and the methods of a Protocol, may lean on the docstring of their class.
    """

    def visit(body: list[ast.stmt], owner: str, speaks_for: set[str] | None) -> Iterator[str]:
        for node in body:
            if not isinstance(node, Documented) or node.name.startswith("_") or _overrides(node):
                continue
            has_docstring = ast.get_docstring(node) is not None
            leans = node.name in FIXED_BY_TORCH or speaks_for is None or node.name in speaks_for
            if not has_docstring and not leans:
                yield f"line {node.lineno}: {owner}{node.name}"
            if isinstance(node, ast.ClassDef):
                is_protocol = any(ast.unparse(base).split("[")[0].endswith("Protocol") for base in node.bases)
                speaks = None if is_protocol and has_docstring else {"forward"} if has_docstring else set()
                yield from visit(node.body, f"{node.name}.", speaks)

    yield from visit(tree.body, "", set())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = list(undocumented(tree))
    if tree.body and ast.get_docstring(tree) is None:
        missing.insert(0, "line 1: the module itself")
    assert not missing, f"without a docstring in {path.relative_to(ROOT)}:\n  " + "\n  ".join(missing)


def test_a_missing_docstring_is_seen() -> None:
    source = (
        "def f(): pass\nclass A:\n    'x'\n    def g(self): pass\n    def _h(self): pass\n    def forward(self): pass\n"
    )
    assert list(undocumented(ast.parse(source))) == ["line 1: f", "line 4: A.g"]
