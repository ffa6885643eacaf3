"""A CUDA device that is not there: Inductor writes its Triton program for it, and the program runs on the CPU.

    with fake_gpu(90):                                     # compute capability 9.0
        source = program(function, *arguments_on_the_fake_device)

`program` gives the source that Inductor would compile. `interpret` runs that source on CPU tensors, by Triton's
interpreter. Nothing needs a driver. It relies on private names of torch, tried with 2.14 and 2.15: where one has moved,
`fake_gpu` raises `Moved`, naming it.
"""

import contextlib
import importlib.util
import re
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

CHIPS = {  # compute capability: what Inductor reads of a device
    80: {"name": "A100", "multi_processor_count": 108, "shared_memory_per_block_optin": 166912},
    90: {"name": "H100", "multi_processor_count": 132, "shared_memory_per_block_optin": 232448},
}
DEVICE = "cuda:0"


class Moved(Exception):
    """A private name of torch or triton that this module relies on is not there."""


class _Stopped(Exception):
    """Inductor's program was called, which is as far as there is a need to go."""


class _OnCpu(TorchDispatchMode):
    """Makes on the CPU what would be made on a device: for the constants that Inductor folds by running them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*(torch.device("cpu") if isinstance(a, torch.device) else a for a in args), **kwargs)


@contextlib.contextmanager
def fake_gpu(capability: int = 90) -> Iterator[None]:
    """Let Inductor take cuda:0 for a device of this compute capability; tensors made inside it are fake.

    torch.cuda.is_available() stays False: then FakeTensorMode puts a no-op device guard in place, and Dynamo does not
    ask for the device's random state.

    Raises:
        Moved: torch or triton has no such name any more.
    """
    try:
        from torch._dynamo.device_interface import CudaInterface
        from torch._inductor import scheduler
        from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
        from torch._inductor.graph import GraphLowering
        from torch._inductor.runtime.hints import DeviceProperties
        from torch.utils import _triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
    except ImportError as error:
        raise Moved(str(error)) from error
    if not hasattr(GraphLowering, "compile_to_module"):
        raise Moved("torch._inductor.graph.GraphLowering.compile_to_module")

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    chip = types.SimpleNamespace(
        major=capability // 10,
        minor=capability % 10,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 * 2**30,
        shared_memory_per_block=49152,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
        **CHIPS[capability],
    )
    stub = types.SimpleNamespace(
        get_current_target=always(GPUTarget("cuda", capability, 32)),
        get_current_device=always(0),
        get_current_stream=always(0),
    )
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            if not hasattr(owner, name):
                raise Moved(f"{getattr(owner, '__name__', owner)}.{name}")
            stack.enter_context(mock.patch.object(owner, name, value))

        put(torch.cuda, "get_device_properties", always(chip))
        put(torch.cuda, "get_device_capability", always((capability // 10, capability % 10)))
        put(torch.cuda, "current_device", always(0))
        put(CudaInterface, "get_device_properties", staticmethod(always(chip)))
        put(CudaInterface.Worker, "get_device_properties", staticmethod(always(chip)))
        put(CudaInterface, "current_device", staticmethod(always(0)))
        put(CudaInterface, "device_count", staticmethod(always(1)))
        put(CudaInterface, "is_bf16_supported", staticmethod(always(True)))
        put(scheduler, "has_triton", always(True))
        put(driver, "_active", driver._active)  # to have it put back; the stub launches nothing
        driver.set_active(stub)
        deduce = getattr(UniformValueConstantFolder, "_deduce_value", None)
        if deduce is None:
            raise Moved("torch._inductor.fx_passes.joint_graph.UniformValueConstantFolder._deduce_value")

        def deduced_on_cpu(self: Any, node: Any) -> Any:
            with _OnCpu():
                return deduce(self, node)

        put(UniformValueConstantFolder, "_deduce_value", deduced_on_cpu)
        hashes = (getattr(_triton, name, None) for name in ("triton_backend", "triton_hash_with_backend"))
        for cached in (DeviceProperties.create, *hashes):
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
                stack.callback(cached.cache_clear)
        stack.enter_context(FakeTensorMode())
        stack.callback(torch._dynamo.reset)
        yield


def _stop_at(keep: Callable[[Any, Any], Any]) -> contextlib.ExitStack:
    """Call ``keep(source, arguments)`` where a compiled function's program would be compiled and run."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    def compile_to_module(graph: Any) -> Any:
        source = graph.codegen()[0].value

        def call(args: list[Any]) -> None:
            keep(source, args)
            raise _Stopped

        return types.SimpleNamespace(call=call)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", compile_to_module))
    stack.enter_context(config.patch({"force_disable_caches": True, "compile_threads": 1}))
    torch._dynamo.reset()
    stack.enter_context(contextlib.suppress(_Stopped))
    return stack


