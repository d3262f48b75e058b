#!/usr/bin/env bash
# One node: recipes/train.sh RECIPE [--resume] [key.path=value ...]. PROCESSES defaults to the number of GPUs, else 1.
set -euo pipefail
if [[ $# -lt 1 ]]; then
    echo "usage: $0 RECIPE [--resume] [key.path=value ...]" >&2
    exit 2
fi
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
exec "${PYTHON:-python}" -m torch.distributed.run --standalone \
    --nproc-per-node="${PROCESSES:-$((gpus > 0 ? gpus : 1))}" -m megaeva.train "$@"
