"""A schedule as one of diffusers' schedulers."""

import inspect
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import choice, integer, refuse
from diffaug.schedules import (
    EDM,
    VE,
    Cosine,
    LinearBeta,
    Rectified,
    ScaledLinearBeta,
    Schedule,
    Shifted,
    SigmoidBeta,
    ZeroTerminalSNR,
)
from diffaug.schedules.base import STRAIGHT, VARIANCE_EXPLODING, VARIANCE_PRESERVING, betas_of
from diffaug.schedules.shifts import find_auto
from diffaug.targets import check_target

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x_0": "sample", "flow": "flow_prediction", "F": "epsilon"}
"""What diffusers calls a target, ``prediction_type``. Its EDM schedulers call F epsilon, too."""

BETA_SCHEDULES: dict[str, type[LinearBeta | ScaledLinearBeta | SigmoidBeta]] = {
    "linear": LinearBeta,
    "scaled_linear": ScaledLinearBeta,
    "sigmoid": SigmoidBeta,
}
"""What diffusers calls a schedule that is given by the two ends of its betas, ``beta_schedule``."""

_BETA_TARGETS = ("epsilon", "v", "x_0")
_FLOW_TARGETS = ("flow", "velocity")
_EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def to_diffusers(
    schedule: Schedule,
    target: str | None = None,
    scheduler: str | None = None,
    *,
    timesteps: int = 1000,
    sigma_data: float = 0.5,
    **options: Any,
) -> Any:
    """Convert a schedule to a diffusers scheduler with its alpha_bar and sigma.

    Arguments:
        target: what the network predicts: sets ``prediction_type``. None is epsilon, flow or F, as the family has it.
        scheduler: the name of a diffusers class. None is DDIMScheduler, FlowMatchEulerDiscreteScheduler or
            EDMEulerScheduler.
        timesteps: on how many points a continuous schedule is put: diffusers' t is ours, in unit time, times this.
        sigma_data: the standard deviation of the images, for EDM's preconditioning.
        options: further arguments of the class, over those chosen here: ``clip_sample=False`` for latents.

    Raises:
        ValueError: diffusers has no counterpart, with what to do instead.
        ImportError: diffusers is not installed.
    """
    integer("timesteps", timesteps, 2)
    if schedule.at_shape((1, 1, 1, 1)) is not schedule:
        raise ValueError(
            f"{schedule!r} is another schedule for every size of image, and diffusers' are of one: convert "
            "schedule.at_shape((1, channels, height, width)), or set "
            f"{find_auto(schedule) or 'what it takes of each'} to a number."
        )
    if schedule.scaling is VARIANCE_PRESERVING:
        name, chosen = _betas(schedule, target, scheduler, timesteps)
    elif schedule.scaling is STRAIGHT:
        name, chosen = _flow(schedule, target, scheduler, timesteps)
    elif schedule.scaling is VARIANCE_EXPLODING:
        name, chosen = _edm(schedule, target, scheduler, sigma_data)
    else:
        raise ValueError(
            f"diffusers has no scheduler of {schedule!r}, which is {schedule.scaling}: sample by Denoiser."
        )
    made = _class(name)
    known = inspect.signature(made.__init__).parameters
    if any(key in chosen and key not in known for key in ("trained_betas", "beta_schedule", "prediction_type")):
        raise refuse("scheduler", name, f"one that is given by betas, such as DDIMScheduler, for {schedule!r}")
    chosen = {key: value for key, value in chosen.items() if key in known}
    return made(**{**chosen, **options})


def _class(name: str) -> Any:
    try:
        import diffusers
        from diffusers.schedulers.scheduling_utils import SchedulerMixin
    except ImportError as error:
        raise ImportError('diffusers is not installed: pip install "diffaug[train]"') from error
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise refuse("scheduler", name, "the name of a diffusers scheduler, such as DDIMScheduler")
    return found


def _betas(schedule: Schedule, target: str | None, scheduler: str | None, points: int) -> tuple[str, dict[str, Any]]:
    target = target or "epsilon"
    if target not in _BETA_TARGETS:
        raise ValueError(
            f"diffusers' schedulers for a variance preserving schedule know networks that predict "
            f"{', '.join(_BETA_TARGETS)}, not {target}: set model.target to one of these."
        )
    check_target(schedule, target)
    name = scheduler or "DDIMScheduler"
    if name in (*_EDM_SCHEDULERS, *_FLOW_SCHEDULERS):
        raise refuse("scheduler", name, f"one that is given by betas, such as DDIMScheduler, for {schedule!r}")
    chosen: dict[str, Any] = {
        "num_train_timesteps": schedule.timesteps or points,
        "prediction_type": PREDICTIONS[target],
        # From the last step down, so that sampling begins where there is most noise (Lin et al. 2024, section 3.3);
        # with linspace, DDIMScheduler 0.42 steps by T // steps all the same, past the times it then asks for.
        "timestep_spacing": "trailing",
        "clip_sample": True,
    }
    return name, chosen | _named(schedule, name, points)


