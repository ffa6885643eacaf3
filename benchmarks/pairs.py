"""Pairs and times of parts through the compiled pass, beside the eager pass and one time a sample, in one run.

    python benchmarks/pairs.py [--device cuda] [--turns 50] [--markdown FILE]

All ways take turns; a table gives medians over the turns, and the median of the ratios within each turn. What is timed
is a whole call of ForwardProcess, and for the parts the pass alone as well.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from forward import machine, synchronise

import diffaug
from diffaug import ForwardProcess, LinearBeta, LogitNormal, Pair, Parts, Rectified
from diffaug.process import kernel
from diffaug.randomness.keys import Keys

CALLS = 3  # of each way in a turn, the first of which is not counted


def timed(ways: dict[str, Callable[[], object]], device: torch.device, turns: int) -> dict[str, list[float]]:
    """Seconds of a call of each way, a number a turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(turns):
        for name, run in ways.items():
            run()
            synchronise(device)
            start = time.perf_counter()
            for _ in range(CALLS - 1):
                run()
            synchronise(device)
            found[name].append((time.perf_counter() - start) / (CALLS - 1))
    return found


def table(found: dict[str, list[float]], base: str) -> list[str]:
    lines = [f"| | ms | time of {base} / it |", "|---|---|---|"]
    for name, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(found[base], seconds, strict=True))
        lines.append(f"| {name} | {statistics.median(seconds) * 1e3:.3f} | {ratio:.2f} |")
    return lines


def pairs(device: torch.device) -> dict[str, Callable[[], object]]:
    """x_t, epsilon and x_s, with t and s, of both laws."""
    x = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8, device=device)
    ways: dict[str, Callable[[], object]] = {}
    for law in ("same", "chain"):
        for compiled in (False, True):
            process = ForwardProcess(
                LinearBeta(), pair=Pair(noise=law), fields=("x_t", "epsilon", "t", "x_s", "s"), compile=compiled
            )
            name = f"{law} noise, {'compiled' if compiled else 'eager'}"
            ways[name] = functools.partial(process, x, torch.arange(64))
    ways["no pair, compiled"] = functools.partial(ForwardProcess(LinearBeta(), compile=True), x, torch.arange(64))
    return ways


def parts(device: torch.device) -> dict[str, Callable[[], object]]:
    """x_t and epsilon of clips, (B, C, F, H, W) or (B, F, C, H, W), each frame with a t of its own or all with one."""
    x, index = torch.randn(2, 16, 4, 32, 32, device=device), torch.arange(2)
    keys = Keys.pack(index).to(device)
    one = torch.rand(2, 2, 2, device=device)
    four, sixteen = (torch.rand(2, 2, 2, *planes, device=device) for planes in ((1, 4, 1, 1), (16, 1, 1, 1)))

    def alone(mix: torch.Tensor) -> object:
        return kernel.draw_and_mix(x, keys, mix, 0.0, torch.float32, compiled=True)

    schedule, times = Rectified(), LogitNormal()
    of_one, of_four, of_sixteen = (
        ForwardProcess(schedule, times, parts=some, compile=True) for some in (None, Parts(axis=2), Parts(axis=1))
    )
    return {
        "one time, the pass alone": functools.partial(alone, one),
        "a time for each of 4 frames, the pass alone": functools.partial(alone, four),
        "a time for each of 16 frames, the pass alone": functools.partial(alone, sixteen),
        "one time": functools.partial(of_one, x, index),
        "a time for each of 4 frames": functools.partial(of_four, x, index),
        "a time for each of 16 frames": functools.partial(of_sixteen, x, index),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    options = parser.parse_args()
    device = torch.device(options.device)
    lines = [
        f"{machine(device)}; torch {torch.__version__}; diffaug {diffaug.__version__}; {time.strftime('%Y-%m-%d')}"
    ]
    found = timed(pairs(device), device, options.turns)
    lines += ["", "Pairs, (64, 3, 64, 64) uint8", ""]
    lines += table({name: seconds for name, seconds in found.items() if "same" in name}, "same noise, eager")
    rest = {name: seconds for name, seconds in found.items() if "same" not in name}
    lines += ["", *table(rest, "chain noise, eager")]
    found = timed(parts(device), device, 4 * options.turns)
    lines += ["", "Parts, (2, 16, 4, 32, 32) float32", ""]
    lines += table({name: seconds for name, seconds in found.items() if "alone" in name}, "one time, the pass alone")
    lines += ["", *table({name: seconds for name, seconds in found.items() if "alone" not in name}, "one time")]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
