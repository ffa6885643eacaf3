"""A network of latents is exported with the autoencoder that made them, whose latents are scaled as it was trained."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import server
import torch
from shared import ROOT
from torch.utils.data import TensorDataset

from diffaug import EDM, DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.__main__ import main
from diffaug.commands.export import export
from diffaug.datamodules.recipe import describe
from diffaug.encoding.autoencoder import find_autoencoder, folder_of, load_autoencoder
from diffaug.encoding.fingerprint import digest_weights
from diffaug.interop import scale_autoencoder
from diffaug.pytorch_lightning import Denoiser

diffusers = pytest.importorskip("diffusers")
STATS = {"mean": [0.7, -30.0], "std": [2.5, 0.01]}


def autoencoder(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "in_channels": 1, "out_channels": 1}
    sizes |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return diffusers.AutoencoderKL(**sizes, latent_channels=2, **options).eval()


def scaled(z: torch.Tensor, sigma_data: float) -> torch.Tensor:
    mean, std = (torch.tensor(STATS[name], dtype=z.dtype).view(-1, 1, 1) for name in ("mean", "std"))
    return (z - mean) * sigma_data / std


def unet(**options: Any) -> Any:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4}
    channels = {"in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16), "layers_per_block": 1}
    return diffusers.UNet2DModel(**blocks, **channels, **options)


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_scale_is_in_the_autoencoder(convolutions, sigma_data, tmp_path):
    """Both ways; saved and loaded again; with and without 1 x 1 convolutions of its own."""
    vae = autoencoder(use_quant_conv=convolutions, use_post_quant_conv=convolutions, shift_factor=3.0)
    before = digest_weights(vae)
    scale_autoencoder(vae, STATS, sigma_data).save_pretrained(tmp_path)
    made = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert (made.config.scaling_factor, made.config.shift_factor) == (1.0, None)
    assert digest_weights(vae) == before
    with torch.no_grad():
        image = torch.randn(3, 1, 8, 8)
        theirs, ours = vae.encode(image).latent_dist, made.encode(image).latent_dist
        torch.testing.assert_close(ours.mean, scaled(theirs.mean.double(), sigma_data).float(), rtol=1e-5, atol=1e-3)
        factor = sigma_data / torch.tensor(STATS["std"]).view(-1, 1, 1)
        torch.testing.assert_close(ours.std, theirs.std * factor, rtol=1e-5, atol=0)
        z = torch.randn(3, 2, 4, 4)
        mean, std = (torch.tensor(STATS[name]).view(-1, 1, 1) for name in ("mean", "std"))
        wanted = vae.decode(z * std / sigma_data + mean).sample
        torch.testing.assert_close(made.decode(z).sample, wanted, rtol=0, atol=1e-5)
        untouched = scale_autoencoder(vae, None, sigma_data)
        assert torch.equal(untouched.decode(z).sample, vae.decode(z).sample)


def test_what_cannot_be_scaled_exactly_is_refused():
    tiny = diffusers.AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=2)
    assert scale_autoencoder(tiny, None, 1.0).config.scaling_factor == 1.0
    with pytest.raises(ValueError, match=r"AutoencoderTiny squashes its latents before its first layer"):
        scale_autoencoder(tiny, STATS, 1.0)
    with pytest.raises(ValueError, match=r"has 2 channels, but data\.latent_stats has 1"):
        scale_autoencoder(autoencoder(), {"mean": [0.0], "std": [1.0]}, 1.0)
    edm = ForwardProcess(EDM(), fields=("x_in", "F", "t", "label"), target="F", value_range=None)
    options = {"input": "x_in", "time": "c_noise", "target": "F", "condition": "label"}
    with pytest.raises(ValueError, match=r"no pipeline of latents that hands a network labels and scales its input"):
        export(Denoiser(unet(num_class_embeds=3), edm, **options), "nowhere", (2, 4, 4), autoencoder=autoencoder())
    images = Denoiser(unet(), ForwardProcess(LinearBeta()))
    with pytest.raises(ValueError, match=r"makes images, which no autoencoder decodes"):
        export(images, "nowhere", (2, 4, 4), autoencoder=autoencoder())
    assert not Path("nowhere").exists()


def test_only_the_autoencoder_that_made_the_latents_is_taken(tmp_path):
    vae, other = autoencoder(), autoencoder(1)
    for made, name in ((vae.to(torch.bfloat16), "vae"), (other, "other")):
        made.save_pretrained(tmp_path / "pipeline" / name)
    recipe = {"encoder": "Stored(deviations=True)", "train": {"encoder": describe(vae), "weights": digest_weights(vae)}}
    found = find_autoencoder(recipe, {}, str(tmp_path / "pipeline"), None)
    assert found.dtype == torch.bfloat16
    assert digest_weights(found) == digest_weights(vae)
    with pytest.raises(ValueError, match=r"other is AutoencoderKL of \d+ parameters, with weights \w+, but the"):
        find_autoencoder(recipe, {}, str(tmp_path / "pipeline" / "other"), None)
    with pytest.raises(FileNotFoundError, match=r"holds no AutoencoderKL: say where .* vae=FOLDER"):
        find_autoencoder(recipe, {}, str(tmp_path), None)
    with pytest.raises(FileNotFoundError, match=r"store\.json does not say where the autoencoder is"):
        find_autoencoder(recipe, {"root": str(tmp_path)}, None, None)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "pipeline" / "vae", low_cpu_mem_usage=False)
    (tmp_path / "store.json").write_text(json.dumps({"autoencoder": folder_of(loaded)}))
    assert digest_weights(find_autoencoder(recipe, {"root": str(tmp_path)}, None, None)) == digest_weights(vae)
    for encoder in ("user.encode", None):
        with pytest.raises(ValueError, match=r"makes latents of (user\.encode|a dataset of latents), which is not a"):
            find_autoencoder({"encoder": encoder}, {}, str(tmp_path), None)
    live = DiffusionDataModule(
        TensorDataset(torch.rand(4, 1, 8, 8)), process=ForwardProcess(LinearBeta()), encoder=other
    )
    assert find_autoencoder(live.recipe(), {"encoder": 0}, None, lambda _: other) is other


PLAIN = """
import json, sys, torch, diffusers
pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
generator, name = torch.Generator().manual_seed(0), type(pipeline).__name__
call = {"class_labels": [1, 2], "guidance_scale": 1} if name == "DiTPipeline" else {"batch_size": 2}
images = pipeline(**call, num_inference_steps=20, generator=generator, output_type="np").images
assert "diffaug" not in sys.modules
print(json.dumps([name, type(pipeline.scheduler).__name__, list(images.shape), images.tolist()]))
"""


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, encoded by an autoencoder of random weights."""
    folder = tmp_path_factory.mktemp("latents")
    autoencoder().save_pretrained(folder / "vae")
    own = "data.encoder.folder=vae"
    words = ["encode", "encoder@data.encoder=autoencoder_kl", own, "out=made", "trainer=cpu"]
    done = server.run([sys.executable, "-m", "diffaug", *words], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_an_autoencoder_that_is_not_there_is_said(tmp_path):
    made = autoencoder()
    made.save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in ("pipeline", "pipeline/vae"):
        loaded = load_autoencoder("AutoencoderKL", str(tmp_path / folder))
        assert digest_weights(loaded) == digest_weights(made)
    with pytest.raises(
        FileNotFoundError, match=r"data\.encoder\.folder='.*none' holds no AutoencoderKL: there is no con"
    ):
        load_autoencoder("AutoencoderKL", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"holds no AutoencoderTiny"):
        load_autoencoder("AutoencoderTiny", str(tmp_path / "pipeline"))


LABELS = ("model.condition=label", "model.network.num_class_embeds=10", "process.fields=[x_t,epsilon,t,label]")
SMALL = ("model.network.block_out_channels=[16]", "model.network.down_block_types=[DownBlock2D]")
SMALL += ("model.network.up_block_types=[UpBlock2D]",)
PLAINLY = "~callbacks.pictures"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "pipeline", "scheduler"),
    [
        (("process.sigma_data=1",), "LDMPipeline", "DDIMScheduler"),
        (("experiment=edm", PLAINLY), "LDMPipeline", "EDMEulerScheduler"),
        (("experiment=rectified_flow", "process.sigma_data=1", PLAINLY), "LDMPipeline", "DPMSolverMultistepScheduler"),
        (("process.sigma_data=1", PLAINLY, *LABELS), "DiTPipeline", "DDIMScheduler"),
        (("live",), "LDMPipeline", "DDIMScheduler"),
    ],
    ids=("ddpm", "edm", "flow", "labels", "live encoder"),
)
def test_a_run_on_latents_is_sampled_and_decoded_by_plain_diffusers(overrides, pipeline, scheduler, encoded, tmp_path):
    """Twenty steps on a store, through train.py; what comes out is what Denoiser.sample makes, decoded."""
    data = ["data=store", f"data.root={encoded / 'made'}", "process.value_range=null"]
    if overrides == ("live",):
        own = f"data.encoder.folder={encoded / 'vae'}"
        data, overrides = ["encoder@data.encoder=autoencoder_kl", own, "model.network.in_channels=2"], ()
        data += ["model.network.out_channels=2", PLAINLY]
    steps = ["trainer.max_steps=20", "trainer.val_check_interval=10", "hydra.run.dir=run", "trainer=cpu"]
    steps += ["process.compile=false", "trainer.enable_progress_bar=false", *SMALL]
    done = server.run([sys.executable, str(ROOT / "train.py"), *data, *steps, *overrides], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 20
    assert main(["export", f"ckpt={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]) == 0
    (tmp_path / "plain.py").write_text(PLAIN)
    found = server.run([sys.executable, "plain.py", str(tmp_path / "out")], tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    name, solver, shape, images = json.loads(found.stdout)
    assert (name, solver, shape) == (pipeline, scheduler, [2, 8, 8, 1])
    assert torch.tensor(images).std() > 1e-3
    slot = "vae" if pipeline == "DiTPipeline" else "vqvae"
    made = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out" / slot, low_cpu_mem_usage=False)
    said = json.loads((encoded / "made" / "store.json").read_text())["latents"]
    sigma_data = 0.5 if overrides[:1] == ("experiment=edm",) else 1.0
    mean, std = (torch.tensor(said[key]).view(-1, 1, 1) for key in ("mean", "std"))
    z = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        raw = z if data[0] != "data=store" else z * std / sigma_data + mean
        torch.testing.assert_close(made.decode(z).sample, autoencoder().decode(raw).sample, rtol=0, atol=1e-5)
