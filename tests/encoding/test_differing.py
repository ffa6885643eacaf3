"""A store of rows whose shapes differ: embeddings of their own lengths, and images in buckets, without padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recorded import Spread
from shared import assert_alike, contents, save_picture, seen, write
from torch.utils.data import Dataset

from diffaug import Buckets, DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.pytorch_lightning import image_folder, store
from diffaug.store.layout import shape_of
from diffaug.store.reader import Store

FIELDS = ("x_t", "epsilon", "t", "index", "view")


class Told(Dataset[Any]):
    """Images with an embedding of a text, of 0 to 6 words."""

    def __init__(self, count: int = 50) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        words = torch.arange(i * 4.0, i * 4.0 + (i % 7) * 4).view(-1, 4).half()
        return {"image": torch.full((3, 8, 8), i, dtype=torch.uint8), "words": words}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_embeddings_keep_their_lengths(tmp_path, workers):
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "index", "words"), compile=False)
    told = Told()
    out = write(DiffusionDataModule(told, process=process, image_key="image"), tmp_path / "made", differ=["words"])
    assert len(list((out / "train").glob("words-*.shapes.npy"))) > 1
    flat = [np.load(out / "train" / f"words-0000{shard}.npy") for shard in range(2)]
    assert all(one.dtype == np.float16 and one.ndim == 1 for one in flat)
    assert np.load(out / "train" / "words-00000.shapes.npy").tolist()[:3] == [[0, 4], [1, 4], [2, 4]]
    got = Store(str(out))
    for i in (0, 49, 7, -1):
        assert torch.equal(got[i]["words"], told[i % 50]["words"])
        assert got[i]["words"].dtype == torch.float16
    data = store(root=str(out), process=process, batch_size=8, num_workers=workers)
    for batch in seen(data)["train"]:
        assert [len(words) for words in batch.words] == [int(i) % 7 for i in batch.index]
        assert all(torch.equal(words, told[int(i)]["words"]) for words, i in zip(batch.words, batch.index, strict=True))
    path = out / "train" / "words-00001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"words-00001\.npy is cut short or not whole"):
        Store(str(out))


def test_lengths_that_were_not_said_to_differ_are_refused(tmp_path):
    process = ForwardProcess(LinearBeta(), compile=False)
    data = DiffusionDataModule(Told(), process=process, image_key="image")
    with pytest.raises(ValueError, match=r"words of train.* say that its shape differs: differ=NAME"):
        write(data, tmp_path / "made")
    with pytest.raises(ValueError, match=r"each of differ must be one of .*'words'.*, but got 'word'"):
        write(data, tmp_path / "made", differ=["word"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(60):
        save_picture(tmp_path / "photos" / f"{i:02}.png", i, ((40, 40), (30, 60), (60, 30))[i % 3])
    return tmp_path / "photos"


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [None, Spread()], ids=("images", "latents"))
def test_a_store_of_buckets_gives_the_very_batches_of_its_folder(encoder, photos, tmp_path):
    process = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False)
    options = {"process": process, "seed": 3, "batch_size": 4}
    buckets = {"root": str(photos), "image_size": None, "buckets": Buckets(area=1024, step=8), "val_share": 0.2}
    out = write(image_folder(**buckets, **options, encoder=encoder), tmp_path / "made")
    folder = {}
    if encoder is not None:
        options["process"] = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False, value_range=None)
    ours = store(root=str(out), image_shape=shape_of(str(out)), **options)  # as configs/data/store.yaml does
    assert shape_of(str(out)) == [3, None, None]
    if encoder is not None:
        folder["latent_stats"] = ours._noiser.posterior.stats
        options["process"] = process
    theirs = image_folder(**buckets, **options, encoder=encoder, **folder)
    a, b = seen(theirs), seen(ours)
    for stage in ("train", "val"):
        assert len({batch.x_t.shape[1:] for batch in a[stage]}) > 1
        assert_alike(a[stage], b[stage])
    assert ours.images("train").dataset.bucket_shapes == tuple(theirs.images("train").dataset.bucket_shapes)
    held = ours.images("train").dataset
    part = held.only([4, 0, 3])
    assert [part[i]["image"].shape for i in range(3)] == [held[i]["image"].shape for i in (4, 0, 3)]
    assert [part.bucket_shapes[b] for b in part.bucket_of] == [held.bucket_shapes[held.bucket_of[i]] for i in (4, 0, 3)]
    assert part.sizes.tolist() == held.sizes[[4, 0, 3]].tolist()
    Image.fromarray(np.zeros((60, 30, 3), np.uint8)).save(photos / "10a.png")
    write(image_folder(**buckets, **options, encoder=encoder), out, update=True)
    whole = contents(write(image_folder(**buckets, **options, encoder=encoder), tmp_path / "anew"))
    assert contents(out) == whole


def test_pixels_lie_beside_their_latents(tmp_path):
    """As they were encoded, whatever the variant; a batch has them by their name."""
    picture = torch.randint(0, 256, (30, 1, 4, 6), dtype=torch.uint8)
    fields = ("x_t", "epsilon", "x_0", "index", "pixels")
    process = ForwardProcess(LinearBeta(), compile=False)
    data = DiffusionDataModule(torch.utils.data.TensorDataset(picture), process=process, encoder=Spread(), seed=0)
    out = write(data, tmp_path / "both", pixels=True, variants=("identity", "hflip"))
    read = ForwardProcess(LinearBeta(), fields=fields, value_range=None, compile=False, sigma_data=1)
    options = {"posterior": "mean", "latent_stats": {"mean": [0.0], "std": [1.0]}, "batch_size": 10}
    stored = store(root=str(out), process=read, **options)
    flipped = 0
    for _, _, x_0, index, pixels in seen(stored, 1)["train"]:
        assert pixels.dtype == torch.uint8
        assert torch.allclose(x_0, Spread()(pixels / 127.5 - 1).mean, atol=1e-6)
        same = (pixels == picture[index]).flatten(1).all(1)
        assert torch.equal(pixels[~same], picture[index][~same].flip(-1))
        flipped += int((~same).sum())
    assert 0 < flipped < 30
    images = image_folder(root=str(tmp_path), image_size=4, process=process)
    with pytest.raises(ValueError, match=r"pixels=true keeps images .*, but there is no data\.encoder"):
        write(images, tmp_path / "none", pixels=True)
    with pytest.raises(ValueError, match=r"dtype=float16 is of latents, but there is no data\.encoder .* Leave it out"):
        write(images, tmp_path / "none", dtype="float16")
