#!/usr/bin/env bash
# Runs a command with Transformer Engine importable on a machine without a GPU; builds it first where it is not.
#
#   tools/te_without_gpu.sh BASE_VENV TE_VENV COMMAND...
#
# TE_VENV is an environment of its own that sees BASE_VENV's packages, so that BASE_VENV (and `import megatron.core` in
# it) stays as it is. Building takes about 20 minutes on two cores and needs the CUDA toolkit (nvcc), no GPU. Modules
# still refuse to run without a GPU; names, arguments and recipes are all there.
set -euo pipefail

TE_VERSION=2.20.2

if (($# < 3)); then
  sed -n '2,8p' "$0" >&2
  exit 2
fi
base=$(cd "$1" && pwd) te=$2
shift 2

purelib() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
site=$(purelib "$base")

# torch goes first in both: it loads libnccl.so.2 out of its wheels.
# fault: the line that the error of an import ends in.
fault() {
  "$te/bin/python" -c 'import torch, transformer_engine.pytorch' 2>&1 >/dev/null | tail -n 1
}

works() {
  test -x "$te/bin/python" && "$te/bin/python" -c 'import torch, transformer_engine.pytorch' >/dev/null 2>&1
}

build() {
  export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
  if ! test -x "$CUDA_HOME/bin/nvcc"; then
    echo "te_without_gpu: CUDA_HOME=$CUDA_HOME has no bin/nvcc; it must be a CUDA toolkit 13; set CUDA_HOME." >&2
    exit 1
  fi
  # In this order: the wheels' headers lack crt/, the toolkit's lack NCCL and cuDNN.
  export CPATH="$CUDA_HOME/include:$site/nvidia/nccl/include:$site/nvidia/cudnn/include:$site/nvidia/cu13/include"
  export MAX_JOBS=${MAX_JOBS:-$(nproc)} NVTE_BUILD_THREADS_PER_JOB=1 PATH="$base/bin:$PATH"
  test -x "$te/bin/python" || "$base/bin/python" -m venv "$te"
  te=$(cd "$te" && pwd)
  echo "$site" >"$(purelib "$te")/base.pth"
  ln -sfn "$site/nvidia" "$(purelib "$te")/nvidia" # where it looks for cuDNN and the rest
  local install=("$te/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps)
  # nvdlfw-inspect is imported by it; einops, onnx, onnxscript and pydantic are too, and come with megaeva[test].
  "${install[@]}" "transformer-engine==$TE_VERSION" "transformer-engine-cu13==$TE_VERSION" nvdlfw-inspect
  echo "te_without_gpu: building transformer-engine-torch $TE_VERSION into $te (about 20 minutes on two cores)"
  "${install[@]}" --no-build-isolation "transformer-engine-torch==$TE_VERSION"
}

works || build
works || {
  echo "te_without_gpu: Transformer Engine is installed in $te and does not import: $(fault)" >&2
  exit 1
}
PATH="$(cd "$te" && pwd)/bin:$PATH" exec "$@"
