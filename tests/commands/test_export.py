"""export: what it prints; what it writes is of tests/interop."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from diffaug.__main__ import main
from diffaug.config import compose_config

pytest.importorskip("diffusers")


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
def test_what_it_prints_samples_from_the_folder(labels, tmp_path, capsys):
    """As it stands, but for the number of steps; whatever the folder is called."""
    words = ["model.network.block_out_channels=[8]", "model.network.down_block_types=[DownBlock2D]"]
    words += ["model.network.up_block_types=[UpBlock2D]"]
    if labels:
        words += ["model.condition=label", "model.network.num_class_embeds=10", "process.fields=[x_t,epsilon,t,label]"]
    run, out = tmp_path / "run", tmp_path / "a 'b' \"c\""
    config = compose_config(words)
    model = instantiate(config.model, process=instantiate(config.process))
    (run / ".hydra").mkdir(parents=True)
    OmegaConf.save(config, run / ".hydra" / "config.yaml")
    (run / "checkpoints").mkdir()
    torch.save({"state_dict": model.state_dict(), "latents": False}, run / "checkpoints" / "last.ckpt")
    assert main(["export", f"ckpt={run}", f"out={out}"]) == 0
    name = "ConsistencyModelPipeline" if labels else "DDPMPipeline"
    said, code = capsys.readouterr().out.split("\n\n", 1)
    assert said == f"{out} holds a {name}. To sample from it, without diffaug:"
    assert code.count("num_inference_steps=50") == 1
    names: dict = {}
    exec(code.replace("num_inference_steps=50", "num_inference_steps=2"), names)
    assert type(names["pipeline"]).__name__ == name
    assert [image.size for image in names["images"]] == [(8, 8)] * 16
    weights = names["pipeline"].unet.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.network.state_dict().items())
