"""Label dropout, for classifier-free guidance (Ho and Salimans 2022, "Classifier-free diffusion guidance")."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaug.checks import number
from diffaug.randomness.host_to_device import move
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import points
from diffaug.schedules.numbers import per_sample


class LabelDropout:
    """Puts ``null`` in the place of a share of the labels, each sample's own coin deciding: the same on every rank,
    for any batch size, after any resume.

    Arguments:
        rate: the share, in [0, 1].
        null: what stands for no label: a number for labels that are numbers, a number or a list of the label's shape
            for vectors, a string for texts.
        key: which field the label is.
        fields: what a batch holds: the label must be among it.
    """

    def __init__(self, rate: float, null: Any, key: str, fields: Sequence[str]) -> None:
        self.rate, self.null, self.key = number("data.label_dropout", rate, at_least=0, at_most=1), null, key
        self._nulls: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}
        if not self.rate:
            return
        if null is None:
            raise ValueError(
                f"data.label_dropout={rate:g} needs data.null_label, what stands for no label: with 10 classes, 0 to "
                "9, that is usually 10; for texts, ''."
            )
        if key not in fields:
            raise ValueError(
                f"data.label_dropout={rate:g} drops the field {key!r} (data.label_key), but process.fields="
                f"{list(fields)} does not hold it. Add it there, or set data.label_dropout=0."
            )

    def __call__(self, label: Any, keys: Keys) -> Any:
        """Replace some labels of a batch by null: a tensor of shape (B, ...), or a list of length B.

        Arguments:
            label: those of the batch, on any device.
            keys: of its samples, on the host (then neither texts nor a tensor make anything wait) or where label is.
        """
        dropped = points(keys, Purpose.LABEL_DROPOUT) < round(self.rate * 2**53)
        if not isinstance(label, Tensor):
            return [self.null if drop else own for drop, own in zip(dropped.tolist(), label, strict=True)]
        (dropped,) = move([dropped], label.device)
        return torch.where(per_sample(dropped, label), self._null_like(label), label)

    def _null_like(self, label: Tensor) -> Tensor:
        """Return the null as these labels are, kept on their device: to copy it there would halt it at every batch."""
        kind = (label.dtype, label.device, label.ndim)
        if kind not in self._nulls:
            null = self.null
            if not isinstance(null, (str, Tensor)):  # its dtype and device are its own, not torch's defaults
                null = torch.from_numpy(np.asarray(null))
            if isinstance(null, str) or not _fits(null, label):
                raise ValueError(
                    f"data.null_label={self.null!r} cannot stand for a label of the field {self.key!r}: these are "
                    f"{label.dtype}, of shape {tuple(label.shape[1:])} each."
                )
            with torch.inference_mode(False):
                self._nulls[kind] = null.to(label.dtype).to(label.device)
        return self._nulls[kind]


def _fits(null: Tensor, label: Tensor) -> bool:
    """Return whether a null can stand among labels; beyond their dtype's range it would become some class."""
    if null.ndim >= max(label.ndim, 1):
        return False
    if label.is_floating_point():
        return True
    return not null.is_floating_point() and torch.equal(null.to(label.dtype).to(null.dtype), null)
