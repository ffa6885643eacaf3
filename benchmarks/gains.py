"""What keyed noise, coverage of the times and noise of each rank's own buy a small network, and where they buy nothing.

    python benchmarks/gains.py [--fashion FOLDER] [--seeds 5] [--markdown FILE] [--picture FILE]

On scikit-learn's digits, and with FOLDER (what data.root is for data=fashion_mnist) on Fashion-MNIST too. Everything is
paired: for each seed all variants have the same initial weights and order of the data, and differ in one thing. All t
and epsilon are ForwardProcess's. Figures are losses and variances, none is a time: they do not depend on the machine's
speed, and on one machine a seed gives the same ones again.
"""

import argparse
import copy
import gzip
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gains_report import draw_picture, tell
from torch import Tensor, nn

from diffaug import Antithetic, Coverage, ForwardProcess, Independent, LinearBeta, PerImage, Sobol, Stratified, Uniform
from diffaug.order.permutation import order_keys, permute

BATCH, LATE, EPOCHS, TRUTH = 128, 20, 8, 16  # of training; epochs called late; epochs summed over; views called true
APART = 2**18  # epochs from here on measure, those below train


@dataclass(frozen=True)
class Way:
    """One way to draw the noise of a batch: a coverage of the times, and how many ranks draw alike."""

    coverage: Coverage
    alike: int = 1

    def draw(
        self, images: Tensor, index: Tensor, epoch: Tensor, position: Tensor, seed: int, key: Tensor | None = None
    ) -> Any:
        """Noise samples of any shape (*,): which image, in which epoch, at which place of the epoch's order.

        Of ranks that draw alike (place p is rank p mod ranks'), all have the t and epsilon of the first one's sample.
        """
        key = index if key is None else key
        key = key.flatten().view(-1, self.alike)[:, :1].expand(-1, self.alike).reshape(-1)
        process = ForwardProcess(LinearBeta(), Uniform(coverage=self.coverage), compile=False)
        images = images[index.flatten()]
        return process(images, key, seed=seed, epoch=epoch.flatten(), position=position.flatten())


COVERAGES = {
    "independent": Way(Independent()),
    "stratified": Way(Stratified()),
    "antithetic": Way(Antithetic()),
    "sobol": Way(Sobol()),
    "per_image": Way(PerImage()),
}
RANKS = {"2 ranks alike": Way(Independent(), 2), "8 ranks alike": Way(Independent(), 8)}
WAYS = COVERAGES | RANKS
PLAIN = ForwardProcess(LinearBeta(), compile=False)


class Denoiser(nn.Module):
    """Predict epsilon from x_t, shape (B, 1, H, W), and t: two hidden layers, and x_t itself carried past them."""

    def __init__(self, pixels: int, hidden: int = 128) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(pixels + 16, hidden), nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, pixels)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        waves = torch.cos(math.pi * (t[:, None] + 0.5) / 1000 * torch.arange(16))
        h = nn.functional.silu(self.first(torch.cat([x_t.flatten(1), waves], 1)))
        return x_t + self.last(h + nn.functional.silu(self.second(h))).view_as(x_t)


