"""Laws of on-policy distillation: which updates, which answers, which gradient."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, decoding, distill, losses, parallel, steps, transformer
from lm.distill import on_policy

# Updates. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_on_policy_updates_are_spread_evenly_to_within_one(share):
    asked = on_policy.OnPolicyConfig(share)
    own = np.cumsum([asked.is_on_policy(index) for index in range(400)])
    assert np.abs(own - share * np.arange(1, 401)).max() < 1
    assert bool(asked) == (share > 0)


def test_losses_are_compared_with_those_of_the_more_frequent_kind():
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        asked = on_policy.OnPolicyConfig(share)
        usual = [asked.is_on_policy(index) for index in range(100) if asked.is_usual(index)]
        assert len(usual) >= 50 and len(set(usual)) == 1


SAMPLE = decoding.parse("sample")


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"fraction": 1.5}, "teacher.on_policy.fraction=1.5 is out of bounds; use 0 to 1"),
        ({"fraction": math.nan}, "teacher.on_policy.fraction=nan is out of bounds"),
        ({"decoding": {"method": "sampel"}}, "decoding='sampel' is unknown; .* mean 'sample'"),
        ({"decoding": "sample"}, "teacher.on_policy.decoding='sample' is a whole section"),
        (
            {"decoding": {"method": "sample", "num_return_sequences": 2}},
            "decoding.num_return_sequences=2 is more than the one answer .*; use 1",
        ),
    ],
)
def test_an_invalid_on_policy_section_is_rejected(section, sentence):
    with pytest.raises(ValueError, match=sentence):
        on_policy.OnPolicyConfig(**section)


@pytest.mark.parametrize(
    ("fraction", "words", "loss", "change", "sentence"),
    [
        (0, "sample", ["policy"], {}, "needs plain samples, .* set a fraction above 0"),
        (1, "greedy", ["policy"], {}, "teacher.loss.policy needs plain samples"),
        (1, "sample temperature=2", ["policy"], {}, "needs plain samples"),
        (1, "sample top_k=3", ["reverse_kl", "policy"], {}, "needs plain samples"),
        (1, "sample", ["labels"], {}, "would teach nothing: .* add a term that asks the teach"),
        (1, "sample", ["jsd"], {"packing": "first_fit"}, "data.packing='first_fit' has several"),
        (1, "sample", ["jsd"], {"pairs": False}, "has no effect on running text"),
        (1, "sample max_length=9", ["jsd"], {}, "max_length=9 is more than the 8 tokens"),
    ],
)
def test_on_policy_incompatible_with_the_rest_is_rejected(fraction, words, loss, change, sentence):
    options = {"packing": "none", "pairs": True, "length": 8}
    config = on_policy.OnPolicyConfig(fraction, decoding.parse(words))
    with pytest.raises(ValueError, match=sentence):
        on_policy.check(config, distill.loss_terms(dict.fromkeys(loss, {})), **options | change)
    config = on_policy.OnPolicyConfig(1.0, decoding.parse("sample max_length=8"))
    on_policy.check(config, distill.loss_terms({"reverse_kl": {}, "policy": {}}), **options)


# Answers. ------------------------------------------------------------------------------------

EOS, LENGTH, ROWS = 1, 6, 8
TINY = transformer.ModelConfig(
    vocab_size=8,
    d_model=8,
    d_ff=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    scan_layers=True,
)


@pytest.fixture(scope="module")
def params():
    made = transformer.Transformer(TINY).init(jax.random.key(0), transformer.dummy_batch())[
        "params"
    ]
    return jax.tree.map(np.asarray, made)


def asked(empty=()):
    """Rows with inputs and reference targets; `empty` rows without inputs."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 8, (ROWS, 5), dtype=np.int32)
    segments = (np.arange(5) < rng.integers(1, 6, (ROWS, 1))).astype(np.int32)
    segments[list(empty)] = 0
    targets = np.full((ROWS, LENGTH), 6, np.int32)
    return batch.Batch(inputs * segments, segments, targets, np.ones_like(targets))


def addresses(update=0):
    return np.stack([np.full(ROWS, 3), update * ROWS + np.arange(ROWS)], 1).astype(np.int32)


def writer(how=SAMPLE, place=transformer.no_constraint):
    model = transformer.Transformer(TINY, place)
    return functools.partial(
        on_policy.answer_batch, model=model, length=LENGTH, eos=EOS, config=how
    )


@pytest.mark.parametrize("how", [SAMPLE, decoding.parse("sample max_length=4")])
def test_targets_of_an_answer_end_with_its_eos(params, how):
    written = jax.jit(writer(how))(params, asked(empty=[2]), addresses())
    lengths = []
    for row in range(ROWS):
        ids, counts = written.targets[row].tolist(), written.targets_segment_ids[row].tolist()
        room = how.max_tokens(LENGTH)
        length = 0 if row == 2 else min(ids.index(EOS) + 1 if EOS in ids else room, room)
        assert counts == [1] * length + [0] * (LENGTH - length)
        assert not any(ids[length:])
        lengths.append(length)
    assert len(set(lengths)) > 2
    assert np.asarray(written.from_student).all() and written.from_student.shape == (ROWS,)
    np.testing.assert_array_equal(written.inputs, asked(empty=[2]).inputs)


