"""A small network of clips whose frames have times of their own: what an experiment needs to run, no more."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class CausalFrames(nn.Module):
    """Convolutions in which each frame sees itself and the frames before it, told every frame's own time.

    Called as ``network(x, time)`` with clips (B, F, C, H, W) and times (B, F), in the range of ``t_embed``, up to 1000;
    returns a tensor of x's shape. A frame's result does not depend on the frames after it.

    Arguments:
        channels: C.
        width: of the layers, a multiple of 8.
        depth: how many layers between the first and the last, each of which looks two frames back.
    """

    def __init__(self, channels: int = 1, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Conv3d(width, width, 3, padding=(0, 1, 1)) for _ in range(depth))
        self.times = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.width = width

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        frames = x.shape[:2]
        if x.ndim != 5 or time.shape != frames:
            raise ValueError(
                "model=causal_frames takes clips (B, F, C, H, W) and a time for each frame, (B, F), but got images of "
                f"shape {tuple(x.shape)} and times of shape {tuple(time.shape)}: set process.parts.axis=1 "
                "process.parts.block=1 and data=moving_digits, or clips of your own."
            )
        angles = time.flatten()[:, None] * torch.linspace(0, -math.log(1e3), self.width // 2, device=x.device).exp()
        told = torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype)
        h = self.first(x.flatten(0, 1))
        for norm, layer, tell in zip(self.norms, self.layers, self.times, strict=True):
            scale, shift = tell(told)[:, :, None, None].chunk(2, 1)
            mixed = functional.silu(norm(h) * (1 + scale) + shift)  # frame by frame, so that none sees a later one
            clip = mixed.unflatten(0, frames).transpose(1, 2)
            h = h + layer(functional.pad(clip, (0, 0, 0, 0, 2, 0))).transpose(1, 2).flatten(0, 1)
        return self.last(h).unflatten(0, frames)
