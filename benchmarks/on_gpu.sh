#!/usr/bin/env bash
# Everything that wants a GPU, in about ten minutes: the tests, the forward process beside diffusers and the copy
# bandwidth, CPU against CUDA, a trace of three training steps, and what was predicted, to hold beside it.
#
#     benchmarks/on_gpu.sh OUT          # writes OUT/*.txt, OUT/forward.md, OUT/predicted.md, OUT/trace.json
#     DEVICE=cpu benchmarks/on_gpu.sh OUT                     # tries the script itself, where there is no GPU
#
# It was written without a GPU and has not run on one. Write docs/benchmarks.md from what it leaves.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?where to write}
python=${PYTHON:-python} device=${DEVICE:-cuda}
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
status=0
run() { # name, seconds at most, command: its output goes to OUT/name.txt
    local name=$1 seconds=$2
    shift 2
    timeout "$seconds" "$@" >"$out/$name.txt" 2>&1 || { status=1; echo "FAILED: $name, see $out/$name.txt"; }
}
if [ "$device" = cuda ]; then
    nvidia-smi >"$out/device.txt" 2>&1 || { echo "no CUDA device here"; exit 1; }
    run tests 120 "$python" -m pytest -q --device cuda -m gpu
fi
run forward 200 "$python" benchmarks/forward.py --device "$device" --seconds 2 --markdown "$out/forward.md"
run agree 120 "$python" benchmarks/agree.py --device "$device"
run trace 100 "$python" benchmarks/trace.py "$out/trace.json"
run predicted 180 "$python" benchmarks/predict.py --markdown "$out/predicted.md" --beside "$device"
if [ "$device" = cuda ] && [ "$(nvidia-smi -L | wc -l)" -ge 2 ]; then
    for strategy in ddp fsdp; do
        run "$strategy" 60 "$python" train.py trainer="$strategy" trainer.devices=2 trainer.max_steps=5 hydra.run.dir="$out/$strategy"
    done
fi
exit $status
