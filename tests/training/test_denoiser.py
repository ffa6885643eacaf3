"""Denoiser: what it tells its network is finite, and a loss that is not ends the run."""

import math

import pytest
import shared
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from shared import schedule_of
from tiny import run_code
from torch import nn
from torch.utils.data import TensorDataset

from diffaug import (
    VPSDE,
    ContextParts,
    DiffusionDataModule,
    ForwardProcess,
    FusedSNR,
    IndependentParts,
    LinearBeta,
    Parts,
    Rectified,
    SharedParts,
    Trigonometric,
    Uniform,
)
from diffaug.commands.export import load_weights
from diffaug.pytorch_lightning import Denoiser, LastCheckpoint, LossByLevel
from diffaug.targets import NUMBER_FIELDS
from diffaug.times import Fixed
from diffaug.training.causal_frames import CausalFrames


class Net(nn.Module):
    """A scale times the image, plus what it is told of time; nan from its call number ``fails`` on.

    Arguments:
        fails: None never fails.
        value: in place of nan.
    """

    def __init__(self, fails: int | None = None, value: float = math.nan) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.fails, self.value, self.calls = fails, value, 0

    def forward(self, x, time):
        self.calls += 1
        out = self.scale * x + 0.01 * time.view(-1, 1, 1, 1)
        return out + self.value if self.fails is not None and self.calls > self.fails else out


def data(under=LinearBeta(), target="epsilon", count=40, **options):  # noqa: B008 - frozen
    images = torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    process = ForwardProcess(under, fields=("x_t", target, "t"), target=target, compile=False, **options)
    dataset = TensorDataset(images)
    return DiffusionDataModule(train=dataset, val=dataset, process=process, seed=0, batch_size=4)


def trainer(*callbacks, **options):
    length = {"max_epochs": -1, "max_steps": 12, "val_check_interval": 6, "check_val_every_n_epoch": None}
    return shared.trainer(callbacks=list(callbacks), **{**length, **options})


def test_every_number_that_a_network_is_told_is_finite(schedule):
    """At every time that may be drawn, at both ends, and beside them."""
    for name, field in NUMBER_FIELDS.items():
        assert field(schedule, shared.times(schedule, 101)).isfinite().all(), name


def test_levels_beyond_what_float32_tells_apart_are_held():
    zero, t = schedule_of("zero_terminal_snr"), torch.tensor([997, 998, 999])
    assert zero.log_snr(t)[2] == -math.inf  # the schedule itself says what is so
    told = NUMBER_FIELDS["log_snr"](zero, t)
    assert torch.equal(told[:2], zero.log_snr(t[:2]))
    assert told[2].item() == pytest.approx(-48 * math.log(2))
    c_noise = NUMBER_FIELDS["c_noise"](zero, t).tolist()
    assert c_noise == sorted(set(c_noise))  # the last step has a number of its own
    assert c_noise[2] == pytest.approx(6 * math.log(2))
    # The bound is where the signal is lost in the rounding of x_t, and where Rectified's float32 time ends.
    last = torch.nextafter(torch.ones(1), torch.zeros(1))
    assert Rectified().log_snr(last, torch.float64).item() == pytest.approx(-48 * math.log(2), rel=1e-7)
    x_t = torch.tensor(1.0) + torch.tensor(2.0**-24)
    assert x_t == 1


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("time", ["c_noise", "log_snr"])
@pytest.mark.parametrize("under", [Rectified(), Trigonometric(), schedule_of("zero_terminal_snr")], ids=repr)
def test_training_and_sampling_stay_finite_where_alpha_is_0(under, time):
    process = ForwardProcess(under, fields=("x_t", "v", "t"), target="v", compile=False)
    model = Denoiser(Net(), process, time=time, target="v")
    end = Uniform(coverage=Fixed(at=1 - 2.0**-53))
    batch = process(torch.zeros(2, 1, 4, 4), torch.arange(2), times=end)
    assert batch.t[0] >= 0.999 * under.range[1]
    assert model.training_step(batch, 0)["loss"].isfinite()
    assert model.sample((2, 1, 4, 4), steps=7, clip=False).isfinite().all()


