"""Densities over unit time, u in (0, 1), where 1 is the most noise; by the names of their papers."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffaug.checks import bounded, number, refuse
from diffaug.schedules import Schedule
from diffaug.schedules.numbers import keep, read_numbers, sigmoid
from diffaug.times.densities import UnitTimes, ndtri


@dataclass(frozen=True)
class LogitNormal(UnitTimes):
    """logit(u) ~ N(mean, std^2): the middle of the path more often than its ends.

    Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 19 (their m and s). diffusers' training scripts
    for SD3 use the draw as an index into timesteps that fall, so there ``logit_mean`` has the other sign: its 1 is -1
    here, with a median u of 0.269, where the paper's 1 has 0.731.

    Arguments:
        mean: of logit(u); above 0 leans to more noise, as in the paper.
        std: of logit(u), > 0.
    """

    mean: float = 0.0
    std: float = bounded(1.0, above=0)

    def unit(self, q: Tensor) -> Tensor:
        return sigmoid(self.mean + self.std * ndtri(q))


@dataclass(frozen=True)
class PlateauLogitNormal(UnitTimes):
    """Logit-normal below its mode, flat from there to u = 1: the noisy end is drawn as often as the middle.

    Black Forest Labs 2025, who train on it (by its description; not checked against a text, nor are the defaults).

    Arguments:
        mean: of logit(u) in the logit-normal part.
        std: of logit(u) in it, in (0, sqrt 2]: beyond that the logit-normal may have two modes.
    """

    mean: float = bounded(0.0, at_least=-10, at_most=10)
    std: float = bounded(1.0, above=0, at_most=math.sqrt(2))

    def unit(self, q: Tensor) -> Tensor:
        below, height, total = _plateau(self.mean, self.std)
        mass = q * total
        rise = sigmoid(self.mean + self.std * ndtri(mass.clamp_max(below)))
        return (rise + (mass - below).clamp_min(0.0) / height).clamp_max(1.0)


@dataclass(frozen=True)
class Mode(UnitTimes):
    """u = f(1 - q) with f(q) = 1 - q - s (cos^2(pi q / 2) - 1 + q), for uniform q.

    Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 20. Their f falls with q; taken at 1 - q it is
    the inverse CDF. Greater ``s`` puts more weight on the middle, s below 0 on the ends.

    Arguments:
        s: in [-1, 2 / (pi - 2)], where f is monotone.
    """

    s: float = bounded(1.29, at_least=-1, at_most=2 / (math.pi - 2))

    def unit(self, q: Tensor) -> Tensor:
        return (q - self.s * (torch.sin(math.pi / 2 * q).square() - q)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Cubic(UnitTimes):
    """u = 1 - (1 - q)^3 for uniform q: more of the early, noisy stages of sampling.

    Mou et al. 2023, "T2I-Adapter": t = (1 - (t / T)^3) T with uniform t.
    """

    def unit(self, q: Tensor) -> Tensor:
        return 1 - (1 - q) ** 3


@dataclass(frozen=True)
class Beta(UnitTimes):
    """u ~ Beta(a, b). Its defaults put more weight on little noise.

    Zheng et al. 2024, "Beta-Tuned Timestep Diffusion Model".

    Arguments:
        a: in [0.1, 100]; the density goes as u^(a - 1) (1 - u)^(b - 1).
        b: in [0.5, 100]: much of a density steeper at u = 1 would lie closer to it than a float32 time can say.
    """

    a: float = bounded(0.8, at_least=0.1, at_most=100)
    b: float = bounded(1.0, at_least=0.5, at_most=100)

    def unit(self, q: Tensor) -> Tensor:
        # From whichever end is nearer, so that neither tail loses digits.
        nearer = torch.minimum(q, 1 - q)
        return sigmoid(torch.where(q < 0.5, _logit(self.a, self.b, nearer), -_logit(self.b, self.a, nearer)))


@dataclass(frozen=True)
class Biased(UnitTimes):
    """Uniform, but for one range of u that is drawn more often, or less.

    Arguments:
        begin: where the range of u begins, in [0, end). On a discrete schedule it is [begin T, end T).
        end: where it ends, in (begin, 1].
        multiplier: how many times as often a t within the range is drawn as one outside it, > 0.
    """

    begin: float = bounded(0.0, at_least=0, below="end")
    end: float = bounded(0.25, above=0, at_most=1)
    multiplier: float = bounded(2.0, above=0)

    def unit(self, q: Tensor) -> Tensor:
        within = (self.end - self.begin) * self.multiplier
        mass = q * (self.begin + within + 1 - self.end)
        inside = (mass - self.begin).clamp(0.0, within)
        after = (mass - self.begin - within).clamp_min(0.0)
        return (mass.clamp_max(self.begin) + inside / self.multiplier + after).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Stepwise(UnitTimes):
    """How often each t is drawn, as a list of weights, or as a file that holds one.

    Arguments:
        weights: numbers >= 0, not all 0: one for each t, or for each of so many equal parts of unit time (which must
            divide T if the schedule is discrete); or the path of a .npy, .npz or .csv file with them.
    """

    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = read_numbers("times.weights", self.weights) if isinstance(self.weights, (str, Path)) else self.weights
        try:
            weights = tuple(number("times.weights", w, at_least=0) for w in given)
        except TypeError:
            raise refuse("times.weights", self.weights, "a list of numbers, or a file of them") from None
        if not sum(weights) > 0 or not math.isfinite(sum(weights)):
            raise refuse("times.weights", f"{len(weights)} that sum to {sum(weights):g}", "of a sum > 0")
        object.__setattr__(self, "weights", weights)

    def check(self, schedule: Schedule) -> None:
        self._check_number(schedule)
        super().check(schedule)

    def _check_number(self, schedule: Schedule) -> None:
        if schedule.timesteps % len(self.weights):
            raise ValueError(
                f"times.weights must be one for each of T = {schedule.timesteps} timesteps, or a number that divides "
                f"T, but got {len(self.weights)}."
            )

    def _part(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part of unit time in which each q falls, and how far into it, in [0, 1)."""
        cumulative = _cumulative(self.weights, q.device)
        part = torch.searchsorted(cumulative, q.contiguous(), right=True).clamp_max(len(self.weights)) - 1
        start, stop = cumulative[part], cumulative[part + 1]
        return part, ((q - start) / (stop - start)).clamp(0.0, 1 - 2.0**-53)

    def unit(self, q: Tensor) -> Tensor:
        part, into = self._part(q)
        return (part + into) / len(self.weights)

    def quantile(self, q: Tensor, schedule: Schedule) -> Tensor:
        self._check_number(schedule)
        if not schedule.discrete:
            return super().quantile(q, schedule)
        # In whole timesteps: a rounding error cannot reach over an edge to a t of weight 0.
        part, into = self._part(q)
        width = schedule.timesteps // len(self.weights)
        return part * width + (into * width).long()


