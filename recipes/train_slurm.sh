#!/usr/bin/env bash
# Many nodes: sbatch --nodes=45 recipes/train_slurm.sh RECIPE [key.path=value ...]. SIGUSR1 comes 5 minutes before the time
# limit and becomes SIGTERM, on which every rank saves; submit with --resume to continue.
#SBATCH --job-name=megaeva
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log
set -euo pipefail
if [[ $# -lt 1 ]]; then
    echo "usage: sbatch --nodes=N $0 RECIPE [--resume] [key.path=value ...]" >&2
    exit 2
fi
# Without these a rendezvous would quietly fall back to localhost: one separate world on each node.
: "${SLURM_JOB_NODELIST:?must be set: submit this script with sbatch}" "${SLURM_NNODES:?must be set by Slurm}"
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${PROCESSES:-8}" --max-restarts=0 \
    --shutdown-timeout=240 `# torchrun kills the ranks 30 s after SIGTERM otherwise: too short for a large checkpoint` \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port" \
    -m megaeva.train "$@" &
job=$!
trap 'kill -TERM "$job"' USR1 TERM    # srun passes it on to torchrun, torchrun to the ranks
# The first wait ends when a signal comes; the second waits for the ranks to save.
wait "$job" || { code=$?; [[ $code -gt 128 ]] && wait "$job" || exit "$code"; }
