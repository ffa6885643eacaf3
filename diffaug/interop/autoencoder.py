"""An autoencoder of diffusers whose latents are scaled as a network was trained on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffaug.checks import refuse


def scale_autoencoder(vae: Any, stats: Mapping[str, Sequence[float]] | None, sigma_data: float) -> Any:
    """Return a copy of an autoencoder for latents of mean 0 and the standard deviation ``sigma_data`` in each channel.

    What it decodes, and encodes to, is ``(z - mean) sigma_data / std`` of the other's z. That is linear in each pixel,
    so it goes into the 1 x 1 convolutions on both sides of z, ``quant_conv`` and ``post_quant_conv``, exactly but for
    rounding; ``scaling_factor`` and ``shift_factor``, one number for all channels, say that nothing is left to do.

    Arguments:
        vae: a diffusers AutoencoderKL; or, where there is nothing to scale, AutoencoderTiny.
        stats: ``mean`` and ``std`` of z, a number for each channel; None leaves it as it is.
        sigma_data: the process's.

    Raises:
        ValueError: it is another autoencoder, or of other channels.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    plain = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
    if isinstance(vae, AutoencoderTiny) and stats is None:
        return _copy(vae, {"scaling_factor": 1.0})
    if not isinstance(vae, AutoencoderKL):
        tiny = " AutoencoderTiny squashes its latents before its first layer, so a scale cannot be put into it."
        raise refuse(
            "The autoencoder to be exported",
            type(vae).__name__,
            "a diffusers AutoencoderKL, into whose convolutions the scale of the latents goes."
            + (tiny if isinstance(vae, AutoencoderTiny) else ""),
        )
    made = _copy(vae, {**plain, "use_quant_conv": True, "use_post_quant_conv": True})
    channels = vae.config["latent_channels"]
    for conv, own in ((made.quant_conv, vae.quant_conv), (made.post_quant_conv, vae.post_quant_conv)):
        if own is None:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
    if stats is None:
        return made
    if len(stats["mean"]) != channels:
        raise ValueError(f"The autoencoder has {channels} channels, but data.latent_stats has {len(stats['mean'])}.")
    mean = torch.tensor(stats["mean"], dtype=torch.float64)
    factor = sigma_data / torch.tensor(stats["std"], dtype=torch.float64)
    with torch.no_grad():
        weight, bias = (x.double() for x in (made.post_quant_conv.weight, made.post_quant_conv.bias))
        made.post_quant_conv.bias.copy_(bias + weight[:, :, 0, 0] @ mean)
        made.post_quant_conv.weight.copy_(weight / factor.view(1, -1, 1, 1))
        weight, bias = (x.double() for x in (made.quant_conv.weight, made.quant_conv.bias))
        # The first half makes means, the second the logarithms of variances.
        made.quant_conv.weight[:channels] = weight[:channels].mul(factor.view(-1, 1, 1, 1)).float()
        shifted = (bias[:channels] - mean) * factor
        made.quant_conv.bias.copy_(torch.cat([shifted, bias[channels:] + 2 * factor.log()]))
    return made


def _copy(vae: Any, changes: dict[str, Any]) -> Any:
    # Left in, it would have from_config drop what was changed of the defaults.
    config = {key: value for key, value in {**vae.config, **changes}.items() if key != "_use_default_values"}
    made = type(vae).from_config(config)  # float32, as the network that is exported beside it
    made.load_state_dict(vae.state_dict(), strict=False)  # a convolution that it had not is the caller's to fill
    return made.eval()
