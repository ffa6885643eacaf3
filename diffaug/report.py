"""Numbers to look at before spending GPU time: of a schedule, and of what a recipe trains on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.process import ForwardProcess
from diffaug.process.chain import prior_kl
from diffaug.schedules import Schedule
from diffaug.targets import converted

_POINTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_NEARLY_NOISE = 1e-4
_EDGES = (-math.inf, -8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0, math.inf)


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
    """The facts of a schedule."""
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


def _grid(schedule: Schedule) -> Tensor:
    if schedule.discrete:
        return torch.arange(schedule.timesteps)
    return schedule.from_unit((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)


def table(schedules: Mapping[str, Schedule]) -> str:
    """All schedules, a line each."""
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
    """One recipe in full: its schedule at several times, and what its times and weight train on."""
    schedule = process.schedule
    f = facts(schedule)
    unit = torch.tensor(_POINTS, dtype=torch.float64)
    times = schedule.from_unit(unit)
    alpha, sigma = schedule.alpha_sigma(times, torch.float64)
    log_snr = schedule.log_snr(times, torch.float64)
    square = "alpha_bar" if schedule.discrete else "alpha^2"
    lines = [
        repr(schedule),
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
        f"  noise   {process.noise!r}",
        f"  weight  {process.weight!r} on the loss of {process.target}",
        "",
        f"  {'log-SNR':>12}  {'draws':>7}  {'of the weight':>13}",
    ]
    draws, weight = trained_on(process, torch.tensor(_EDGES, dtype=torch.float64))
    for low, high, share, load in zip(_EDGES, _EDGES[1:], draws.tolist(), weight.tolist(), strict=False):
        lines.append(f"  {low:>4g} to {high:>4g}  {share:>7.1%}  {load:>13.1%}  {'#' * round(40 * load)}".rstrip())
    return "\n".join(lines)


def trained_on(process: ForwardProcess, edges: Tensor, resolution: int = 2**14) -> tuple[Tensor, Tensor]:
    """The shares of draws, and of draws times loss weight, in each bin of log-SNR: float64, shape (K,) each.

    Arguments:
        edges: of the bins, rising, shape (K + 1,).
        resolution: at how many quantiles of the times it is taken.
    """
    q = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution
    t = process.times.quantile(q, process.schedule)
    t = t if process.schedule.discrete else t.float()
    weight = process.weight.of(process.schedule, process.target, t, process.sigma_data).double()
    weight = weight * process.times.importance_weight(t, process.schedule)
    place = torch.searchsorted(edges, process.schedule.log_snr(t, torch.float64), right=True)
    length = len(edges) + 1
    draws = torch.bincount(place, minlength=length)[1:-1].double() / resolution
    load = torch.bincount(place, weights=weight, minlength=length)[1:-1]
    return draws, load / load.sum()


def density(process: ForwardProcess, edges: Tensor, loss: str = "F", resolution: int = 4096) -> tuple[Tensor, Tensor]:
    """As `trained_on`, but smooth, far into the tails, and with the weight stated on one and the same target's loss.

    So recipes of different targets compare: with x_t given, an error e in one target is an error b e in another, and a
    weight w on the first's squared error is w / b^2 on the second's. F is the target whose variance is 1 at every noise
    level where the images' is sigma_data^2 (Karras et al. 2022, section 5): on its loss, draws times weight is where
    the loss of a network that has learned nothing comes from. A timestep's share lies in its cell, from halfway to the
    level before to halfway to the level after, and passes over into its neighbours' smoothly. Levels without any signal
    or noise are in no bin.

    Arguments:
        edges: log-SNRs that rise, finite, shape (K + 1,).
        loss: the target on whose loss the weight is stated, a name of `diffaug.targets.TARGETS`.
        resolution: at how many quantiles of the times it is taken, denser toward both ends.

    Returns:
        The shares of all draws, and of all draws times weight: float64, shape (K,) each.
    """
    cells, draws, load = _cells(process, loss, resolution)
    return _in_bins(cells, draws, edges), _in_bins(cells, load, edges)


def span(process: ForwardProcess) -> tuple[float, float]:
    """The log-SNRs between which all of a recipe's `density` lies."""
    cells, _, _ = _cells(process, process.target, 4096)
    return cells[0].item(), cells[-1].item()


