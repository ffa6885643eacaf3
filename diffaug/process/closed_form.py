"""ClosedForm: the operations at times that are given: the mix, a step, the posterior, a path, the prior."""

import math

import torch
from torch import Tensor

from diffaug.process import chain, kernel
from diffaug.process.arguments import Components, check_images, check_like
from diffaug.randomness.keys import Keys
from diffaug.schedules.numbers import in_float64
from diffaug.targets import mixes


class ClosedForm(Components):
    """The part of a `diffaug.process.ForwardProcess` that draws no times."""

    def _scale_and_centre(self, x_0: Tensor) -> tuple[float, float]:
        low, high = (0.0, 255.0) if x_0.dtype == torch.uint8 else self.value_range or (-1.0, 1.0)
        return 1.0 / (high - low), high + low

    def scale(self, x_0: Tensor) -> Tensor:
        """Scale images to float32 in [-1, 1]; latents to float32."""
        check_images("x_0", x_0)
        scale, centre = self._scale_and_centre(x_0)
        return (2.0 * x_0.float() - centre) * scale

    def mix(self, x_0: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """Mix x_t = alpha(t) x_0 + sigma(t) epsilon from a t and an epsilon that are given; draws nothing.

        Gradients go through it, to x_0 and to epsilon.

        Arguments:
            x_0: images as `forward` takes them, shape (B, *).
            t: native times, shape (B,); where the process has parts, one for each, (B, *counts), will do too.
            epsilon: of x_0's shape.
        """
        check_images("x_0", x_0)
        check_like("epsilon", epsilon, x_0.shape, "as x_0 is")
        schedule, (scale, centre) = self.schedule.at_shape(x_0.shape), self._scale_and_centre(x_0)
        if self.parts is not None and getattr(t, "ndim", 0) > 1:
            check_like("t", t, (len(x_0), *self.parts.counts(x_0.shape)), "one time for each part")
            mix = mixes(schedule, ("x_t",), t, scale).view(len(x_0), *self.parts.planes(x_0.shape), 1, 2)
            mix = mix.movedim((-2, -1), (1, 2))
        else:
            check_like("t", t, x_0.shape[:1], "one time for each image")
            schedule.log_snr(t)  # its own check of t
            mix = mixes(schedule, ("x_t",), t, scale)
        (x_t,) = kernel.mix_given(x_0, [epsilon.float()], mix, centre, self.dtype or torch.float32)
        return x_t

    def step(self, x_s: Tensor, s: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """Draw from q(x_t | x_s): on from s to a later t.

        Arguments:
            x_s: images at s, in [-1, 1] where clean, shape (B, *).
            s: native times, shape (B,); -1 (discrete) or 0 (continuous) is the clean image.
            t: later native times, shape (B,).
            epsilon: standard normal, of x_s's shape.
        """
        return chain.step(self.schedule.at_shape(x_s.shape), x_s, s, t, epsilon)

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> chain.Posterior:
        """Return q(x_s | x_t, x_0) for an s before t.

        Arguments:
            x_0: clean images in [-1, 1], shape (B, *).
            x_t: noised images, shape (B, *).
            t: native times, shape (B,).
            s: earlier native times, shape (B,), by default t - 1 if discrete; -1 (discrete) or 0 is the clean image.
        """
        return chain.posterior(self.schedule.at_shape(x_0.shape), x_0, x_t, t, s)

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
        """Draw one joint path of each image through the given times: each state is a `step` on from the one before.

        Arguments:
            x_0: images as `forward` takes them, shape (B, *).
            times: native times that rise, shape (K,).
            index: the key of the path, with what follows, as in `forward`.
            seed: likewise.
            stage: likewise.
            epoch: likewise.
            view: likewise.

        Returns:
            float32, shape (B, K, *).
        """
        x_0 = self.scale(x_0)
        check_like("index", index, x_0.shape[:1], "the number of each image in its dataset")
        key = Keys.pack(index, seed=seed, stage=stage, epoch=epoch, view=view)
        return chain.path(self.schedule.at_shape(x_0.shape), x_0, times, key.to(x_0.device))

    def prior_kl_bits_per_dim(self, x_0: Tensor) -> float:
        """Compute how far x_T is from its prior, KL(q(x_T | x_0) || p(x_T)), in bits per dimension, over all images.

        The prior is N(0, I), or N(0, sigma_T^2 I) where the schedule is variance exploding; T is the time of most
        noise (Ho, Jain and Abbeel 2020, section 4, where it is about 1e-5).

        Arguments:
            x_0: images as `forward` takes them, shape (B, *).
        """
        square = in_float64(lambda images: images.square().mean(), self.scale(x_0), torch.float64)
        return chain.prior_kl(self.schedule.at_shape(x_0.shape), square.item()) / math.log(2)
