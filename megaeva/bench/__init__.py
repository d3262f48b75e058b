"""Measures this project's step and native operators beside plain PyTorch, alternately, on the machine at hand."""
