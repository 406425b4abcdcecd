"""Laws of experiments/input_speed.py: its rows are corrupted texts; its reference equals T5's."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import input_speed
from lm import objectives


def texts_of(raw: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, input_speed.PIECES, (20, raw), dtype=np.int32)


def test_rows_of_the_naive_numpy_collator_invert_to_the_texts():
    config = objectives.ObjectiveConfig(placement="t5")
    raw, inputs, targets, spans = objectives.lengths(config, input_speed.INPUT_LENGTH)
    texts = texts_of(raw)
    rows = input_speed.naive_rows(texts, targets - spans - 1, spans, np.random.default_rng(1))
    assert [row.shape for row in rows] == [(20, inputs), (20, targets)]
    for text, *example in zip(texts, *rows, strict=True):
        actual = objectives.uncorrupt(config, *example, input_speed.VOCABULARY)
        np.testing.assert_array_equal(actual, text)
        sentinels = input_speed.VOCABULARY.sentinels[:spans]
        for ids in example:
            np.testing.assert_array_equal(ids[np.isin(ids, sentinels)], sentinels)


@pytest.mark.parametrize("name", ["span_corruption", "gap_sentences", "ul2"])
def test_rows_are_the_examples_in_segment_one_and_padding_in_segment_zero(name):
    config = objectives.ObjectiveConfig(name=name)
    texts = texts_of(objectives.lengths(config, input_speed.INPUT_LENGTH).raw)
    rows = input_speed.rows_of(config, texts, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    for text, inputs, inputs_segment, targets, targets_segment in zip(texts, *rows, strict=True):
        example = objectives.corrupt(config, text, rng, input_speed.VOCABULARY)
        for ids, segment, expected in zip(
            (inputs, targets), (inputs_segment, targets_segment), example, strict=True
        ):
            np.testing.assert_array_equal(
                ids, np.append(expected, [0] * (len(ids) - len(expected)))
            )
            np.testing.assert_array_equal(segment, np.arange(len(ids)) < len(expected))


def test_the_table_has_a_row_for_each_objective_and_one_for_the_reference():
    rows = input_speed.masking(repeats=3, batch=1)
    assert len({row["what"] for row in rows}) == len(rows)
    assert len(rows) == 1 + sum(1 for _ in input_speed.configs())
    assert all(row["lowest"] <= row["median"] <= row["highest"] for row in rows)
    lines = input_speed.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and lines[2].startswith("| span_corruption, uniform | 567 |")


def test_an_unknown_section_raises_with_the_nearest_name():
    with pytest.raises(ValueError, match="the section='maskin' is unknown; .*'masking'"):
        input_speed.main(["maskin"])
