"""Recipes: schema, variants, loading and checking. Imports no torch; a recipe is checked in milliseconds.

The public surface: `load`, `load_loop`, `load_model`, `dump`, `diff_from_base`, `as_overrides`, `check_world`,
`VARIANTS`.
"""

from megaeva.config.load import as_overrides, diff_from_base, dump, load, load_loop, load_model
from megaeva.config.validate import check_world
from megaeva.config.variants import VARIANTS

__all__ = ["VARIANTS", "as_overrides", "check_world", "diff_from_base", "dump", "load", "load_loop", "load_model"]
