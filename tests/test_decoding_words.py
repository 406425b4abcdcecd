"""Laws of the words that say how to decode."""

from __future__ import annotations

import dataclasses

import pytest

from lm import decoding

SAID = {
    "greedy": {},
    "  beam   num_beams=4  length_penalty=1 ": {
        "method": "beam", "num_beams": 4, "length_penalty": 1.0,
    },
    "beam num_beams=2 length_penalty=0.0 length_penalty_kind=power early_stopping=True "
    "num_return_sequences=2": {
        "method": "beam", "num_beams": 2, "length_penalty": 0.0, "length_penalty_kind": "power",
        "early_stopping": True, "num_return_sequences": 2
    },
    "sample temperature=0.8 top_k=40 top_p=0.9": {
        "method": "sample", "temperature": 0.8, "top_k": 40, "top_p": 0.9
    },
    "sample num_return_sequences=8": {"method": "sample", "num_return_sequences": 8},
    "greedy repetition_penalty=1.2 min_length=5 max_length=64": {
        "repetition_penalty": 1.2, "min_length": 5, "max_length": 64
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
    other = {"length_penalty_kind": "power", "early_stopping": True, "min_length": 1}
    for method, options in decoding.METHODS.items():
        values = {name: other.get(name, 0.5 if name == "top_p" else 2) for name in options}
        how = decoding.DecodingConfig(method, **values)
        assert decoding.parse(str(how)) == how
        assert len(str(how).split()) == 1 + len(options)


REFUSED = {
    "": "decoding='' is unknown; choose one of beam, greedy, sample.",
    "beem num_beams=4": "decoding='beem' is unknown; choose one of .*; did you mean 'beam'",
    "beam widht=4": "decoding beam does not use 'widht'; its options are",
    "beam 4": "decoding beam does not use '4'; its options are num_beams",
    "greedy num_beams=4": "decoding greedy does not use 'num_beams'; its options are repetition",
    "greedy num_return_sequences=2": "decoding greedy does not use 'num_return_sequences'",
    "beam temperature=1.0": "decoding beam does not use 'temperature'",
    "sample length_penalty=0.6": "decoding sample does not use 'length_penalty'",
    "greedy method=beam": "decoding greedy does not use 'method'",
    "beam num_beams=four": "decoding num_beams='four' is not a whole number; write one.",
    "beam num_beams=2.5": "decoding num_beams='2.5' is not a whole number",
    "beam length_penalty=": "decoding length_penalty='' is not a number",
    "beam num_beams=4 num_beams=5": (
        "decoding 'beam num_beams=4 num_beams=5' has num_beams twice; give it once."
    ),
    "beam num_beams=0": "decoding num_beams=0 is out of bounds; use 1 to 1000.",
    "beam length_penalty_kind=gogle": (
        "decoding length_penalty_kind='gogle' is unknown; choose one of google, power"
    ),
    "beam early_stopping=yes": (
        "decoding early_stopping='yes' is unknown; choose one of False, True"
    ),
    "beam length_penalty=nan": "decoding length_penalty=nan is out of bounds",
    "sample temperature=0": "decoding temperature=0.0 is out of bounds; use 0.001 to",
    "sample temperature=inf": "decoding temperature=inf is out of bounds",
    "sample top_k=-1": "decoding top_k=-1 is out of bounds; use 0 to",
    "sample top_p=0": "decoding top_p=0.0 is out of bounds",
    "sample top_p=1.1": "decoding top_p=1.1 is out of bounds; use 1e-06 to 1.0.",
    "greedy repetition_penalty=0": (
        "decoding repetition_penalty=0.0 is out of bounds; use 0.01 to 100.0"
    ),
    "beam num_beams=2 num_return_sequences=3": (
        "decoding num_return_sequences=3 is more than num_beams=2; use at most that."
    ),
    "sample num_return_sequences=0": (
        "decoding num_return_sequences=0 is out of bounds; use 1 to 1000."
    ),
    "greedy min_length=5 max_length=4": "min_length=5 is more than the 4 tokens of an answer",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match=REFUSED[text]) as refused:
        decoding.parse(text)
    assert "\n" not in str(refused.value)


def test_what_a_method_has_no_use_for_is_refused_however_it_is_built():
    with pytest.raises(ValueError, match="decoding greedy does not use 'num_beams'"):
        decoding.DecodingConfig(num_beams=8)
    with pytest.raises(ValueError, match="decoding sample does not use 'length_penalty'"):
        dataclasses.replace(decoding.parse("sample"), length_penalty=1.0)


def test_an_answer_has_the_room_that_the_words_or_else_the_caller_gives():
    assert decoding.parse("greedy").max_tokens(20) == 20
    assert decoding.parse("greedy max_length=7").max_tokens(20) == 7
    assert decoding.parse("greedy min_length=20").max_tokens(20) == 20
    with pytest.raises(ValueError, match="min_length=21 is more than the 20 tokens of an answer"):
        decoding.parse("greedy min_length=21").max_tokens(20)
