"""Laws of the one lookup: it finds what is there, and says what is there when it does not."""

from __future__ import annotations

import pytest

from lm import lookup

TABLE = {"span_corruption": 1, "mass": 2, "prefix_lm": 3}


@pytest.mark.parametrize("name", TABLE)
def test_a_known_name_gives_its_entry(name):
    assert lookup.lookup(TABLE, name, "objective.name") == TABLE[name]


def test_an_entry_that_is_false_is_found_too():
    assert lookup.lookup({"off": None}, "off", "what") is None


def test_the_error_names_key_value_choices_in_order_and_the_nearest():
    with pytest.raises(ValueError) as error:
        lookup.lookup(TABLE, "spam_corruption", "objective.name")
    assert str(error.value) == (
        "objective.name='spam_corruption' is unknown; choose one of mass, prefix_lm, "
        "span_corruption; did you mean 'span_corruption'?"
    )


def test_nothing_is_suggested_where_nothing_is_alike():
    with pytest.raises(ValueError, match="mass, prefix_lm, span_corruption.$"):
        lookup.lookup(TABLE, "zzz", "objective.name")
    assert lookup.nearest("zzz", TABLE) == ""


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("slip", [lambda n: n[1:], lambda n: n[:-1], lambda n: n + "s", str.title])
def test_one_slip_of_the_finger_is_traced_back_to_its_name(name, slip):
    assert lookup.nearest(slip(name), TABLE) == f"; did you mean {name!r}?"


def test_a_value_of_another_type_is_an_error_of_the_same_kind():
    with pytest.raises(ValueError, match="objective.name=3 is unknown; choose one of mass"):
        lookup.lookup(TABLE, 3, "objective.name")
