"""The posterior: z = mean + std n, n a function of the sample's key; from a live encoder and from a store alike."""

import contextlib
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import shared
import torch
from scipy import stats
from shared import assert_alike, pictures, together, trainer
from torch.distributions import Normal
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta, Mixture
from diffaug.commands.encode import encode
from diffaug.noise.kinds import gaussian
from diffaug.on_device import noiser
from diffaug.on_device.posterior import Posterior
from diffaug.process import compiler
from diffaug.pytorch_lightning import Encoding, store
from diffaug.randomness.keys import Keys, Purpose
from diffaug.store.moments import Moments, Stored
from diffaug.store.reader import Store

FIELDS = ("x_t", "epsilon", "t", "x_0", "index", "view", "label")
IMAGES = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False, sigma_data=1.0)
LATENTS = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False, sigma_data=1.0, value_range=None)


class Encoder(torch.nn.Module):
    """A mean and a deviation of each image of 6 x 6 pixels; what form they take is the subclass's."""

    def __init__(self, form: str = "normal") -> None:
        super().__init__()
        self.form = form
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)

    def encode(self, x: torch.Tensor) -> Any:
        mean, log = self.conv(x).chunk(2, 1)
        std = log.exp() / 8
        if self.form == "normal":
            return Normal(mean, std)
        if self.form == "plain":
            return mean
        distribution = SimpleNamespace(mean=mean, std=std)
        return SimpleNamespace(latent_dist=distribution) if self.form == "diffusers" else distribution

    def forward(self, x: torch.Tensor) -> Any:
        raise AssertionError("this would decode, too")


def seen(process: ForwardProcess = IMAGES, epochs: int = 1, train: Any = None, **options: Any) -> dict[str, Any]:
    options = {"encoder": Encoder(), "seed": 5, "batch_size": 4, **options}
    data = DiffusionDataModule(train or pictures(12), pictures(8), process=process, **options)
    return shared.seen(data, epochs)


fitted = partial(shared.seen, epochs=1)


def by_visit(batches: list[Any]) -> dict[tuple[int, int], torch.Tensor]:
    index, view, x_0 = (together(batches, name) for name in ("index", "view", "x_0"))
    return {(int(i), int(v)): z for i, v, z in zip(index, view, x_0, strict=True)}


@pytest.mark.parametrize("form", ["normal", "diffusers", "mean and std"])
def test_z_is_mean_plus_std_times_a_keyed_normal(form, same_random_state):
    out = seen(encoder=Encoder(form), epochs=2, batch_size=12)
    with torch.no_grad():
        made = Encoder().encode(pictures(12).tensors[0].float() / 127.5 - 1)
    for epoch, batch in enumerate(out["train"]):
        n = gaussian(Keys.pack(batch.index, seed=5, epoch=epoch), (2, 6, 6), Purpose.POSTERIOR)
        torch.testing.assert_close(batch.x_0, made.mean[batch.index] + made.stddev[batch.index] * n, rtol=0, atol=1e-6)
    assert not torch.equal(*(by_visit([batch])[3, 0] for batch in out["train"]))


@pytest.mark.parametrize(
    ("shape", "compiled"),
    [
        ((4, 8, 8), False),
        ((3, 5, 7), False),
        pytest.param((4, 8, 8), True, marks=[pytest.mark.slow, pytest.mark.compiled]),
    ],
)
def test_through_the_pass_it_is_that_to_the_bit(shape, compiled):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        moments = Moments(torch.randn(5, *shape), torch.rand(5, *shape))
    keys, stats_ = Keys.pack(torch.arange(5), seed=7, view=3), {"mean": [0.3] * shape[0], "std": [2.0] * shape[0]}
    plain = moments.mean + moments.std * gaussian(keys, shape, Purpose.POSTERIOR)
    most = 2e-6 if compiled else 0  # there a few last bits differ
    z, scaled = (Posterior("sample", given, 0.5)(moments, keys, compiled=compiled) for given in (None, stats_))
    assert (z - plain).abs().max() <= most
    assert (scaled - (plain - 0.3) * 0.25).abs().max() <= most


