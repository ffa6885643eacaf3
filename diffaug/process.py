"""ForwardProcess: the forward process of diffusion as a transform of a batch.

    q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)                          the closed form: what `forward` samples
    q(x_t | x_s) = N(r x_s, (sigma_t^2 - r^2 sigma_s^2) I)                one step from s to t, r = alpha_t / alpha_s
    q(x_s | x_t, x_0)                                                     the posterior, a Gaussian too

With d = log_snr(t) - log_snr(s) <= 0, the step's variance is sigma_t^2 (1 - e^d), and the posterior has mean
alpha_s (1 - e^d) x_0 + r (sigma_s / sigma_t)^2 x_t and variance sigma_s^2 (1 - e^d): no difference of nearly equal
numbers is ever taken. (DDPM, equations 2, 4, 6 and 7, are the discrete, variance preserving case.)
"""

import functools
import math
from collections import namedtuple
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffaug import kernel
from diffaug.checks import choice, number, refuse
from diffaug.noise import Gaussian, Noise, gaussian
from diffaug.noise.philox import STAGES, Keys, Purpose, keys
from diffaug.schedules import Schedule
from diffaug.schedules.base import VARIANCE_EXPLODING, VARIANCE_PRESERVING
from diffaug.targets import FIELDS, IMAGE_FIELDS, NUMBER_FIELDS, mix_table, mixes
from diffaug.times import ByIndex, Times, Uniform

EVALUATION_TIMES = Uniform(coverage=ByIndex())
"""The times of validation, test and predict: even over unit time, and each image's own, whatever training draws."""


class NoisyBatch(NamedTuple):
    """A noised batch: ``x_t = alpha(t) x_0 + sigma(t) epsilon``.

    Attributes:
        x_t: the noised images, shape (B, *).
        epsilon: the noise in them, shape (B, *).
        t: the times, int64 (discrete) or float32 (continuous), shape (B,).
    """

    x_t: Tensor
    epsilon: Tensor
    t: Tensor


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(mean, variance I); both of x_t's shape, the variance with ones after the batch."""

    mean: Tensor
    variance: Tensor


@functools.lru_cache(maxsize=64)
def batch_type(fields: tuple[str, ...]) -> Any:
    """The named tuple of a batch with these fields: `NoisyBatch` itself for its own three."""
    if fields == NoisyBatch._fields:
        return NoisyBatch
    made = namedtuple("NoisyBatch", fields)  # noqa: PYI024 - its fields are known only now
    made.__module__ = __name__
    made.__reduce__ = lambda self: (_rebuild, (self._fields, tuple(self)))  # a class made on the fly, yet picklable
    return made


