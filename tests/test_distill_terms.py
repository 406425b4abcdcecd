"""Laws of the section teacher.loss: each option sets its field, and errors name the fix."""

from __future__ import annotations

import math

import pytest

from lm import distill
from lm.distill import terms


def test_the_default_is_hintons_mixture():
    labels, soft = distill.TeacherConfig().terms
    assert (labels.name, labels.weight, labels.final_weight) == ("labels", 0.2, None)
    assert (soft.name, soft.weight, soft.temperature) == ("forward_kl", 0.8, 2.0)


def test_every_term_can_stand_alone_and_is_then_as_the_record_says():
    for name in terms.TERMS:
        assert distill.loss_terms({name: {}}) == (terms.Term(name),)
        assert distill.loss_terms({name: {"weight": 1}}) == (terms.Term(name),)


def test_the_order_of_the_terms_is_that_of_the_table():
    loss = {name: {} for name in reversed(terms.TERMS)}
    assert [term.name for term in distill.loss_terms(loss)] == list(terms.TERMS)


@pytest.mark.parametrize(
    "name, options",
    [
        ("jsd", {"beta": 0.25, "temperature": 3.0}),
        ("reverse_kl", {"weight": 1.0, "final_weight": 0.5}),
        ("hidden", {"distance": "cosine"}),
        ("hidden", {"encoder": (1, 3, 5), "decoder": "none"}),
        ("hidden", {"decoder": ((2, 6), (4, 12))}),
        ("attention", {"encoder": "all", "decoder": "even"}),
        ("relations", {"vectors": "qk", "heads": 12}),
    ],
)
def test_an_option_sets_its_field_and_no_other(name, options):
    assert distill.loss_terms({name: options}) == (terms.Term(name, **options),)


def test_lists_of_json_are_tuples():
    (term,) = distill.loss_terms({"hidden": {"encoder": [[2, 6], [4, 12]], "decoder": [1]}})
    assert (term.encoder, term.decoder) == (((2, 6), (4, 12)), (1,))


@pytest.mark.parametrize(
    "loss, sentence",
    [
        ("labels", "teacher.loss='labels' is for a whole section; write {term: "),
        ({}, "teacher.loss has no term with a weight above 0; give one a weight"),
        ({"forwrd_kl": {}}, "teacher.loss='forwrd_kl' is unknown; .*did you mean 'forward_kl'?"),
        ({"labels": 0.5}, "teacher.loss.labels=0.5 is for a whole section; set weight"),
        (
            {"labels": {"temperature": 2}},
            "labels does not use 'temperature'; its options are weight",
        ),
        ({"jsd": {"temprature": 2}}, "does not use 'temprature'; .*did you mean 'temperature'?"),
        ({"labels": {"weight": "x"}}, "teacher.loss.labels.weight='x' is not a number; write one"),
        ({"labels": {"weight": -1}}, "labels.weight=-1 is out of bounds; use 0 to 1e+06"),
        ({"labels": {"final_weight": math.nan}}, "labels.final_weight=nan is out of bounds"),
        ({"labels": {"weight": math.inf}}, "labels.weight=inf is out of bounds"),
        (
            {"labels": {"weight": 0}, "jsd": {"weight": 0, "final_weight": 0}},
            "no term with a weight",
        ),
        ({"forward_kl": {"temperature": 0}}, "temperature=0 is out of bounds; use 0.01 to 1000"),
        ({"jsd": {"beta": 1}}, "jsd.beta=1 is out of bounds; use 0.001 to 0.999, or .*reverse_kl"),
        ({"relations": {"heads": -1}}, "relations.heads=-1 is out of bounds; use 0 to 4096"),
        (
            {"relations": {"vectors": "vq"}},
            "relations.vectors='vq' is unknown; write qkv, or fewer",
        ),
        ({"relations": {"vectors": ""}}, "relations.vectors='' is unknown; write qkv, or fewer"),
        ({"hidden": {"distance": "l1"}}, "hidden.distance='l1' is unknown; choose one of"),
        (
            {"hidden": {"decoder": "first"}},
            "hidden.decoder='first' is unknown; choose one of all, ",
        ),
        ({"hidden": {"encoder": ()}}, "hidden.encoder=() are no layers; write them as"),
        ({"hidden": {"encoder": ((1, 2, 3),)}}, "are no layers; write them as"),
    ],
)
def test_an_invalid_term_is_rejected_with_value_bound_and_fix(loss, sentence):
    pattern = sentence.replace("+", r"\+").replace("()", r"\(\)")
    with pytest.raises(ValueError, match=pattern) as raised:
        distill.loss_terms(loss)
    assert "\n" not in str(raised.value)


def test_a_cache_serves_what_depends_on_the_teachers_likeliest_ids_alone():
    assert (
        distill.uncached(
            distill.loss_terms({"labels": {}, "forward_kl": {}, "reverse_kl": {}, "jsd": {}})
        )
        == []
    )
    text = {
        "labels": {},
        "logit_mse": {},
        "hidden": {},
        "attention": {},
        "relations": {},
        "policy": {},
    }
    assert distill.uncached(distill.loss_terms(text)) == list(text)[1:]
