"""Pictures: of schedules, of noised images, of samples. Each function returns a matplotlib Figure.

matplotlib is imported inside the functions, without pyplot: no window, no global state, no cost where it is not used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffaug.process import ForwardProcess
from diffaug.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "diffaug[train]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def schedule(schedule: Schedule, name: str | None = None) -> "Figure":
    """alpha^2 (alpha_bar, where variance preserving) and log-SNR over the whole range of t."""
    unit = torch.linspace(0, 1, 1001, dtype=torch.float64)
    times = torch.arange(schedule.timesteps) if schedule.discrete else schedule.from_unit(unit)
    alpha, sigma = schedule.alpha_sigma(times, torch.float64)
    log_snr = schedule.log_snr(times, torch.float64)
    figure = _figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    label = "timestep t" if schedule.discrete else "time t"
    left.plot(times, alpha.square(), color="black", label=r"$\alpha(t)^2$ (signal)")
    left.plot(times, sigma.square(), color="0.55", linestyle="--", label=r"$\sigma(t)^2$ (noise)")
    if schedule.discrete and alpha[-1] < 0.5:
        left.annotate(
            rf"$\bar\alpha_{{T-1}}$ = {alpha[-1].item() ** 2:.3g}",
            (float(times[-1]), float(alpha[-1] ** 2)),
            xytext=(-8, 22),
            textcoords="offset points",
            ha="right",
            arrowprops={"arrowstyle": "-", "color": "0.5"},
        )
    left.set(xlabel=label, ylabel="share of the variance", title="How signal turns into noise")
    left.legend(frameon=False, loc="center right")
    right.plot(times, log_snr, color="black")
    right.axhline(0, color="0.6", linewidth=0.8)
    crossing = schedule.t_of_log_snr(torch.zeros(1, dtype=torch.float64)).item()
    right.plot([crossing], [0], "o", color="black", markersize=4)
    right.annotate(f"SNR = 1 at t = {crossing:.4g}", (crossing, 0), xytext=(8, 6), textcoords="offset points")
    right.set(xlabel=label, ylabel="log-SNR (nats)", title="Log signal-to-noise ratio")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.suptitle(name or repr(schedule), fontsize=10)
    return figure


def forward(process: ForwardProcess, images: Tensor, *, columns: int = 9, seed: int = 0) -> "Figure":
    """Rows of images, each along one joint path from x_0 to x_T.

    Arguments:
        images: uint8 or float as the process takes them, shape (B, C, H, W); one row each.
        columns: how many states, x_0 included.
    """
    schedule = process.schedule
    unit = torch.linspace(0, 1, columns, dtype=torch.float64)[1:]
    times = schedule.from_unit(unit)
    times = torch.unique_consecutive(times)
    path = process.trajectory(images, times, torch.arange(len(images)), seed=seed)
    states = torch.cat([process.scaled(images)[:, None], path], 1)
    alpha, sigma = schedule.alpha_sigma(times, torch.float64)
    titles = ["$x_0$"]
    for t, a, s in zip(times.tolist(), alpha.tolist(), sigma.tolist(), strict=True):
        titles.append(f"t = {t:.3g}\n" + (f"SNR {a * a / s / s:.2g}" if s else "clean"))
    # As a variance exploding image grows, it is shown at the scale of its own standard deviation.
    scale = torch.cat([torch.ones(1, dtype=torch.float64), (alpha.square() + sigma.square()).sqrt()]).clamp_min(1)
    return _grid(states / scale.float().view(1, -1, *(1,) * (states.ndim - 2)), titles)


def _grid(images: Tensor, titles: Sequence[str]) -> "Figure":
    rows, columns, _, height, width = images.shape
    figure = _figure(1.05 * columns, 1.05 * rows * height / width + 0.5)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for i in range(rows):
        for j in range(columns):
            _show(axes[i, j], images[i, j])
            if i == 0:
                axes[i, j].set_title(titles[j], fontsize=8)
    return figure


def samples(images: Tensor, *, columns: int = 8) -> "Figure":
    """A grid of images in [-1, 1], shape (B, C, H, W)."""
    rows = -(-len(images) // columns)
    figure = _figure(columns * 0.8, rows * 0.8)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for k, ax in enumerate(axes.flat):
        if k < len(images):
            _show(ax, images[k])
        else:
            ax.set_axis_off()
    return figure


def _show(ax: Any, image: Tensor) -> None:
    ax.set_axis_off()
    pixels = ((image.float().cpu() + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
    if pixels.shape[2] == 3:
        ax.imshow(pixels, interpolation="nearest")
    else:
        ax.imshow(pixels[:, :, 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
