"""The work on a batch of images on its device: the user's transform, the encoder, views, label dropout, noise."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from diffaug.checks import instance, integer, refuse
from diffaug.images.aligned import TOGETHER, Aligned
from diffaug.images.items import check_range
from diffaug.loader.batch import Places
from diffaug.loader.dataset import note
from diffaug.on_device.condition_noise import ConditionNoise
from diffaug.on_device.holes import Hole
from diffaug.on_device.labels import LabelDropout
from diffaug.on_device.posterior import Posterior
from diffaug.process import ForwardProcess
from diffaug.process.batch import Fields
from diffaug.process.drawing import AT_THE_END, EVALUATION_TIMES
from diffaug.randomness.keys import STAGES, VIEW_BITS, Keys, Purpose
from diffaug.randomness.user_code import keyed_random_state
from diffaug.store.moments import Moments, Stored
from diffaug.times import Times

_log = logging.getLogger("diffaug")
_OF_HOLE = frozenset({"hole", "known"})


class Noiser:
    """Noise a batch of images on its device.

    What the user's transforms draw there from the global random states (torch's of the CPU and of the device, numpy's,
    Python's) is a function of (seed, stage, dataset number, epoch, place of the batch's first sample), and the states
    are put back: the same on a resume, different on each rank. Unlike the noise, it depends on which samples come
    together in a batch: a transform of a whole batch can be keyed no finer.

    Arguments:
        process: the forward process.
        device_transform: of the training images, or of all images of their items together.
        encoder: of all images, from [-1, 1], to what is noised, or to a distribution of it.
        posterior: the draw from that distribution.
        views: how many noised copies of each training image.
        dropout: of the training labels.
        aligned: which images of an item keep in step.
        condition_noise: of the conditions among them.
        hole: how holes are drawn, if they are.
    """

    def __init__(
        self,
        process: ForwardProcess,
        *,
        device_transform: Callable[[Any], Any] | None = None,
        encoder: Callable[[Tensor], Any] | None = None,
        posterior: Posterior,
        views: int = 1,
        dropout: LabelDropout,
        aligned: Aligned,
        condition_noise: ConditionNoise,
        hole: Hole | None = None,
    ) -> None:
        for name, given in (("device_transform", device_transform), ("encoder", encoder)):
            if given is not None and not callable(given):
                raise refuse(
                    f"data.{name}", given, "a function or a torch.nn.Module, from a batch of images to another"
                )
        if encoder is not None and process.value_range is None and not isinstance(encoder, Stored):
            raise ValueError(
                "process.value_range=null says that the dataset yields latents, but data.encoder makes latents from "
                "images: set process.value_range to the range of the images. What the encoder makes is noised as it is "
                "under any."
            )
        self.process, self.device_transform, self.encoder, self.dropout = process, device_transform, encoder, dropout
        if hole is not None:
            instance("data.hole", hole, Hole, "a Box, a Half or a Brush")
            if encoder is not None or process.value_range is None:
                raise ValueError("data.hole is of images, but here latents are noised: leave it out.")
            if not _OF_HOLE.isdisjoint(aligned.beside):
                raise ValueError(f"data.hole makes the fields {sorted(_OF_HOLE)}: give data.images other names.")
        self.hole, self.made = hole, [*condition_noise.made, *(_OF_HOLE if hole else ())]
        self.posterior, self.aligned, self.condition_noise = posterior, aligned, condition_noise
        self.views = integer("data.views", views, 1, 2**VIEW_BITS - 1)
        self.eager = False  # whether the compiled pass is left aside: where some rank cannot compile it
        self._checked: set[tuple[str, str | None]] = set()

    def __call__(
        self,
        image: Tensor,
        places: Places,
        extra: dict[str, Any],
        *,
        seed: int,
        stage: str,
        dataset: int,
        dtype: torch.dtype | None = None,
        times: Times | None = None,
    ) -> Fields:
        """Noise a batch.

        Arguments:
            image: shape (B, *), as `ForwardProcess` takes it.
            places: of its samples.
            extra: further fields by name.
            seed, stage, dataset: the rest of the key.
            times: instead of those of the stage.
            dtype: the trainer's true precision, if it has one: of the image-shaped fields and of floats in ``extra``.
        """
        train = stage == "train"
        first = places.first
        key = (seed, Purpose.DEVICE_TRANSFORM, STAGES[stage], dataset + first.dataset, *first[:4])
        if train and self.device_transform is not None:
            with keyed_random_state(image.device, *key, 0):
                image, extra = self._transform(image, extra)
        self.aligned.check_sizes(image, extra, "a batch", batch=True)
        if self.aligned.conditions:
            scaled = {name: self.aligned.scale(name, extra[name], self.process) for name in self.aligned.conditions}
            extra = extra | scaled
        moments = None if self.encoder is None else self.encode(image, (*key, 1))
        if dtype is not None:
            whole = self.condition_noise.processes  # cast with their noise in them
            extra = {
                name: value.to(dtype)
                if isinstance(value, Tensor) and value.is_floating_point() and name not in whole
                else value
                for name, value in extra.items()
            }
        index, view, position, epoch, number, order, handed = places.rows.unbind(1)
        if train and self.views > 1:
            copies = torch.arange(self.views, device=index.device)
            view = (view[:, None] * self.views + copies).flatten()
            position = (position[:, None] * self.views + copies).flatten()
            if moments is None:
                image = image.repeat_interleave(self.views, 0)
            else:
                moments = moments.repeat(self.views)
            alike = (index, epoch, number, order, handed)
            index, epoch, number, order, handed = (x.repeat_interleave(self.views, 0) for x in alike)
            extra = {name: _repeated(value, self.views) for name, value in extra.items()}
        domain: dict[str, Any] = {"stage": stage, "dataset": dataset}
        if first.order >= 0:
            domain |= {"dataset": dataset + number, "order": order}
        pack = partial(Keys.pack, index, epoch=epoch, view=view, **domain)
        packed = pack(seed=seed)
        if self.condition_noise.processes:
            extra = self.condition_noise(extra, pack, seed, dtype)
        if self.hole is not None:
            if image.ndim < 3:
                raise refuse("of data.hole the images", image, "of a height and a width")
            height, width = image.shape[-2:]
            hole = self.hole.draw(packed.to(image.device), height, width)
            hole = hole.view(len(image), *(1,) * (image.ndim - 3), height, width)
            extra = {**extra, "hole": hole}
            if "known" in self.process.fields:
                extra["known"] = self.process.scale(image).masked_fill(hole, 0).to(dtype or torch.float32)
        if moments is not None:
            image = self._latents(
                moments, Keys.pack(index, seed=seed, **domain) if self.posterior.kind == "fixed" else packed
            )
        if train and self.dropout.rate:
            extra = {**extra, self.dropout.key: self.dropout(extra[self.dropout.key], packed)}
        times = times or (self.process.times if train else EVALUATION_TIMES)
        if not train:
            handed = torch.full_like(index, AT_THE_END)
        stand = {"position": position, "handed": None if train and first.handed < 0 else handed}
        return self.process.draw(image, packed, times=times, **stand, extra=extra, dtype=dtype, eager=self.eager)

    def _transform(self, image: Tensor, extra: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Apply the device transform to a batch of images, and to those that keep in step with them."""
        where = "data.device_transform"
        made, extra = self.aligned.transform(
            self.device_transform,
            image,
            extra,
            "the batch",
            where,
            lambda call, images: on_device(self.device_transform, images, where, call),
        )
        extra = extra | {name: check_batch(extra[name], image) for name in self.aligned.beside}
        image = check_batch(made, image)
        self.check_once(image, f"{where}'s result", "device_transform")
        for name in self.aligned.conditions:
            self.check_once(extra[name], f"{where}'s result", "device_transform", name)
        return image, extra

    def check_once(self, image: Tensor, where: str, what: str, condition: str | None = None) -> bool:
        """Refuse float images outside their range, the target's or a condition's; only at the first batch, as to look
        is to wait for the device. Returns whether it looked."""
        if (what, condition) in self._checked or not (image.is_floating_point() or condition in self.aligned.ranges):
            return False
        if condition is None:
            check_range(image, self.process.value_range, where)
        else:
            self.aligned.check_range(condition, image, self.process.value_range, where)
        self._checked.add((what, condition))
        return True

    def encode(self, image: Tensor, key: tuple[int, ...] = (0,)) -> Moments:
        """Encode a batch of images as they come from the loader; what the encoder draws itself goes by this key."""
        scaled = self.process.scale(image)
        # An autoencoder's forward would decode too.
        call: Any = getattr(self.encoder, "encode", self.encoder)
        with keyed_random_state(image.device, *key):
            return Moments.of(on_device(self.encoder, scaled, "data.encoder", call), len(image))

    def _latents(self, moments: Moments, packed: Keys) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            # On the CPU never: there its bits are the same with a compiler and without one.
            mean, apart = moments.mean, moments.mean.device.type != "cuda" or self.eager
            compiled = not apart and self.process.compiles(mean.device, mean[0].numel())
            code = self.posterior(moments, packed, compiled=compiled)
        low, high = self.process.value_range or (-1.0, 1.0)
        # The process maps floats from value_range to [-1, 1]; what an encoder makes is noised as it is.
        return code if (low, high) == (-1.0, 1.0) else (code * (high - low) + (high + low)) / 2


