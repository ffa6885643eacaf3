"""Images a second through a real loader: bare, with plain noising in the training step, and with diffaug.

    python benchmarks/datamodule.py --fashion FOLDER --photos FOLDER [--workers 1] [--rounds 15]

FOLDER is what data.root is for data=fashion_mnist and data=image_folder. The three take turns, epoch by epoch, over
the same dataset with the same number of workers; a table gives the medians of speeds and of each turn's ratios.

With noise on a CPU whose cores the workers need too, set OMP_WAIT_POLICY=passive: by default OpenMP's threads spin for
milliseconds after each parallel operation, whoever's it is, and the workers wait.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from forward import by_hand
from torch.utils.data import DataLoader, Dataset, Subset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta


def loaded(dataset: Dataset[Any], batch_size: int, workers: int) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def bare(loader: Iterable[Any]) -> None:
    for _ in loader:
        pass


def plain(loader: Iterable[Any]) -> None:
    noise = by_hand(torch.device("cpu"))
    for image, _ in loader:
        noise(image, image)


def ours(data: DiffusionDataModule, loader: Iterable[Any]) -> None:
    for batch in loader:
        data.noise(batch)


def compared(name: str, dataset: Any, batch_size: int, workers: int, rounds: int) -> None:
    data = DiffusionDataModule(
        dataset,
        process=ForwardProcess(LinearBeta()),
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    data.setup("fit")
    passes: dict[str, Callable[[], None]] = {
        "the loader alone": partial(bare, loaded(dataset, batch_size, workers)),
        "plain noising in the training step": partial(plain, loaded(dataset, batch_size, workers)),
        "diffaug": partial(ours, data, data.train_dataloader()),
    }
    spent: dict[str, list[float]] = {key: [] for key in passes}
    for turn in range(rounds + 1):
        for key, run in passes.items():
            start = time.perf_counter()
            run()
            if turn:  # the first turn starts workers and compiles
                spent[key].append(time.perf_counter() - start)
    base = spent["the loader alone"]
    waiting = os.environ.get("OMP_WAIT_POLICY", "the default")
    print(f"\n{name}: {len(dataset)} images, batches of {batch_size}, {workers} workers, OMP_WAIT_POLICY {waiting}\n")
    print("| | images a second | time over the loader alone |\n|---|---|---|")
    for key, times in spent.items():
        more = statistics.median(mine / bare - 1 for mine, bare in zip(times, base, strict=True))
        print(f"| {key} | {len(dataset) / statistics.median(times):,.0f} | {more * 100:+.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", help="a writable folder that holds Fashion-MNIST")
    parser.add_argument("--photos", help="a folder of photos")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.fashion:
        from torchvision.datasets import FashionMNIST
        from torchvision.transforms import PILToTensor

        dataset = FashionMNIST(options.fashion, train=True, download=True, transform=PILToTensor())
        compared("Fashion-MNIST", Subset(dataset, range(20000)), 128, options.workers, options.rounds)
    if options.photos:
        from diffaug.datasets.folder import ImageFolder

        compared("photos at 64x64", ImageFolder(options.photos, 64), 32, options.workers, options.rounds)


if __name__ == "__main__":
    main()
