"""The two laws of buckets, and whole batches of one shape: kept by diffaug's order, and by none of the rival rules."""

import sys
from functools import cache

import pytest
from shared import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import buckets

RIVALS = {  # what each fails in with one rank, and what comes to it with two
    "kohya-ss sd-scripts": ({"short batches"}, {"uneven visits", "mixed shapes"}),
    "diffusers": ({"lost samples", "uneven visits", "wrong shares"}, {"mixed shapes"}),
    "SimpleTuner": ({"uneven visits", "wrong shares"}, set()),
    "OneTrainer": ({"lost samples", "uneven visits", "wrong shares"}, set()),
    "diffusion-pipe": ({"lost samples", "uneven visits", "wrong shares"}, set()),
    "Open-Sora": ({"lost samples", "uneven visits", "wrong shares"}, {"mixed shapes"}),
    "NeMo Automodel": ({"lost samples", "uneven visits", "wrong shares"}, set()),
}

measure = cache(buckets.measure)


def faults(name: str, size: int, ranks: int) -> set[str]:
    count = measure(buckets.RULES[name][0], size, ranks)
    found = {
        "lost samples": count.never,
        "uneven visits": count.apart > 1,
        "wrong shares": count.off >= size,
        "short batches": count.short,
        "mixed shapes": count.mixed,
    }
    return {fault for fault, there in found.items() if there}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [4, 24])
def test_diffaug_keeps_the_laws(size, ranks):
    assert faults("diffaug", size, ranks) == set()


@pytest.mark.parametrize("size", [4, 24])
@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_breaks_a_law(name, size):
    """Each in its own way, and in no other where there is one rank."""
    alone, more = RIVALS[name]
    assert faults(name, size, 1) == alone
    assert faults(name, size, 2) >= alone | more


def test_every_rule_is_tried():
    assert buckets.RULES.keys() == {*RIVALS, "diffaug"}


@pytest.mark.parametrize("name", ["diffaug", "OneTrainer", "diffusion-pipe"])
def test_two_ranks_share_the_steps_of_one(name):
    rule = buckets.RULES[name][0]
    assert measure(rule, 24, 1).seen == measure(rule, 24, 2).seen


def test_a_step_is_counted_as_what_it_is():
    """By a rule of four steps: the second is short, the third of two shapes, and only (0, 0) comes in the last."""

    def rule(*of_run):
        a, b = (0, 0), (1, 0)
        yield [[[b], [(1, 1)]], [[b]], [[a], [(2, 0)]], [[a], [a]]]

    count = buckets.measure(rule, 2, 2, epochs=1)  # buckets of 1, 3, 1, 2 and 27 samples
    assert (count.samples, count.steps, count.short, count.mixed) == (34, 4, 1, 1)
    assert count.never == 34 - 4
    assert count.apart == 2
    assert count.off == pytest.approx(7 * 27 / 34)


def test_the_page_shows_the_table(monkeypatch):
    monkeypatch.setattr(buckets, "measure", measure)
    page = (ROOT / "docs" / "buckets.md").read_text()
    assert "\n".join(buckets.tell(24)) in page, "docs/buckets.md: print the table by benchmarks/buckets.py"
    assert f"After {buckets.enough_epochs(24)} epochs" in page
