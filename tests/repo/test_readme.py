"""Commands and links shown in the documentation exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from megaeva.cli import app
from megaeva.config import load, load_loop

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path
    for pattern in ("*.md", "csrc/**/*.md", "recipes/**/*.md", "megaeva/**/*.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
]
# Words in capitals, <angles> or {braces} stand for something of the reader's.
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*\b|.*[<>{}*].*|\.\.\.")


def shell_lines(text: str) -> Iterator[str]:
    """Each command of the fenced sh/bash/console blocks, continuation lines joined and comments cut."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in ("sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.strip().removeprefix("$ ")
                if command and not command.startswith("#"):
                    yield command


def make_targets() -> set[str]:
    """Names the Makefile can make."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name for names in re.findall(r"^([a-z][a-z -]*):(?!=)", text, re.MULTILINE) for name in names.split()}


def _is_placeholder(word: str) -> bool:
    return PLACEHOLDER.fullmatch(word) is not None


def _check_path(word: str) -> None:
    assert (ROOT / word).exists(), f"{word} does not exist"


def _check_recipe(words: list[str]) -> None:
    recipe, overrides = words[0], [word for word in words[1:] if "=" in word and not word.startswith("-")]
    if _is_placeholder(recipe):
        return
    _check_path(recipe)
    if any(_is_placeholder(override.partition("=")[2]) for override in overrides):
        return
    is_loop = re.search(r"^rounds:", (ROOT / recipe).read_text(encoding="utf-8"), re.MULTILINE)
    (load_loop if is_loop else load)(ROOT / recipe, overrides)


def _check_megaeva(words: list[str]) -> None:
    command: click.Command = typer.main.get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"megaeva has no command {words[0]}"
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in {*options, "--help"}, f"{command.name} has no option {word}"
    recipes = [index for index, word in enumerate(words) if word.endswith((".yaml", ".yml"))]
    if recipes:
        _check_recipe(words[recipes[0] :])


def check_command(line: str) -> None:
    """Fails when `line` names a make target, command, option, recipe, key or file that does not exist."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        for word in words[1:]:
            assert "=" in word or word.startswith("-") or word in make_targets(), f"make has no target {word}"
    elif program == "megaeva":
        _check_megaeva(words[1:])
    elif "megaeva.train" in words:
        _check_recipe([word for word in words[words.index("megaeva.train") + 1 :] if not word.startswith("-")])
    elif program in ("python", "bash", "sh") and len(words) > 1 and "/" in words[1]:
        _check_path(words[1])
    elif "/" in program and not _is_placeholder(program):
        _check_path(program)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_exist(path: Path) -> None:
    for line in shell_lines(path.read_text(encoding="utf-8")):
        try:
            check_command(line)
        except Exception as error:
            pytest.fail(f"{path.relative_to(ROOT)} shows `{line}`: {error}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_readme_shows_the_two_commands() -> None:
    lines = list(shell_lines((ROOT / "README.md").read_text(encoding="utf-8")))
    assert [line.split("#")[0].strip() for line in lines[:2]] == ["make demo", "make test"]


def test_help_of_make_names_every_phony_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert [name for name in phony[1].split() if name != "help" and f"make {name}" not in text] == []


@pytest.mark.parametrize(
    "line",
    [
        "make nothing-of-the-kind",
        "megaeva trian recipes/demo.yaml",
        "megaeva train --no-such-option recipes/demo_teacher.yaml",
        "megaeva train recipes/missing.yaml",
        "torchrun --nproc-per-node 2 -m megaeva.train recipes/demo_teacher.yaml train.total_sample=10",
        "python tools/missing.py",
    ],
)
def test_a_wrong_command_is_seen(line: str) -> None:
    with pytest.raises(Exception, match=r".+"):
        check_command(line)
