"""To and from diffusers: its schedulers' forward process as a schedule, and a schedule as its schedulers.

==================================  =======================================  ======================================
schedule                            diffusers scheduler                      what its networks predict
==================================  =======================================  ======================================
discrete, variance preserving       DDIM, DDPM, DPMSolverMultistep, and      epsilon; v_prediction (v); sample (x_0)
                                    every other one that is given by betas
continuous, variance preserving     the same, with beta such that its t is   the same
                                    ours times ``timesteps``
Rectified, and Shifted on it        FlowMatchEulerDiscrete; DPMSolver-       flow; flow_prediction (flow)
                                    Multistep with use_flow_sigmas
EDM; VE                             EDMEuler, EDMDPMSolverMultistep, with    epsilon (F, not the noise: EDM's own
                                    the grid karras; exponential             preconditioning is applied to it)
==================================  =======================================  ======================================

diffusers keeps its tables in float32: its alpha_bar agrees with ours to 2e-5 of its value, and its 1 - alpha_bar to
1e-6 absolutely: of a sigma below 0.01 few digits are left. A discrete t means the same on both sides: zero-based, least
noise at 0.

How t is drawn is not part of a scheduler. Whoever brings it along from diffusers' training scripts for SD3: these use
their draw as an index into timesteps that fall, so ``--logit_mean`` is -mean of `diffaug.times.LogitNormal`;
``--mode_scale`` is s of `diffaug.times.Mode`, which is symmetric. ``--weighting_scheme`` sigma_sqrt and cosmap are
weights there, on the error of x_0 by default: see `diffaug.targets.weights`.
"""

import inspect
from collections.abc import Mapping
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
    Tabulated,
    ZeroTerminalSNR,
)
from diffaug.schedules.base import STRAIGHT, VARIANCE_PRESERVING, betas_of
from diffaug.targets import check_target

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x_0": "sample", "flow": "flow_prediction", "F": "epsilon"}
"""What diffusers calls a target, ``prediction_type``. Its EDM schedulers call F epsilon, too."""

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
    """A diffusers scheduler with the schedule's alpha_bar and sigma.

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
    if schedule.scaling is STRAIGHT:
        name, chosen = _flow(schedule, target, scheduler, timesteps)
    elif schedule.scaling is VARIANCE_PRESERVING:
        name, chosen = _betas(schedule, target, scheduler, timesteps)
    else:
        name, chosen = _edm(schedule, target, scheduler, sigma_data)
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
    """How diffusers is told the schedule: by its name where it has one, else by its betas."""
    if isinstance(schedule, ZeroTerminalSNR):
        inner = _named(schedule.base, scheduler, points)
        if "trained_betas" not in inner:
            return {**inner, "rescale_betas_zero_snr": True}
    if isinstance(schedule, LinearBeta):
        scale = schedule._scale
        return {
            "beta_schedule": "linear",
            "beta_start": scale * schedule.beta_start,
            "beta_end": scale * schedule.beta_end,
        }
    if isinstance(schedule, ScaledLinearBeta):
        return {
            "beta_schedule": "scaled_linear",
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
        }
    if schedule == Cosine(schedule.timesteps or 1):
        return {"beta_schedule": "squaredcos_cap_v2"}
    if isinstance(schedule, SigmoidBeta) and scheduler == "DDPMScheduler":
        return {"beta_schedule": "sigmoid", "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    betas = schedule.betas if schedule.discrete else _betas_between(schedule, points)
    # A schedule that ends without signal is its own rescaling; the flag tells solvers of log-SNR to expect it.
    return {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": betas[-1].item() == 1.0}


def _betas_between(schedule: Schedule, points: int) -> Tensor:
    """Betas for which diffusers' t = 0 .. T - 1 is unit time t / T: what the network is told stays what it learned.

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
    """The factor by which the straight path's noise is shifted; None if it is something else."""
    if isinstance(schedule, Rectified):
        return 1.0
    if type(schedule) is Shifted:
        inner = _shift(schedule.base)
        factor = schedule.factor if schedule.factor is not None else (schedule.image or 1) / schedule.base_image
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


