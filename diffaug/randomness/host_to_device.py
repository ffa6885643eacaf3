"""Transfer of small tensors from the host to an accelerator, without waiting for it."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def move(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move a batch's numbers to a device: by one copy, for which nothing waits. What is there already stays.

    Arguments:
        tensors: small ones, of any dtypes and shapes.
    """
    crossing = [tensor for tensor in tensors if tensor.device != device]
    if not crossing:
        return list(tensors)
    # Pinned, as else the driver copies it into pinned memory of its own first, for which it may wait.
    pin = device.type == "cuda" and torch.cuda.is_initialized()
    if len(crossing) == 1:
        (one,) = crossing
        there = (one.pin_memory() if pin else one).to(device, non_blocking=overlaps_copies(device))
        return [there if tensor is one else tensor for tensor in tensors]
    # Each begins at a multiple of 64 bytes, as if it had been allocated by itself: compiled kernels count on it.
    starts = [0, *accumulate((tensor.nbytes + 63) // 64 * 64 for tensor in crossing)]
    packed = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=pin)

    def part(whole: Tensor, start: int, like: Tensor) -> Tensor:
        return whole[start : start + like.nbytes].view(like.dtype).view(like.shape)

    for start, tensor in zip(starts, crossing, strict=False):
        part(packed, start, tensor).copy_(tensor)
    there = packed.to(device, non_blocking=overlaps_copies(device))
    arrived = iter([part(there, start, tensor) for start, tensor in zip(starts, crossing, strict=False)])
    return [tensor if tensor.device == device else next(arrived) for tensor in tensors]


def overlaps_copies(device: torch.device | str) -> bool:
    """Return whether a copy to this device may go on while the host works.

    To the CPU and to MPS values could be read too early (Lightning's own rule).
    """
    return torch.device(device).type not in ("cpu", "mps")
