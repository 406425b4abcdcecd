"""Laws of the claims: figures decide, ties lose, only equal runs are compared, seeds count."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import pytest

from experiments import verdicts
from lm import report


def run(nats, *, role="finetune", seed=0, params=1_234, folder="runs/x", **scores):
    """An evaluated run of 20 updates on 50 held-out tokens, but for what is given."""
    return report.RunFolder(
        path=pathlib.Path(folder),
        role=role,
        config={"seed": seed},
        manifest={"params": params},
        rows=[],
        scores={"step": 20, "tokens": 50, "nats": nats, **scores},
        samples=[],
    )


@pytest.mark.parametrize(("figure", "holds"), [(4.0, True), (5.0, False), (6.0, False)])
def test_a_loss_holds_only_where_it_is_lower(figure, holds):
    claim = report.Claim("s", "u", True, (0,), (figure,), (5.0,))
    assert claim.holds is holds
    assert claim.verdict == ("holds" if holds else "does not hold")
    assert claim.difference == figure - 5.0


@pytest.mark.parametrize(("figure", "holds"), [(4.0, False), (5.0, False), (6.0, True)])
def test_a_score_holds_only_where_it_is_higher(figure, holds):
    assert report.Claim("s", "u", False, (0,), (figure,), (5.0,)).holds is holds


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_nothing_holds_by_a_figure_that_is_not_finite(odd):
    for lower in (True, False):
        for figures in (((odd,), (1.0,)), ((1.0,), (odd,))):
            assert not report.Claim("s", "u", lower, (0,), *figures).holds


def test_a_claim_over_seeds_goes_by_the_mean_and_counts_the_seeds():
    claim = report.Claim("s", "u", True, (0, 1, 2), (1.0, 4.0, 4.0), (3.5, 3.5, 3.5))
    assert claim.holds
    assert claim.verdict == "holds (in 1 of 3 seeds)"
    lost = report.Claim("s", "u", True, (0, 1, 2), (3.0, 3.0, 9.0), (3.5, 3.5, 3.5))
    assert not lost.holds
    assert lost.verdict == "does not hold (in 2 of 3 seeds)"


def test_means_of_equal_values_in_another_order_tie():
    for lower in (True, False):
        claim = report.Claim("s", "u", lower, (0, 1, 2), (0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
        assert claim.difference == 0
        assert not claim.holds


def test_pretraining_is_judged_by_text_tokens_against_the_unigram_model():
    claim = verdicts.claim_pretraining([run(9.0, text_nats=5.0, unigram_entropy=7.0)])
    assert (claim.figure, claim.baseline, claim.holds) == (5.0, 7.0, True)
    with pytest.raises(ValueError, match=r"json has no unigram_entropy; evaluate that"):
        verdicts.claim_pretraining([run(9.0, text_nats=5.0)])


@pytest.mark.parametrize(
    "claim_of",
    [verdicts.claim_finetuning, verdicts.claim_distillation],
    ids=["finetune", "distill"],
)
def test_two_runs_are_compared_seed_by_seed(claim_of):
    ours = [run(2.5, seed=1, rougeL=30.0), run(2.0, seed=0, rougeL=20.0)]
    theirs = [run(3.0, seed=0, rougeL=20.0), run(2.25, seed=1, rougeL=29.0), run(0.0, seed=2)]
    nats = claim_of(ours, theirs)
    assert (nats.seeds, nats.figures, nats.baselines) == ((1, 0), (2.5, 2.0), (2.25, 3.0))
    assert nats.verdict == "holds (in 1 of 2 seeds)"
    assert "equal updates (20)" in nats.sentence
    rouge = claim_of(ours, theirs, "rougeL")
    assert not rouge.lower_is_better
    assert (rouge.figure, rouge.baseline, rouge.num_seeds_held) == (25.0, 24.5, 1)


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"step": 10}, "runs/b has 20 updates, runs/a 10; make them equal"),
        ({"tokens": 49}, "runs/b has 50 held-out tokens, runs/a 49; make them equal"),
        ({"params": 9_000}, "runs/b has 1,234 parameters, runs/a 9,000; make them equal"),
    ],
)
def test_unequal_runs_are_not_compared(odd, said):
    even, odd = run(2.0, folder="runs/b"), run(3.0, folder="runs/a", **odd)
    for claim_of in (verdicts.claim_finetuning, verdicts.claim_distillation):
        with pytest.raises(ValueError, match=said):
            claim_of([even], [odd])


def test_updates_are_those_evaluated_not_those_planned():
    short = dataclasses.replace(run(2.0), config={"seed": 0, "steps": 10})
    long = dataclasses.replace(run(3.0), config={"seed": 0, "steps": 99})
    assert verdicts.claim_finetuning([short], [long]).holds


def test_runs_without_a_common_seed_are_not_compared():
    with pytest.raises(ValueError, match=r"seeds \[0\] and \[1, 2\] share none"):
        verdicts.claim_finetuning([run(2.0)], [run(3.0, seed=1), run(3.0, seed=2)])


def everything(seeds=(0, 1, 2)):
    more = {"text_nats": 2.0, "unigram_entropy": 3.0, "rougeL": 9.0}
    roles = ("pretrain", "finetune", "scratch", "distill", "alone")
    return [run(2.0, role=role, seed=seed, **more) for role in roles for seed in seeds]


def test_the_demo_makes_each_claim_that_its_runs_decide():
    claims = verdicts.demo_claims(everything())
    compared = ["nats per token", "ROUGE-L"]
    assert [claim.unit for claim in claims] == ["nats per text token", *compared, *compared]
    assert all(claim.seeds == (0, 1, 2) for claim in claims)


def test_the_demo_claims_nothing_of_half_a_comparison():
    halves = [one for one in everything() if one.role in ("finetune", "alone")]
    assert verdicts.demo_claims(halves) == []
    unscored = [dataclasses.replace(one, scores={}) for one in everything()]
    assert verdicts.demo_claims(unscored) == []


def test_the_demo_compares_equals_only():
    runs = [
        *everything(seeds=[0]),
        run(2.0, role="distill", seed=1),
        run(2.0, role="alone", seed=1),
    ]
    runs[-1].scores["step"] = 19
    with pytest.raises(ValueError, match="make them equal"):
        verdicts.demo_claims(runs)
