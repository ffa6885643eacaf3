"""What a batch does to an accelerator on its way there and through the helpers: nothing that makes the host wait.

Without a GPU: the copies are counted as they are asked for, on the meta device, whose values cannot be read at all.
"""

import pytest
import torch

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta, Rectified
from diffaug.data.batch import Batch, Place, Places
from diffaug.data.labels import LabelDropout
from diffaug.randomness.philox import keys
from diffaug.training.loss_by_level import binned


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes whether each copy from the host to the meta device waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        host = [a for a in args if isinstance(a, torch.Tensor) and a.device.type == "cpu"]
        if name == "_to_copy" and host and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.waits.append(not kwargs.get("non_blocking"))
        if name == "copy_" and args[0].device.type == "meta" and args[1].device.type == "cpu":
            self.waits.append(not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])))
        return func(*args, **kwargs)


def test_a_batch_crosses_without_waiting():
    places = Places(torch.zeros(4, 4, dtype=torch.int64), Place(0, 0, 0, 0))
    batch = Batch((torch.zeros(4, 3, 2, 2), {"label": torch.arange(4)}), [places])
    data = DiffusionDataModule(process=ForwardProcess(LinearBeta()))
    with Copies() as copies:
        moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.image.device.type == moved.places[0].rows.device.type == moved.extra["label"].device.type == "meta"
    assert copies.waits == [False] * 3
    with Copies() as control:
        torch.zeros(2).to("meta")
    assert control.waits == [True]


@pytest.mark.parametrize("schedule", [LinearBeta(), Rectified()])
def test_steps_copy_nothing_from_the_host(schedule):
    process = ForwardProcess(schedule)
    x, index = torch.empty(2, 3, 4, 4, device="meta"), torch.arange(2, device="meta")
    t = torch.empty(2, dtype=torch.int64 if schedule.discrete else torch.float32, device="meta")
    times = torch.arange(1, 4) if schedule.discrete else torch.tensor([0.2, 0.5, 0.9])
    process.step(x, t, t, x)  # the tables cross once
    with Copies() as copies:
        process.step(x, t, t, x)
        process.posterior(x, x, t, t)
    assert not copies.waits
    with Copies() as copies:
        process.trajectory(x, times, index)
    assert len(copies.waits) == 1, "the times, once"


def test_helpers_copy_nothing_twice():
    errors, label = torch.empty(4, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    dropout = LabelDropout(0.5, 10, "label", ("label",))
    coins = keys(torch.arange(4, device="meta"))

    def step() -> None:
        binned(errors, errors, None, (-1.0, 0.0, 1.0))
        dropout(label, coins)

    step()
    with Copies() as copies:
        step()
    assert not copies.waits
