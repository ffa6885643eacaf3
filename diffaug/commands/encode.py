"""encode: a dataset decoded once, or encoded once to latents, into a store that data=store reads.

What made a store is written into it, by `fingerprint`. Another recipe for the same folder is refused with the lines
that differ; the same one goes on with what is missing.
"""

import json
import shutil
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from diffaug.checks import choice, flag, refuse
from diffaug.datamodules.module import DiffusionBase
from diffaug.datamodules.recipe import differences
from diffaug.datamodules.wrapped import WrappedBase
from diffaug.encoding.autoencoder import folder_of
from diffaug.encoding.disk_space import check_space, plan
from diffaug.encoding.fingerprint import fingerprint
from diffaug.encoding.splits import choose_splits
from diffaug.encoding.unwrap import unwrap
from diffaug.encoding.update import (
    BESIDE,
    changed_files,
    check_kept,
    check_there,
    describe_splits,
    keep_rows,
    left_by_another,
    replace,
    write_files,
)
from diffaug.encoding.writing import EncodingBase, Source
from diffaug.images.roles import spell
from diffaug.store.latents import DTYPES, Latents, summarise
from diffaug.store.layout import FORMAT, INFO, read_info, splits_of, write_info
from diffaug.store.reader import Store
from diffaug.training.checkpoint_io import lock, quote_override
from diffaug.training.errors import Told


def encode(
    data: DiffusionBase | WrappedBase,
    out: str,
    trainer: Any,
    module: type[EncodingBase],
    *,
    keep: Sequence[str] | None = None,
    dtype: str = "float32",
    allow_rounding: bool = False,
    variants: Sequence[str] | int = ("identity",),
    differ: Sequence[str] = (),
    pixels: bool = False,
    update: bool = False,
) -> None:
    """Write the datasets of a DataModule as a store; rank 0 prints what it comes to before, and after.

    Arguments:
        data: the DataModule. Its ``transform`` and ``eval_transform`` are applied; of another one that is wrapped the
            datasets of its loaders are stored, as `diffaug.encoding.unwrap` takes them out.
        out: the folder, made here; a store of the same recipe in it is gone on with.
        trainer: of any number of ranks.
        module: the LightningModule that writes, of the trainer's package.
        keep: which parts of an item are stored beside the image; None is all.
        dtype: of latents, which are stored in place of the images where the DataModule has an ``encoder``.
        allow_rounding: whether rounding to that may be by more than the posterior's deviation.
        variants: what each training image is stored as, "identity" and "hflip"; or how many draws of it are stored,
            where reading it draws random numbers (a random crop), which is refused otherwise. Each is encoded as an
            image of its own, and one of them is drawn by key at every visit. Of the other stages one is stored.
        differ: which parts beside the image differ in length, their first dimension, from row to row.
        pixels: whether the images are stored beside their latents too, as a part of this name.
        update: whether a store of other files is brought up to date: see `diffaug.encoding.update`.

    Raises:
        ValueError: another recipe made the store, or something cannot be stored.
        OSError: the disk is full, or would be.
    """
    if isinstance(data, WrappedBase):
        data = unwrap(data, trainer)
    if not isinstance(data, DiffusionBase):
        raise refuse("data", type(data).__name__, "a DiffusionDataModule, which wraps another one by its wrap")
    if data.device_transform is not None:
        raise ValueError(
            "data.device_transform is of the training batches, drawn anew for each: leave it out here and set it with "
            "data=store."
        )
    flag("update", update)
    choice("dtype", dtype, DTYPES)
    if flag("pixels", pixels) and not data.encodes:
        raise ValueError("pixels=true keeps images beside their latents, but there is no data.encoder to make any.")
    if dtype != "float32" and not data.encodes:
        raise ValueError(
            f"dtype={dtype} is of latents, but there is no data.encoder to make any, and images are stored as they "
            "come. Leave it out."
        )
    data.prepare_data()
    latents = Latents(data._noiser.encode, dtype, allow_rounding, pixels) if data.encodes else None
    device, whole = trainer.strategy.root_device, Path(out).expanduser()
    sources = choose_splits(data, latents, device, keep=keep, variants=variants, differ=differ)
    flat = [source for of_stage in sources.values() for source in of_stage]
    info = {
        "format": FORMAT,
        "finished": False,
        "made_from": {**fingerprint(data, flat), "dtype": latents and dtype},
        "latents": None,
        "autoencoder": folder_of(data._noiser.encoder),
        "splits": {stage: [source.split for source in of_stage] for stage, of_stage in sources.items()},
    }
    root, changed, stale = whole, _changed(whole, info), False
    of_no_use: list[Path] = []  # what was tried before, with other options, and came to nothing
    if not (whole / BESIDE).exists() and (whole / INFO).exists():
        if not changed:
            check_there(whole, flat, latents, device)
        elif _holds_no_row(whole):
            changed, of_no_use = [], [whole / split.folder for split in splits_of(read_info(whole))]
    if update and (changed or (whole / BESIDE).exists()):
        stale = left_by_another(whole, info)
        if stale is None:
            if trainer.is_global_zero:
                with _alone(whole):
                    replace(whole)
                print(f"{whole}: an interrupted update is in place now. For later changes, run it again.")
            return
        flat, root = keep_rows(whole, info, flat), whole / BESIDE
        check_kept(flat, latents, device)
    elif changed or (whole / BESIDE).exists():
        raise _refusal(whole, changed, changed_files(whole, flat))
    options = {"pin_memory": torch.cuda.is_available(), **data.loader_options}
    writer = module(root, flat, batch_size=data.batch_size, options=options, latents=latents)
    missing = writer.shards() if stale or of_no_use else writer.missing()
    rows, total, first = _count(flat, missing), sum(source.split.rows for source in flat), trainer.is_global_zero
    if first:
        print(plan(root, flat, rows, total))
        check_space(root, flat, missing)
    with _alone(whole) if first else nullcontext():
        if first:
            for folder in [root] if stale else of_no_use:
                shutil.rmtree(folder, ignore_errors=True)
            for left in root.glob("*/.*.part"):  # by a run that was killed
                left.unlink(missing_ok=True)
        if first and missing:
            root.mkdir(exist_ok=True)
            write_info(root, info)
            write_files(root, flat)
        if missing:
            _write_rows(trainer, writer, flat, total)
        if not first:
            return
        if writer.missing():
            raise ValueError(f"{root} is not finished: {len(writer.missing())} shards are missing. Run it again.")
        if latents is not None:
            info["latents"] = said = summarise(_read_sums(root, next(iter(sources.values()))))
            if root != whole:  # of rows that were copied the error is not known anew
                said["largest_error"] = max(said["largest_error"], _error(whole))
            deviation = said["median_deviation"]
            beside = "" if deviation is None else f", where the posterior's median deviation is {deviation:.3g}"
            print(f"The largest error of rounding to {dtype} is {said['largest_error']:.3g}{beside}")
        write_info(root, {**info, "finished": True})
        if root != whole:
            replace(whole)
        kept = sum(int((one.kept >= 0).sum()) * len(one.split.variants) for one in flat if one.kept is not None)
        made = f": {total - kept} encoded, {kept} copied from before." if kept else f", {rows} of them written now."
        done = f"{whole} holds {total} rows{made}"
        again = f" 'data.images={spell(Store(str(whole)).roles)}'" if data.aligned.beside else ""
        print(f"{done} To train on it: data=store {quote_override('data.root', out)}{again}")


