"""encode update=true: only what is new or changed is made, and the store is the one that is made anew."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server
import torch
from recorded import Spread
from shared import ROOT, contents, save_picture, write
from tiny import environment

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.__main__ import main
from diffaug.datasets.folder import ImageFolder
from diffaug.encoding import update
from diffaug.pytorch_lightning import image_folder
from diffaug.store import shards
from diffaug.store.reader import Store

PROCESS = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "label"), compile=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(40):
        save_picture(tmp_path / "photos" / "ab"[i % 2] / f"{i:02}.png", i)
    return tmp_path / "photos"


def change(photos: Path) -> None:
    """One file added, in the middle; one replaced; one removed."""
    save_picture(photos / "a" / "00a.png", 100)
    save_picture(photos / "a" / "04.png", 101)
    (photos / "b" / "31.png").unlink()


def data(photos: Path, **options: Any) -> DiffusionDataModule:
    return image_folder(
        **{"root": str(photos), "image_size": 16, "process": PROCESS, "seed": 3, "batch_size": 4, **options}
    )


def shifted(image: torch.Tensor) -> torch.Tensor:
    return image.roll(int(torch.randint(16, ())), -1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "dtype", "variants"),
    [
        (None, "float32", ["identity"]),
        (Spread(), "float32", ["identity", "hflip"]),
        (Spread(), "float16", ["hflip"]),
        (Spread(), "float32", 3),
    ],
    ids=("images", "latents, flips", "float16", "draws"),
)
def test_an_updated_store_is_the_one_made_anew(encoder, dtype, variants, photos, tmp_path, monkeypatch):
    for module in ("fingerprint", "update"):
        monkeypatch.setattr(f"diffaug.encoding.{module}.LOOKED_AT", 1)
    options = {"dtype": dtype, "variants": variants}
    moved = {"transform": shifted if variants == 3 else None}
    out = write(data(photos, encoder=encoder, **moved), tmp_path / "made", **options)
    change(photos)
    read: list[str] = []
    before = ImageFolder._read
    monkeypatch.setattr(ImageFolder, "_read", lambda self, i: (read.append(self.paths[i]), before(self, i))[1])
    write(data(photos, encoder=encoder, **moved), out, update=True, **options)
    rows = [path for path in read if path.endswith(("00a.png", "a/04.png"))]
    assert set(map(os.path.basename, rows)) == {"00a.png", "04.png"}
    assert len(set(read)) <= 6  # and the few that are looked at
    whole = contents(write(data(photos, encoder=encoder, **moved), tmp_path / "anew", **options))
    there = contents(out)
    if dtype == "float16":  # what is summed up of rounded rows is not what it was before
        differ = {name for name in whole if whole[name] != there.get(name)}
        assert all("sums" in name or name == "store.json" for name in differ)
        ours, theirs = (json.loads(made["store.json"])["latents"] for made in (there, whole))
        assert np.allclose(ours["mean"] + ours["std"], theirs["mean"] + theirs["std"], rtol=1e-4, atol=1e-4)
        assert set(there) == set(whole)
    else:
        assert there == whole


@pytest.mark.slow
def test_two_ranks_update_a_store_to_the_one_made_anew(photos, tmp_path):
    def words(name: str) -> list[str]:
        words = ["encode", "data=image_folder", f"data.root={photos}", "data.image_size=16", f"out={tmp_path / name}"]
        return [*words, "data.encoder={_target_:recorded.Spread}", "data.batch_size=4", "data.num_workers=0"]

    assert main([*words("made"), "trainer=cpu"]) == 0
    old = (tmp_path / "made" / "store.json").read_bytes()
    change(photos)
    command = [sys.executable, str(ROOT / "tests/jobs/small_shards.py"), *words("made"), "update=true"]
    ranks = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    done = server.run([*command, *ranks], ROOT, {**environment(tmp_path), "KILL": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" copied from before") == 1
    assert main([*words("anew"), "trainer=cpu"]) == 0
    assert contents(tmp_path / "made") == contents(tmp_path / "anew")
    assert (tmp_path / "made" / "store.json").read_bytes() != old


def test_what_has_changed_is_named(photos, tmp_path):
    out = write(data(photos, val_share=0), tmp_path / "made")
    change(photos)
    for name in ("01", "03", "05", "07"):
        save_picture(photos / "b" / f"{name}.png", 5)
    with pytest.raises(ValueError, match=r"was made from something else") as raised:
        write(data(photos, val_share=0), out)
    assert "\n  train, new: a/00a.png\n" in str(raised.value)
    assert "\n  train, changed: a/04.png, b/01.png, b/03.png and 2 more\n" in str(raised.value)
    assert "\n  train, gone: b/31.png\n" in str(raised.value)
    assert "update=true makes the rows of files that have changed" in str(raised.value)
    lines = (out / "train" / "files.jsonl").read_text().splitlines()
    assert len(lines) == 40
    assert json.loads(lines[0])[:2] == ["a/00.png", (photos / "a" / "00.png").stat().st_size]


def less(by: int) -> Any:
    """Two transforms that look alike from outside."""
    return lambda image: image.clamp(min=by) - by


def test_what_is_no_change_of_files_is_refused(photos, tmp_path):
    out = write(data(photos, transform=less(1)), tmp_path / "made")
    before = contents(out)
    change(photos)
    with pytest.raises(ValueError, match=r"update=true takes other files, but .*\n  train\.image_size: 16 -> 8\n"):
        write(data(photos, image_size=8, transform=less(1)), out, update=True)
    pattern = r"image of data\.train\[\d+\] is not what the store holds, made again"
    with pytest.raises(ValueError, match=pattern):
        write(data(photos, transform=less(2)), out, update=True)
    save_picture(photos / "aa" / "new.png", 1)  # a class in the middle: the labels of others move
    with pytest.raises(ValueError, match=r"\n  train\.classes: "):
        write(data(photos, transform=less(1)), out, update=True)
    assert contents(out) == before
    images = torch.utils.data.TensorDataset(torch.zeros(4, 1, 2, 2, dtype=torch.uint8))
    process = ForwardProcess(LinearBeta(), compile=False)
    plain = write(DiffusionDataModule(images, process=process), tmp_path / "plain")
    more = torch.utils.data.TensorDataset(torch.zeros(5, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"update=true goes by files, of which data\.train names none"):
        write(DiffusionDataModule(more, process=process), plain, update=True)


def test_an_interrupted_update_goes_on(photos, tmp_path, monkeypatch):
    """While rows are made; and while the new splits are moved to their places."""
    out = write(data(photos), tmp_path / "made")
    old = contents(out)
    change(photos)
    whole = contents(write(data(photos), tmp_path / "anew"))

    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("the plug is pulled")

    with monkeypatch.context() as patch:
        write_shard, count = shards.ShardWriter.finish, [0]

        def finish(self: Any, sums: Any = None) -> None:
            count[0] += 1
            stop() if count[0] > 3 else write_shard(self, sums)

        patch.setattr(shards.ShardWriter, "finish", finish)
        with pytest.raises(RuntimeError, match="the plug is pulled"):
            write(data(photos), out, update=True)
    there = contents(out)
    assert {name: there[name] for name in old} == old
    assert len(Store(str(out))) + len(Store(str(out), "val")) == 40
    with monkeypatch.context() as patch:
        patch.setattr(update.shutil, "rmtree", stop)
        with pytest.raises(RuntimeError, match="the plug is pulled"):
            write(data(photos), out, update=True)
    with pytest.raises(ValueError, match=r"is not finished"):
        Store(str(out))
    write(data(photos), out, update=True)
    assert contents(out) == whole


def test_what_is_left_of_an_update_to_other_files_is_of_no_use(photos, tmp_path):
    out = write(data(photos), tmp_path / "made")
    change(photos)
    left = write(data(photos), tmp_path / "left")
    info = json.loads((left / "store.json").read_text())
    (left / "store.json").write_text(json.dumps({**info, "finished": False}))
    shutil.move(left, out / ".update")
    save_picture(photos / "a" / "06.png", 7)
    write(data(photos), out, update=True)
    assert contents(out) == contents(write(data(photos), tmp_path / "anew"))


def test_a_damaged_shard_is_not_kept(photos, tmp_path):
    out = write(data(photos), tmp_path / "made")
    path = out / "train" / "image-00001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    change(photos)
    write(data(photos), out, update=True)
    assert contents(out) == contents(write(data(photos), tmp_path / "anew"))
