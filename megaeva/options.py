"""What the commands of `megaeva` share: arguments, and how a mistake ends one."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from megaeva.errors import INTERRUPTED, ConfigError, UserError, explain_disk_error

_P = ParamSpec("_P")
_R = TypeVar("_R")

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file of recipes/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key.path=value", help="Set on top of the recipe.", show_default=False),
]


def explained(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """`command` without tracebacks: a `UserError` is its message and exit code 2, Ctrl-C is exit code 130."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            typer.echo(str(error) if error.is_told else f"error: {error}", err=True)
            raise typer.Exit(error.status) from None
        except OSError as error:
            if (text := explain_disk_error(error)) is None:
                raise
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(UserError.status) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run


def seed_numbers(seeds: str) -> list[int]:
    """The numbers of `0,1,2`.

    Raises:
        ConfigError: something else is written there.
    """
    if not all(part.strip().isdecimal() for part in seeds.split(",")):
        raise ConfigError(f"--seeds {seeds} must be whole numbers with commas between them; e.g. --seeds 0,1,2.")
    return [int(part) for part in seeds.split(",")]
