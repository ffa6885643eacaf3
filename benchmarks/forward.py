"""How fast the forward process is, beside what else one could write, on this machine, in one run.

    python benchmarks/forward.py [--device cuda] [--seconds 4] [--largest 256] [--markdown FILE]

All contenders take the same uint8 images and return x_t, epsilon and t. They are timed in turn, again and again, so
that whatever else the machine does falls on all alike; a table gives medians. What was timed is checked first.

On a GPU three times tell: the device's alone, of calls that queue up behind a wait; the host's alone, of the same; and
that of a call that is waited for, which no training loop does.
"""

import argparse
import functools
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import diffaug
from diffaug import ForwardProcess, LinearBeta

SCHEDULE = LinearBeta()
Contender = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def by_hand(device: torch.device) -> Contender:
    """What most training loops hold."""
    alpha_bars = SCHEDULE.alpha_bars.float().to(device)
    signal, noise = alpha_bars.sqrt(), (1 - alpha_bars).sqrt()

    def run(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_0 = x.float() / 127.5 - 1
        epsilon = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x),), device=x.device)
        shape = (-1, *(1,) * (x.ndim - 1))
        return signal[t].view(shape) * x_0 + noise[t].view(shape) * epsilon, epsilon, t

    return run


def diffusers_way() -> Contender | None:
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        return None
    scheduler: Any = DDPMScheduler()

    def run(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_0 = x.float() / 127.5 - 1
        epsilon = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x),), device=x.device)
        return scheduler.add_noise(x_0, epsilon, t), epsilon, t

    return run


def floor(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bytes alone: read the image once, write two float32 of its size."""
    x_t = x.float()
    return x_t, torch.zeros_like(x_t), index


def ours(compile: bool, dtype: torch.dtype) -> Contender:
    return ForwardProcess(SCHEDULE, compile=compile, dtype=dtype)


def checked(run: Contender, x: Tensor, index: Tensor, dtype: torch.dtype) -> None:
    """Refuse to time what is wrong: the mix must be the closed form, the noise standard normal."""
    x_t, epsilon, t = run(x, index)
    alpha, sigma = (c.view(-1, *(1,) * (x.ndim - 1)) for c in SCHEDULE.alpha_sigma(t.cpu()))
    expected = alpha.to(x.device) * (x.float() / 127.5 - 1) + sigma.to(x.device) * epsilon.float()
    assert (x_t.float() - expected).abs().max() < (2e-5 if dtype == torch.float32 else 0.1)
    n = epsilon.numel()
    assert abs(epsilon.double().mean()) < 6 / n**0.5 + 1e-3
    assert abs(epsilon.double().var() - 1) < 9 / n**0.5 + 1e-2


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(
    contenders: dict[str, Contender], x: Tensor, index: Tensor, seconds: float, turn: float = 0.03
) -> dict[str, tuple[float, float]]:
    """Median seconds of each contender's call: in a row, and the first after another's.

    They take turns of 30 ms or of three calls, whichever is longer.
    """
    in_a_row: dict[str, list[float]] = {name: [] for name in contenders}
    first: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(first["the bytes alone"]) < 3:
        for name, run in contenders.items():
            over = time.perf_counter() + turn
            calls = 0
            while calls < 4 or time.perf_counter() < over:
                synchronise(x.device)
                start = time.perf_counter()
                run(x, index)
                synchronise(x.device)
                (in_a_row if calls else first)[name].append(time.perf_counter() - start)
                calls += 1
    return {name: (statistics.median(in_a_row[name]), statistics.median(first[name])) for name in contenders}


def queued(call: Callable[[], object], calls: int = 10, wait: float = 0.03) -> tuple[float, float]:
    """Seconds a call takes the GPU, and seconds it takes the host to ask for it.

    The calls queue up behind a kernel that does nothing for some 30 ms, so that neither side waits for the other.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(wait * 1.8e9))  # its unit is a cycle
    begin.record()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls, host / calls


def timed_on_gpu(
    contenders: dict[str, Contender], x: Tensor, index: Tensor, seconds: float
) -> dict[str, tuple[float, float, float]]:
    """Median seconds of each contender's call: the device's, the host's, and those until a call has been waited for."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found["the bytes alone"]) < 3:
        for name, run in contenders.items():
            device, host = queued(functools.partial(run, x, index))
            start = time.perf_counter()
            run(x, index)
            torch.cuda.synchronize()
            found[name].append((device, host, time.perf_counter() - start))
    columns = {name: zip(*rows, strict=True) for name, rows in found.items()}
    return {name: tuple(statistics.median(column) for column in some) for name, some in columns.items()}  # type: ignore[misc]


def copy_speed(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 1 GB within the device: what nothing is faster than."""
    there = torch.empty(2**30, dtype=torch.uint8, device=device)
    here = torch.empty_like(there)
    return 2 * there.numel() / statistics.median(queued(lambda: here.copy_(there))[0] for _ in range(5))


