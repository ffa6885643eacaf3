"""Drawing: the times of a batch and its image-shaped fields, by the compiled pass or eagerly.

There is one way for every recipe: times, then the coefficients of each field (`diffaug.process.coefficients`), then the
pass (`diffaug.process.kernel`), which draws the noise too, but for kinds of noise that are drawn before it.
"""

import warnings
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from diffaug.process import compiler, kernel
from diffaug.process.closed_form import ClosedForm
from diffaug.process.coefficients import coefficients
from diffaug.randomness.host_to_device import move
from diffaug.randomness.keys import Keys, Purpose
from diffaug.targets import PAIR_STATES, mix_table
from diffaug.times import ByIndex, PairPlaces, Times, Uniform

EVALUATION_TIMES = Uniform(coverage=ByIndex())
"""The times of validation, test and predict: even over unit time, and each image's own, whatever training draws."""
AT_THE_END = 2**53
"""How many samples a run has handed out, in evaluation: there every curriculum is as at its end."""
_UNIFORM = Uniform()


class Drawing(ClosedForm):
    """The part of a `diffaug.process.ForwardProcess` that draws, and knows whether it compiles."""

    _images: tuple[str, ...]  # the image-shaped fields, the states of a pair last
    _purposes: tuple[Purpose, ...]
    _has_compiled = False
    _cannot_compile = False

    def compiles(self, device: torch.device, elements: int) -> bool:
        """Return whether samples of so many elements go through the compiled pass on this device."""
        if self._cannot_compile or not self.noise.in_pass:
            return False
        if self.compile_mode == "auto":
            return elements >= compiler.COMPILE_ELEMENTS and compiler.compiler_for(device.type)
        return bool(self.compile_mode)

    def can_compile(
        self, x_0: Tensor, dtype: torch.dtype | None = None, batches: Mapping[str, Collection[int]] | None = None
    ) -> bool:
        """Compile the pass for batches of images like the first of these, shape (B, *), and say whether it worked.

        A failure is one warning, after which this process is eager. After a success it never is.

        Arguments:
            batches: the stages that are to come, and their sizes of batch beside 1 and 2 (a compiled form serves all
                sizes but 1); training unless given. Training with uniform timesteps has a form of its own.
        """
        had_compiled = self._has_compiled
        sizes: dict[bool, set[int]] = {}
        for stage, some in ({"train": ()} if batches is None else batches).items():
            sizes.setdefault(stage == "train" and self.times == _UNIFORM, {1, 2}).update(some)
        for with_times, size in ((form, size) for form in sizes for size in sorted(sizes[form])):
            # Not expanded: the compiled form is for images that lie in memory one after another.
            some, index = x_0[:1].repeat(size, *(1,) * (x_0.ndim - 1)), torch.arange(size, device="cpu")
            times = _UNIFORM if with_times else EVALUATION_TIMES
            self._has_compiled = had_compiled  # nothing that is tried here has been handed out
            with torch.inference_mode(False), torch.no_grad():
                places = PairPlaces(index, index)
                self._draw(some, Keys.pack(index), times, places, dtype or self.dtype or torch.float32)
            if self._cannot_compile:
                return False
        return True

    def _draw(
        self, x_0: Tensor, key: Keys, times: Times, places: PairPlaces, dtype: torch.dtype, eager: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw the times, where the keys are, and every image-shaped field and the second time, by name."""
        try:
            return self._mix(x_0, key, times, places, dtype, eager)
        except compiler.CompileError as error:
            if self._has_compiled:
                # This process, one rank of several perhaps, must not go on alone with other bits.
                raise RuntimeError(
                    f"{error}, for a batch of {tuple(x_0.shape)}, after others had compiled; the eager path may differ "
                    "in the last bit, so it does not take over within a run. Set process.compile=false, and go on from "
                    "the last checkpoint or begin again."
                ) from error
            self._cannot_compile = True
            warnings.warn(
                f"{error}; diffaug goes on with its eager path, which is slower and may differ in the last bit. Set "
                "process.compile=false to begin there.",
                stacklevel=4,
            )
            return self._mix(x_0, key, times, places, dtype, eager)

    def _mix(
        self, x_0: Tensor, key: Keys, times: Times, places: PairPlaces, dtype: torch.dtype, eager: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        names, compiled = self._images, not eager and self.compiles(x_0.device, x_0.shape[1:].numel())
        schedule, (scale, centre) = self.schedule.at_shape(x_0.shape), self._scale_and_centre(x_0)
        alone = self.parts is None and self.pair is None and self._purposes == kernel.ONLY_EPSILON
        if names and compiled and alone and schedule.discrete and times == _UNIFORM:
            table = mix_table(schedule, names, scale, x_0.device, self.sigma_data)
            t, fields = kernel.draw_times_and_mix(x_0, key.to(x_0.device), table, centre, dtype)
            self._has_compiled = True
            return t, dict(zip(names, fields, strict=True))
        planes: tuple[int, ...] = ()
        if self.parts is None:
            t = times.draw(key, schedule, places.position, x_0.device)
        else:
            t = self.parts.draw(key, schedule, times, places.position, x_0.shape, x_0.device)
            planes = self.parts.planes(x_0.shape)
        made: dict[str, Tensor] = {}
        earlier: dict[str, Tensor] = {}
        if self.pair is not None:
            t, s = self.pair.times.draw(key.to(t.device), schedule, times, t, places.to(t.device))
            made = self.pair.numbers(self.fields, schedule, t, s, self.sigma_data)
            earlier = {state: made[time] for state, time in PAIR_STATES.items() if time in made}
        if not names:
            return t, made
        mix = coefficients(self, schedule, names, t, earlier, scale, planes)
        rows, mix = move([key.rows, mix], x_0.device)
        keys = Keys(rows)
        if self.noise.in_pass:
            fields = kernel.draw_and_mix(x_0, keys, mix, centre, dtype, compiled=compiled, purposes=self._purposes)
            self._has_compiled |= compiled
        else:
            noises = [self.noise.draw(keys, self.scale(x_0)), *kernel.draw_noises(keys, self._purposes[1:], x_0)]
            fields = kernel.mix_given(x_0, noises, mix, centre, dtype)
        return t, made | dict(zip(names, fields, strict=True))
