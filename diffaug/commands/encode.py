"""encode: a dataset decoded once, or encoded once to latents, into a store that data=store reads.

What made a store is written into it, by `fingerprint`. Another recipe for the same folder is refused with the lines
that differ; the same one goes on with what is missing.
"""

import json
import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import choice, flag, integer, refuse
from diffaug.data.module import DiffusionBase
from diffaug.data.recipe import differences
from diffaug.data.sources import are_datasets, as_list, look_at
from diffaug.data.wrapped import WrappedBase
from diffaug.encoding.autoencoder import folder_of
from diffaug.encoding.fingerprint import draws_at_random, fingerprint, list_files
from diffaug.encoding.module import VARIANTS, EncodingBase, Source, check_storable, read_row
from diffaug.encoding.space import check_space, plan
from diffaug.encoding.unwrap import unwrap
from diffaug.encoding.update import BESIDE, changed_files, check_kept, keep_rows, left_by_another, replace, write_files
from diffaug.images.items import split
from diffaug.loader.batch import Batch, collate
from diffaug.randomness.user_code import untouched_random_state
from diffaug.store.latents import DTYPES, Latents, summarise
from diffaug.store.layout import FORMAT, INFO, TEXT, Field, Part, read_info, write_info
from diffaug.store.shards import choose_shard_rows
from diffaug.training.checkpoint_io import lock

