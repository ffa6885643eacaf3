"""report: numbers to look at before spending GPU time, of a schedule and of what a recipe trains on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.plots.curves import LEVEL_EDGES
from diffaug.process import ForwardProcess
from diffaug.process.chain import prior_kl
from diffaug.process.density import trained_on
from diffaug.schedules import Schedule
from diffaug.schedules.shifts import find_auto
from diffaug.targets import FusedSNR

_POINTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_NEARLY_NOISE = 1e-4
_ALONE = "          as if each frame were alone: what the frames before say is left out"


@dataclass(frozen=True)
class Facts:
    """What one line of the table of all schedules says.

    Attributes:
        times: T, or the range of a continuous t.
        log_snr: the log-SNR at the least and at the most noise.
        prior_kl: bits per dimension from x_T to its prior, for images of mean square 1/4 (as CIFAR-10's) and at most 1.
        crossing: unit time at which SNR is 1; None where it never is.
        noise_share: the share of unit time at which SNR is below 1e-4: nearly pure noise.
    """

    times: str
    log_snr: tuple[float, float]
    prior_kl: tuple[float, float]
    crossing: float | None
    noise_share: float


def facts(schedule: Schedule) -> Facts:
    """Collect the facts of a schedule."""
    low, high = schedule.ends
    ends = schedule.log_snr(torch.stack([low, high]), torch.float64).tolist()
    times = f"T = {schedule.timesteps}" if schedule.discrete else f"{low.item():g} .. {high.item():g}"
    grid = _grid(schedule)
    snr = schedule.log_snr(grid, torch.float64)
    unit = None
    if ends[0] >= 0 >= ends[1]:
        t = schedule.t_of_log_snr(torch.zeros(1, dtype=torch.float64))
        unit = float((t + 0.5) / schedule.timesteps if schedule.discrete else schedule.to_unit(t, torch.float64))
    kl = tuple(prior_kl(schedule, square) / math.log(2) for square in (0.25, 1.0))
    share = float((snr < math.log(_NEARLY_NOISE)).double().mean())
    return Facts(times, (ends[0], ends[1]), (kl[0], kl[1]), unit, share)


def _beside(process: ForwardProcess) -> list[str]:
    """Say what else a recipe draws its times by, and what of that the table shows."""
    lines = []
    if process.pair is not None:
        moved = "; the table is of the t that it makes, a curriculum being at its end"
        lines.append(f"  pair    {process.pair!r}{moved if process.pair.times.moves_t else ''}")
    if process.parts is not None:
        lines.append(f"  parts   {process.parts!r}; the table is of the parts that draw a t")
    return lines


def _grid(schedule: Schedule) -> Tensor:
    if schedule.discrete:
        return torch.arange(schedule.timesteps)
    return schedule.from_unit((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)


def table(schedules: Mapping[str, Schedule]) -> str:
    """Format all schedules, a line each."""
    head = ("schedule", "times", "scaling", "log-SNR", "SNR = 1 at", "SNR < 1e-4", "x_T to prior, bits/dim")
    rows: list[tuple[str, ...]] = [head]
    for name, schedule in schedules.items():
        f = facts(schedule)
        rows.append(
            (
                name,
                f.times,
                schedule.scaling.name,
                f"{f.log_snr[0]:.3g} .. {f.log_snr[1]:.3g}",
                "never" if f.crossing is None else f"u = {f.crossing:.3f}",
                f"{f.noise_share:.1%}",
                f"{f.prior_kl[0]:.3g} (at most {f.prior_kl[1]:.3g})",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def page(process: ForwardProcess) -> str:
    """Format one recipe in full: its schedule at several times, and what its times and weight train on."""
    schedule = process.schedule
    f = facts(schedule)
    unit = torch.tensor(_POINTS, dtype=torch.float64)
    times = schedule.from_unit(unit)
    alpha, sigma = schedule.alpha_sigma(times, torch.float64)
    log_snr = schedule.log_snr(times, torch.float64)
    auto = find_auto(schedule)
    said = f"  {auto}=auto is each batch's own; what follows is as without a batch ({auto}=N for one)"
    square = "alpha_bar" if schedule.discrete else "alpha^2"
    lines = [
        repr(schedule),
        *([said] if auto else []),
        f"  {'discrete' if schedule.discrete else 'continuous'}, {schedule.scaling}; {f.times}",
        "",
        f"  {'t':>10}  {square:>12}  {'alpha':>10}  {'sigma':>10}  {'log-SNR':>9}",
    ]
    for t, a, s, level in zip(times.tolist(), alpha.tolist(), sigma.tolist(), log_snr.tolist(), strict=True):
        lines.append(f"  {t:>10.6g}  {a * a:>12.6g}  {a:>10.6g}  {s:>10.6g}  {level:>9.4g}")
    t_one = schedule.t_of_log_snr(torch.zeros(1, dtype=torch.float64)).item()
    where = "never" if f.crossing is None else f"t = {t_one:.5g} (unit time {f.crossing:.3f})"
    count = f" ({round(f.noise_share * schedule.timesteps)} of {schedule.timesteps} steps)" if schedule.discrete else ""
    lines += [
        "",
        f"  SNR is 1 at        {where}",
        f"  nearly pure noise  {f.noise_share:.1%} of the times have SNR below 1e-4{count}",
        f"  terminal SNR       {math.exp(f.log_snr[1]):.4g}",
        f"  x_T to its prior   {f.prior_kl[0]:.4g} bits per dimension at mean square 1/4, at most {f.prior_kl[1]:.4g}",
        "",
        "What the recipe trains on",
        f"  times   {process.times!r}",
        *_beside(process),
        f"  noise   {process.noise!r}",
        f"  weight  {process.weight!r} on the loss of {process.target}",
        *([_ALONE] if isinstance(process.weight, FusedSNR) else []),
        "",
        f"  {'log-SNR':>12}  {'draws':>7}  {'of the weight':>13}",
    ]
    draws, weight = trained_on(process, torch.tensor(LEVEL_EDGES, dtype=torch.float64))
    for low, high, share, load in zip(LEVEL_EDGES, LEVEL_EDGES[1:], draws.tolist(), weight.tolist(), strict=False):
        lines.append(f"  {low:>4g} to {high:>4g}  {share:>7.1%}  {load:>13.1%}  {'#' * round(40 * load)}".rstrip())
    return "\n".join(lines)