def _rebuild(fields: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    return batch_type(fields)(*values)


class ForwardProcess(nn.Module):
    """Noise a batch of images: draw t and epsilon, return ``(x_t, epsilon, t)``.

    Arguments:
        schedule: how signal turns into noise with t.
        times: how t is drawn.
        noise: the kind of noise.
        fields: what a batch holds, in this order: names of `diffaug.targets.FIELDS`, or of what the dataset yields.
        value_range: the values that float images span, mapped to [-1, 1]; uint8 images span [0, 255].
        compile: "auto" (compile where there is a compiler and a sample has 1,024 elements or more), True or False.
        dtype: of the image-shaped fields; None is float32. All arithmetic on pixels is float32.

    It has no parameters and no buffers; the work is done on the images' device.

    Example::

        process = ForwardProcess(LinearBeta())
        x_t, epsilon, t = process(images, index, seed=7, epoch=3)
    """

    def __init__(
        self,
        schedule: Schedule,
        times: Times = Uniform(),  # noqa: B008 - frozen
        noise: Noise = Gaussian(),  # noqa: B008 - frozen
        *,
        fields: tuple[str, ...] = NoisyBatch._fields,
        value_range: tuple[float, float] = (-1.0, 1.0),
        compile: bool | str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, kind in (("schedule", schedule, Schedule), ("times", times, Times), ("noise", noise, Noise)):
            if not isinstance(value, kind):
                raise refuse(f"process.{name}", value, f"a {kind.__name__} object")
        if isinstance(fields, str) or not fields or len(set(fields)) != len(fields):
            raise refuse("process.fields", fields, "a list of different names")
        if not all(isinstance(name, str) and name.isidentifier() for name in fields):
            raise refuse("process.fields", fields, "a list of names")
        if isinstance(value_range, str) or len(value_range) != 2:
            raise refuse("process.value_range", value_range, "a pair [low, high]")
        low, high = (number("process.value_range", v) for v in value_range)
        if low >= high:
            raise refuse("process.value_range", value_range, "a pair [low, high] with low < high")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise refuse("process.dtype", dtype, "a floating point torch.dtype or None")
        self.schedule, self.times, self.noise = schedule, times, noise
        self.fields = tuple(fields)
        self.value_range = (low, high)
        self.compile_mode = choice("process.compile", compile, (True, False, "auto"))
        self.dtype = dtype

    def extra_repr(self) -> str:
        return (
            f"{self.schedule!r}, {self.times!r}, {self.noise!r}, fields={self.fields}, value_range={self.value_range}"
        )

    def compiles(self, device: torch.device, elements: int) -> bool:
        """Whether samples of so many elements go through the compiled pass on this device."""
        if self.compile_mode == "auto":
            return elements >= kernel.COMPILE_ELEMENTS and kernel.compiler_for(device.type)
        return bool(self.compile_mode)

    def forward(
        self,
        x_0: Tensor,
        index: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        stage: str = "train",
        epoch: int | Tensor = 0,
        view: int | Tensor = 0,
        dataset: int = 0,
        position: Tensor | None = None,
        times: Times | None = None,
        extra: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Draw t and epsilon for each image and mix them.

        A draw is a pure function of (seed, stage, dataset, epoch, index, view) and of nothing else.

        Arguments:
            x_0: images, uint8 in [0, 255] or float in ``value_range``, shape (B, *).
            index: which item of the dataset each image is, int64, shape (B,), in [0, 2^40).
            generator: instead of ``index``: a torch.Generator that gives this call a seed; images are then numbered.
            seed: in [0, 2^64).
            stage: train, val, test or predict; all but train ignore the epoch and cover the times evenly.
            epoch: in [0, 2^20).
            view: which of an image's noised copies within the epoch, in [0, 2^20).
            dataset: the dataset's number within its stage.
            position: each image's place in the epoch's global order, for a coverage that needs it.
            times: instead of the process's own.
            extra: further fields by name, handed through.
            dtype: instead of the process's own.

        Returns:
            A named tuple of ``fields``; by default `NoisyBatch`.

        Raises:
            ValueError: neither index nor generator, a value out of its range, or a field that is not there.
        """
        if index is None:
            if generator is None:
                raise ValueError(
                    "ForwardProcess needs to know which images these are: pass index=, the images' numbers in their "
                    "dataset (then the noise of each is the same on every machine and repeats on a resume), or "
                    "generator=, a torch.Generator, where there is no such number."
                )
            words = torch.randint(2**32, (2,), generator=generator, device=generator.device, dtype=torch.int64).tolist()
            seed = words[0] | words[1] << 32
            index = torch.arange(len(x_0), device=x_0.device)
        choice("stage", stage, STAGES)
        extra = {} if extra is None else extra
        self._check(x_0, index, extra)
        # Out of inference mode and gradients: what comes out are data, and one compiled form serves every stage.
        with torch.inference_mode(False), torch.no_grad():
            key = keys(index, seed=seed, stage=stage, epoch=epoch, view=view, dataset=dataset)
            times = times or (self.times if stage == "train" else EVALUATION_TIMES)
            t, images = self._drawn(x_0, key, times, position, dtype or self.dtype or torch.float32)
        values: dict[str, Any] = {**extra, "index": index, "view": key.view}
        for name in self.fields:
            if name in NUMBER_FIELDS:
                values[name] = NUMBER_FIELDS[name](self.schedule, t)
        values.update(images)
        return batch_type(self.fields)(*(values[name] for name in self.fields))

    def _check(self, x_0: Tensor, index: Tensor, extra: dict[str, Any]) -> None:
        if x_0.ndim < 2 or not (x_0.dtype == torch.uint8 or x_0.is_floating_point()):
            raise refuse("x_0", f"{x_0.dtype} of shape {tuple(x_0.shape)}", "uint8 or float images of shape (B, *)")
        if len(x_0) != len(index):
            raise refuse("index", tuple(index.shape), f"of shape ({len(x_0)},), as there are {len(x_0)} images")
        clash = sorted(set(extra) & set(FIELDS))
        if clash:
            raise ValueError(
                f"The dataset yields {clash}, which diffaug itself names: rename them in the dataset. "
                f"Names taken: {', '.join(FIELDS)}."
            )
        missing = [name for name in self.fields if name not in FIELDS and name not in extra]
        if missing:
            raise ValueError(
                f"process.fields asks for {missing}, but there are only {', '.join(FIELDS)}"
                + (f" and, from the dataset, {', '.join(extra)}." if extra else "; the dataset yields nothing else.")
            )

    def _drawn(
        self, x_0: Tensor, key: Keys, times: Times, position: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor]]:
        names = tuple(name for name in self.fields if name in IMAGE_FIELDS)
        scale, centre = self._scale_and_centre(x_0)
        flat = x_0.reshape(len(x_0), -1)
        compiled = bool(names) and isinstance(self.noise, Gaussian) and self.compiles(x_0.device, flat.shape[1])
        together = None
        if compiled and self.schedule.discrete and times == Uniform():
            table = mix_table(self.schedule, names, scale, x_0.device)
            together = kernel.drawn_with_uniform_times(flat, key, table, centre, dtype)
        if together is not None:
            t, fields = together
        else:
            t = times.draw(key, self.schedule, position)
            mix = mixes(self.schedule, names, t, scale) if names else flat
            if not names:
                fields = []
            elif isinstance(self.noise, Gaussian):
                fields = kernel.drawn(flat, key, mix, centre, dtype, compiled=compiled)
            else:
                epsilon = self.noise.draw(key, tuple(x_0.shape[1:])).reshape(flat.shape)
                fields = kernel.given(flat, epsilon, mix, centre, dtype)
        return t, {name: field.view(x_0.shape) for name, field in zip(names, fields, strict=True)}

    def _scale_and_centre(self, x_0: Tensor) -> tuple[float, float]:
        low, high = (0.0, 255.0) if x_0.dtype == torch.uint8 else self.value_range
        return 1.0 / (high - low), high + low

    def scaled(self, x_0: Tensor) -> Tensor:
        """Images as float32 in [-1, 1]."""
        scale, centre = self._scale_and_centre(x_0)
        return (2.0 * x_0.float() - centre) * scale

    def noised(self, x_0: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) epsilon for a t and an epsilon that are given; draws nothing.

        Arguments:
            x_0: images as `forward` takes them, shape (B, *).
            t: native times, shape (B,).
            epsilon: of x_0's shape.
        """
        self.schedule.log_snr(t)  # its own check of t
        scale, centre = self._scale_and_centre(x_0)
        mix = mixes(self.schedule, ("x_t",), t, scale)
        flat = x_0.reshape(len(x_0), -1)
        (x_t,) = kernel.given(flat, epsilon.reshape(flat.shape).float(), mix, centre, self.dtype or torch.float32)
        return x_t.view(x_0.shape)

    def prior_kl_bits_per_dim(self, x_0: Tensor) -> float:
        """How far x_T is from its prior, KL(q(x_T | x_0) || p(x_T)), in bits per dimension, averaged over images.

        The prior is N(0, I), or N(0, sigma_T^2 I) where the schedule is variance exploding; T is the time of most
        noise (Ho, Jain and Abbeel 2020, section 4, where it is about 1e-5).

        Arguments:
            x_0: images as `forward` takes them, shape (B, *).
        """
        square = self.scaled(x_0).double().square().mean().item()
        _, end = self.schedule.ends
        log_snr = self.schedule.log_snr(end[None], torch.float64).item()
        alpha, sigma = (c.item() for c in self.schedule.alpha_sigma(end[None], torch.float64))
        if self.schedule.scaling is VARIANCE_EXPLODING:
            nats = math.exp(log_snr) * square / 2
        elif self.schedule.scaling is VARIANCE_PRESERVING:
            alpha_bar = math.exp(-math.log1p(math.exp(-log_snr))) if log_snr > -700 else 0.0
            nats = (alpha_bar * square - alpha_bar - math.log1p(-alpha_bar)) / 2
        else:
            nats = (alpha**2 * square + sigma**2 - 1) / 2 - math.log(sigma)
        return nats / math.log(2)

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and log_snr in float64, where a discrete t of -1 or a continuous one of 0 is the clean image."""
        clean = t < 0 if self.schedule.discrete else t <= 0
        inside = torch.where(clean, self.schedule.ends[0].to(t), t)
        alpha, sigma = self.schedule.alpha_sigma(inside, torch.float64)
        log_snr = self.schedule.log_snr(inside, torch.float64)
        return (
            torch.where(clean, 1.0, alpha),
            torch.where(clean, 0.0, sigma),
            torch.where(clean, torch.inf, log_snr),
        )

    def _between(self, s: Tensor, t: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        if t.device.type == "cpu" and not bool((s < t).all()):
            raise ValueError(f"s must be less than t (noise grows with t), but got s={s.tolist()} and t={t.tolist()}.")
        alpha_s, sigma_s, log_snr_s = self._level(s)
        alpha_t, sigma_t, log_snr_t = self._level(t)
        # Where all signal is gone at s already, the step adds fresh noise: the share that is new is all of it.
        fresh = -torch.expm1(torch.where(torch.isneginf(log_snr_s), -torch.inf, log_snr_t - log_snr_s))
        return (alpha_s, sigma_s), (alpha_t, sigma_t), fresh

    def step(self, x_s: Tensor, s: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """A draw of q(x_t | x_s): on from s to a later t.

        Arguments:
            x_s: images at s, in [-1, 1] where clean, shape (B, *).
            s: native times, shape (B,); -1 (discrete) or 0 (continuous) is the clean image.
            t: later native times, shape (B,).
            epsilon: standard normal, of x_s's shape.
        """
        (alpha_s, _), (alpha_t, sigma_t), fresh = self._between(s, t)
        ratio = torch.where(alpha_t == 0, 0.0, alpha_t / alpha_s)
        return _times(ratio, x_s) + _times(sigma_t * fresh.sqrt(), epsilon)

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> Posterior:
        """q(x_s | x_t, x_0) for an s before t.

        Arguments:
            x_0: clean images in [-1, 1], shape (B, *).
            x_t: noised images, shape (B, *).
            t, s: native times, shape (B,). A discrete s is t - 1 unless given; -1 (discrete) or 0 is the clean image.
        """
        if s is None:
            if not self.schedule.discrete:
                raise ValueError("posterior needs s= for a continuous schedule: there is no step just before t.")
            s = t - 1
        (alpha_s, sigma_s), (alpha_t, sigma_t), fresh = self._between(s, t)
        ratio = torch.where(alpha_t == 0, 0.0, alpha_t / alpha_s)
        mean = _times(alpha_s * fresh, x_0) + _times(ratio * (sigma_s / sigma_t).square(), x_t)
        return Posterior(mean, _shaped(sigma_s.square() * fresh, x_t))

    def trajectory(
        self,
        x_0: Tensor,
        times: Tensor,
        index: Tensor,
        *,
        seed: int = 0,
        stage: str = "predict",
        epoch: int = 0,
        view: int = 0,
    ) -> Tensor:
        """One joint path of each image through the given times: each state is a `step` on from the one before.

        Arguments:
            x_0: images as `forward` takes them, shape (B, *).
            times: native times that rise, shape (K,).
            index, seed, stage, epoch, view: the key of the path, as in `forward`.

        Returns:
            float32, shape (B, K, *).
        """
        key = keys(index, seed=seed, stage=stage, epoch=epoch, view=view)
        x = self.scaled(x_0)
        elements = (x[0].numel() + 3) // 4 * 4
        before = torch.full((len(x),), -1 if self.schedule.discrete else 0.0, dtype=times.dtype, device=x.device)
        path = []
        for k, time in enumerate(times):
            t = time.to(x.device).expand(len(x))
            x = self.step(x, before, t, gaussian(key, tuple(x.shape[1:]), Purpose.TRAJECTORY, k * elements))
            path.append(x)
            before = t
        return torch.stack(path, 1)


def _shaped(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.float().view(-1, *(1,) * (x.ndim - 1))


def _times(coefficient: Tensor, x: Tensor) -> Tensor:
    return _shaped(coefficient, x) * x.float()
