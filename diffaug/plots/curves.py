"""Curves: schedules over time, what recipes train on over log-SNR, and loss by noise level."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaug.plots.picture import Picture, line_style, new_figure, table, tidy
from diffaug.process import ForwardProcess
from diffaug.process.density import density, span
from diffaug.schedules import Schedule
from diffaug.schedules.base import VARIANCE_PRESERVING

POINTS = 1001


def schedules(named: Mapping[str, Schedule]) -> Picture:
    """Draw beta, alpha_bar (alpha^2), log-SNR, alpha and sigma of one or several schedules over time.

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
    figure = new_figure(12.0, 6.0)
    panels: Any = figure.subplots(2, 3)
    (of_beta, of_signal, of_level), (of_alpha, of_sigma, words) = panels
    loud, without = False, {}
    for number, (name, schedule) in enumerate(named.items()):
        unit = torch.linspace(0, 1, POINTS, dtype=torch.float64)
        t = torch.arange(schedule.timesteps) if schedule.discrete else schedule.from_unit(unit)
        unit = schedule.to_unit(t, torch.float64)
        alpha, sigma = schedule.alpha_sigma(t, torch.float64)
        log_snr = schedule.log_snr(t, torch.float64)
        if schedule.discrete and schedule.scaling is VARIANCE_PRESERVING:
            betas = schedule.betas
        else:
            betas = torch.full_like(alpha, math.nan)
            without[name] = repr(schedule.scaling) if schedule.discrete else "continuous"
        rows += [
            (name, *(value if value == value else "" for value in row))
            for row in table(t, unit, betas, alpha.square(), alpha, sigma, log_snr)
        ]
        x, style = (t if as_steps else unit), line_style(number, len(named))
        shown = torch.where(log_snr.isfinite(), log_snr, torch.nan)
        for axes, y in zip(panels.flat, (betas, alpha.square(), shown, alpha, sigma), strict=False):
            axes.plot(x, y, label=f"{_wrapped(name)}\n{_facts(schedule)}", **style)
        loud = loud or bool(sigma.max() > 2)
    time = "timestep t" if as_steps else "unit time"
    tidy(of_beta, xlabel=time, ylabel=r"$\beta_t$ (variance added by a step)", yscale="log")
    _note_without_betas(of_beta, without, len(without) == len(named), x_end=max(steps) - 1 if as_steps else 1.0)
    tidy(of_signal, xlabel=time, ylabel=r"$\bar\alpha = \alpha^2$ (signal)", ylim=(-0.02, 1.04))
    of_level.axhline(0, color="0.6", linewidth=0.8)
    tidy(of_level, xlabel=time, ylabel="log-SNR (nats)")
    tidy(of_alpha, xlabel=time, ylabel=r"$\alpha$ (of $x_0$)", ylim=(-0.02, 1.04))
    tidy(of_sigma, xlabel=time, ylabel=r"$\sigma$ (of $\epsilon$)", yscale="log" if loud else "linear")
    words.set_axis_off()
    small = 9 if len(named) < 6 else 7
    words.legend(*of_signal.get_legend_handles_labels(), loc="center", frameon=False, fontsize=small, labelspacing=0.9)
    return Picture(figure, columns, rows)


def _wrapped(name: str) -> str:
    return textwrap.fill(name, 40)


def _facts(schedule: Schedule) -> str:
    """Say how much signal is left at the end, and where signal and noise are equal."""
    first, last = schedule.log_snr(torch.stack(schedule.ends), torch.float64).tolist()
    one = ""
    if first >= 0 >= last:
        t = schedule.t_of_log_snr(torch.zeros(1, dtype=torch.float64)).item()
        one = f"1 at t = {t:.4g}, "
    return f"SNR: {one}{math.exp(last):.3g} at the end"


