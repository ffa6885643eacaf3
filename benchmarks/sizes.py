"""The sizes of a folder's images: read from the headers, and again from the kept file.

    python benchmarks/sizes.py [--files 100000] [--folder DIR] [--turns 5] [--markdown FILE]

Small JPEG and PNG files are generated, of 1 to 3 kB, in folders of a thousand; a tenth of the JPEGs have an EXIF
orientation. The headers are read once: the files have just been written, so that the system has them in memory, which
leaves the work itself. All figures are seconds of the processor. The second reading is the median of the turns; nearly
all of it is the system's answer to when each file was changed. "Folder" is all that ImageFolder does before the
first image, listing included. The folder is made in DIR, or else where temporary files are, and removed afterwards.
"""

import argparse
import logging
import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from diffaug import Buckets, ImageFolder
from diffaug.datasets.sizes import NAME, read_sizes

KINDS = 64


def make(folder: Path, count: int) -> list[str]:
    """Write the files, and return their names, sorted."""
    generator = np.random.default_rng(0)
    contents: list[tuple[str, bytes]] = []
    for kind in range(KINDS):
        height, width = generator.integers(64, 257, 2)
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        ending, exif, file = "png" if kind % 4 == 0 else "jpg", Image.Exif(), BytesIO()
        if kind % 10 == 1:
            exif[0x0112] = 6
        small.resize((int(width), int(height))).save(file, {"png": "PNG", "jpg": "JPEG"}[ending], exif=exif)
        contents.append((ending, file.getvalue()))
    names = []
    for number in range(count):
        ending, content = contents[number % KINDS]
        names.append(f"{number // 1000:04d}/{number:07d}.{ending}")
        if number % 1000 == 0:
            (folder / names[-1]).parent.mkdir()
        (folder / names[-1]).write_bytes(content)
    return names


def measure(folder: Path, count: int, turns: int) -> str:
    """Return the table."""
    names = make(folder, count)

    def sizes() -> float:
        began = time.process_time()
        read_sizes(folder, names, "")
        return time.process_time() - began

    def whole() -> float:
        began = time.process_time()
        ImageFolder(str(folder), buckets=Buckets(area=4096, upscale="allow"))
        return time.process_time() - began

    first, again = sizes(), statistics.median(sizes() for _ in range(turns))
    (folder / NAME).unlink()
    whole_first, whole_again = whole(), statistics.median(whole() for _ in range(turns))
    lines = [f"| {count} files | first, s | files a second | again, s | first / again |\n{'|---' * 5}|"]
    for name, one, two in (("sizes", first, again), ("folder", whole_first, whole_again)):
        lines.append(f"| {name} | {one:.2f} | {count / one:.0f} | {two:.3f} | {one / two:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folder", help="where the files are made")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    logging.getLogger("diffaug").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = measure(Path(folder), options.files, options.turns)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