_STAGES = ("train", "val", "test")
_DRAWS = 1000  # of an image, at most
_OWN = ("image", "mean", "std", "pixels")


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
    if isinstance(variants, int):
        variants = tuple(map(str, range(integer("variants", variants, 1, _DRAWS))))
    else:
        for variant in variants or ("",):
            choice("each of variants", variant, VARIANTS)
    data.prepare_data()
    latents = Latents(data._noiser.encode, dtype, allow_rounding, pixels) if data.encodes else None
    device, whole = trainer.strategy.root_device, Path(out).expanduser()
    sources = _sources(data, keep, latents, variants, differ, device)
    flat = [source for of_stage in sources.values() for source in of_stage]
    info = {
        "format": FORMAT,
        "finished": False,
        "made_from": {**fingerprint(data, flat), "dtype": latents and dtype},
        "latents": None,
        "autoencoder": folder_of(data._noiser.encoder),
        "parts": {stage: [source.part for source in of_stage] for stage, of_stage in sources.items()},
    }
    root, changed, stale = whole, _changed(whole, info), False
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
    missing = writer.shards() if stale else writer.missing()
    rows = sum(flat[number].part.rows_of(shard) for number, shard in missing)
    total = sum(source.part.rows for source in flat)
    if trainer.is_global_zero:
        print(plan(root, flat, rows, total))
        check_space(root, flat, missing)
    with _alone(whole) if trainer.is_global_zero else nullcontext():
        if trainer.is_global_zero:
            if stale:
                shutil.rmtree(root, ignore_errors=True)
            for left in root.glob("*/.*.part"):  # by a run that was killed
                left.unlink(missing_ok=True)
            if missing:
                root.mkdir(exist_ok=True)
                write_info(root, info)
                write_files(root, flat)
        if missing:
            try:
                trainer.predict(writer, return_predictions=False)
            except SystemExit as error:  # as which Lightning hands on Ctrl-C
                if trainer.is_global_zero and isinstance(error.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt("What was finished stays, and the same command goes on.") from None
                raise
            finally:
                writer.abandon()
        if trainer.is_global_zero:
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
            kept = sum(int((one.kept >= 0).sum()) * len(one.part.variants) for one in flat if one.kept is not None)
            copied = f", {kept} of these from before" if kept else ""
            done = f"{whole} holds {total} rows, {rows} of them written now{copied}."
            print(f"{done} To train on it: data=store data.root={out}")


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
        for shard in range(source.part.shards):
            yield json.loads(source.part.sums(root, shard).read_text())


def _error(root: Path) -> float:
    return (read_info(root)["latents"] or {"largest_error": 0.0})["largest_error"]


def _sources(
    data: DiffusionBase,
    keep: Sequence[str] | None,
    latents: Latents | None,
    variants: Sequence[str],
    differ: Sequence[str],
    device: torch.device,
) -> dict[str, list[Source]]:
    found: dict[str, list[Source]] = {}
    draws = variants[0].isdecimal()
    for stage in _STAGES:
        for number in range(len(as_list(data._sources[stage]))):
            images = data.build(stage, number, look=False)
            check_storable(images)
            with untouched_random_state():
                _, extra = split(images.dataset[0], data.aligned.target, f"{images.name}[0]")
            for name in keep or ():
                choice("each of keep", name, tuple(extra))
            images.wanted = tuple(name for name in extra if keep is None or name in keep)
            of_stage = tuple(variants) if stage == "train" else ("0" if draws else "identity",)
            if not draws and of_stage != ("identity",):
                images.moved_by = images.moved_by or "variants"
            look_at(images, data.image_shape)
            if draws and stage == "train" and not draws_at_random(images):
                raise ValueError(
                    f"variants={len(variants)} stores so many draws of each training image, but reading {images.name} "
                    "draws no random numbers, so they would be alike: give data.transform one that draws, such as "
                    "torchvision's RandomCrop."
                )
            several = are_datasets(data._sources[stage])
            first = collate([read_row(images, 0, of_stage[0], "0")])
            fields = _fields(first, images.name)
            if latents is not None:
                fields = {**_encoded(data, latents, first.image.to(device)), **fields}
                del fields["image"]
            folder = f"{stage}-{number}" if several else stage
            row_bytes = sum(max(field.bytes, 1) for field in fields.values())  # of the first
            for name in differ:
                choice("each of differ", name, tuple(first.extra))
            shapes = getattr(images.dataset, "bucket_shapes", None)
            for name in fields:
                if name in _OWN and shapes is not None:
                    fields[name] = Field(fields[name].dtype, (fields[name].shape[0], -1, -1))
                elif name in differ:
                    fields[name] = Field(fields[name].dtype, (-1, *fields[name].shape[1:]))
            rows = len(images) * len(of_stage)
            part = Part(folder, rows, choose_shard_rows(rows, row_bytes), fields, of_stage, shapes and tuple(shapes))
            found.setdefault(stage, []).append(Source(images, part, list_files(images.dataset)))
    if not found:
        raise ValueError("This DataModule has no data for train, val or test: there is nothing to store.")
    return found


def _fields(batch: Batch, name: str) -> dict[str, Field]:
    """Return what rows a batch of one item makes, by name."""
    fields = {"image": _field(batch.image)}
    for key, value in batch.extra.items():
        texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
        if not (isinstance(value, Tensor) or texts) or key in _OWN or not re.fullmatch(r"\w[\w-]*", key):
            raise ValueError(
                f"{key!r} of {name} cannot be stored: beside the image, a store holds numbers, tensors of one shape "
                f"and texts, named by letters, digits and _ and not {', '.join(_OWN)}. Say what to keep: keep=label"
            )
        fields[key] = Field(TEXT) if texts else _field(value)
    return fields


def _encoded(data: DiffusionBase, latents: Latents, image: Tensor) -> dict[str, Field]:
    """Return what rows the encoder makes, and refuse one that draws."""
    once, again = (data._noiser.encode(image, (key,)).mean for key in range(2))
    if not torch.allclose(once, again, rtol=1e-3, atol=1e-5 * float(once.abs().max())):
        raise ValueError(
            "data.encoder draws random numbers: a store would keep one draw for ever. Give one that returns the "
            "distribution, with its mean and std (a diffusers VAE as it is): then every visit has a draw of its own."
        )
    made = latents.encode(image)
    fields = {name: _field(rows) for name, rows in {**made, **latents.rows(made)}.items()}
    latents.take_sums()
    return fields


def _field(rows: Any) -> Field:
    return Field(str(rows.dtype).removeprefix("torch."), tuple(rows.shape[1:]))


def _changed(root: Path, info: dict[str, Any]) -> list[str]:
    """List in what a store that is there already was made from something else, a line each."""
    if not (root / INFO).exists():
        if root.is_dir() and any(path.name != ".lock" for path in root.iterdir()):
            raise ValueError(f"out={root} holds other files, and no {INFO}: name a new folder.")
        return []
    before = read_info(root)
    changed = differences(info["made_from"], before["made_from"])
    if not changed and before["parts"] != info["parts"]:
        changed = [f"parts: {before['parts']} -> {info['parts']}"]
    return changed


def _refusal(root: Path, changed: list[str], of_files: list[str]) -> ValueError:
    if not changed:
        return ValueError(f"An update of out={root} was interrupted: update=true goes on with it.")
    way = "update=true makes the rows of files that have changed, and keeps the others. Or name" if of_files else "Name"
    return ValueError(
        f"The store out={root} was made from something else:\n  "
        + "\n  ".join(changed + of_files)
        + f"\n{way} a new folder, or remove this one."
    )
