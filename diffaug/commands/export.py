"""export: a trained Denoiser as a folder that plain diffusers loads and samples from.

A pipeline calls ``unet(x, t)`` with its scheduler's own t, so the network must have been trained on just that:

==================  ===========================  =======================================  ========================
schedule            model.input, model.time      scheduler, and what else can take over   pipeline
==================  ===========================  =======================================  ========================
discrete            x_t, t (or t_embed, T 1000)  DDIM; DDPM, DPM-Solver                   DDPMPipeline
continuous, VP      x_t, t_embed                 the same, on 1000 points                 DDPMPipeline
rectified           x_t, t_embed                 FlowMatchEuler; DPM-Solver (flow)        DDPMPipeline
edm                 x_in, c_noise (target F)     EDMEuler; EDMDPMSolver                   ConsistencyModelPipeline
==================  ===========================  =======================================  ========================

ConsistencyModelPipeline is the one pipeline of diffusers for a UNet2DModel that scales the network's input and hands
it labels; a network with ``condition`` is exported under it, too. Nothing of it is specific to consistency models.

A network of latents goes with its autoencoder: into LDMPipeline, which scales the network's input too; with labels into
DiTPipeline, which does not, but calls a UNet2DModel as its transformer. Of flows these take DPM-Solver alone, as
FlowMatchEuler has neither ``init_noise_sigma`` nor ``scale_model_input``. The scale of the channels is put into the
autoencoder: see `diffaug.interop.scale_autoencoder`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffaug.checks import refuse
from diffaug.interop import scale_autoencoder, to_diffusers
from diffaug.schedules import EDM, VE, Rectified
from diffaug.schedules.base import STRAIGHT, VARIANCE_PRESERVING
from diffaug.training.checkpoint_io import find_damage
from diffaug.training.denoiser import DenoiserBase

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

EMBEDDED = 1000
"""The range of ``t_embed``: diffusers' t has it too where there are so many timesteps."""


def find_run(ckpt: str) -> tuple[Path, Path]:
    """Find the folder of a run and its checkpoint, from either.

    Arguments:
        ckpt: the folder that train.py left, whose checkpoints/last.ckpt is meant; or a checkpoint in it.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no .hydra/config.yaml beside it.
    """
    path = Path(ckpt)
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"ckpt={ckpt}: there is no {file}. Give the folder of a run, or a checkpoint in it.")
    for run in list(file.resolve().parents)[:3]:
        if (run / ".hydra" / "config.yaml").is_file():
            return run, file
    raise FileNotFoundError(
        f"ckpt={ckpt}: no .hydra/config.yaml lies beside or above it, so the recipe it was trained on is not known. "
        "Give a checkpoint in the folder that train.py left, or call diffaug.commands.export.export with the Denoiser."
    )


def load_weights(model: DenoiserBase, file: Path) -> dict[str, Any]:
    """Put a checkpoint's weights into a model, and return it; of a run with EMA these are the averaged ones.

    Raises:
        ValueError: the file is damaged, or they are of another network.
    """
    fault = find_damage(file)
    if fault:
        raise ValueError(f"ckpt={file} is damaged: {fault}.")
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the network that its run's config describes: {error}") from error
    return checkpoint


