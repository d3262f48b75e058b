#!/usr/bin/env bash
# Installs megaeva on a machine with NVIDIA GPUs, step by step; each step says what it found before the next begins.
#
#   tools/install_gpu.sh [--dry-run] [--venv DIR] [--python PYTHON]
#
# --dry-run prints the steps and runs none. It stops at the first thing that is not as it must be and says what to do;
# what is already there is not done again. Transformer Engine's PyTorch part is compiled against the installed torch, ten
# minutes on a large machine. This script has not run on a machine with a GPU yet.
set -euo pipefail

TE_VERSION=2.20.2
CUDA_MAJOR=13
MIN_DRIVER=580 # of CUDA 13

dry_run=false venv=.venv python=python3.11
while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    --venv) venv=${2:?--venv needs a folder} && shift ;;
    --python) python=${2:?--python needs an interpreter} && shift ;;
    *) sed -n '2,8p' "$0" >&2 && exit 2 ;;
  esac
  shift
done
cd "$(dirname "$0")/.."
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
number=0

say() { printf 'install_gpu: %s\n' "$*"; }
fail() {
  printf 'install_gpu: %s\n' "$*" >&2
  exit 1
}
step() {
  number=$((number + 1))
  say "$number. $*"
}
# Prints the command, and runs it unless this is a dry run.
run() {
  printf '   $ %s\n' "$*"
  $dry_run || "$@"
}
# check 'what must hold' 'what to do' command...
check() {
  local must=$1 remedy=$2
  shift 2
  printf '   ? %s\n' "$must"
  $dry_run || "$@" >/dev/null 2>&1 || fail "not so: $must; $remedy"
}
bin() { "$venv/bin/python" "$@"; }
pip_install() { run "$venv/bin/python" -m pip install --disable-pip-version-check --constraint .ci/constraints.txt "$@"; }

driver_is_new_enough() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
  ((${driver%%.*} >= MIN_DRIVER))
}
nvcc_is_right() { "$CUDA_HOME/bin/nvcc" --version | grep -q "release $CUDA_MAJOR\."; }
torch_is_right() {
  bin -c "import sys, torch; sys.exit(not (torch.cuda.is_available() and (torch.version.cuda or '').startswith('$CUDA_MAJOR.')))"
}
cudnn_is_found() { bin -c 'import sys, torch; sys.exit(not torch.backends.cudnn.is_available())'; }
# torch goes first: it loads the libnccl.so.2 of its wheels.
engine_imports() { bin -c "import torch, transformer_engine as te, transformer_engine.pytorch; assert te.__version__.startswith('$TE_VERSION')"; }
engine_multiplies() {
  bin -c 'import torch, transformer_engine.pytorch as te; te.Linear(32, 32, params_dtype=torch.bfloat16)(torch.ones(16, 32, device="cuda", dtype=torch.bfloat16)).sum().backward(); torch.cuda.synchronize()'
}

step "NVIDIA driver and GPUs"
check "nvidia-smi lists a GPU" "install the driver, $MIN_DRIVER or later, and load it" nvidia-smi -L
check "the driver is $MIN_DRIVER or later, for CUDA $CUDA_MAJOR" "update the driver" driver_is_new_enough

step "CUDA toolkit, which compiles Transformer Engine and csrc/"
check "$CUDA_HOME/bin/nvcc is of CUDA $CUDA_MAJOR" "install cuda-toolkit-$CUDA_MAJOR-0 or set CUDA_HOME" nvcc_is_right
check "a C++ compiler" "install g++" command -v g++

step "Python 3.11 and $venv"
check "$python is Python 3.11 with venv" "install python3.11 and python3.11-venv, or name one: --python" \
  "$python" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))'
if ! test -x "$venv/bin/python"; then run "$python" -m venv "$venv"; fi

step "torch for CUDA $CUDA_MAJOR, with NCCL and cuDNN in its wheels"
pip_install torch torchvision setuptools wheel ninja
check "torch is a CUDA $CUDA_MAJOR build and sees a GPU" \
  "pip uninstall -y torch, and install one for CUDA $CUDA_MAJOR (see .ci/constraints.txt)" torch_is_right
check "torch finds cuDNN" "pip install --force-reinstall nvidia-cudnn-cu$CUDA_MAJOR" cudnn_is_found

step "megaeva, its CUDA kernels, and DALI"
run env MEGAEVA_BUILD=cuda "$venv/bin/python" -m pip install --disable-pip-version-check --constraint .ci/constraints.txt \
  --no-build-isolation --editable '.[demo,eval,video]'
pip_install "nvidia-dali-cuda${CUDA_MAJOR}0"
check "DALI imports" "pip install --force-reinstall nvidia-dali-cuda${CUDA_MAJOR}0" bin -c 'import nvidia.dali.fn'

step "Transformer Engine $TE_VERSION, compiled against this torch"
if $dry_run || ! engine_imports >/dev/null 2>&1; then
  # What a half-installed one leaves behind makes `import megatron.core` fail, so it goes first.
  run "$venv/bin/python" -m pip uninstall --yes transformer-engine transformer-engine-cu12 transformer-engine-cu13 transformer-engine-torch
  pip_install --no-deps "transformer-engine==$TE_VERSION" "transformer-engine-cu$CUDA_MAJOR==$TE_VERSION"
  pip_install einops onnx onnxscript nvdlfw-inspect
  # Whole paths, as pip builds in a folder of its own.
  home=$(realpath -m "$venv")
  site="$home/lib/python3.11/site-packages"
  # In this order: the wheels' headers lack crt/, the toolkit's lack NCCL and cuDNN.
  run env "CPATH=$CUDA_HOME/include:$site/nvidia/nccl/include:$site/nvidia/cudnn/include:$site/nvidia/cu13/include" \
    "PATH=$home/bin:$PATH" "$venv/bin/python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps \
    "transformer-engine-torch==$TE_VERSION"
fi
check "Transformer Engine $TE_VERSION imports" \
  "look at \`$venv/bin/megaeva doctor\`, which names what is missing" engine_imports
check "its linear runs forward and backward on this GPU" "the error: $venv/bin/python -c 'import torch, transformer_engine.pytorch'" engine_multiplies

step "megaeva doctor"
run "$venv/bin/megaeva" doctor