def _named(schedule: Schedule, scheduler: str, points: int) -> dict[str, Any]:
    """Return the arguments that tell diffusers the schedule: its name where it has one, else its betas."""
    if isinstance(schedule, ZeroTerminalSNR):
        inner = _named(schedule.base, scheduler, points)
        if "trained_betas" not in inner:
            return {**inner, "rescale_betas_zero_snr": True}
    for name, kind in BETA_SCHEDULES.items():
        if isinstance(schedule, kind) and (name != "sigmoid" or scheduler == "DDPMScheduler"):
            scale = schedule.scale if isinstance(schedule, LinearBeta) else 1.0
            ends = {"beta_start": scale * schedule.beta_start, "beta_end": scale * schedule.beta_end}
            return {"beta_schedule": name, **ends}
    if schedule == Cosine(schedule.timesteps or 1):
        return {"beta_schedule": "squaredcos_cap_v2"}
    betas = schedule.betas if schedule.discrete else _betas_between(schedule, points)
    # A schedule that ends without signal is its own rescaling; the flag tells solvers of log-SNR to expect it.
    return {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": betas[-1].item() == 1.0}


def _betas_between(schedule: Schedule, points: int) -> Tensor:
    """Return betas for which diffusers' t = 0 .. T - 1 is unit time t / T: the network is told what it learned.

    Where the image is clean at unit time 0, diffusers' t = 0, which needs some noise, is at 1 / (2 T).
    """
    unit = torch.arange(points, dtype=torch.float64) / points
    low, _ = schedule.ends
    if schedule.log_snr(low[None], torch.float64).isinf().item():
        unit[0] = 0.5 / points
    betas = betas_of(schedule.log_snr(schedule.from_unit(unit), torch.float64))
    betas[0] = betas[0].clamp_min(torch.finfo(torch.float32).eps)  # a smaller one is 0 to diffusers: no noise at all
    return betas


def _flow(schedule: Schedule, target: str | None, scheduler: str | None, points: int) -> tuple[str, dict[str, Any]]:
    shift = _shift(schedule)
    if shift is None:
        raise ValueError(
            f"diffusers has the straight path rectified, or shifted on rectified, but no {schedule!r}: use "
            "schedule=rectified, and times= for what is trained on."
        )
    if target not in (None, *_FLOW_TARGETS):
        raise ValueError(
            f"diffusers' flow schedulers know networks that predict flow, not {target}: set model.target=flow."
        )
    name = scheduler or _FLOW_SCHEDULERS[0]
    chosen = {"num_train_timesteps": points, "shift": shift}
    if name not in _FLOW_SCHEDULERS:
        if "use_flow_sigmas" not in inspect.signature(_class(name).__init__).parameters:
            raise refuse("scheduler", name, f"one for flows, such as {_FLOW_SCHEDULERS[0]}, for {schedule!r}")
        chosen = {
            "num_train_timesteps": points,
            "use_flow_sigmas": True,
            "flow_shift": shift,
            "prediction_type": PREDICTIONS["flow"],
        }
    return name, chosen


def _shift(schedule: Schedule) -> float | None:
    """Return the factor by which the straight path's noise is shifted; None if it is something else."""
    if isinstance(schedule, Rectified):
        return 1.0
    if type(schedule) is Shifted:
        inner = _shift(schedule.base)
        factor = schedule.factor if schedule.factor is not None else float(schedule.image or 1) / schedule.base_image
        return None if inner is None else inner * factor
    return None


def _edm(
    schedule: Schedule, target: str | None, scheduler: str | None, sigma_data: float
) -> tuple[str, dict[str, Any]]:
    if not isinstance(schedule, (EDM, VE)):
        raise ValueError(
            f"diffusers' variance exploding schedulers take EDM's grid or a geometric one, but got {schedule!r}: use "
            "schedule=edm or schedule=ve."
        )
    if target not in (None, "F"):
        raise ValueError(
            f"diffusers' EDM schedulers know networks that predict F, not {target}: set model.target=F, "
            "model.input=x_in and model.time=c_noise (experiment=edm)."
        )
    chosen = {
        "sigma_min": schedule.sigma_min,
        "sigma_max": schedule.sigma_max,
        "sigma_data": sigma_data,
        "prediction_type": PREDICTIONS["F"],
        "sigma_schedule": "karras" if isinstance(schedule, EDM) else "exponential",
    }
    if isinstance(schedule, EDM):
        chosen["rho"] = schedule.rho
    return choice("scheduler", scheduler or _EDM_SCHEDULERS[0], _EDM_SCHEDULERS), chosen