@keep
def _plateau(mean: float, std: float) -> tuple[float, float, float]:
    """Return the logit-normal's share below its mode, its density there, and the mass of it with the plateau."""
    # At the mode y = logit(u) solves y = mean + std^2 tanh(y / 2).
    low, high = mean - std**2, mean + std**2
    for _ in range(100):
        y = (low + high) / 2
        low, high = (y, high) if y < mean + std**2 * math.tanh(y / 2) else (low, y)
    z = (high - mean) / std
    u, above = 1 / (1 + math.exp(-high)), 1 / (1 + math.exp(high))
    below = math.erfc(-z / math.sqrt(2)) / 2
    height = math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / (std * u * above)
    return below, height, below + height * above


@keep
def _cumulative(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the CDF at the edges of the parts, float64, shape (K + 1,), from exactly 0 to exactly 1."""
    sums = torch.tensor((0.0, *weights), dtype=torch.float64).cumsum(0)
    return (sums / sums[-1]).to(device)


@keep
def _logit_table(a: float, b: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ln CDF and logit(u) at points of Beta(a, b), both float64 and rising."""
    # y = logit(u) = mode + width sinh(z): fine steps where the density is, and no end too far (its tails go as e^(a y)
    # and e^(-b y)). Every second z is the middle of an interval, for Simpson's rule.
    width, log_beta = math.sqrt(1 / a + 1 / b), math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    low, high = math.asinh((80 / a + 9 * width) / width), math.asinh((80 / b + 9 * width) / width)
    z = torch.linspace(-low, high, 2**18 + 1, dtype=torch.float64)
    y = math.log(a / b) + width * torch.sinh(z)
    log_density = a * torch.nn.functional.logsigmoid(y) + b * torch.nn.functional.logsigmoid(-y) - log_beta
    density = log_density.exp() * width * torch.cosh(z)
    mass = (density[:-1:2] + 4 * density[1::2] + density[2::2]) * (low + high) / 2**18 / 3
    log_cdf, y = mass.cumsum(0).log(), y[2::2]
    rising = (mass > 0) & (log_cdf > -70)
    return log_cdf[rising].to(device), y[rising].to(device)


def _logit(a: float, b: float, q: Tensor) -> Tensor:
    """Return logit(u) below which a share q <= 1/2 of Beta(a, b) lies, linear in ln q between the table's points."""
    log_cdf, y = _logit_table(a, b, q.device)
    right = torch.searchsorted(log_cdf, q.log().contiguous()).clamp(1, len(y) - 1)
    left = right - 1
    x = ((q.log() - log_cdf[left]) / (log_cdf[right] - log_cdf[left])).clamp(0.0, 1.0)
    return torch.lerp(y[left], y[right], x)
