"""torch.compile as the pass uses it: on which devices, with which options, and what is said where it fails."""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COMPILE_ELEMENTS = 512
"""The size of a sample from which compiling pays for itself."""


class CompileError(RuntimeError):
    """The pass does not compile here. Whoever hands out batches decides whether the eager path may stand in."""


def call_compiled(function: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
    """Call a compiled form of the function, whose arguments begin with the images, their keys' rows and a mix.

    Raises:
        CompileError: it does not compile.
    """
    from torch._dynamo import mark_static  # here, as importing it takes a second
    from torch._dynamo.exc import TorchDynamoException

    # Apart from what they are views of, whose sizes dynamo guards too: one image in several views, or images as wide as
    # high after others, would be compiled again.
    args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
    x, _, coefficients, *_ = args
    if x.device.type == "cuda":
        # There a sample's size is a constant of the compiled code, the batch's is not: one compile for each size of
        # sample. With the size a variable every address costs a 64-bit division, and no access is of 128 bits.
        mark_static(x, [*range(1, x.ndim)])
        mark_static(coefficients, [*range(1, coefficients.ndim)])
    try:
        return _compiled(function, x.device.type)(*args)
    except TorchDynamoException as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CompileError(f"torch.compile failed ({type(error).__name__}: {reason})") from error


@functools.cache
def _compiled(function: Callable[..., list[Tensor]], device_type: str) -> Callable[..., list[Tensor]]:
    from torch._dynamo import config as dynamo  # here, as both are slow to import
    from torch._inductor import config

    # One graph for every batch size but 1. Each number of fields, dtype, parity and, on CUDA, size of sample makes its
    # own, hence the larger limit.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 256)
    # The four runs of a sample must be written where they lie. Inductor's other way of joining them, its choice on
    # GPUs, works out all four for every element and keeps one.
    names = ("max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs")
    options: dict[str, Any] = {name: 0 for name in names if hasattr(config, name)}
    # No global that the pass reads ever changes: to look at them again at each call would only take time.
    options["guard_filter_fn"] = torch.compiler.skip_guard_on_globals_unsafe  # pyright: ignore[reportUnknownMemberType]
    if device_type == "cuda" and hasattr(config, "constant_and_index_propagation"):
        # It types the blocks' numbers, and what is multiplied with them, as 32 bits where sizes are constants: Philox's
        # multipliers are larger, and Triton refuses them (pytorch/pytorch 175966). C++ loops need it to be vectorised.
        options["constant_and_index_propagation"] = False
    return torch.compile(function, dynamic=True, fullgraph=True, options=options)


@functools.cache
def compiler_for(device_type: str) -> bool:
    """Return whether torch.compile can work on this kind of device: a C++ compiler for the CPU, Triton for CUDA."""
    if device_type == "cpu":
        from torch._inductor import config  # here, as it is slow to import and needed only where compiling is asked

        names = (config.cpp.cxx,) if isinstance(config.cpp.cxx, str) else config.cpp.cxx
        return any(shutil.which(name) for name in names if name)
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    return False
