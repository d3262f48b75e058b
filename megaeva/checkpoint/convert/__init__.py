"""Weights of other projects, in and out: `convert(src, dst, to=...)`."""

from megaeva.checkpoint.convert.command import convert

__all__ = ["convert"]
