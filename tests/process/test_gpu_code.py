"""The machine code for a GPU, looked at without one: see benchmarks/fake_gpu.py and benchmarks/machine_code.py.

That the pass compiles for a GPU at all, in how many kernels, what each loads and stores, in how many instructions; and,
by Triton's interpreter, that Inductor's own program for the GPU makes what the eager path makes. Where a private name
of torch has moved these tests are skipped, naming it.
"""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from shared import ROOT

from diffaug.process import kernel
from diffaug.randomness.keys import Keys

sys.path.append(str(ROOT / "benchmarks"))

fake_gpu = pytest.importorskip("fake_gpu", reason="needs torch's private names where they were", exc_type=ImportError)
machine_code = pytest.importorskip("machine_code")
pytest.importorskip("triton", reason="needs Triton, which this build of torch does not bring")
TRIED = ("2.14", "2.15")  # the versions of torch on which these tests must run


@contextmanager
def gpu(capability: int = 90) -> Iterator[None]:
    try:
        with fake_gpu.fake_gpu(capability):
            yield
    except fake_gpu.Moved as error:
        pytest.skip(f"torch {torch.__version__} has moved {error}")


def arguments(batch: int, elements: int, fields: int, dtype: torch.dtype) -> tuple[object, ...]:
    x = torch.empty(batch, elements, dtype=torch.uint8, device=fake_gpu.DEVICE)
    keys = Keys(torch.empty(5, batch, dtype=torch.int64, device=fake_gpu.DEVICE))
    return x, keys, torch.empty(1000, fields, 2, device=fake_gpu.DEVICE), 255.0, dtype


def test_these_tests_are_not_all_skipped():
    if torch.__version__.startswith(TRIED):
        importlib.import_module("watched")  # that of tests/watched.py
        with fake_gpu.fake_gpu():
            assert torch.empty(1, device=fake_gpu.DEVICE).device.type == "cuda"


@pytest.mark.parametrize("elements", [1, 2, 3, 5, 6, 7, 9, 13, 1027])
def test_blocks_made_apart_are_the_same_noise(elements):
    key, x = Keys.pack(torch.arange(3)), torch.randint(0, 256, (3, elements), dtype=torch.uint8)
    mix = torch.rand(3, 2, 2)
    whole = kernel._whole(x, key.rows, mix, 255.0, torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(kernel._whole_in_two(x, key, mix, 255.0, torch.float32), whole, strict=True)
    )


def check_source(source: str, elements: int, fields: int) -> list[str]:
    """The kernels of a program, which read the image and write each output once."""
    blocks = list(fake_gpu.kernels(source).values())
    # The times, and everything else; where the size is no multiple of 4, the last blocks, three at most, too.
    assert len(blocks) == (2 if elements % 4 == 0 else 3)
    assert len(re.findall(r"empty_strided_cuda\(", source)) == 1 + fields, "an output, or epsilon, is written twice"
    for number, block in enumerate(blocks):
        assert not re.search(r"[0-9]{10,}\s*\*\s*x\d", block), "a constant beyond 32 bits on an index"
        assert "fp64" not in block.split("def triton_")[1].split("):", 1)[1], "float64 in the code"
        images = re.findall(r"'(\w+)': '\*u8'", block)
        loads = sum(len(re.findall(rf"tl\.load\({name} ", block)) for name in images)
        assert loads == (0, 4, 3)[number], "times, four lanes, and where there are such blocks three"
        if number == 1:
            assert len(re.findall(r"tl\.store\(", block)) == 4 * fields
    return blocks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "elements", "fields", "dtype"),
    [(1, 3073, 2, torch.bfloat16), (1, 196608, 3, torch.float32), (128, 3072, 3, torch.bfloat16)],
)
def test_the_program_of_other_sizes(batch, elements, fields, dtype):
    """Than those below, whose programs are looked at in the same way: a program takes seconds to write."""
    with gpu():
        source = fake_gpu.program(kernel.draw_times_and_mix, *arguments(batch, elements, fields, dtype))
    check_source(source, elements, fields)


