"""The benchmarks run: what they print is looked at by people, that they still work by this test."""

import subprocess
import sys

import pytest
from shared import ROOT


@pytest.mark.slow
def test_forward_runs(tmp_path):
    out = tmp_path / "tables.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "forward.py"), "--seconds", "0.01", "--markdown", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    text = out.read_text()
    for name in ("diffaug compiled", "diffaug eager", "by hand", "the bytes alone", "Growth"):
        assert name in text
