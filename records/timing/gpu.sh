#!/usr/bin/env bash
# records/timing/gpu.sh [FOLDER]     nine minutes at most on a GPU that nobody has measured yet
#
# In order: machine, tests of records/test_gpu.py, compare.py for imagenet256 (batch 256 and 32) and
# cifar10 with attention of cuDNN (A) against flash attention (B), parts of a step beside
# preflight.py's model with the longest kernels, and cifar10 for the rest of the time, validated.
# FOLDER (records/timing/<date>_<GPU>) gets a text file of each step, and summary.txt. A step that
# fails or takes too long is noted there, and the next one begins. The same command once more does
# the steps that are not done: compiled kernels are kept, so that they take less time then.
# PYTHON names another interpreter than .venv/bin/python.
set -uo pipefail

BUDGET=525                             # seconds, so that the last step ends in nine minutes
reserved=90                            # of them for the last step
LEAST=20                               # with fewer left no step is begun

fail() { echo "gpu.sh: $*" >&2; exit 2; }

[ $# -le 1 ] || fail "give one folder, or none"
out=${1:+$(realpath -m -- "$1")}
root=$(realpath -- "$(dirname "$0")/../..")
python=${PYTHON:-$root/.venv/bin/python}
[[ $python != */* ]] || python=$(realpath -s -- "$python")
cd "$root" || exit
ask='import torch; print(torch.cuda.is_available() and torch.cuda.get_device_name() or "")'
gpu=$("$python" -c "$ask" 2> /dev/null) ||
  fail "$python has no torch: ./run.sh makes .venv, or name an interpreter in PYTHON"
[ -n "$gpu" ] || fail "$python sees no GPU to be measured; records/preflight.py needs none"
[ -n "$out" ] || out=$root/records/timing/$(date +%F)_${gpu//[^A-Za-z0-9]/_}
mkdir -p "$out" || fail "cannot make $out: name another folder"
summary=$out/summary.txt
echo "$(date -u '+%F %T') on $gpu" | tee -a "$summary"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

not_done=0

# -- the steps: functions that run under a limit -----------------------------------------------

# step NAME SECONDS COMMAND ...   its output is NAME.txt; not again where it was done before
step() {
  local name=$1 limit=$2 began=$SECONDS left=$((BUDGET - reserved - SECONDS)) status=0 ending
  shift 2
  grep -q "^$name: done" "$summary" && return
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt "$LEAST" ]; then
    ending="not begun, $left s were left"
  else
    timeout --kill-after=5 "$limit" bash -c '"$@"' - "$@" > "$out/$name.txt" 2>&1 || status=$?
    case $status in
      0) ending="done" ;;
      124|137) ending="stopped after $limit s" ;;
      *) ending="failed with exit code $status" ;;
    esac
  fi
  [ "$ending" = "done" ] || not_done=$((not_done + 1))
  echo "$name: $ending, $((SECONDS - began)) s" | tee -a "$summary"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
  "$python" -c 'import torch as t; print("torch", t.__version__, "cuDNN", t.backends.cudnn.version())'
  echo "$(nproc) processors; commit $(git rev-parse HEAD 2> /dev/null || echo unknown)"
}

# Both halves at once, since nothing in them is timed: the memory of each config, and the numbers
tests() {
  export SPEEDRUN_TEST_GPU=1
  local command=("$python" -m pytest -v -rs --durations=0 -p no:cacheprovider records/test_gpu.py)
  local status=0
  "${command[@]}" -k fits > "$out/tests_of_memory.txt" 2>&1 &
  "${command[@]}" -k "not fits" || status=$?
  wait $! || status=$?
  return $status
}

# compare CONFIG STEPS CHANGE ...
compare() {
  local config=$1 steps=$2
  shift 2
  cd "$work" || return
  "$python" "$root/records/compare.py" cudnn.py flash.py --noise --rounds 1 \
    --config "$config" --steps "$steps" --set "$@"
}

train() {
  [ -e data/cifar10/manifest.json ] || "$python" data/download.py cifar10 || return
  "$python" - cifar10 "$1" <<'PY'
import sys
from dataclasses import replace
import train_speedrun as ts
steps = int(sys.argv.pop())
ts.CONFIGS["cifar10"] = replace(ts.CONFIGS["cifar10"], steps=steps, evals=4)
sys.exit(ts.main())
PY
}

export -f machine tests compare train
export python root out work

# -- what is done, in order -----------------------------------------------------------------------

others=(cudnn flash mem_efficient math)
for kernel in cudnn flash; do          # the main script, with one kind of attention allowed
  script=$work/$kernel.py
  cp train_speedrun.py "$script"
  for other in "${others[@]}"; do
    [ "$other" = $kernel ] || echo "torch.backends.cuda.enable_${other}_sdp(False)" >> "$script"
  done
done
card=H100
[[ $gpu != *H200* ]] || card=H200
model=records/timing/preflight

step machine 30 machine
step tests 200 tests
step imagenet256_256 180 compare imagenet256 50 dense_tail=0.0
step imagenet256_32 150 compare imagenet256 100 dense_tail=0.0 batch_size=32
step cifar10 120 compare cifar10 100 "batch_size=256"
step kernels_imagenet256 80 "$python" records/kernels.py train_speedrun.py --set dense_tail=0.0 \
  --model "$model/imagenet256_1x256_$card.txt"
step kernels_cifar10 60 "$python" records/kernels.py train_speedrun.py --config cifar10 \
  --model "$model/cifar10_1x256_$card.txt"

# As many steps as the rest of the time takes, with 45 s for start, compilation and validation
reserved=0
ms='s/^round .*: \([0-9]*\)\.[0-9]* ms\/step$/\1/p'
slowest=$(sed -n "$ms" "$out/cifar10.txt" 2> /dev/null | sort -n | tail -n 1)
steps=$(((BUDGET - SECONDS - 45) * 1000 / (${slowest:-60} + 1) / 50 * 50))
step train $((BUDGET - SECONDS)) train $((steps > 100 ? steps : 100))

size=$(du -sk "$out" | cut -f 1)
echo "$SECONDS s; $size KiB in ${out#"$root"/}; steps not done: $not_done" | tee -a "$summary"
[ $not_done = 0 ] || { echo "gpu.sh: the same command does them: $0 $out" >&2; exit 1; }