def check_program(batch: int, elements: int, fields: int, dtype: torch.dtype, capability: int, folder: Path) -> None:
    with gpu(capability):
        source = fake_gpu.program(kernel.draw_times_and_mix, *arguments(batch, elements, fields, dtype))
        for number, block in enumerate(check_source(source, elements, fields)):
            tuner = fake_gpu.autotuner(block, folder)
            found = [
                machine_code.read_code(
                    machine_code.compile_kernel(tuner, choice, capability),
                    4 * max(1, choice.kwargs["XBLOCK"] // 32 // choice.num_warps),
                )
                for choice in tuner.configs
            ]
            for code in found:
                assert code.local == code.stack == 0
                assert not [o for o in code.operations if re.match(r"CALL|D(ADD|MUL|FMA|SETP)", o)]
            if number == 1:
                assert min(code.registers for code in found) <= 128
                best = min(found, key=lambda code: code.per_element)
                # Less work than fills a few multiprocessors gets a small tile, which shares little between elements;
                # a size that is no multiple of 4 has no access of several elements at once.
                limit = 70 if batch * elements >= 2**17 else 80
                assert best.per_element <= limit + 6 * (fields - 2) + (0 if elements % 4 == 0 else 24)
                if batch > 1 and elements % 16 == 0 and dtype == torch.float32:
                    assert any(o.startswith("STG.E.128") for o in best.operations)


@pytest.mark.slow
def test_a_batch_of_one_compiles_in_two_kernels(tmp_path):
    check_program(1, 3072, 2, torch.float32, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "elements", "fields", "dtype", "capability"),
    [
        (2, 3073, 1, torch.float32, 90),
        (128, 3072, 2, torch.float32, 90),
        (128, 196608, 1, torch.float32, 80),
    ],
)
def test_the_pass_is_as_few_kernels_and_instructions(batch, elements, fields, dtype, capability, tmp_path):
    check_program(batch, elements, fields, dtype, capability, tmp_path)


INTERPRETED = """
import torch
import fake_gpu
from diffaug.process import kernel
from diffaug.randomness.keys import Keys

for batch, elements in ((3, 768), (2, 259), (1, 768)):
    # Keys that fill every word: a large seed, indices near 2^62, late epochs and views.
    index = torch.arange(batch) * 1_000_003 + 2**62 + 2**39 + 2**32 - 7
    key = Keys.pack(index, seed=2**63 + 12345678901, epoch=2**20 - 3, view=2**20 - 5, dataset=1023)
    x = torch.randint(0, 256, (batch, elements), dtype=torch.uint8)
    table = (torch.rand(1000, 2, 2) * 2 - 1) / torch.tensor([255.0, 1.0])
    table[:, 1] = torch.tensor([0.0, 1.0])
    real = (x, key, table)
    expected = kernel._whole_with_uniform_times(x, key.rows, table, 255.0, torch.float32)
    try:
        with fake_gpu.fake_gpu():
            there = lambda a: torch.empty(a.shape, dtype=a.dtype, device=fake_gpu.DEVICE)
            fake = (there(x), Keys(there(key.rows)), there(table))
            made = fake_gpu.interpret(lambda *a: kernel.draw_times_and_mix(*a, 255.0, torch.float32), fake, real)
    except fake_gpu.Moved as error:
        raise SystemExit(f"moved: {error}")
    assert torch.equal(made[0], expected[0]), "times"
    for a, b in zip(made[1:], expected[1:], strict=True):
        assert a.is_contiguous() and a.shape == x.shape
        assert (a - b).abs().max() <= 1e-6, (batch, elements, (a - b).abs().max())
print("done")
"""


@pytest.mark.slow
def test_the_program_for_a_gpu_makes_what_the_eager_path_makes():
    paths = [str(ROOT), str(ROOT / "benchmarks")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=600
    )
    if done.stderr.startswith("moved"):
        pytest.skip(done.stderr)
    assert done.stdout == "done\n", done.stderr[-2000:]
