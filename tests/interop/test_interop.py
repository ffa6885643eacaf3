"""diffusers and diffaug mean the same: schedules, targets, samples of one network, and exported runs."""

import sys

import pytest
import server
import torch
from hydra.utils import instantiate
from shared import ROOT
from torch import nn

from diffaug import (
    EDM,
    VE,
    VPSDE,
    Cosine,
    ForwardProcess,
    LinearBeta,
    Rectified,
    ScaledLinearBeta,
    Shifted,
    SigmoidBeta,
    Tabulated,
    Trigonometric,
    ZeroTerminalSNR,
)
from diffaug.__main__ import main
from diffaug.commands.export import export, find_run
from diffaug.config import compose_config, schedule_names
from diffaug.interop import from_diffusers, target_of, to_diffusers
from diffaug.noise import gaussian
from diffaug.pytorch_lightning import Denoiser
from diffaug.randomness.keys import Keys, Purpose
from diffaug.schedules.base import VARIANCE_PRESERVING
from diffaug.times import LogitNormal

diffusers = pytest.importorskip("diffusers")
BETA_SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")


CONFIGS = compose_config([f"+schedule@all.{name}={name}" for name in schedule_names()])["all"]
SCHEDULES = {name: instantiate(config) for name, config in CONFIGS.items()}
DISCRETE = [name for name, s in SCHEDULES.items() if s.discrete and s.scaling is VARIANCE_PRESERVING]


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("scheduler", BETA_SCHEDULERS)
def test_every_discrete_schedule_keeps_its_alpha_bar_in_diffusers_and_back(name, scheduler):
    schedule = SCHEDULES[name]
    theirs = to_diffusers(schedule, "v", scheduler)
    table = theirs.alphas_cumprod.double()
    if schedule.alpha_bars[-1] == 0:  # DPM-Solver puts 2^-24 in its place, so that its first log-SNR is finite
        assert table[-1] in (0.0, 2.0**-24)
        table[-1] = 0.0
    torch.testing.assert_close(table, schedule.alpha_bars, rtol=2e-5, atol=0)
    assert theirs.config.num_train_timesteps == schedule.timesteps
    torch.testing.assert_close(from_diffusers(theirs).alpha_bars, schedule.alpha_bars, rtol=1e-11, atol=0)
    assert target_of(theirs) == "v"


@pytest.mark.parametrize(
    ("schedule", "beta_schedule"),
    [
        (LinearBeta(), "linear"),
        (LinearBeta(100), "linear"),
        (LinearBeta(200, rescale=True), "linear"),
        (ScaledLinearBeta(), "scaled_linear"),
        (Cosine(500), "squaredcos_cap_v2"),
    ],
)
def test_what_diffusers_has_a_name_for_goes_by_its_name(schedule, beta_schedule):
    theirs = to_diffusers(schedule)
    assert theirs.config.beta_schedule == beta_schedule
    assert theirs.config.trained_betas is None
    assert repr(from_diffusers(theirs)).split("(")[0] == repr(schedule).split("(")[0]
    zero = to_diffusers(ZeroTerminalSNR(schedule), "v")
    assert zero.config.rescale_betas_zero_snr
    assert zero.alphas_cumprod[-1] == 0


def test_from_diffusers_by_scheduler_config_and_mapping():
    theirs = diffusers.DDPMScheduler(num_train_timesteps=50, beta_schedule="sigmoid", beta_end=0.3)
    ours = SigmoidBeta(50, beta_end=0.3)
    for given in (theirs, theirs.config, dict(theirs.config)):
        assert from_diffusers(given) == ours
    assert from_diffusers(diffusers.DDIMScheduler(trained_betas=[0.1, 0.2])) == Tabulated((0.1, 0.2))
    assert from_diffusers({"_class_name": "PNDMScheduler", "beta_schedule": "linear"}) == LinearBeta()
    zero = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    assert from_diffusers(zero) == ZeroTerminalSNR(LinearBeta())
    # diffusers accepts "laplace", whose table is its own: taken from the scheduler, refused from the config.
    laplace = diffusers.DDPMScheduler(beta_schedule="laplace")
    torch.testing.assert_close(from_diffusers(laplace).alpha_bars, laplace.alphas_cumprod.double(), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"beta_schedule='laplace' of .*pass the scheduler itself"):
        from_diffusers(laplace.config)


