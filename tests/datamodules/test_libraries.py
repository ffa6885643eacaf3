"""What users really have, each against the real library: transforms on the device, encoders, every shape of data."""

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from shared import fit, together
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta

FIELDS = ("x_t", "epsilon", "t", "x_0", "index", "view", "label")
PROCESS = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False)


def pictures(count: int = 12, shape: tuple[int, ...] = (3, 8, 8)) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8), torch.arange(count)
    )


def seen(dataset: Any = None, epochs: int = 1, process: ForwardProcess = PROCESS, **options: Any) -> dict[str, Any]:
    data = DiffusionDataModule(
        dataset or pictures(), pictures(), process=process, **{"seed": 5, "batch_size": 4, **options}
    )
    return fit(data, max_epochs=epochs, num_sanity_val_steps=0)


def kornia_flips() -> torch.nn.Module:
    augmentation = pytest.importorskip("kornia.augmentation")
    return torch.nn.Sequential(
        augmentation.RandomHorizontalFlip(p=0.5),
        augmentation.RandomErasing(p=0.5),
        augmentation.RandomGaussianNoise(std=0.01, p=1.0),
    )


TRANSFORMS = {
    "torchvision": lambda: v2.Compose([v2.RandomHorizontalFlip(), v2.RandomErasing(1.0), v2.RandomCrop(8, padding=2)]),
    "kornia": lambda: torch.nn.Sequential(v2.ToDtype(torch.float32, scale=True), kornia_flips(), v2.Lambda(_to_range)),
    "numpy": lambda: lambda x: (x.float() / 127.5 - 1) * float(np.random.rand()),
    "python": lambda: lambda x: (x.float() / 127.5 - 1) * random.random(),
}


