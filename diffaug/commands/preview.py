"""preview: a dataset in the whole pipe before training: values, noised images, times, speed, warnings.

Two of the warnings are about the schedule, and follow from one fact: what many pixels say together shows through more
noise than any of them alone, so a larger image shows through more (Hoogeboom, Heek and Salimans 2023, "simple
diffusion", section 3). The feature that shows longest is the one in which the images differ most, their first principal
component (mostly their brightness), whose variance L grows with the number of pixels. At a noise level it is seen with
a signal-to-noise ratio of

    r(t) = SNR(t) L.

- Too weak: r at the last t is above 0.1. Sampling starts from pure noise, which says nothing of that feature, while
  training never saw such noise: images come out of medium brightness (Lin et al. 2024, "Common Diffusion Noise
  Schedules and Sample Steps are Flawed", section 3.1).
- Too strong: r is below 0.01 in more than a third of the draws, where then nothing of an image can be seen: Nichol
  and Dhariwal 2021, "Improved DDPM", section 3.2, who find the end of the linear schedule too noisy for small images.

The thresholds 0.1, 0.01 and a third are this project's choice.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from diffaug.commands.preview_buckets import draw as draw_buckets
from diffaug.commands.preview_buckets import measure, table
from diffaug.datamodules.module import DiffusionBase
from diffaug.encoding.unwrap import check_own
from diffaug.loader.dataset import Images
from diffaug.plots import Picture
from diffaug.plots import preview as draw
from diffaug.plots.buckets import Bucket
from diffaug.process import ForwardProcess
from diffaug.process.density import even_times
from diffaug.randomness.keys import Keys
from diffaug.schedules.base import VARIANCE_EXPLODING
from diffaug.store.moments import Moments, Stored

_IMAGES = 512
_ENCODED = 64  # by an encoder that is called here, which may take a second an image
_TIMES = 8192
_SECONDS = 5.0
WEAK, STRONG, SHARE = 0.1, 0.01, 1 / 3


@dataclass(frozen=True)
class Preview:
    """What a preview found.

    Attributes:
        text: to be printed.
        warnings: what looks wrong, a sentence or more each; part of the text.
        picture: of one page.
        buckets: where the dataset has any, some images of each; else None.
    """

    text: str
    warnings: list[str]
    picture: Picture
    buckets: Picture | None = None


def preview(data: DiffusionBase) -> Preview:
    """Look at the training data of a DataModule, and at what its process makes of it.

    Of latents, which an encoder or a store makes, it looks at what is noised: scaled, and drawn from the posterior. The
    picture shows the first three of their channels. Of a dataset with buckets it looks at the largest, and lists all.
    Of clips it looks at the frames, as at images of their own.

    Raises:
        ValueError: they are no images of shape (B, 1 or 3, H, W), nor latents of shape (B, C, H, W), nor clips of such;
            or a stream, which cannot be looked at beforehand.
    """
    check_own(data, "preview")
    data.setup("fit")
    process, live = data.process, data.encodes and not isinstance(data._noiser.encoder, Stored)
    images = data.clean_images("train", _ENCODED if live else _IMAGES)
    if images is not None and data.encodes:
        images = _latents(data, images)
        process = copy.copy(process)
        process.value_range = None  # of what it noises
    item, clips = (), False
    if images is not None:
        item, clips = tuple(images.shape[1:]), images.ndim == 5
        if clips:
            frames = _frames(images, process)
            images = frames[:: len(frames) // _IMAGES | 1]  # odd: of every place in a clip
            process = copy.copy(process)
            process.parts = None
    wanted = "latents of shape (B, C, H, W)" if process.value_range is None else "images of shape (B, 1 or 3, H, W)"
    if images is None or images.ndim != 4 or (process.value_range and images.shape[1] not in (1, 3)):
        shape = "a stream" if images is None else f"of shape {tuple(images.shape)}"
        raise ValueError(f"preview wants {wanted} from data.train, but they are {shape}.")
    x_0 = process.scale(images)
    t = even_times(process, _TIMES)
    read, noised = _speed(data)
    found = warnings(process, images, t)
    channels = ", ".join(
        f"{mean:.3f} ± {std:.3f}" for mean, std in zip(x_0.mean((0, 2, 3)), x_0.std((0, 2, 3)), strict=True)
    )
    low, high = images.min().item(), images.max().item()
    ratio = _visible(process, x_0)
    end, blind = ratio(process.schedule.ends[1][None]), (ratio(t) < STRONG).double().mean()
    latents = process.value_range is None and images.is_floating_point()
    span = "[0, 255]" if images.dtype == torch.uint8 else "latents" if latents else list(process.value_range or ())
    dataset, alike = data.images("train"), "each"
    listed = _buckets(dataset, data.batch_size)
    if listed:
        alike = "looked at are those"
    lines = [
        f"images           {len(dataset)}, {alike} {item}, {images.dtype}".replace("torch.", "")
        + (": clips, whose frames are looked at as images" if clips else ""),
        *(table(listed) if listed else ()),
        f"values           {low:g} to {high:g} as read, of {span}; looked at {len(images)} images",
        f"{'noised           as they are' if latents else 'scaled           to [-1, 1]'}; mean ± standard deviation of "
        f"each channel: {channels}",
        f"schedule         {process.schedule!r}",
        *([f"pair             {process.pair!r}"] if process.pair is not None else []),
        *([f"parts            {data.process.parts!r}"] if data.process.parts is not None else []),
        f"x_T to its prior {process.prior_kl_bits_per_dim(images):.3g} bits per dimension",
        f"at the last t    the images' coarsest feature shows with a signal-to-noise ratio of {end.item():.2g}",
        f"as good as noise {blind:.0%} of the draws: there that ratio is below {STRONG:g}",
        f"images a second  {read:,.0f} read, {noised:,.0f} noised, by this process on the CPU",
        *(["", *(f"WARNING {warning}" for warning in found)] if found else ["", "nothing looks wrong"]),
    ]
    shown = images if images.shape[1] in (1, 3) else images[:, : 3 if images.shape[1] > 3 else 1]
    of_buckets = draw_buckets(data.process, dataset, listed) if listed and not data.latents else None
    return Preview("\n".join(lines), found, draw(process, shown, t, x_0), of_buckets)


def _buckets(images: Images, batch: int) -> list[Bucket]:
    """Measure the buckets of a dataset that has them."""
    dataset, bucket_of = images.dataset, getattr(images.dataset, "bucket_of", None)
    return [] if bucket_of is None else measure(dataset.sizes, bucket_of, dataset.bucket_shapes, batch)


def _frames(clips: Tensor, process: ForwardProcess) -> Tensor:
    """Return the frames of clips, (B, F, C, H, W) or (B, C, F, H, W), by where the parts lie or there are colours."""
    planes = () if process.parts is None else process.parts.planes(clips.shape)
    axis = 1 + (planes[1] > planes[0]) if planes else 1 if clips.shape[2] in (1, 3) else 2
    return clips.movedim(axis, 1).flatten(0, 1)


def _latents(data: DiffusionBase, images: Tensor) -> Tensor:
    """Return what is noised of so many images, as the first visits draw it."""
    encode, posterior = data._noiser.encode, data._noiser.posterior
    keys = Keys.pack(torch.arange(len(images)), seed=data.seed or 0, stage="train")
    several = [encode(some) for some in images.split(8)]
    std = None if several[0].std is None else torch.cat([one.std for one in several if one.std is not None])
    return posterior(Moments(torch.cat([one.mean for one in several]), std), keys)


def _speed(data: DiffusionBase) -> tuple[float, float]:
    """Measure the images read and noised a second, over some batches or seconds."""
    loader = data.train_dataloader()
    count, timed, noising, began = 0, 0, 0.0, time.perf_counter()
    for batch in chain(loader, loader):  # so that there is a second, however few the images
        before, size = time.perf_counter(), len(batch.places[0].rows)
        data.noise(batch)
        if count:  # the first may compile
            timed, noising = timed + size, noising + time.perf_counter() - before
        else:
            began += time.perf_counter() - before
        count += size
        if count >= 4 * _IMAGES or time.perf_counter() - began > _SECONDS:
            break
    reading = time.perf_counter() - began - noising
    return count / reading, timed / noising


def warnings(process: ForwardProcess, images: Tensor, t: Tensor) -> list[str]:
    """List what looks wrong with these images under this process; see the rules at the top.

    Arguments:
        images: as the dataset yields them, shape (B, C, H, W).
        t: times as training draws them, shape (N,).
    """
    x_0 = process.scale(images)
    return [*_of_values(process, images, x_0), *_of_schedule(process, x_0, t)]


def _of_values(process: ForwardProcess, images: Tensor, x_0: Tensor) -> list[str]:
    found = []
    low, high = process.value_range or (0.0, 1.0)
    if images.dtype == torch.uint8 and images.max() <= 1:
        found.append(
            f"The images are uint8 but go from {images.min()} to {images.max()}: uint8 is [0, 255], so nearly all of "
            "them is black. Were floats in [0, 1] turned into uint8 without multiplying by 255?"
        )
    elif images.is_floating_point() and low < 0 <= images.min():
        found.append(
            f"No value is below 0 though process.value_range is [{low:g}, {high:g}]: if your images are in [0, 1] "
            "(torchvision's ToTensor), set process.value_range=[0,1]."
        )
    std = x_0.std().item()
    if std < 0.05 and not found:
        found.append(f"The scaled images have a standard deviation of only {std:.3g}: they are nearly one colour.")
    used = {"F", "x_in"} & set(process.fields)
    if used and not 1 / 1.5 < std / process.sigma_data < 1.5:
        found.append(
            f"The scaled images have a standard deviation of {std:.3g}, but process.sigma_data, which "
            f"{sorted(used)} go by, is {process.sigma_data:g}: set process.sigma_data={std:.2g}."
        )
    return found


def _visible(process: ForwardProcess, x_0: Tensor) -> Callable[[Tensor], Tensor]:
    """Return r as a function of native times: the signal-to-noise ratio of the images' first principal component."""
    side = (min(x_0.shape[2], 16), min(x_0.shape[3], 16))
    coarse = torch.nn.functional.adaptive_avg_pool2d(x_0, side).flatten(1).double()
    # Over averages of n pixels noise has variance 1 / n; times sqrt(n) it has variance 1, as in a pixel.
    coarse = coarse * math.sqrt(x_0.shape[2] * x_0.shape[3] / (side[0] * side[1]))
    largest = torch.linalg.matrix_norm(coarse - coarse.mean(0), 2).item() ** 2 / max(len(x_0) - 1, 1)
    return lambda t: process.schedule.at_shape(x_0.shape).log_snr(t, torch.float64).exp() * largest


