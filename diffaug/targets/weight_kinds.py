"""Loss weights by the names of their papers, each on the loss of the target for which it is stated; see `Weight`."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffaug.checks import bounded
from diffaug.schedules import Schedule
from diffaug.schedules.base import table
from diffaug.schedules.level import LOG_SNR_LIMIT, SIGMA_DATA, Level, split_clean
from diffaug.schedules.numbers import keep, power, sigmoid
from diffaug.targets.weight import Weight, on_target


@dataclass(frozen=True)
class Unweighted(Weight):
    """1: the plain mean squared error of the target that is trained (Ho, Jain and Abbeel 2020, equation 14)."""

    def at(self, level: Level) -> Tensor:
        return torch.ones_like(level.log_snr)


@dataclass(frozen=True)
class MinSNR(Weight):
    """min(SNR, gamma) on x_0, so min(1, gamma / SNR) on epsilon and min(SNR, gamma) / (SNR + 1) on v; 1 where SNR is 0.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4; where SNR is 0, their
    code.

    Arguments:
        gamma: > 0.
    """

    gamma: float = bounded(5.0, above=0)
    stated_on: ClassVar[str | None] = "x_0"
    without_signal: ClassVar[float | None] = 1.0

    def at(self, level: Level) -> Tensor:
        return level.log_snr.exp().clamp_max(self.gamma)


@dataclass(frozen=True)
class FusedSNR(MinSNR):
    """min-SNR of a fused SNR: what the parts before a frame say of it counts as signal too.

    Chen et al. 2024, "Diffusion Forcing: Next-token Prediction Meets Full-Sequence Diffusion", the fused SNR of its
    appendix, as their code has it (not checked against the text). With S = SNR / gamma, C = min(S, 1) and d = decay,
    along the first axis of the parts,

        h_0 = 0,    h_1 = C_0,    h_f = d h_{f-1} + (1 - d) C_{f-1},    S'_f = 1 - (1 - d h_f) (1 - S_f),

    and likewise C' from C. The weight is gamma C' on x_0, and on other targets what that is at the SNR gamma S':
    C' / S' on epsilon, gamma C' / (gamma S' + 1) on v. Where a sample has one time it is min-SNR; where neither
    a part nor those before it have any signal, 1.

    Arguments:
        gamma: > 0.
        decay: how much of what is known of a frame stays for the next, in [0, 1).
    """

    decay: float = bounded(0.9, at_least=0, below=1)

    def of(self, schedule: Schedule, target: str, t: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
        if t.ndim < 2:
            return super().of(schedule, target, t, sigma_data)
        if target == "velocity":
            raise ValueError("weight=fused_snr is of an SNR that is no t's, and velocity has no rate there: use flow.")
        clean, inside = split_clean(schedule, t)
        level = Level(schedule, inside, sigma_data, limit=True)
        log_snr = torch.where(clean.to(level.t.device), LOG_SNR_LIMIT, level.log_snr)
        snr = torch.where(log_snr == -LOG_SNR_LIMIT, 0.0, log_snr.exp() / self.gamma)
        clipped = snr.clamp_max(1.0)
        known = [torch.zeros_like(snr[:, 0]), *clipped[:, :1].unbind(1)]
        for part in clipped[:, 1:-1].unbind(1):
            known.append(self.decay * known[-1] + (1 - self.decay) * part)
        before = self.decay * torch.stack(known[: snr.shape[1]], 1)
        fused = before + (1 - before) * snr  # without the cancellation of 1 - (1 - a) (1 - b)
        level.log_snr = (self.gamma * fused).log().clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)
        # gamma C' on x_0: what min-SNR is at the level of S', but that C' is clipped before it is fused.
        share = self.gamma * (before + (1 - before) * clipped) / self.at(level)
        value = share * on_target(self, level, target)
        return torch.where(level.log_snr == -LOG_SNR_LIMIT, 1.0, value).float().to(t.device)


@dataclass(frozen=True)
class SoftMinSNR(Weight):
    """1 / (1 / SNR + 1 / gamma) on x_0: min-SNR without its corner; as there, 1 where SNR is 0.

    Crowson et al. 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers",
    section 4.4. With gamma = 1 / sigma_data^2 it is (sigma s)^2 / (sigma^2 + s^2)^2 on F, as their code has it.

    Arguments:
        gamma: > 0; 4 is 1 / sigma_data^2 at sigma_data = 0.5.
    """

    gamma: float = bounded(4.0, above=0)
    stated_on: ClassVar[str | None] = "x_0"
    without_signal: ClassVar[float | None] = 1.0

    def at(self, level: Level) -> Tensor:
        return 1 / ((-level.log_snr).exp() + 1 / self.gamma)


@dataclass(frozen=True)
class P2(Weight):
    """(k + SNR)^-gamma on epsilon; with k = gamma = 1 it is sigma^2 of a variance preserving schedule.

    Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", equation 8. On v, variance preserving, it
    is SNR / (SNR + 1) times that, by the definition. (Trainers that add 1 to SNR for v, (k + 1 + SNR)^-gamma, weigh
    otherwise: theirs does not fall to 0 with SNR.)

    Arguments:
        k: > 0.
        gamma: > 0; the paper uses 0.5 and 1.
    """

    k: float = bounded(1.0, above=0)
    gamma: float = bounded(1.0, above=0)
    stated_on: ClassVar[str | None] = "epsilon"

    def at(self, level: Level) -> Tensor:
        return power(self.k + level.log_snr.exp(), -self.gamma)


@dataclass(frozen=True)
class SNRWeight(Weight):
    """SNR on x_0, so 1 on epsilon: DDPM's loss for any target (Salimans and Ho 2022, section 4); 1 where SNR is 0."""

    stated_on: ClassVar[str | None] = "x_0"
    without_signal: ClassVar[float | None] = 1.0

    def at(self, level: Level) -> Tensor:
        return level.log_snr.exp()