def test_sampling_skips_times_that_float32_cannot_divide_by():
    """alpha is 3.6e-44 at the end of this schedule: no 0, but 1 / alpha is infinite in float32."""
    under = VPSDE(0.1, 400.0)
    assert 0 < under.alpha_sigma(torch.ones(1))[0] < 1e-40
    model = Denoiser(Net(), data(under).process)
    assert model.sample((2, 1, 4, 4), steps=50).isfinite().all()
    assert 0 < model.network.calls < 50


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(value, tmp_path):
    """It says which step, at the next look; and no checkpoint is written after it."""
    model = Denoiser(Net(fails=3, value=value), (module := data()).process)
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    message = rf"train_loss is {value} at step 3, so the run ends.*model\.optimizer\.lr.*bf16-mixed.*preview.*debug"
    with pytest.raises(FloatingPointError, match=message):
        trainer(saved, log_every_n_steps=50, num_sanity_val_steps=0, enable_checkpointing=True).fit(model, module)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"log_every_n_steps": 4}, 4),  # at an interval of logging
        ({"log_every_n_steps": 0}, 6),  # before a validation
        ({"log_every_n_steps": 0, "limit_val_batches": 0}, 10),  # at an epoch's end
    ],
)
def test_it_is_looked_at_now_and_then(options, calls):
    model = Denoiser(Net(fails=2), (module := data()).process)
    with pytest.raises(FloatingPointError, match="train_loss is nan at step 2"):
        trainer(num_sanity_val_steps=0, **options).fit(model, module)
    assert model.network.calls == calls


def test_a_validation_loss_that_is_not_finite_ends_the_run_too(tmp_path):
    model = Denoiser(Net(fails=6), (module := data()).process)
    last = LastCheckpoint(str(tmp_path))
    with pytest.raises(FloatingPointError, match="val_loss is nan at step 6"):
        trainer(last, num_sanity_val_steps=0, enable_checkpointing=True).fit(model, module)
    assert not (tmp_path / "last.ckpt").exists()
    model = Denoiser(Net(fails=0), module.process)
    with pytest.raises(FloatingPointError, match="val_loss is nan at step 0"):
        trainer().fit(model, module)
    assert model.network.calls == 2  # within the sanity check, before any training


def test_no_step_waits_for_the_watch(monkeypatch):
    """Between two looks nothing of the loss is brought to the host."""
    model = Denoiser(Net(), (module := data()).process)
    looked = []
    check = model._check_finite
    monkeypatch.setattr(model, "_check_finite", lambda name: looked.append(model.network.calls) or check(name))
    options = {"log_every_n_steps": 5, "limit_val_batches": 0, "max_steps": 10}
    trainer(**options).fit(model, module)
    assert looked == [5, 10, 10]


RANKS = """
import torch, test_denoiser as own
class Odd(own.Net):
    def forward(self, x, time):
        out = super().forward(x, time)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return out + float("nan") if rank == 1 and self.calls == 3 else out
module = own.data()
run = own.trainer(devices=2, strategy="ddp", log_every_n_steps=3, num_sanity_val_steps=0)
run.fit(own.Denoiser(Odd(), module.process), module)
"""


@pytest.mark.slow
def test_all_ranks_end_where_one_has_no_finite_loss(tmp_path):
    done = run_code(tmp_path, RANKS)
    assert done.returncode != 0
    assert "train_loss is not finite on another rank" in done.stderr
    assert "train_loss is nan at step 2" in done.stderr