def compute_loss(network: nn.Module, x_t: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
    return (network(x_t, t) - epsilon).square().mean()


@torch.no_grad()
def validate(network: nn.Module, batch: Any) -> float:
    return compute_loss(network, *batch).item()


def place(size: int, seed: int, epoch: int, places: Tensor) -> Tensor:
    """Return which images lie at these places of the epoch's order, as a DiffusionDataModule has it."""
    return torch.from_numpy(permute(places.numpy(), size, order_keys(seed, epoch)))


def train(
    way: Way, images: Tensor, validation: Any, seed: int, epochs: int, keep: Collection[int] = (), falling: bool = False
) -> tuple[list[float], list[Denoiser]]:
    """Train for so many epochs; return the validation loss after each, and the networks after those to keep.

    The learning rate stays as it is, or falls to 0, a step down each epoch.
    """
    torch.manual_seed(seed)
    network, curve, kept = Denoiser(images[0].numel()), [], []
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    places = torch.arange(len(images) // BATCH * BATCH)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / epochs if falling else 1)
        index = place(len(images), seed, epoch, places)
        noisy = way.draw(images, index, torch.full_like(index, epoch), places, seed)
        for batch in zip(*(field.split(BATCH) for field in noisy), strict=True):
            optimizer.zero_grad()
            compute_loss(network, *batch).backward()
            optimizer.step()
        curve.append(validate(network, validation))
        if epoch in keep:
            kept.append(copy.deepcopy(network))
    return curve, kept


def draw_fresh(images: Tensor, seed: int, epoch: int) -> Any:
    """Noise a validation set as randn and randint in validation_step do: anew each epoch."""
    return PLAIN(images, torch.arange(len(images)), seed=seed, epoch=epoch, dataset=1)


def draw_fixed(images: Tensor, seed: int, view: int = 0) -> Any:
    return PLAIN(images, torch.arange(len(images)), seed=seed, stage="val", view=view)


def compare_validation(late: list[Denoiser], images: Tensor, seed: int, repeats: int) -> dict[str, Any]:
    """Compare validation with fixed and with fresh noise, over the last epochs and of one frozen network."""
    fixed = draw_fixed(images, seed)
    assert all(torch.equal(a, b) for a, b in zip(fixed, draw_fixed(images, seed), strict=True))
    many = [draw_fixed(images, seed, view) for view in range(1, TRUTH + 1)]
    loss = {
        "fixed": [validate(network, fixed) for network in late],
        "fresh": [validate(network, draw_fresh(images, seed, epoch)) for epoch, network in enumerate(late)],
        "true": [statistics.fmean(validate(network, batch) for batch in many) for network in late],
    }
    change = {name: np.diff(values) for name, values in loss.items()}
    again = range(APART, APART + repeats)
    out: dict[str, Any] = {f"spread {name}": values.std(ddof=1) for name, values in change.items()}
    out |= {f"sign {name}": float((change[name] * change["true"] > 0).mean()) for name in ("fixed", "fresh")}
    out["frozen fresh"] = statistics.stdev(validate(late[-1], draw_fresh(images, seed, epoch)) for epoch in again)
    out["frozen level"] = statistics.stdev(validate(late[-1], draw_fixed(images, other)) for other in again)
    # Of two validations each adds its own noise to a change; 1.05^2 - 1 of the variance is 5 % of the spread.
    one = len(images) * out["frozen fresh"] ** 2
    out["images"] = 2 * one / ((1.05**2 - 1) * out["spread fixed"] ** 2)
    return out | {"loss": loss["true"][-1], "validations": loss}


def compute_gradient(network: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, float]:
    loss = compute_loss(network, *batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]), loss.item()


def measure(network: nn.Module, noisy: Any, repeats: int) -> tuple[float, float]:
    """Return the trace of the covariance of the gradient over the batches, and the variance of the loss."""
    total, squares, losses = torch.zeros(()), 0.0, []
    for batch in zip(*(field.chunk(repeats) for field in noisy), strict=True):
        gradient, loss = compute_gradient(network, batch)
        total, squares = total + gradient.double(), squares + gradient.double().square().sum().item()
        losses.append(loss)
    return (squares - total.square().sum().item() / repeats) / (repeats - 1), statistics.variance(losses)


def measure_batches(
    network: nn.Module, ways: dict[str, Way], images: Tensor, size: int, repeats: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Measure over batches of so many samples, each of an epoch of its own, as training would draw them."""
    number = torch.arange(repeats)[:, None]
    position = number % (len(images) // size) * size + torch.arange(size)
    index = torch.stack([place(len(images), seed, APART + r, places) for r, places in enumerate(position)])
    epoch = (APART + number).expand_as(index)
    return {
        name: measure(network, way.draw(images, index, epoch, position, seed), repeats) for name, way in ways.items()
    }


def measure_epochs(network: nn.Module, images: Tensor, repeats: int, seed: int) -> dict[str, tuple[float, float]]:
    """Measure over sums of 8 consecutive epochs of 64 images, always the same: what is left is t and epsilon.

    Each repeat has epochs and sample indices of its own, so that it is a new draw for every coverage.
    """
    epoch = (APART + torch.arange(EPOCHS * repeats)[:, None]).expand(-1, 64)
    position = torch.arange(64).expand_as(epoch)
    index = torch.stack([place(64, seed, APART + e, places) for e, places in enumerate(position)])
    key = index + (epoch - APART) // EPOCHS * 64
    return {
        name: measure(network, way.draw(images, index, epoch, position, seed, key), repeats)
        for name, way in COVERAGES.items()
    }


def measure_mean(network: nn.Module, images: Tensor, seed: int) -> float:
    """Return the squared norm of the mean gradient, without bias: the product of two independent estimates."""
    index, halves = torch.arange(len(images)), []
    for half in (1, 2):
        draws = (
            COVERAGES["sobol"].draw(images, index, index * 0 + half * 2 * APART - 1 - r, index, seed) for r in range(8)
        )
        halves.append(sum(compute_gradient(network, noisy)[0].double() for noisy in draws) / 8)
    return float(halves[0] @ halves[1])


def run_seed(images: Tensor, validation: Tensor, seed: int, steps: int, repeats: int) -> dict[Any, Any]:
    """Everything for one seed: numbers and curves by name."""
    epochs = max(3, round(steps / (len(images) // BATCH)))
    early = max(1, epochs // 20)
    keep = {early - 1, *range(max(0, epochs - LATE - 1), epochs)}
    out: dict[Any, Any] = {"epochs": epochs, "early": early}
    kept: list[Denoiser] = []
    fixed = draw_fixed(validation, seed)
    for name, way in WAYS.items():
        curve, networks = train(way, images, fixed, seed, epochs, keep)
        kept = kept or networks  # those of the first, independent
        out["curve", name] = curve
        if name == "independent" or name in RANKS:
            out["falling", name] = train(way, images, fixed, seed, epochs, falling=True)[0]
    out |= compare_validation(kept[-LATE - 1 :], validation, seed, repeats)
    for when, network in (("early", kept[0]), ("late", kept[-1])):
        out["mean", when] = measure_mean(network, images, seed)
        for size in (32, BATCH):
            out[when, size] = measure_batches(network, WAYS, images, size, repeats, seed)
        out[when, "epochs"] = measure_epochs(network, images, max(3, repeats // 2), seed)
    return out


def load(fashion: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Load uint8 images, (N, 1, H, W), to train and to validate on."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    digits = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]
    digits = digits[place(len(digits), 0, 0, torch.arange(len(digits)))]
    data = {"digits": (digits[360:], digits[:360])}
    if fashion:
        both = []
        for part, many in (("train", 10_000), ("t10k", 1_000)):
            packed = (fashion / "FashionMNIST" / "raw" / f"{part}-images-idx3-ubyte.gz").read_bytes()
            whole = torch.from_numpy(
                np.frombuffer(gzip.decompress(packed), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:many].copy()
            )
            both.append(nn.functional.avg_pool2d(whole.float(), 2).round().to(torch.uint8))
        data["Fashion-MNIST"] = (both[0], both[1])
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, help="also Fashion-MNIST, from this folder")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--repeats", type=int, default=200, help="draws of each variance")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--picture", type=Path, help="draw the picture here")
    options = parser.parse_args()
    data = load(options.fashion)
    results: dict[str, list[Any]] = {name: [] for name in data}
    for name, (images, validation) in data.items():
        for seed in range(options.seeds):
            print(f"{name}, seed {seed}", flush=True)
            results[name].append(run_seed(images, validation, seed, options.steps, options.repeats))
    lines = [
        f"{options.seeds} seeds, {options.steps} steps, mean ± standard error over the seeds; torch {torch.__version__}"
    ]
    lines += [f"{name}: {len(x)} images, {len(y)} to validate" for name, (x, y) in data.items()]
    lines += tell(results, COVERAGES, RANKS)
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    if options.picture:
        draw_picture(results, list(WAYS), list(RANKS), options.picture)


if __name__ == "__main__":
    main()
