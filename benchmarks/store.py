"""Images a second from a store and from the folder it was made of, and rows of 16 KiB from a store and from .npz files.

    python benchmarks/store.py [--photos FOLDER] [--sizes 64 256] [--rows 10000] [--rounds 5]

One process reads, on one core, what it has read once before. The two take turns; a table gives the medians of their
speeds and of each turn's ratio. Without --photos 100 pictures of 500 x 375 are made.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.commands.encode import encode
from diffaug.pytorch_lightning import Encoding, image_folder, store
from diffaug.store.reader import Store

PROCESS = ForwardProcess(LinearBeta(), compile=False)


class Archives(Dataset[Any]):
    """A folder of .npz files, one a row, as they are commonly kept."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.npz"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.from_numpy(np.load(self.paths[index])["latents"])}


def speed(loader: Iterable[Any], seconds: float) -> float:
    """Return images a second, over whole passes of so long at least."""
    count, began = 0, time.perf_counter()
    while not count or time.perf_counter() - began < seconds:
        for batch in loader:
            count += len(batch["image"] if isinstance(batch, dict) else batch.image)
    return count / (time.perf_counter() - began)


def compared(name: str, one: Callable[[], float], other: Callable[[], float], rounds: int) -> str:
    one(), other()
    turns = [(one(), other()) for _ in range(rounds)]
    ratio = statistics.median(b / a for a, b in turns)
    plain, ours = (statistics.median(column) for column in zip(*turns, strict=True))
    return f"| {name} | {plain:,.0f} | {ours:,.0f} | {ratio:.0f} |"


def written(data: DiffusionDataModule, out: Path) -> str:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    encode(data, str(out), pl.Trainer(accelerator="cpu", enable_model_summary=False, **quiet), Encoding)
    return str(out)


def loader(data: DiffusionDataModule) -> Any:
    data.setup("fit")
    return data.train_dataloader()


def make_photos(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    folder.mkdir()
    for i in range(100):
        coarse = Image.fromarray(draw.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, seconds, rows = options.rounds, options.seconds, []
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        photos = options.photos or make_photos(here / "photos")
        for size in options.sizes:
            folder = {"root": str(photos), "image_size": size, "process": PROCESS, "batch_size": 64}
            out = written(image_folder(**folder), here / str(size))
            plain, ours = loader(image_folder(**folder)), loader(store(root=out, process=PROCESS, batch_size=64))
            title = f"photos at {size} x {size}: folder, store"
            rows.append(compared(title, lambda a=plain: speed(a, seconds), lambda b=ours: speed(b, seconds), rounds))
        latents = torch.randn(options.rows, 4, 32, 32)
        process = ForwardProcess(LinearBeta(), compile=False, value_range=None)
        out = written(DiffusionDataModule(TensorDataset(latents), process=process), here / "latents")
        (here / "npz").mkdir()
        for i, row in enumerate(latents):
            np.savez(here / "npz" / f"{i:06}.npz", latents=row.numpy())
        apart, ours = (
            DataLoader(dataset, 64, shuffle=True, generator=torch.Generator())
            for dataset in (Archives(here / "npz"), Store(out))
        )
        title = f"{options.rows:,} random rows of 16 KiB: .npz files, store"
        rows.append(compared(title, lambda: speed(apart, 0), lambda: speed(ours, 0), rounds))
    print("\n| what | before | store | ratio |\n|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
