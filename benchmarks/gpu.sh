#!/usr/bin/env bash
# Builds the CUDA kernels, tests, checks and measures them: one command, under ten minutes, no network.
#
#   bash benchmarks/gpu.sh
#
# Needs a GPU, nvcc, compute-sanitizer (both are in the CUDA toolkit) and a python3 with torch >= 2.10 for CUDA, numpy,
# torchvision, setuptools >= 77, ninja and pytest; with matplotlib it draws the plots too. Nothing is installed: the
# library is built inside this checkout. Every step runs, also after one that failed; any failure makes the exit
# status 1.
#
#   PYTHON   the interpreter, python3
#   OUT      a folder for gpu.json, which holds all results, gpu-summary.txt and gpu-logs.tar.gz, which holds all logs,
#            tables and plots; without it the results go to benchmarks/results/cuda too
#   COMMIT   what the results name as their commit where this is no git checkout
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

operations=(stoch_norm squared_distance spectral_tail)  # each with tests/test_NAME.py and benchmarks/bench_NAME.py
benchmarks=("${operations[@]}" step bi_tuning co_tuning host_overhead)
small_cases="cuda and (TestOperation or lists_of_every_length or matrices_in_blocks or any_strides or size_class)"
small_cases+=" and not gradcheck and not opcheck and not elements"
small_tests=("${operations[@]/#/tests/test_}")
small_tests=("${small_tests[@]/%/.py}" tests/test_activation.py)  # what stoch_norm takes along has a file of its own
host_only=(architectures batch_norm_tools build build_parts distributed fusion kernels_on_host norm_act packages pages)
host_only+=(autograd_versions recipes simt torch_private)  # reach no GPU
host_only+=(cli finetune images inference_commands inference_metrics networks training_data training_recipes)
host_only+=(training_report)
ignored=("${host_only[@]/#/--ignore=tests/test_}")
ignored=("${ignored[@]/%/.py}")
sanitizers=(memcheck racecheck initcheck synccheck)
whole_run=580                        # seconds; no step gets more than what is left of them
python=${PYTHON:-python3}

fail() {
  echo "gpu.sh: $1" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "there is no $python: set PYTHON to an interpreter that has torch"
"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch: set PYTHON to an interpreter that has it"
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

# step NAME SECONDS TOOL COMMAND...: run it with its own log, under its limit; TOOL is the program that it needs
step() {
  local name=$1 limit=$2 tool=$3 begun=$SECONDS left=$((whole_run - SECONDS)) status
  shift 3
  ((limit < left)) || limit=$left
  if ! command -v "$tool" >/dev/null; then
    echo "$tool is missing" >"$logs/$name.log"
    status="FAIL, $tool is missing"
  elif ((limit < 5)); then
    echo "no time was left" >"$logs/$name.log"
    status="FAIL, no time was left"
  else
    timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1
    case $? in
      0) status=pass ;;
      124 | 137) status="FAIL, stopped after $limit s" ;;
      *) status=FAIL ;;
    esac
  fi
  printf '%-24s %5d s  %s\n' "$name" $((SECONDS - begun)) "$status" >"$work/states/$name"
  cat "$work/states/$name"
  [[ $status == pass || $status == *missing ]] || tail -n 15 "$logs/$name.log" | sed 's/^/    /'
  [[ $status == pass ]]
}

# What there is so far is put in place after every phase: a run that is stopped from outside leaves it behind.
steps=(build tests "${sanitizers[@]}" kernels "${benchmarks[@]/#/bench_}")
collect() {
  local name
  {
    echo "GPU architecture $arch, commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}"
    for name in "${steps[@]}"; do
      cat "$work/states/$name" 2>/dev/null || printf '%-24s %7s  %s\n' "$name" - "FAIL, did not run"
    done
  } >"$out/gpu-summary.txt"
  "$python" benchmarks/gather.py "$out/gpu-summary.txt" "$results/cuda" "$out/gpu.json" || echo "no gpu.json was written"
  local packed=(logs)
  [[ $results == "$out" ]] || packed+=(results)  # the tables and plots too; --from-json can also make them again
  tar -czf "$out/gpu-logs.tar.gz" -C "$work" "${packed[@]}"
}

build() {
  "$python" setup.py build_ext --inplace --force && "$python" - "$@" <<'PYTHON'
import sys

from talib_fast.ops import backends, compiled

served = backends()
missing = [name for name in sys.argv[1:] if served[name]["cuda"][0] != "compiled"]
sys.exit(f"no CUDA kernel for {', '.join(missing)}: {compiled().status}" if missing else 0)
PYTHON
}
export -f build
export python

step build 170 nvcc bash -c 'build "$@"' build "${operations[@]}"
collect

# Correctness needs no quiet GPU: the suite and the sanitizers run side by side.
parallel=()
if "$python" -c 'import xdist' 2>/dev/null; then
  parallel=(-n 4 --dist loadfile -p no:benchmark)
fi
step tests 230 "$python" "$python" -m pytest tests "${ignored[@]}" -p no:cacheprovider "${parallel[@]}" &
for tool in "${sanitizers[@]}"; do
  settings=(TALIB_FAST_BACKEND=compiled)  # without the library there is nothing to check
  case $tool in  # torch's allocator hands out parts of larger blocks, which would hide what these two look for
    memcheck | initcheck) settings+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1) ;;
  esac
  step "$tool" 230 compute-sanitizer env "${settings[@]}" compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$python" -m pytest "${small_tests[@]}" -k "$small_cases" -p no:cacheprovider -q &
done
wait
collect

step kernels 100 "$python" env TALIB_FAST_BACKEND=compiled "$python" benchmarks/kernels.py \
  --out "$results/cuda/kernels" && cat "$logs/kernels.log"
collect
for name in "${benchmarks[@]}"; do
  step "bench_$name" 180 "$python" env TALIB_FAST_BACKEND=compiled "$python" "benchmarks/bench_$name.py" \
    --device cuda --out "$results/cuda/$name" && tail -n 90 "$logs/bench_$name.log"
  collect
done

echo
cat "$out/gpu-summary.txt"
[[ -s $out/gpu.json ]] && ! grep -q FAIL "$out/gpu-summary.txt"
