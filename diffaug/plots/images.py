"""Images: noised along a path, noised under several schedules, a batch, samples, and samples over training."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffaug.noise import gaussian
from diffaug.plots.picture import Picture, new_figure, show, table, tidy
from diffaug.process import ForwardProcess, NoisyBatch
from diffaug.process.batch import Fields
from diffaug.randomness.keys import Keys, Purpose
from diffaug.schedules import Schedule
from diffaug.targets import convert


def forward(process: ForwardProcess, images: Tensor, *, columns: int = 9, seed: int = 0) -> Picture:
    """Draw rows of images, each along one joint path from x_0 to x_T.

    Arguments:
        images: uint8 or float as the process takes them, shape (B, C, H, W); one row each.
        columns: how many states, x_0 included.
    """
    states, titles, rows = _along_path(process, images, columns, seed)
    return Picture(_grid(states, titles), ("t", "alpha", "sigma", "log_snr"), rows)


def _along_path(
    process: ForwardProcess, images: Tensor, columns: int, seed: int = 0
) -> tuple[Tensor, list[str], list[tuple[Any, ...]]]:
    """Noise images along one joint path each: their states as shown, (B, columns, C, H, W), titles, and numbers."""
    schedule = process.schedule.at_shape(images.shape)
    times = torch.unique_consecutive(schedule.from_unit(torch.linspace(0, 1, columns, dtype=torch.float64)[1:]))
    path = process.trajectory(images, times, torch.arange(len(images)), seed=seed)
    alpha, sigma = schedule.alpha_sigma(times, torch.float64)
    log_snr = schedule.log_snr(times, torch.float64)
    states = torch.cat([process.scale(images)[:, None], path / _display_scale(alpha, sigma).view(-1, 1, 1, 1)], 1)
    return states, ["$x_0$", *_titles(times, log_snr)], table(times, alpha, sigma, log_snr)


def _titles(times: Tensor, log_snr: Tensor) -> list[str]:
    return [f"t = {t:.3g}\n{_snr(level)}" for t, level in table(times, log_snr)]


def _display_scale(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the divisor that brings a state into view: the deviation of a variance exploding one, at least 1."""
    return torch.hypot(alpha, sigma).clamp_min(1).float()


def _snr(log_snr: float) -> str:
    if log_snr == math.inf:
        return "clean"
    snr = math.exp(log_snr)
    return f"SNR {snr:.0f}" if 10 <= snr < 1e5 else f"SNR {snr:.2g}"  # 432, not 4.3e+02


def strip(
    named: Mapping[str, Schedule],
    image: Tensor,
    *,
    sizes: Sequence[int] = (),
    columns: int = 9,
    seed: int = 0,
) -> Picture:
    """Draw one image from x_0 to x_T, a row for each schedule and size: what each leaves to be seen, and where.

    All states of a row hold the same noise, and all rows of a size too, so that only the schedules differ. Time is unit
    time. A smaller size is the image averaged over squares, so the same noise level erases more of it: Hoogeboom, Heek
    and Salimans 2023, "simple diffusion", section 3.

    Arguments:
        named: the schedules by the names they go by in the picture.
        image: float in [-1, 1], shape (C, H, W).
        sizes: sides in pixels, none above the image's own; () shows the image as it is.
        columns: how many states, x_0 included.
    """
    if not named:
        raise ValueError("plot strip wants at least one schedule.")
    own = min(image.shape[1:])
    if any(not 1 <= size <= own for size in sizes):
        raise ValueError(f"sizes must be from 1 to {own}, the image's own, but got {list(sizes)}.")
    unit = torch.linspace(0, 1, columns, dtype=torch.float64)[1:]
    states, labels, captions, rows = [], [], [], []
    for size in sizes or (0,):
        x_0 = _resized(image, size) if size else image
        key = Keys.pack(torch.zeros(1, dtype=torch.int64), seed=seed, stage="predict")
        epsilon = gaussian(key, tuple(x_0.shape), Purpose.TRAJECTORY)[0]
        for name, each in named.items():
            schedule = each.at_shape((1, *x_0.shape))
            times = schedule.from_unit(unit)
            alpha, sigma = schedule.alpha_sigma(times, torch.float64)
            log_snr = schedule.log_snr(times, torch.float64)
            shown = table(alpha, sigma, _display_scale(alpha, sigma))
            states.append([x_0, *((a * x_0 + s * epsilon) / scale for a, s, scale in shown)])
            labels.append(f"{textwrap.fill(name, 18)}\n{x_0.shape[1]} x {x_0.shape[2]}")
            captions.append(["", *map(_caption, log_snr.tolist())])
            rows += [(name, x_0.shape[1], *row) for row in table(unit, times, alpha, sigma, log_snr)]
    titles = ["$x_0$", *(f"u = {u:.3g}" for u in unit.tolist())]
    figure = _grid(states, titles, labels, captions)
    return Picture(figure, ("schedule", "size", "unit", "t", "alpha", "sigma", "log_snr"), rows)


