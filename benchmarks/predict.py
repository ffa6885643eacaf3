"""What the pass should cost on GPUs that are not here: predicted from its machine code, measured on none.

    python benchmarks/predict.py [--markdown FILE] [--beside DEVICE]

Inductor writes its program for sm_80 and sm_90, ptxas compiles it, and the instructions of the path that every element
takes are counted (`machine_code`); the faster of the two configurations that would be tried is shown. "Share of memory
speed, at most" is the time of the bytes alone over that of the arithmetic where this is longer: a real kernel reaches
perhaps 75 to 90 % of either. Some two minutes on a quiet machine.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from fake_gpu import DEVICE, autotuner, fake_gpu, kernels, program
from forward import queued
from machine_code import Code, compile_kernel, picoseconds, read_code

from diffaug import ForwardProcess, LinearBeta
from diffaug.process import kernel
from diffaug.randomness.keys import Keys

BATCH, ELEMENTS = 256, 3 * 256 * 256
GPUS = {  # capability, multiprocessors, gigahertz under load, terabytes a second: the data sheets'
    "A100": (80, 108, 1.41, 2.04),
    "H100": (90, 132, 1.70, 3.35),
    "H200": (90, 132, 1.70, 4.80),
}


def compiled_pass(capability: int, dtype: torch.dtype) -> Code:
    """The best configuration of the pass for x_t and epsilon."""
    with fake_gpu(capability):
        x = torch.empty(BATCH, ELEMENTS, dtype=torch.uint8, device=DEVICE)
        keys = Keys(torch.empty(5, BATCH, dtype=torch.int64, device=DEVICE))
        table = torch.empty(1000, 2, 2, device=DEVICE)
        source = program(kernel.draw_times_and_mix, x, keys, table, 255.0, dtype)
        _, the_pass, *more = kernels(source).values()
        if more:  # torch 2.11 in bfloat16
            print(f"{dtype}: this torch makes {len(more)} kernel(s) more, which are not counted: memory is read again")
        tuner = autotuner(the_pass, Path(tempfile.mkdtemp()))
        found = [
            read_code(
                compile_kernel(tuner, choice, capability), 4 * max(1, choice.kwargs["XBLOCK"] // 32 // choice.num_warps)
            )
            for choice in tuner.configs
        ]
    return min(found, key=lambda code: code.per_element)


def measured_pass(device: torch.device, dtype: torch.dtype) -> float:
    """The milliseconds that one compiled pass for x_t and epsilon takes the device: the median of some turns."""
    process = ForwardProcess(LinearBeta(), compile=True, dtype=dtype)
    x = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8, device=device)
    index, times = torch.arange(BATCH), []
    for turn in range(10):
        start = time.perf_counter()
        process(x, index, epoch=turn)
        times.append(time.perf_counter() - start)
        if device.type == "cuda":
            times[-1], _ = queued(lambda: process(x, index))
    return statistics.median(times[3:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--beside", type=torch.device, metavar="DEVICE", help="measure the pass on a device, too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [
        f"Predicted, not measured; torch {torch.__version__}; ({BATCH}, {ELEMENTS}) uint8 in, x_t and epsilon out.",
        "",
        "| GPU | out | registers | stack | instructions an element | share of memory speed, at most | ms, at least |",
        "|---|---|---|---|---|---|---|",
    ]
    codes = {(c, d): compiled_pass(c, d) for c in (80, 90) for d in (torch.float32, torch.bfloat16)}
    for name, (capability, multiprocessors, gigahertz, terabytes) in GPUS.items():
        for dtype in (torch.float32, torch.bfloat16):
            code = codes[capability, dtype]
            memory = (1 + 2 * dtype.itemsize) / terabytes  # picoseconds an element
            time = max(memory, picoseconds(code, multiprocessors, gigahertz))
            cells = (name, str(dtype).removeprefix("torch."), code.registers, code.stack, f"{code.per_element:.0f}")
            lines.append(
                f"| {' | '.join(map(str, cells))} | {memory / time:.0%} | {time * BATCH * ELEMENTS / 1e9:.3f} |"
            )
    if options.beside:
        device = torch.cuda.get_device_name() if options.beside.type == "cuda" else str(options.beside)
        lines += [
            "",
            f"Measured on {device}, its time for a call: hold it beside that GPU's rows.",
        ]
        for dtype in (torch.float32, torch.bfloat16):
            lines.append(f"- {str(dtype).removeprefix('torch.')}: {measured_pass(options.beside, dtype):.3f} ms")
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
