"""NoisyBatch: named tuples of exactly the fields that were asked for."""

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor


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
    def __getitem__(self, place: Any, /) -> Any: ...
    def __getattr__(self, name: str, /) -> Any: ...
    def _asdict(self) -> dict[str, Any]: ...


@functools.lru_cache(maxsize=64)
def batch_type(fields: tuple[str, ...]) -> Callable[..., Fields]:
    """Make the named tuple of a batch with these fields: `NoisyBatch` itself for its own three."""
    if fields == NoisyBatch._fields:
        return cast("Callable[..., Fields]", NoisyBatch)
    made: Any = namedtuple("NoisyBatch", fields)  # noqa: PYI024 - its fields are known only now
    made.__module__ = __name__
    made.__reduce__ = lambda self: (_rebuild, (self._fields, tuple(self)))  # a class made on the fly, yet picklable
    return made


def _rebuild(fields: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    return batch_type(fields)(*values)
