"""Density of a recipe's draws, and of its draws times loss weight, over log-SNR."""

import torch
from torch import Tensor

from diffaug.process.drawing import AT_THE_END
from diffaug.process.forward import ForwardProcess
from diffaug.randomness.keys import Keys
from diffaug.targets import convert
from diffaug.times import PairPlaces, PairTimes


def even_times(process: ForwardProcess, count: int) -> Tensor:
    """Return times as training draws them, without images: of the schedule's dtype, shape (count,).

    They are at even quantiles of the process's times. Where its pair makes a t of its own, each is then moved by a
    keyed draw of that, a curriculum being at its end.
    """
    schedule, number = process.schedule, torch.arange(count)
    t = process.times.quantile((number.double() + 0.5) / count, schedule)
    t = t if schedule.discrete else t.float().clamp(*schedule.range)
    law = _mover(process)
    if law is None:
        return t
    places = PairPlaces(number * law.together, torch.full_like(number, AT_THE_END))  # each of a group of its own
    return law.draw(Keys.pack(number), schedule, process.times, t, places)[0]


def _mover(process: ForwardProcess) -> PairTimes | None:
    """Return the law of a pair's times, if it makes a t of its own."""
    return None if process.pair is None or not process.pair.times.moves_t else process.pair.times


def trained_on(process: ForwardProcess, edges: Tensor, resolution: int = 2**16) -> tuple[Tensor, Tensor]:
    """Return the shares of draws, and of draws times loss weight, in each bin of log-SNR: float64, shape (K,) each.

    Arguments:
        edges: of the bins, rising, shape (K + 1,).
        resolution: of how many of `even_times` they are.
    """
    t = even_times(process, resolution)
    weight = process.weight.of(process.schedule, process.target, t, process.sigma_data).double()
    weight = weight * process.times.importance_weight(t, process.schedule)
    place = torch.searchsorted(edges, process.schedule.log_snr(t, torch.float64), right=True)
    length = len(edges) + 1
    draws = torch.bincount(place, minlength=length)[1:-1].double() / resolution
    load = torch.bincount(place, weights=weight, minlength=length)[1:-1]
    return draws, load / load.sum()


def density(process: ForwardProcess, edges: Tensor, loss: str = "F", resolution: int = 4096) -> tuple[Tensor, Tensor]:
    """Return the same shares, smooth and far into the tails, with the weight stated on one target's loss.

    So recipes of different targets compare: with x_t given, an error e in one target is an error b e in another, and a
    weight w on the first's squared error is w / b^2 on the second's. F is the target whose variance is 1 at every noise
    level where the images' is sigma_data^2 (Karras et al. 2022, section 5): on its loss, draws times weight is where
    the loss of a network that has learned nothing comes from. A timestep's share lies in its cell, from halfway to the
    level before to halfway to the level after, and passes over into its neighbours' smoothly. Levels without any signal
    or noise are in no bin.

    Arguments:
        edges: log-SNRs that rise, finite, shape (K + 1,).
        loss: the target on whose loss the weight is stated, a name of `diffaug.targets.TARGETS`.
        resolution: at how many quantiles of the times it is taken, denser toward both ends; of a pair that makes a t
            of its own, of 64 times as many draws.

    Returns:
        The shares of all draws, and of all draws times weight: float64, shape (K,) each.
    """
    cells, draws, load = _cells(process, loss, resolution)
    return _in_bins(cells, draws, edges), _in_bins(cells, load, edges)


def span(process: ForwardProcess) -> tuple[float, float]:
    """Return the log-SNRs between which all of a recipe's `density` lies."""
    cells, _, _ = _cells(process, process.target, 4096)
    return cells[0].item(), cells[-1].item()


def _cells(process: ForwardProcess, loss: str, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the borders of the levels' cells, rising, shape (N + 1,), and the shares in each, shape (N,)."""
    schedule = process.schedule
    t, draws = _shares(process, resolution)
    levels = schedule.log_snr(t, torch.float64)
    kept = levels.isfinite()
    t, levels, draws = t[kept], levels[kept], draws[kept]
    weight = process.weight.of(schedule, process.target, t, process.sigma_data).double()
    weight = weight * process.times.importance_weight(t, schedule)
    one = torch.ones(len(t), 1, dtype=torch.float64)
    b = convert(schedule, process.target, loss, one, 0 * one, t, process.sigma_data)[:, 0]
    load = draws * weight / b.square()
    order = levels.argsort()
    levels, draws, load = levels[order], draws[order], load[order]
    half = levels.diff() / 2 if len(levels) > 1 else levels.new_full((1,), 0.05)
    cells = torch.cat([levels[:1] - half[:1], (levels[1:] + levels[:-1]) / 2, levels[-1:] + half[-1:]])
    return cells, draws, load / load.sum()


def _shares(process: ForwardProcess, resolution: int) -> tuple[Tensor, Tensor]:
    """Return times, rising, shape (N,), and the share of the draws that each stands for, float64."""
    schedule = process.schedule
    if _mover(process) is not None:  # no inverse CDF is known, so that of many draws
        t = even_times(process, 64 * resolution).sort().values
        ends = torch.linspace(0, 1, len(t) + 1, dtype=torch.float64)
    else:
        ends = torch.linspace(-34.0, 34.0, resolution + 1, dtype=torch.float64).sigmoid()
        middles = torch.linspace(-34.0, 34.0, 2 * resolution + 1, dtype=torch.float64).sigmoid()[1::2]
        if schedule.discrete:  # the ends of a cell of the inverse CDF must not fall between two of these
            ends = torch.cat([ends, torch.linspace(0, 1, 16 * resolution + 1, dtype=torch.float64)]).sort().values
            ends = ends[_rises(ends)]
            middles = (ends[1:] + ends[:-1]) / 2
        t = process.times.quantile(middles, schedule)
    new = _rises(t)
    t, place = t[new], new.cumsum(0) - 1
    return t, torch.zeros(len(t), dtype=torch.float64).index_add_(0, place, ends.diff())


def _rises(numbers: Tensor) -> Tensor:
    """Return which of the numbers, which never fall, are greater than the one before; the first is."""
    return torch.cat([torch.ones(1, dtype=torch.bool), numbers.diff() > 0])


def _in_bins(cells: Tensor, shares: Tensor, edges: Tensor) -> Tensor:
    """Compute the shares in bins: differences of the cumulative share, a monotone cubic between the cells' borders.

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
    """Return the slope at the first of three points, of a parabola or as steep as keeps the curve monotone."""
    slope = ((2 * step[0] + step[1]) * secant[0] - step[0] * secant[1]) / (step[0] + step[1])
    return torch.minimum(slope.clamp_min(0.0), 3 * secant[0])[None]
