"""A folder of photos, of any sizes and modes, as uint8 RGB squares."""

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images under a folder, sorted by path, each with the number of its top subfolder as label.

    The shorter side is resized to ``image_size``, the longer one cropped to its middle.

    Arguments:
        root: the folder.
        image_size: the side of the squares, in pixels.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """

    def __init__(self, root: str, image_size: int) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"data.root={root!r} is not a folder (looked for {folder.resolve()}).")
        self.image_size = image_size
        self.paths = sorted(
            Path(top, name)
            for top, _, names in os.walk(folder, followlinks=True)
            for name in names
            if name.lower().endswith(_ENDINGS) and not name.startswith(".")
        )
        if not self.paths:
            raise FileNotFoundError(
                f"data.root={root!r} holds no images: no file under {folder.resolve()} ends in {', '.join(_ENDINGS)}."
            )
        tops = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in self.paths]
        self.classes = sorted(set(tops))
        self.labels = [self.classes.index(top) for top in tops]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                tensor = self._square(image)
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"Image {index}, {path}, cannot be read: {error}") from error
        return tensor, self.labels[index]

    def _square(self, image: Any) -> Tensor:
        image.draft("RGB", (2 * self.image_size, 2 * self.image_size))  # JPEG: decode no larger than needed
        image = ImageOps.exif_transpose(image).convert("RGB")
        tensor = F.pil_to_tensor(image)
        tensor = F.resize(tensor, [self.image_size], antialias=True)
        return F.center_crop(tensor, [self.image_size, self.image_size]).to(torch.uint8)