def from_diffusers(scheduler: Any) -> Schedule:
    """The schedule of a diffusers scheduler, or of its config, with equal alpha_bar and sigma.

    What a scheduler says of sampling alone (solver, spacing, karras or beta sigmas, clipping) is not part of it. See
    `target_of` for what its networks predict.

    Arguments:
        scheduler: a scheduler; or its config, a mapping as ``scheduler.config`` or scheduler_config.json holds it.

    Raises:
        ValueError: diffaug has no counterpart, with what to do instead.
    """
    config, name = _config(scheduler)
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return _from_flow(config, name)
    if name.startswith("EDM"):
        ends = {"sigma_min": config.get("sigma_min", 0.002), "sigma_max": config.get("sigma_max", 80.0)}
        if config.get("sigma_schedule", "karras") == "exponential":
            return VE(**ends)
        return EDM(**ends, rho=float(config.get("rho", 7.0)))
    if config.get("trained_betas") is None and "beta_schedule" not in config:
        raise ValueError(
            f"from_diffusers knows schedulers that are given by betas, EDM's and the flow matching ones, but got "
            f"{name}: use Tabulated with its betas or alpha_bars, or write its log-SNR as a schedule of your own."
        )
    return _from_betas(config, name, scheduler)


def _config(scheduler: Any) -> tuple[dict[str, Any], str]:
    config = getattr(scheduler, "config", scheduler)
    if not isinstance(config, Mapping):
        raise refuse("scheduler", scheduler, "a diffusers scheduler, or its config")
    if config is not scheduler:
        return dict(config), type(scheduler).__name__
    # scheduler.config does not say whose it is; scheduler_config.json does.
    guess = "EDM" if "sigma_data" in config else "FlowMatch" if "shift" in config else "Scheduler"
    return dict(config), str(config.get("_class_name") or f"{guess} (a config without _class_name)")


def _from_flow(config: Mapping[str, Any], name: str) -> Schedule:
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{name} with use_dynamic_shifting has another schedule for every size of image: state the one you want, "
            "Shifted(Rectified(), factor=s), with s = exp(mu) where time_shift_type is exponential."
        )
    shift = float(config.get("shift", config.get("flow_shift", 1.0)))
    return Rectified() if shift == 1 else Shifted(Rectified(), factor=shift)


def _from_betas(config: Mapping[str, Any], name: str, scheduler: Any) -> Schedule:
    steps, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    ends = {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    trained = config.get("trained_betas")
    if trained is not None:
        values = torch.as_tensor(trained, dtype=torch.float64).tolist()
        # As a rescaled table has it already: its last beta is 1.
        return Tabulated(tuple(values)) if values[-1] == 1.0 else _rescaled(Tabulated(tuple(values)), config)
    if kind == "linear":
        return _rescaled(LinearBeta(steps, **ends), config)
    if kind == "scaled_linear":
        return _rescaled(ScaledLinearBeta(steps, **ends), config)
    if kind == "squaredcos_cap_v2":
        return _rescaled(Cosine(steps), config)
    if kind == "sigmoid":
        return _rescaled(SigmoidBeta(steps, **ends), config)
    table = getattr(scheduler, "betas", None)
    if isinstance(table, Tensor):
        return Tabulated(tuple(table.double().tolist()))
    raise ValueError(
        f"beta_schedule={kind!r} of {name} has no name in diffaug: pass the scheduler itself, not its config, and its "
        "table of betas is taken."
    )


def _rescaled(schedule: Schedule, config: Mapping[str, Any]) -> Schedule:
    return ZeroTerminalSNR(schedule) if config.get("rescale_betas_zero_snr") else schedule


def target_of(scheduler: Any) -> str:
    """What the networks of a diffusers scheduler predict, by diffaug's name: epsilon, v, x_0, flow or F.

    Arguments:
        scheduler: as `from_diffusers` takes it.
    """
    config, name = _config(scheduler)
    if name.startswith("FlowMatch"):
        return "flow"
    kind = config.get("prediction_type", "epsilon")
    if name.startswith("EDM"):
        if kind == "epsilon":
            return "F"
        raise ValueError(f"{name} with prediction_type={kind!r} predicts -F, which diffaug has no name for.")
    names = {diffusers: ours for ours, diffusers in PREDICTIONS.items() if ours != "F"}
    return names[choice("prediction_type", kind, tuple(names))]
