"""Measures native operators beside plain PyTorch and prints rows for benchmarks/log.md; writes nothing."""

import argparse

import torch

from megaeva.ops.benchmark import benchmark_normalize_pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Parses arguments, makes one call, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operator", choices=["normalize-pack"])
    parser.add_argument("--num-samples", type=int, default=8192, help="rows of each side")
    parser.add_argument("--embed-dim", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    for comparison in benchmark_normalize_pack(
        num_samples=options.num_samples,
        embed_dim=options.embed_dim,
        dtype=DTYPES[options.dtype],
        device=options.device,
        num_rounds=options.rounds,
    ):
        print(f"{comparison.work}: {comparison.ratio:.2f}x as fast as plain PyTorch", flush=True)
        print(comparison.row(), flush=True)


if __name__ == "__main__":
    main()
