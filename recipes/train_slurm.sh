#!/usr/bin/env bash
# Many nodes: sbatch --nodes=45 recipes/train_slurm.sh RECIPE [key.path=value ...], from the repository.
#
#   recipes/train_slurm.sh --dry-run RECIPE ...    prints what would run; NNODES=45 says for how many nodes
#
# 120 s before the time limit or a preemption SIGTERM comes; every rank saves, and the job is put back into the queue. It goes
# on by itself: Slurm counts the restarts and a job started again resumes. So does one that Slurm requeues after a node
# failed. A large checkpoint may need more: sbatch --signal=B:TERM@300.
#SBATCH --job-name=megaeva
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
fail() { echo "error: $*" >&2; exit 2; }
[[ $# -gt 0 ]] || fail "no RECIPE is given; a YAML file must be; usage: sbatch --nodes=N $0 RECIPE [--resume] [key.path=value ...]"

dry_run=""
for argument in "$@"; do [[ "$argument" != --dry-run ]] || dry_run=1; done
# Slurm runs a copy of this file, so its folder says nothing.
train="${SLURM_SUBMIT_DIR:-$PWD}/recipes/train.sh"
[[ -r "$train" ]] || fail "$train is not there; sbatch must be called from megaeva's repository; cd there, or use sbatch --chdir and submit from it."
export PROCESSES="${PROCESSES:-8}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    [[ -n "$dry_run" ]] || fail "SLURM_JOB_ID is not set; this file must be started by Slurm; use sbatch --nodes=N $0 ..., or recipes/train.sh on each node."
    export NNODES="${NNODES:-1}" NODE_RANK=0 MASTER_ADDR=FIRST_NODE
else
    # Without these each node would become a job of its own.
    : "${SLURM_JOB_NODELIST:?is not set; Slurm must set it; submit this file with sbatch}" "${SLURM_NNODES:?is not set; Slurm must set it; submit this file with sbatch}"
    # Below the ports that the kernel gives to connections, 32768 and up.
    export NNODES="$SLURM_NNODES" JOB_ID="$SLURM_JOB_ID" MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}"
    # Not into head: scontrol would die of SIGPIPE now and then.
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || hosts=""
    export MASTER_ADDR="${hosts%%$'\n'*}"
    [[ -n "$MASTER_ADDR" ]] || fail "scontrol names no host of SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST; the first must be known, all meet there; look at scontrol show hostnames."
    if [[ $NNODES -gt 1 && "$MASTER_ADDR" =~ ^(localhost|127\.) ]]; then
        fail "the first of $NNODES nodes is called $MASTER_ADDR; it must be a name that the others reach; look at SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST."
    fi
fi
# srun does not take it from the allocation since Slurm 22.05, and one core a node is few.
[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
step=(srun --nodes="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash "$train" "$@")
if [[ -n "$dry_run" ]]; then
    printf '%q ' "${step[@]}"; echo
    NODE_RANK=0 exec bash "$train" "$@"
fi

stopped=""
# To the processes of the step, not to srun, which answers SIGTERM by killing them.
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
"${step[@]}" &
job=$!
# A wait ends when a signal comes; the next one waits for the ranks to save.
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do
    code=0
    wait "$job" || code=$?
done
if [[ -n "$stopped" && $code -ne 0 ]]; then
    echo "stopped by SIGTERM (exit code $code of srun): requeueing job $SLURM_JOB_ID, which then resumes"
    scontrol requeue "$SLURM_JOB_ID" || fail "scontrol does not requeue job $SLURM_JOB_ID; Slurm must allow it (JobRequeue in slurm.conf); submit the same command again with --resume."
fi
exit "$code"
