"""Weak-to-strong rounds as a chain of torchrun jobs with a ledger on disk."""
