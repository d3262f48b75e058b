"""`megaeva bench step`: checks its options before torch is loaded, and prints what was measured with its command."""

import difflib
from collections.abc import Iterator
from typing import Literal

from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import ConfigError


def run_step(
    variant: str,
    batch: int,
    precision: Literal["fp32", "bf16"],
    peer: Literal["plain", "padded", "none"],
    part: Literal["both", "vision", "text"],
    rounds: int,
    threads: int | None,
) -> Iterator[str]:
    """Yields lines to print: what was measured, and its row for benchmarks/log.md.

    Raises:
        ConfigError: an unknown variant, or a peer that the part does not have.
    """
    model = find_model(variant)
    if peer == "padded" and part == "vision":
        raise ConfigError(
            "--part vision has no captions, --peer padded measures theirs; use --part text or --part both."
        )
    import torch

    from megaeva.bench.step import benchmark_step

    if threads:
        torch.set_num_threads(threads)
    command = (
        f"megaeva bench step --peer {peer} --variant {variant} --batch {batch} --precision {precision} --part {part} "
        f"--rounds {rounds} --threads {torch.get_num_threads()}"
    )
    yield command
    times = benchmark_step(model, batch_size=batch, precision=precision, peer=peer, part=part, num_rounds=rounds)
    yield from times.report(command)


def find_model(variant: str) -> ModelSection:
    """The published model of that name.

    Raises:
        ConfigError: there is none.
    """
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=3) or list(VARIANTS)
        raise ConfigError(f"--variant {variant} must be a known model; did you mean {' or '.join(near)}?")
    return ModelSection.model_validate({"variant": variant} | VARIANTS[variant])
