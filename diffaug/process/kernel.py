"""The one pass: images in, every image-shaped field out, read once and written once.

For each element: ``field = p (2 x - centre) + q epsilon``, with epsilon made on the spot from the sample's key. The
coefficients hold the scaling of the image to [-1, 1], so scaling costs nothing and is exact: for uint8, 2 x - 255 is
an integer. They are numbers of a sample, or planes over its parts; and a recipe whose fields do not all hold the same
noise has a third, r, of a second noise xi.

One definition serves all devices. `torch.compile` turns it into a single loop (C++) or kernel (Triton), in which a
call of Philox serves four elements. Without a compiler it runs eagerly, in pieces that stay in the cache.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffaug.process import compiler
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import indices, lanes, normals, points

ONLY_EPSILON = (Purpose.EPSILON,)
"""The noises of most recipes."""

_PIECE = 2**17  # blocks worked on at a time by the eager path: its intermediates then stay in the cache


def _blend(
    x: Tensor, noises: Sequence[Tensor], mix: Tensor, centre: float, dtype: torch.dtype, at: slice = slice(None)
) -> list[Tensor]:
    """Mix the fields of some columns of the images.

    Arguments:
        x: of all columns, shape (B, N, *).
        noises: of those columns: epsilon, and what else is mixed in.
        mix: one number for all columns, shape (B, F, K); or of each column, shape (B, F, K, N, *).
        centre: as in `draw_and_mix`.
        dtype: of the results.
        at: the columns.
    """
    centred, mix = 2.0 * x[:, at].float() - centre, mix[..., None] if mix.ndim == 3 else mix[:, :, :, at]
    fields: list[Tensor] = []
    for f in range(mix.shape[1]):
        field = mix[:, f, 0] * centred
        for number, noise in enumerate(noises, 1):
            field = field + mix[:, f, number] * noise
        fields.append(field.to(dtype))
    return fields


def _draw(keys: Keys, purposes: tuple[Purpose, ...], block: Tensor) -> list[tuple[Tensor, ...]]:
    """Draw the noises of the four elements of each block: of each lane, those of each purpose."""
    return [*zip(*(normals(keys, purpose, block) for purpose in purposes), strict=True)]


def draw_noises(keys: Keys, purposes: tuple[Purpose, ...], like: Tensor) -> list[Tensor]:
    """Draw the noises of all elements, float32, each of the shape of the images."""
    elements = like[0].numel()
    runs = (normals(keys, purpose, torch.arange(lanes(elements), device=like.device)) for purpose in purposes)
    return [torch.cat(run, 1)[:, :elements].view(like.shape) for run in runs]


def _whole(
    x: Tensor,
    rows: Tensor,
    mix: Tensor,
    centre: float,
    dtype: torch.dtype,
    purposes: tuple[Purpose, ...] = ONLY_EPSILON,
) -> list[Tensor]:
    """Draw and mix all fields of all samples at once: what is compiled. The keys come as their rows, one argument.

    x and mix are as `_lay_out` gives them, but not in rows.
    """
    keys, size = Keys(rows), x.shape[1]
    if size % 4 and x.device.type == "cuda":
        return _whole_in_two(x, keys, mix, centre, dtype, purposes)
    if size % 4:
        return _blend(x, draw_noises(keys, purposes, x), mix, centre, dtype)
    parts = [
        _blend(x, noises, mix, centre, dtype, slice(lane * (size // 4), (lane + 1) * (size // 4)))
        for lane, noises in enumerate(_draw(keys, purposes, torch.arange(size // 4, device=x.device)))
    ]
    return [torch.cat(field, 1) for field in zip(*parts, strict=True)]


def _whole_in_rows(
    x: Tensor, rows: Tensor, mix: Tensor, centre: float, dtype: torch.dtype, purposes: tuple[Purpose, ...]
) -> list[Tensor]:
    """Do the same for images and coefficients in rows; those of the keys are as `_for_rows` gives them."""
    block = torch.arange(x.shape[2] * x.shape[3], device=x.device).view(x.shape[2:])
    parts = [
        _blend(x[:, lane], noises, mix[:, :, :, lane, :, None], centre, dtype)
        for lane, noises in enumerate(_draw(Keys(rows), purposes, block))
    ]
    return [torch.stack(field, 1) for field in zip(*parts, strict=True)]


def _whole_in_two(
    x: Tensor, keys: Keys, mix: Tensor, centre: float, dtype: torch.dtype, purposes: tuple[Purpose, ...] = ONLY_EPSILON
) -> list[Tensor]:
    """Do the same for a size that is no multiple of 4: blocks of four elements, and up to three others apart.

    So epsilon never visits memory: 9 bytes an element instead of 17. (It wants a size that is a constant of the
    compiled code, as on CUDA; with a variable one the C++ compiler takes minutes.)
    """
    elements = x.shape[1]
    blocks = lanes(elements)
    whole = max(elements - 3 * blocks, 0)
    made = [
        (start, stop, _draw(keys, purposes, torch.arange(start, stop, device=x.device)))
        for start, stop in ((0, whole), (whole, blocks))
        if start < stop
    ]
    parts: list[list[Tensor]] = []  # in order, the fields of each
    for lane in range(4):
        for start, stop, runs in made:
            begin, end = lane * blocks + start, min(lane * blocks + stop, elements)
            if begin < end:
                noises = [run[:, : end - begin] for run in runs[lane]]
                parts.append(_blend(x, noises, mix, centre, dtype, slice(begin, end)))
    return [torch.cat(field, 1) for field in zip(*parts, strict=True)]


def _pieces(
    x: Tensor, keys: Keys, mix: Tensor, centre: float, dtype: torch.dtype, purposes: tuple[Purpose, ...]
) -> list[Tensor]:
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
            for lane, runs in enumerate(_draw(some, purposes, torch.arange(start, stop, device=x.device))):
                begin, end = lane * blocks + start, min(lane * blocks + stop, elements)
                if begin < end:
                    noises, at = [run[:, : end - begin] for run in runs], slice(begin, end)
                    for out, made in zip(fields, _blend(x[part], noises, mix[part], centre, dtype, at), strict=True):
                        out[part, at] = made
    return fields


_SHORTEST = 32  # elements in a row under one coefficient: with fewer, each element is given its own


def _lay_out(x: Tensor, mix: Tensor, in_rows: bool) -> tuple[Tensor, Tensor]:
    """Lay out images and coefficients as the pass takes them.

    Arguments:
        x: shape (B, *).
        mix: as in `draw_and_mix`.
        in_rows: whether a coefficient may serve a row of elements.

    Returns:
        x of shape (B, N), and mix of shape (B, F, K) or (B, F, K, N); or, in rows, x of shape (B, 4, R, M), a run of R
        rows of M elements for each lane of Philox, and mix of shape (B, F, K, 4, R).
    """
    first = mix.shape[:3]
    inner, entries, served = _find_rows(x.shape[1:], mix.shape[3:], in_rows)
    if not entries:
        return x.reshape(len(x), -1), mix.reshape(first)
    mix = mix.reshape(*first, *entries).expand(*first, *served)
    if inner == 1:
        return x.reshape(len(x), -1), mix.reshape(*first, -1)
    return x.reshape(len(x), 4, -1, inner), mix.reshape(*first, 4, -1)


@functools.lru_cache(maxsize=256)
def _find_rows(sizes: torch.Size, planes: torch.Size, in_rows: bool) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return how many elements a row has, how the entries of planes lie, and how they do once each serves its share."""
    if all(plane == 1 for plane in planes):
        return sizes.numel(), (), ()
    elements, last = sizes.numel(), max(dim for dim, plane in enumerate(planes) if plane > 1)
    inner = sizes[last:].numel() // planes[last]  # so many elements side by side have one coefficient
    if elements % 4 == 0:
        inner //= 4 // math.gcd(elements // inner, 4)
    if elements % 4 or inner < _SHORTEST or not in_rows:
        inner = 1
    # Each entry serves size / plane neighbours of its dimension; the last that differ, and what follows, in rows.
    entries = [n for plane in planes[: last + 1] for n in (plane, 1)]
    served = [n for size, plane in zip(sizes[:last], planes[:last], strict=True) for n in (plane, size // plane)]
    served += [planes[last], elements // inner // sizes[:last].numel() // planes[last]]
    return inner, tuple(entries), tuple(served)


def _for_rows(keys: Keys, run: int) -> Tensor:
    """Return the keys' rows for each row of a lane's run, shape (5, B, run), of which no two dimensions can be one.

    Every intermediate value then has the loops of the results. If it had fewer, Inductor would write Philox's words to
    memory between two loops: half as long again.
    """
    rows = keys.rows.new_empty(5, keys.rows.shape[1], run + 1)
    rows.copy_(keys.rows[:5, :, None])
    return rows[..., :run]


def mix_given(x: Tensor, noises: Sequence[Tensor], mix: Tensor, centre: float, dtype: torch.dtype) -> list[Tensor]:
    """Mix the same fields from noises that are given, float32, of x's shape: epsilon alone or with a second."""
    flat, mix = _lay_out(x, mix, in_rows=False)
    noises = [noise.reshape(flat.shape) for noise in noises]
    return [field.view(x.shape) for field in _blend(flat, noises, mix, centre, dtype)]


def draw_and_mix(
    x: Tensor,
    keys: Keys,
    mix: Tensor,
    centre: float,
    dtype: torch.dtype,
    *,
    compiled: bool,
    purposes: tuple[Purpose, ...] = ONLY_EPSILON,
) -> list[Tensor]:
    """Draw standard normal noises, epsilon alone or with a second, and mix every image field of B samples.

    Arguments:
        x: images, uint8 or float, shape (B, *).
        keys: of the B samples.
        mix: (p, q) of each of F fields, float32, shape (B, F, 2), or (p, q, r) with a second noise. Where not all of a
            sample goes by one time: shape (B, F, 2, *planes), with as many dimensions after (B, F, 2) as x has after B,
            each size a divisor of x's; an entry serves size / plane neighbours: all of them where the plane has 1.
        centre: so that 2 x - centre is symmetric about 0.
        dtype: of the results; the arithmetic is float32.
        compiled: whether to run the compiled form. Its last bits may differ from the eager form's.
        purposes: of `diffaug.randomness.keys.Purpose`, by which each noise is drawn.

    Returns:
        F tensors of dtype ``dtype``, of x's shape.

    Raises:
        CompileError: it does not compile.
    """
    laid_out, mix = _lay_out(x, mix, in_rows=compiled)
    if compiled and laid_out.ndim == 4:
        rows = _for_rows(keys, laid_out.shape[2])
        fields = compiler.call_compiled(_whole_in_rows, laid_out, rows, mix, centre, dtype, purposes)
    elif compiled:
        fields = compiler.call_compiled(_whole, laid_out, keys.rows, mix, centre, dtype, purposes)
    elif x.device.type == "cpu":
        fields = _pieces(laid_out, keys, mix, centre, dtype, purposes)
    else:
        fields = _whole(laid_out, keys.rows, mix, centre, dtype, purposes)
    return [field.view(x.shape) for field in fields]


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
    flat = x.reshape(len(x), -1)
    t, *fields = compiler.call_compiled(_whole_with_uniform_times, flat, keys.rows, table, centre, dtype)
    return t, [field.view(x.shape) for field in fields]


def _whole_with_uniform_times(
    x: Tensor, rows: Tensor, table: Tensor, centre: float, dtype: torch.dtype
) -> list[Tensor]:
    t = indices(points(Keys(rows), Purpose.TIME), table.shape[0])
    return [t, *_whole(x, rows, table[t], centre, dtype)]
