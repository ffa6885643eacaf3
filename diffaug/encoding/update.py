"""A store brought up to date: rows of files that did not change are copied, the others are made; and then it is put in
the old one's place.

The new store is made beside the old one, in a hidden folder of it, as any other: interrupted, it is gone on with. Only
when it is whole are its splits moved to their places, store.json last.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaug.datamodules.recipe import differences
from diffaug.datamodules.sources import spread_indices
from diffaug.datasets.atomic_file import open_whole
from diffaug.encoding.fingerprint import LOOKED_AT
from diffaug.encoding.writing import Source
from diffaug.store.latents import Latents
from diffaug.store.layout import INFO, Split, buckets_of, read_info, splits_of, write_info
from diffaug.store.reader import Rows

BESIDE = ".update"
_OF_FILES = ("images", "files", "bucket_of", "sizes and times of the files", "items looked at")
_NAMED = 3


def describe_rows(split: Split) -> dict[str, Any]:
    """Say what a row of a split is, in plain types, to be compared a line each. No field's name has a space."""
    return {
        f"fields of {split.folder}": list(split.fields),
        **{f"{split.folder}.{name}": f"{of.dtype} {list(of.shape)}" for name, of in split.fields.items()},
        f"variants of {split.folder}": list(split.variants),
    }


def describe_splits(info: Mapping[str, Any]) -> dict[str, Any]:
    """Say all of the splits of a store, likewise."""
    said: dict[str, Any] = {"splits": [split.folder for split in splits_of(info)]}
    for split in splits_of(info):
        shapes = split.bucket_shapes and [list(shape) for shape in split.bucket_shapes]
        said |= {f"rows of {split.folder}": split.rows, f"rows of a shard of {split.folder}": split.shard_rows}
        said |= {**describe_rows(split), f"buckets of {split.folder}": shapes}
    return said


def files_of(root: Path, split: Split) -> Path:
    """Return the file that lists what a split was read from."""
    return root / split.folder / "files.jsonl"


def write_files(root: Path, sources: list[Source]) -> None:
    """Write what each split is read from beside it."""
    for source in sources:
        (root / source.split.folder).mkdir(parents=True, exist_ok=True)
        bucket_of = getattr(source.images.dataset, "bucket_of", None)
        if bucket_of is not None:
            with open_whole(buckets_of(root, source.split)) as file:
                np.save(file, np.asarray(bucket_of, "<i8"))
        if source.files is not None:
            with open_whole(files_of(root, source.split)) as file:
                file.writelines(f"{line}\n".encode() for line in source.files)


def _read_files(root: Path, split: Split) -> list[str] | None:
    path = files_of(root, split)
    return path.read_text().splitlines() if path.is_file() else None


def changed_files(root: Path, sources: list[Source]) -> list[str]:
    """Say which files are others than those that a store was made from, a line for each split and kind of change."""
    said = []
    for source in sources:
        before, now = _read_files(root, source.split), source.files
        if before is None or now is None or before == now:
            continue
        old, new = ({name: rest for name, *rest in map(json.loads, lines)} for lines in (before, now))
        kinds = {
            "new": [name for name in new if name not in old],
            "changed": [name for name in new if name in old and new[name] != old[name]],
            "gone": [name for name in old if name not in new],
        }
        for kind, names in kinds.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            said += [f"{source.split.folder}, {kind}: {', '.join(names[:_NAMED])}{more}"] if names else []
    return said


