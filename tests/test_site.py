"""The documentation site, as far as it can be checked without mkdocs; .ci/run builds it strictly."""

import re

import pytest
import yaml
from shared import ROOT

import diffaug
import diffaug.schedules

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SHOWN = re.compile(r"!\[[^\]]+\]\(([^)]+\.png)\)")  # with a text for who cannot see it


def pages_of(entry):
    """Return the pages of a part of mkdocs.yml's nav."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages_of(part)]


def test_the_navigation_names_every_page_once():
    nav = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_every_picture_is_shown_and_small():
    shown = {(page.parent / path).resolve() for page in PAGES for path in SHOWN.findall(page.read_text())}
    kept = {path.resolve() for path in (DOCS / "pictures").iterdir()}
    assert kept == shown
    assert max(path.stat().st_size for path in kept) < 200_000


def test_the_gallery_shows_every_picture():
    shown = set(SHOWN.findall((DOCS / "gallery.md").read_text()))
    assert shown == {f"pictures/{path.name}" for path in (DOCS / "pictures").iterdir()}


PUBLIC = [name for name, value in vars(diffaug).items() if str(getattr(value, "__module__", "")).startswith("diffaug.")]


def test_every_kind_of_part_is_public():
    assert {"ForwardProcess", "Cosine", "LogitNormal", "Sobol", "Pyramid", "MinSNR", "convert"} <= set(PUBLIC)
    schedules = {name for name in vars(diffaug.schedules) if name[0].isupper()}
    assert schedules - {"BetaSchedule", "Scaling", "Wrapper"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_documented(name):
    api = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert re.search(rf"^::: diffaug\.[\w.]*\b{name}$", api, re.MULTILINE), f"docs/api shows no {name}"
