"""Laws of the words for a student's loss: each says one thing, and a slip is a sentence."""

from __future__ import annotations

import pytest

from lm import distill
from lm.distill import terms


def test_the_default_is_hintons_mixture():
    labels, soft = distill.parse("labels weight=0.2, forward_kl weight=0.8 temperature=2")
    assert (labels.name, labels.weight) == ("labels", (0.2, 0.2))
    assert (soft.name, soft.weight, soft.temperature) == ("forward_kl", (0.8, 0.8), 2.0)


@pytest.mark.parametrize("text", [name for name in terms.OPTIONS])
def test_every_term_can_stand_alone_and_is_then_as_the_record_says(text):
    assert distill.parse(text) == (terms.Term(text),)
    assert distill.parse(f" {text}  weight=1 ") == (terms.Term(text),)


@pytest.mark.parametrize(
    "text, fields",
    [
        ("jsd beta=0.25 temperature=3", {"beta": 0.25, "temperature": 3.0}),
        ("reverse_kl weight=1:0.5", {"weight": (1.0, 0.5)}),
        ("reverse_kl weight=0:2", {"weight": (0.0, 2.0)}),
        ("hidden distance=cosine", {"distance": "cosine"}),
        ("hidden encoder=1-3-5 decoder=none", {"encoder": "1-3-5", "decoder": "none"}),
        ("attention encoder=all decoder=even", {"encoder": "all", "decoder": "even"}),
        ("relations of=qk heads=12", {"of": "qk", "heads": 12}),
    ],
)
def test_an_option_sets_its_field_and_no_other(text, fields):
    assert distill.parse(text) == (terms.Term(text.split()[0], **fields),)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "teacher.loss='' is unknown; choose one of"),
        ("labels,", "teacher.loss='' is unknown; choose one of"),
        ("forwrd_kl", "teacher.loss='forwrd_kl' is unknown; .*did you mean 'forward_kl'?"),
        ("labels temperature=2", "labels has no use for 'temperature'; it takes weight"),
        ("jsd temprature=2", "jsd has no use for 'temprature'; .*did you mean 'temperature'?"),
        ("logit_mse weight=1 weight=2", "logit_mse says weight twice; say it once"),
        ("jsd, labels, jsd beta=0.1", "says jsd twice; say it once"),
        ("labels weight=", "labels weight='' is not a number, or two as 1:0.5; write one"),
        ("labels weight=1:x", "labels weight='1:x' is not a number"),
        ("labels weight=1:2:3", "labels weight='1:2:3' is not a number"),
        ("labels weight=-1", "labels weight=-1 is out of bounds; use 0 to 1e+06"),
        ("labels weight=1:nan", "labels weight=nan is out of bounds"),
        ("labels weight=inf", "labels weight=inf is out of bounds"),
        ("labels weight=0, jsd weight=0:0", "has no weight but 0; give one term more"),
        ("forward_kl temperature=0", "temperature=0 is out of bounds; use 0.01 to 1000"),
        ("jsd beta=1", "jsd beta=1 is out of bounds; use 0.001 to 0.999, or .*reverse_kl"),
        ("jsd beta", "jsd beta='' is not a number; write one"),
        ("relations heads=2.5", "relations heads='2.5' is not a whole number; write one"),
        ("relations heads=-1", "relations heads=-1 is out of bounds; use 0 to 4096"),
        ("relations of=vq", "relations of='vq' is unknown; write qkv, or fewer"),
        ("relations of=", "relations of='' is unknown; write qkv, or fewer"),
        ("hidden distance=l1", "hidden distance='l1' is unknown; write mse or cosine"),
        ("hidden encoder=1,3", "teacher.loss='3' is unknown"),
        ("hidden decoder=first", "hidden decoder='first' is unknown; write last, all, even"),
    ],
)
def test_a_slip_is_one_sentence_with_the_value_the_bound_and_the_cure(text, sentence):
    with pytest.raises(ValueError, match=sentence.replace("+", r"\+")) as raised:
        distill.parse(text)
    assert "\n" not in str(raised.value)


def test_a_cache_serves_what_depends_on_the_teachers_likeliest_ids_alone():
    assert distill.uncached(distill.parse("labels, forward_kl, reverse_kl, jsd")) == []
    text = "labels, logit_mse, hidden, attention, relations, policy"
    assert distill.uncached(distill.parse(text)) == text.split(", ")[1:]
