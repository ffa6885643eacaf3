"""A folder of photos read, cropped and resized, on one thread: diffaug against torchvision.

    python benchmarks/folder.py PHOTOS [--images 160] [--turns 9] [--sizes 64 128 256] [--markdown FILE]

PHOTOS holds subfolders of photos, as torchvision's ImageFolder wants them. The contender is the fastest of
torchvision's own ways with Pillow: ImageFolder and the transforms of v2, which resize uint8 as it is (bilinear by
default, which is less work than diffaug's bicubic).

The two take turns, batch by batch, now the one and now the other first; what a batch takes is the median over the
turns, in seconds of the processor, and the sums over the batches are compared. "Stacked" is what a loader does next:
torchvision's images are views, whose bytes are put in order only then; diffaug's are in order. The first turn, which
reads the files from the disk, does not count.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets
from torchvision.transforms import v2

from diffaug.datasets.folder import ImageFolder

BATCH = 16


def read(dataset: Any, indices: range) -> tuple[float, float]:
    """Read some images and stack them; return the seconds after each of the two."""
    start = time.process_time()
    images = [dataset[index][0] for index in indices]
    alone = time.process_time() - start
    torch.stack(images)
    return alone, time.process_time() - start


def measure(contenders: dict[str, Any], images: int, turns: int) -> dict[str, tuple[float, float]]:
    """Return each contender's milliseconds an image: alone, and stacked."""
    batches = [range(first, min(first + BATCH, images)) for first in range(0, images, BATCH)]
    spent: dict[str, list[list[tuple[float, float]]]] = {name: [[] for _ in batches] for name in contenders}
    for turn in range(turns + 1):
        for number, batch in enumerate(batches):
            for name in list(contenders)[:: 1 if turn % 2 else -1]:
                seconds = read(contenders[name], batch)
                if turn:
                    spent[name][number].append(seconds)

    def total(name: str, which: int) -> float:
        medians = (statistics.median(turn[which] for turn in of_batch) for of_batch in spent[name])
        return sum(medians) / images * 1000

    return {name: (total(name, 0), total(name, 1)) for name in contenders}


def compare(folder: str, size: int, images: int, turns: int) -> str:
    """Return one line of the table."""
    transform = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    theirs = datasets.ImageFolder(folder, transform, loader=datasets.folder.pil_loader)
    ours = ImageFolder(folder, size)
    spread = torch.randperm(len(ours), generator=torch.Generator().manual_seed(0))[:images].tolist()
    paths = [ours.paths[index] for index in spread]
    theirs.samples = [(path, 0) for path in paths]  # the same files in the same order
    times = measure({"torchvision": theirs, "diffaug": ours.only(spread)}, len(spread), turns)
    rates = [f"{1000 / alone:.0f} | {1000 / stacked:.0f}" for alone, stacked in times.values()]
    ratios = [a / b for a, b in zip(times["torchvision"], times["diffaug"], strict=True)]
    return f"| {size} | {' | '.join(rates)} | {ratios[0]:.2f} | {ratios[1]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="a folder of subfolders of photos")
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"| side | torchvision, images a second | stacked | diffaug | stacked | diffaug / it | stacked |\n{'|---' * 7}|"
    ]
    print(lines[0])
    for size in options.sizes:
        lines.append(compare(options.photos, size, options.images, options.turns))
        print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
