"""The components of a ForwardProcess, and the validation of these, together, and of its calls."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffaug.checks import guess, instance, refuse
from diffaug.noise import Noise
from diffaug.randomness.keys import ELEMENTS_MAX
from diffaug.schedules import Schedule
from diffaug.targets import FIELDS, PAIR_FIELDS, TARGETS, THIRD_FIELDS, Pair, Weight
from diffaug.times import Parts, Times


class Components(nn.Module):
    """What a `diffaug.process.ForwardProcess` is made of.

    Attributes:
        schedule: how signal turns into noise with t.
        times: how t is drawn.
        noise: the kind of noise.
        weight: the loss weight.
        target: what the network predicts.
        pair: how an earlier state is drawn; None where none is.
        parts: the parts of a sample that have a t of their own; None where it has one.
        sigma_data: the standard deviation of the images in [-1, 1].
        fields: what a batch holds.
        value_range: the values that float images span; None for latents.
        compile_mode: "auto", True or False.
        dtype: of the images that come out; None is float32.
    """

    schedule: Schedule
    times: Times
    noise: Noise
    weight: Weight
    target: str
    pair: Pair | None
    parts: Parts | None
    sigma_data: float
    fields: tuple[str, ...]
    value_range: tuple[float, float] | None
    compile_mode: bool | str
    dtype: torch.dtype | None


def check_names(fields: Sequence[object]) -> tuple[str, ...]:
    """Check that the fields are different names, and return them as a tuple."""
    if isinstance(fields, str) or not fields or len(set(fields)) != len(fields):
        raise refuse("process.fields", fields, "a list of different names")
    names = tuple(name for name in fields if isinstance(name, str) and name.isidentifier())
    if len(names) != len(fields):
        raise refuse("process.fields", fields, "a list of names")
    return names


def check_dtype(dtype: object) -> torch.dtype | None:
    """Check that images can have the dtype, and return it."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise refuse("process.dtype", dtype, "a floating point torch.dtype or None")
    return dtype


def check_components(process: Components) -> None:
    """Refuse components that are not what they should be, or make no sense together."""
    for name, kind in (("schedule", Schedule), ("times", Times), ("noise", Noise), ("weight", Weight)):
        instance(f"process.{name}", getattr(process, name), kind, f"a {kind.__name__} object")
    process.times.check(process.schedule)
    if process.parts is not None:
        _check_parts(process, process.parts)
    of_a_pair = sorted(set(process.fields) & set(PAIR_FIELDS))
    if process.pair is not None:
        _check_pair(process, process.pair)
    elif of_a_pair:
        raise ValueError(
            f"process.fields asks for {of_a_pair}, an earlier state of each image, but pair does not say which: set "
            "it, such as pair=uniform_earlier, to a diffaug.targets.Pair."
        )
    asked = [name for name in process.fields if name in TARGETS]
    if "weight" in process.fields and process.weight.stated_on and asked and process.target not in asked:
        raise ValueError(
            f"process.fields asks for {asked} and weight, but the weight is for process.target={process.target}: set "
            "process.target to what the network predicts."
        )
    process.weight.check(process.schedule, process.target, process.sigma_data)
    if "score" in (*process.fields, process.target) and not process.noise.standard_normal:
        raise ValueError(
            "the score of q(x_t | x_0) is -epsilon / sigma only for standard normal noise, but noise is "
            f"{process.noise!r}. Use noise=gaussian, or another target."
        )


def _check_parts(process: Components, parts: Parts) -> None:
    instance("process.parts", parts, Parts, "a Parts object or None")
    if parts.padding is not None and parts.padding not in process.fields:
        raise ValueError(
            f"process.parts.padding={parts.padding} is a field of the dataset, which is handed on only where "
            f"process.fields asks for it, but that is {list(process.fields)}: add it."
        )
    if process.pair is not None:
        raise ValueError("pair is of two times a sample, process.parts of one for each part: set one of them.")
    if process.times.learns:
        raise ValueError(
            f"process.parts gives each part a time of its own, but {process.times!r} learns from one loss a sample: "
            "use other times, such as times=uniform."
        )


