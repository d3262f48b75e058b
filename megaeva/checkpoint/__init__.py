"""Checkpoints: mcore's torch_dist format, whole tensors by name, written atomically."""