def test_edm_and_flow_schedulers_have_our_sigmas():
    edm = EDM(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    theirs = to_diffusers(edm, "F", sigma_data=0.3)
    theirs.set_timesteps(11)
    u = torch.linspace(1, 0, 11, dtype=torch.float64)
    torch.testing.assert_close(theirs.sigmas[:-1].double(), edm.from_unit(u), rtol=1e-6, atol=0)
    assert from_diffusers(theirs) == from_diffusers(theirs.config) == edm
    assert target_of(theirs) == "F"
    assert theirs.config.sigma_data == 0.3

    ve = VE()
    theirs = to_diffusers(ve, scheduler="EDMDPMSolverMultistepScheduler")
    theirs.set_timesteps(11)
    torch.testing.assert_close(theirs.sigmas[:-1].double(), ve.alpha_sigma(u, torch.float64)[1], rtol=1e-5, atol=0)
    assert from_diffusers(theirs) == ve

    for schedule in (Rectified(), Shifted(Rectified(), factor=3.0), Shifted(Rectified(), image=128, base_image=64)):
        u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
        sigma = schedule.alpha_sigma(u, torch.float64)[1]
        theirs = to_diffusers(schedule)
        torch.testing.assert_close(theirs.sigmas[:1000].double(), sigma, rtol=1e-6, atol=0)
        assert from_diffusers(theirs) == from_diffusers(theirs.config)
        back = from_diffusers(theirs).alpha_sigma(u, torch.float64)[1]
        torch.testing.assert_close(back, sigma, rtol=1e-12, atol=0)
        assert target_of(theirs) == "flow"
        solver = to_diffusers(schedule, "flow", "DPMSolverMultistepScheduler")
        assert target_of(solver) == "flow"
        torch.testing.assert_close(from_diffusers(solver).alpha_sigma(u, torch.float64)[1], sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", [VPSDE(), Trigonometric()])
def test_a_continuous_schedule_is_put_where_diffusers_tells_the_network_the_same_time(schedule):
    theirs = to_diffusers(schedule, "v")
    t = torch.arange(1, 1000)
    alpha, sigma = schedule.alpha_sigma(t.double() / 1000, torch.float64)
    table = theirs.alphas_cumprod.double()
    torch.testing.assert_close(table[1:], alpha.square(), rtol=5e-5, atol=0)
    torch.testing.assert_close((1 - table[1:]), sigma.square(), rtol=0, atol=2e-6)
    assert 0 < 1 - table[0] < 1 - table[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_diffusers(Rectified(), "v"), r"networks that predict flow, not v: set model\.target=flow"),
        (lambda: to_diffusers(LinearBeta(), "flow"), r"epsilon, v, x_0, not flow"),
        (lambda: to_diffusers(EDM(), "epsilon"), r"predict F, not epsilon: .*experiment=edm"),
        (lambda: to_diffusers(Shifted(EDM(), factor=2.0)), r"variance exploding schedulers take EDM's grid"),
        (lambda: to_diffusers(ZeroTerminalSNR(LinearBeta()), "epsilon"), r"alpha is 0 at t = 999"),
        (lambda: to_diffusers(LinearBeta(), scheduler="UNet2DModel"), r"the name of a diffusers scheduler"),
        (lambda: to_diffusers(LinearBeta(), scheduler="EDMEulerScheduler"), r"one that is given by betas"),
        (lambda: to_diffusers(LinearBeta(), scheduler="CMStochasticIterativeScheduler"), r"one that is given by betas"),
        (lambda: to_diffusers(Rectified(), scheduler="DDIMScheduler"), r"one for flows, such as FlowMatchEuler"),
        (
            lambda: from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
            r"another schedule for every size of image",
        ),
        (lambda: from_diffusers(diffusers.CMStochasticIterativeScheduler()), r"but got CMStochasticIterativeScheduler"),
        (lambda: from_diffusers(3), r"a diffusers scheduler, or its config, but got 3"),
        (lambda: target_of(diffusers.EDMEulerScheduler(prediction_type="v_prediction")), r"predicts -F"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_a_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Net(nn.Module):
    """A small network that depends on x, on t and on every pixel's neighbours, with fixed random weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(1, 1, 3, 3, generator=generator) / 3)

    def forward(self, x, time):
        wave = torch.sin(time.float() / 100).view(-1, 1, 1, 1)
        return torch.tanh(torch.nn.functional.conv2d(x, self.weight, padding=1)) + 0.3 * wave * x


def denoiser(schedule, target, **options):
    fields = [options.get("input", "x_t"), target, "t"]
    return Denoiser(Net(), ForwardProcess(schedule, fields=fields, target=target), target=target, **options)


def start(count, seed=0):
    index = torch.arange(count)
    return gaussian(Keys.pack(index, seed=seed, stage="predict"), (1, 8, 8), Purpose.TRAJECTORY)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("schedule", "target"),
    [
        (LinearBeta(), "epsilon"),
        (LinearBeta(), "x_0"),
        (Cosine(), "v"),
        (SigmoidBeta(), "v"),
        (ZeroTerminalSNR(ScaledLinearBeta()), "v"),
    ],
)
def test_our_sampler_and_diffusers_ddim_agree(schedule, target, clip):
    model = denoiser(schedule, target)
    theirs = to_diffusers(schedule, target, clip_sample=clip)
    theirs.set_timesteps(10)
    assert theirs.timesteps.tolist() == list(range(999, 0, -100))
    x = start(3) * schedule.alpha_sigma(schedule.ends[1][None])[1]
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(model.network(x, t.expand(3)), t, x, use_clipped_model_output=clip).prev_sample
    ours = model.sample((3, 1, 8, 8), clip=clip, times=theirs.timesteps)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


def test_our_sampler_and_diffusers_edm_euler_agree():
    model = denoiser(EDM(), "F", input="x_in", time="c_noise")
    theirs = to_diffusers(EDM(), "F")
    theirs.set_timesteps(12)
    x = start(3) * 80.0
    with torch.no_grad():
        for t in theirs.timesteps:
            scaled = theirs.scale_model_input(x, t)
            x = theirs.step(model.network(scaled, t.expand(3)), t, x).prev_sample
    torch.testing.assert_close(model.sample((3, 1, 8, 8), steps=12, clip=False), x, rtol=1e-3, atol=1e-3)


def test_an_index_into_diffusers_timesteps_turns_the_sign_of_logit_mean():
    """Its scripts for SD3 look sigma up at the index u T of timesteps that fall: the paper's 0.731 becomes 0.269."""
    u = torch.sigmoid(torch.tensor(1.0)).item()
    sigma = to_diffusers(Rectified(), "flow").sigmas[int(u * 1000)].item()
    ours = LogitNormal(-1.0).quantile(torch.tensor([0.5], dtype=torch.float64), Rectified()).item()
    assert sigma == pytest.approx(ours, abs=1e-3)
    assert ours == pytest.approx(0.269, abs=5e-4)


def test_our_sampler_and_diffusers_flow_euler_agree():
    model = denoiser(Rectified(), "flow")
    theirs = to_diffusers(Rectified(), "flow")
    theirs.set_timesteps(sigmas=torch.linspace(1, 0, 11)[:-1].tolist())
    x = start(3)
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(model.network(x, t.expand(3)), t, x).prev_sample
    torch.testing.assert_close(model.sample((3, 1, 8, 8), steps=11, clip=False), x, rtol=1e-4, atol=1e-4)


def unet(**options):
    return diffusers.UNet2DModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    )


def test_an_export_is_refused_where_a_pipeline_would_tell_the_network_another_time(tmp_path):
    def exported(schedule, target="epsilon", network=None, **options):
        fields = [options.get("input", "x_t"), target, "t"]
        process = ForwardProcess(schedule, fields=fields, target=target)
        export(Denoiser(network or unet(), process, target=target, **options), tmp_path / "out", (1, 8, 8))

    with pytest.raises(ValueError, match=r"model\.input=x_t and model\.time=unit: train it with .*model\.time=t_embed"):
        exported(LinearBeta(), time="unit")
    with pytest.raises(ValueError, match=r"model\.time=t_embed: train it with model\.input=x_t model\.time=t\."):
        exported(LinearBeta(500))
    with pytest.raises(ValueError, match=r"tells a flow network 1000 sigma"):
        exported(Shifted(Rectified(), factor=3.0), "flow")
    with pytest.raises(ValueError, match=r"model\.network must be a diffusers\.UNet2DModel"):
        exported(LinearBeta(), network=Net())
    latents = Denoiser(unet(), ForwardProcess(LinearBeta(), value_range=None))
    with pytest.raises(ValueError, match=r"process\.value_range=null, makes latents: .* the autoencoder"):
        export(latents, tmp_path / "out", (1, 8, 8))
    assert not (tmp_path / "out").exists()
    exported(LinearBeta(500), time="t")
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_a_run_is_found_by_folder_or_checkpoint_and_its_absence_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*last\.ckpt"):
        find_run(str(tmp_path))
    file = tmp_path / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    file.touch()
    with pytest.raises(FileNotFoundError, match=r"no \.hydra/config\.yaml lies beside or above it"):
        find_run(str(file))
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").touch()
    assert find_run(str(tmp_path)) == find_run(str(file)) == (tmp_path.resolve(), file)


def test_export_says_what_it_wants(capsys):
    assert main(["export", "ckpt=nowhere"]) == 1
    assert "export wants ckpt=RUN" in capsys.readouterr().err


PLAIN = """
import json, sys, torch, diffusers
pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
found = [type(pipeline).__name__, type(pipeline.scheduler).__name__]
for name in sys.argv[2:]:
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    labels = {"class_labels": [1, 2]} if pipeline.unet.config.num_class_embeds else {}
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=5, generator=generator, output_type="np", **labels).images
    assert images.shape == (2, 8, 8, 1) and images.std() > 0.05, (name, images.shape)
    found.append(name)
assert "diffaug" not in sys.modules
print(json.dumps(found))
"""


def plain(folder, *schedulers):
    """What a process that never imports diffaug makes of an exported folder."""
    (folder / "plain.py").write_text(PLAIN)
    done = server.run([sys.executable, "plain.py", str(folder), *schedulers], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "pipeline", "schedulers"),
    [
        ((), "DDPMPipeline", ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")),
        (("experiment=edm",), "ConsistencyModelPipeline", ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")),
        (("experiment=rectified_flow",), "DDPMPipeline", ("FlowMatchEulerDiscreteScheduler",)),
        (("experiment=zero_terminal_snr_v",), "DDPMPipeline", ("DDIMScheduler", "DPMSolverMultistepScheduler")),
        (("schedule=vp_sde",), "DDPMPipeline", ("DDIMScheduler", "DPMSolverMultistepScheduler")),
        (
            ("model.condition=label", "model.network.num_class_embeds=10", "process.fields=[x_t,epsilon,t,label]"),
            "ConsistencyModelPipeline",
            ("DDIMScheduler", "DPMSolverMultistepScheduler"),
        ),
    ],
    ids=("ddpm", "edm", "flow", "zero terminal SNR", "continuous", "conditional"),
)
def test_a_trained_run_is_sampled_by_plain_diffusers(overrides, pipeline, schedulers, tmp_path):
    quick = ("trainer.max_steps=3", "trainer.val_check_interval=3", "trainer.limit_val_batches=2")
    quick += ("data.batch_size=16", "~callbacks.pictures")
    job = [sys.executable, str(ROOT / "train.py"), "hydra.run.dir=run", *quick, *overrides]
    done = server.run(job, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["export", f"ckpt={tmp_path / 'run'}", f"out={tmp_path / 'out'}"]) == 0
    found = plain(tmp_path / "out", *schedulers)
    assert all(name in found for name in (pipeline, *schedulers))
    # The weights are the checkpoint's, which are the averaged ones.
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    exported = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    assert all(torch.equal(state[f"network.{name}"], value) for name, value in exported.items())