def on_device(function: Any, images: Any, name: str, call: Callable[[Any], Any]) -> Any:
    """Call a user's function of a batch of images, or of a dict of such batches, without gradients.

    A module is moved to the images' device first (a LightningDataModule is no module: nothing else moves what it
    holds); one with parameters is a network, run in evaluation mode on images of its own floating point dtype.

    Arguments:
        function: the user's.
        images: the batch.
        name: how errors call the function.
        call: what is called of it.
    """
    image = tree_leaves(images)[0]
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(function, nn.Module):
            weights = [*function.parameters(), *function.buffers()]
            if any(tensor.device != image.device for tensor in weights):
                function.to(image.device)
            parameter = next(function.parameters(), None)
            if parameter is not None:
                function.eval()
                cast = parameter.dtype
                images = tree_map_only(Tensor, lambda x: x.to(cast) if x.is_floating_point() else x, images)
        images = tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, images)
        try:
            return call(images)
        except Exception as error:
            cast = (
                " If it wants floats, convert them in it, to process.value_range." if image.dtype == torch.uint8 else ""
            )
            of = TOGETHER if isinstance(images, dict) else ""
            note(error, f"in {name}, of a batch of {image.dtype} of shape {tuple(image.shape)}{of}.{cast}")
            raise


def check_batch(out: Any, image: Tensor) -> Tensor:
    """Refuse what a device transform may not return: anything but a tensor of as many images."""
    if not isinstance(out, Tensor) or out.ndim < 2 or len(out) != len(image):
        came = tuple(out.shape) if isinstance(out, Tensor) else f"{type(out).__name__}. Give a function that returns it"
        raise ValueError(
            f"data.device_transform must return a tensor with as many images as it was given, ({len(image)}, ...), but "
            f"it returned {came}."
        )
    return out.as_subclass(Tensor)


def _repeated(value: Any, views: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat_interleave(views, 0)
    return [item for item in value for _ in range(views)]