def _of_schedule(process: ForwardProcess, x_0: Tensor, t: Tensor) -> list[str]:
    found, side = [], min(x_0.shape[2:])
    ratio = _visible(process, x_0)
    end = ratio(process.schedule.ends[1][None]).item()
    if end > WEAK:
        factor = math.sqrt(end / WEAK)
        remedy = (
            "a larger schedule.sigma_max"
            if process.schedule.scaling is VARIANCE_EXPLODING
            else ("schedule=zero_terminal_snr with model.target=v")
        )
        found.append(
            f"The schedule is weak for {side} pixels: at its last t the images' coarsest feature still shows, with a "
            f"signal-to-noise ratio of {end:.2g} (more than {WEAK:g}), but sampling starts from noise without it. Take "
            f"{remedy}, or schedule=shifted schedule.factor={factor:.2g} on the same base."
        )
    blind = (ratio(t) < STRONG).double().mean().item()
    if blind > SHARE:
        found.append(
            f"The schedule is strong for {side} pixels: in {blind:.0%} of the draws not even the images' "
            f"coarsest feature shows (signal-to-noise ratio below {STRONG:g}): there is nothing to learn. Take "
            "a gentler one (schedule=cosine), times that draw less noise, or schedule=shifted with a schedule.factor "
            "below 1."
        )
    return found