def _to_range(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_device_transforms_are_keyed_and_leave_no_trace(name, same_random_state):
    def x_0(seed: int = 5) -> torch.Tensor:
        transform = TRANSFORMS[name]()  # which skips where the library is not there
        torch.rand(3)  # whatever the global state is
        return together(seen(epochs=2, device_transform=transform, seed=seed)["train"], "x_0")

    states = torch.get_rng_state()
    a, b, other = x_0(), x_0(), x_0(6)
    after = torch.get_rng_state()
    torch.set_rng_state(states)
    for _ in range(3):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(states)
    assert torch.equal(a, b)
    assert a.shape == (24, 3, 8, 8)
    assert not torch.equal(a.mean((1, 2, 3)).sort().values, other.mean((1, 2, 3)).sort().values)
    one, two = a[:12].mean((1, 2, 3)).sort().values, a[12:].mean((1, 2, 3)).sort().values
    assert not torch.equal(one, two)  # each epoch draws anew


def test_ranks_draw_apart_on_the_device(monkeypatch):
    """What a transform draws is keyed by the batch's first sample, so two ranks' batches differ in it too."""
    drawn = []
    for rank in range(2):
        monkeypatch.setattr(DiffusionDataModule, "_ranks", lambda self, rank=rank: {"rank": rank, "ranks": 2})
        seen(device_transform=lambda x: (drawn.append(float(torch.rand(()))), x)[1], epochs=2)
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 2  # the ranks', the epochs', the batches'


class Encoder(torch.nn.Module):
    """Eight pixels to one, with what a careless user leaves on: dropout and gradients."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 8, 8, dtype=dtype)
        self.dropout = torch.nn.Dropout(0.5)
        self.modes: list[tuple[bool, bool, torch.dtype]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append((self.training, torch.is_grad_enabled(), x.dtype))
        assert -1 <= x.min() < 0 < x.max() <= 1
        return 5 * self.dropout(self.conv(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_range", [(-1, 1), (0, 1)])
def test_an_encoder_makes_latents_in_every_stage(dtype, value_range):
    encoder = Encoder(dtype)
    process = ForwardProcess(LinearBeta(), fields=FIELDS, value_range=value_range, compile=False)
    out = seen(encoder=encoder, process=process, views=2)
    assert set(encoder.modes) == {(False, False, dtype)}
    assert len(encoder.modes) == 6  # once a batch, however many views
    images = pictures().tensors[0].float() / 127.5 - 1
    with torch.no_grad():
        latents = 5 * encoder.conv(images.to(dtype)).float()
    assert latents.abs().max() > 1
    for stage, tolerance in (("train", 2e-6), ("val", 2e-6)):
        got, index = together(out[stage], "x_0"), together(out[stage], "index")
        assert not got.requires_grad
        torch.testing.assert_close(got, latents[index], rtol=0, atol=tolerance if dtype is torch.float32 else 0.05)


def test_an_encoder_that_samples_is_keyed(same_random_state):
    def sample(x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] + torch.randn_like(x[:, :1])

    a, b = (seen(encoder=sample, epochs=2) for _ in range(2))
    for stage in ("train", "val"):
        assert torch.equal(together(a[stage], "x_0"), together(b[stage], "x_0"))
    assert torch.equal(together(a["val"][:3], "x_0"), together(a["val"][3:], "x_0"))  # the same at every validation


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["train", "val"])
def test_an_encoder_is_moved_and_the_device_s_state_is_put_back(device, stage):
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Dropout())
    transform = v2.Lambda(lambda x: x + torch.randint_like(x, 9))
    data = DiffusionDataModule(
        pictures(), pictures(), process=PROCESS, seed=1, encoder=encoder, device_transform=transform
    )
    data.setup("fit")
    batch = next(iter(getattr(data, f"{stage}_dataloader")())).to(device)
    torch.rand(1, device=device)
    state = torch.cuda.get_rng_state(device)
    a, b = data.noise(batch, stage=stage), data.noise(batch, stage=stage)
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert torch.equal(a.x_0, b.x_0)
    assert next(encoder.parameters()).device.type == a.x_t.device.type == device.type


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder": lambda x: (x, x)},
            r"data\.encoder must return a tensor .*\(4, \.\.\.\), or a dist.* but it returned tuple\. A diffusers VAE",
        ),
        (
            {"device_transform": lambda x: x[1:]},
            r"data\.device_transform must return .* but it returned \(3, 3, 8, 8\)",
        ),
        (
            {"device_transform": lambda x: x.float()},
            r"data\.device_transform's result spans .* outside process\.value_range",
        ),
    ],
)
def test_what_a_device_transform_may_not_do(options, message):
    with pytest.raises(ValueError, match=message):
        seen(**options)


def test_device_transform_must_be_a_function():
    with pytest.raises(ValueError, match=r"data\.encoder must be a function or a torch\.nn\.Module.*got 'vae'"):
        DiffusionDataModule(pictures(), process=PROCESS, encoder="vae")


SHAPES = {
    "grey": (1, 8, 8),
    "multispectral": (13, 6, 6),
    "not square": (3, 5, 9),
    "video": (4, 3, 6, 7),
    "signal": (2, 50),
    "volume": (1, 4, 5, 6),
}


@pytest.mark.parametrize(
    ("shape", "precision"), [*zip(SHAPES.values(), ["32-true", "bf16-true", "64-true"] * 2, strict=True)], ids=SHAPES
)
def test_every_shape_keeps_its_pixels_and_gets_its_own_noise(shape, precision):
    images, labels = pictures(6, shape).tensors
    data = DiffusionDataModule(TensorDataset(images, labels), process=PROCESS, seed=5, batch_size=4)
    batches = fit(data, precision=precision)["train"]
    index, epsilon = together(batches, "index"), together(batches, "epsilon")
    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert epsilon.shape == (6, *shape)
    assert epsilon.dtype == together(batches, "x_t").dtype == dtype
    wanted = (images[index].double() / 127.5 - 1).to(dtype)
    torch.testing.assert_close(together(batches, "x_0"), wanted, rtol=0, atol=1e-6)
    assert stats.kstest(epsilon.double().flatten(), "norm").pvalue > 1e-6
    assert len(torch.unique(epsilon.flatten(1), dim=0)) == 6


def test_a_one_dimensional_signal_needs_its_name():
    dataset = TensorDataset(torch.rand(6, 50) * 2 - 1, torch.arange(6))
    with pytest.raises(ValueError, match=r"data\.train\[0\] holds no image.*data\.image_key"):
        seen(dataset)
    data = DiffusionDataModule(dataset, process=PROCESS, batch_size=6, image_key=0)
    (batch,) = fit(data)["train"]
    assert batch.x_t.shape == (6, 50)
    assert torch.equal(batch.x_0, dataset.tensors[0][batch.index])


def dropped(count: int = 4000, epochs: int = 1, **options: Any) -> dict[tuple[int, int, int], bool]:
    """Whether each sample's label was dropped, by epoch, index and view."""
    dataset = TensorDataset(torch.zeros(count, 1, 1, 2, dtype=torch.uint8), torch.arange(count) % 10)
    data = DiffusionDataModule(
        dataset,
        dataset,
        process=PROCESS,
        seed=8,
        null_label=10,
        **{"batch_size": 1000, "label_dropout": 0.1, **options},
    )
    out = fit(data, max_epochs=epochs, num_sanity_val_steps=0)
    assert (together(out["val"], "label") < 10).all()
    length = len(out["train"]) // epochs
    result = {
        (epoch, int(i), int(v)): int(label) == 10
        for epoch in range(epochs)
        for b in out["train"][epoch * length : (epoch + 1) * length]
        for i, v, label in zip(b.index, b.view, b.label, strict=True)
    }
    kept = [(int(i), int(label)) for b in out["train"] for i, label in zip(b.index, b.label, strict=True)]
    assert all(label in (10, i % 10) for i, label in kept)
    return result


def test_label_dropout_is_of_its_rate_and_each_sample_s_own():
    drops = dropped(epochs=2, views=2)
    assert len(drops) == 16000
    limits = stats.binom(16000, 0.1).ppf([1e-7, 1 - 1e-7])
    assert limits[0] <= sum(drops.values()) <= limits[1]
    for other in ((1, 0), (0, 1)):  # another epoch, another view: an independent coin
        both = sum(drops[0, i, 0] and drops[other[0], i, other[1]] for i in range(4000))
        assert stats.binom(4000, 0.01).ppf(1e-7) <= both <= stats.binom(4000, 0.01).ppf(1 - 1e-7)


def test_label_dropout_does_not_depend_on_the_batch():
    assert dropped(140) == dropped(140, batch_size=7, num_workers=2)
    assert not any(dropped(50, label_dropout=0).values())
    assert all(dropped(50, label_dropout=1).values())


def test_texts_and_vectors_are_dropped_too():
    texts = [{"image": torch.zeros(1, 2, 2), "text": f"number {i}", "vector": torch.ones(3)} for i in range(50)]
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "text", "vector"), compile=False)
    options = {"process": process, "batch_size": 50, "label_dropout": 0.5, "shuffle": False, "seed": 1}
    (by_text,) = fit(DiffusionDataModule(texts, null_label="", label_key="text", **options))["train"]
    (by_vector,) = fit(DiffusionDataModule(texts, null_label=[0, 0, 0.5], label_key="vector", **options))["train"]
    gone = [text == "" for text in by_text.text]
    assert 10 < sum(gone) < 40
    assert [text for text in by_text.text if text] == [f"number {i}" for i in range(50) if not gone[i]]
    assert torch.equal(by_vector.vector[torch.tensor(gone)].unique(dim=0), torch.tensor([[0, 0, 0.5]]))
    assert (by_vector.vector[~torch.tensor(gone)] == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_dropout": 0.1}, r"data\.label_dropout=0\.1 needs data\.null_label"),
        ({"label_dropout": 1.5, "null_label": 10}, r"data\.label_dropout must be a number in \[0, 1\], but got 1\.5"),
        (
            {"label_dropout": 0.1, "null_label": 10, "label_key": "class"},
            r"drops the field 'class' \(data\.label_key\)",
        ),
    ],
)
def test_bad_label_dropout_is_refused_before_any_data_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDataModule(pictures(), process=PROCESS, **options)


@pytest.mark.parametrize(
    ("dtype", "null"),
    [(torch.uint8, 256), (torch.uint8, -1), (torch.bool, 10), *((torch.int64, null) for null in ("", 0.5, [1, 2]))],
)
def test_a_null_label_that_is_no_label_is_refused(dtype, null):
    """It would become a class in silence: 256 among bytes is 0."""
    dataset = TensorDataset(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.zeros(4, dtype=dtype))
    with pytest.raises(
        ValueError, match=rf"data\.null_label=.* cannot stand for a label of the field 'label'.*{dtype}"
    ):
        fit(DiffusionDataModule(dataset, process=PROCESS, label_dropout=0.5, null_label=null))


def test_a_device_transform_that_fails_is_named():
    def floats_only(images: torch.Tensor) -> torch.Tensor:
        raise TypeError("no bytes")

    with pytest.raises(TypeError, match="no bytes") as caught:
        seen(device_transform=floats_only)
    if sys.version_info >= (3, 11):
        assert "in data.device_transform, of a batch of torch.uint8 of shape" in caught.value.__notes__[0]
        assert "If it wants floats, convert them" in caught.value.__notes__[0]
