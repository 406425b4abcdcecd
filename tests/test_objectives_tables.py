"""Laws of configs/t5_tables.py: the rows of the paper, none of which runs out of sentinels."""

from __future__ import annotations

import numpy as np
import pytest

from configs import base, models, t5_tables
from lm import objectives, runs

every_row = pytest.mark.parametrize("row", t5_tables.ROWS)


def example_of(row: str):
    """Make an example of the row's size: (text, inputs, targets, vocabulary size)."""
    config = t5_tables.get_config(row)
    objective = objectives.ObjectiveConfig(**config.objective)
    raw = objectives.lengths(objective, config.data.input_length).raw
    size = config.tokenizer.vocab_size + config.tokenizer.num_extra_ids
    sentinels = np.arange(size - 1, config.tokenizer.vocab_size - 1, -1)
    words = np.arange(3, config.tokenizer.vocab_size)
    vocabulary = objectives.Vocabulary(sentinels, 1, words, np.zeros(size, bool))
    text = np.arange(1000, 1000 + raw)
    return text, *objectives.corrupt(objective, text, np.random.default_rng(0), vocabulary), size


@every_row
def test_a_row_differs_from_t5_base_in_its_objective_only(row):
    run = runs.make_run(t5_tables.get_config(row).to_dict(), "nowhere")
    assert (run.steps, run.data.batch_size, run.data.input_length) == (2**19, 128, 512)
    assert run.model.dropout_rate == 0.1 and run.optimizer.name == "adafactor"
    actual, t5 = t5_tables.get_config(row), models.apply(base.get_config(), "t5_base")
    for config in (actual, t5):
        config.model.update(vocab_size=0, dropout_rate=0.0)
    assert actual.model == t5.model
    assert actual.optimizer == t5.optimizer and actual.loss == t5.loss


@every_row
def test_a_row_has_as_many_sentinels_as_it_needs(row):
    config = t5_tables.get_config(row)
    objective = objectives.ObjectiveConfig(**config.objective)
    required = objectives.lengths(objective, config.data.input_length).sentinels
    actual = config.tokenizer.num_extra_ids
    assert required <= actual and actual in (100, required)
    rows = config.model.vocab_size
    assert rows % 128 == 0 and config.tokenizer.vocab_size + actual <= rows
    _, inputs, targets, size = example_of(row)
    assert max(inputs.max(), targets.max()) < size


@every_row
def test_a_row_hides_the_tokens_that_the_paper_describes(row):
    text, inputs, targets, size = example_of(row)
    objective = t5_tables.get_config(row).objective
    raw, share = len(text), objective.noise_density
    target_tokens = targets[(targets >= 1000) & (targets < 32_000)]
    changed = np.isin(text, inputs, invert=True)
    if row in ("bert_style", "mass_style", "deshuffling"):
        np.testing.assert_array_equal(target_tokens, text)
    else:
        np.testing.assert_array_equal(target_tokens, text[changed])
    if row == "deshuffling":
        assert sorted(inputs[:-1]) == text.tolist() and inputs[:-1].tolist() != text.tolist()
    elif row == "prefix_lm":
        np.testing.assert_array_equal(np.append(inputs[:-1], targets[:-1]), text)
    else:
        assert changed.sum() == round(raw * share)
    ids = inputs[inputs >= 32_000]
    unique = {"bert_style": 1, "mass_style": 1, "drop": 0, "prefix_lm": 0, "deshuffling": 0}
    runs = np.count_nonzero(np.diff(np.append(0, changed)) > 0)
    assert len(np.unique(ids)) == unique.get(row, runs)
    random = np.count_nonzero(~np.isin(inputs[:-1], text) & (inputs[:-1] < 32_000))
    assert (random > 0) == (row == "bert_style")


def test_the_tables_have_the_papers_rates_and_spans():
    objective = lambda row: t5_tables.get_config(row).objective
    for percent in (10, 15, 25, 50):
        assert objective(f"rate_{percent}").noise_density == percent / 100
    assert objective("baseline") == objective("rate_15")
    for span in (2, 3, 5, 10):
        row = objective(f"span_{span}")
        assert (row.mean_noise_span_length, row.noise_density) == (span, 0.15)
        assert row.placement == "t5"


def test_an_unknown_row_raises_with_the_choices():
    with pytest.raises(ValueError, match="the row after the config's colon='span_4' is unknown"):
        t5_tables.get_config("span_4")
