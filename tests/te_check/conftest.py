"""Every test here needs the real package; `make te-check` has it."""

import torch  # noqa: F401  # its wheels have the libnccl.so.2 that Transformer Engine looks for

# isort: split
import transformer_engine.pytorch  # noqa: F401  # broken or missing, it fails the check; nothing is skipped