def peak_memory(run: Contender, x: Tensor, index: Tensor) -> float:
    """Peak memory of a call over that of its input and output, on CUDA."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(x, index)
    torch.cuda.synchronize()
    bytes_out = sum(o.numel() * o.element_size() for o in out)
    bytes_in = x.numel() * x.element_size()
    return (torch.cuda.max_memory_allocated() - before + bytes_in) / (bytes_in + bytes_out)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpu = platform.processor() or "CPU"
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    return f"{cpu}, {torch.get_num_threads()} threads"


class Case(NamedTuple):
    """What one table times; `first` holds the seconds of each contender's first call."""

    contenders: dict[str, Contender]
    x: Tensor
    index: Tensor
    first: dict[str, float]
    dtype: torch.dtype


def cpu_table(case: Case, seconds: float) -> Iterator[str]:
    contenders, x, index, first, _ = case
    base = "diffusers add_noise" if "diffusers add_noise" in contenders else "by hand"
    median = timed(contenders, x, index, seconds)
    yield f"| | ns an element | {base} / it | after other work: ns | {base} / it | first call, s |"
    yield "|---|---|---|---|---|---|"
    for name, (row, alone) in median.items():
        cells = (
            f"{row / x.numel() * 1e9:.2f} | {median[base][0] / row:.2f}",
            f"{alone / x.numel() * 1e9:.2f} | {median[base][1] / alone:.2f}",
            f"{first[name]:.2f}",
        )
        yield f"| {name} | {' | '.join(cells)} |"


def gpu_table(case: Case, seconds: float) -> Iterator[str]:
    contenders, x, index, first, dtype = case
    base = "diffusers add_noise" if "diffusers add_noise" in contenders else "by hand"
    copy = copy_speed(x.device)
    median = timed_on_gpu(contenders, x, index, seconds)
    yield (
        f"| | device, us | {base} / it | share of copy speed | host, us | {base} / it | waited for, us | first call, s "
        "| peak memory / (in + out) |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, (device, host, waited) in median.items():
        width = dtype.itemsize if name.startswith("diffaug") else 4
        share = x.numel() * (1 + 2 * width) / device / copy
        cells = (
            f"{device * 1e6:.1f} | {median[base][0] / device:.2f} | {share:.0%}",
            f"{host * 1e6:.0f} | {median[base][1] / host:.2f} | {waited * 1e6:.0f}",
            f"{first[name]:.2f} | {peak_memory(contenders[name], x, index):.2f}",
        )
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on each table row")
    parser.add_argument("--largest", type=int, default=512, help="side of the largest images")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    options = parser.parse_args()
    device = torch.device(options.device)
    lines: list[str] = []
    say = functools.partial(_say, lines)

    say(f"{machine(device)}; torch {torch.__version__}; diffaug {diffaug.__version__}; {time.strftime('%Y-%m-%d')}")
    shapes = [(128, 3, 32, 32), (64, 3, 64, 64), (64, 3, 256, 256)]
    if device.type == "cuda":
        shapes += [(256, 3, 256, 256), (256, 3, 512, 512)]
    shapes = [shape for shape in shapes if shape[-1] <= options.largest]
    sides = [side for side in (32, 64, 128, 256) if side <= options.largest]
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        contenders: dict[str, Contender] = {
            "diffaug compiled": ours(True, dtype),
            "diffaug eager": ours(False, dtype),
            "by hand": by_hand(device),
            "the bytes alone": floor,
        }
        peer = diffusers_way()
        if peer is not None:
            contenders["diffusers add_noise"] = peer
        for shape in shapes:
            x = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            index = torch.arange(shape[0])  # on the host, where a loader's are
            first = {}
            for name, run in contenders.items():
                start = time.perf_counter()
                run(x, index)
                synchronise(device)
                first[name] = time.perf_counter() - start
                if name != "the bytes alone":
                    checked(run, x, index, dtype)
            say(f"\n{shape} uint8 -> {str(dtype).removeprefix('torch.')}\n")
            table = gpu_table if device.type == "cuda" else cpu_table
            for line in table(Case(contenders, x, index, first, dtype), options.seconds):
                say(line)
    say(f"\nGrowth: diffaug compiled, {'us of the device a call' if device.type == 'cuda' else 'ns an element'}\n")
    say(f"| batch | {' | '.join(f'3x{side}x{side}' for side in sides)} |\n" + "|---" * (len(sides) + 1) + "|")
    process = ours(True, torch.float32)
    for batch in (1, 4, 16, 64, 256):
        cells = []
        for side in sides:
            x = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
            some: dict[str, Contender] = {"ours": process, "the bytes alone": floor}
            if device.type == "cuda":
                process(x, torch.arange(batch))
                cells.append(f"{timed_on_gpu(some, x, torch.arange(batch), 0.1)['ours'][0] * 1e6:.1f}")
            else:
                cells.append(f"{timed(some, x, torch.arange(batch), 0.5)['ours'][0] / x.numel() * 1e9:.2f}")
        say(f"| {batch} | {' | '.join(cells)} |")
    say(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


def _say(lines: list[str], line: str) -> None:
    print(line, flush=True)
    lines.append(line)


if __name__ == "__main__":
    main()
