#!/usr/bin/env bash
# ./run.sh [cifar10 | cifar10-cpu | imagenet256]   environment, data, training, evaluation
# ./run.sh test                                    environment, tests
#
# Without a GPU the default is cifar10-cpu. The environment is .venv, or the interpreter named in
# PYTHON; neither is touched when requirements.txt is met already. SEED and RESUME reach the
# training script. imagenet256 wants ImageNet's photos, a folder of class folders, in IMAGES: it
# trains on DINOv2's features of them, too.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "run.sh: $*" >&2; exit 2; }

what=${1:-default}
case $what in default|test|cifar10|cifar10-cpu|imagenet256) ;;
  *) fail "unknown track '$what': choose cifar10, cifar10-cpu, imagenet256 or test" ;;
esac
[ $# -le 1 ] || fail "one argument at most: a track, or test"

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

if [ "$what" = test ]; then
  exec "$python" -m pytest -q test_smoke.py
fi

# -- data, training, evaluation -----------------------------------------------------------------
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$what" = default ]; then
  if [ "$gpus" -gt 0 ]; then what=cifar10; else what=cifar10-cpu; fi
fi
if [ "$gpus" -gt 1 ]; then
  launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus")
else
  launch=("$python")                   # one process needs no launcher
fi

started=$SECONDS
if [ "$what" != imagenet256 ]; then
  "$python" data/download.py cifar10
elif [ -n "${IMAGES:-}" ]; then
  "${launch[@]}" data/download.py imagenet256 --images "$IMAGES" --features
elif ! [ -e data/imagenet256/manifest.json ]; then
  fail "imagenet256 trains on DINOv2's features, too: name the folder of ImageNet's photos in" \
    "IMAGES; or set reg = 0, repa_layers = () and run: python data/download.py imagenet256"
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
