#!/usr/bin/env bash
# All that is claimed of a GPU, run on one machine in less than nine minutes:
#
#   bash benchmarks/gpu.sh OUT.json [MANIFEST.csv]
#
# Tests marked gpu, the push, fine-tuning beside the black box, explanations, predictions, the service. Each part has a
# limit of its own; one that fails or runs out of time is recorded so, with its last line, and the others go on. OUT.json
# is written after each part. Without a manifest the images are drawn. No weights are loaded: those of models are random,
# on which no speed depends. Nothing is downloaded. Needs `pip install -e '.[app]' pytest` and a torch built for CUDA.
#
#   PYTHON=...   the interpreter (default: python3)
#   DEVICE=cpu   everything on a CPU (default: cuda)
#   QUICK=1      tiny sizes: proves that each part runs, and measures nothing
set -eu

usage="expected: bash benchmarks/gpu.sh OUT.json [MANIFEST.csv]"
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "gpu.sh: $# arguments; $usage" >&2
  exit 2
fi
case $1 in *.json) ;; *) echo "gpu.sh: $1 is no name of a JSON file; $usage" >&2; exit 2 ;; esac
mkdir -p "$(dirname "$1")"
OUT=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
DATA=${2:+$(cd "$(dirname "$2")" && pwd)/$(basename "$2")}
if [ -n "$DATA" ] && [ ! -f "$DATA" ]; then
  echo "gpu.sh: there is no file $DATA; expected a manifest (CSV image,label,split)" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-}
BUDGET=530 # seconds; what is written at the end takes a few more
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PROTOPUSH_TEST_DEVICE=$DEVICE PROTOPUSH_CACHE=$WORK/cache
export PYTHONUNBUFFERED=1 QUICK OUT WORK

if ! "$PYTHON" benchmarks/gpu_record.py --begin; then exit 2; fi

# part NAME LIMIT COMMAND...: runs a part; its figures are in $WORK/NAME.json, if it writes any
part() {
  name=$1 limit=$2
  shift 2
  left=$((BUDGET - SECONDS))
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  printf '%s\n' "$*" >"$WORK/$name.command"
  started=$(date +%s.%N) code=
  if [ "$limit" -ge 5 ]; then
    echo "$name (at most $limit s)"
    code=0
    timeout -k 5 "$limit" "$@" >"$WORK/$name.log" 2>&1 || code=$?
  fi
  echo "$started $(date +%s.%N) $code" >"$WORK/$name.times"
  echo "$name" >>"$WORK/order"
  "$PYTHON" benchmarks/gpu_record.py
}

if [ -n "$QUICK" ]; then
  only="not compiled and not two"
  push="--images 4 --pixels 64 --maps 40 --few 4 --many 8 --rank-images 4 --windowed 4 --repetitions 1"
  memory=$push
  live="--backbones test_resnet --batch 2 --pixels 96 --repetitions 1"
  explain="--batch 2 --pixels 96 --repetitions 1"
  serve="--requests 32 --repetitions 1"
  predict="--images 16 --repetitions 1 --workers 0"
  tuned="--backbone test_resnet --image-size 96 --batch-size 8 --workers 0 --throughput 1"
  trained="--model.backbone test_resnet --model.image_size 96 --train.epochs 1 --data.num_workers 0"
  images=60
else
  workers=$(($(nproc) - 1))
  only="" push="" memory="--few 1000 --many 10000 --repetitions 2" live="" explain="" serve="--requests 512" images=1500
  predict="--images 600 --workers $workers"
  tuned="--workers $workers --throughput 3"
  trained="--train.epochs 3 --data.num_workers $workers"
fi

if [ -z "$DATA" ]; then
  DATA=$WORK/images/manifest.csv
  part images 60 "$PYTHON" -c "
from pathlib import Path
from protopush.testing import ProceduralParts
ProceduralParts($images, size=(224, 224)).write(Path('$WORK/images'))"
fi
# The options of a part are words without blanks.
# shellcheck disable=SC2086
{
  part tests 170 "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider -m gpu -k "$only" tests/gpu tests/push
  part push 80 "$PYTHON" benchmarks/push_speed.py --device "$DEVICE" --cases a b d e $push --out "$WORK/push.json"
  part push-live 30 "$PYTHON" benchmarks/push_speed.py --device "$DEVICE" --cases f $push --out "$WORK/push-live.json"
  part fine-tuning 60 "$PYTHON" benchmarks/accuracy.py "$DATA" --arms $tuned --out "$WORK/fine-tuning.json" \
    --set model.pretrained=false "trainer.device=$DEVICE"
  part fine-tuning-bf16 60 "$PYTHON" benchmarks/accuracy.py "$DATA" --arms $tuned --out "$WORK/fine-tuning-bf16.json" \
    --set model.pretrained=false "trainer.device=$DEVICE" trainer.precision=bf16-mixed
  part live 40 "$PYTHON" benchmarks/live_speed.py --device "$DEVICE" $live --out "$WORK/live.json"
  part explain 40 "$PYTHON" benchmarks/explain_speed.py --device "$DEVICE" $explain --out "$WORK/explain.json"
  part train 60 "$PYTHON" -m protopush train --data.path "$DATA" --out "$WORK/run" --trainer.device "$DEVICE" \
    --model.backbone tf_efficientnet_lite0 --model.pretrained false $trained
  part verify 30 "$PYTHON" -m protopush verify "$WORK/run" --local --device "$DEVICE"
  part serve 60 "$PYTHON" benchmarks/serve_speed.py "$WORK/run" "$DATA" --device "$DEVICE" $serve --out "$WORK/serve.json"
  part predict 40 "$PYTHON" benchmarks/predict_speed.py "$WORK/run" "$DATA" --device "$DEVICE" $predict \
    --out "$WORK/predict.json"
  part memory 60 "$PYTHON" benchmarks/push_speed.py --device "$DEVICE" --cases c $memory --out "$WORK/memory.json"
}
"$PYTHON" benchmarks/gpu_record.py --show
