"""Damaged checkpoints, and files that are none: refused with the reason and the way back, never read in silence."""

import os
import pickle
import random
import re
import shlex
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import checkpoint, load

from diffaug.commands.export import load_weights
from diffaug.config import compose_config
from diffaug.pytorch_lightning import AtomicCheckpointIO
from diffaug.training.checkpoint_io import find_damage


def refusal(path: Path) -> str | None:
    """Why a checkpoint was refused; None if it was not, and then it is the one that was written."""
    try:
        found = load(path)
    except RuntimeError as error:
        return str(error)
    assert same(found, checkpoint(1, 20)), "another one was read in silence"
    return None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("every", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_refused_or_changes_nothing(every, tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1, 20), path)
    whole = path.read_bytes()
    bits = range(0, 8 * len(whole), every)
    assert len(bits) > 500
    refused = 0
    with path.open("r+b", buffering=0) as file:  # written in place: to make the file anew takes as long as to read it
        for bit in bits:
            place, own = bit // 8, whole[bit // 8]
            os.pwrite(file.fileno(), bytes([own ^ 1 << bit % 8]), place)
            said = refusal(path)
            assert said is None or re.match(r"The checkpoint \S*last\.ckpt (?:is damaged|cannot be loaded): .", said)
            refused += said is not None
            os.pwrite(file.fileno(), bytes([own]), place)
    assert path.read_bytes() == whole
    assert 0.5 * len(bits) < refused < 0.8 * len(bits)


def test_a_mark_of_a_folder_which_no_checksum_holds(tmp_path):
    """torch reads nothing of such a record, and hands out what the memory held."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1, 20), path)
    whole = path.read_bytes()
    entries = [found.start() for found in re.finditer(rb"PK\x01\x02", whole)]
    assert len(entries) > 8
    for entry in entries:
        spoilt = bytearray(whole)
        spoilt[entry + 38] ^= 0x10
        path.write_bytes(spoilt)
        assert "are not those that were written" in (refusal(path) or "")


def test_a_record_whose_bytes_changed_is_named(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(7), path)
    whole, one = path.read_bytes(), struct.pack("<f", 7)
    path.write_bytes(whole.replace(one * 9, one * 8 + struct.pack("<f", 8), 1))
    assert torch.load(path)["global_step"] == 7, "torch alone says nothing"
    with pytest.raises(RuntimeError, match=r"last\.ckpt is damaged: the bytes of its record \S+/data/0 are not those"):
        load(path)


def test_a_block_of_other_bytes(tmp_path):
    path, dice = tmp_path / "last.ckpt", random.Random(0)
    AtomicCheckpointIO().save_checkpoint(checkpoint(1, 20), path)
    whole = path.read_bytes()
    for turn in range(300):
        start, size = dice.randrange(len(whole)), dice.choice((2, 16, 512))
        block = bytes(size) if turn % 2 else dice.randbytes(size)
        path.write_bytes((whole[:start] + block + whole[start + size :])[: len(whole)])
        assert "last.ckpt" in (refusal(path) or "last.ckpt")


def test_cut_short_at_every_length(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1, 20), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(RuntimeError, match=r"is damaged: (?:it is empty|it begins with|its end is missing)"):
            load(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is damaged: it is empty"),
        (b"hello, world\n", r"is damaged: it begins with b'hello, w', as no checkpoint does"),
        (pickle.dumps({"state_dict": {}}), r"is damaged: it begins with b'\\x80"),
        ({"a.weight": torch.zeros(1)}, r"is no checkpoint of Lightning's, .*it holds keys a\.weight\. "),
        ([1, 2], r"is no checkpoint of Lightning's, .*it holds list\. "),
        (None, "is damaged: it is a folder"),
    ],
)
def test_what_is_no_checkpoint(content, said, tmp_path):
    path = tmp_path / "last.ckpt"
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(RuntimeError, match=said + ".*ckpt_path=null begins from the start"):
        load(path)


def test_what_cannot_be_checked_still_loads(tmp_path):
    """Plain Lightning's, whose checksums are torch's; and of torch without checksums, and before it wrote any."""
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(), path)
    assert find_damage(path) is None
    assert same(load(path), checkpoint())
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load(path), checkpoint())
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=False)
    assert same(load(path), checkpoint())


def test_the_way_back_is_the_newest_other_that_is_whole_in_words_for_the_command_line(tmp_path):
    path, best, newer = (tmp_path / name for name in ("last.ckpt", "best.ckpt", "epoch=1 a.ckpt"))
    for age, file in enumerate((newer, best)):
        AtomicCheckpointIO().save_checkpoint(checkpoint(), file)
        os.utime(file, (10**9 - age, 10**9 - age))
    path.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"Go on from epoch=1 a\.ckpt, of 2001-.*, by '(.*)'\.$") as raised:
        load(path)
    word = shlex.split(str(raised.value).split(" by ")[-1].removesuffix("."))[0]
    assert compose_config([word]).ckpt_path == str(newer)
    newer.write_bytes(newer.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match=rf"Go on from best\.ckpt, of .*, by ckpt_path={best}\.$"):
        load(path)


def test_an_export_of_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^ckpt=\S*last\.ckpt is damaged: its end is missing, so it was cut short\.$"):
        load_weights(torch.nn.Linear(1, 1), path)
