"""Laws of the words that say how to decode."""

from __future__ import annotations

import dataclasses

import pytest

from lm import decoding

SAID = {
    "greedy": {},
    "  beam   width=4  alpha=1 ": {"method": "beam", "width": 4, "alpha": 1.0},
    "beam width=2 alpha=0.0 penalty=power stop=full n_best=2": {
        "method": "beam", "width": 2, "alpha": 0.0, "penalty": "power", "stop": "full", "n_best": 2
    },
    "sample temperature=0.8 top_k=40 top_p=0.9": {
        "method": "sample", "temperature": 0.8, "top_k": 40, "top_p": 0.9
    },
    "sample n_best=8": {"method": "sample", "n_best": 8},
    "greedy repetition=1.2 min_length=5 max_length=64": {
        "repetition": 1.2, "min_length": 5, "max_length": 64
    },
    "sample temperature=1e-3 top_p=0.30000000000000004": {
        "method": "sample", "temperature": 0.001, "top_p": 0.1 + 0.2
    },
}  # fmt: skip


@pytest.mark.parametrize("text", SAID)
def test_words_say_the_decoding_they_spell(text):
    assert decoding.parse(text) == decoding.DecodingConfig(**SAID[text])


@pytest.mark.parametrize("text", SAID)
def test_a_decoding_spells_the_words_that_say_it(text):
    how = decoding.parse(text)
    assert decoding.parse(str(how)) == how
    assert set(str(how).split()) <= {how.method, *(f"{k}={v}" for k, v in SAID[text].items())}


def test_every_option_is_of_use_to_a_method_and_is_spelt():
    fields = [field.name for field in dataclasses.fields(decoding.DecodingConfig)]
    used = {option for options in decoding.METHODS.values() for option in options}
    assert used == set(fields) - {"method"}
    other = {"penalty": "power", "stop": "full", "min_length": 1}
    for method, options in decoding.METHODS.items():
        values = {name: other.get(name, 0.5 if name == "top_p" else 2) for name in options}
        how = decoding.DecodingConfig(method, **values)
        assert decoding.parse(str(how)) == how
        assert len(str(how).split()) == 1 + len(options)


REFUSED = {
    "": "decoding='' is unknown; choose one of beam, greedy, sample.",
    "beem width=4": "decoding='beem' is unknown; choose one of .*; did you mean 'beam'",
    "beam widht=4": "decoding beam has no use for 'widht'; it takes .*; did you mean 'width'",
    "beam 4": "decoding beam has no use for '4'; it takes width",
    "greedy width=4": "decoding greedy has no use for 'width'; it takes repetition",
    "greedy n_best=2": "decoding greedy has no use for 'n_best'",
    "beam temperature=1.0": "decoding beam has no use for 'temperature'",
    "sample alpha=0.6": "decoding sample has no use for 'alpha'",
    "greedy method=beam": "decoding greedy has no use for 'method'",
    "beam width=four": "decoding width='four' is not a whole number; write one.",
    "beam width=2.5": "decoding width='2.5' is not a whole number",
    "beam alpha=": "decoding alpha='' is not a number",
    "beam width=4 width=5": "decoding 'beam width=4 width=5' says width twice; say it once.",
    "beam width=0": "decoding width=0 is out of bounds; use 1 to 1000.",
    "beam penalty=gogle": "decoding penalty='gogle' is unknown; choose one of google, power",
    "beam stop=early": "decoding stop='early' is unknown; choose one of bound, full",
    "beam alpha=nan": "decoding alpha=nan is out of bounds",
    "sample temperature=0": "decoding temperature=0.0 is out of bounds; use 0.001 to",
    "sample temperature=inf": "decoding temperature=inf is out of bounds",
    "sample top_k=-1": "decoding top_k=-1 is out of bounds; use 0 to",
    "sample top_p=0": "decoding top_p=0.0 is out of bounds",
    "sample top_p=1.1": "decoding top_p=1.1 is out of bounds; use 1e-06 to 1.0.",
    "greedy repetition=0": "decoding repetition=0.0 is out of bounds; use 0.01 to 100.0",
    "beam width=2 n_best=3": "decoding n_best=3 is more than width=2, .*; use at most that.",
    "sample n_best=0": "decoding n_best=0 is out of bounds; use 1 to 1000.",
    "greedy min_length=5 max_length=4": "min_length=5 is more than the 4 tokens of an answer",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match=REFUSED[text]) as refused:
        decoding.parse(text)
    assert "\n" not in str(refused.value)


def test_what_a_method_has_no_use_for_is_refused_however_it_is_built():
    with pytest.raises(ValueError, match="decoding greedy has no use for 'width'"):
        decoding.DecodingConfig(width=8)
    with pytest.raises(ValueError, match="decoding sample has no use for 'alpha'"):
        dataclasses.replace(decoding.parse("sample"), alpha=1.0)


def test_an_answer_has_the_room_that_the_words_or_else_the_caller_gives():
    assert decoding.parse("greedy").room(20) == 20
    assert decoding.parse("greedy max_length=7").room(20) == 7
    assert decoding.parse("greedy min_length=20").room(20) == 20
    with pytest.raises(ValueError, match="min_length=21 is more than the 20 tokens of an answer"):
        decoding.parse("greedy min_length=21").room(20)