@dataclass(frozen=True)
class TruncatedSNR(Weight):
    """max(SNR, 1) on x_0.

    Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", section 4.
    """

    stated_on: ClassVar[str | None] = "x_0"

    def at(self, level: Level) -> Tensor:
        return level.log_snr.exp().clamp_min(1.0)


@dataclass(frozen=True)
class EDMWeight(Weight):
    """(sigma^2 + s^2) / (sigma s)^2 on x_0, at noise level sigma / alpha, s = sigma_data: so 1 on F.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1. sigma_data is the
    process's own.
    """

    stated_on: ClassVar[str | None] = "x_0"

    def at(self, level: Level) -> Tensor:
        return level.log_snr.exp() + level.sigma_data**-2


@dataclass(frozen=True)
class SigmoidWeight(Weight):
    """sigmoid(bias - log_snr) on epsilon, so e^bias sigmoid(log_snr - bias) on x_0.

    Kingma and Gao 2023, "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation", with k = bias;
    Hoogeboom et al. 2024, "Simpler Diffusion", with b = bias. Both integrate over log_snr: under a density of t the
    level's share of the loss is this weight times the density of log_snr that the recipe draws.

    Arguments:
        bias: the log-SNR at which the weight on epsilon is 1/2; 2 in Kingma and Gao.
    """

    bias: float = bounded(2.0, at_least=-100, at_most=100)
    stated_on: ClassVar[str | None] = "epsilon"

    def at(self, level: Level) -> Tensor:
        return sigmoid(self.bias - level.log_snr)


@dataclass(frozen=True)
class SigmaSqrt(Weight):
    """u^-2 on x_0, where u = sigma / (alpha + sigma) is the time of the straight path at the same SNR: so 1 on flow.

    The word is that of diffusers' training scripts for SD3, whose sigma is u; they apply it to the error of x_0. The
    paper (Esser et al. 2024) has none: it trains flow with weight 1, which is the same.
    """

    stated_on: ClassVar[str | None] = "x_0"

    def at(self, level: Level) -> Tensor:
        return 1 / _straight_time(level).square()


@dataclass(frozen=True)
class CosMap(Weight):
    """2 / (pi (1 - 2u + 2u^2)) on flow, where u = sigma / (alpha + sigma).

    Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", section 3.1, where it
    is a density of u, equation 22: it gives the straight path the log-SNRs of the cosine schedule. Uniform times with
    this weight have the same expected loss. (diffusers' scripts use it as a weight, and on x_0 unless told otherwise.)
    """

    stated_on: ClassVar[str | None] = "flow"

    def at(self, level: Level) -> Tensor:
        u = _straight_time(level)
        return 2 / (math.pi * (1 - 2 * u + 2 * u.square()))


@dataclass(frozen=True)
class Debiased(Weight):
    """SNR^-1/2 on epsilon.

    Yu et al. 2024, "Unmasking Bias in Diffusion Model Training", equation 11. Infinite on epsilon where SNR is 0. On
    v, variance preserving, it is SNR^1/2 / (SNR + 1), by the definition. (Trainers differ there: 1 / (SNR + 1) and
    (SNR + 1)^-1/2 are in use.)
    """

    stated_on: ClassVar[str | None] = "epsilon"

    def at(self, level: Level) -> Tensor:
        return (level.log_snr / -2).exp()


@dataclass(frozen=True)
class ELBO(Weight):
    """-1/2 dlog_snr/du on epsilon: under uniform times the loss is the diffusion term of the ELBO.

    Kingma et al. 2021, "Variational Diffusion Models", equation 17 in continuous time, equations 13 and 14 in T steps
    (the numbers of the equations from memory, not checked against the text); Song et al. 2021, "Maximum Likelihood
    Training of Score-Based Diffusion Models", where it is g^2 / 2 on the score. Times the number of
    pixels and channels, over which the squared error is a mean, it is in nats. Under another density it is no bound.

    - continuous: u is unit time, in which uniform draws are uniform.
    - discrete: T/2 (SNR(t - 1) / SNR(t) - 1), the exact KL of T steps. At t = 0, where no step is before, T/2: the
      decoder is N(predicted x_0, (sigma / alpha)^2), nearly Ho, Jain and Abbeel 2020's Gaussian of variance beta_1.

    The straight path's is 1 / (u (1 - u)): large, not infinite, at the two ends of continuous time.
    """

    stated_on: ClassVar[str | None] = "epsilon"

    def at(self, level: Level) -> Tensor:
        if not level.schedule.discrete:
            return -level.slope / 2
        return _elbo_table(level.schedule, level.t.device)[level.t]


@keep
def _elbo_table(schedule: Schedule, device: torch.device) -> Tensor:
    log_snr = table(schedule, "log_snr").clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)
    before = torch.cat([log_snr[:1] + math.log(2), log_snr[:-1]])
    return (schedule.timesteps / 2 * torch.expm1(before - log_snr)).to(device)


def _straight_time(level: Level) -> Tensor:
    return sigmoid(level.log_snr / -2)