def keep_rows(root: Path, info: dict[str, Any], sources: list[Source]) -> list[Source]:
    """Say of each item of a new store whether the one at ``root`` has its row.

    Raises:
        ValueError: something else than files has changed, or the dataset names no files.
    """
    before = read_info(root)
    skipped = {f"{source.split.folder}.{key}" for source in sources for key in _OF_FILES}
    changed = [
        line for line in differences(info["made_from"], before["made_from"]) if line.split(": ")[0] not in skipped
    ]
    splits = {split.folder: split for split in splits_of(before)}
    kept, of_fields = [], []
    for source in sources:
        split, old = source.split, splits.get(source.split.folder)
        now, then = source.files, None if old is None else _read_files(root, old)
        if now is None:
            raise ValueError(
                f"update=true goes by files, of which {source.images.name} names none: it must list them as `paths`, "
                "or as `samples`, as torchvision's folders do. Name a new folder, out=."
            )
        if old is None or then is None:
            kept.append(source)
            continue
        if (old.fields, old.variants) != (split.fields, split.variants):
            of_fields += differences(describe_rows(split), describe_rows(old))
        there = {line: item for item, line in enumerate(then)}
        items = np.fromiter((there.get(line, -1) for line in now), np.int64, len(now))
        kept.append(_of_before(source, root, old, items))
    changed = changed or of_fields
    if changed:
        raise ValueError(
            f"update=true takes other files, but the store out={root} was made from something else:\n  "
            + "\n  ".join(changed)
            + "\nName a new folder, or remove this one."
        )
    return kept


def _of_before(source: Source, root: Path, old: Split, items: NDArray[np.int64]) -> Source:
    """Give a source the rows of a split that is there, by each item's number in it, but for those of damaged shards."""
    for shard in range(old.shards):
        if old.fault(root, shard):
            damaged = {row // len(old.variants) for row in old.rows_of(shard)}
            items[np.isin(items, [*damaged])] = -1
    return source._replace(before=Rows(root, old), kept=items)


def check_there(root: Path, sources: list[Source], latents: Latents | None, device: torch.device) -> None:
    """Refuse to go on with a store whose rows, of those that are there, come out as others when they are made again."""
    every = [_of_before(one, root, one.split, np.arange(one.split.items)) for one in sources]
    check_kept(every, latents, device)


def check_kept(sources: list[Source], latents: Latents | None, device: torch.device) -> None:
    """Make some of the rows that are kept again, and refuse to keep them where they come out as others."""
    for source in sources:
        if source.before is None or source.kept is None:
            continue
        held = np.flatnonzero(source.kept >= 0).tolist()
        for item in [held[i] for i in spread_indices(len(held), LOOKED_AT)]:
            image, _, extra = source.read(item)
            made = {"image": image} if latents is None else latents.encode(image[None].to(device))
            row = int(source.kept[item]) * len(source.split.variants)
            for name in source.split.fields:
                (old,) = source.before.read(name, [row])
                new = made.get(name, extra.get(name))
                new = new.cpu().reshape(old.shape) if isinstance(new, Tensor) else new
                if not _alike(new, old, exactly=latents is None or name not in made):
                    raise ValueError(
                        f"{name} of {source.images.name}[{item}] is not what the store holds, made again: the dataset, "
                        "the transform or the encoder is another. Name a new folder, out=, or remove this one."
                    )


def _alike(new: Any, old: Any, exactly: bool) -> bool:
    if not isinstance(old, Tensor):
        return new == old
    new, old = torch.as_tensor(new).double(), old.double()
    if exactly:
        return torch.equal(new, old) or bool(((new == old) | (new.isnan() & old.isnan())).all())
    return torch.allclose(new, old, rtol=0.02, atol=0.02 * float(old.abs().max()))


def left_by_another(root: Path, info: dict[str, Any]) -> bool | None:
    """Look at what an interrupted update has left: None where it was whole, and only `replace` is left to do.

    Else whether it was to other files than there are now, so that it is of no use.
    """
    if not (root / BESIDE / INFO).exists():
        return False
    left = read_info(root / BESIDE)
    return None if left["finished"] else bool(differences(info["made_from"], left["made_from"]))


def replace(root: Path) -> None:
    """Put the store that was made beside an old one in its place. Interrupted, it is called again."""
    made, before = root / BESIDE, read_info(root)
    write_info(root, {**before, "finished": False})  # from now on no reader takes it for whole
    new, old = ({split.folder for split in splits_of(info)} for info in (read_info(made), before))
    for folder in sorted(new):
        if (made / folder).is_dir():
            shutil.rmtree(root / folder, ignore_errors=True)
            os.replace(made / folder, root / folder)
    os.replace(made / INFO, root / INFO)
    for folder in sorted(old - new):
        shutil.rmtree(root / folder, ignore_errors=True)
    shutil.rmtree(made)
