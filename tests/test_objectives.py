"""Laws of all objectives: the inverse, the lengths, the example, the errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from rouge_score import rouge_scorer

from lm import objectives
from tests.objective_cases import (  # noqa: F401
    ALL_KEYS,
    EOS,
    MASK,
    NUM_SENTINELS,
    PIECES,
    SENTINEL,
    SENTINELS,
    SPAN,
    VOCABULARY,
    WORDS,
    config_of,
    every_objective,
    name_of,
    rng_of,
)

NEED_MASK = [keys for keys in ALL_KEYS if keys["name"] == "drop"]
NEED_MASK += [k for k in ALL_KEYS if k["target"] == "hidden" and k["replacement"] != "mask"]


def corrupt(config, tokens, rng):
    return objectives.corrupt(config, tokens, rng, VOCABULARY)


def uncorrupt(config, inputs, targets, mask=None):
    return objectives.uncorrupt(config, inputs, targets, VOCABULARY, mask)


def cases(keys, count, longest, seed=0):
    """Yield (config, tokens, seed) of random texts, densities and span lengths."""
    rng = rng_of(seed)
    for case in range(count):
        length = 2 + case // 6 if case < 120 else int(rng.integers(2, longest))
        tokens = rng.integers(2, PIECES, length)
        if case % 3 == 0:  # few different tokens, many sentence ends
            tokens = 2 + tokens % 20
        tokens[rng.integers(length)] = PIECES - 1  # the piece below the sentinels
        yield config_of(rng.uniform(0.001, 0.999), rng.uniform(1, 12), **keys), tokens, case


# The inverse. --------------------------------------------------------------------------------


@every_objective
def test_uncorrupt_inverts_corrupt(keys):
    for config, tokens, seed in cases(keys, 1000, 400):
        inputs, targets = corrupt(config, tokens, rng_of(seed))
        mask = None
        if keys in NEED_MASK:
            mask = objectives.noise_mask(config, tokens, rng_of(seed), VOCABULARY)
        text = uncorrupt(config, inputs, targets, mask)
        assert text.dtype == np.int32 and text.tolist() == tokens.tolist()


@every_objective
def test_the_targets_are_the_tokens_under_the_noise_mask(keys):
    for config, tokens, seed in cases(keys, 150, 200):
        _, targets = corrupt(config, tokens, rng_of(seed))
        mask = objectives.noise_mask(config, tokens, rng_of(seed), VOCABULARY)
        assert mask.dtype == bool and mask.shape == tokens.shape
        actual = targets[:-1][targets[:-1] < PIECES]
        expected = tokens if config.target == "whole" else tokens[mask]
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("keys", NEED_MASK, ids=name_of)
def test_uncorrupt_refuses_a_missing_and_an_unfit_mask(keys):
    config, tokens = config_of(**keys), np.arange(2, 50)
    example = corrupt(config, tokens, rng_of(0))
    with pytest.raises(ValueError, match="does not store which tokens .*mask=objectives"):
        uncorrupt(config, *example)
    mask = objectives.noise_mask(config, tokens, rng_of(0), VOCABULARY)
    with pytest.raises(ValueError, match="do not fit a mask of 49 tokens, of which 7 are noise"):
        uncorrupt(config, *example, np.append(mask, False))


def test_a_blank_without_an_answer_stays_and_an_answer_without_a_blank_is_ignored():
    s0, s1, s2 = SENTINEL, SENTINEL - 1, SENTINEL - 2
    inputs = [10, s0, 11, s1, EOS, 0, 0]
    for name in (SPAN, "iid_replace"):
        spans = config_of(name=name)
        assert uncorrupt(spans, inputs, [s0, 5, 6, s2, 7, EOS]).tolist() == [10, 5, 6, 11, s1]
        assert uncorrupt(spans, inputs, [7, 7]).tolist() == [10, s0, 11, s1]
        assert uncorrupt(spans, inputs, []).tolist() == [10, s0, 11, s1]
    for name in (MASK, "mass"):
        masks = config_of(name=name)
        assert uncorrupt(masks, [10, s0, 11, s0, EOS], [5, EOS]).tolist() == [10, 5, 11, s0]
        assert uncorrupt(masks, [10, s0, EOS], [5, 6, EOS]).tolist() == [10, 5]
    gaps = config_of(name="gap_sentences")  # here 20 and 30 end sentences
    assert uncorrupt(gaps, [s0, 9, s0, EOS], [8, 20, EOS]).tolist() == [8, 20, 9, s0]
    assert uncorrupt(gaps, [s0, 9, EOS], [8, 20, 7, 30, EOS]).tolist() == [8, 20, 9]
    assert uncorrupt(gaps, [s0, 9, EOS], []).tolist() == [s0, 9]
    drop, mask = config_of(name="drop"), np.array([True, False, True])
    assert uncorrupt(drop, [9, EOS], [5], mask).tolist() == [5, 9, s0]
    assert uncorrupt(drop, [9, EOS], [5, 6, 7], mask).tolist() == [5, 9, 6]


# The example. -------------------------------------------------------------------------------


@every_objective
def test_inputs_and_targets_are_int32_within_the_lengths_and_end_with_their_only_eos(keys):
    exact = keys["name"] in (MASK, "mass", "drop", "language_model", "deshuffling")
    exact |= keys["placement"] in ("t5", "end") and keys["name"] != "ul2"
    for config, tokens, seed in cases(keys, 300, 300, seed=1):
        lengths = objectives.OBJECTIVES[config.name].lengths(config, len(tokens))
        for ids, bound in zip(corrupt(config, tokens, rng_of(seed)), lengths[1:3], strict=True):
            assert ids.dtype == np.int32 and len(ids) <= bound
            assert not exact or len(ids) == bound
            assert np.flatnonzero(ids == EOS).tolist() == [len(ids) - 1]
            assert len(np.unique(ids[ids >= PIECES])) <= lengths.sentinels


@every_objective
def test_some_example_reaches_the_lengths(keys):
    # 2 of 8 tokens are noise; the first and the last sentence are single tokens.
    config, tokens = config_of(0.25, 2.0, **keys), np.array([20, 11, 12, 13, 14, 15, 20, 11])
    sizes = np.array([list(map(len, corrupt(config, tokens, rng_of(s)))) for s in range(300)])
    expected = objectives.OBJECTIVES[keys["name"]].lengths(config, 8)[1:3]
    assert sizes.max(axis=0).tolist() == list(expected)


@every_objective
def test_equal_generators_give_equal_examples_and_tokens_are_not_modified(keys):
    config, tokens = config_of(**keys), np.arange(2, 200, dtype=np.int32)
    first, again = (corrupt(config, tokens, rng_of(7)) for _ in range(2))
    others = [corrupt(config, tokens, rng_of(seed)) for seed in range(20)]
    for expected, actual in zip(first, again, strict=True):
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(tokens, np.arange(2, 200))
    fixed = keys["name"] == "language_model" or keys["placement"] in ("end", "lead", "principal")
    assert (len({inputs.tobytes() for inputs, _ in others}) == 1) == fixed


@pytest.mark.parametrize("keys", [k for k in ALL_KEYS if k["name"] in (SPAN, "iid_replace")])
def test_sentinels_are_in_order_and_none_ends_the_targets(keys):
    for config, tokens, seed in cases(keys, 200, 200):
        mask = objectives.noise_mask(config, tokens, rng_of(seed), VOCABULARY)
        spans = sum(1 for is_noise, _ in itertools.groupby(mask) if is_noise)
        inputs, targets = corrupt(config, tokens, rng_of(seed))
        for ids in (inputs, targets):
            assert ids[ids >= PIECES].tolist() == list(range(SENTINEL, SENTINEL - spans, -1))
        assert targets[0] == SENTINEL and targets[-2] < PIECES


def test_noise_tokens_are_masked_and_random_in_the_shares_of_the_replacement():
    tokens, count = np.full(100, 7), 300
    for name, shares in {"mask": (1, 0), "mask_or_random": (0.9, 0.1), "bert": (0.8, 0.1)}.items():
        config, noise = config_of(0.5, name=MASK, replacement=name), []
        for seed in range(count):
            mask = objectives.noise_mask(config, tokens, rng_of(seed), VOCABULARY)
            inputs = corrupt(config, tokens, rng_of(seed))[0][:-1]
            assert (inputs[~mask] == 7).all()
            noise.append(inputs[mask])
        noise = np.concatenate(noise)
        random = (noise != SENTINEL) & (noise != 7)
        assert np.isin(noise[random], WORDS).all()
        for is_kind, share in zip((noise == SENTINEL, random), shares, strict=True):
            deviation = np.sqrt(share * (1 - share) / noise.size)
            assert abs(is_kind.mean() - share) <= 5 * deviation + 1e-3 * (share not in (0, 1))


def test_random_tokens_are_uniform_over_the_words():
    vocabulary = VOCABULARY._replace(words=np.array([3, 5, 7, 11], np.int32))
    config, counts = config_of(0.5, name=MASK, replacement="mask_or_random"), np.zeros(12)
    for seed in range(300):
        inputs, _ = objectives.corrupt(config, np.full(100, 2), rng_of(seed), vocabulary)
        counts += np.bincount(inputs[(inputs > 2) & (inputs < 12)], minlength=12)
    assert counts.sum() == counts[vocabulary.words].sum() and counts.sum() > 1000
    expected = counts.sum() / 4
    assert np.abs(counts[vocabulary.words] - expected).max() < 5 * np.sqrt(expected)


def test_span_corruption_gives_the_example_of_the_package_docstring():
    tokens, mask = np.arange(10, 17), np.array([0, 0, 1, 1, 0, 0, 1], bool)
    corrupt = objectives.corruption.SPANS.corrupt
    inputs, targets = corrupt(config_of(), tokens, mask, rng_of(0), VOCABULARY)
    assert inputs.tolist() == [10, 11, SENTINEL, 14, 15, SENTINEL - 1, EOS]
    assert targets.tolist() == [SENTINEL, 12, 13, SENTINEL - 1, 16, EOS]


# UL2. ----------------------------------------------------------------------------------------


def test_ul2_draws_all_denoisers_equally_often_and_writes_their_mode_tokens():
    config, tokens, examples = config_of(name="ul2", placement="t5"), np.arange(2, 302), []
    for seed in range(2100):
        inputs, targets = corrupt(config, tokens, rng_of(seed))
        spans = int(np.sum(targets >= PIECES))
        examples.append((int(inputs[0]), len(targets) - 1 - spans, spans))
    last = SENTINEL - NUM_SENTINELS + 1
    modes = dict(R=last, S=last + 1, X=last + 2)
    kinds = [("R", 45, 15), ("R", 45, 6), ("S", 75, 0), ("X", 150, 50), ("X", 150, 19)]
    kinds += [("X", 45, 1), ("X", 150, 2)]  # mode, noise tokens, spans
    counts = [examples.count((modes[mode], *rest)) for mode, *rest in kinds]
    assert sum(counts) == 2100 and np.abs(np.array(counts) - 300).max() < 5 * np.sqrt(300)


def test_all_denoisers_of_ul2_fit_and_one_token_more_does_not():
    config = config_of(name="ul2")
    denoisers = [objectives.ObjectiveConfig(**keys) for _, keys in objectives.UL2]

    def denoiser_lengths(raw):
        return [objectives.OBJECTIVES[d.name].lengths(d, raw) for d in denoisers]

    for input_length in (16, 128, 512):
        actual = objectives.lengths(config, input_length)
        _, inputs, targets, sentinels = np.max(denoiser_lengths(actual.raw), axis=0)
        assert actual[1:] == (inputs + 1, targets, sentinels + 3)
        assert actual.inputs <= input_length
        assert 1 + np.max(denoiser_lengths(actual.raw + 1), axis=0)[1] > input_length


def test_ul2_never_uses_a_mode_token_as_a_sentinel():
    vocabulary = VOCABULARY._replace(sentinels=SENTINELS[:20])  # enough for 17 spans
    config, tokens, num_refused = config_of(name="ul2", placement="t5"), np.arange(2, 122), 0
    for seed in range(100):
        try:
            inputs, targets = objectives.corrupt(config, tokens, rng_of(seed), vocabulary)
        except ValueError as error:  # 50 % in spans of 3
            assert "hides 20 spans, but there are 17 sentinels" in str(error)
            num_refused += 1
        else:
            modes = vocabulary.sentinels[-3:]
            assert np.isin(inputs, modes).nonzero()[0].tolist() == [0]
            assert not np.isin(targets, modes).any()
    assert 3 <= num_refused <= 30


def test_uncorrupt_refuses_ul2_inputs_without_a_mode_token():
    for inputs in ([], [5, 6]):
        with pytest.raises(ValueError, match="begin with no mode token"):
            uncorrupt(config_of(name="ul2"), inputs, [7])


# Gap sentences. ------------------------------------------------------------------------------


def test_principal_order_is_by_descending_rouge_against_the_rest():
    scorer = rouge_scorer.RougeScorer(["rouge1"])
    rng = rng_of(0)
    for _ in range(40):
        tokens = rng.integers(11, 41, 60)
        ends = objectives.noise_masks.sentence_ends(tokens, VOCABULARY)
        numbers = np.cumsum(ends) - ends
        scores = objectives.noise_masks.shared_token_counts(tokens, numbers) * 2 / len(tokens)
        words = lambda ids: " ".join(f"w{i}" for i in ids)
        for number, actual in enumerate(scores):
            inside = numbers == number
            reference = scorer.score(words(tokens[~inside]), words(tokens[inside]))["rouge1"]
            assert actual == pytest.approx(reference.fmeasure)
        order = objectives.noise_masks.ORDERS["principal"](tokens, numbers, rng)
        assert (np.diff(scores[order]) <= 0).all()


def test_whole_sentences_are_hidden_in_order_while_they_fit():
    tokens = np.array([2, 3, 10, 4, 5, 6, 20, 7, 30, 8, 9, 40, 11])  # of 3, 4, 2, 3 and 1 tokens
    lead = dict(name="gap_sentences", placement="lead")

    def positions(density, text):
        mask = objectives.noise_mask(config_of(density, **lead), text, rng_of(0), VOCABULARY)
        return mask.nonzero()[0].tolist()

    assert positions(0.25, tokens) == [0, 1, 2]
    assert positions(0.4, tokens) == [0, 1, 2, 7, 8]  # the second does not fit
    assert positions(0.01, tokens[:-1]) == [2]  # none fits: the last tokens of the first
    assert positions(0.4, np.arange(101, 110)) == [5, 6, 7, 8]  # one sentence


def test_a_sentence_ends_at_the_last_of_several_ends_in_a_row():
    ends = objectives.noise_masks.sentence_ends(np.array([10, 2, 20, 30, 3, 4, 40]), VOCABULARY)
    assert ends.nonzero()[0].tolist() == [0, 3, 6]


# Errors. ------------------------------------------------------------------------------------


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
def test_a_wrong_config_raises_with_value_bound_and_fix(change, message):
    with pytest.raises(ValueError, match=message):
        objectives.ObjectiveConfig(**change)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_a_name_alone_is_a_valid_config(name):
    objectives.ObjectiveConfig(name=name)


def test_texts_of_one_token_and_spans_without_sentinels_are_refused():
    for function in (objectives.corrupt, objectives.noise_mask):
        with pytest.raises(ValueError, match="a text of 1 tokens .*fewer than 2"):
            function(config_of(), np.array([5]), rng_of(0), VOCABULARY)
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match=f"hides . spans, but there are {count} sentinels"):
            vocabulary = VOCABULARY._replace(sentinels=SENTINELS[:count])
            objectives.corrupt(config_of(0.3), np.arange(2, 52), rng_of(0), vocabulary)
