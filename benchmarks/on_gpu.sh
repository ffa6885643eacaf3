#!/usr/bin/env bash
# Everything that wants a GPU, in eight minutes at most: the tests, the forward process beside diffusers and the copy
# bandwidth, CPU against CUDA, a trace of training steps, and what was predicted, to hold beside it.
#
#     benchmarks/on_gpu.sh OUT          # writes OUT/*.txt, OUT/forward.md, OUT/predicted.md, OUT/trace.json
#     DEVICE=cpu benchmarks/on_gpu.sh OUT                     # tries the script itself, where there is no GPU
#
# First what only has to be right, side by side; then what is timed, alone. docs/benchmarks.md is written from what it
# leaves.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?where to write}"
out=$(cd "$1" && pwd)
python=${PYTHON:-python} device=${DEVICE:-cuda}
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
rm -f "$out/failed"
run() { # name, seconds at most, command: its output goes to OUT/name.txt
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$out/$name.txt" 2>&1 || echo "FAILED: $name, see $out/$name.txt" | tee -a "$out/failed"
    echo "$name: $((SECONDS - start)) s"
}
train() { # name, overrides: some steps by the real entry point
    run "train_$1" 100 "$python" train.py "${@:2}" ~callbacks.pictures ~callbacks.ema trainer.max_steps=8 hydra.run.dir="$out/$1"
}
if [ "$device" = cuda ]; then
    nvidia-smi >"$out/device.txt" 2>&1 || { echo "no CUDA device here"; exit 1; }
    run tests 240 "$python" -m pytest -q -rfE --device cuda -m gpu &
    train gpu trainer=gpu trainer.precision=bf16-mixed &
    train fsdp trainer=fsdp trainer.devices="$(nvidia-smi -L | wc -l)" &
    train ddp trainer=ddp trainer.devices="$(nvidia-smi -L | wc -l)" &
fi
run agree 240 "$python" benchmarks/agree.py --device "$device" &
run predicted 240 "$python" benchmarks/predict.py --markdown "$out/predicted.md" &
wait
run forward 200 "$python" benchmarks/forward.py --device "$device" --seconds 1 --markdown "$out/forward.md"
run trace 80 "$python" benchmarks/trace.py "$out/trace.json"
[ ! -e "$out/failed" ]