def test_on_an_accelerator_it_is_a_few_operations(monkeypatch):
    """Those of the normals alone are two hundred, where they do not go through the compiled pass."""
    watched = pytest.importorskip("watched", reason="needs torch's private names where they were", exc_type=ImportError)
    # To key the device's own random state needs a driver.
    monkeypatch.setattr(noiser, "keyed_random_state", lambda *_: contextlib.nullcontext())
    process = ForwardProcess(LinearBeta(), value_range=None)
    options = {"encoder": Stored(deviations=True), "latent_stats": {"mean": [0.0] * 4, "std": [1.0] * 4}}
    data = DiffusionDataModule(TensorDataset(torch.zeros(8, 2, 4, 16, 16)), process=process, batch_size=4, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compiler_for", lambda _: False)  # on the CPU: here it is of no interest
        data.setup("fit")
    data.process._cannot_compile, data._noiser.eager = False, False
    with watched.watched() as watch:
        for batch in data.train_dataloader():
            watch.clear()
            made = data.noise(data.transfer_batch_to_device(batch, watched.DEVICE, 0))
            assert made.x_t.device == watched.DEVICE
        assert watch.waits == []
        assert watch.operations <= 20


def test_z_does_not_depend_on_the_batch():
    """The encoder here takes each image by itself, so that its own bits do not depend on the batch either."""

    def one_by_one(x: torch.Tensor) -> Any:
        made = [Encoder().encode(image[None]) for image in x]
        return Moments(*(torch.cat([getattr(m, name) for m in made]) for name in ("mean", "stddev")))

    a, b, c = (
        by_visit(seen(encoder=one_by_one, views=views, batch_size=size)["train"])
        for views, size in ((4, 4), (4, 5), (1, 3))
    )
    assert all(torch.equal(a[visit], b[visit]) for visit in a)
    assert all(torch.equal(a[i, 0], c[i, 0]) for i in range(12))
    for i in range(12):
        draws = torch.stack([a[i, view] for view in range(4)]).flatten(1)
        assert torch.pdist(draws).min() > 0.1


def test_a_fixed_draw_and_the_mean():
    fixed = seen(posterior="fixed", epochs=2, views=2, batch_size=12)["train"]
    a, b = (by_visit([batch]) for batch in fixed)
    first = by_visit(seen(epochs=1, batch_size=12)["train"])
    for i in range(12):
        assert torch.equal(a[i, 0], a[i, 1])
        assert torch.equal(a[i, 0], b[i, 1])
        assert torch.equal(a[i, 0], first[i, 0])
    assert not torch.equal(a[0, 0] - a[1, 0], a[2, 0] - a[3, 0])
    mean = seen(posterior="mean", batch_size=12)["train"]
    plain = seen(encoder=Encoder("plain"), batch_size=12)["train"]
    assert_alike(mean, plain)


def test_validation_has_one_draw_of_each_image():
    out = seen(epochs=2, batch_size=8)["val"]
    assert torch.equal(out[0].x_0, out[1].x_0)


def test_draws_have_the_mean_and_the_variance_of_the_posterior():
    """Over 4,096 visits of one image; an element fails by chance once in a million runs of the test."""
    visits, shape = 4096, (4, 4, 4)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        mean, std = torch.randn(1, *shape), torch.rand(1, *shape) + 0.1
    each = Keys.pack(torch.full((visits,), 77), seed=1, epoch=torch.arange(visits))
    moments = Moments(mean.expand(visits, *shape), std.expand(visits, *shape))
    n = (Posterior("sample", None, 0.5)(moments, each) - mean).div(std).double().flatten(1)
    alarm = 1e-6 / 128 / 2  # two tests of 64 elements, each of two sides
    assert n.mean(0).abs().max() < stats.norm.isf(alarm) / math.sqrt(visits)
    squares = n.square().sum(0)
    assert stats.chi2.ppf(alarm, visits) < squares.min()
    assert squares.max() < stats.chi2.isf(alarm, visits)


def test_channels_are_scaled_to_sigma_data():
    plain = together(seen(posterior="mean")["train"], "x_0")
    stats_ = {"mean": plain.mean((0, 2, 3)).tolist(), "std": plain.std((0, 2, 3)).tolist()}
    process = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False, sigma_data=0.3)
    scaled = together(seen(process, posterior="mean", latent_stats=stats_)["train"], "x_0")
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.full((2,), 0.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posterior": "mode"}, r"data\.posterior must be one of 'sample', 'mean', 'fixed', but got 'mode'"),
        ({"latent_stats": [1, 2]}, r"data\.latent_stats must be \{mean: \[\.\.\.\], std"),
        (
            {"latent_stats": {"mean": [1], "std": [0]}},
            r"each std of data\.latent_stats must be a number > 0, but got 0",
        ),
        (
            {"latent_stats": {"mean": [1], "std": [2]}},
            r"latent_stats has 1 channels, but the latents have shape \(2, 6, 6\)",
        ),
        (
            {"encoder": lambda x: Moments(x[1:], x)},
            r"data\.encoder must return .* returned \(3, 3, 6, 6\) and \(4, 3, 6, 6\)",
        ),
        (
            {"encoder": lambda x: SimpleNamespace(mean=x)},
            r"must return .* but it returned \(4, 3, 6, 6\)\. A diffusers VAE",
        ),
    ],
)
def test_mistakes_are_said(options, message):
    with pytest.raises(ValueError, match=message):
        seen(**options)


