"""The one pass: images in, every image-shaped field out, read once and written once.

For each element: ``field = p (2 x - centre) + q epsilon``, with epsilon made on the spot from the sample's key. The
coefficients hold the scaling of the image to [-1, 1], so scaling costs nothing and is exact: for uint8, 2 x - 255 is
an integer.

One definition serves all devices. `torch.compile` turns it into a single loop (C++) or kernel (Triton), in which a
call of Philox serves four elements. Without a compiler it runs eagerly, in pieces that stay in the cache.
"""

import functools
import logging
import shutil
import warnings

import torch
from torch import Tensor

from diffaug.noise.philox import Keys, Purpose, lanes, normals

COMPILE_ELEMENTS = 1024
"""The size of a sample from which compiling pays for itself."""

_PIECE = 2**15  # blocks worked on at a time by the eager path: its int64 intermediates then stay in the cache
_log = logging.getLogger("diffaug")


def _blend(x: Tensor, epsilon: Tensor, mix: Tensor, centre: float, field: int, dtype: torch.dtype) -> Tensor:
    centred = 2.0 * x.float() - centre
    return (mix[:, field, 0:1] * centred + mix[:, field, 1:2] * epsilon).to(dtype)


def _whole(x: Tensor, keys: Keys, mix: Tensor, centre: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """All fields of all samples at once: what is compiled."""
    elements, fields = x.shape[1], range(mix.shape[1])
    blocks = lanes(elements)
    runs = normals(keys, Purpose.EPSILON, torch.arange(blocks, device=x.device))
    if elements % 4:
        epsilon = torch.cat(runs, 1)[:, :elements]
        return tuple(_blend(x, epsilon, mix, centre, f, dtype) for f in fields)
    parts = [x[:, i * blocks : (i + 1) * blocks] for i in range(4)]
    return tuple(
        torch.cat([_blend(part, run, mix, centre, f, dtype) for part, run in zip(parts, runs, strict=True)], 1)
        for f in fields
    )


def _pieces(x: Tensor, keys: Keys, mix: Tensor, centre: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same, piece by piece: some samples at a time, or some blocks of one sample."""
    samples, elements = x.shape
    fields = [torch.empty(samples, elements, dtype=dtype, device=x.device) for _ in range(mix.shape[1])]
    blocks = lanes(elements)
    rows, columns = max(1, _PIECE // max(blocks, 1)), min(blocks, _PIECE)
    for row in range(0, samples, rows):
        part = slice(row, row + rows)
        some = Keys(*(k[part] for k in keys))
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
    return tuple(fields)


def given(x: Tensor, epsilon: Tensor, mix: Tensor, centre: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same fields from an epsilon that is given, float32, of x's shape."""
    return tuple(_blend(x, epsilon, mix, centre, f, dtype) for f in range(mix.shape[1]))


def drawn(
    x: Tensor, keys: Keys, mix: Tensor, centre: float, dtype: torch.dtype, *, compiled: bool
) -> tuple[Tensor, ...]:
    """Every image field of B samples, with standard normal epsilon.

    Arguments:
        x: images, uint8 or float, shape (B, N).
        keys: of the B samples.
        mix: (p, q) of each of F fields, float32, shape (B, F, 2).
        centre: so that 2 x - centre is symmetric about 0.
        dtype: of the results; the arithmetic is float32.
        compiled: whether to run the compiled form. Its last bits may differ from the eager form's.

    Returns:
        F tensors of dtype ``dtype``, shape (B, N).
    """
    if compiled and not _failed:
        try:
            return _compiled()(x, keys, mix, centre, dtype)
        except torch._dynamo.exc.TorchDynamoException as error:  # pyright: ignore[reportPrivateImportUsage]
            _failed.append(error)
            warnings.warn(
                f"torch.compile failed ({type(error).__name__}: {str(error).splitlines()[0]}); diffaug goes on with its "
                "eager path, which is slower and may differ in the last bit. Set process.compile=false to begin there.",
                stacklevel=2,
            )
    return (_pieces if x.device.type == "cpu" else _whole)(x, keys, mix, centre, dtype)


_failed: list[Exception] = []


@functools.cache
def _compiled():  # noqa: ANN202 - what torch.compile returns has no public name
    # One graph for every batch size. Each number of fields, dtype and parity makes its own, hence the larger limit.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(_whole, dynamic=True, fullgraph=True)


@functools.cache
def compiler_for(device_type: str) -> bool:
    """Whether torch.compile can work on this kind of device: a C++ compiler for the CPU, Triton for CUDA."""
    if device_type == "cpu":
        from torch._inductor import config  # here, as it is slow to import and needed only where compiling is asked

        names = config.cpp.cxx if isinstance(config.cpp.cxx, tuple) else (config.cpp.cxx,)
        return any(shutil.which(name) for name in names if name)
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    return False