def program(function: Callable[..., Any], *args: Any) -> str:
    """The source that Inductor writes for a function that calls torch.compile's; within `fake_gpu`."""
    sources: list[str] = []
    with _stop_at(lambda source, _: sources.append(source)):
        function(*args)
    (source,) = sources
    return source


def kernels(source: str) -> dict[str, str]:
    """The Triton kernels of a program: name -> the source of its jitted function, in the order they are defined."""
    found = {}
    for block in re.findall(r"'''(.*?)'''", source, re.DOTALL):
        name = re.search(r"def (triton_\w+)\(", block)
        if name:
            found[name.group(1)] = block
    return found


def autotuner(block: str, folder: Path) -> Any:
    """A kernel's source, imported as Inductor would: its CachingAutotuner; within `fake_gpu`. Launches nothing."""
    name, file = _written(block, folder)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _written(block: str, folder: Path) -> tuple[str, Path]:
    name = re.findall(r"def (triton_\w+)\(", block)[0]
    file = folder / f"kernel_{len(list(folder.iterdir()))}.py"
    file.write_text(block.replace("triton_helpers.set_driver_to_gpu()", ""))  # which looks for a real driver
    return name, file


def interpret(function: Callable[..., Any], fake: Any, real: Any) -> list[Tensor]:
    """What a compiled function's program for the device gives for CPU tensors; within `fake_gpu`.

    TRITON_INTERPRET=1 must have been set before triton was imported. The interpreter's logarithm is numpy's.

    Arguments:
        fake, real: the arguments, once on the fake device and once on the CPU, nested alike.
    """
    pairs = zip(_pytree.tree_leaves(fake), _pytree.tree_leaves(real), strict=True)
    given = {f.untyped_storage()._cdata: r for f, r in pairs}  # the function may make views of them
    outputs: list[Any] = []

    def real_of(argument: Tensor) -> Tensor:
        return given[argument.untyped_storage()._cdata].view(argument.shape)

    def run(source: str, args: list[Any]) -> None:
        with unset_fake_temporarily():
            outputs.append(_interpreted(source)([real_of(a) if isinstance(a, Tensor) else a for a in args]))

    with torch._dynamo.config.patch(specialize_float=True), _stop_at(run):
        function(*fake)
    return list(outputs[0])


def _interpreted(source: str, block: int = 256) -> Callable[[list[Any]], Any]:
    """The ``call`` of Inductor's program, its kernels run by Triton's interpreter."""
    import triton

    folder = Path(tempfile.mkdtemp())

    class Compile:
        def triton(self, name: str, text: str, **_: Any) -> Any:
            # The interpreter knows no rounding; this sum rounds a float32 below 2^22 to the nearest, ties to even.
            text = re.sub(r"libdevice\.nearbyint\((\w+)\)", r"((\1 + 12582912.0) - 12582912.0)", text)
            head, body = re.split(r"@triton_heuristics.*?(?=@triton\.jit)", text, flags=re.DOTALL)
            _, file = _written(head + body, folder)  # the interpreter reads a function's source from its file
            namespace: dict[str, Any] = {"__file__": str(file), "__name__": name}
            exec(compile(file.read_text(), str(file), "exec"), namespace)
            signature = re.findall(rf"def {name}\((.*?)\):", text)[0]
            names = [part for part in signature.split(", ") if "constexpr" not in part]

            def run(*args: Any, stream: Any) -> None:
                arguments = dict(zip(names, args, strict=True))
                grid = (triton.cdiv(arguments.get("xnumel", 1), block),)
                namespace[name][grid](**arguments, XBLOCK=block)

            return types.SimpleNamespace(run=run)

        def wait(self, *_: Any) -> None:
            pass

    text = source.replace("async_compile = AsyncCompile()", "").replace("torch.cuda._DeviceGuard", "_guard")
    text = re.sub(r"^\s*torch\.cuda\.set_device\(0\)\n", "", text, flags=re.MULTILINE)
    text = text.replace("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = int")
    text = re.sub(r"^empty_strided_cuda = .*", "empty_strided_cuda = empty_strided_cpu", text, flags=re.MULTILINE)
    namespace: dict[str, Any] = {"async_compile": Compile(), "_guard": contextlib.nullcontext, "__name__": "program"}
    exec(compile(text, "program", "exec"), namespace)
    return namespace["call"]
