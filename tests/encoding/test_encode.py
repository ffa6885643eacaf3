"""encode: a store holds the very bits of what it was made from, whole, or is refused with the line that differs."""

import errno
import importlib.metadata
import json
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import server
import torch
from shared import ROOT, Items, Stream, assert_alike, contents, save_picture, seen, together, write
from tiny import environment
from torch.utils.data import Subset, TensorDataset

import diffaug
from diffaug import Buckets, DiffusionDataModule, ForwardProcess, LinearBeta, Mixture
from diffaug.__main__ import main
from diffaug.commands.preview import preview
from diffaug.pytorch_lightning import image_folder, store
from diffaug.store import shards
from diffaug.store.reader import Store
from diffaug.training.errors import Told

FIELDS = ("x_t", "epsilon", "t", "x_0", "index", "label")
PROCESS = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False)
NO_LABEL = ForwardProcess(LinearBeta(), fields=FIELDS[:-1], compile=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty pictures of several kinds and sizes, in two classes."""
    folder = tmp_path / "photos"
    for i in range(40):
        path = folder / "ab"[i % 2] / f"{i:02}.{'jpg' if i % 3 else 'png'}"
        save_picture(path, i, (20 + i, 30), "L" if i % 5 == 0 else "RGB")
    return folder


def folder(root: Path, **options: Any) -> DiffusionDataModule:
    options = {"image_size": 16, "process": PROCESS, "seed": 3, "batch_size": 4, **options}
    return image_folder(root=str(root), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "ranks", "kills"),
    [((), 3, (4, 7)), (("data.encoder={_target_:recorded.Spread}",), 2, (5,))],
    ids=["images", "latents"],
)
def test_any_ranks_and_any_kills_write_the_same_store(overrides, ranks, kills, tmp_path):
    """By this process, by several ranks, and by one that is killed; of images, and of latents with their sums."""
    photos = tmp_path / "photos"
    for i in range(100):
        save_picture(photos / f"{i:04}.png", i)

    def words(name: str) -> list[str]:
        words = ["encode", "data=image_folder", f"data.root={photos}", "data.image_size=16", f"out={tmp_path / name}"]
        return [*words, *overrides, "data.batch_size=4", "data.num_workers=0"]

    def run(name: str, kill: int, *more: str) -> int:
        command = [sys.executable, str(ROOT / "tests/jobs/small_shards.py"), *words(name), *more]
        return server.run(command, ROOT, {**environment(tmp_path), "KILL": str(kill)}).returncode

    assert main([*words("whole"), "trainer=cpu"]) == 0
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.startswith("train/")]) >= 10
    assert run("ranks", 0, "trainer=ddp", f"trainer.devices={ranks}", "trainer.accelerator=cpu") == 0
    assert contents(tmp_path / "ranks") == whole
    for kill in kills:
        assert run("killed", kill, "trainer=cpu") == -signal.SIGKILL
        there = contents(tmp_path / "killed")
        parts = [name for name in there if name.endswith(".part")]
        named = there.keys() - {"store.json", *parts}
        assert parts
        assert [name for name in named if name.startswith("train/")]
        assert all(there[name] == whole[name] for name in named)
    assert main([*words("killed"), "trainer=cpu"]) == 0
    assert contents(tmp_path / "killed") == whole


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_that_the_same_command_goes_on(told, photos, tmp_path):
    """As from a terminal, or a cluster, to all processes: two ranks, each with a worker."""
    out, variables = tmp_path / "made", {**environment(tmp_path), "KILL": "4", "SIGNAL": str(int(told))}
    words = ["encode", "data=image_folder", f"data.root={photos}", "data.image_size=16", f"out={out}"]
    command = [sys.executable, str(ROOT / "tests/jobs/small_shards.py"), *words, "trainer=ddp", "trainer.devices=2"]
    done = server.run([*command, "trainer.accelerator=cpu", "data.num_workers=1"], ROOT, variables)
    assert done.returncode == 128 + told, done.stderr
    text = r"diffaug encode: interrupted\. What was finished stays, \d+ of 40 rows, and the same command goes on\.\n"
    assert len(re.findall(text, done.stderr)) == 1
    assert "Traceback" not in done.stderr
    there = contents(out)
    finished = {name for name in there if not name.endswith(".part")} - {"store.json"}  # a rank ends the others at once
    assert [name for name in finished if name.startswith("train/image")]
    assert main([*words, "data.num_workers=0", "trainer=cpu"]) == 0
    whole = contents(out)
    assert all(there[name] == whole[name] for name in finished)
    assert not [name for name in whole if name.endswith(".part")]


MEASURED = """
import resource, sys, torch
import pytorch_lightning as pl
from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.commands.encode import encode
from diffaug.pytorch_lightning import Encoding


class Images(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return torch.full((3, 160, 160), i % 256, dtype=torch.uint8)


for count in (200, 2000):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    data = DiffusionDataModule(Images(count), process=ForwardProcess(LinearBeta(), compile=False), batch_size=8)
    encode(data, f"{sys.argv[1]}/{count}", trainer, Encoding)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """Two thousand images of 77 KB are 154 MB: nothing of them stays in memory."""
    (tmp_path / "measured.py").write_text(MEASURED)
    done = server.run([sys.executable, "measured.py", "made"], tmp_path, environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (int(line.split()[1]) / 1024 for line in done.stdout.splitlines() if line.startswith("peak"))
    assert second - first < 20


def test_floats_keep_their_range(tmp_path):
    images = TensorDataset(torch.rand(4, 1, 3, 3))
    process = ForwardProcess(LinearBeta(), value_range=(0, 1), compile=False)
    out = write(DiffusionDataModule(images, process=process), tmp_path / "made")
    with pytest.raises(
        ValueError, match=r"are floats in \[0\.0, 1\.0\], but process\.value_range=\[-1\.0, 1\.0\]: set"
    ):
        store(root=str(out), process=PROCESS)
    assert torch.equal(store(root=str(out), process=process).sources["train"][0]()[3]["image"], images.tensors[0][3])


def test_a_second_run_in_the_folder_is_refused(photos, tmp_path):
    out = write(folder(photos), tmp_path / "made")
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    words = [sys.executable, "-c", hold, str(out / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"Another run is writing to out=.*: let it end, or name another folder"):
            write(folder(photos), out)
        other.stdin.close()
    write(folder(photos), out)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_one_variant_is_drawn_at_each_visit(tmp_path, workers):
    images = torch.arange(40 * 27).view(40, 3, 3, 3).remainder(251).to(torch.uint8)
    data = DiffusionDataModule(TensorDataset(images), TensorDataset(images), process=NO_LABEL)
    out = write(data, tmp_path / "made", variants=["identity", "hflip"])
    flipped: list[Any] = []
    for size in (4, 7):
        options = {"process": NO_LABEL, "seed": 3, "batch_size": size, "num_workers": workers}
        batches = seen(store(root=str(out), **options), epochs=3)
        index, x_0, unit = together(batches["train"], "index"), together(batches["train"], "x_0"), images / 127.5 - 1
        straight = (x_0 - unit[index]).flatten(1).abs().amax(1) < 1e-6
        mirrored = (x_0 - unit.flip(-1)[index]).flatten(1).abs().amax(1) < 1e-6
        assert (straight ^ mirrored).all()
        assert len(index) == 120
        assert 30 < mirrored.sum() < 90  # of 120 coins: by chance once in 10^8
        flipped.append(mirrored.view(3, 40).gather(1, index.view(3, 40).argsort(1)))
        assert (flipped[-1][0] != flipped[-1][1]).any()
        validated = together(batches["val"], "x_0")[:40]
        assert (validated - unit).abs().max() < 1e-6
    assert torch.equal(*flipped)
    with pytest.raises(ValueError, match=r"each of variants must be one of 'identity', 'hflip', but got 'vflip'"):
        write(data, tmp_path / "other", variants=["vflip"])
    with pytest.raises(ValueError, match=r"\n  train\.variants: \['identity', 'hflip'\] -> \['identity'\]\n"):
        write(data, out)


def crop(image: torch.Tensor) -> torch.Tensor:
    """A random crop of 8 x 8 of 16 x 16, by torch's and Python's global states."""
    top, left = int(torch.randint(9, ())), random.randrange(9)
    return image[:, top : top + 8, left : left + 8]


def middle(image: torch.Tensor) -> torch.Tensor:
    return image[:, 4:12, 4:12]


def corner_of(image: torch.Tensor, whole: torch.Tensor) -> tuple[int, int]:
    windows = whole.unfold(1, 8, 1).unfold(2, 8, 1)
    ((top, left),) = (windows == image[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
    return top, left


@pytest.mark.slow
def test_draws_of_a_random_transform_are_variants(photos, tmp_path, same_random_state):
    """Each a crop of its own, keyed: the same again by another batch size; one is drawn at every visit."""
    options = {"transform": crop, "eval_transform": middle}
    out = write(folder(photos, **options), tmp_path / "made", variants=5)
    assert contents(write(folder(photos, **options, batch_size=7), tmp_path / "again", variants=5)) == contents(out)
    plain, part = folder(photos), Store(str(out))
    plain.setup("fit")
    wholes = [
        image for image, *_ in map(plain.images("train").__getitem__, map(plain.images("train").place, range(20)))
    ]
    rows = np.concatenate([np.load(path) for path in sorted((out / "train").glob("image-*.npy"))])
    corners = [[corner_of(torch.from_numpy(rows[5 * i + v]), wholes[i]) for v in range(5)] for i in range(20)]
    assert len({corner for of_item in corners for corner in of_item}) > 40  # of 100 draws of 81
    assert len(part) == len(plain.images("train"))
    with torch.random.fork_rng([]):
        assert {corner_of(part[3]["image"], wholes[3]) for _ in range(50)} == set(corners[3])
    assert torch.equal(Store(str(out), "val")[0]["image"], middle(plain.images("val")[plain.images("val").place(0)][0]))
    before = contents(out)
    with pytest.raises(ValueError, match=r"\n  train\.items looked at: .*\n  train\.drawn by seed: 3 -> 4\n"):
        write(folder(photos, **options, seed=4), out, variants=5)
    with pytest.raises(
        ValueError, match=r"\n  train\.variants: \['0', '1', '2', '3', '4'\] -> \['0', '1', '2', '3'\]\n"
    ):
        write(folder(photos, **options), out, variants=4)
    assert contents(out) == before


def test_what_are_no_draws_is_refused(photos, tmp_path):
    with pytest.raises(
        ValueError, match=r"in data\.transform: .* Say how many draws .* as variants=8; or leave it out"
    ):
        write(folder(photos, transform=crop), tmp_path / "made")
    with pytest.raises(ValueError, match=r"variants=4 stores .* but reading data\.train draws no random numbers, so"):
        write(folder(photos, transform=middle), tmp_path / "made", variants=4)
    with pytest.raises(ValueError, match=r"Items of data\.train are not the same when they are read again"):
        write(folder(photos, transform=lambda x: crop(x) * 0 + GENERATOR.integers(200)), tmp_path / "made", variants=2)
    for variants, message in (
        (0, "a whole number in \\[1, 1000\\], but got 0"),
        ((), "one of 'identity', 'hflip', but got ''"),
    ):
        with pytest.raises(ValueError, match=message):
            write(folder(photos), tmp_path / "made", variants=variants)
    assert not (tmp_path / "made").exists()


def test_a_path_of_other_letters_is_quoted(photos, tmp_path, capsys):
    out = tmp_path / "ä b=1"
    words = ["encode", "data=image_folder", f"data.root={photos}", "data.image_size=16", f"out={out}", "trainer=cpu"]
    assert main([*words, "data.num_workers=0"]) == 0
    said = capsys.readouterr().out.split("To train on it: ")[1]
    assert main(["report", *shlex.split(said)]) == 0
    assert main(["report", "data=store", f"data.root={out}"]) == 1
    hint = f"""Quote a value of other characters, for Hydra and for the shell: 'data.root="{out}"'"""
    assert hint in capsys.readouterr().err


def test_an_error_of_a_dataset_says_which_item(photos, tmp_path, capsys):
    (photos / "a" / "00.png").write_bytes(b"broken")
    dataset = f"data.train={{_target_: torchvision.datasets.ImageFolder, root: {photos}}}"
    words = ["encode", "data=own", dataset, "data.image_shape=[3,16,16]", f"out={tmp_path / 'made'}", "trainer=cpu"]
    assert main(words) == 1
    assert "00.png'> (in reading data.train[0])" in capsys.readouterr().err


def test_report_takes_a_store(photos, tmp_path, capsys):
    out = write(folder(photos), tmp_path / "made")
    assert main(["report", "data=store", f"data.root={out}", "schedule=cosine"]) == 0
    assert "Cosine(timesteps=1000" in capsys.readouterr().out


def test_preview_shows_a_store(photos, tmp_path):
    data = store(root=str(write(folder(photos), tmp_path / "made")), process=PROCESS, image_shape=[3, 16, 16])
    assert "each (3, 16, 16), uint8" in preview(data).text


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_store_gives_the_very_batches_of_its_folder(photos, tmp_path, workers):
    out = write(folder(photos), tmp_path / "made")
    ours = store(root=str(out), process=PROCESS, seed=3, batch_size=4, num_workers=workers, image_shape=[3, 16, 16])
    a, b = seen(folder(photos)), seen(ours)
    for stage in ("train", "val"):
        assert_alike(a[stage], b[stage])
    assert len(list((out / "train").glob("image-*.npy"))) > 3
    assert ours.images("train").dataset[-1]["image"].dtype == torch.uint8


def test_any_numpy_reads_the_shards(tmp_path):
    def thing(i: int) -> dict[str, Any]:
        image = torch.full((20, 3, 5), i / 100, dtype=torch.bfloat16)
        text = ["", 'two\n"lines"', "ü 名 \ud800"][i % 3] * i
        return {
            "image": image,
            "text": text,
            "half": np.float16(i),
            "place": torch.tensor([i, -i]),
            "odd": i % 2 == 1,
        }

    things = Items(thing, 50)
    out = write(DiffusionDataModule(things, process=PROCESS), tmp_path / "made")
    files = sorted((out / "train").glob("place-*.npy"))
    assert len(files) > 1
    assert np.array_equal(np.concatenate([np.load(file) for file in files]), [[i, -i] for i in range(50)])
    assert np.load(out / "train" / "image-00000.npy").dtype == np.uint16
    lines = (out / "train" / "text-00000.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == [things[i]["text"] for i in range(len(lines))]
    got = Store(str(out))
    for i, row in zip([7, 49, 0, -1], got.__getitems__([7, 49, 0, -1]), strict=True):
        wanted = things[i % 50]
        assert list(row) == ["image", "text", "half", "place", "odd"]
        assert torch.equal(row["image"], wanted["image"])
        assert row["text"] == wanted["text"]
        assert row["half"].dtype == torch.float16
        assert float(row["half"]) == i % 50
        assert row["odd"].dtype == torch.bool
        assert bool(row["odd"]) == wanted["odd"]
    with pytest.raises(IndexError, match="holds 50 items, of which 50 is none"):
        got[50]


def test_what_is_read_may_be_written_to(photos, tmp_path):
    """A transform that works in place must not change what the next epoch reads."""
    out = write(folder(photos), tmp_path / "made")
    got = Store(str(out))
    before = got[0]["image"].clone()
    got[0]["image"].zero_()
    assert torch.equal(got[0]["image"], before)


def test_a_transform_may_work_in_place(photos, tmp_path):
    out = write(folder(photos), tmp_path / "made")
    whole = contents(out)
    options = {"root": str(out), "process": PROCESS, "batch_size": 40, "shuffle": False}
    for transform in (None, lambda image: image.zero_()):
        batches = seen(store(**options, transform=transform, device_transform=lambda images: images.bitwise_or_(1)))
        a, b = (batch.x_0 for batch in batches["train"])
        assert torch.equal(a, b)
        assert (a.max() < 0) == (transform is not None)
    assert contents(out) == whole
    plain = seen(store(**options))["train"]
    assert (together(plain, "x_0") * 127.5 + 127.5).round().remainder(2).min() == 0  # no bit stayed set


def test_a_part_of_a_store_is_that_store_s_own(tmp_path):
    """As random_split makes it, or a part of a part: read in batches, and told from another by a resume."""
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 2, 2) * torch.tensor([1, 2]).byte()
    out = write(DiffusionDataModule(TensorDataset(images), process=NO_LABEL), tmp_path / "made", variants=["hflip"])
    parts = [[3, 11, 7], [3, 11, 8]]
    data = [
        DiffusionDataModule(Subset(Subset(Store(str(out)), [0, *part]), [1, 2, 3]), process=NO_LABEL, image_key="image")
        for part in parts
    ]
    for each, part in zip(data, parts, strict=True):
        each.setup("fit")
        held = each.images("train").dataset
        assert type(held) is Store
        assert torch.equal(
            torch.stack([row["image"] for row in held.__getitems__([0, -1, 1])]), images[part].flip(-1)[[0, 2, 1]]
        )
        with pytest.raises(IndexError, match="holds 3 items, of which 3 is none"):
            held[3]
    with pytest.raises(ValueError, match=r"\n  train\.chosen: \w+ -> \w+\n"):
        data[1].load_state_dict(data[0].state_dict())


def test_a_transform_may_make_another_shape_of_a_store_s_images(photos, tmp_path):
    options = {"root": str(write(folder(photos), tmp_path / "made")), "process": PROCESS, "image_shape": [3, 8, 8]}
    crop = lambda image: image[:, 4:12, 4:12]  # noqa: E731
    assert seen(store(**options, transform=crop, eval_transform=crop), 1)["train"][0].x_t.shape[1:] == (3, 8, 8)
    with pytest.raises(ValueError, match=r"data\.image_shape says \[3, 8, 8\], but .* has shape \[3, 16, 16\]"):
        store(**options).setup("fit")


def test_no_file_is_held_open(photos, tmp_path):
    got = Store(str(write(folder(photos), tmp_path / "made")))
    before = len(os.listdir("/proc/self/fd"))
    got.__getitems__(range(len(got)))
    assert len(os.listdir("/proc/self/fd")) == before
    sent = pickle.dumps(got)  # to a worker that is started, not forked
    assert len(sent) < 4000
    assert torch.equal(pickle.loads(sent)[-1]["image"], got[-1]["image"])


def test_another_recipe_is_refused_with_the_line_that_differs(photos, tmp_path):
    out = write(folder(photos), tmp_path / "made")
    before = contents(out)
    write(folder(photos), out)  # the same again
    path = photos / "a" / "00.png"
    image = path.read_bytes()

    def refused(pattern: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=rf"(?s)The store out=.* was made from something else:.*\n  {pattern}"):
            write(folder(photos, **options), out)
        assert contents(out) == before

    refused(r"train\.image_size: 16 -> 8\n", image_size=8)
    refused(r"train\.items looked at: \w+ -> \w+\n", transform=lambda image: 255 - image)
    refused(r"train\.images: \d+ -> \d+\n", val_share=0.5)
    path.write_bytes((photos / "a" / "06.png").read_bytes())
    refused(r"(train|val)\.sizes and times of the files: ")
    path.write_bytes(image)
    (photos / "a" / "new.png").write_bytes(image)
    refused(r"(train|val)\.images: \d+ -> \d+\n")
    assert not (tmp_path / "photos" / "store.json").exists()
    with pytest.raises(ValueError, match=r"out=.*photos holds other files, and no store\.json"):
        write(folder(photos), photos)


class Scaled(torch.nn.Module):
    """An encoder that looks as others do: of one parameter, the same in all."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by, self.weight = by, torch.nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[..., ::2, ::2] * self.weight * self.by


@pytest.mark.parametrize("whole", [True, False])
def test_an_encoder_that_only_looks_the_same_is_refused(photos, tmp_path, whole):
    out = write(folder(photos, encoder=Scaled(1.0)), tmp_path / "made")
    if not whole:
        (out / "train" / "mean-00001.npy").unlink()
    before = contents(out)
    with pytest.raises(
        ValueError, match=r"mean of data\.train\[\d+\] is not what the store holds, made again: .* out="
    ):
        write(folder(photos, encoder=Scaled(1.1)), out)
    assert contents(out) == before
    write(folder(photos, encoder=Scaled(1.0)), out)


def test_what_came_to_nothing_is_made_anew(tmp_path):
    items = [{"image": torch.full((1, 2, 2), i, dtype=torch.uint8), "words": torch.zeros(i, 2)} for i in range(5)]
    data = partial(DiffusionDataModule, items, process=NO_LABEL, image_key="image")
    with pytest.raises(ValueError, match=r"say that its shape differs: differ=NAME"):
        write(data(), tmp_path / "made")
    assert (tmp_path / "made" / "store.json").exists()
    out = write(data(), tmp_path / "made", differ=["words"])
    assert contents(out) == contents(write(data(), tmp_path / "anew", differ=["words"]))
    line = r"was made from something else:\n  train\.words: float32 \[-1, 2\] -> float32 \[0, 2\]\n"
    with pytest.raises(ValueError, match=line):
        write(data(), out)


def test_a_list_of_one_is_another_split(tmp_path):
    images = TensorDataset(torch.zeros(4, 1, 2, 2, dtype=torch.uint8))
    out = write(DiffusionDataModule(None, images, process=NO_LABEL), tmp_path / "made")
    with pytest.raises(ValueError, match=r"something else:\n  splits: \['val'\] -> \['val-0'\]\n"):
        write(DiffusionDataModule(None, [images], process=NO_LABEL), out)


def test_nothing_is_left_of_what_came_to_nothing(photos, tmp_path):
    """As after a kill between the files of the first shards: those of images are whole."""
    out = write(folder(photos), tmp_path / "made")
    for path in out.glob("*/label-*"):
        path.unlink()
    said = json.loads((out / "store.json").read_text())
    (out / "store.json").write_text(json.dumps({**said, "finished": False}))
    assert (out / "train" / "files.jsonl").exists()
    images = TensorDataset(torch.zeros(40, 3, 16, 16, dtype=torch.uint8))
    made = DiffusionDataModule(images, process=NO_LABEL)
    assert contents(write(made, out)) == contents(write(made, tmp_path / "anew"))


@pytest.mark.parametrize("encoder", [None, lambda x: x[..., ::2, ::2]])
def test_what_images_in_buckets_will_take_is_known(encoder, tmp_path, capsys):
    for i in range(12):
        save_picture(tmp_path / "photos" / f"{i:02}.png", i, ((40, 40), (30, 60), (60, 30))[i % 3])
    buckets = {"image_size": None, "buckets": Buckets(area=1024, step=8), "val_share": 0, "process": NO_LABEL}
    out = write(folder(tmp_path / "photos", **buckets, encoder=encoder), tmp_path / "made")
    name, bytes_of_one = ("image", 1) if encoder is None else ("mean", 4)
    values = sum(np.load(path).size for path in out.glob(f"train/{name}-?????.npy"))
    numbers = 12 * (1 + 3 * 2) * 8  # label, original_size, crop, target_size
    said = re.search(r"; ([\d.]+) KiB in \d shards", capsys.readouterr().out)
    assert said
    assert float(said[1]) * 1024 == pytest.approx(values * bytes_of_one + numbers, rel=1e-3)


RANDOM = Items(lambda i: torch.full((1, 2, 2), random.randrange(200) if i == 5 else i, dtype=torch.uint8), 9)
GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": RANDOM}, r"Reading data\.train\[5\] draws random numbers, in the dataset or in data\.transform"),
        (
            {"transform": lambda x: x * 0 + GENERATOR.integers(200)},
            r"Items of data\.train are not the same when they are read again",
        ),
        ({"device_transform": torch.nn.Identity()}, r"data\.device_transform is of the training batches"),
        ({"train": lambda: Stream()}, r"data\.train is a stream"),
        (
            {"train": Mixture({"one": RANDOM, "two": RANDOM}, weights={"one": 1, "two": 2})},
            r"train is a mixture: m",
        ),
        ({"train": [(torch.ones(1, 2, 2), [])]}, r"'label' of data\.train cannot be stored: .* keep=label"),
        ({"train": [(torch.ones(1, 2, 2), None)]}, r"The parts 'label' of a batch's items cannot be joined: .* keep="),
        ({"train": [(torch.ones(1, 2, 2), [1, 2])]}, r"'label' of data\.train cannot be stored: .* keep=label"),
        (
            {"train": [torch.ones(1, 2, 2), torch.ones(1, 2, 3)]},
            r"images of a batch must be alike, but sample 0 .* sample 1",
        ),
        (
            {"train": [torch.ones(1, 2, 2), torch.ones(1, 2, 3)], "batch_size": 1},
            r"Every row of a store is alike, but image of train, from row 1 on",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(options, message, tmp_path):
    images = TensorDataset(torch.arange(36, dtype=torch.uint8).view(9, 1, 2, 2))
    with pytest.raises(ValueError, match=message):
        write(DiffusionDataModule(**{"train": images, "process": PROCESS, **options}), tmp_path / "made")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".npy", ".part")]


def test_a_checkout_that_is_not_installed_makes_stores_too(photos, tmp_path, monkeypatch):
    def version(name: str) -> str:
        if name == "diffaug":
            raise PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr("diffaug.encoding.fingerprint.version", version)
    out = write(folder(photos), tmp_path / "made")
    assert json.loads((out / "store.json").read_text())["made_from"]["versions"]["diffaug"] == diffaug.__version__


def test_only_what_is_kept_is_stored(photos, tmp_path):
    out = write(folder(photos), tmp_path / "made", keep=[])
    assert list(Store(str(out))[0]) == ["image"]
    with pytest.raises(ValueError, match=r"made' has no tran set number 0, but 1 of train, 1 of val\.$"):
        Store(str(out), "tran")
    with pytest.raises(ValueError, match="each of keep must be one of 'label', but got 'lable'"):
        write(folder(photos), tmp_path / "mistyped", keep=["lable"])


def stopped(stop: int, by: Callable[[], None]) -> DiffusionDataModule:
    """Pictures; as one is read, something happens."""

    def item(i: int) -> torch.Tensor:
        if i == stop:
            by()
        return torch.full((3, 16, 16), i, dtype=torch.uint8)

    return DiffusionDataModule(Items(item, 50), process=PROCESS, batch_size=2)


def pull_the_plug() -> None:
    raise RuntimeError("the plug is pulled")


def test_an_interrupted_store_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("diffaug.encoding.fingerprint.LOOKED_AT", 1)  # what stops is not looked at

    data = partial(stopped, by=pull_the_plug)
    whole = contents(write(data(-1), tmp_path / "whole"))
    out = tmp_path / "made"
    for stop in (17, 44):
        with pytest.raises(RuntimeError, match="the plug is pulled"):
            write(data(stop), out)
        there = contents(out)
        assert not [name for name in there if name.endswith(".part")]
        assert all(there[name] == whole[name] for name in there if name != "store.json")
        with pytest.raises(ValueError, match=r"data\.root=.* is not finished\. The command that made it goes on"):
            Store(str(out))
    assert "train/image-00000.npy" in there
    began = (out / "train" / "image-00000.npy").stat().st_mtime_ns
    (out / "train" / "image-00001.npy").write_bytes(whole["train/image-00001.npy"][:-1])
    (out / "train" / ".image-00009.npy.part").write_bytes(b"left by a kill")
    write(data(-1), out)
    assert contents(out) == whole
    assert (out / "train" / "image-00000.npy").stat().st_mtime_ns == began


def test_sigterm_ends_with_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("diffaug.encoding.fingerprint.LOOKED_AT", 1)
    out = tmp_path / "made"
    with pytest.raises(Told, match=r"^What was finished stays, (?!0 )\d+ of 50 rows, and the same command goes") as end:
        write(stopped(44, lambda: os.kill(os.getpid(), signal.SIGTERM)), out)
    assert end.value.number == signal.SIGTERM
    assert (out / "train" / "image-00000.npy").is_file()
    assert not [name for name in contents(out) if name.endswith(".part")]


def test_a_shard_that_is_cut_short_is_refused_and_mended(photos, tmp_path):
    out = write(folder(photos), tmp_path / "made")
    whole, path = contents(out), out / "train" / "image-00001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    data = store(root=str(out), process=PROCESS)
    with pytest.raises(ValueError, match=r"image-00001\.npy is cut short or not whole: \d+ bytes of \d+\. The command"):
        data.setup("fit")
    (out / "train" / "label-00000.npy").unlink()
    with pytest.raises(ValueError, match=r"label-00000\.npy is missing\. The command that made it goes on with it"):
        data.setup("fit")
    write(folder(photos), out)
    assert contents(out) == whole


def test_a_full_disk_leaves_the_store_as_it_was(photos, tmp_path, monkeypatch):
    out, written = tmp_path / "made", []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", full)
        with pytest.raises(OSError, match=r"Shard \d of .* cannot be written .*No space left on device. What was fin"):
            write(folder(photos), out)
    there = contents(out)
    assert "train/image-00000.npy" in there
    assert not [name for name in there if name.endswith(".part")]
    with monkeypatch.context() as patch:
        patch.setattr("diffaug.commands.encode.shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
        with pytest.raises(OSError, match=r"needs \d.* KiB and texts, but there are 1000 bytes free"):
            write(folder(photos), out)
    assert contents(out) == there
    write(folder(photos), out)
    assert contents(out) == contents(write(folder(photos), tmp_path / "other"))


def long_text(i: int) -> dict[str, Any]:
    """A picture with a text whose size is not known beforehand."""
    return {"image": torch.full((3, 16, 16), i, dtype=torch.uint8), "text": str(i) * 30_000}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_really_is_full_leaves_what_was_finished(tmp_path):
    disk, data = tmp_path / "disk", DiffusionDataModule(Items(long_text, 60), process=NO_LABEL, batch_size=4)
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounts are not permitted here")
    try:
        for _ in range(2):
            with pytest.raises(
                OSError, match=r"Shard \d+ of .*train cannot be written .*No space left on device"
            ) as raised:
                write(data, disk / "made")
            assert raised.value.errno == errno.ENOSPC
        there = contents(disk / "made")
        assert "train/image-00001.npy" in there
        assert not [name for name in there if name.endswith(".part")]
        with pytest.raises(ValueError, match="is not finished"):
            Store(str(disk / "made"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        whole = contents(write(data, disk / "made"))
        assert {name: whole[name] for name in there if name != "store.json"} == {
            name: there[name] for name in there if name != "store.json"
        }
        assert whole == contents(write(data, tmp_path / "other"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_resume_compares_what_made_the_store(photos, tmp_path):
    made = [write(folder(photos, image_size=size), tmp_path / str(size)) for size in (16, 8)]
    data = [store(root=str(out), process=PROCESS) for out in made]
    for each in data:
        each.setup("fit")
    with pytest.raises(ValueError, match=r"(?s)another recipe than.*\n  train\.train\.image_size: 16 -> 8\n"):
        data[1].load_state_dict(data[0].state_dict())


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root=.* holds no store: .*-m diffaug encode data=\.\.\."):
        store(root=str(tmp_path), process=PROCESS)
    (tmp_path / "store.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match=r"store\.json is of format 9, but this version of diffaug reads 1"):
        store(root=str(tmp_path), process=PROCESS)
    (tmp_path / "store.json").write_text("[]")
    with pytest.raises(ValueError, match=r"store\.json is no store's"):
        store(root=str(tmp_path), process=PROCESS)
