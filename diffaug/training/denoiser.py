"""DenoiserBase: what a LightningModule needs to train any network on the batches of a DiffusionDataModule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from diffaug.checks import choice, flag, integer
from diffaug.datamodules.base import NoisingBase
from diffaug.noise import gaussian
from diffaug.process import ForwardProcess
from diffaug.randomness.keys import Keys, Purpose
from diffaug.schedules.numbers import per_sample
from diffaug.targets import INPUTS, NUMBER_FIELDS, as_input, check_target, convertible, number_field, recover
from diffaug.times import Importance
from diffaug.training.networks import check_conditioning, check_parts, explain_size

_Module: Any = object  # the LightningModule of either package stands here


class DenoiserBase(_Module):
    """Train ``network(input, time)`` to predict a target by its mean squared error, weighted by ``process.weight``.

    Arguments:
        network: called as ``network(input, time)``; returns a tensor of input's shape, or an object whose ``sample``
            is one, as diffusers' networks do.
        process: the forward process that makes the batches; its schedule is what `sample` goes back along.
        input: the field that the network is given: x_t or x_in.
        time: the field that says the noise level: ``t_embed``, or c_noise, log_snr, unit, ...
        target: the field that the network predicts: epsilon, v, x_0, flow, ...
        condition: the field that the network is conditioned on, such as ``label``, given to it as ``class_labels=``;
            None gives it nothing.
        optimizer: called with the parameters.
        lr_scheduler: called with the optimizer and ``total_steps``; stepped after every batch. None keeps the rate.

    Both steps return what callbacks may want of each sample, beside the ``loss``: ``t``; ``errors``, its mean squared
    error, unweighted; ``weights``, what that counts in training; each of shape (B,). See `LossByLevel`. Where times are
    drawn by importance, the errors also go to ``process.times``.

    Where parts of a sample have times of their own, ``process.parts``, the network is called with times of t's shape,
    (B, *counts), the loss is a mean over the parts that are to be learned (``mask`` says which), and these numbers are
    of all parts in turn, (B N,). `sample` holds all parts at one level.

    A loss that is not finite ends the run, on all ranks: at the latest ``trainer.log_every_n_steps`` batches later, and
    before any checkpoint. Until then the device keeps watch, so that no step waits for it.

    Raises:
        FloatingPointError: a loss is nan or infinite; says of which step, and what to try.
    """

    def __init__(
        self,
        network: nn.Module,
        process: ForwardProcess,
        *,
        input: str = "x_t",
        time: str = "t_embed",
        target: str = "epsilon",
        condition: str | None = None,
        optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
        lr_scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.process = network, process
        self.input = choice("model.input", input, INPUTS)
        self.time = choice("model.time", time, tuple(NUMBER_FIELDS))
        self.target, self.condition = target, condition
        check_target(process.schedule, target)
        process.weight.check(process.schedule, target, process.sigma_data)
        needed = (input, target, "t", *([] if condition is None else [condition]))
        missing = [name for name in needed if name not in process.fields]
        if missing:
            raise ValueError(f"The model needs {missing} in process.fields, which is {list(process.fields)}.")
        check_conditioning(network, condition)
        check_parts(network, process.parts, process.fields)
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.latents = process.value_range is None  # or as the DataModule or the checkpoint says
        self._watched: tuple[Tensor, Tensor] | None = None  # the last loss and its step, until one is not finite

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if isinstance(data, NoisingBase):
            self.latents = data.latents

    def forward(self, x: Tensor, time: Tensor, labels: Any = None) -> Tensor:
        try:
            out = self.network(x, time) if labels is None else self.network(x, time, class_labels=labels)
        except RuntimeError as error:
            explain_size(self.network, x, error)
            raise
        return out if isinstance(out, Tensor) else out.sample

    def _compare(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the mean squared error of each sample or part, what it counts, and whether it does: 1, 0; None is all.

        Each is of t's shape.
        """
        process, t, x = self.process, batch.t, getattr(batch, self.input)
        schedule, parts = process.schedule.at_shape(x.shape), process.parts
        labels = None if self.condition is None else getattr(batch, self.condition)
        prediction = self(x, number_field(schedule, self.time, t), labels)
        square = (prediction.float() - getattr(batch, self.target).float()).square()
        errors = square.flatten(1).mean(1) if parts is None else parts.mean(square)
        weights = process.weight.of(schedule, self.target, t, process.sigma_data)
        if isinstance(process.times, Importance) and self.training:
            weights = weights * process.times.importance_weight(t, schedule)
        if parts is None or not parts.masks:
            return errors, weights, None
        return errors, weights.where(batch.part_mask > 0, 0), batch.part_mask

    def _outputs(
        self, t: Tensor, loss: Tensor, errors: Tensor, weights: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        numbers = {"t": t, "errors": errors.detach(), "weights": weights}
        if mask is not None:  # a clean part's t is none of the schedule's
            numbers |= {"mask": mask, "t": t.where(mask > 0, self.process.schedule.range[0])}
        return {"loss": loss, **{name: number.flatten() for name, number in numbers.items()}}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        errors, weights, mask = self._compare(batch)
        if isinstance(self.process.times, Importance):
            self.process.times.update(batch.t, errors)
        loss = _mean(weights * errors, mask)
        self._watch(loss)
        self.log("train_loss", loss, prog_bar=True)
        return self._outputs(batch.t, loss, errors, weights, mask)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        name = "val_loss" if dataloader_idx == 0 else f"val_loss_{dataloader_idx}"
        options = {"prog_bar": True, "sync_dist": True, "batch_size": len(batch.t), "add_dataloader_idx": False}
        errors, weights, mask = self._compare(batch)
        loss = _mean(errors, mask)
        self._watch(loss)
        self.log(name, loss, **options)
        return self._outputs(batch.t, loss, errors, weights, mask)

    def _watch(self, loss: Tensor) -> None:
        loss, step = loss.detach(), torch.full((), self.global_step, device=loss.device)
        if self._watched is not None:
            before, its_step = self._watched
            fine = before.isfinite()
            loss, step = torch.where(fine, loss, before), torch.where(fine, step, its_step)
        self._watched = loss, step

    def _check_finite(self, name: str) -> None:
        """Raise if a loss since the last call was not finite on any rank; all ranks must come here together."""
        loss, step = self._watched or (torch.zeros((), device=self.device),) * 2
        self._watched = None
        bad = ~loss.isfinite()
        if not self.trainer.strategy.reduce(bad.float(), reduce_op="sum"):
            return
        where = f"{loss.item()} at step {step.item()}" if bad else "not finite on another rank"
        raise FloatingPointError(
            f"{name} is {where}, so the run ends; its checkpoints are from before. If it was finite at first, lower "
            "model.optimizer.lr or trainer.gradient_clip_val, or take trainer.precision=bf16-mixed in place of "
            "16-mixed; if it never was, look at the images (python -m diffaug preview) and at the network. "
            "trainer=debug names the operation in which it begins."
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = self.trainer.log_every_n_steps
        if every and (batch_idx + 1) % every == 0:
            self._check_finite("train_loss")

    def on_train_epoch_end(self) -> None:
        self._check_finite("train_loss")

    def on_validation_start(self) -> None:
        self._check_finite("train_loss")

    def on_validation_epoch_end(self) -> None:
        self._check_finite("val_loss")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_finite("train_loss")  # so that a checkpoint is never of weights that are lost
        checkpoint["latents"] = self.latents

    def configure_optimizers(self) -> Any:
        optimizer = _make("model.optimizer", self.make_optimizer, self.parameters())
        if self.make_lr_scheduler is None:
            return optimizer
        steps, trainer = self.trainer.estimated_stepping_batches, self.trainer
        if not 0 < steps < math.inf:
            raise ValueError(
                f"model.lr_scheduler needs the number of steps, at least 1, but trainer.max_steps={trainer.max_steps} "
                f"and trainer.max_epochs={trainer.max_epochs} make it {steps}: set one of them, or "
                "model.lr_scheduler=null."
            )
        scheduler = _make("model.lr_scheduler", self.make_lr_scheduler, optimizer, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the learning rate follow the length of training that is given now: a run may be made longer."""
        self.latents = checkpoint.get("latents", self.latents)
        for state in checkpoint.get("lr_schedulers", ()):
            for name in ("total_steps", "_schedule_phases"):  # OneCycleLR's
                state.pop(name, None)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        *,
        steps: int = 100,
        seed: int = 0,
        clip: bool | None = None,
        labels: Tensor | None = None,
        times: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw images by deterministic DDIM along the schedule's own alpha and sigma, so for every schedule.

        Song, Meng and Ermon 2021, "Denoising Diffusion Implicit Models", equation 12 with sigma = 0.

        Arguments:
            shape: (B, *) of the images.
            steps: how many times the network is called, at most T if discrete.
            seed: of the noise that the images start from.
            clip: whether each estimate of x_0 is held within [-1, 1]; None does so but for latents, where
                ``process.value_range`` is None or the DataModule that it was trained with has an encoder.
            labels: what each image is conditioned on, shape (B,), where the network is conditioned.
            times: native times at which the network is called, falling, shape (K,); instead of ``steps``, which spreads
                them evenly over unit time.
            progress: whether to show a progress bar.

        Returns:
            float32 images, in [-1, 1] if ``clip``.
        """
        schedule, device = self.process.schedule.at_shape(shape), self.device
        flag("progress", progress)
        if (labels is None) != (self.condition is None):
            raise ValueError(
                f"model.condition is {self.condition!r}, so sample() "
                + ("takes no labels." if self.condition is None else "needs labels=, one for each image.")
            )
        clip = not self.latents if clip is None else flag("clip", clip)
        labels = labels if labels is None else labels.to(device)
        if times is None:
            integer("steps", steps, 1)
            steps = min(steps, schedule.timesteps) if schedule.discrete else steps
            times = schedule.from_unit(torch.linspace(1.0, 0.0, steps, dtype=torch.float64))
        times = times.to(device)
        times = times if schedule.discrete else times.float()
        # An end where the target says nothing about x_0, or with no noise left, is no place to ask the network.
        times = times[convertible(schedule, self.target, "x_0", times) & (schedule.alpha_sigma(times)[1] > 0)]
        alphas, sigmas = schedule.alpha_sigma(times)
        index = torch.arange(shape[0], device=device)
        x = sigmas[0] * gaussian(Keys.pack(index, seed=seed, stage="predict"), shape[1:], Purpose.TRAJECTORY)
        x_0 = x
        for k in tqdm(range(len(times)), desc="Sampling", disable=not progress, leave=False):
            t = times[k].expand(shape[0])
            x_0, epsilon = self._estimate(x, t, clip, labels)
            if k + 1 < len(times):
                x = alphas[k + 1] * x_0 + sigmas[k + 1] * epsilon
        return x_0

    def _estimate(self, x_t: Tensor, t: Tensor, clip: bool, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        schedule = self.process.schedule.at_shape(x_t.shape)
        alpha, sigma = (per_sample(c, x_t) for c in schedule.alpha_sigma(t))
        x_in = as_input(schedule, self.input, x_t, t, self.process.sigma_data)
        time, parts = number_field(schedule, self.time, t), self.process.parts
        if parts is not None:  # all at one level
            counts = parts.counts(x_t.shape)
            time = time.view(-1, *(1,) * len(counts)).expand(-1, *counts)
        prediction = self(x_in, time, labels).float()
        x_0, epsilon = recover(schedule, self.target, prediction, x_t, t, self.process.sigma_data)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            epsilon = (x_t - alpha * x_0) / sigma
        return x_0, epsilon


def _mean(numbers: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean, of what the mask says, 1 or 0, where there is one; 0 of nothing."""
    return numbers.mean() if mask is None else (numbers * mask).sum() / mask.sum().clamp_min(1)


def _make(key: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call what a key says, and name the key where that is refused."""
    try:
        return make(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} cannot be made: {error} ({type(error).__name__})") from error
