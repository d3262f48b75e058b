"""Recipes: sections, variants, loading and validation. Never imports torch."""
