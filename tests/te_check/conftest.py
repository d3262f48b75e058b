"""Every test here needs the real package; `make te-check` has it."""

import pytest
import torch  # noqa: F401  # its wheels have the libnccl.so.2 that Transformer Engine looks for

# isort: split
import transformer_engine.pytorch  # noqa: F401  # broken or missing, it fails the check; nothing is skipped


@pytest.fixture(scope="module", autouse=True)
def no_job_left() -> None:
    """In place of the other tests' fixture: the groups of `without_gpu.one_grid` serve all modules."""
