"""preview: what it says of a dataset, and when it warns."""

import math

import pytest
import torch
from torch.utils.data import TensorDataset

from diffaug import EDM, DiffusionDataModule, ForwardProcess, LinearBeta, Parts, Uniform, ZeroTerminalSNR
from diffaug.__main__ import main
from diffaug.commands.preview import _visible, preview, warnings

pytest.importorskip("matplotlib")


def flat_images(count, side, spread=1.0):
    """Images of one grey each: all that they say is their brightness, of known variance."""
    grey = torch.linspace(-spread, spread, count)
    return grey.view(-1, 1, 1, 1).expand(count, 1, side, side).clone()


def warned(process, images):
    return warnings(process, images, process.schedule.from_unit(torch.linspace(0, 1, 1001, dtype=torch.float64)))


def test_the_coarsest_feature_grows_with_the_number_of_pixels():
    t = torch.tensor([999])
    for side in (8, 16, 64):  # 64 is averaged down to 16 first
        images = flat_images(101, side)
        variance = images[:, 0, 0, 0].var().item()
        snr = LinearBeta().log_snr(t, torch.float64).exp()
        found = _visible(ForwardProcess(LinearBeta()), images)(t)
        assert found.item() == pytest.approx(snr.item() * variance * side**2, rel=1e-5)


def test_a_schedule_is_weak_for_large_images_and_strong_for_small_ones():
    process = ForwardProcess(LinearBeta())
    (weak,) = warned(process, flat_images(101, 128))  # SNR_T V n = 4e-5 x 0.34 x 16384 = 0.23
    assert weak.startswith("The schedule is weak for 128 pixels")
    assert float(weak.split("ratio of ")[1].split()[0]) == pytest.approx(0.2248, abs=0.006)
    assert warned(process, flat_images(101, 64)) == []
    (strong,) = warned(process, flat_images(101, 1))  # SNR V below 0.01 from t = 591
    assert strong.startswith("The schedule is strong for 1 pixels: in 41% of the draws")
    (strong,) = warned(ForwardProcess(LinearBeta(4000)), flat_images(101, 16))  # the betas of 1,000 steps, four times
    assert strong.startswith("The schedule is strong for 16 pixels: in 53% of the draws")
    zero = ForwardProcess(ZeroTerminalSNR(LinearBeta()), target="v")
    assert not any("weak" in warning for warning in warned(zero, flat_images(101, 256)))
    assert any("sigma_max" in warning for warning in warned(ForwardProcess(EDM(sigma_max=1.0)), flat_images(101, 64)))


def test_the_factor_that_is_advised_mends_it():
    from diffaug import Shifted

    (weak,) = warned(ForwardProcess(LinearBeta()), flat_images(101, 256))
    factor = float(weak.split("schedule.factor=")[1].split()[0])
    mended = warned(ForwardProcess(Shifted(LinearBeta(), factor=1.05 * factor)), flat_images(101, 256))
    assert not any("weak" in warning for warning in mended)


def test_values_that_look_wrong():
    process = ForwardProcess(LinearBeta())
    dark = torch.randint(0, 2, (50, 1, 64, 64), dtype=torch.uint8)
    assert "uint8 but go from 0 to 1" in warned(process, dark)[0]
    half = torch.rand(50, 1, 64, 64)
    assert "set process.value_range=[0,1]" in warned(process, half)[0]
    unit = ForwardProcess(LinearBeta(), value_range=(0, 1))
    assert not any("value_range" in warning for warning in warned(unit, half))
    assert "nearly one colour" in warned(process, torch.randn(50, 1, 64, 64) * 0.01)[0]
    edm = ForwardProcess(EDM(), fields=("x_in", "F", "t"), target="F")
    (data,) = warned(edm, (flat_images(101, 64) * 0.3))
    assert "standard deviation of 0.175" in data
    assert "set process.sigma_data=0.17" in data


def test_a_preview_says_what_it_saw():
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    process = ForwardProcess(LinearBeta(), Uniform(), compile=False)
    seen = preview(DiffusionDataModule(train=TensorDataset(images), process=process, seed=0, batch_size=8))
    assert "images           40, each (3, 16, 16), uint8" in seen.text
    assert f"{images.min()} to {images.max()} as read, of [0, 255]" in seen.text
    rows = [row for row in seen.picture.rows if row[0] == "unit_time"]
    assert math.fsum((high - low) * height for _, low, high, height in rows) == pytest.approx(1)
    pixels = [row for row in seen.picture.rows if row[0] == "pixels"]
    assert len(pixels) == 64
    share = (images >= 252).double().mean().item()
    assert pixels[-1][3] == pytest.approx(share / (4 / 127.5), rel=1e-6)


