"""What a source file takes from a package, held to the installed package: names, attributes, and arguments of calls."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

PACKAGES = ("transformer_engine", "megatron.core.extensions")


def imported(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """{name in the file: (module, name there)} of everything that it imports from PACKAGES."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGES):
            for alias in node.names:
                found[alias.asname or alias.name] = (node.module or "", alias.name)
    return found


def _resolve(module: str, name: str) -> Any:
    owner = importlib.import_module(module)
    try:
        return getattr(owner, name)
    except AttributeError:
        return importlib.import_module(f"{module}.{name}")


def _chain(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        left = _chain(node.value)
        return [*left, node.attr] if left else []
    return []


def _call_faults(target: Any, name: str, call: ast.Call) -> Iterator[str]:
    bare = isinstance(target, type) and target.__init__ is object.__init__
    signature = inspect.Signature() if bare else inspect.signature(target)
    positional = [ast.unparse(arg) for arg in call.args if not isinstance(arg, ast.Starred)]
    named = {keyword.arg: keyword for keyword in call.keywords if keyword.arg is not None}
    open_ended = any(isinstance(arg, ast.Starred) for arg in call.args) or len(named) < len(call.keywords)
    bind = signature.bind_partial if open_ended else signature.bind
    try:
        bind(*positional, **named)
    except TypeError as error:
        yield f"line {call.lineno}: {name}(...): {error}"


def faults(source: str) -> list[str]:
    """One line for each name, attribute or argument that `source` uses and the installed packages do not have."""
    tree = ast.parse(source)
    found: list[str] = []
    known: dict[str, Any] = {}
    for name, (module, there) in imported(tree).items():
        try:
            known[name] = _resolve(module, there)
        except (ImportError, AttributeError) as error:
            found.append(f"{module}.{there}: {error}")

    def target(node: ast.AST) -> tuple[Any, str] | None:
        first, *rest = _chain(node) or [""]
        if first not in known:
            return None
        value, path = known[first], first
        for part in rest:
            path += f".{part}"
            if not hasattr(value, part):
                found.append(f"line {getattr(node, 'lineno', 0)}: {path} does not exist")
                return None
            value = getattr(value, part)
        return value, path

    bases: dict[ast.AST, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            own = [known[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in known]
            bases.update({inner: own[0] for inner in ast.walk(node) if own})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            target(node)
        if not isinstance(node, ast.Call):
            continue
        if (callee := target(node.func)) is not None:
            found.extend(_call_faults(*callee, node))
        elif node in bases and ast.unparse(node.func).startswith("super()."):
            method = ast.unparse(node.func).removeprefix("super().")
            base = bases[node]
            bound = getattr(base, method).__get__(object.__new__(object)) if method != "__init__" else base
            found.extend(_call_faults(bound, f"{base.__name__}.{method}", node))
    return list(dict.fromkeys(found))