def _check_pair(process: Components, pair: Pair) -> None:
    instance("pair", pair, Pair, "a Pair object or None, which pair=meanflow, say, sets on the command line")
    pair.times.check(process.schedule, process.times)
    third = [name for name in process.fields if name in THIRD_FIELDS]
    if third and not pair.times.third:
        raise ValueError(
            f"process.fields asks for {third}, a time between s and t, but pair.times={pair.times!r} draws these two "
            "only. Leave them out, or use a law of three times, such as pair=imm."
        )
    if pair.times.third and not third:
        raise ValueError(
            f"pair.times={pair.times!r} draws a third time, r, but none of process.fields tells it: add r, and x_r for "
            "the state there, or use a law of two times, such as pair=uniform_earlier."
        )
    if not set(process.fields) & set(PAIR_FIELDS):
        raise ValueError(
            f"pair={pair!r} is drawn, but none of process.fields tells it: add s, and x_s for the state there, or "
            "another of " + ", ".join(name for name in PAIR_FIELDS if name not in THIRD_FIELDS) + "; or set pair=none."
        )
    if pair.noise == "chain" and "x_r" in process.fields:
        raise ValueError("x_r shares the noise of x_t and x_s, but pair.noise=chain gives x_s its own: use same.")
    if pair.noise == "chain" and not process.noise.standard_normal:
        raise ValueError(
            f"a pair under the chain's law needs standard normal noise, but noise is {process.noise!r}. Use "
            "noise=gaussian, or pair.noise=same."
        )


def check_images(where: str, images: object, *, bytes_too: bool = True) -> None:
    """Refuse what is no batch of images."""
    kinds = "uint8 or float" if bytes_too else "float"
    if not (
        isinstance(images, Tensor)
        and images.ndim >= 2
        and (images.is_floating_point() or (bytes_too and images.dtype == torch.uint8))
    ):
        raise refuse(where, images, f"a tensor of {kinds} images, of shape (B, *)")


def check_like(where: str, value: object, shape: Sequence[int], what: str) -> None:
    """Refuse what is no tensor of this shape."""
    if not isinstance(value, Tensor) or value.shape != tuple(shape):
        raise refuse(where, value, f"a tensor of shape {tuple(shape)}, {what}")


def check_states(images: Mapping[str, Tensor], times: Mapping[str, Tensor]) -> None:
    """Refuse the states of a chain and their times, where they are no float images of one shape, one time for each."""
    (first, x), *others = images.items()
    check_images(first, x, bytes_too=False)
    for name, other in others:
        check_like(name, other, x.shape, f"as {first} is")
    for name, t in times.items():
        check_like(name, t, x.shape[:1], "one time for each image")


def number_images(x_0: Tensor, generator: torch.Generator | None) -> tuple[int, Tensor]:
    """Draw a seed for a batch of images that no index tells apart, and number them, shape (B,)."""
    if generator is None:
        raise ValueError(
            "ForwardProcess needs to know which images these are: pass index=, the images' numbers in their dataset "
            "(then the noise of each is the same on every machine and repeats on a resume), or generator=, a "
            "torch.Generator, where there is no such number."
        )
    instance("generator", generator, torch.Generator, "a torch.Generator, such as torch.Generator().manual_seed(0)")
    check_images("x_0", x_0)
    words = torch.randint(2**32, (2,), generator=generator, device=generator.device, dtype=torch.int64)
    low, high = map(int, words)
    return low | high << 32, torch.arange(len(x_0), device="cpu")


def check_call(fields: tuple[str, ...], x_0: Tensor, extra: Mapping[str, Any]) -> None:
    """Refuse images or extra fields that `ForwardProcess.draw` cannot work with."""
    check_images("x_0", x_0)
    if x_0.numel() >= ELEMENTS_MAX * max(x_0.shape[0], 1):
        raise refuse("x_0", tuple(x_0.shape), "of fewer than 2^32 elements a sample")
    if x_0.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x_0 requires a gradient, but what a ForwardProcess draws are data, without one. Pass x_0.detach(), or "
            "make x_0 under torch.no_grad(). For a gradient to x_0 draw t and epsilon so, then mix them by "
            "process.mix(x_0, t, epsilon)."
        )
    clash = sorted(set(extra) & set(FIELDS))
    if clash:
        raise ValueError(
            f"The dataset yields {clash}, which diffaug itself names: rename them in the dataset. "
            f"Names taken: {', '.join(FIELDS)}."
        )
    missing = [name for name in fields if name not in FIELDS and name not in extra]
    if missing:
        raise ValueError(
            f"process.fields asks for {missing}, but there are only {', '.join(FIELDS)}"
            + (f" and, from the dataset, {', '.join(extra)}" if extra else "; the dataset yields nothing else")
            + guess(missing, [*FIELDS, *extra])
        )
