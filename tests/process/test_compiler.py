"""What is compiled, and what is done where that fails."""

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from shared import equal

from diffaug import ForwardProcess, LinearBeta
from diffaug.process import compiler
from diffaug.times import Cubic, Uniform

IMAGES = torch.arange(64 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(64, 3, 8, 8)
INDEX = torch.arange(64) * 1000003 % 2**35


def broken_compiler(function: object, device_type: str) -> object:
    def call(*args: object) -> None:
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler today")

    return call


def test_a_failed_compile_is_one_warning_and_the_eager_path(monkeypatch):
    monkeypatch.setattr(compiler, "_compiled", broken_compiler)
    process, other = ForwardProcess(LinearBeta(), compile=True), ForwardProcess(LinearBeta(), compile=True)
    with pytest.warns(UserWarning, match=r"torch\.compile failed .*no compiler today.*process\.compile=false"):
        batch = process(IMAGES, INDEX)
    assert equal(batch, ForwardProcess(LinearBeta(), compile=False)(IMAGES, INDEX))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process(IMAGES, INDEX)
    with pytest.warns(UserWarning, match=r"torch\.compile failed"):  # each process speaks for itself
        assert other.can_compile(IMAGES) is False
    assert other.compiles(torch.device("cpu"), 10**6) is False


def counted(tried: list[tuple[str, int]], fails: str = "") -> object:
    """A compiler whose functions note the form of the pass and the size of the batch, and of which one fails."""

    def compiled(function: Callable[..., object], device_type: str) -> object:
        def call(x: torch.Tensor, *args: object) -> list[torch.Tensor]:
            assert x.is_contiguous()
            form = "times and fields" if "times" in function.__name__ else "fields"
            tried.append((form, len(x)))
            if form == fails:
                raise torch._dynamo.exc.InternalTorchDynamoError("no compiler today")
            return [x[:, 0], x, x] if "times" in form else [x, x]

        return call

    return compiled


TIMES, FIELDS = "times and fields", "fields"

SMALL = [(FIELDS, 1), (FIELDS, 2)]


@pytest.mark.parametrize(
    ("times", "batches", "expected"),
    [
        (Uniform(), {"train": {5, 64}}, [(TIMES, 1), (TIMES, 2), (TIMES, 5), (TIMES, 64)]),
        (
            Uniform(),
            {"train": {3}, "val": {7}},
            [(TIMES, 1), (TIMES, 2), (TIMES, 3), (FIELDS, 1), (FIELDS, 2), (FIELDS, 7)],
        ),
        (Cubic(), {"train": {3}, "val": {7}}, [*SMALL, (FIELDS, 3), (FIELDS, 7)]),
        (Uniform(), {"test": ()}, SMALL),
    ],
)
def test_every_form_and_size_that_is_to_come_is_tried(times, batches, expected, monkeypatch):
    tried: list[tuple[str, int]] = []
    monkeypatch.setattr(compiler, "_compiled", counted(tried))
    assert ForwardProcess(LinearBeta(), times, compile=True).can_compile(IMAGES, batches=batches)
    assert tried == expected


def test_where_one_form_does_not_compile_none_is_used(monkeypatch):
    """Nothing was handed out yet: the run begins eagerly, and does not end."""
    monkeypatch.setattr(compiler, "_compiled", counted([], fails=FIELDS))
    process = ForwardProcess(LinearBeta(), compile=True)
    with pytest.warns(UserWarning, match=r"torch\.compile failed .*no compiler today"):
        assert process.can_compile(IMAGES, batches={"train": (), "val": ()}) is False
    assert process.compiles(torch.device("cpu"), 10**6) is False


def test_a_compile_that_fails_after_others_worked_ends_the_run(monkeypatch):
    """One rank must not go on alone with other bits."""
    monkeypatch.setattr(compiler, "_compiled", counted([]))
    process = ForwardProcess(LinearBeta(), compile=True)
    assert process.can_compile(IMAGES)
    monkeypatch.setattr(compiler, "_compiled", broken_compiler)
    with pytest.raises(RuntimeError, match=r"no compiler today.*batch of \(3, 3, 8, 8\).*process\.compile=false"):
        process(IMAGES[:3], INDEX[:3])


def test_auto_compiles_by_device_and_sample_size_alone():
    process = ForwardProcess(LinearBeta())
    cpu = torch.device("cpu")
    assert process.compiles(cpu, 511) is False
    assert process.compiles(cpu, 512) is compiler.compiler_for("cpu")
    assert process.compiles(torch.device("meta"), 10**6) is False


@pytest.mark.parametrize(
    ("names", "found"),
    [("no-such", False), (sys.executable, True), (["no-such", sys.executable], True), ((None,), False)],
)
def test_a_compiler_is_named_alone_or_among_others(names, found):
    from torch._inductor import config

    with config.patch({"cpp.cxx": names}):
        assert compiler.compiler_for.__wrapped__("cpu") is found
