#!/usr/bin/env bash
# Tests, checks and measures the CUDA kernels on a machine that may be available for only a quarter of an hour. There
# are two commands, and each ends within its time limit:
#
#   bash benchmarks/gpu.sh first     # 240 s: library, smoke test, CUDA tests, each kernel's figures, stoch_norm
#   bash benchmarks/gpu.sh second    # 400 s: compute-sanitizer, then the other benchmarks
#
# Both use the compiled library in talib_fast/ if it was built from these sources and for this GPU. Otherwise they build
# it, which takes a minute or two of their time. To build it beforehand on another machine with nvcc, for compute
# capability 9.0:
#
#   FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 python setup.py build_ext --inplace
#
# They end at once if PyTorch serves an operation in place of a kernel. Otherwise every step runs within its limit, also
# if an earlier step failed. The exit status is 1 if any step fails. Results are written every few seconds, and
# benchmarks write after every case, so a run that is stopped from outside leaves its results behind.
#
# Needed: a GPU, and a python3 with torch >= 2.10 for CUDA, numpy, safetensors and pytest. To build: nvcc,
# setuptools >= 77 and ninja. For `second`: compute-sanitizer, and torchvision for whole steps. Optional: pytest-xdist
# (the tests use all cores), pytest-timeout (a hanging test does not stop the others), matplotlib (plots). Nothing is
# downloaded or installed.
#
#   PYTHON   the interpreter; default: python3
#   OUT      a folder for three files per command: gpu-first.json has all results, gpu-first.txt the outcome of each
#            step, and gpu-first.tar.gz logs, tables and plots; default: benchmarks/results, with the results also in
#            benchmarks/results/cuda
#   COMMIT   the commit to name in the results, if this is no git checkout
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

half=${1-}
python=${PYTHON:-python3}

fail() {
  echo "gpu.sh: $1" >&2
  exit 1
}

sanitizers=(memcheck racecheck initcheck synccheck)
case $half in
  first) whole_run=240 steps=(library smoke tests kernels bench_stoch_norm) ;;
  second)
    whole_run=400 steps=(library "${sanitizers[@]}")
    steps+=(bench_squared_distance bench_spectral_tail bench_step bench_bi_tuning bench_co_tuning bench_host_overhead)
    ;;
  *) fail "expected first or second, got ${half:-nothing}" ;;
esac

command -v "$python" >/dev/null || fail "there is no $python: set PYTHON to an interpreter that has torch"
"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch: set PYTHON to an interpreter that has torch"
arch=$("$python" -c '
import torch
print(*torch.cuda.get_device_capability(), sep=".") if torch.cuda.is_available() else None
' 2>/dev/null)
[[ $arch =~ ^[0-9]+\.[0-9]+$ ]] || fail "no GPU that this torch can use: nothing was built or measured"

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
logs=$work/logs
mkdir -p "$logs" "$work/states"
out=${OUT:-benchmarks/results}
results=${OUT:+$work/results}
results=${results:-benchmarks/results}
mkdir -p "$out" "$results"

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TORCH_CUDA_ARCH_LIST=$arch MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

place() {  # FILE NAME: put a file in place by a rename, so that it is never there in part
  cp "$1" "$out/.$2" && mv "$out/.$2" "$out/$2"
}

# Writes all results so far.
collect() {
  local name packed=(logs)
  {
    echo "GPU architecture $arch, commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
    for name in "${steps[@]}"; do
      cat "$work/states/$name" 2>/dev/null || printf '%-24s %7s  %s\n' "$name" - "FAIL, did not end"
    done
  } >"$work/summary"
  "$python" benchmarks/gather.py "$work/summary" "$results/cuda" "$work/json" && place "$work/json" "gpu-$half.json"
  [[ $results == "$work/results" && -d $results/cuda ]] && packed+=(results)
  tar -czf "$work/tar" -C "$work" "${packed[@]}" && place "$work/tar" "gpu-$half.tar.gz"
  place "$work/summary" "gpu-$half.txt"
}

# step NAME SECONDS TOOL COMMAND...: run a command with its own log, within its limit; TOOL is the program that it needs
step() {
  local name=$1 limit=$2 tool=$3 begun=$SECONDS left=$((whole_run - SECONDS)) status job
  shift 3
  ((limit < left)) || limit=$left
  if ! command -v "$tool" >/dev/null; then
    status="FAIL, $tool is missing"
  elif ((limit < 5)); then
    status="FAIL, no time was left"
  else
    # At the limit SIGINT lets pytest report what failed so far; a background job would ignore it without
    # --default-signal. A command that still runs after that is killed.
    timeout --signal=INT --kill-after=5 "$limit" env --default-signal=INT "$@" >"$logs/$name.log" 2>&1 &
    job=$!
    while sleep 3 & wait -n "$job" $!; kill -0 "$job" 2>/dev/null; do
      collect
    done >/dev/null 2>&1
    wait "$job"
    case $? in
      0) status=pass ;;
      124 | 137) status="FAIL, stopped after $limit s" ;;
      *) status=FAIL ;;
    esac
  fi
  printf '%-24s %5d s  %s\n' "$name" $((SECONDS - begun)) "$status" >"$work/states/$name"
  cat "$work/states/$name"
  [[ $status == pass || ! -e $logs/$name.log ]] || tail -n 15 "$logs/$name.log" | sed 's/^/    /'
  collect
  [[ $status == pass ]]
}

