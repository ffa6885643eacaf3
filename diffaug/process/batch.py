"""NoisyBatch: named tuples of exactly the fields that were asked for."""

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

_named_tuple: Callable[[str, Sequence[str]], Any] = namedtuple  # noqa: PYI024 - of fields that are known only later


class NoisyBatch(NamedTuple):
    """A noised batch: ``x_t = alpha(t) x_0 + sigma(t) epsilon``.

    Attributes:
        x_t: the noised images, shape (B, *).
        epsilon: the noise in them, shape (B, *).
        t: the times, int64 (discrete) or float32 (continuous), shape (B,).
    """

    x_t: Tensor
    epsilon: Tensor
    t: Tensor


class Fields(Protocol):
    """A named tuple of the fields that were asked for, in their order: `NoisyBatch`, or one with other names."""

    _fields: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, place: int | slice, /) -> Any: ...
    def __getattr__(self, name: str, /) -> Any: ...
    def _asdict(self) -> dict[str, Any]: ...


@functools.lru_cache(maxsize=64)
def batch_type(fields: tuple[str, ...]) -> Callable[..., Fields]:
    """Make the named tuple of a batch with these fields: `NoisyBatch` itself for its own three."""
    if fields == NoisyBatch._fields:
        return cast("Callable[..., Fields]", NoisyBatch)
    made = _named_tuple("NoisyBatch", fields)

    def reduce(batch: Fields) -> tuple[Any, ...]:  # a class made on the fly, yet picklable
        return _rebuild, (fields, tuple(batch))

    made.__module__, made.__reduce__ = __name__, reduce
    return made


def _rebuild(fields: tuple[str, ...], values: tuple[Any, ...]) -> Fields:
    return batch_type(fields)(*values)
