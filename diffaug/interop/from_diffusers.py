"""The forward process of a diffusers scheduler as a schedule."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import choice, refuse
from diffaug.interop.to_diffusers import BETA_SCHEDULES, PREDICTIONS
from diffaug.schedules import EDM, VE, Cosine, Rectified, Schedule, Shifted, Tabulated, ZeroTerminalSNR


def from_diffusers(scheduler: Any) -> Schedule:
    """Convert a diffusers scheduler, or its config, to the schedule with equal alpha_bar and sigma.

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
        schedule: Schedule = Tabulated(tuple(torch.as_tensor(trained, dtype=torch.float64).tolist()))
        if schedule.betas[-1] == 1:  # as a rescaled table has it already
            return schedule
    elif kind in BETA_SCHEDULES:
        schedule = BETA_SCHEDULES[kind](steps, **ends)
    elif kind == "squaredcos_cap_v2":
        schedule = Cosine(steps)
    elif isinstance(table := getattr(scheduler, "betas", None), Tensor):
        return Tabulated(tuple(table.double().tolist()))
    else:
        raise ValueError(
            f"beta_schedule={kind!r} of {name} has no name in diffaug: pass the scheduler itself, not its config, and "
            "its table of betas is taken."
        )
    return ZeroTerminalSNR(schedule) if config.get("rescale_betas_zero_snr") else schedule


def target_of(scheduler: Any) -> str:
    """Return what the networks of a diffusers scheduler predict, by diffaug's name: epsilon, v, x_0, flow or F.

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