def test_samples_of_latents_are_not_clipped():
    images, latents = (
        Denoiser(Net(), ForwardProcess(Rectified(), fields=("x_t", "flow", "t"), value_range=span), target="flow")
        for span in ((-1, 1), None)
    )
    assert images.sample((4, 1, 4, 4), steps=5).abs().max() <= 1
    assert latents.sample((4, 1, 4, 4), steps=5).abs().max() > 1
    assert latents.sample((4, 1, 4, 4), steps=5, clip=True).abs().max() <= 1


def test_latents_of_an_encoder_are_not_clipped(tmp_path):
    """Nor where the weights are loaded into another model, without the DataModule."""

    def largest(model):
        model.network.scale.data.fill_(0.1)
        return model.sample((4, 1, 4, 4), steps=5).abs().max()

    module = data()
    module._noiser.encoder = nn.Identity()
    model = Denoiser(Net(), module.process)
    assert largest(model) <= 1, "as far as it knows"
    run = trainer(max_steps=2)
    run.fit(model, module)
    assert largest(model) > 1
    run.save_checkpoint(tmp_path / "a.ckpt")
    options = {"network": Net(), "process": module.process, "weights_only": True}
    assert largest(Denoiser.load_from_checkpoint(tmp_path / "a.ckpt", **options)) > 1
    exported = Denoiser(Net(), module.process)
    load_weights(exported, tmp_path / "a.ckpt")
    assert exported.latents, "which an export refuses"


@pytest.mark.parametrize(
    ("classes", "condition", "message"),
    [
        (None, "label", r"UNet2DModel has no embedding of classes: set model\.network\.num_class_embeds to how many"),
        (10, None, r"num_class_embeds=10 makes a network of labels, but .* set model\.condition=label"),
        (10, "label", None),
        (None, None, None),
    ],
)
def test_a_network_of_labels_is_given_labels_and_no_other(classes, condition, message):
    diffusers = pytest.importorskip("diffusers")
    shape = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = diffusers.UNet2DModel(**shape, layers_per_block=1, norm_num_groups=4, num_class_embeds=classes)
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "label"))
    if message is None:
        Denoiser(network, process, condition=condition)
    else:
        with pytest.raises(ValueError, match=message):
            Denoiser(network, process, condition=condition)


def test_images_that_a_network_cannot_halve():
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=4,
    )
    model = Denoiser(network, ForwardProcess(LinearBeta(), compile=False))
    fine = model.sample((1, 1, 12, 12), steps=1)
    assert fine.shape == (1, 1, 12, 12)
    with pytest.raises(
        ValueError,
        match=r"UNet2DModel of 3 levels, needs images whose sides are multiples of 4, but these are of shape "
        r"\(1, 12, 14\)\. Set data\.image_size",
    ):
        model.sample((1, 1, 12, 14), steps=1)

    class Broken(nn.Module):
        def forward(self, x, time):
            raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match=r"^of another kind$"):
        Denoiser(Broken(), ForwardProcess(LinearBeta(), compile=False)).sample((1, 1, 3, 3), steps=1)


@pytest.mark.parametrize(("lengths", "steps"), [({"max_steps": 0}, "0"), ({"max_steps": -1, "max_epochs": -1}, "inf")])
def test_a_schedule_of_rates_needs_a_number_of_steps(lengths, steps):
    def make(optimizer, total_steps):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps)

    module = data()
    with pytest.raises(
        ValueError, match=rf"needs the number of steps, at least 1, but trainer\.max_steps=.* make it {steps}: set one"
    ):
        trainer(**lengths).fit(Denoiser(Net(), module.process, lr_scheduler=make), module)


@pytest.mark.parametrize("rate", [-1, "abc"])
def test_an_optimizer_that_cannot_be_made_names_its_key(rate):
    module = data()
    model = Denoiser(Net(), module.process, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate))
    with pytest.raises(ValueError, match=r"^model\.optimizer cannot be made: .* \((Value|Type)Error\)$"):
        trainer().fit(model, module)
    with pytest.raises(ValueError, match=r"steps must be a whole number >= 1, but got 0"):
        model.sample((1, 1, 4, 4), steps=0)


