"""Laws of every objective: the inverse, the lengths, what is written and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from rouge_score import rouge_scorer

from lm import objectives
from tests.objective_cases import (  # noqa: F401
    EOS,
    EVERY,
    MASK,
    NUM_SENTINELS,
    PIECES,
    SENTINEL,
    SENTINELS,
    SPAN,
    VOCABULARY,
    WORDS,
    config_of,
    every_word,
    name_of,
    rng_of,
)

FORGETFUL = [keys for keys in EVERY if keys["name"] == "drop"]
FORGETFUL += [k for k in EVERY if k["target"] == "hidden" and k["replacement"] != "mask"]


def corrupt(config, tokens, rng):
    return objectives.corrupt(config, tokens, rng, VOCABULARY)


def restore(config, inputs, targets, hidden=None):
    return objectives.restore(config, inputs, targets, VOCABULARY, hidden)


def cases(keys, count, longest, seed=0):
    """(config, tokens, seed of the corruption): any text, short ones too, any share and span."""
    rng = rng_of(seed)
    for case in range(count):
        length = 2 + case // 6 if case < 120 else int(rng.integers(2, longest))
        tokens = rng.integers(2, PIECES, length)
        if case % 3 == 0:  # few different tokens, many sentence ends
            tokens = 2 + tokens % 20
        tokens[rng.integers(length)] = PIECES - 1  # the piece below the sentinels
        yield config_of(rng.uniform(0.001, 0.999), rng.uniform(1, 12), **keys), tokens, case


# The inverse. --------------------------------------------------------------------------------


@every_word
def test_filling_the_blanks_restores_the_text(keys):
    for config, tokens, seed in cases(keys, 1000, 400):
        inputs, targets = corrupt(config, tokens, rng_of(seed))
        hidden = None
        if keys in FORGETFUL:
            hidden = objectives.noise_mask(config, tokens, rng_of(seed), VOCABULARY)
        text = restore(config, inputs, targets, hidden)
        assert text.dtype == np.int32 and text.tolist() == tokens.tolist()


@every_word
def test_what_is_hidden_is_what_is_asked_for(keys):
    for config, tokens, seed in cases(keys, 150, 200):
        _, targets = corrupt(config, tokens, rng_of(seed))
        hidden = objectives.noise_mask(config, tokens, rng_of(seed), VOCABULARY)
        assert hidden.dtype == bool and hidden.shape == tokens.shape
        asked = targets[:-1][targets[:-1] < PIECES]
        whole = config.target == "whole"
        np.testing.assert_array_equal(asked, tokens if whole else tokens[hidden])


@pytest.mark.parametrize("keys", FORGETFUL, ids=name_of)
def test_what_is_not_written_down_is_asked_for_in_a_sentence(keys):
    config, tokens = config_of(**keys), np.arange(2, 50)
    halves = corrupt(config, tokens, rng_of(0))
    with pytest.raises(ValueError, match="does not write down which tokens .*hidden=objectives"):
        restore(config, *halves)
    hidden = objectives.noise_mask(config, tokens, rng_of(0), VOCABULARY)
    with pytest.raises(ValueError, match="are not those of a text of 49, of which 7 are hidden"):
        restore(config, *halves, np.append(hidden, False))


def test_a_blank_without_an_answer_stays_and_an_answer_without_a_blank_is_left_out():
    s0, s1, s2 = SENTINEL, SENTINEL - 1, SENTINEL - 2
    inputs = [10, s0, 11, s1, EOS, 0, 0]
    for name in (SPAN, "iid_replace"):
        spans = config_of(name=name)
        assert restore(spans, inputs, [s0, 5, 6, s2, 7, EOS]).tolist() == [10, 5, 6, 11, s1]
        assert restore(spans, inputs, [7, 7]).tolist() == [10, s0, 11, s1]
        assert restore(spans, inputs, []).tolist() == [10, s0, 11, s1]
    for name in (MASK, "mass"):
        masks = config_of(name=name)
        assert restore(masks, [10, s0, 11, s0, EOS], [5, EOS]).tolist() == [10, 5, 11, s0]
        assert restore(masks, [10, s0, EOS], [5, 6, EOS]).tolist() == [10, 5]
    gaps = config_of(name="gap_sentences")  # here 20 and 30 end sentences
    assert restore(gaps, [s0, 9, s0, EOS], [8, 20, EOS]).tolist() == [8, 20, 9, s0]
    assert restore(gaps, [s0, 9, EOS], [8, 20, 7, 30, EOS]).tolist() == [8, 20, 9]
    assert restore(gaps, [s0, 9, EOS], []).tolist() == [s0, 9]
    drop, hidden = config_of(name="drop"), np.array([True, False, True])
    assert restore(drop, [9, EOS], [5], hidden).tolist() == [5, 9, s0]
    assert restore(drop, [9, EOS], [5, 6, 7], hidden).tolist() == [5, 9, 6]


# What is written. ----------------------------------------------------------------------------


@every_word
def test_both_halves_are_int32_within_the_lengths_and_end_with_their_only_eos(keys):
    exact = keys["name"] in (MASK, "mass", "drop", "language_model", "deshuffling")
    exact |= keys["placement"] in ("t5", "end") and keys["name"] != "ul2"
    for config, tokens, seed in cases(keys, 300, 300, seed=1):
        said = objectives.OBJECTIVES[config.name].lengths(config, len(tokens))
        for part, most in zip(corrupt(config, tokens, rng_of(seed)), said[1:3], strict=True):
            assert part.dtype == np.int32 and len(part) <= most
            assert not exact or len(part) == most
            assert np.flatnonzero(part == EOS).tolist() == [len(part) - 1]
            assert len(np.unique(part[part >= PIECES])) <= said.sentinels


@every_word
def test_the_lengths_are_reached_by_some_example(keys):
    # 2 of 8 are hidden, a span of 2; of sentences, the first and the last are single tokens.
    config, tokens = config_of(0.25, 2.0, **keys), np.array([20, 11, 12, 13, 14, 15, 20, 11])
    halves = np.array([list(map(len, corrupt(config, tokens, rng_of(s)))) for s in range(300)])
    assert halves.max(axis=0).tolist() == list(
        objectives.OBJECTIVES[keys["name"]].lengths(config, 8)[1:3]
    )


@every_word
def test_the_same_generator_gives_the_same_example_and_the_callers_tokens_stay(keys):
    config, tokens = config_of(**keys), np.arange(2, 200, dtype=np.int32)
    first, again = (corrupt(config, tokens, rng_of(7)) for _ in range(2))
    others = [corrupt(config, tokens, rng_of(seed)) for seed in range(20)]
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(tokens, np.arange(2, 200))
    certain = keys["name"] == "language_model" or keys["placement"] in ("end", "lead", "principal")
    assert (len({inputs.tobytes() for inputs, _ in others}) == 1) == certain


@pytest.mark.parametrize("keys", [k for k in EVERY if k["name"] in (SPAN, "iid_replace")])
def test_sentinels_come_in_order_and_none_closes_the_targets(keys):
    for config, tokens, seed in cases(keys, 200, 200):
        hidden = objectives.noise_mask(config, tokens, rng_of(seed), VOCABULARY)
        runs = sum(1 for is_hidden, _ in itertools.groupby(hidden) if is_hidden)
        for part in corrupt(config, tokens, rng_of(seed)):
            assert part[part >= PIECES].tolist() == list(range(SENTINEL, SENTINEL - runs, -1))
        assert part[0] == SENTINEL and part[-2] < PIECES  # of the targets


def test_a_masked_token_is_random_kept_or_masked_as_often_as_its_word_says():
    tokens, count = np.full(100, 7), 300
    for word, shares in {"mask": (1, 0), "mask_or_random": (0.9, 0.1), "bert": (0.8, 0.1)}.items():
        config, found = config_of(0.5, name=MASK, replacement=word), []
        for seed in range(count):
            hidden = objectives.noise_mask(config, tokens, rng_of(seed), VOCABULARY)
            inputs = corrupt(config, tokens, rng_of(seed))[0][:-1]
            assert (inputs[~hidden] == 7).all()
            found.append(inputs[hidden])
        found = np.concatenate(found)
        random = (found != SENTINEL) & (found != 7)
        assert np.isin(found[random], WORDS).all()
        for seen, share in zip((found == SENTINEL, random), shares, strict=True):
            deviation = np.sqrt(share * (1 - share) / found.size)
            assert abs(seen.mean() - share) <= 5 * deviation + 1e-3 * (share not in (0, 1))


def test_a_random_token_is_any_word_equally_often():
    few = VOCABULARY._replace(words=np.array([3, 5, 7, 11], np.int32))
    config, counts = config_of(0.5, name=MASK, replacement="mask_or_random"), np.zeros(12)
    for seed in range(300):
        inputs, _ = objectives.corrupt(config, np.full(100, 2), rng_of(seed), few)
        counts += np.bincount(inputs[(inputs > 2) & (inputs < 12)], minlength=12)
    assert counts.sum() == counts[few.words].sum() and counts.sum() > 1000
    expected = counts.sum() / 4
    assert np.abs(counts[few.words] - expected).max() < 5 * np.sqrt(expected)


def test_the_drawing_of_the_documentation_is_what_happens():
    tokens, hidden = np.arange(10, 17), np.array([0, 0, 1, 1, 0, 0, 1], bool)
    write = objectives.corruption.write_runs
    inputs, targets = write(config_of(), tokens, hidden, rng_of(0), VOCABULARY)
    assert inputs.tolist() == [10, 11, SENTINEL, 14, 15, SENTINEL - 1, EOS]
    assert targets.tolist() == [SENTINEL, 12, 13, SENTINEL - 1, 16, EOS]


# UL2. ----------------------------------------------------------------------------------------


def test_ul2_draws_each_denoiser_equally_often_behind_the_token_of_its_mode():
    config, tokens, seen = config_of(name="ul2", placement="t5"), np.arange(2, 302), []
    for seed in range(2100):
        inputs, targets = corrupt(config, tokens, rng_of(seed))
        spans = int(np.sum(targets >= PIECES))
        seen.append((int(inputs[0]), len(targets) - 1 - spans, spans))
    last = SENTINEL - NUM_SENTINELS + 1
    modes = dict(R=last, S=last + 1, X=last + 2)
    kinds = [("R", 45, 15), ("R", 45, 6), ("S", 75, 0), ("X", 150, 50), ("X", 150, 19)]
    kinds += [("X", 45, 1), ("X", 150, 2)]  # tokens hidden, spans
    counts = [seen.count((modes[mode], *rest)) for mode, *rest in kinds]
    assert sum(counts) == 2100 and np.abs(np.array(counts) - 300).max() < 5 * np.sqrt(300)


def test_every_denoiser_of_ul2_fits_and_one_does_not_with_one_token_more():
    config = config_of(name="ul2")
    kinds = [objectives.ObjectiveConfig(**keys) for _, keys in objectives.UL2]
    for input_length in (16, 128, 512):
        found = objectives.lengths(config, input_length)
        halves = [objectives.OBJECTIVES[one.name].lengths(one, found.raw) for one in kinds]
        assert found.inputs == 1 + max(half.inputs for half in halves) <= input_length
        assert found.targets == max(half.targets for half in halves)
        assert found.sentinels == 3 + max(half.sentinels for half in halves)
        more = [objectives.OBJECTIVES[one.name].lengths(one, found.raw + 1) for one in kinds]
        assert 1 + max(half.inputs for half in more) > input_length


def test_a_mode_of_ul2_never_stands_for_a_span_as_well():
    few = VOCABULARY._replace(sentinels=SENTINELS[:20])  # enough for 17 spans
    config, tokens, refused = config_of(name="ul2", placement="t5"), np.arange(2, 122), 0
    for seed in range(100):
        try:
            inputs, targets = objectives.corrupt(config, tokens, rng_of(seed), few)
        except ValueError as error:  # 50 % in spans of 3
            assert "hides 20 spans, but there are 17 sentinels" in str(error)
            refused += 1
        else:
            modes = few.sentinels[-3:]
            assert np.isin(inputs, modes).nonzero()[0].tolist() == [0]
            assert not np.isin(targets, modes).any()
    assert 3 <= refused <= 30


def test_inputs_of_ul2_without_a_mode_are_refused():
    for inputs in ([], [5, 6]):
        with pytest.raises(ValueError, match="begin with no mode token"):
            restore(config_of(name="ul2"), inputs, [7])


# Gap sentences. ------------------------------------------------------------------------------


def test_principal_sentences_are_those_of_the_highest_rouge_against_the_rest():
    scorer = rouge_scorer.RougeScorer(["rouge1"])
    rng = rng_of(0)
    for _ in range(40):
        tokens = rng.integers(11, 41, 60)
        ends = objectives.noise_masks.sentence_ends(tokens, VOCABULARY)
        numbers = np.cumsum(ends) - ends
        found = objectives.noise_masks.shared_token_counts(tokens, numbers) * 2 / len(tokens)
        words = lambda ids: " ".join(f"w{i}" for i in ids)
        for number, ours in enumerate(found):
            here = numbers == number
            theirs = scorer.score(words(tokens[~here]), words(tokens[here]))["rouge1"].fmeasure
            assert ours == pytest.approx(theirs)
        order = objectives.noise_masks.principal_order(tokens, numbers, rng)
        assert (np.diff(found[order]) <= 0).all()


def test_whole_sentences_are_hidden_in_order_of_choice_while_they_fit():
    tokens = np.array([2, 3, 10, 4, 5, 6, 20, 7, 30, 8, 9, 40, 11])  # of 3, 4, 2, 3 and 1 tokens
    lead = dict(name="gap_sentences", placement="lead")

    def hidden(density, text):
        mask = objectives.noise_mask(config_of(density, **lead), text, rng_of(0), VOCABULARY)
        return mask.nonzero()[0].tolist()

    assert hidden(0.25, tokens) == [0, 1, 2]
    assert hidden(0.4, tokens) == [0, 1, 2, 7, 8]  # the second would be two too many
    assert hidden(0.01, tokens[:-1]) == [2]  # none fits: the last tokens of the first
    assert hidden(0.4, np.arange(101, 110)) == [5, 6, 7, 8]  # one sentence


def test_a_sentence_ends_at_the_last_of_several_ends():
    ends = objectives.noise_masks.sentence_ends(np.array([10, 2, 20, 30, 3, 4, 40]), VOCABULARY)
    assert ends.nonzero()[0].tolist() == [0, 3, 6]


# What a user can do wrong. -------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(name="spam_corruption"), "objective.name='spam_corruption' .*span_corruption"),
        (dict(placement="t6"), "objective.placement='t6' is unknown; choose one of t5, uniform"),
        (
            dict(name="mass", placement="t5"),
            "with objective.name='mass', objective.placement='t5' is unknown; choose one of unif",
        ),
        (dict(replacement="bert"), "'span_corruption', objective.replacement='bert' .* of mask"),
        (dict(name=MASK, replacement="brt"), "choose one of bert, mask, mask_or_random"),
        (dict(name="ul2", target="whole"), "'ul2', objective.target='whole' .* one of hidden"),
        (dict(noise_density=0.0), "objective.noise_density=0.0 is not between 0 and 1"),
        (dict(noise_density=1.0), "objective.noise_density=1.0 is not between 0 and 1"),
        (dict(noise_density=float("nan")), "objective.noise_density=nan .*use 0.15"),
        (
            dict(mean_noise_span_length=0.5),
            "objective.mean_noise_span_length=0.5 .*at least 1 token; use 3.0",
        ),
        (
            dict(mean_noise_span_length=float("inf")),
            "objective.mean_noise_span_length=inf is not a finite number",
        ),
        (
            dict(mean_noise_span_length=float("nan")),
            "objective.mean_noise_span_length=nan is not a finite number",
        ),
    ],
)
def test_a_wrong_config_is_refused_with_value_bound_and_cure(change, message):
    with pytest.raises(ValueError, match=message):
        objectives.ObjectiveConfig(**change)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_a_name_alone_is_a_config(name):
    objectives.ObjectiveConfig(name=name)


def test_texts_too_short_to_mask_and_spans_without_sentinels_are_refused():
    for door in (objectives.corrupt, objectives.noise_mask):
        with pytest.raises(ValueError, match="a text of 1 tokens .*fewer than 2"):
            door(config_of(), np.array([5]), rng_of(0), VOCABULARY)
    for few in (0, 1, 3):
        with pytest.raises(ValueError, match=f"hides . spans, but there are {few} sentinels"):
            short = VOCABULARY._replace(sentinels=SENTINELS[:few])
            objectives.corrupt(config_of(0.3), np.arange(2, 52), rng_of(0), short)