def test_answers_depend_on_seed_update_and_row_only(params):
    write = jax.jit(writer())
    whole, again = (write(params, asked(), addresses(5)) for _ in range(2))
    np.testing.assert_array_equal(whole.targets, again.targets)
    half = jax.tree.map(lambda x: x[1::2], asked())
    alone = write(params, half, addresses(5)[1::2])
    np.testing.assert_array_equal(whole.targets[1::2], alone.targets)
    other = write(params, asked(), addresses(6))
    assert np.any(whole.targets != other.targets)


@pytest.mark.parametrize(
    ("config", "devices"),
    [
        (parallel.ParallelConfig(), 1),
        (parallel.ParallelConfig(), 4),
        (parallel.ParallelConfig(strategy="mesh", data=2, fsdp=2, tensor=2), 8),
    ],
)
def test_answers_are_the_same_on_any_devices(params, config, devices):
    strategy = parallel.make_strategy(config, jax.devices()[:devices])
    write = strategy.compile(writer(place=strategy.shard_activations))
    place = strategy.place_batch
    written = write(strategy.place_state(params), place(asked()), place(addresses()))
    expected = jax.jit(writer())(params, asked(), addresses())
    found = strategy.fetch_rows(
        (written.targets, written.targets_segment_ids, written.from_student)
    )
    for ours, theirs in zip(found, expected[2:4] + expected[5:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


# The gradient. -------------------------------------------------------------------------------


def tables(seed, vocab, length):
    """Random logits of the next token for each prefix."""
    rng = np.random.default_rng(seed)
    made = {}
    for n in range(length):
        for said in itertools.product(range(vocab), repeat=n):
            made[said] = rng.normal(size=vocab)
    return made


def rows_of(table, sequences):
    """Logits [B, T, V] along each of the sequences [B, T]."""
    return jnp.stack(
        [jnp.stack([jnp.asarray(table[tuple(s[:t])]) for t in range(len(s))]) for s in sequences]
    )


def chance(table, sequence):
    """The log-probability of a sequence."""
    terms = [jax.nn.log_softmax(table[tuple(sequence[:t])])[y] for t, y in enumerate(sequence)]
    return sum(terms)


def expected_gradient(loss, student, teacher, sequences):
    """The mean over the student's sequences of the gradient of a loss of (q, p, targets)."""
    fixed = jnp.exp(jnp.array([chance(student, s) for s in sequences]))

    def mean(table):
        logits, theirs = rows_of(table, sequences), rows_of(teacher, sequences)
        targets = jnp.array(sequences)
        each = jax.vmap(lambda q, p, y: loss(q[None], p[None], y[None]))(logits, theirs, targets)
        return jnp.sum(jax.lax.stop_gradient(fixed) * each)

    return jax.grad(mean)(student)


def long_term(q, p, y):
    return on_policy.policy_gradient(q, p, y, jnp.ones(y.shape))[0]


def single_step(q, p, y):
    return losses.reverse_kl(q, p, jnp.ones(y.shape))[0]


def test_policy_plus_reverse_kl_has_the_gradient_of_the_sequence_kl():
    """Two tokens only: in longer sequences the rest is averaged, not added."""
    with jax.enable_x64():
        student, teacher = tables(0, 3, 2), tables(1, 3, 2)
        student, teacher = (jax.tree.map(jnp.asarray, each) for each in (student, teacher))
        sequences = list(itertools.product(range(3), repeat=2))

        def divergence(table):
            parts = [(chance(table, s), chance(teacher, s)) for s in sequences]
            return sum(jnp.exp(q) * (q - p) for q, p in parts)

        exact = jax.grad(divergence)(student)
        both = lambda *said: long_term(*said) + single_step(*said)
        found = expected_gradient(both, student, teacher, sequences)
        alone = expected_gradient(single_step, student, teacher, sequences)
    for said, grad in exact.items():
        np.testing.assert_allclose(found[said], grad, atol=1e-6)
    assert np.abs(alone[()] - exact[()]).max() > 1e-2


def test_the_long_term_part_averages_over_the_rest_of_the_row():
    rng = np.random.default_rng(2)
    q, p = (rng.normal(size=(2, 5, 4)) for _ in range(2))
    targets = rng.integers(0, 4, (2, 5))
    weights = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], float)
    log = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    expected = np.zeros_like(q)
    value = 0.0
    for row, length in enumerate((4, 2)):
        for t in range(length - 1):
            later = range(t + 1, length)
            rest = [(log(q) - log(p))[row, s, targets[row, s]] for s in later]
            share = np.exp(log(q)[row, t])
            expected[row, t] = np.mean(rest) * (np.eye(4)[targets[row, t]] - share)
            value += np.mean(rest)
    loss = lambda x: on_policy.policy_gradient(x, jnp.asarray(p), targets, jnp.asarray(weights))
    (total, count), grad = loss(jnp.asarray(q)), jax.grad(lambda x: loss(x)[0])(jnp.asarray(q))
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    assert count == 6


def test_a_student_equal_to_its_teacher_has_no_gradient_from_its_answers(params):
    model = transformer.Transformer(TINY)
    written = jax.jit(writer())(params, asked(), addresses())
    terms = distill.loss_terms({"labels": {}, "policy": {}, "reverse_kl": {}, "jsd": {}})
    loss = distill.make_distillation_loss(
        model, steps.LossConfig(z_loss=0.1), np.ones(8, int), model, terms
    )
    total, grad = jax.jit(jax.value_and_grad(lambda x: loss(x, written, None, params)[0]))(params)
    assert abs(total) < 1e-5
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grad)) < 1e-5