# Prints the outcome of all steps and exits.
finish() {
  echo
  cat "$out/gpu-$half.txt"
  [[ -s $out/gpu-$half.json ]] && ! grep -q FAIL "$out/gpu-$half.txt"
  exit
}

library() {
  "$python" benchmarks/check_library.py && return
  echo "building it"
  "$python" setup.py build_ext --inplace --force && "$python" benchmarks/check_library.py
}
export -f library
export python

step library 150 "$python" bash -c library || finish
export TALIB_FAST_BACKEND=compiled  # without the library there is nothing to test or to measure

# Here, unlike elsewhere, warnings are no errors: this machine may have any versions.
run_tests=("$python" -m pytest -p no:cacheprovider -W default)

measure() {  # NAME SECONDS OPTIONS...
  local name=$1 limit=$2
  shift 2
  step "bench_$name" "$limit" "$python" "$python" "benchmarks/bench_$name.py" --device cuda "$@" \
    --out "$results/cuda/$name" && tail -n 90 "$logs/bench_$name.log"
}

if [[ $half == first ]]; then
  host_only=(architectures batch_norm_tools build build_parts distributed fusion kernels_on_host norm_act packages pages)
  host_only+=(autograd_versions examples gpu_model machine_code simt torch_private)  # reach no GPU
  host_only+=(cli finetune images inference_commands inference_metrics networks training_data training_recipes)
  host_only+=(training_report)
  others=("${host_only[@]/#/--ignore=tests/test_}")
  others=("${others[@]/%/.py}" --ignore=tests/test_every_kernel.py)  # the step smoke has run it
  parallel=()
  if "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n "$(nproc)" --dist worksteal -p no:benchmark)
    if "$python" -c 'import pytest_timeout' 2>/dev/null; then
      parallel+=(--timeout 40 --timeout-method thread)  # this ends the process, and xdist starts another one
    fi
  fi
  step smoke 20 "$python" "${run_tests[@]}" tests/test_every_kernel.py -k cuda -q
  step tests 90 "$python" "${run_tests[@]}" tests "${others[@]}" "${parallel[@]}" -v --tb=short \
    -k "(cuda or gpu or synchronise or side_stream) and not GpuScript"
  step kernels 70 "$python" "$python" benchmarks/kernels.py --out "$results/cuda/kernels" && cat "$logs/kernels.log"
  measure stoch_norm 70 --rounds 3 --dtype bfloat16 float32 --layouts channels_last contiguous
  finish
fi

for tool in "${sanitizers[@]}"; do
  settings=() options=(--kernel-regex kns=talib_fast)
  case $tool in  # torch's allocator returns parts of larger blocks, which would hide faults from these two tools
    memcheck | initcheck) settings+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1) ;;
  esac
  [[ $tool != initcheck ]] || options=()  # initcheck must also see the memory that torch's kernels initialise
  step "$tool" 45 compute-sanitizer env "${settings[@]}" \
    compute-sanitizer --tool "$tool" "${options[@]}" --error-exitcode 1 \
    "${run_tests[@]}" tests/test_every_kernel.py -q \
    -k "cuda and not torch.float16 and not torch.float64"  # bfloat16 and float32 run the same code
done
measure squared_distance 40 --rounds 7
measure spectral_tail 30 --rounds 5
measure step 70 --rounds 7 --ways stochnorm "stochnorm + bss"
measure bi_tuning 25 --rounds 7
measure co_tuning 20 --rounds 7
measure host_overhead 25 --rounds 25
finish
