"""Laws of held-out losses: equal to a plain sum on every layout; unigram baselines."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lm import evaluate, parallel, pipeline, runs, steps, transformer


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    return runs.make_run(tiny_config(), tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def tokens(run):
    return runs.make_tokenizer(run)


@pytest.fixture(scope="module")
def heldout_examples(run, tokens):
    return runs.make_examples(run, tokens)[1]


@pytest.fixture(scope="module")
def params(run):
    model = transformer.Transformer(run.model)
    return model.init(jax.random.key(3), transformer.dummy_batch())["params"]


def sums(run, tokens, examples, params, **changes):
    strategy = parallel.make_strategy(parallel.ParallelConfig(**changes), jax.devices()[:4])
    heldout = evaluate.HeldOut(run, strategy, examples, tokens)
    return heldout.sums(strategy.place_state(params))


def test_held_out_sums_equal_a_plain_sum_over_rows(run, tokens, heldout_examples, params):
    actual = sums(run, tokens, heldout_examples, params)
    model, text_bytes = transformer.Transformer(run.model), tokens.piece_bytes(512)
    weight = nats = 0.0
    for rows in pipeline.heldout_batches(heldout_examples, 0, 20):
        is_example = rows.targets_segment_ids.any(axis=1)
        rows = jax.tree.map(lambda x, is_example=is_example: x[is_example], rows)
        logits = np.asarray(model.apply({"params": params}, rows), np.float64)
        target_logits = np.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
        mask = rows.targets_segment_ids > 0
        nats += (np.log(np.exp(logits).sum(-1)) - target_logits)[mask].sum()
        weight += mask.sum()
    assert actual["weight"] == weight
    assert actual["nats"] == pytest.approx(nats, rel=1e-5)
    assert actual["bytes"] == sum(
        text_bytes[rows.targets].sum() for rows in pipeline.heldout_batches(heldout_examples, 0, 20)
    )


def test_held_out_sums_do_not_depend_on_the_layout(run, tokens, heldout_examples, params):
    expected = sums(run, tokens, heldout_examples, params, data=1)
    for changes in ({"data": 4}, {"strategy": "mesh", "fsdp": 2}):
        actual = sums(run, tokens, heldout_examples, params, **changes)
        assert actual == pytest.approx(expected, rel=1e-5)


def test_unigram_baselines_equal_those_of_plain_counts(run, tokens, heldout_examples):
    heldout = evaluate.HeldOut(
        run, parallel.make_strategy(parallel.ParallelConfig(data=1)), heldout_examples, tokens
    )
    text_bytes = tokens.piece_bytes(512)
    targets = np.concatenate([b.targets[b.targets_segment_ids > 0] for b in heldout.batches()])
    targets = [int(t) for t in targets if text_bytes[t] > 0]
    train_counts = np.arange(tokens.size)
    actual = evaluate.unigram_baselines(heldout, train_counts, text_bytes)

    frequencies = {t: targets.count(t) / len(targets) for t in set(targets)}
    entropy = -sum(p * np.log(p) for p in frequencies.values())
    total = sum(train_counts[i] + 1 for i in range(tokens.size) if text_bytes[i] > 0)
    cross = -np.mean([np.log((t + 1) / total) for t in targets])
    assert actual["unigram_entropy"] == pytest.approx(entropy)
    assert actual["unigram_nats"] == pytest.approx(
        cross, rel=1e-3
    )  # the model has more ids than the tokenizer
    assert actual["unigram_entropy"] <= actual["unigram_nats"]


def test_a_uniform_model_has_a_loss_of_log_vocabulary_size(run, tokens, heldout_examples):
    params = transformer.param_shapes(run.model)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    figures = steps.metrics_from_sums(sums(run, tokens, heldout_examples, zeros, data=1))
    assert figures["nats"] == pytest.approx(np.log(512), rel=1e-6)
    totals = sums(run, tokens, heldout_examples, zeros, data=1)
    bits = np.log2(512) * totals["weight"] / totals["bytes"]
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_task_texts_are_not_truncated(tiny_config, tmp_path):
    changes = {
        "data.task": "docstring_summary",
        "stage": "finetune",
        "evaluate.max_decoded_examples": 0,
    }
    run = runs.make_run(tiny_config(**changes, **{"data.target_length": 2}), tmp_path)
    pairs = evaluate.task_texts(run, "docstring_summary")
    assert len(pairs) == 12
    assert max(len(pair["targets"].split()) for pair in pairs) > 2
