"""Optimizers: parameter groups by name, AdamW and LAMB over mcore's distributed optimizer, and the schedule."""
