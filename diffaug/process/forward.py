"""ForwardProcess: the forward process of diffusion as a transform of a batch.

    q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)

is what `forward` samples: one t and one epsilon for each image (Ho, Jain and Abbeel 2020, equation 4). The chain behind
it, whose thousand small steps have the same law, is in `diffaug.process.chain`; what takes t as given, `mix`, `step`,
`posterior`, ..., in `diffaug.process.closed_form`; the draw itself, compiled or not, in `diffaug.process.drawing`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import choice, number, span
from diffaug.noise import Gaussian, Noise
from diffaug.process.arguments import (
    check_call,
    check_components,
    check_dtype,
    check_images,
    check_like,
    check_names,
    number_images,
)
from diffaug.process.batch import Fields, NoisyBatch, batch_type
from diffaug.process.coefficients import purposes
from diffaug.process.drawing import AT_THE_END, EVALUATION_TIMES, Drawing
from diffaug.randomness.host_to_device import move
from diffaug.randomness.keys import Keys
from diffaug.schedules import Schedule
from diffaug.schedules.numbers import where_float64_is
from diffaug.targets import (
    IMAGE_FIELDS,
    NUMBER_FIELDS,
    PAIR_STATES,
    SIGMA_DATA,
    TARGETS,
    Pair,
    Unweighted,
    Weight,
    number_field,
)
from diffaug.times import PairPlaces, Parts, Times, Uniform


class ForwardProcess(Drawing):
    """Noise a batch of images: draw t and epsilon, return ``(x_t, epsilon, t)``.

    Arguments:
        schedule: how signal turns into noise with t.
        times: how t is drawn.
        noise: the kind of noise.
        fields: what a batch holds, in this order: names of `diffaug.targets.FIELDS`, or of what the dataset yields.
        weight: the loss weight, for the field ``weight``.
        target: on whose loss the weight acts: what the network predicts.
        pair: how an earlier state is drawn, for the fields ``x_s``, ``s``, ``interval``, ``same``, ... (`PAIR_FIELDS`).
        parts: the frames, tokens or patches of a sample that have a t of their own, shape (B, *counts), as then has
            every number of a batch; see `diffaug.times.parts`. None is one t for all of it.
        sigma_data: the standard deviation of the images in [-1, 1], for F, x_in and the EDM weight.
        value_range: the values that float images span, mapped to [-1, 1]; None for latents, which are noised as they
            are. uint8 images span [0, 255] either way.
        compile: "auto" (compile where there is a compiler and a sample has 512 elements or more), True or False. Only
            gaussian noise is compiled, perturbed or not; other kinds run eagerly.
        dtype: of the image-shaped fields; None is float32. All arithmetic on pixels is float32.

    It has no parameters and no buffers; the work is done on the images' device.

    For example, without Lightning:

        process = ForwardProcess(LinearBeta())
        x_t, epsilon, t = process(images, index, seed=7, epoch=3)
    """

    __call__: Callable[..., Fields]  # of `forward`; to torch a module returns anything

    def __init__(
        self,
        schedule: Schedule,
        times: Times = Uniform(),  # noqa: B008 - frozen
        noise: Noise = Gaussian(),  # noqa: B008 - frozen
        *,
        fields: Sequence[str] = NoisyBatch._fields,
        weight: Weight = Unweighted(),  # noqa: B008 - frozen
        target: str = "epsilon",
        pair: Pair | None = None,
        parts: Parts | None = None,
        sigma_data: float = SIGMA_DATA,
        value_range: Sequence[float] | None = (-1.0, 1.0),
        compile: bool | str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.schedule, self.times, self.noise = schedule, times, noise
        self.fields = check_names(fields)
        self.weight, self.target = weight, choice("process.target", target, TARGETS)
        self.pair, self.parts = pair, parts
        self.sigma_data = number("process.sigma_data", sigma_data, above=0)
        self.value_range = (
            None if value_range is None else span("process.value_range", value_range, ", or null for latents")
        )
        self.compile_mode = choice("process.compile", compile, (True, False, "auto"))
        self.dtype = check_dtype(dtype)
        check_components(self)
        self._images = tuple(name for kind in (IMAGE_FIELDS, PAIR_STATES) for name in self.fields if name in kind)
        self._numbers = tuple(name for name in self.fields if name in NUMBER_FIELDS)
        self._purposes = purposes(self)

    def extra_repr(self) -> str:
        return (
            f"{self.schedule!r}, {self.times!r}, {self.noise!r}, fields={self.fields}, value_range={self.value_range}"
        )

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
        handed: Tensor | None = None,
        times: Times | None = None,
        extra: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Fields:
        """Draw t and epsilon for each image and mix them.

        A draw is a pure function of (seed, stage, dataset, epoch, index, view) and of nothing else. What comes out are
        data, compiled or not: no gradient goes through; where x_0 wants one, `mix` gives it.

        The numbers of a batch, its times and coefficients, are drawn where ``index`` is, and cross to the images at
        once; the pixels' noise is made where the images are. For images on an accelerator, leave ``index`` (and
        epoch, view and position with it) on the host. On the accelerator they are right too, but a few numbers a
        sample then take up to 200 kernels of their own, each of which costs more than they do.

        Arguments:
            x_0: images, uint8 in [0, 255] or float in ``value_range``, shape (B, *), that require no gradient.
            index: which item of the dataset each image is, int64, shape (B,), in [0, 2^63); on the host, or where x_0
                is.
            generator: instead of ``index``: a torch.Generator that gives this call a seed; images are then numbered.
            seed: in [0, 2^64).
            stage: train, val, test or predict; all but train ignore the epoch and cover the times evenly.
            epoch: in [0, 2^20).
            view: which of an image's noised copies within the epoch, in [0, 2^20).
            dataset: the dataset's number within its stage.
            position: each image's place in the epoch's global order, for a coverage, or a pair's times, that need it.
            handed: how many samples the run has handed out before each, for a curriculum of a pair's times.
            times: instead of the process's own.
            extra: further fields by name, handed through.
            dtype: instead of the process's own.

        Returns:
            A named tuple of ``fields``; by default `NoisyBatch`.

        Raises:
            ValueError: neither index nor generator, a value out of its range, a field that is not there, or an x_0 that
                requires a gradient.
        """
        if index is None:
            seed, index = number_images(x_0, generator)
            position = index if position is None else position
        check_images("x_0", x_0)
        check_like("index", index, x_0.shape[:1], "the number of each image in its dataset")
        return self.draw(
            x_0,
            Keys.pack(index, seed=seed, stage=stage, epoch=epoch, view=view, dataset=dataset),
            times=times or (self.times if stage == "train" else EVALUATION_TIMES),
            position=position,
            handed=handed if stage == "train" else torch.full_like(index, AT_THE_END),
            extra=extra,
            dtype=dtype,
        )

    def draw(
        self,
        x_0: Tensor,
        key: Keys,
        *,
        times: Times | None = None,
        position: Tensor | None = None,
        handed: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        eager: bool = False,
    ) -> Fields:
        """Draw t and epsilon for each image by its key and mix them: `forward`, for who has packed the keys.

        x_0, position, handed, extra and dtype are as `forward` takes them, and so is what comes back.

        Arguments:
            key: of the B images, of `diffaug.randomness.keys`; on the host, or where x_0 is.
            times: instead of the process's own, whatever the stage.
            eager: whether the compiled pass is left aside, as where another rank cannot compile it.
        """
        extra = {} if extra is None else extra
        check_call(self.fields, x_0, extra)
        check_like("key", key.rows, (6, len(x_0)), "one key for each image")
        times, key = times or self.times, Keys(where_float64_is(key.rows))
        places = PairPlaces(*(None if one is None else where_float64_is(one) for one in (position, handed)))
        # Out of inference mode and gradients: what comes out are data, and one compiled form serves every stage.
        with torch.inference_mode(False), torch.no_grad():
            schedule = self.schedule.at_shape(x_0.shape)
            t, made = self._draw(x_0, key, times, places, dtype or self.dtype or torch.float32, eager)
            made |= {name: number_field(schedule, name, t) for name in self._numbers}
            if "weight" in self.fields:
                made["weight"] = self.weight.of(schedule, self.target, t, self.sigma_data)
            if self.parts is not None and self.parts.masks:
                made["part_mask"] = mask = self.parts.mask(t, extra)
                if "weight" in made:
                    made["weight"] = made["weight"].to(mask.device).where(mask > 0, 0)
            elif "part_mask" in self.fields:
                made["part_mask"] = torch.ones(t.shape, dtype=torch.float32, device=t.device)
            if "importance_weight" in self.fields:
                made["importance_weight"] = times.importance_weight(t, schedule)
            parts = {"index": "sample", "view": "view", "dataset": "number"}
            made |= {name: getattr(key, part) for name, part in parts.items() if name in self.fields}
            made = dict(zip(made, move([*made.values()], x_0.device), strict=True))
        return batch_type(self.fields)(*(made[name] if name in made else extra[name] for name in self.fields))
