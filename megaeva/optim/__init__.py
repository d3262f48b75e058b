"""Optimizers: parameter groups by name, AdamW and LAMB over mcore's distributed optimizer, and the schedule."""

# A broken Transformer Engine is guarded against before megatron-core is imported.
from megaeva.parallel import platform as _platform  # noqa: F401  isort: skip
