"""The tables and the picture of benchmarks/gains.py, from its results: for each dataset, one dict for each seed."""

import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffaug.plots.picture import line_style, new_figure, tidy

Results = dict[str, list[dict[Any, Any]]]
BATCHES = [(when, size) for when in ("early", "late") for size in (32, 128)]


def tell(results: Results, coverages: Collection[str], ranks: Collection[str]) -> list[str]:
    """Write all tables, as lines of Markdown."""
    coverages = [name for name in coverages if name != "independent"]
    lines = tell_validation(results)
    for name, runs in results.items():
        lines += tell_variance(runs, [*coverages, *ranks], name) + tell_epochs(runs, coverages, name)
    return [
        *lines,
        *tell_training(results, [*coverages, *ranks], "Validation loss over independent's, %"),
        *tell_training(results, ranks, "Likewise, with a learning rate that falls to 0", "falling"),
        *tell_steps(results, ranks),
    ]


def average(values: Sequence[float], form: str = ".2f") -> str:
    """Write the mean and its standard error."""
    return f"{statistics.fmean(values):{form}} ± {error(values):{form}}"


def error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def tabulate(title: str, head: Sequence[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [f"\n**{title}**\n", f"| {' | '.join(['', *head])} |", "|---" * (len(head) + 1) + "|"]
    return lines + [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]


def tell_validation(results: Results) -> list[str]:
    rows: dict[str, tuple[str, str, float]] = {
        "validation loss of the last network": ("loss", ".4f", 1),
        "sd of the changes between epochs, x 1000: 16 draws of each image": ("spread true", ".2f", 1000),
        "likewise: one fixed draw of each": ("spread fixed", ".2f", 1000),
        "likewise: one fresh draw of each": ("spread fresh", ".2f", 1000),
        "changes of the right sign, %: fixed": ("sign fixed", ".0f", 100),
        "likewise: fresh": ("sign fresh", ".0f", 100),
        "sd of one network's loss, validated again and again, x 1000: fresh": ("frozen fresh", ".2f", 1000),
        "likewise: fixed, each time by another seed": ("frozen level", ".2f", 1000),
    }
    cells = {
        name: [average([scale * run[key] for run in runs], form) for runs in results.values()]
        for name, (key, form, scale) in rows.items()
    }
    cells["likewise: fixed, by the same seed"] = ["0"] * len(results)
    cells["images that fresh draws need to come within 5 % of the fixed spread, median"] = [
        f"{statistics.median(run['images'] for run in runs):,.0f}" for runs in results.values()
    ]
    return tabulate("Validation", list(results), cells)


def compare(runs: list[Any], column: tuple[str, Any], name: str, which: int) -> list[float]:
    """Return the variance of the gradient (0) or the loss (1) over independent's, seed by seed."""
    return [run[column][name][which] / run[column]["independent"][which] for run in runs]


def tell_variance(runs: list[Any], names: Collection[str], title: str) -> list[str]:
    """Tell the variances of batches: independent's as they are, the others over them."""
    lines = []
    for which, of in enumerate(("gradient", "loss")):
        if which:
            label = "independent: sd, x 1000"
            plain = [[1000 * run[c]["independent"][1] ** 0.5 for run in runs] for c in BATCHES]
        else:
            label = "independent: trace of the covariance over the mean's squared norm, median"
            plain = [[run[c]["independent"][0] / run["mean", c[0]] for run in runs] for c in BATCHES]
        rows = {label: [average(cell, ".1f") if which else f"{statistics.median(cell):.1f}" for cell in plain]}
        rows |= {name: [average(compare(runs, column, name, which)) for column in BATCHES] for name in names}
        head = [f"{when}, batch {size}" for when, size in BATCHES]
        lines += tabulate(f"{title}: variance of the {of}, over independent's", head, rows)
    return lines


def tell_epochs(runs: list[Any], names: Collection[str], title: str) -> list[str]:
    columns = [(which, when) for which in (0, 1) for when in ("early", "late")]
    rows = {name: [average(compare(runs, (when, "epochs"), name, which)) for which, when in columns] for name in names}
    head = [f"{('gradient', 'loss')[which]}, {when}" for which, when in columns]
    return tabulate(f"{title}: variance of sums over 8 epochs of the same 64 images, over independent's", head, rows)


def differ(run: Any, name: str, rate: str = "curve") -> Any:
    """By how many percent the validation losses lie over independent's, epoch by epoch."""
    return 100 * (np.array(run[rate, name]) / np.array(run[rate, "independent"]) - 1)


def tell_training(results: Results, names: Collection[str], title: str, rate: str = "curve") -> list[str]:
    parts = {"first tenth": (0, 0.1), "around a quarter": (0.2, 0.3), "last tenth": (0.9, 1)}
    rows: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        for runs in results.values():
            for low, high in parts.values():
                epochs = slice(math.floor(low * runs[0]["epochs"]), math.ceil(high * runs[0]["epochs"]))
                rows[name].append(average([float(differ(run, name, rate)[epochs].mean()) for run in runs]))
    return tabulate(title, [f"{name}, {part}" for name in results for part in parts], rows)


def count_steps(run: Any, name: str) -> float:
    """Return the share, in %, of the steps after which independent noise is where this way's last tenth is."""
    last = np.array(run["curve", name])[-math.ceil(run["epochs"] / 10) :].mean()
    return 100 * (1 + int(np.argmax(np.array(run["curve", "independent"]) <= last))) / run["epochs"]


def tell_steps(results: Results, names: Collection[str]) -> list[str]:
    rows = {
        name: [average([count_steps(run, name) for run in runs], ".0f") for runs in results.values()] for name in names
    }
    return tabulate("Steps after which independent noise is where these end, %", list(results), rows)


def draw_picture(results: Results, names: Sequence[str], ranks: Sequence[str], path: Path) -> None:
    """Draw for each dataset: one run's last validations, the variances of a late batch, what ranks alike cost."""
    figure = new_figure(12, 3.4 * len(results))
    labels = {"true": "16 draws of each image", "fresh": "one fresh draw of each", "fixed": "one fixed draw of each"}
    for (title, runs), row in zip(results.items(), figure.subplots(len(results), 3, squeeze=False), strict=True):
        for number, (kind, label) in enumerate(labels.items()):
            row[0].plot(runs[0]["validations"][kind], label=label, **line_style(number))
        tidy(row[0], title=f"{title}: one run's last epochs", xlabel="epoch, of these", ylabel="validation loss")
        row[0].margins(y=0.3)  # room for the legend
        row[1].axvline(1, color="0.5", linewidth=0.8)
        for number, of in enumerate(("gradient", "loss")):
            ratios = [compare(runs, BATCHES[-1], name, number) for name in names]
            means, places = [statistics.fmean(r) for r in ratios], [i + 0.24 * number - 0.12 for i in range(len(names))]
            style: Any = {"fmt": "os"[number], "color": line_style(number)["color"], "label": of}
            row[1].errorbar(means, places, xerr=[error(r) for r in ratios], **style)
        row[1].set_yticks(range(len(names)), names)
        row[1].invert_yaxis()
        tidy(row[1], title=f"{title}: variance, late, batch of 128", xlabel="over independent's", xscale="log")
        row[1].margins(x=0.05)
        for number, name in enumerate(ranks):
            percent = np.mean([differ(run, name) for run in runs], 0)
            window = max(1, len(percent) // 20)
            row[2].plot(np.convolve(percent, np.ones(window) / window, "valid"), label=name, **line_style(number + 1))
        row[2].axhline(0, color="0.5", linewidth=0.8)
        tidy(row[2], title=f"{title}: what ranks alike cost", xlabel="epoch", ylabel="validation loss, % more")
        for axes in row:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    Image.open(path).convert("RGB").quantize(48).save(path, optimize=True)  # a third of the bytes
