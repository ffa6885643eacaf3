"""What the tests of the data share."""

import pytest


@pytest.fixture(autouse=True)
def _eager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick tests draw as where there is no compiler, unless they say otherwise: what they are about is which samples
    come and what is drawn for each, and to compile takes seconds. The compiled pass is of tests/process."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr("diffaug.process.kernel.compiler_for", lambda _: False)
