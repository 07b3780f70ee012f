#!/usr/bin/env bash
# ./run.sh [CONFIG]        environment, data, training, evaluation of one of the script's CONFIGS
# ./run.sh test [smoke]    environment, all tests, or only those of test_smoke.py
#
# Without a GPU the default is cifar10-cpu. cifar10 and folder take one GPU, imagenet256 and 512 as
# many of them as divide its batch; GPUS=4 asks for another number. The environment is .venv, or the
# interpreter named in PYTHON; neither is touched when requirements.txt is met already. SEED and
# RESUME reach the training script. imagenet256 and imagenet512 want ImageNet's photos, a folder of
# class folders, in IMAGES: they train on DINOv2's features of them, too. folder wants any photos
# there; CAPTIONS may name a file of their captions.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "run.sh: $*" >&2; exit 2; }

what=${1:-default}
configs=$(sed -n 's/^ *"\([^"]*\)": Config(.*/\1/p; s/^CONFIGS\["\([^"]*\)"\] = .*/\1/p' \
  train_speedrun.py | paste -sd ' ')
case "$*" in
  ""|test|"test smoke") ;;
  *) [[ $# = 1 && " $configs " = *" $what "* ]] ||
       fail "unknown config '$*': choose one of $configs, or test [smoke]" ;;
esac

# -- environment ------------------------------------------------------------------------------
if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
else
  python=.venv/bin/python
  if ! [ -x $python ]; then
    base=
    for candidate in python3 python3.13 python3.12 python3.11; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
        base=$candidate
        break
      fi
    done
    [ -n "$base" ] || fail "no Python 3.11 or newer: install one, or name it in PYTHON"
    rm -rf .venv
    "$base" -m venv .venv > .venv.log 2>&1 ||
      fail "cannot make .venv (see .venv.log): on Debian, apt install python3-venv"
  fi
fi
requirements_met() {
  "$python" - <<'PY' 2> /dev/null
import importlib.metadata as metadata
from packaging.requirements import Requirement
for line in map(Requirement, filter(None, open("requirements.txt").read().splitlines())):
    assert metadata.version(line.name) in line.specifier
PY
}
if ! requirements_met; then
  echo "installing requirements.txt into $python (some minutes the first time)"
  "$python" -m pip install -q -r requirements.txt > .venv.log 2>&1 ||
    fail "pip could not install requirements.txt (see .venv.log): check network and disk (6 GB)"
fi
export TORCHINDUCTOR_VEC_ISA_OK=1  # saves compilation on a CPU its trials of the C++ compiler

if [ "$what" = test ]; then
  [ -z "${2:-}" ] || exec "$python" -m pytest -q test_smoke.py
  status=0
  SPEEDRUN_TEST_GPU=1 "$python" -m pytest -q -rs records/test_gpu.py || status=$?
  output=$(mktemp)                     # two halves at a time: most tests use one thread
  "$python" -m pytest -q data > "$output" 2>&1 &
  half=$!
  trap 'kill $half 2> /dev/null || true; rm -f "$output"' EXIT
  "$python" -m pytest -q test_smoke.py records --ignore=records/test_gpu.py || status=$?
  wait $half || status=$?
  cat "$output"
  exit $status
fi

# -- data, training, evaluation -----------------------------------------------------------------
# The number of processes, the config and its track, as the training script has them
facts=$("$python" - "$what" "${GPUS:-}" <<'PY'
import math
import sys
import torch
from train_speedrun import CONFIGS, TRACKS
gpus, name, asked = torch.cuda.device_count(), *sys.argv[1:]
if name == "default":
    name = "cifar10" if gpus else "cifar10-cpu"
cfg = CONFIGS[name]
shared = math.gcd(cfg.batch_size, TRACKS[cfg.track].val_images)  # each process gets as much
fitting = [count for count in range(1, gpus + 1) if shared % count == 0]
most = gpus if cfg.track.startswith("imagenet") else 1
if asked and asked not in map(str, fitting):
    why = f"of the {gpus} GPUs here as many can share batch and validation images: {fitting}"
    print(f"run.sh: GPUS={asked} does not fit: {why}", file=sys.stderr)
    sys.exit(2)
print(asked or max([1, *(count for count in fitting if count <= most)]), name, cfg.track)
PY
)
read -r processes what track <<< "$facts"
echo "$what, processes: $processes"
if [ "$processes" -gt 1 ]; then
  launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$processes")
else
  launch=("$python")                   # one process needs no launcher
fi

started=$SECONDS
if [[ "$track" != imagenet* && "$track" != folder ]]; then
  "$python" data/download.py "$track"
elif [ -n "${IMAGES:-}" ] && [ "$track" = folder ]; then
  "$python" data/download.py folder --images "$IMAGES" ${CAPTIONS:+--captions "$CAPTIONS"}
elif [ -n "${IMAGES:-}" ]; then
  "${launch[@]}" data/download.py "$track" --images "$IMAGES" --features
elif ! [ -e "data/$track/manifest.json" ]; then
  [ "$track" != folder ] || fail "folder trains on your photos: name their folder in IMAGES"
  fail "$track trains on DINOv2's features, too: name the folder of ImageNet's photos in" \
    "IMAGES; or set reg = 0, repa_layers = () and run: python data/download.py $track"
fi
echo "data: $((SECONDS - started)) s"

started=$SECONDS
mkdir -p logs
output=$(mktemp)
trap 'rm -f "$output"' EXIT
"${launch[@]}" train_speedrun.py "$what" | tee "$output"
run=logs/$(sed -n 's/^run_id: //p' "$output")
echo "training, with warm-up and validation: $((SECONDS - started)) s"

started=$SECONDS
"${launch[@]}" eval_speedrun.py "$run"
echo "evaluation: $((SECONDS - started)) s"
