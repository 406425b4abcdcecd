"""Laws of DecodingConfig and its short form."""

from __future__ import annotations

import dataclasses

import pytest

from lm import decoding

CONFIGS = {
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


@pytest.mark.parametrize("text", CONFIGS)
def test_parse_reads_the_short_form(text):
    assert decoding.parse(text) == decoding.DecodingConfig(**CONFIGS[text])


@pytest.mark.parametrize("text", CONFIGS)
def test_str_of_a_config_is_its_short_form(text):
    config = decoding.parse(text)
    assert decoding.parse(str(config)) == config
    assert set(str(config).split()) <= {
        config.method,
        *(f"{k}={v}" for k, v in CONFIGS[text].items()),
    }


def test_every_option_is_used_by_a_method_and_has_a_short_form():
    fields = [field.name for field in dataclasses.fields(decoding.DecodingConfig)]
    used = {option for options in decoding.METHODS.values() for option in options}
    assert used == set(fields) - {"method"}
    values_by_name = {"length_penalty_kind": "power", "early_stopping": True, "min_length": 1}
    for method, options in decoding.METHODS.items():
        values = {name: values_by_name.get(name, 0.5 if name == "top_p" else 2) for name in options}
        config = decoding.DecodingConfig(method, **values)
        assert decoding.parse(str(config)) == config
        assert len(str(config).split()) == 1 + len(options)


ERRORS = {
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


@pytest.mark.parametrize("text", ERRORS)
def test_a_wrong_short_form_raises_with_value_and_fix(text):
    with pytest.raises(ValueError, match=ERRORS[text]) as error:
        decoding.parse(text)
    assert "\n" not in str(error.value)


def test_an_option_that_the_method_does_not_use_is_refused():
    with pytest.raises(ValueError, match="decoding greedy does not use 'num_beams'"):
        decoding.DecodingConfig(num_beams=8)
    with pytest.raises(ValueError, match="decoding sample does not use 'length_penalty'"):
        dataclasses.replace(decoding.parse("sample"), length_penalty=1.0)


def test_max_tokens_is_max_length_or_else_the_argument():
    assert decoding.parse("greedy").max_tokens(20) == 20
    assert decoding.parse("greedy max_length=7").max_tokens(20) == 7
    assert decoding.parse("greedy min_length=20").max_tokens(20) == 20
    with pytest.raises(ValueError, match="min_length=21 is more than the 20 tokens of an answer"):
        decoding.parse("greedy min_length=21").max_tokens(20)
