"""What the config groups make: values whose fields are all that they are, and are refused by their keys."""

import dataclasses
import inspect
import math
import re
from typing import Any

import pytest
from shared import CONFIGS, names, part

from diffaug import noise, schedules, targets, times

KEYS = {"schedule": "schedule", "times": "times", "coverage": "coverage", "noise": "noise", "weight": "weight"}
KEYS |= {"pair": "pair", "part_law": "process.parts.law", "parts": "process.parts"}
"""The groups, and by which key an error names each one's fields."""
MADE = [(f"{group}={name}", part(group, name), key) for group, key in KEYS.items() for name in names(group)]
MADE += [(f"coverage={name}", part("coverage", name), "coverage") for name in ("Grid", "Fixed")]
MADE = [(name, value, key) for name, value, key in MADE if dataclasses.is_dataclass(value)]  # pair=none is none
LAWS = [(f"the law of {name}", value.times, "pair.times") for name, value, _ in MADE if name.startswith("pair=")]
VALUES = {name: (value, key) for name, value, key in (*MADE, *LAWS)}
FREE = {"LogitNormal.mean", "LogNormal.mean", "SplitLogNormal.mode", "LaplaceLogSNR.mean"}
"""Numbers without a range, which any finite value fits: the mean of a density that has no edge."""
NAMES = {name: kind for room in (noise, schedules, targets, times) for name, kind in vars(room).items()}

of_every_group = pytest.mark.parametrize(("value", "key"), VALUES.values(), ids=VALUES)


BASES = {"schedule": schedules.Schedule, "times": times.Times, "coverage": times.Coverage, "noise": noise.Noise}
BASES |= {"weight": targets.Weight, "part_law": times.PartLaw, "the law of pair": times.PairTimes}


@pytest.mark.parametrize("group", BASES)
def test_every_class_has_a_file(group: str) -> None:
    """And every public class is of a group, so that all laws of the groups are laws of the classes."""
    kinds = {kind for kind in NAMES.values() if isinstance(kind, type) and issubclass(kind, BASES[group])}
    kinds = {kind for kind in kinds if not inspect.isabstract(kind)} - {schedules.Schedule, schedules.Wrapper}
    assert kinds == {type(value) for name, (value, _) in VALUES.items() if name.startswith(f"{group}=")}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in KEYS for name in names(group)])
def test_every_field_is_in_its_file(group: str, name: str) -> None:
    text = (CONFIGS / group / f"{name}.yaml").read_text()
    value = part(group, name)
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        left_out = not field.init or (name == "sd3" and field.name in ("image", "base_image"))  # it has a factor
        assert left_out or field.name in text, field.name


def with_field(value: Any, name: str, changed: Any) -> Any:
    """The value with one field changed; or the error that refuses it, as text."""
    try:
        return dataclasses.replace(value, **{name: changed})
    except ValueError as error:
        return str(error)


@of_every_group
def test_equal_fields_are_equal_values(value: Any, key: str) -> None:
    again = dataclasses.replace(value)
    assert again is not value
    assert again == value
    assert hash(again) == hash(value)
    assert eval(repr(value), NAMES) == value
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.other = 7
    for field in dataclasses.fields(value):
        if isinstance(own := getattr(value, field.name), float):
            assert with_field(value, field.name, own * (1 - 2e-9) + 1e-12) != value


def wrong_values(value: Any, field: dataclasses.Field[Any]) -> list[Any]:
    own, annotation = getattr(value, field.name), str(field.type)
    if isinstance(own, tuple):
        return ["abc.txt", math.nan, [math.nan], ["abc"], [], [0.5, math.inf], [-0.5], [True]]
    if isinstance(own, str):
        return ["abc", 0 if own == "auto" else 3, None]
    if not isinstance(own, (int, float)) and "int" not in annotation and "float" not in annotation:
        return ["abc", 3]  # another value
    wrong = ["abc", math.nan, math.inf, [], {}]
    if isinstance(own, bool):
        return wrong
    largest = 10**12 if isinstance(own, int) else 1e300
    outside = [x for x in (-largest, largest) if f".{field.name}" in str(with_field(value, field.name, x))]
    assert outside or f"{type(value).__name__}.{field.name}" in FREE, f"{field.name} takes any number, however large"
    return [*wrong, True, *(outside if own is not None else [-largest])]


@of_every_group
def test_bad_fields_are_refused_by_key_value_and_range(value: Any, key: str) -> None:
    wanted = r"in [\[(].+, ?.*[\])]|>=? \d|(at most|less than) \w+\.|one of|a finite number|true or false|a list of "
    wanted += r"|some of the density|object|a schedule|a (Part)?[lL]aw"
    for field in dataclasses.fields(value):
        for wrong in wrong_values(value, field) if field.init and key != "process.parts" else ():
            message = with_field(value, field.name, wrong)
            assert isinstance(message, str), (field.name, wrong)
            assert f"{key}.{field.name}" in message, message
            if wrong == "abc.txt":
                assert "there is no such file" in message
                continue
            shown = wrong[-1] if isinstance(wrong, list) and wrong else wrong
            assert repr(shown) in message or shown in ([], {}), message
            assert re.search(wanted, message), message


@of_every_group
def test_fields_in_the_wrong_order_are_refused(value: Any, key: str) -> None:
    """Those that another field bounds: a beginning beyond its end."""
    for field in dataclasses.fields(value):
        for bound, words in (("below", "less than"), ("at_most", "at most")):
            other = field.metadata.get(bound)
            if not isinstance(other, str) or (end := getattr(value, other)) is None:
                continue
            beyond = end if bound == "below" else end + 1 if isinstance(end, int) else math.nextafter(end, math.inf)
            message = with_field(value, field.name, beyond)
            assert message.startswith(f"{key}.{field.name} must be {words} {key}.{other}, {end}, but got {beyond} ("), (
                message
            )