def _caption(log_snr: float) -> str:
    end = r"$\infty$" if log_snr > 0 else r"$-\infty$"
    return f"log-SNR {round(log_snr, 1) + 0.0:.1f}" if math.isfinite(log_snr) else f"log-SNR {end}"


def _resized(image: Tensor, size: int) -> Tensor:
    """Average an image over squares, so that its shorter side has so many pixels."""
    height, width = image.shape[1:]
    scale = size / min(height, width)
    shape = (max(round(height * scale), 1), max(round(width * scale), 1))
    return torch.nn.functional.adaptive_avg_pool2d(image.float(), shape)


def _grid(
    rows: Any, titles: Sequence[str] = (), labels: Sequence[str] = (), captions: Sequence[Sequence[str]] = ()
) -> Any:
    """Make a figure of rows of images in their proportion; see `fill`."""
    height, width = rows[0][0].shape[-2:]
    below = 0.16 if captions else 0.0
    figure = new_figure(
        1.05 * len(rows[0]) + (1.35 if labels else 0), (1.05 * height / width + below) * len(rows) + 0.5
    )
    figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    fill(figure, rows, titles, labels, captions)
    return figure


def fill(
    figure: Any,
    rows: Any,
    titles: Sequence[str] = (),
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    *,
    columns: int = 0,
    fontsize: float = 8,
) -> None:
    """Fill a figure, or a part of one, with rows of images.

    Arguments:
        rows: of images (C, H, W) in [-1, 1]; a row may be shorter than the first.
        titles: above the columns.
        labels: beside the rows.
        captions: below the images, row by row.
        columns: at least so many.
    """
    columns = max(columns, len(rows[0]))
    panels: Any = figure.subplots(len(rows), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            axes = panels[i, j]
            axes.set_axis_on()
            show(axes, image)
            if i == 0 and titles:
                axes.set_title(titles[j], fontsize=fontsize)
            if j == 0 and labels:
                axes.set_ylabel(labels[i], fontsize=fontsize, rotation=0, ha="right", va="center")
            if captions:
                axes.set_xlabel(captions[i][j], fontsize=6.5, labelpad=1)


def samples(images: Tensor, *, columns: int = 8) -> Picture:
    """Draw a grid of images in [-1, 1], shape (B, C, H, W)."""
    rows = images.split(columns)
    figure = new_figure(columns * 0.8, len(rows) * 0.8)
    fill(figure, rows, columns=columns)
    return Picture(figure)


def progress(taken: Sequence[tuple[int, Tensor]], *, rows: int = 8) -> Picture:
    """Draw samples over the course of training: a row for each time they were taken, all from the same noise.

    Arguments:
        taken: (step, images), images in [-1, 1], shape (B, C, H, W).
        rows: at most so many are shown, spread evenly, the first and the last among them.
    """
    if not taken:
        raise ValueError("There are no samples to draw: none were taken.")
    chosen = torch.linspace(0, len(taken) - 1, min(rows, len(taken))).round().long().tolist()
    shown = [taken[k] for k in chosen]
    return Picture(_grid([list(images) for _, images in shown], labels=[f"step {step}" for step, _ in shown]))


def batch(process: ForwardProcess, batch: Fields | NoisyBatch, *, count: int = 8) -> Picture:
    """Draw what a batch holds: x_t as the network gets it, and x_0, recovered from x_t and the batch's target.

    Between them the earlier states of a pair, x_r and x_s, as far as the batch has them and their times.

    Arguments:
        batch: as the process makes it, with the fields x_t, t and at least one of `diffaug.targets.TARGETS`.
        count: how many images.
    """
    fields = getattr(batch, "_fields", ())
    source = next((name for name in ("x_0", "v", "flow", "F", "epsilon", "velocity", "score") if name in fields), None)
    if not {"x_t", "t"} <= set(fields) or source is None:
        raise ValueError(f"A picture of a batch wants its fields x_t, t and a target, but it has {list(fields)}.")
    x_t, t, target = (getattr(batch, name)[:count].detach().cpu() for name in ("x_t", "t", source))
    if x_t.ndim != 4:
        raise ValueError(f"A picture of a batch wants images of shape (B, C, H, W), but x_t is {tuple(x_t.shape)}.")
    schedule = process.schedule.at_shape(x_t.shape)
    alpha, sigma = schedule.alpha_sigma(t, torch.float64)
    log_snr = schedule.log_snr(t, torch.float64)
    shown = {"$x_t$": x_t.float() / _display_scale(alpha, sigma).view(-1, 1, 1, 1)}
    titles = _titles(t, log_snr)
    numbers = {"t": t, "alpha": alpha, "sigma": sigma, "log_snr": log_snr}
    for name in ("r", "s"):
        if {name, f"x_{name}"} <= set(fields):
            time, state = (getattr(batch, field)[:count].detach().cpu() for field in (name, f"x_{name}"))
            clean = time < 0
            ends = schedule.alpha_sigma(torch.where(clean, 0, time) if schedule.discrete else time, torch.float64)
            scale = torch.where(clean, 1.0, _display_scale(*ends)).view(-1, 1, 1, 1)
            shown[f"$x_{name}$"], numbers[name] = state.float() / scale, time
            titles = [f"{title}\n{name} = {at:.3g}" for title, at in zip(titles, time.tolist(), strict=True)]
    shown["$x_0$"] = convert(schedule, source, "x_0", target.float(), x_t.float(), t, process.sigma_data)
    figure = _grid([list(x) for x in shown.values()], titles, list(shown))
    return Picture(figure, tuple(numbers), table(*numbers.values()))


def preview(process: ForwardProcess, images: Tensor, t: Tensor, pixels: Tensor, *, columns: int = 9) -> Picture:
    """Draw one page of a dataset before training: images as read, three of them noised, their values, the times.

    Arguments:
        images: as the dataset yields them, shape (B, C, H, W).
        t: times as training draws them, shape (N,).
        pixels: values in [-1, 1], or of latents, any shape.
    """
    schedule = process.schedule.at_shape(images.shape)
    scaled = process.scale(images)
    figure = new_figure(1.05 * columns + 0.6, 8.2)
    parts: Any = figure.subfigures(3, 1, height_ratios=(1.35, 3.6, 2.6))
    read, noised, numbers = parts
    read.suptitle("images as read, after the transform", fontsize=9)
    fill(read, [scaled[:columns]], columns=columns)
    noised.suptitle("noised along one path each", fontsize=9)
    states, titles, _ = _along_path(process, images[:3], columns)
    fill(noised, states, titles, fontsize=7)
    left, right = numbers.subplots(1, 2)
    pixels = pixels.double().flatten().cpu()
    reach = 1.0 if process.value_range else max(1.0, pixels.abs().max().item())  # latents have no range
    edges = whole_bins(pixels, -reach, reach, 64)
    of_pixels = _bars(left, pixels, edges)
    tidy(left, xlabel="pixel value, scaled to [-1, 1]" if process.value_range else "latents' value", ylabel="density")
    unit = schedule.to_unit(t.cpu(), torch.float64)
    ends = whole_bins(unit, 0.0, 1.0, 40)
    of_times = _bars(right, unit, ends)
    right.axhline(1, color="black", linestyle="--", linewidth=0.8, label="uniform")
    right.legend(frameon=False, fontsize=8, loc="upper right")
    room = 1.2 * max(1.0, of_times.max().item())  # for the legend, above the bars
    tidy(right, xlabel="unit time of t, as training draws it", ylabel="density", ylim=(0, room))
    rows = [("pixels", *row) for row in table(edges[:-1], edges[1:], of_pixels)]
    rows += [("unit_time", *row) for row in table(ends[:-1], ends[1:], of_times)]
    return Picture(figure, ("histogram", "low", "high", "density"), rows)


def _bars(axes: Any, values: Tensor, edges: Tensor) -> Tensor:
    """Draw a histogram, and return its densities."""
    heights, _ = torch.histogram(values, edges, density=True)
    axes.stairs(heights.numpy(), edges.numpy(), fill=True, color="0.6")
    return heights


def whole_bins(values: Tensor, low: float, high: float, most: int) -> Tensor:
    """Choose the edges of a histogram's bins over [low, high], float64, rising.

    Where the values are steps of one size, as those of 8-bit images or of timesteps, every bin holds equally many steps
    (the last at most as many): bins that hold now six of them, now seven, make a comb of smooth data.

    Arguments:
        values: float64, shape (N,).
        most: how many bins at most.
    """
    some = values[:: max(1, len(values) // 2**16)].unique()
    plain = torch.linspace(low, high, most + 1, dtype=torch.float64)
    step = some.diff().min().item() if len(some) > 1 else 0.0
    if step * 100 * most < high - low:
        return plain
    step = (some[-1] - some[0]).item() / round((some[-1] - some[0]).item() / step)
    places = (some - some[0]) / step
    if (places - places.round()).abs().max() > 1e-3:
        return plain
    first = some[0].item() - round((some[0].item() - low) // step) * step
    count = math.floor((high - first) / step + 1.001)
    if count < 8:
        return plain
    together = -(-count // most)
    steps = torch.arange(0, count + together, together, dtype=torch.float64).clamp_max(count)
    return first + (steps.unique() - 0.5) * step
