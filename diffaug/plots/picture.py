"""Picture, a matplotlib Figure with its numbers, and the helpers that all pictures share.

matplotlib is imported inside the functions, without pyplot: no window, no global state, no cost where it is not used.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffaug.checks import refuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
LINES = (
    {"color": "#000000", "linestyle": "-"},
    {"color": "#d55e00", "linestyle": "--"},
    {"color": "#0072b2", "linestyle": "-."},
    {"color": "#8a8a8a", "linestyle": "-"},
    {"color": "#009e73", "linestyle": ":"},
    {"color": "#cc79a7", "linestyle": (0, (6, 1, 1, 1, 1, 1))},
    {"color": "#e69f00", "linestyle": (0, (3, 1))},
)
"""One style a line, told apart by its dashes where the colours print as one grey (colours: Okabe and Ito 2008)."""


@dataclass(frozen=True)
class Picture:
    """A figure and the numbers it shows.

    Attributes:
        figure: a matplotlib Figure, to be changed at will.
        columns: the names of the numbers; none where the picture shows images alone.
        rows: the numbers, one for each column.
    """

    figure: "Figure"
    columns: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def save(self, path: str | Path) -> Path:
        """Write the picture, .png, .svg or .pdf, and beside it its numbers as .csv; the folder is made if need be."""
        path = check_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the date, the same picture is the same file.
        dated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[path.suffix.lower()]
        self.figure.savefig(path, dpi=150, metadata=dated)
        if self.columns:
            write_csv(path.with_suffix(".csv"), self.columns, self.rows)
        return path


def check_path(path: str | Path) -> Path:
    """Refuse a path that no picture can be written to."""
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise refuse("out", str(path), f"a file that ends in {', '.join(KINDS)}")
    return path


def table(*columns: Tensor) -> list[tuple[Any, ...]]:
    """Return the rows of a table, from its columns of shape (N,)."""
    return list(zip(*(column.tolist() for column in columns), strict=True))


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write numbers to their last digit."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([columns, *rows])


def new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "diffaug[train]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def line_style(number: int, many: int = 2) -> dict[str, Any]:
    """Return the style of one of several lines; after the last they repeat, thinner."""
    return {**LINES[number % len(LINES)], "linewidth": (1.6 if many > 1 else 1.8) / (1 + number // len(LINES))}


def tidy(axes: Any, **labels: Any) -> None:
    """Label the axes, and take away what says nothing."""
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


def show(axes: Any, image: Tensor) -> None:
    """Draw one image in [-1, 1], shape (C, H, W), on axes without ticks."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.75", linewidth=0.5)  # or white edges run into the page
    pixels = ((image.float().cpu() + 1) / 2).clamp(0, 1)
    if len(pixels) == 3:
        axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        axes.imshow(pixels[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
