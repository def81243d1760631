#!/usr/bin/env bash
# Builds quantkern in place on a CUDA machine, tests it, benchmarks it and looks for memory errors and races.
#
#   scripts/gpu_check.sh OUT
#
# Needs no network: torch (a CUDA build), its nvcc, ninja, pytest and hypothesis must be there. Every stage runs, also
# after one that failed, within nine minutes altogether. OUT receives at most eight files; the summary comes last.
set -u
if [ $# -ne 1 ]; then
  echo "usage: $0 OUT (a folder for the results)" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2

readonly log_bytes=4000000
failed=0
: >"$out/summary.txt"

# stage NAME END COMMAND...: runs the command until END seconds after the start of this script at the latest, so that
# time left over by one stage is there for the next; its output goes to OUT/NAME.log.
stage() {
  local name=$1 limit=$(($2 - SECONDS)) started=$SECONDS status verdict
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="FAILED: not done after $limit s" failed=1 ;;
    *) verdict="FAILED: exit status $status" failed=1 ;;
  esac
  if [ "$(stat -c %s "$out/$name.log")" -gt $log_bytes ]; then
    tail -c $log_bytes "$out/$name.log" >"$out/$name.tail" && mv "$out/$name.tail" "$out/$name.log"
  fi
  printf '%-10s %4d s  %s\n' "$name" $((SECONDS - started)) "$verdict" | tee -a "$out/summary.txt"
}

machine() {
  git log -1 --format='commit %H' 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  nvcc --version
  python3 -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
}
export -f machine

# pytest's own process count: the machine has more cores than the tests have GPU work.
workers=$(python3 -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
# Every allocation by itself, so that the checker sees where each one ends.
memory="env PYTORCH_NO_CUDA_MEMORY_CACHING=1"
small="python3 -m pytest -q -p no:cacheprovider tests/test_cuda_device.py -k smallest"

export PYTHONUNBUFFERED=1 QUANTKERN_CUDA=1
stage machine 15 bash -c machine
stage build 215 python3 setup.py build_py build_ext --inplace
# shellcheck disable=SC2086
{
  stage tests 345 python3 -m pytest -q -ra $workers
  stage memcheck 395 $memory compute-sanitizer --tool memcheck --error-exitcode 9 $small
  stage racecheck 445 $memory compute-sanitizer --tool racecheck --error-exitcode 9 $small
}
stage benchmark 525 python3 -m benchmarks.fakequant --device cuda --json "$out/fakequant.json"

echo
for name in build tests memcheck racecheck benchmark; do
  echo "== $name"
  tail -n 6 "$out/$name.log"
done
echo
cat "$out/summary.txt"
exit $failed