def export(
    model: DenoiserBase,
    out: str | Path,
    image_shape: tuple[int, ...],
    *,
    autoencoder: Any = None,
    latent_stats: Mapping[str, Sequence[float]] | None = None,
) -> "DiffusionPipeline":
    """Write a Denoiser as a diffusers pipeline folder.

    Arguments:
        model: its network must be a diffusers UNet2DModel.
        out: the folder, made here; what it holds of an earlier export is written over.
        image_shape: (C, H, W) of what the network makes.
        autoencoder: where these are latents, the diffusers AutoencoderKL that made them.
        latent_stats: how they were scaled, as ``data.latent_stats``; None where they were not.

    Returns:
        The pipeline.

    Raises:
        ValueError: diffusers has no counterpart, with what to train instead.
    """
    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DModel

    network, schedule, labels = model.network, model.process.schedule, model.condition is not None
    if not isinstance(network, UNet2DModel):
        raise refuse("model.network", type(network).__name__, "a diffusers.UNet2DModel, which pipelines call")
    if model.latents == (autoencoder is None):
        raise ValueError(
            "This network, trained with a data.encoder or process.value_range=null, makes latents: a pipeline needs "
            "the autoencoder that decodes them, autoencoder=."
            if model.latents
            else "This network makes images, which no autoencoder decodes."
        )
    _check_convention(model)
    scaled, sigma_data = isinstance(schedule, (EDM, VE)), model.process.sigma_data
    if len(image_shape) != 3:
        raise refuse("data.image_shape", image_shape, "[channels, height, width]")
    _, height, width = image_shape
    if model.latents:
        name = "DiTPipeline" if labels else "LDMPipeline"
    else:
        name = "ConsistencyModelPipeline" if scaled or labels else "DDPMPipeline"
    if name != "DDPMPipeline" and height != width:
        raise ValueError(f"diffusers' {name} makes squares, but data.image_shape is {list(image_shape)}.")
    if name == "DiTPipeline" and scaled:
        raise ValueError(
            f"diffusers has no pipeline of latents that hands a network labels and scales its input, as {schedule!r} "
            "needs: train on a variance preserving schedule, without labels, or sample by Denoiser.sample and decode."
        )
    solver = None  # FlowMatchEuler has no init_noise_sigma, for which all but DDPMPipeline ask
    if name != "DDPMPipeline" and schedule.scaling is STRAIGHT:
        solver = "DPMSolverMultistepScheduler"
    options = {"clip_sample": False} if model.latents and schedule.scaling is VARIANCE_PRESERVING else {}
    size = height if height == width else [height, width]
    network.register_to_config(**{**{key: _plain(value) for key, value in network.config.items()}, "sample_size": size})
    parts = {"transformer" if name == "DiTPipeline" else "unet": network.eval()}
    if model.latents:
        made = scale_autoencoder(autoencoder, latent_stats, sigma_data)
        parts["vae" if name == "DiTPipeline" else "vqvae"] = made
    scheduler = to_diffusers(schedule, model.target, solver, timesteps=EMBEDDED, sigma_data=sigma_data, **options)
    pipeline = getattr(diffusers, name)(**parts, scheduler=scheduler)
    pipeline.save_pretrained(out)
    return pipeline


def _plain(value: Any) -> Any:
    """Convert to what JSON holds: a network made by Hydra was given its own kinds of lists and mappings."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value


def _check_convention(model: DenoiserBase) -> None:
    """Refuse a network that was told of time, or given images, in another way than a pipeline will."""
    schedule = model.process.schedule
    if isinstance(schedule, (EDM, VE)):
        wanted_input, wanted_times = "x_in", ["c_noise"]
    else:
        wanted_input, wanted_times = "x_t", ["t"] if schedule.discrete else []
        if schedule.timesteps in (0, EMBEDDED):
            wanted_times.insert(0, "t_embed")
    if schedule.scaling is STRAIGHT and not isinstance(schedule, Rectified):
        raise ValueError(
            f"diffusers tells a flow network 1000 sigma, but under {schedule!r} this one was told of the time before "
            "the shift. Train with schedule=rectified and times=logit_normal (or another density that favours noise)."
        )
    if model.input != wanted_input or model.time not in wanted_times:
        raise ValueError(
            f"A diffusers pipeline for {schedule!r} gives the network {wanted_input} and {' or '.join(wanted_times)}, "
            f"but this one was trained with model.input={model.input} and model.time={model.time}: train it with "
            f"model.input={wanted_input} model.time={wanted_times[0]}."
        )


def write_usage(pipeline: Any, out: str | Path) -> str:
    """Write how to sample from an exported folder, as Python for a machine without diffaug."""
    name = type(pipeline).__name__
    if name == "DiTPipeline":
        call = "class_labels=[0] * 16, guidance_scale=1, num_inference_steps=50"
    else:
        labels = ", class_labels=[0] * 16" if pipeline.unet.config.num_class_embeds else ""
        call = f"batch_size=16, num_inference_steps=50{labels}"
    return "\n".join(
        [
            f"from diffusers import {name}",
            "",
            f"pipeline = {name}.from_pretrained({str(out)!r})  # {type(pipeline.scheduler).__name__}",
            f"images = pipeline({call}).images",
        ]
    )
