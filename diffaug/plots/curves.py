"""Curves: schedules over time, what recipes train on over log-SNR, and loss by noise level."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffaug.plots.picture import Picture, line, new_figure, tidy
from diffaug.process import ForwardProcess
from diffaug.report import density
from diffaug.schedules import Schedule
from diffaug.schedules.base import VARIANCE_PRESERVING

POINTS = 1001


def schedules(named: Mapping[str, Schedule]) -> Picture:
    """beta, alpha_bar (alpha^2), alpha and sigma, and log-SNR of one or several schedules over time.

    Time is the timestep t where all are discrete with the same T, else unit time. beta_t is that of discrete, variance
    preserving schedules. The numbers are those at every t, or at 1,001 points of a continuous schedule.

    Arguments:
        named: the schedules by the names they go by in the picture.
    """
    if not named:
        raise ValueError("plot schedules wants at least one schedule.")
    steps = {schedule.timesteps for schedule in named.values()}
    as_steps = len(steps) == 1 and steps != {0}
    columns = ("schedule", "t", "unit", "beta", "alpha_bar", "alpha", "sigma", "log_snr")
    rows: list[tuple[Any, ...]] = []
    figure = new_figure(9.5, 6.0)
    (top_left, top_right), (left, right) = figure.subplots(2, 2)
    loud = False
    for number, (name, schedule) in enumerate(named.items()):
        unit = torch.linspace(0, 1, POINTS, dtype=torch.float64)
        t = torch.arange(schedule.timesteps) if schedule.discrete else schedule.from_unit(unit)
        unit = schedule.to_unit(t, torch.float64)
        alpha, sigma = schedule.alpha_sigma(t, torch.float64)
        log_snr = schedule.log_snr(t, torch.float64)
        has_betas = schedule.discrete and schedule.scaling is VARIANCE_PRESERVING
        betas = schedule.betas if has_betas else torch.full_like(alpha, math.nan)
        rows += [
            (name, *(value if value == value else "" for value in row))
            for row in zip(*(x.tolist() for x in (t, unit, betas, alpha.square(), alpha, sigma, log_snr)), strict=True)
        ]
        x, style = (t if as_steps else unit), line(number, len(named))
        top_left.plot(x, betas, **style)
        top_right.plot(x, alpha.square(), label=name, **style)
        left.plot(x, alpha, **style)
        left.plot(x, sigma, **{**style, "linewidth": 0.9})
        right.plot(x, torch.where(log_snr.isfinite(), log_snr, torch.nan), **style)
        loud = loud or bool(sigma.max() > 2)
    time = "timestep t" if as_steps else "unit time"
    tidy(top_left, xlabel=time, ylabel=r"$\beta_t$ (variance added by a step)", yscale="log")
    if not top_left.lines or all(not torch.tensor(x.get_ydata()).isfinite().any() for x in top_left.lines):
        top_left.set(yscale="linear", yticks=[])
        top_left.text(0.5, 0.5, "continuous: no betas", ha="center", transform=top_left.transAxes, color="0.4")
    tidy(top_right, xlabel=time, ylabel=r"$\bar\alpha = \alpha^2$ (signal)", ylim=(-0.02, 1.04))
    tidy(left, xlabel=time, ylabel=r"$\alpha$ (thick), $\sigma$ (thin)", yscale="log" if loud else "linear")
    right.axhline(0, color="0.6", linewidth=0.8)
    tidy(right, xlabel=time, ylabel="log-SNR (nats)")
    _legend(figure, top_right, named)
    if len(named) == 1:
        _note_ends(next(iter(named.values())), as_steps, top_right, right)
    return Picture(figure, columns, rows)


def _note_ends(schedule: Schedule, as_steps: bool, signal: Any, level: Any) -> None:
    """Write beside the only curve what is left at the end, and where signal and noise are equal."""
    low, high = schedule.ends
    first, last = schedule.log_snr(torch.stack([low, high]), torch.float64).tolist()
    left = schedule.alpha_sigma(high[None], torch.float64)[0].item() ** 2
    end = high.item() if as_steps else 1.0
    away = {"textcoords": "offset points", "arrowprops": {"arrowstyle": "-", "color": "0.5"}}
    if left < 0.5:
        signal.annotate(rf"{left:.3g} at the end", (end, left), xytext=(-14, 26), ha="right", **away)
    if first >= 0 >= last:
        t = schedule.t_of_log_snr(torch.zeros(1, dtype=torch.float64))
        x = t.item() if as_steps else schedule.to_unit(t, torch.float64).item()
        level.plot([x], [0], "o", color="black", markersize=4)
        level.annotate(f"SNR = 1 at t = {t.item():.4g}", (x, 0), xytext=(10, 14), **away)


def _legend(figure: Any, axes: Any, names: Mapping[str, Any]) -> None:
    if len(names) == 1:
        figure.suptitle(next(iter(names)), fontsize=10)
    else:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=-(-len(names) // -(-len(names) // 4)), frameon=False
        )


def recipes(
    named: Mapping[str, ForwardProcess], *, loss: str = "F", width: float = 0.25, reach: float = 14.0
) -> Picture:
    """What recipes train on: where they draw noise levels, and what the errors there count, over log-SNR.

    Above, the density of the draws. Below, that density times the loss weight, stated for all on the loss of one
    target, so that recipes with different targets can be laid over one another; see `diffaug.report.density`. On the
    loss of epsilon it is the weighting function w of Kingma and Gao 2023, "Understanding Diffusion Objectives as the
    ELBO with Simple Data Augmentation", of which the ELBO is the flat one. Each curve has area 1 over the whole range
    of its schedule.

    Arguments:
        named: the recipes by the names they go by in the picture.
        loss: the target on whose loss the weights are stated.
        width: of a bin, in nats.
        reach: the picture goes from -reach to reach nats, or less where all recipes end before.
    """
    if not named:
        raise ValueError("plot recipes wants at least one recipe.")
    edges = torch.arange(-math.ceil(reach / width), math.ceil(reach / width) + 1, dtype=torch.float64) * width
    middle = (edges[1:] + edges[:-1]) / 2
    rows: list[tuple[Any, ...]] = []
    figure = new_figure(7.5, 5.6)
    above, below = figure.subplots(2, 1, sharex=True)
    seen = torch.zeros(len(middle), dtype=torch.bool)
    for number, (name, process) in enumerate(named.items()):
        draws, load = (share / width for share in density(process, edges, loss))
        rows += [
            (name, *row)
            for row in zip(
                *(x.tolist() for x in (edges[:-1], edges[1:], draws, load)),
                strict=True,
            )
        ]
        seen |= (draws > 1e-4) | (load > 1e-4)
        style = line(number, len(named))
        above.plot(middle, draws, label=name, **style)
        below.plot(middle, load, **style)
        above.fill_between(middle, draws, color=style["color"], alpha=0.06, linewidth=0)
        below.fill_between(middle, load, color=style["color"], alpha=0.06, linewidth=0)
    shown = middle[seen] if bool(seen.any()) else middle
    tidy(above, ylabel="draws\n(share per nat)", ylim=(0, None))
    tidy(below, ylabel=f"draws x weight on\nthe loss of {loss} (share per nat)", ylim=(0, None))
    below.set(xlim=(shown[0].item() - 0.5, shown[-1].item() + 0.5))
    below.set_xlabel("log-SNR (nats)         more noise  $\\leftarrow$        $\\rightarrow$  less noise")
    for axes in (above, below):
        axes.axvline(0, color="0.6", linewidth=0.8)
    _legend(figure, above, named)
    return Picture(figure, ("recipe", "log_snr_low", "log_snr_high", "draws_per_nat", "draws_times_weight"), rows)


LEVEL_COLUMNS = ("stage", "step", "epoch", "low", "high", "count", "mean", "std", "weighted")


def levels(rows: Sequence[Sequence[Any]], over: str = "log_snr") -> Picture:
    """Loss by noise level over the course of training: the mean error in each bin, its spread at the last report.

    Arguments:
        rows: as `diffaug.callbacks.LossByLevel` keeps them, one for each bin that was not empty, of `LEVEL_COLUMNS`.
        over: what the bins are of: log_snr or unit (time).
    """
    stages = list(dict.fromkeys(row[0] for row in rows))
    if not stages:
        raise ValueError("There is no loss by noise level to draw: no row was reported.")
    figure = new_figure(4.8 * len(stages), 5.0)
    panels: Any = figure.subplots(2, len(stages), squeeze=False, sharex=True, height_ratios=(3, 1))
    for column, stage in enumerate(stages):
        own = [row for row in rows if row[0] == stage]
        steps = list(dict.fromkeys(row[1] for row in own))
        shown = [steps[k] for k in torch.linspace(0, len(steps) - 1, min(5, len(steps))).round().long().tolist()]
        above, below = panels[0, column], panels[1, column]
        for place, step in enumerate(shown):
            bins = [row for row in own if row[1] == step]
            x, mean, std = _middles(bins), [row[6] for row in bins], [row[7] for row in bins]
            last = place == len(shown) - 1
            grey = str(0.78 * (1 - place / max(len(shown) - 1, 1)))
            above.plot(x, mean, "o-", color=grey, markersize=3.5 if last else 2, label=f"step {step}", linewidth=1.4)
            if last:
                band = (
                    [max(m - s, 0) for m, s in zip(mean, std, strict=True)],
                    [*map(sum, zip(mean, std, strict=True))],
                )
                above.fill_between(x, *band, color="0.5", alpha=0.18, linewidth=0, label="± 1 std over images")
                count = [row[5] for row in bins]
                low, high = zip(*((_inside(row[3], row[4])) for row in bins), strict=True)
                widths = [b - a for a, b in zip(low, high, strict=True)]
                below.bar(x, count, width=[0.9 * w for w in widths], color="0.6")
        tidy(above, ylabel="mean squared error", title=stage, ylim=(0, None))
        what = (
            "log-SNR (nats)      more noise  $\\leftarrow$   $\\rightarrow$  less noise"
            if over == "log_snr"
            else "unit time"
        )
        tidy(below, ylabel="samples", xlabel=what)
        above.legend(frameon=False, fontsize=8)
    return Picture(figure, LEVEL_COLUMNS, [tuple(row) for row in rows])


def _inside(low: float, high: float) -> tuple[float, float]:
    """A bin as it is drawn: one without an end is two wide."""
    low, high = float(low), float(high)
    return (high - 2 if low == -math.inf else low), (low + 2 if high == math.inf else high)


def _middles(bins: Sequence[Sequence[Any]]) -> list[float]:
    return [sum(_inside(row[3], row[4])) / 2 for row in bins]