def _note_without_betas(axes: Any, without: Mapping[str, str], all_of_them: bool, x_end: float) -> None:
    """Say which schedules have no betas, and why."""
    kinds = dict.fromkeys(without.values())
    if all_of_them:
        axes.set(yscale="linear", yticks=[], xlim=(0, x_end))
        axes.text(0.5, 0.5, f"no betas:\n{', '.join(kinds)}", ha="center", transform=axes.transAxes, color="0.4")
    elif without:
        said = "\n".join(_wrapped(f"{', '.join(n for n in without if without[n] == k)}: no betas, {k}") for k in kinds)
        axes.text(0.98, 0.03, said, ha="right", va="bottom", transform=axes.transAxes, color="0.4", fontsize=8)


def _legend(figure: Any, axes: Any, names: Mapping[str, Any]) -> None:
    if len(names) == 1:
        figure.suptitle(next(iter(names)), fontsize=10)
    else:
        most = max(1, min(4, int(11 * figure.get_figwidth()) // (max(map(len, names)) + 8)))  # columns that fit
        rows = -(-len(names) // most)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=-(-len(names) // rows), frameon=False)


def recipes(
    named: Mapping[str, ForwardProcess], *, loss: str = "F", width: float = 0.1, reach: float = 14.0
) -> Picture:
    """Draw what recipes train on: where they draw noise levels, and what the errors there count, over log-SNR.

    Above, the density of the draws. Below, that density times the loss weight, stated for all on the loss of one
    target, so that recipes with different targets can be laid over one another; see `density`. On the
    loss of epsilon it is the weighting function w of Kingma and Gao 2023, "Understanding Diffusion Objectives as the
    ELBO with Simple Data Augmentation", of which the ELBO is the flat one. Each curve has area 1 over the whole range
    of its schedule, and ends where that does.

    Arguments:
        named: the recipes by the names they go by in the picture.
        loss: the target on whose loss the weights are stated.
        width: of a bin, in nats.
        reach: the picture goes from -reach to reach nats, or less where all recipes end before.
    """
    if not named:
        raise ValueError("plot recipes wants at least one recipe.")
    edges = torch.arange(-math.ceil(reach / width), math.ceil(reach / width) + 1, dtype=torch.float64) * width
    rows: list[tuple[Any, ...]] = []
    figure = new_figure(7.5, 5.6)
    above, below = figure.subplots(2, 1, sharex=True)
    low, high = math.inf, -math.inf
    for number, (name, process) in enumerate(named.items()):
        own, draws, load = _within(process, edges, loss)
        rows += [(name, *row) for row in table(own[:-1], own[1:], draws, load)]
        seen = (draws > 1e-4) | (load > 1e-4)
        if bool(seen.any()):
            low, high = min(low, own[:-1][seen][0].item()), max(high, own[1:][seen][-1].item())
        style = line_style(number, len(named))
        x = torch.cat([own[:1], own[:1], (own[1:] + own[:-1]) / 2, own[-1:], own[-1:]])
        for axes, height in ((above, draws), (below, load)):
            left, right = (0.0 if ends_inside else 1.0 for ends_inside in (own[0] > edges[0], own[-1] < edges[-1]))
            y = torch.cat([left * height[:1], height[:1], height, height[-1:], right * height[-1:]])
            axes.plot(x, y, label=name, **style)
            axes.fill_between(x, y, color=style["color"], alpha=0.06, linewidth=0)
    tidy(above, ylabel="draws\n(share per nat)", ylim=(0, None))
    tidy(below, ylabel=f"draws x weight on\nthe loss of {loss} (share per nat)", ylim=(0, None))
    below.set(xlim=(low - 0.5, high + 0.5) if low < high else (-reach, reach))
    below.set_xlabel("log-SNR (nats)         more noise  $\\leftarrow$        $\\rightarrow$  less noise")
    for axes in (above, below):
        axes.axvline(0, color="0.6", linewidth=0.8)
    _legend(figure, above, named)
    return Picture(figure, ("recipe", "log_snr_low", "log_snr_high", "draws_per_nat", "draws_times_weight"), rows)


def _within(process: ForwardProcess, edges: Tensor, loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bins that a recipe reaches, the outer ones ending where it does, and its two densities in them."""
    low, high = span(process)
    low, high = max(low, edges[0].item()), min(high, edges[-1].item())
    own = torch.cat([edges, edges.new_tensor([low, high])]).clamp(low, high).unique()
    draws, load = density(process, own, loss)
    return own, draws / own.diff(), load / own.diff()


LEVEL_EDGES = (-math.inf, -8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0, math.inf)
"""Of bins of log-SNR, in nats."""
LEVEL_COLUMNS = ("stage", "step", "epoch", "low", "high", "count", "mean", "std", "weighted", "over")


def levels(rows: Sequence[Sequence[Any]]) -> Picture:
    """Draw the loss by noise level over training: the mean error in each bin, its spread at the last report.

    Arguments:
        rows: as `diffaug.training.LossByLevel` keeps them, one for each bin that was not empty, of `LEVEL_COLUMNS`;
            ``over`` is what the bins are of, log_snr or unit (time).
    """
    kept = [dict(zip(LEVEL_COLUMNS, row, strict=True)) for row in rows]
    stages = list(dict.fromkeys(row["stage"] for row in kept))
    if not stages:
        raise ValueError("There is no loss by noise level to draw: no row was reported.")
    figure = new_figure(4.8 * len(stages), 5.0)
    panels: Any = figure.subplots(2, len(stages), squeeze=False, sharex=True, height_ratios=(3, 1))
    for stage, (above, below) in zip(stages, panels.T, strict=True):
        own = [row for row in kept if row["stage"] == stage]
        steps = list(dict.fromkeys(row["step"] for row in own))
        shown = [steps[k] for k in torch.linspace(0, len(steps) - 1, min(5, len(steps))).round().long().tolist()]
        for place, step in enumerate(shown):
            bins = [row for row in own if row["step"] == step]
            low, high = np.array([_ends(row["low"], row["high"]) for row in bins]).T
            x, count = (low + high) / 2, np.array([row["count"] for row in bins])
            mean, std = np.array([(row["mean"], row["std"]) for row in bins]).T
            last, alone = step == shown[-1], count == 1  # whose spread is unknown, not 0
            style = {"color": str(0.8 * (1 - (place + 1) / len(shown))), "markersize": 3.5 if last else 2.5}
            above.plot(x, mean, "o-", label=f"step {step}", linewidth=1.4, **style)
            above.plot(x[alone], mean[alone], "o", **style, markerfacecolor="white")
            if last:
                spread = {"fmt": "none", "ecolor": "0.65", "capsize": 2.5, "zorder": 1, "label": "± 1 std over images"}
                reach = [np.minimum(std, mean)[~alone], std[~alone]]  # no error is below 0
                above.errorbar(x[~alone], mean[~alone], reach, **spread)
                below.bar(x, count, width=0.9 * (high - low), color="0.6")
        if any(row["count"] == 1 for row in own):
            above.plot([], [], "o", color="black", markersize=3.5, markerfacecolor="white", label="one image")
        tidy(above, ylabel="mean squared error", title=stage, ylim=(0, None))
        borders = sorted({edge for row in own for edge in (row["low"], row["high"]) if math.isfinite(edge)})
        if len(borders) <= 12:
            below.set_xticks(borders)
        arrows = "log-SNR (nats)      more noise  $\\leftarrow$   $\\rightarrow$  less noise"
        tidy(below, ylabel="samples", xlabel=arrows if kept[0]["over"] == "log_snr" else "unit time")
        above.legend(frameon=False, fontsize=8)
    return Picture(figure, LEVEL_COLUMNS, [tuple(row) for row in rows])


def _ends(low: float, high: float) -> tuple[float, float]:
    """Return a bin's ends as it is drawn: one without an end is two wide."""
    return high - 2 if low == -math.inf else low, low + 2 if high == math.inf else high