class Frames(Net):
    """The same of clips, told each frame's time."""

    def forward(self, x, time):
        return self.scale * x + 0.01 * time[..., None, None, None]


def of_clips(law, *fields, network=None, **options):
    process = ForwardProcess(
        LinearBeta(), parts=Parts(1, law=law), fields=("x_t", "epsilon", "t", *fields), compile=False, **options
    )
    clips = torch.randint(0, 256, (12, 5, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = DiffusionDataModule(train=TensorDataset(clips), process=process, seed=0, batch_size=4)
    return Denoiser(network or Frames(), process), data


@pytest.mark.parametrize("law", [IndependentParts(), ContextParts(2), SharedParts(1.0)], ids=repr)
def test_the_loss_weighs_each_part_and_leaves_context_out(law):
    fields = ("part_mask",) if law.context else ()
    model, data = of_clips(law, *fields, weight=FusedSNR())
    model.log = lambda *args, **options: None
    model._trainer, k = shared.trainer(), law.context
    data.setup("fit")
    batch = data.noise(next(iter(data.train_dataloader())))
    with torch.no_grad():
        out = model.training_step(batch, 0)
        square = (model(batch.x_t, batch.t.float()) - batch.epsilon).square().mean((2, 3, 4))
    weight = FusedSNR().of(LinearBeta(), "epsilon", batch.t)
    torch.testing.assert_close(out["loss"], (weight * square)[:, k:].mean())
    assert out["errors"].shape == out["weights"].shape == out["t"].shape == (20,)
    torch.testing.assert_close(out["errors"].view(4, 5)[:, k:], square[:, k:])
    if k:
        assert torch.equal(out["mask"].view(4, 5), batch.part_mask)
        assert (out["t"] >= 0).all()
        assert (out["weights"].view(4, 5)[:, :k] == 0).all()
        with torch.no_grad():
            x_t = batch.x_t.clone()
            x_t[:, :k] += 100  # what a network makes of context is not its loss
            other = model.validation_step(batch._replace(x_t=x_t), 0)
        torch.testing.assert_close(other["loss"], square[:, k:].mean())


def test_a_network_of_parts_is_trained_and_sampled(tmp_path):
    model, data = of_clips(ContextParts(1), "part_mask")
    levels = LossByLevel(str(tmp_path))
    trainer(levels, max_steps=6, limit_val_batches=0, val_check_interval=None).fit(model, data)
    counted = sum(row[5] for row in levels.rows if row[0] == "train")
    assert counted == 6 * 4 * 4  # steps, clips, frames that are to be learned
    assert model.sample((2, 5, 1, 4, 4), steps=3).isfinite().all()


def test_what_does_not_go_with_parts_is_refused():
    class UNet2DModel(Net):
        pass

    with pytest.raises(ValueError, match=r"process\.parts gives .* UNet2DModel takes one time .*model=causal_frames"):
        of_clips(IndependentParts(), network=UNet2DModel())
    with pytest.raises(ValueError, match=r"needs part_mask in process\.fields, which is \['x_t', 'epsilon', 't'\]"):
        of_clips(ContextParts(1))


def test_a_causal_network_sees_no_later_frame():
    network = CausalFrames(channels=2, width=8, depth=2)
    x, time = torch.randn(2, 6, 2, 5, 5), torch.rand(2, 6) * 1000
    out = network(x, time)
    assert out.shape == x.shape
    x[:, 4:], time[:, 4:] = 0, 0
    torch.testing.assert_close(network(x, time)[:, :4], out[:, :4])
    assert not torch.allclose(network(x, time)[:, 4:], out[:, 4:])
    for images, times in ((x, time[:, :3]), (x, time[:, 0]), (x[:, 0], time[:, :2])):
        with pytest.raises(ValueError, match=r"takes clips .* got images of shape .*: set process\.parts\.axis=1"):
            network(images, times)