def _count(sources: Sequence[Source], shards: Iterable[tuple[int, int]]) -> int:
    """Count the rows of shards, each by the number of its source and its own."""
    return sum(len(sources[number].split.rows_of(shard)) for number, shard in shards)


def _write_rows(trainer: Any, writer: EncodingBase, sources: Sequence[Source], total: int) -> None:
    """Write what is missing; where that is told to end, say what of it was finished."""
    try:
        trainer.predict(writer, return_predictions=False)
    except BaseException as error:  # Ctrl-C as Lightning's SystemExit; SIGTERM as any, having ended workers too
        interrupted = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
        if not interrupted and not trainer.received_sigterm:
            if trainer.is_global_zero and trainer.progress_bar_callback is not None:
                print(file=sys.stderr)  # below the bar
            raise
        told = signal.SIGINT if interrupted else signal.SIGTERM
        if not trainer.is_global_zero:
            raise SystemExit(128 + told) from error
        finished = total - _count(sources, writer.missing())
        done = f"What was finished stays, {finished} of {total} rows, and the same command goes on."
        raise Told(told, done) from error
    finally:
        writer.abandon()


@contextmanager
def _alone(root: Path) -> Generator[None]:
    """Make the folder, and refuse a second run in it. The system ends the lock with the process."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a") as file:
        if lock(file) is False:
            raise ValueError(f"Another run is writing to out={root}: let it end, or name another folder.")
        yield


def _read_sums(root: Path, sources: list[Source]) -> Iterator[dict[str, Any]]:
    for source in sources:
        for shard in range(source.split.shards):
            yield json.loads(source.split.sums(root, shard).read_text())


def _error(root: Path) -> float:
    return (read_info(root)["latents"] or {"largest_error": 0.0})["largest_error"]


def _changed(root: Path, info: dict[str, Any]) -> list[str]:
    """List in what a store that is there already was made from something else, a line each."""
    if not (root / INFO).exists():
        if root.is_dir() and any(path.name != ".lock" for path in root.iterdir()):
            raise ValueError(f"out={root} holds other files, and no {INFO}: name a new folder.")
        return []
    before = read_info(root)
    changed = differences(info["made_from"], before["made_from"])
    if not changed and before["splits"] != info["splits"]:
        changed = differences(describe_splits(info), describe_splits(before))
    return changed


def _holds_no_row(root: Path) -> bool:
    """Return whether a store was begun, and no shard of it is whole."""
    info = read_info(root)
    shards = ((split, shard) for split in splits_of(info) for shard in range(split.shards))
    return not info["finished"] and all(split.fault(root, shard) for split, shard in shards)


def _refusal(root: Path, changed: list[str], of_files: list[str]) -> ValueError:
    if not changed:
        return ValueError(f"An update of out={root} was interrupted: update=true goes on with it.")
    way = "update=true makes the rows of files that have changed, and keeps the others. Or name" if of_files else "Name"
    return ValueError(
        f"The store out={root} was made from something else:\n  "
        + "\n  ".join(of_files + changed)
        + f"\n{way} a new folder, or remove this one."
    )
