"""Laws of lengths and noise masks: T5's arithmetic, and all placements equally often."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from lm import objectives
from lm.objectives import example_lengths, noise_masks
from tests.objective_cases import (
    ALL_KEYS,
    MASK,
    SPAN,
    VOCABULARY,
    config_of,
    every_objective,
    rng_of,
)

# Lengths. ------------------------------------------------------------------------------------

GOLDEN = [  # density, mean span, input length -> raw, targets, spans; measured on t5's own code
    (0.15, 3, 512, 568, 114, 28),
    (0.10, 3, 512, 548, 74, 18),
    (0.25, 3, 512, 614, 206, 51),
    (0.50, 3, 512, 767, 513, 128),
    (0.15, 2, 512, 552, 126, 42),
    (0.15, 5, 512, 581, 105, 17),
    (0.15, 8, 512, 588, 100, 11),
    (0.15, 10, 512, 591, 99, 9),
    (0.50, 8, 512, 908, 512, 57),
    (0.15, 64, 512, 600, 92, 1),
    (0.50, 64, 512, 1007, 513, 8),
    (0.15, 3, 1024, 1137, 229, 57),
    (0.15, 20, 1024, 1193, 189, 9),
    (0.15, 3, 128, 141, 29, 7),
    (0.15, 3, 256, 284, 58, 14),
]


@pytest.mark.parametrize("density, span, input_length, raw, targets, spans", GOLDEN)
def test_lengths_equal_t5s(density, span, input_length, raw, targets, spans):
    actual = objectives.lengths(config_of(density, span, placement="t5"), input_length)
    assert actual == (raw, input_length, targets, spans)


@pytest.mark.parametrize("density, span, input_length, raw, targets, spans", GOLDEN)
def test_uniform_placement_needs_one_span_more_than_t5s(
    density, span, input_length, raw, targets, spans
):
    actual = objectives.lengths(config_of(density, span), input_length)
    config = config_of(density, span, placement="t5")
    reference = objectives.OBJECTIVES[SPAN].lengths(config, actual.raw)
    assert tuple(actual) == tuple(np.add(reference, (0, 1, 1, 1)))
    assert actual.inputs == input_length and raw - 3 <= actual.raw < raw


def t5_counts(length: int, density: float, span: float, to_float) -> tuple[int, int]:
    """Noise tokens and spans as T5 computes them: its mask in float32, its lengths in float64."""
    noise = int(np.round(to_float(length) * to_float(density)))
    noise = min(max(noise, 1), length - 1)
    return noise, max(int(np.round(to_float(noise) / to_float(span))), 1)


def test_numbers_of_noise_tokens_and_spans_equal_t5s():
    disagreements = count = 0
    for density, span in itertools.product([0.1, 0.15, 0.25, 0.3, 0.5, 0.75], [1, 2, 3, 5, 8, 64]):
        config = config_of(density, span, placement="t5")
        for length in range(2, 700):
            noise, spans = t5_counts(length, density, span, np.float64)
            # T5 disagrees with itself if float32 rounds a share of exactly one half away.
            disagreements += (noise, spans) != t5_counts(length, density, span, np.float32)
            count += 1
            spans = min(spans, length - noise)  # T5 may ask for more spans than tokens
            mask = objectives.noise_mask(config, np.arange(2, 2 + length), rng_of(0), VOCABULARY)
            num_spans = np.count_nonzero(np.diff(mask.astype(int)) > 0)
            assert (mask.sum(), num_spans) == (noise, spans)
    assert disagreements < 0.01 * count


@pytest.mark.parametrize("density", [0.1, 0.15, 0.25, 0.45])
@pytest.mark.parametrize("span", [1, 2, 3, 10])
def test_the_longest_text_equals_that_of_t5s_linear_search(density, span):
    def inputs(raw):
        noise = round(raw * density)
        return raw - noise + round(noise / span) + 1

    for input_length in range(64, 700, 7):
        raw = input_length - 1
        while inputs(raw + 1) <= input_length:
            raw += 1
        config = config_of(density, span, placement="t5")
        assert objectives.lengths(config, input_length).raw == raw


@every_objective
def test_the_longest_text_fits_and_one_token_more_does_not(keys):
    for density, span in itertools.product([0.001, 0.15, 0.5, 0.9, 0.999], [1, 3, 1e6]):
        config = config_of(density, span, **keys)
        objective = objectives.OBJECTIVES[config.name]
        for input_length in [4, 5, 16, 512]:
            lengths = objectives.lengths(config, input_length)
            longer = objective.lengths(config, lengths.raw + 1)
            assert getattr(lengths, objective.bounded) <= input_length
            assert getattr(longer, objective.bounded) > input_length
            assert lengths.inputs <= input_length


@every_objective
def test_lengths_never_shrink_as_the_text_grows(keys):
    for density, span in itertools.product([0.01, 0.15, 0.5, 0.9], [1, 3, 64]):
        config = config_of(density, span, **keys)
        lengths = objectives.OBJECTIVES[config.name].lengths
        assert (np.diff([lengths(config, raw) for raw in range(2, 300)], axis=0) >= 0).all()


@pytest.mark.parametrize(
    "keys, expected",
    [
        (dict(name=MASK), (511, 512, 78, 1)),
        (dict(name=MASK, target="whole"), (511, 512, 512, 1)),
        (dict(name="mass"), (511, 512, 78, 1)),
        (dict(name="iid_replace"), (511, 512, 155, 77)),
        (dict(name="drop"), (601, 512, 91, 0)),
        (dict(name="gap_sentences"), (511, 512, 78, 1)),
        (dict(name="prefix_lm"), (512, 512, 512, 0)),
        (dict(name="prefix_lm", placement="end"), (601, 512, 91, 0)),
        (dict(name="language_model"), (511, 1, 512, 0)),
        (dict(name="deshuffling"), (511, 512, 512, 0)),
    ],
)
def test_lengths_of_512_inputs_equal_hand_computed_ones(keys, expected):
    assert objectives.lengths(config_of(**keys), 512) == expected


def test_iid_replace_never_has_more_spans_than_its_bound():
    config = config_of(0.75, name="iid_replace")
    draws = masks(8, 500, density=0.75, name="iid_replace")
    num_spans = [np.sum(np.diff(np.append(0, mask)) > 0) for mask in draws]
    lengths = objectives.OBJECTIVES["iid_replace"].lengths(config, 8)
    assert lengths == (8, 2 + 3 + 1, 6 + 3 + 1, 3) and max(num_spans) == 3


@pytest.mark.parametrize("keys", ALL_KEYS)
def test_lengths_too_short_for_two_tokens_are_refused(keys):
    config = config_of(**keys)
    objective = objectives.OBJECTIVES[config.name]
    least = getattr(objective.lengths(config, 2), objective.bounded)
    objectives.lengths(config, least)
    with pytest.raises(
        ValueError, match=f"input_length={least - 1} is too short .*use {least} or more"
    ):
        objectives.lengths(config, least - 1)


# Sentinels. ----------------------------------------------------------------------------------


@pytest.mark.parametrize("density, fits", [(0.15, 1809), (0.5, 402)])
def test_check_sentinels_refuses_one_token_more_than_fits(density, fits):
    config = config_of(density, placement="t5")
    objectives.check_sentinels(config, fits, 100)
    with pytest.raises(
        ValueError, match=f"input_length={fits + 1} .*needs 101 .*num_extra_ids=100;"
    ):
        objectives.check_sentinels(config, fits + 1, 100)
    objectives.check_sentinels(config, fits + 1, 101)


def test_the_error_of_too_few_sentinels_names_the_keys_that_would_help():
    density = "or lower objective.noise_density=0.5"
    for name, fix in (
        ("span_corruption", f"{density}, or raise objective.mean_noise_span_length=3.0"),
        ("iid_replace", density),
        ("ul2", "or shorten input_length"),
    ):
        config = objectives.ObjectiveConfig(name=name, noise_density=0.5)
        with pytest.raises(ValueError, match=rf"name='{name}' needs .*{fix}\.$"):
            objectives.check_sentinels(config, 64, 1)


@every_objective
def test_the_least_number_of_sentinels_that_passes_the_check_suffices(keys):
    config = config_of(0.5, 2.0, **keys)
    lengths = objectives.lengths(config, 64)
    objectives.check_sentinels(config, 64, lengths.sentinels)
    if lengths.sentinels:
        with pytest.raises(ValueError, match=f"needs {lengths.sentinels} sentinels"):
            objectives.check_sentinels(config, 64, lengths.sentinels - 1)
    vocabulary = VOCABULARY._replace(sentinels=VOCABULARY.sentinels[: lengths.sentinels])
    for seed in range(30):
        objectives.corrupt(config, np.arange(2, 2 + lengths.raw), rng_of(seed), vocabulary)


def test_a_mask_token_needs_one_sentinel_and_split_texts_need_none():
    for name in (MASK, "mass", "gap_sentences"):
        objectives.check_sentinels(config_of(name=name), 10_000, 1)
        with pytest.raises(ValueError, match="needs 1 sentinel"):
            objectives.check_sentinels(config_of(name=name), 512, 0)
    for name in ("drop", "prefix_lm", "language_model", "deshuffling"):
        objectives.check_sentinels(config_of(name=name), 512, 0)


# Noise masks. --------------------------------------------------------------------------------


def masks(length, count, seed=0, density=0.15, span=3.0, **keys) -> np.ndarray:
    """Draw `count` masks of a text of `length` tokens: bool[count, length]."""
    rng, tokens = rng_of(seed), np.arange(2, 2 + length)
    config = config_of(density, span, **keys)
    return np.array([objectives.noise_mask(config, tokens, rng, VOCABULARY) for _ in range(count)])


def all_masks(length, noise, spans, ring=False):
    """Enumerate all masks with `noise` noise tokens in `spans` spans."""
    for mask in itertools.product([False, True], repeat=length):
        before = (mask[-1],) if ring else (False,)
        pairs = itertools.pairwise(before + mask)
        if sum(mask) == noise and sum(current > previous for previous, current in pairs) == spans:
            yield mask


def assert_equally_often(draws, possible):
    """Test by chi-square that the draws are uniform over `possible`, without other values."""
    counts = dict.fromkeys(possible, 0)
    for draw in map(tuple, draws.tolist()):
        counts[draw] += 1  # a KeyError is an impossible draw
    assert stats.chisquare(list(counts.values())).pvalue > 1e-5


def p_of_uniform_positions(draws: np.ndarray) -> float:
    """Return the p-value of the draws if every position is noise equally often.

    Chi-square over positions with a covariance estimated from the draws, since neighbours are noise
    together, and one degree of freedom less, since all rows have equally many noise tokens.
    """
    frequencies = draws.mean(axis=0) - draws.mean()
    inverse = np.linalg.pinv(np.cov(draws.astype(float), rowvar=False), hermitian=True)
    return float(
        stats.chi2.sf(len(draws) * frequencies @ inverse @ frequencies, draws.shape[1] - 1)
    )


def naive_spans(length, count, noise, spans) -> np.ndarray:
    """Draw uniformly from all masks, without rotation: the ends are noise less often."""
    possible = np.array(list(all_masks(length, noise, spans)))
    return possible[rng_of(0).integers(len(possible), size=count)]


@pytest.mark.parametrize("length, density, span", [(8, 0.5, 2.0), (9, 0.4, 1.3), (7, 0.6, 2.0)])
@pytest.mark.parametrize("placement", ["uniform", "t5"])
def test_all_masks_of_spans_are_equally_likely(placement, length, density, span):
    config = config_of(density, span, placement=placement)
    noise, spans = (
        f(config, length)
        for f in (example_lengths.num_noise_tokens, example_lengths.num_noise_spans)
    )
    possible = list(all_masks(length, noise, spans, ring=placement == "uniform"))
    if placement == "t5":
        possible = [mask for mask in possible if not mask[0] and mask[-1]]
    assert_equally_often(
        masks(length, 6000, density=density, span=span, placement=placement), possible
    )


@pytest.mark.parametrize("name", [MASK, "iid_replace", "drop"])
def test_all_masks_of_single_tokens_are_equally_likely(name):
    possible = [mask for spans in (1, 2, 3) for mask in all_masks(7, 3, spans)]
    assert_equally_often(masks(7, 4000, density=0.4, name=name), possible)


def test_all_positions_of_one_span_and_of_a_cut_are_equally_likely():
    spans = list(all_masks(9, 3, 1))
    assert len(spans) == 7
    assert_equally_often(masks(9, 4000, density=0.33, name="mass"), spans)
    cuts = [tuple(position >= cut for position in range(9)) for cut in range(1, 9)]
    assert_equally_often(masks(9, 4000, name="prefix_lm"), cuts)
    assert (
        masks(8, 20, density=0.25, name="prefix_lm", placement="end").tolist()
        == [[False] * 6 + [True] * 2] * 20
    )


def test_uniform_sentence_masks_are_equally_likely():
    config, rng = config_of(0.35, name="gap_sentences"), rng_of(0)
    tokens = np.array([2, 3, 10] * 3)
    draws = np.array([objectives.noise_mask(config, tokens, rng, VOCABULARY) for _ in range(3000)])
    assert_equally_often(
        draws[:, ::3], [(True, False, False), (False, True, False), (False,) * 2 + (True,)]
    )


@pytest.mark.parametrize("name", [SPAN, MASK, "iid_replace", "drop"])
@pytest.mark.parametrize("length, density, span", [(41, 0.15, 3.0), (24, 0.5, 5.0)])
def test_uniform_placement_hides_every_position_equally_often(name, length, density, span):
    draws = masks(length, 8000, density=density, span=span, name=name)
    assert p_of_uniform_positions(draws) > 1e-5


def test_the_p_value_reveals_the_bias_of_t5_and_of_spans_without_rotation():
    t5 = masks(24, 2000, density=0.5, span=5.0, placement="t5")
    assert p_of_uniform_positions(t5) < 1e-12
    assert p_of_uniform_positions(naive_spans(15, 2000, 5, 2)) < 1e-12


@pytest.mark.parametrize("name", [SPAN, MASK])
def test_uniform_placement_at_512_inputs_hides_all_positions_equally_often(name):
    draws = masks(567, 4000, name=name)
    deviation = np.sqrt(85 / 567 * (1 - 85 / 567) / 4000)
    assert np.abs(draws.mean(axis=0) - 85 / 567).max() < 5 * deviation


def test_t5_never_hides_the_first_token_and_always_the_last():
    draws = masks(60, 300, placement="t5")
    assert not draws[:, 0].any() and draws[:, -1].all()


def test_random_segments_are_nonempty_and_all_divisions_equally_likely():
    rng, ways = rng_of(0), list(itertools.combinations(range(1, 6), 2))
    draws = np.array([noise_masks.random_segment_ends(rng, 6, 3) for _ in range(3000)])
    assert (draws[:, -1] == 6).all()
    assert_equally_often(draws[:, :-1], ways)
    for total in range(1, 5):
        assert noise_masks.random_segment_ends(rng, total, total).tolist() == list(
            range(1, total + 1)
        )
        assert noise_masks.random_segment_ends(rng, total, 1).tolist() == [total]
