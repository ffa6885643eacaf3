"""Images of an item that keep in step: the target, its conditions, its masks.

Of an item with several images only one is noised, but what a transform flips or crops it must flip and crop in all of
them. Which they are is said by ``data.images``; they then go through a transform together, in one call, as a dict of
torchvision's tv_tensors (``Image`` for the target and conditions, ``Mask`` for masks): geometry reaches all, colour
the images alone, and a mask is never interpolated. kornia's AugmentationSequential is called with plain tensors by
place, and data keys of these roles: of a dict it would leave alone, in silence, what is not named as one of its keys.

Conditions become fields in [-1, 1], float32: as the target does, or of numbers of any dtype from the ``value_range``
that is declared of one. Masks stay as they are. In a batch each has the target's height and width, or
these times the ``scale`` that is declared of it: a low-resolution condition 0.25 times.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from diffaug.checks import refuse
from diffaug.images.items import as_mask, as_tensor, check_range, describe_value, is_image
from diffaug.images.roles import Range, read_role
from diffaug.process import ForwardProcess
from diffaug.targets import FIELDS

TOGETHER = ", which is given a dict of the images that data.images names, as torchvision's v2 transforms take it"


class Aligned:
    """What the images of an item are.

    Arguments:
        images: a role for each by its name in the item, exactly one of them "target"; of the others also a
            dict of ``role``, ``scale`` (how many times the target's height and width they have in a batch) and, of a
            condition, ``value_range`` (what its numbers span). None where nothing is said.
        image_key: which part is the image, where ``images`` does not say it.

    Attributes:
        roles: ``images``, in plain types.
        target: the key of the image to noise.
        beside: the roles of the others by name.
        scales: how many times the target's height and width these have.
        ranges: what the numbers of some conditions span, of any dtype, where it is declared.
        conditions: the names of those that are conditions.
    """

    def __init__(
        self, images: Mapping[str, str | Mapping[str, Any]] | None = None, image_key: str | int | None = None
    ) -> None:
        if images is not None and not isinstance(images, Mapping):
            raise refuse("data.images", images, "a role for each image of an item, {image: target, mask: mask}")
        self.roles: dict[str, str | dict[str, Any]] | None = None
        self.target: str | int | None = image_key
        self.beside: dict[str, str] = {}
        self.scales: dict[str, float] = {}
        self.ranges: dict[str, Range] = {}
        self.conditions: tuple[str, ...] = ()
        if images is None:
            return
        self.roles = {str(name): read_role(f"data.images.{name}", said) for name, said in images.items()}
        roles = {name: said if isinstance(said, str) else said["role"] for name, said in self.roles.items()}
        targets = [name for name, role in roles.items() if role == "target"]
        if len(targets) != 1:
            raise refuse("data.images", self.roles, "of exactly one target, the image to noise")
        if image_key not in (None, targets[0]):
            raise ValueError(
                f"data.image_key={image_key!r}, but data.images says that the image to noise is {targets[0]!r}: name "
                "one and the same (in a store it is called 'image'), or leave out data.image_key."
            )
        self.target = targets[0]
        self.beside = {name: role for name, role in roles.items() if role != "target"}
        more = {name: said for name, said in self.roles.items() if isinstance(said, dict)}
        self.scales = {name: more.get(name, {}).get("scale", 1.0) for name in self.beside}
        self.ranges = {name: tuple(said["value_range"]) for name, said in more.items() if "value_range" in said}
        self.conditions = tuple(name for name, role in self.beside.items() if role == "condition")

    def wanted(self, fields: Collection[str], made: Collection[str] = ()) -> list[str]:
        """List the parts beside the image that a batch needs: fields that are not made, and all that are declared."""
        return list(
            dict.fromkeys([*(name for name in fields if name not in FIELDS and name not in made), *self.beside])
        )

    def read(
        self, image: Any, extra: dict[str, Any], where: str, value_range: tuple[float, float] | None
    ) -> tuple[Any, dict[str, Any]]:
        """Make tensors of the images of an item, where it holds several; else leave it as it is."""
        if not self.beside:
            return image, extra
        self.check_held(extra, where)
        picture = as_tensor(image, where, value_range)
        made: dict[str, Tensor] = {}
        for name, role in self.beside.items():
            its, part = f"{name} of {where}", extra[name]
            if role == "mask":
                made[name] = as_mask(part, its)
                continue
            # Where a range is declared its numbers are taken as they are, whatever their dtype.
            condition = as_mask(part, its).float() if name in self.ranges else as_tensor(part, its, value_range)
            made[name] = condition[None] if condition.ndim == 2 < picture.ndim else condition
        return picture, {**extra, **made}

    def transform(
        self,
        function: Any,
        image: Any,
        extra: dict[str, Any],
        where: str,
        name: str,
        run: Callable[[Callable[[Any], Any], Any], Any] = lambda call, images: call(images),
    ) -> tuple[Any, dict[str, Any]]:
        """Call a user's transform: of the image, or, where several are declared, of all of them together.

        Arguments:
            function: of an item in a worker, or of a batch on its device.
            image, extra: as `read` returns them, or batches of it.
            where, name: how errors call them, and the transform.
            run: how a function of the images, or of a dict of them, is to be called.

        Raises:
            ValueError: they are not of one height and width, or other parts came back.
        """
        if not self.beside:
            return run(function, image), extra
        parts = {str(self.target): image, **{part: extra[part] for part in self.beside}}
        if len({tuple(part.shape[-2:]) for part in parts.values()}) > 1:
            shapes = ", ".join(f"{part} {tuple(value.shape)}" for part, value in parts.items())
            raise ValueError(
                f"{name} takes the images of {where} together, so they must be of one height and width, but they are "
                f"{shapes}. Resize them in the dataset, or make a small condition of the target inside {name}, after "
                "what is random there."
            )
        if hasattr(function, "data_keys"):
            made = run(partial(_call_kornia, function, [self.beside.get(part) == "mask" for part in parts]), parts)
        else:
            _refuse_kornia_inside(function, name)
            made = run(function, self._wrap(parts))
        if not isinstance(made, Mapping) or made.keys() != parts.keys():
            came = f"a dict of {sorted(map(str, made))}" if isinstance(made, Mapping) else describe_value(made)
            raise ValueError(
                f"{name} is given a dict of the images that data.images names, as torchvision's v2 transforms take it, "
                f"and must return one of the same names, {list(parts)}; but it returned {came}."
            )
        return made[str(self.target)], {**extra, **{part: made[part] for part in self.beside}}

    def _wrap(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        from torchvision import tv_tensors

        return {
            name: (tv_tensors.Mask if self.beside.get(name) == "mask" else tv_tensors.Image)(part)
            for name, part in parts.items()
        }

    def check_range(self, name: str, condition: Tensor, value_range: Range | None, where: str) -> None:
        """Refuse a condition whose numbers are outside its range: its own, or where none is declared the target's."""
        own = name in self.ranges
        check_range(
            condition.float(),
            self.ranges.get(name, value_range),
            f"{name} of {where}",
            f"data.images.{name}.value_range" if own else "process.value_range",
            f"Say what it spans: data.images.{name}={{role: condition, value_range: [low, high]}}.",
        )

    def unranged(self, extra: Mapping[str, Any]) -> list[str]:
        """List the conditions of floats of which no range is declared: they are read as the target is."""
        return [name for name in self.conditions if name not in self.ranges and extra[name].is_floating_point()]

    def scale(self, name: str, condition: Tensor, process: ForwardProcess) -> Tensor:
        """Scale a batch's condition to float32 in [-1, 1]."""
        if name not in self.ranges:
            return process.scale(condition)
        low, high = self.ranges[name]
        return (2.0 * condition.float() - (high + low)) / (high - low)

    def check_sizes(self, image: Tensor, extra: Mapping[str, Any], where: str, batch: bool) -> None:
        """Refuse images that are not of the size that is declared, to within a pixel.

        Arguments:
            image, extra: as a batch is to hold them, after all transforms.
            where: how errors call them.
            batch: whether it is a whole batch.
        """
        count = min(2, image.ndim - 1 - batch)  # of an image; a sequence has a length alone
        if count < 1:
            return
        sides = tuple(image.shape[-count:])
        for name, scale in self.scales.items():
            own = tuple(extra[name].shape[-count:])
            if all(abs(one - scale * other) < 1 for one, other in zip(own, sides, strict=True)):
                continue
            ratios = [one / other for one, other in zip(own, sides, strict=True)]
            even = all(abs(one - ratios[0] * other) < 1 for one, other in zip(own, sides, strict=True))
            role = self.beside[name]
            said = role if ratios[0] == 1 else f"{{role: {role}, scale: {ratios[0]:.6g}}}"
            remedy = f"Say data.images.{name}={said}" if even else "It shows another part, or is stretched: crop"
            raise ValueError(
                f"data.images says that {name} has {'' if scale == 1 else f'{scale:g} times '}the height and width of "
                f"{self.target!r}, but in {where} it is {_by(own)} beside {_by(sides)}. {remedy}, or resize it."
            )

    def check_held(self, extra: Mapping[str, Any], where: str) -> None:
        """Refuse an item, or a batch, without some image that is declared."""
        lacking = [name for name in self.beside if name not in extra]
        if lacking:
            has = ", ".join(extra) or "nothing"
            raise ValueError(f"data.images names {lacking}, but {where} holds {has} beside {self.target!r}.")

    def check_declared(
        self,
        parts: Mapping[Any, Any],
        image: Any,
        wanted: Collection[str],
        where: str,
        moved_by: str,
        batch: bool,
        key: str = "data.images",
    ) -> None:
        """Refuse several images of which a transform would move one, where nothing is said of the others.

        Arguments:
            parts: of the item or batch, all.
            image: the one to noise.
            wanted: which others are handed on.
            where, moved_by: how errors call the item, and the transform.
            batch: whether it is a whole batch.
            key: how errors call what says what they are.

        Raises:
            ValueError: with the line to write.
        """
        if self.roles is not None:
            return
        known = self.target in parts
        target = str(self.target if known else next(name for name, value in parts.items() if value is image))
        others = {
            str(name): value
            for name, value in parts.items()
            if str(name) != target and str(name) in wanted and _keeps_in_step(value, image, batch)
        }
        if not others:
            return
        guess = ", ".join([f"{target}: target", *(f"{name}: {_guess(value)}" for name, value in others.items())])
        shown = ", ".join(f"{name} ({describe_value(value)})" for name, value in {target: image, **others}.items())
        raise ValueError(
            f"{where} holds {1 + len(others)} images: {shown}. {moved_by} would flip or crop {target} alone, and the "
            f"others would no longer fit it. Say what each is, and they go through it together: {key}={{{guess}}}"
            f"; or {key}={{{target}: target}} if nothing else is to be transformed."
        )


def _call_kornia(function: Any, masks: list[bool], parts: dict[str, Tensor]) -> dict[str, Tensor]:
    made = function(*parts.values(), data_keys=["mask" if mask else "input" for mask in masks])
    return dict(zip(parts, made, strict=True))


def _refuse_kornia_inside(function: Any, name: str) -> None:
    inside = function.modules() if isinstance(function, nn.Module) else ()
    if any(hasattr(module, "data_keys") for module in inside):
        raise ValueError(
            f"{name} holds kornia's AugmentationSequential inside another module: of a dict it leaves alone, "
            f"in silence, what is not named as a data key. Give it by itself as {name}; then it is called with "
            "the right keys. (It takes float images: data.transform can make them, in process.value_range.)"
        )


def _by(sides: Iterable[int]) -> str:
    return " x ".join(map(str, sides))


def _size(value: Any) -> tuple[int, ...]:
    if isinstance(value, np.ndarray):
        return value.shape[:2]
    return tuple(value.shape[-2:]) if isinstance(value, Tensor) else (value.size[1], value.size[0])


def _keeps_in_step(value: Any, image: Any, batch: bool) -> bool:
    """Return whether a part looks like an image: of PIL, of three dimensions, or of two that are the image's own."""
    if not isinstance(value, (Tensor, np.ndarray)):
        return is_image(value)
    dimensions = value.ndim - batch
    return dimensions >= 3 or (dimensions == 2 and _size(value) == _size(image))


def _guess(value: Any) -> str:
    """Guess a role, for the line to write: an image of several channels is no mask."""
    if isinstance(value, (Tensor, np.ndarray)):
        channels = value.shape[-1] if isinstance(value, np.ndarray) else value.shape[-3] if value.ndim > 2 else 1
        return "condition" if value.ndim > 2 and channels > 1 else "mask"
    return "mask" if value.mode in ("1", "L", "P", "I") else "condition"
