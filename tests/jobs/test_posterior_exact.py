"""A draw of the posterior is an image's at a visit: whatever the ranks, workers, batches, views' order or a resume.

What is compared is x_t, bit for bit, which is of z: from a live encoder, and from a store of its moments.
"""

from pathlib import Path

import pytest
import recorded
import torch
from recordings import first_views, run, same, triples
from shared import trainer

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.commands.encode import encode
from diffaug.pytorch_lightning import Encoding
from diffaug.store import shards


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several shards."""
    out = tmp_path_factory.mktemp("moments") / "store"
    data = DiffusionDataModule(
        recorded.images(75, 0),
        [recorded.images(10, 1), recorded.images(10, 1)],
        process=ForwardProcess(LinearBeta()),
        encoder=recorded.Spread(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_LEAST_BYTES", 500)
        encode(data, str(out), trainer(), Encoding)
    assert len(list(out.glob("train/mean-*.npy"))) > 3
    return out


@pytest.mark.slow
@pytest.mark.parametrize("source", ["live", "store"])
def test_z_does_not_depend_on_ranks_workers_or_a_resume(source, moments, tmp_path):
    options = {"encoder": True} if source == "live" else {"store": str(moments)}
    recorded.main(str(tmp_path / "one"), options)
    single = triples(tmp_path / "one")
    assert {key[:2] for key in single} == {(epoch, index) for epoch in range(3) for index in range(75)}
    # The same image at the same epoch and another view, or at another epoch, has another z.
    z = [_z(single[epoch, 7, 0]) for epoch in range(3)]
    assert not torch.allclose(z[0], z[1])
    assert not torch.allclose(z[1], z[2])
    recorded.main(str(tmp_path / "workers"), {"num_workers": 2, "batch_size": 7, **options})
    assert same(triples(tmp_path / "workers"), single)
    run(tmp_path / "ranks", devices=2, batch_size=4, num_workers=1, **options)
    assert same(first_views(triples(tmp_path / "ranks")), single)
    run(tmp_path / "killed", expect=None, kill_at=13, **options)
    resumed = {"ckpt_path": str(tmp_path / "killed" / "last.ckpt"), "num_workers": 1}
    recorded.main(str(tmp_path / "after"), {**resumed, **options})
    after = triples(tmp_path / "after")
    assert len(after) < len(single)
    assert same(after, {key: single[key] for key in after})
    assert {**triples(tmp_path / "killed"), **after}.keys() == single.keys()


def _z(triple: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x_t, epsilon, t = triple
    alpha, sigma = LinearBeta().alpha_sigma(t[None])
    return (x_t - sigma * epsilon) / alpha