def write(out: Path, encoder: Any, **options: Any) -> Path:
    data = DiffusionDataModule(pictures(12), pictures(8), process=IMAGES, encoder=encoder, batch_size=4)
    encode(data, str(out), trainer(), Encoding, **options)
    return out


def stored(out: Path, **options: Any) -> Any:
    return store(root=str(out), **{"process": LATENTS, "seed": 5, "batch_size": 4, **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of float32 moments."""
    return write(tmp_path_factory.mktemp("store") / "made", Encoder())


@pytest.mark.parametrize("form", ["normal", "plain"])
def test_a_float32_store_gives_the_very_batches_of_its_live_encoder(form, tmp_path):
    data = stored(write(tmp_path / "made", Encoder(form)), views=2, image_shape=[2, 6, 6])
    scale = data._noiser.posterior.stats
    live, ours = seen(encoder=Encoder(form), latent_stats=scale, epochs=2, views=2), fitted(data, epochs=2)
    for stage in ("train", "val"):
        assert_alike(live[stage], ours[stage])
    x_0 = together(ours["train"], "x_0")
    assert x_0.mean((0, 2, 3)).abs().max() < 0.15
    assert (x_0.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_each_variant_is_encoded_as_an_image_of_its_own(tmp_path):
    """The latent of the flip, not the flipped latent."""
    part = Store(str(write(tmp_path / "made", Encoder(), variants=["identity", "hflip"])))
    images = pictures(12).tensors[0][5].float() / 127.5 - 1
    with torch.no_grad():
        wanted = [Encoder().encode(image[None]).mean[0] for image in (images, images.flip(-1))]
    got = [part[5]["image"][0] for _ in range(20)]
    near = [[torch.allclose(one, other, atol=1e-6) for other in wanted] for one in got]
    assert all(sum(row) == 1 for row in near)
    assert len(part) == 12


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_is_off_by_its_rounding(dtype, bound, made, tmp_path, capsys):
    """Each moment by half a unit of its last place: a bound relative to |mean| + std |n|."""
    data = stored(made)
    exact, scale = fitted(data)["train"], data._noiser.posterior.stats
    capsys.readouterr()
    rounded = fitted(stored(write(tmp_path / "made", Encoder(), dtype=dtype), latent_stats=scale))["train"]
    assert f"The largest error of rounding to {dtype} is" in capsys.readouterr().out
    index = together(exact, "index")
    with torch.no_grad():
        live = Encoder().encode(pictures(12).tensors[0].float() / 127.5 - 1)
    n = gaussian(Keys.pack(index, seed=5), (2, 6, 6), Purpose.POSTERIOR)
    most = (live.mean[index].abs() + live.stddev[index] * n.abs()) / torch.tensor(scale["std"]).view(2, 1, 1)
    off = (together(rounded, "x_0") - together(exact, "x_0")).abs()
    assert off.max() > 0
    assert (off <= bound * most + 1e-6).all()


def test_mixed_precision_does_not_reach_the_encoder(made, tmp_path):
    """A Trainer's autocast is of training and predict steps; a live encoder is called outside of it."""
    data = DiffusionDataModule(pictures(12), process=IMAGES, encoder=Encoder(), batch_size=4)
    encode(data, str(tmp_path / "mixed"), trainer(precision="bf16-mixed"), Encoding)
    mixed, plain = (Store(str(out))[3]["image"] for out in (tmp_path / "mixed", made))
    assert torch.equal(mixed, plain)


def test_the_mean_and_deviation_of_every_channel_are_exact(made):
    scale = {name: torch.tensor(of).double() for name, of in stored(made)._noiser.posterior.stats.items()}
    with torch.no_grad():
        live = Encoder().encode(pictures(12).tensors[0].float() / 127.5 - 1)
    mean, std = live.mean.double(), live.stddev.double()
    wanted = mean.mean((0, 2, 3))
    torch.testing.assert_close(scale["mean"], wanted, rtol=1e-6, atol=1e-7)
    variance = (mean.square() + std.square()).mean((0, 2, 3)) - wanted.square()
    torch.testing.assert_close(scale["std"], variance.sqrt(), rtol=1e-6, atol=0)


def test_a_store_of_latents_is_refused(made, tmp_path, same_random_state):
    other = Encoder()
    torch.nn.init.constant_(other.conv.bias, 1)
    for encoder in (other, other.encode, lambda x: other.encode(x)):
        with pytest.raises(ValueError, match=r"(?s)was made from something else:.*\n  weights: \w+ -> \w+\n"):
            write(made, encoder)
    with pytest.raises(ValueError, match=r"\n  dtype: float32 -> float16\n"):
        write(made, Encoder(), dtype="float16")
    with pytest.raises(ValueError, match=r"holds latents, which have no range: set process\.value_range=null"):
        stored(made, process=IMAGES)
    with pytest.raises(ValueError, match=r"data=store reads what is encoded, or images: data\.encoder goes with"):
        stored(made, encoder=Encoder())
    with pytest.raises(ValueError, match=r"data\.encoder draws random numbers: a store would keep one draw for ever"):
        write(tmp_path / "other", lambda x: x + torch.randn_like(x))
    assert not (tmp_path / "other").exists()


def test_moments_that_nothing_draws_from_are_refused(made):
    whole = Store(str(made))
    parts = [Subset(whole, [3, 1]), ConcatDataset([Subset(whole, [2]), whole])]
    for train in (whole, Mixture({"a": pictures(3), "b": whole}), *parts, Mixture({"a": parts[0]})):
        data = DiffusionDataModule(train, process=LATENTS)
        with pytest.raises(ValueError, match=r"data\.train reads the store of latents .*data\.encoder=\{_target_"):
            data.setup("fit")
    inner = pl.LightningDataModule.from_datasets(Subset(whole, [3, 1]))
    with pytest.raises(ValueError, match=r"train_dataloader\(\) reads the store of latents"):
        fitted(DiffusionDataModule.wrap(inner, LATENTS))
    stats = stored(made)._noiser.posterior.stats
    options = {"encoder": Stored(deviations=True), "latent_stats": stats, "seed": 5, "batch_size": 4}
    mixed = fitted(DiffusionDataModule(Mixture({"a": Store(str(made))}), process=LATENTS, **options))["train"]
    alone = fitted(stored(made, seed=5))["train"]
    by_index = {int(i): z for batch in alone for i, z in zip(batch.index, batch.x_0, strict=True)}
    assert len(by_index) == 12
    for part in parts:  # of the shape of latents, not of their moments
        fitted(DiffusionDataModule(part, process=LATENTS, image_shape=[2, 6, 6], **options))
    for batch in mixed:
        assert all(torch.equal(by_index[int(i)], z) for i, z in zip(batch.index, batch.x_0, strict=True))


def test_a_dtype_that_rounds_by_more_than_the_posterior_is_refused(tmp_path):
    def narrow(x: torch.Tensor) -> Any:
        return Normal(8 + x, torch.full_like(x, 1e-3))

    message = (
        r"dtype=bfloat16 rounds .* by up to 0\.0\d+, which is more than the posterior's median deviation, 0\.001\."
    )
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "made", narrow, dtype="bfloat16")
    write(tmp_path / "made", narrow, dtype="bfloat16", allow_rounding=True)
    message = r"The mean of these latents goes up to \d.*e\+05, but float16 ends at 6\.55e\+04: take dtype=float32"
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "huge", lambda x: 1e6 * x, dtype="float16", allow_rounding=True)
    with pytest.raises(ValueError, match=r"The mean of these latents is NaN or infinite in places, as data\.encoder"):
        write(tmp_path / "huge", lambda x: x / 0 * 0)
    with pytest.raises(ValueError, match=r"dtype must be one of 'float32', 'float16', 'bfloat16', but got 'int8'"):
        write(tmp_path / "huge", narrow, dtype="int8")


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_a_diffusers_vae_is_given_as_it_is(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 2}
    tiny = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,), "latent_channels": 2}
    tiny |= {"num_encoder_blocks": (1,), "num_decoder_blocks": (1,)}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        vae = getattr(diffusers, name)(**(sizes if name == "AutoencoderKL" else tiny))
    images = TensorDataset(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8))
    data = DiffusionDataModule(images, images, process=IMAGES, encoder=vae, batch_size=4)
    encode(data, str(tmp_path / "made"), trainer(), Encoding)
    ours = stored(tmp_path / "made")
    live = seen(train=images, encoder=vae, latent_stats=ours._noiser.posterior.stats)["train"]
    assert_alike(live, fitted(ours)["train"])
    assert (tmp_path / "made" / "train" / "std-00000.npy").exists() == (name == "AutoencoderKL")
