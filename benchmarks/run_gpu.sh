#!/usr/bin/env bash
# Tests and benchmarks on a machine with a CUDA GPU and Python 3.11 or 3.12.
#
#   benchmarks/run_gpu.sh [tests] [svi] [memory] [others]     all of them by default
#
# Packages that the machine lacks are installed from the folder wheels/ next to pyproject.toml if there is one,
# into a folder of their own, so that the machine's torch stays. Figures go to benchmarks/results, with the
# card's name in the file's name; with OUT set they, and the logs, are also copied there.
#
#   PYTHON      the interpreter (python3)
#   QUICK=1     one short round of the benchmarks: does everything run?
#   LIMIT       seconds that each part may take (3600)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-3600}
parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then parts=(tests svi memory others); fi
quick=()
if [ -n "${QUICK:-}" ]; then quick=(--quick); fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/site" "$work/logs"

if compgen -G 'wheels/*.whl' >/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" wheels/*.whl || exit 1
fi
export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}"
export MPLBACKEND=Agg XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1

"$PYTHON" - <<'PY' || exit 1
import shutil
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device here.")
from torch.utils.cpp_extension import CUDA_HOME

import deepprob

for what, found in (("a C++ compiler", shutil.which("g++")), ("the CUDA toolkit (CUDA_HOME)", CUDA_HOME)):
    if not found:
        print(f"without {what} steps are recorded operation by operation, not compiled: tests of compiled ones will fail")

print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"{torch.cuda.get_device_name()}, deepprob from {deepprob.__file__}")
PY

touch "$work/began"
failed=()

step() { # step NAME COMMAND...: run, keep the log, remember a failure
  local name=$1
  shift
  echo "== $name"
  timeout "$LIMIT" "$@" 2>&1 | tee "$work/logs/$name.log"
  local status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    echo "== $name ended with status $status"
    failed+=("$name")
  fi
}

for part in "${parts[@]}"; do
  case $part in
    tests)
      step tests "$PYTHON" -m pytest --device cuda -q
      ;;
    svi)
      step svi "$PYTHON" benchmarks/svi.py --device cuda "${quick[@]}"
      ;;
    memory)
      step memory "$PYTHON" benchmarks/memory.py --device cuda "${quick[@]}"
      ;;
    others)
      step bnn_predict "$PYTHON" benchmarks/bnn_predict.py --device cuda
      if [ -n "${DEEPPROB_DATA:-}" ]; then
        if [ -n "${QUICK:-}" ]; then
          step vae "$PYTHON" benchmarks/vae.py --device cuda --epochs 1 --particles 100
          step bnn "$PYTHON" benchmarks/bnn.py --device cuda --sets yacht --splits 1
          step dmm_jsb "$PYTHON" benchmarks/dmm_jsb.py --device cuda --epochs 2
        else
          step vae "$PYTHON" benchmarks/vae.py --device cuda --full
          step bnn "$PYTHON" benchmarks/bnn.py --device cuda
          step dmm_jsb "$PYTHON" benchmarks/dmm_jsb.py --device cuda
        fi
      else
        echo "without vae, bnn, dmm_jsb: DEEPPROB_DATA names no folder of data sets"
      fi
      ;;
    *)
      echo "unknown part: $part. Choose from: tests, svi, memory, others." >&2
      exit 2
      ;;
  esac
done

if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  find benchmarks/results -name '*.json' -newer "$work/began" -exec cp {} "$OUT/" \;
  cat "$work"/logs/*.log >"$OUT/run_gpu.log" 2>/dev/null
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "everything ran"
