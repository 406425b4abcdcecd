"""Laws of lookup: it returns the entry, or raises an error that lists the choices."""

from __future__ import annotations

import pytest

from lm import lookup

TABLE = {"span_corruption": 1, "mass": 2, "prefix_lm": 3}


@pytest.mark.parametrize("name", TABLE)
def test_lookup_returns_the_entry(name):
    assert lookup.lookup(TABLE, name, "objective.name") == TABLE[name]


def test_lookup_returns_a_falsy_entry():
    assert lookup.lookup({"off": None}, "off", "what") is None


def test_the_error_names_key_value_choices_in_order_and_the_nearest():
    with pytest.raises(ValueError) as error:
        lookup.lookup(TABLE, "spam_corruption", "objective.name")
    assert str(error.value) == (
        "objective.name='spam_corruption' is unknown; choose one of mass, prefix_lm, "
        "span_corruption; did you mean 'span_corruption'?"
    )


def test_no_hint_without_a_similar_name():
    with pytest.raises(ValueError, match="mass, prefix_lm, span_corruption.$"):
        lookup.lookup(TABLE, "zzz", "objective.name")
    assert lookup.nearest("zzz", TABLE) == ""


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("slip", [lambda n: n[1:], lambda n: n[:-1], lambda n: n + "s", str.title])
def test_a_typo_hints_at_the_name(name, slip):
    assert lookup.nearest(slip(name), TABLE) == f"; did you mean {name!r}?"


def test_a_value_of_another_type_is_the_same_error():
    with pytest.raises(ValueError, match="objective.name=3 is unknown; choose one of mass"):
        lookup.lookup(TABLE, 3, "objective.name")