def _cells(process: ForwardProcess, loss: str, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """The borders of the levels' cells, rising, shape (N + 1,), and the shares in each, shape (N,): see `density`."""
    schedule = process.schedule
    ends = torch.linspace(-34.0, 34.0, resolution + 1, dtype=torch.float64).sigmoid()
    middles = torch.linspace(-34.0, 34.0, 2 * resolution + 1, dtype=torch.float64).sigmoid()[1::2]
    if schedule.discrete:  # the ends of a cell of the inverse CDF must not fall between two of these
        ends = torch.cat([ends, torch.linspace(0, 1, 16 * resolution + 1, dtype=torch.float64)]).unique()
        middles = (ends[1:] + ends[:-1]) / 2
    t, place = process.times.quantile(middles, schedule).unique(return_inverse=True)
    draws = torch.zeros(len(t), dtype=torch.float64).index_add_(0, place, ends.diff())
    levels = schedule.log_snr(t, torch.float64)
    kept = levels.isfinite()
    t, levels, draws = t[kept], levels[kept], draws[kept]
    weight = process.weight.of(schedule, process.target, t, process.sigma_data).double()
    weight = weight * process.times.importance_weight(t, schedule)
    one = torch.ones(len(t), 1, dtype=torch.float64)
    b = converted(schedule, process.target, loss, one, 0 * one, t, process.sigma_data)[:, 0]
    load = draws * weight / b.square()
    order = levels.argsort()
    levels, draws, load = levels[order], draws[order], load[order]
    half = levels.diff() / 2 if len(levels) > 1 else levels.new_full((1,), 0.05)
    cells = torch.cat([levels[:1] - half[:1], (levels[1:] + levels[:-1]) / 2, levels[-1:] + half[-1:]])
    return cells, draws, load / load.sum()


def _in_bins(cells: Tensor, shares: Tensor, edges: Tensor) -> Tensor:
    """The shares in bins: differences of the cumulative share, a monotone cubic between the borders of the cells.

    Fritsch and Carlson 1980, "Monotone piecewise cubic interpolation", with the slopes of Fritsch and Butland 1984.
    """
    total = torch.cat([torch.zeros(1, dtype=torch.float64), shares.cumsum(0)])
    last = torch.cat([cells.diff() > 0, torch.ones(1, dtype=torch.bool)])  # of borders that fall together
    x, y = cells[last], total[last]
    y[0] = 0.0
    step = x.diff()
    secant = y.diff() / step
    if len(secant) == 1:
        slope = secant.expand(2)
    else:
        near, far = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
        both = (near + far) / (near / secant[:-1] + far / secant[1:])  # 0 where either is
        slope = torch.cat([_end(step, secant), both, _end(step.flip(0), secant.flip(0))])
    right = torch.searchsorted(x, edges.contiguous()).clamp(1, len(x) - 1)
    left = right - 1
    h, u = step[left], ((edges - x[left]) / step[left]).clamp(0.0, 1.0)
    rise = y[right] - y[left]
    bend_left, bend_right = slope[left] * h - rise, rise - slope[right] * h
    return (y[left] + u * rise + u * (1 - u) * (bend_left * (1 - u) + bend_right * u)).diff()


def _end(step: Tensor, secant: Tensor) -> Tensor:
    """The slope at the first of three points, of a parabola through them, or as steep as keeps the curve monotone."""
    slope = ((2 * step[0] + step[1]) * secant[0] - step[0] * secant[1]) / (step[0] + step[1])
    return torch.minimum(slope.clamp_min(0.0), 3 * secant[0])[None]
