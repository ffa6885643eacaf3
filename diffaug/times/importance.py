"""Importance sampling by loss: timesteps of greater loss are drawn more often, and weigh less in return.

Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", section 3.3: p_t goes as
sqrt(E[L_t^2]), the mean over the last ten losses at t, and a loss at t is weighed by 1 / (T p_t), so that its mean is
that of uniform times.

    process = ForwardProcess(schedule, Importance(), fields=("x_t", "epsilon", "t", "importance_weight"))

    x_t, epsilon, t, weight = batch                              # in training_step
    loss = (network(x_t, t) - epsilon).square().flatten(1).mean(1)
    process.times.update(t, loss)                                # the loss as it is, one number a sample
    return (weight * loss).mean()

All of it is tensor code on the device of t: nothing is copied to the host, no loop goes over samples or timesteps.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor

from diffaug.checks import bounded, refuse
from diffaug.schedules import Schedule
from diffaug.schedules.numbers import where_float64_is
from diffaug.times.densities import Times

_SCALE = 2**50  # of probabilities as whole numbers: their sums are exact, in any order, on any device


class LossTable:
    """The recent losses at each timestep, from which `Importance` draws, the same on every rank.

    Attributes:
        losses: the last ``history`` losses at each t, float32, shape (T + 1, history); row T is for what is not kept.
        counts: how many losses each t has had in all, int64, shape (T + 1,).
        before: both as they were before the batch at hand was learned from; None before it is.
    """

    losses: Tensor
    counts: Tensor
    before: tuple[Tensor, Tensor] | None

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.losses = torch.zeros(0, 0, dtype=torch.float32, device="cpu")
        self.counts = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.before = None

    def prepare(self, device: torch.device, timesteps: int, history: int) -> None:
        """Make the table at the first call; move it to this device."""
        if not len(self.counts):
            with torch.inference_mode(False):
                self.losses = torch.zeros(timesteps + 1, history, dtype=torch.float32, device=device)
                self.counts = torch.zeros(timesteps + 1, dtype=torch.int64, device=device)
        if self.counts.shape[0] != timesteps + 1 or self.losses.shape[1] != history:
            raise ValueError(
                f"times: the losses at hand are of {len(self.counts) - 1} timesteps, {self.losses.shape[1]} each, but "
                f"{timesteps} and {history} are wanted: give each schedule an Importance of its own, and resume with "
                "the same schedule.timesteps and times.history."
            )
        if self.counts.device != device:
            self.losses, self.counts = self.losses.to(device), self.counts.to(device)

    def add(self, t: Tensor, loss: Tensor) -> None:
        """Keep losses in the order given; of equal t, the later is the newer; what is not finite is left out.

        Arguments:
            t: int64, shape (N,).
            loss: float32, shape (N,).
        """
        rows, history = self.losses.shape
        t = torch.where(loss.isfinite(), t, rows - 1)
        t, order = t.sort(stable=True)
        first, stop = torch.searchsorted(t, t), torch.searchsorted(t, t, right=True)
        place = torch.arange(len(t), device=t.device)
        slot = (self.counts[t] + place - first) % history
        # Where one t comes more often than the table is wide, the last ones stay; a write never meets another.
        kept = (stop - place <= history) & (t < rows - 1)
        row, slot = torch.where(kept, t, rows - 1), torch.where(kept, slot, 0)
        self.losses[row, slot] = torch.where(kept, loss[order], 0.0)
        self.counts.index_add_(0, t, torch.ones_like(t))


@dataclass(frozen=True)
class Importance(Times):
    """p_t by the losses so far; uniform until every t has had ``history`` of them. For discrete schedules.

    The named exception to "a draw depends on its key alone": here it also depends on the table of losses, so a run
    repeats exactly with the same ranks and batches. Equal fields are equal objects whatever their tables hold.

    Arguments:
        history: how many losses are kept for each t, >= 1.
        uniform_share: the share of draws that stays uniform, in (0, 1]; no t is ever out of reach.
    """

    learns: ClassVar[bool] = True
    history: int = bounded(10, at_least=1)
    uniform_share: float = bounded(0.001, above=0, at_most=1)
    table: LossTable = field(default_factory=LossTable, init=False, repr=False, compare=False)

    def check(self, schedule: Schedule) -> None:
        if not schedule.discrete:
            raise ValueError(
                f"times: Importance keeps losses for each timestep, but {schedule!r} is continuous and has none: wrap "
                "it (schedule=discretised), or use another density."
            )

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Learn from the losses of a batch, on all ranks together.

        Arguments:
            t: the batch's timesteps, int64, shape (B,). B must be the same on every rank (diffaug's loaders see to it).
            loss: the loss of each sample, before any weight, float, shape (B,).
        """
        if t.ndim != 1 or t.dtype != torch.int64 or loss.shape != t.shape:
            raise refuse(
                "loss",
                f"{loss.dtype} of shape {tuple(loss.shape)}, with t {t.dtype} of shape {tuple(t.shape)}",
                "one number for each sample's t, both of shape (B,), such as error.square().flatten(1).mean(1)",
            )
        if not len(self.table.counts):
            raise ValueError("times: Importance has no table yet: draw a batch first, then update it with its losses.")
        with torch.inference_mode(False), torch.no_grad():
            self.table.prepare(t.device, len(self.table.counts) - 1, self.history)
            t, loss = _gather(t, loss.detach().float())
            if self.table.before is None:
                self.table.before = self.table.losses.clone(), self.table.counts.clone()
            self.table.add(t, loss)

    def _shares(self, schedule: Schedule, device: torch.device) -> Tensor:
        """Return p_t as whole numbers, int64, shape (T,): exactly what is drawn from, and weighed by."""
        self.check(schedule)
        self.table.prepare(device, schedule.timesteps, self.history)
        losses = where_float64_is(self.table.losses[:-1]).double()
        counts = where_float64_is(self.table.counts[:-1])
        p = losses.square().mean(1).sqrt()
        ready = (counts >= self.history).all() & (p.sum() > 0)
        p = torch.where(ready, p / p.sum(), 1.0 / len(p))
        p = (1 - self.uniform_share) * p + self.uniform_share / len(p)
        return (p * _SCALE).long().clamp_min(1)

    def quantile(self, q: Tensor, schedule: Schedule) -> Tensor:
        sums = self._shares(schedule, q.device).cumsum(0)
        t = torch.searchsorted(sums.double(), (q * sums[-1]).contiguous(), right=True)
        return t.clamp_max(schedule.timesteps - 1)

    def importance_weight(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Return 1 / (T p_t) by the losses so far: ask for it where t is drawn, before the next `update`."""
        shares = self._shares(schedule, t.device)
        drawn = shares[where_float64_is(t)]
        return (shares.sum().double() / (schedule.timesteps * drawn.double())).float().to(t.device)

    def clear(self) -> None:
        self.table.clear()

    def begin_batch(self, *, again: bool) -> None:
        """Forget what was learned from the batch before, if that comes again."""
        if again and self.table.before is not None:
            self.table.losses, self.table.counts = self.table.before
        self.table.before = None

    def state_dict(self, *, unfinished: bool = False) -> dict[str, Any]:
        """Return the table, as two tensors: without what an unfinished batch has taught it."""
        losses, counts = (unfinished and self.table.before) or (self.table.losses, self.table.counts)
        return {"losses": losses.clone(), "counts": counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        losses, counts = state["losses"], state["counts"]
        if len(counts) and losses.shape != (len(counts), self.history):
            raise ValueError(
                f"times.history is {self.history}, but the checkpoint holds a table of losses of shape "
                f"{tuple(losses.shape)}: resume with the history it was made with."
            )
        self.table.losses, self.table.counts, self.table.before = losses.clone(), counts.clone(), None


def _gather(t: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the batches of all ranks, one after another: the same on each."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return t, loss
    own = torch.stack([t.double(), loss.double()])  # both are exact in float64
    everyone = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, own)
    t, loss = torch.cat(everyone, 1)
    return t.long(), loss.float()
