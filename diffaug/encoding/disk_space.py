"""The space that a store takes on the disk: estimated, printed and checked before the store is written."""

import shutil
from pathlib import Path

from diffaug.encoding.writing import OF_IMAGES, Source


def check_space(root: Path, sources: list[Source], missing: list[tuple[int, int]]) -> None:
    """Refuse a disk that the shards that are missing do not fit on."""
    wanted = sum(len(sources[number].split.rows_of(shard)) * sources[number].row_bytes for number, shard in missing)
    there = next(folder for folder in (root, *root.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise OSError(
            f"out={root} needs {_size(wanted)} and texts, but there are {_size(free)} free. Nothing was changed"
        )


def plan(root: Path, sources: list[Source], rows: int, total: int) -> str:
    """Say how large a store will be, and what of it is there."""
    lines = [f"{root}: {total} rows, {total - rows} of them already there"]
    for source in sources:
        split = source.split
        fields = [f"{name} {field.dtype} {list(field.shape) or ''}".strip() for name, field in split.fields.items()]
        unknown = [name for name, field in split.fields.items() if field.bytes == 0]
        known = OF_IMAGES if source.bucket_bytes else ()
        more = " and what differs" if not {*unknown} <= {*known} else ""
        size = f"{_size(split.rows * source.row_bytes)}{more} in {split.shards} shards"
        lines.append(f"  {split.folder}: {split.rows} rows of {', '.join(fields)}; {size}")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
