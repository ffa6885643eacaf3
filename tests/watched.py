"""A CUDA device that is not there, watched: what would make the host wait for it, and how much it is given to do.

    with watched() as watch:          # tensors on DEVICE have no values; those of the CPU are real
        call()                        # tables cross to the device once
        watch.clear()
        call()
    assert watch.waits == []          # what would have waited, and the line of diffaug that asked for it
    assert watch.operations <= 20

Everything is asked for as it would be of a GPU, by PyTorch's own dispatcher, and nothing is computed there. It relies
on private names of torch; where one has moved, importing this module fails, naming it.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

import diffaug
from diffaug.noise import Noise

DEVICE = torch.device("cuda:0")
_PACKAGE = str(Path(diffaug.__file__).parent)
_WAITING = ("bincount", "histc", "masked_select", "nonzero", "repeat_interleave.Tensor", "unique")
"""Operations that read the device to know the shape of what they make."""


class Waited(Exception):
    """A value of the device was asked for on the host: there is none to go on with."""


class Watch(TorchDispatchMode):
    """Notes what would make the host wait.

    Attributes:
        waits: (what, the line of diffaug that asked for it), in order.
        operations: how many the device was given, views and what runs `apart` not counted.
        largest_float64: the most elements of a float64 tensor made on the device.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake, self._apart = fake, 0
        self.clear()

    def clear(self) -> None:
        self.waits: list[tuple[str, str]] = []
        self.operations = self.largest_float64 = 0

    def apart(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose operations are watched but not counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._apart += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._apart -= 1

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = list(_leaves((*args, *kwargs.values())))
        there = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        devices = {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        if func.namespace == "prim" or (not there and DEVICE.type not in devices):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = str(func).split(".", 1)[1]
        self.operations += not self._apart and not func.is_view
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)]
        if name.startswith(("_to_copy", "copy_", "device_put")):
            if here and not kwargs.get("non_blocking") and not any(arg is True for arg in args[2:]):
                self._note("a copy from the host that waits")
            if there and "cpu" in devices:
                self._note("a copy to the host")
                raise Waited
        elif any(tensor.ndim for tensor in here):
            self._note(f"{name} of tensors of the host and of the device")
        by_mask = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in _leaves(args[1:2])
        )
        if by_mask or name.startswith(_WAITING):
            self._note(f"{name}, whose size is in the device's values")
        try:
            with self._fake:
                made = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            self._note(f"{name}, which reads the device")
            raise Waited from error
        for tensor in _leaves((made,)):
            if isinstance(tensor, FakeTensor) and tensor.dtype == torch.float64 and tensor.device == DEVICE:
                self.largest_float64 = max(self.largest_float64, tensor.numel())
        return made

    def _note(self, what: str) -> None:
        lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
        where = f"{Path(lines[-1].filename).name}: {lines[-1].line}" if lines else "a test"
        self.waits.append((what, where))


@contextlib.contextmanager
def watched(run_pass: bool = False) -> Iterator[Watch]:
    """A device to give tensors and work to. The pass, and noise of any kind, are not counted.

    Arguments:
        run_pass: whether the compiled pass is gone through, watched; else tensors of its results' shapes stand for it
            and for normals, as these are the same hundreds of operations at every call.
    """
    from diffaug.noise import kinds, pyramid
    from diffaug.process import chain, compiler, kernel

    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Watch(fake) as watch, contextlib.ExitStack() as stack:
        noises = [(kind, "draw") for kind in _kinds(Noise) if "draw" in vars(kind)]
        for owner, name in ((kernel, "mix_given"), (kernel, "draw_and_mix"), (kernel, "draw_noises"), *noises):
            stack.enter_context(mock.patch.object(owner, name, watch.apart(getattr(owner, name))))
        for module in () if run_pass else (chain, kinds, pyramid):
            stack.enter_context(mock.patch.object(module, "gaussian", watch.apart(_normals)))
        stack.enter_context(mock.patch.object(compiler, "call_compiled", watch.apart(_whole if run_pass else _results)))
        stack.enter_context(mock.patch.object(compiler, "compiler_for", return_value=True))
        # As it is: to look anew at every operation takes long.
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=False))
        yield watch


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _whole(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _normals(keys: Any, shape: tuple[int, ...], *_: int) -> Tensor:
    return torch.empty(keys.rows.shape[1], *shape, device=keys.rows.device)


def _results(
    function: Callable[..., Any], x: Tensor, rows: Tensor, mix: Tensor, centre: float, dtype: torch.dtype, *_: Any
) -> Any:
    """What the pass would give, but for its values."""
    fields = [torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(mix.shape[1])]
    return [torch.empty_like(rows[0]), *fields] if "times" in function.__name__ else fields


def _kinds(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of the device; within `watched`."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)