@pytest.mark.slow
def test_the_default_recipe_looks_right_on_the_default_data(tmp_path, capsys):
    assert main(["preview", f"out={tmp_path / 'p.png'}"]) == 0
    out = capsys.readouterr().out
    assert "nothing looks wrong" in out
    assert "as good as noise 25% of the draws" in out


def test_a_preview_of_latents():
    latents = TensorDataset(1.3 * torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    process = ForwardProcess(LinearBeta(), value_range=None, compile=False)
    text = preview(DiffusionDataModule(train=latents, process=process, seed=0, batch_size=8)).text
    assert "as read, of latents; looked at 40 images" in text
    assert "noised           as they are; mean ± standard deviation of each channel: " in text
    assert "scaled           to" not in text


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("value_range", [(-1, 1), (0, 1)])
def test_a_preview_of_what_an_encoder_makes(channels, value_range):
    """It is what is noised: drawn from the posterior, and scaled."""
    images = TensorDataset(torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)))

    def encoder(x):
        mean = 5 + 3 * torch.cat([x[..., i : 8 + i, i : 8 + i] for i in range(channels)], 1)
        return torch.distributions.Normal(mean, 0.5)

    process = ForwardProcess(LinearBeta(), value_range=value_range, compile=False)
    span = 2 / (value_range[1] - value_range[0])
    centre = 5 + 3 * (0.5 - sum(value_range) / 2) * span
    stats = {"mean": [centre] * channels, "std": [(9 * span**2 / 12 + 0.25) ** 0.5] * channels}
    data = DiffusionDataModule(images, process=process, encoder=encoder, latent_stats=stats, seed=0, batch_size=8)
    seen = preview(data)
    assert f"40, each ({channels}, 8, 8), float32" in seen.text
    assert "of latents; looked at 40 images" in seen.text
    said = [part.split(" ± ") for part in seen.text.split("of each channel: ")[1].split("\n")[0].split(", ")]
    assert len(said) == channels
    for mean, std in said:
        assert abs(float(mean)) < 0.03
        assert float(std) == pytest.approx(process.sigma_data, abs=0.03)
    pixels = [row for row in seen.picture.rows if row[0] == "pixels"]
    assert pixels[-1][2] > 1.1  # not cut off at 1


def test_a_preview_of_latents_that_are_no_pictures_is_refused():
    images = TensorDataset(torch.rand(40, 1, 16, 16))
    process = ForwardProcess(LinearBeta(), compile=False)
    data = DiffusionDataModule(images, process=process, encoder=lambda x: x.flatten(1))
    with pytest.raises(ValueError, match=r"preview wants latents of shape \(B, C, H, W\) .* of shape \(40, 256\)"):
        preview(data)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    assert main(["preview", "schedule=cosine", "data.batch_size=512", f"out={tmp_path / 'p.png'}"]) == 0
    out = capsys.readouterr().out
    assert "1618, each (1, 8, 8), float32" in out
    assert "Cosine(" in out
    assert "images a second" in out
    assert (tmp_path / "p.png").is_file()
    assert (tmp_path / "p.csv").is_file()
    assert main(["preview", "data=image_folder", "data.root=nowhere", f"out={tmp_path / 'q.png'}"]) == 1
    assert "data.root='nowhere'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_preview_names_its_pair_and_its_parts(tmp_path, capsys):
    out = f"out={tmp_path / 'preview.png'}"
    assert main(["preview", "experiment=meanflow", "trainer=cpu", "data.num_workers=0", out]) == 0
    assert "\npair             Pair(times=TwoDraws(" in capsys.readouterr().out
    assert main(["preview", "parts=patches", "trainer=cpu", "data.num_workers=0", out]) == 0
    assert "\nparts            Parts(" in capsys.readouterr().out
    assert main(["preview", "experiment=diffusion_forcing", "trainer=cpu", "data.num_workers=0", out]) == 0
    assert "each (8, 1, 16, 16), uint8: clips, whose frames are looked at as images" in capsys.readouterr().out


def test_a_preview_of_clips_looks_at_their_frames():
    latents = TensorDataset(torch.rand(6, 2, 4, 5, 7))  # of two frames and four channels, or the other way round
    for axis, channels in ((1, 4), (2, 2)):
        process = ForwardProcess(LinearBeta(), value_range=None, parts=Parts(axis), compile=False)
        (line,) = (
            line
            for line in preview(DiffusionDataModule(latents, process=process, seed=0, batch_size=2)).text.splitlines()
            if line.startswith("noised ")
        )
        assert line.count(" ± ") == channels + 1  # the words and each channel's
