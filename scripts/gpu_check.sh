#!/usr/bin/env bash
# Builds quantkern in place on a CUDA machine, tests it, benchmarks it and looks for memory errors and races.
#
#   scripts/gpu_check.sh OUT [STAGE...]        all stages without a name; say "build tests", "sanitize", "bench"
#
#   build     compiles the extension in place, for this machine's GPU alone unless TORCH_CUDA_ARCH_LIST says otherwise
#   tests     what needs the GPU (CUDA kernels, Triton, training steps, every operation on both), then the whole suite
#   sanitize  compute-sanitizer's memcheck and racecheck on the smallest cases
#   bench     benchmarks.fakequant, lsq, bnn and train_step with --device cuda
#
# Needs no network: torch (a CUDA build), its nvcc, ninja, pytest and hypothesis must be there. Each stage fits in ten
# minutes with the build, which comes first where it is out of date. OUT gets logs, results and summary-STAGES.txt, at
# most eight files from "build tests", from "sanitize" and from "bench". The summary has a line for every part as soon
# as it ends; a part that fails or takes too long does not keep the others from running. PYTEST_ADDOPTS (say
# "-k smallest") narrows the tests.
set -u
usage="usage: $0 OUT [build] [tests] [sanitize] [bench] (OUT: a folder for the results; no stage: all of them)"
[ $# -ge 1 ] || { echo "$usage" >&2 && exit 2; }
folder=$1
shift
stages=("$@")
[ $# -gt 0 ] || stages=(build tests sanitize bench)
for stage in "${stages[@]}"; do
  case $stage in
    build | tests | sanitize | bench) ;;
    *) echo "no stage '$stage'; $usage" >&2 && exit 2 ;;
  esac
done
mkdir -p "$folder" || exit 2
out=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.." || exit 2

summary="$out/summary-$(IFS=- && echo "${stages[*]}").txt"
readonly summary stage_seconds=570 build_seconds=260 log_bytes=4000000
failed=0
end=0
logs=()
: >"$summary"

# part NAME LOG SHARE COMMAND...: runs the command for the SHARE-th part of the time that its stage has left, so that
# what one part leaves over is there for the next. It is asked to stop first: pytest then reports what it has found.
part() {
  local name=$1 log="$out/$2.log" limit=$(((end - SECONDS) / $3)) started=$SECONDS status verdict
  shift 3
  [ "$limit" -gt 20 ] || limit=20
  case " ${logs[*]-} " in
    *" $log "*) ;;
    *) : >"$log" && logs+=("$log") ;;
  esac
  echo "== $name: $*" >>"$log"
  timeout -s INT -k 10 $((limit - 10)) "$@" >>"$log" 2>&1
  status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="FAILED: not done after $limit s" failed=1 ;;
    *) verdict="FAILED: exit status $status" failed=1 ;;
  esac
  if [ "$(stat -c %s "$log")" -gt $log_bytes ]; then
    tail -c $log_bytes "$log" >"$log.tail" && mv "$log.tail" "$log"
  fi
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - started)) "$verdict" | tee -a "$summary"
}

machine() {
  git log -1 --format='commit %H' 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  nvcc --version | tail -n 2
  python3 -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
}

build() {
  end=$((SECONDS + build_seconds))
  part build build 1 python3 setup.py build_py build_ext --inplace
}

tests() {
  local device="tests/test_cuda_device.py tests/test_cuda_training.py"
  device+=" tests/test_triton*.py"
  # shellcheck disable=SC2086
  {
    part device device 3 $pytest $device
    part operations operations 2 $pytest tests/test_ops.py -k cuda
    part suite suite 1 $pytest $(printf -- '--ignore=%s ' $device)
  }
}

bench() {
  local left=4 name
  for name in train_step bnn lsq fakequant; do  # the one with the most cases gets what the others leave
    part "$name" benchmarks $left python3 -m "benchmarks.$name" --device cuda --seconds 0.5 --json "$out/$name.json"
    left=$((left - 1))
  done
}

sanitize() {
  # Every allocation by itself, so that the checker sees where each one ends.
  local checker="env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9"
  local small="python3 -m pytest -v -p no:cacheprovider tests/test_cuda_device.py -k smallest"
  # shellcheck disable=SC2086
  {
    part memcheck memcheck 2 $checker --tool memcheck $small
    part racecheck racecheck 1 $checker --tool racecheck $small
  }
}

# A test that hangs says where after two minutes. The machine has more cores than the tests have GPU work.
pytest="python3 -m pytest -v -ra -o faulthandler_timeout=120"
pytest+=" $(python3 -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)"
own_arch=$(python3 -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))' 2>/dev/null)
export PYTHONUNBUFFERED=1 QUANTKERN_CUDA=1
[ -z "$own_arch" ] || export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$own_arch}

if ! machine >>"$summary" 2>&1; then
  failed=1
  echo "machine FAILED: torch finds no CUDA device, so whatever needs one is skipped" >>"$summary"
fi
cat "$summary"
started=$SECONDS
build
for stage in "${stages[@]}"; do
  [ "$stage" != build ] || continue
  # What the build has not used belongs to the first stage.
  end=$((started + stage_seconds - 15))
  "$stage"
  started=$SECONDS
done

for log in "${logs[@]}"; do
  printf '\n== %s\n' "$log"
  tail -n 8 "$log"
done
echo
cat "$summary"
exit $failed
