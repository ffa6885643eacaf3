"""The one pass: images in, every image-shaped field out, read once and written once.

For each element: ``field = p (2 x - centre) + q epsilon``, with epsilon made on the spot from the sample's key. The
coefficients hold the scaling of the image to [-1, 1], so scaling costs nothing and is exact: for uint8, 2 x - 255 is
an integer.

One definition serves all devices. `torch.compile` turns it into a single loop (C++) or kernel (Triton), in which a
call of Philox serves four elements. Without a compiler it runs eagerly, in pieces that stay in the cache.
"""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import indices, lanes, normals, points

COMPILE_ELEMENTS = 512
"""The size of a sample from which compiling pays for itself."""

_PIECE = 2**17  # blocks worked on at a time by the eager path: its intermediates then stay in the cache


def _blend(x: Tensor, epsilon: Tensor, mix: Tensor, centre: float, field: int, dtype: torch.dtype) -> Tensor:
    centred = 2.0 * x.float() - centre
    return (mix[:, field, 0:1] * centred + mix[:, field, 1:2] * epsilon).to(dtype)


def _whole(x: Tensor, rows: Tensor, mix: Tensor, centre: float, dtype: torch.dtype) -> list[Tensor]:
    """Draw and mix all fields of all samples at once: what is compiled. The keys come as their rows, one argument."""
    keys = Keys(rows)
    elements = x.shape[1]
    blocks = lanes(elements)
    if elements % 4 and x.device.type == "cuda":
        return _whole_in_two(x, keys, mix, centre, dtype)
    runs = normals(keys, Purpose.EPSILON, torch.arange(blocks, device=x.device))
    if elements % 4:
        return mix_given(x, torch.cat(runs, 1)[:, :elements], mix, centre, dtype)
    parts = [x[:, i * blocks : (i + 1) * blocks] for i in range(4)]
    return [
        torch.cat([_blend(part, run, mix, centre, f, dtype) for part, run in zip(parts, runs, strict=True)], 1)
        for f in range(mix.shape[1])
    ]


def _whole_in_two(x: Tensor, keys: Keys, mix: Tensor, centre: float, dtype: torch.dtype) -> list[Tensor]:
    """Do the same for a size that is no multiple of 4: blocks of four elements, and up to three others apart.

    So epsilon never visits memory: 9 bytes an element instead of 17. (It wants a size that is a constant of the
    compiled code, as on CUDA; with a variable one the C++ compiler takes minutes.)
    """
    elements = x.shape[1]
    blocks = lanes(elements)
    whole = max(elements - 3 * blocks, 0)
    made = [
        (start, stop, normals(keys, Purpose.EPSILON, torch.arange(start, stop, device=x.device)))
        for start, stop in ((0, whole), (whole, blocks))
        if start < stop
    ]
    pieces: list[tuple[int, int, Tensor]] = []  # in order: where it begins and ends, and its noise
    for lane in range(4):
        for start, stop, runs in made:
            begin, end = lane * blocks + start, min(lane * blocks + stop, elements)
            if begin < end:
                pieces.append((begin, end, runs[lane][:, : end - begin]))
    return [
        torch.cat([_blend(x[:, begin:end], run, mix, centre, f, dtype) for begin, end, run in pieces], 1)
        for f in range(mix.shape[1])
    ]


def _pieces(x: Tensor, keys: Keys, mix: Tensor, centre: float, dtype: torch.dtype) -> list[Tensor]:
    """Do the same piece by piece: some samples at a time, or some blocks of one sample."""
    samples, elements = x.shape
    fields = [torch.empty(samples, elements, dtype=dtype, device=x.device) for _ in range(mix.shape[1])]
    blocks = lanes(elements)
    rows, columns = max(1, _PIECE // max(blocks, 1)), min(blocks, _PIECE)
    for row in range(0, samples, rows):
        part = slice(row, row + rows)
        some = keys.part(part)
        for start in range(0, blocks, columns):
            stop = min(start + columns, blocks)
            runs = normals(some, Purpose.EPSILON, torch.arange(start, stop, device=x.device))
            for lane, run in enumerate(runs):
                begin, end = lane * blocks + start, min(lane * blocks + stop, elements)
                if begin < end:
                    for f, out in enumerate(fields):
                        out[part, begin:end] = _blend(
                            x[part, begin:end], run[:, : end - begin], mix[part], centre, f, dtype
                        )
    return fields


def mix_given(x: Tensor, epsilon: Tensor, mix: Tensor, centre: float, dtype: torch.dtype) -> list[Tensor]:
    """Mix the same fields from an epsilon that is given, float32, of x's shape."""
    return [_blend(x, epsilon, mix, centre, f, dtype) for f in range(mix.shape[1])]


def draw_and_mix(
    x: Tensor, keys: Keys, mix: Tensor, centre: float, dtype: torch.dtype, *, compiled: bool
) -> list[Tensor]:
    """Draw standard normal epsilon and mix every image field of B samples.

    Arguments:
        x: images, uint8 or float, shape (B, N).
        keys: of the B samples.
        mix: (p, q) of each of F fields, float32, shape (B, F, 2).
        centre: so that 2 x - centre is symmetric about 0.
        dtype: of the results; the arithmetic is float32.
        compiled: whether to run the compiled form. Its last bits may differ from the eager form's.

    Returns:
        F tensors of dtype ``dtype``, shape (B, N).

    Raises:
        CompileError: it does not compile.
    """
    if compiled:
        return _call_compiled(_whole, x, keys.rows, mix, centre, dtype)
    if x.device.type == "cpu":
        return _pieces(x, keys, mix, centre, dtype)
    return _whole(x, keys.rows, mix, centre, dtype)


def draw_times_and_mix(
    x: Tensor, keys: Keys, table: Tensor, centre: float, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Draw uniform independent timesteps and mix every image field in one compiled call, which spares a launch.

    The times are integer arithmetic and the fields are `draw_and_mix`'s own definition, so nothing but the time that it
    takes tells this from drawing the times first.

    Arguments:
        table: (p, q) of each field at each timestep, float32, shape (T, F, 2).

    Returns:
        The timesteps, int64, shape (B,), and the fields.

    Raises:
        CompileError: it does not compile.
    """
    t, *fields = _call_compiled(_whole_with_uniform_times, x, keys.rows, table, centre, dtype)
    return t, fields


def _whole_with_uniform_times(
    x: Tensor, rows: Tensor, table: Tensor, centre: float, dtype: torch.dtype
) -> list[Tensor]:
    t = indices(points(Keys(rows), Purpose.TIME), table.shape[0])
    return [t, *_whole(x, rows, table[t], centre, dtype)]


class CompileError(RuntimeError):
    """The pass does not compile here. Whoever hands out batches decides whether the eager path may stand in."""


def _call_compiled(function: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
    from torch._dynamo import mark_static  # here, as importing it takes a second
    from torch._dynamo.exc import TorchDynamoException

    x, _, coefficients, *_ = args
    if x.device.type == "cuda":
        # There a sample's size is a constant of the compiled code, the batch's is not: one compile for each size of
        # sample. With the size a variable every address costs a 64-bit division, and no access is of 128 bits.
        mark_static(x, 1)
        mark_static(coefficients, [1, 2])
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
