"""Laws of the model: packed is alone, the future and padding have no say, one step is all steps."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, layers, transformer

ROWS, SOURCE, TARGET, VOCAB = 4, 12, 10, 64
CONFIG = transformer.ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    d_ff=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relative_buckets=8,
    relative_limit=10,
    layers="scanned",
)
FAST_KEY = jax.random.key(0, impl="rbg")  # compiles in a fraction of the time


@functools.cache
def compiled(config):
    """The forward pass: ({"params"}, Batch) -> logits."""
    return jax.jit(transformer.Transformer(config).apply)


@dataclasses.dataclass
class Tiny:
    """A model and its parameters."""

    config: transformer.ModelConfig
    params: dict

    def apply(self, *args, method):
        return transformer.Transformer(self.config).apply(
            {"params": self.params}, *args, method=method
        )

    def logits(self, examples):
        """Batch -> logits [B, T, V] as numpy."""
        return np.asarray(compiled(self.config)({"params": self.params}, examples))


@pytest.fixture(scope="module")
def tiny():
    init = jax.jit(transformer.Transformer(CONFIG).init)
    params = init(FAST_KEY, transformer.example())["params"]
    # Any scale but one, so that a norm that ignores its scale is seen.
    scales = np.random.default_rng(9).uniform(0.5, 1.5, 16)
    rescale = lambda path, x: x * scales if path[-1].key == "scale" else x
    return Tiny(CONFIG, jax.tree_util.tree_map_with_path(rescale, params))


def ragged(lengths, seed=0):
    """A batch with rows of segments [(inputs, targets), ...] tokens each, then padding."""
    rng = np.random.default_rng(seed)
    arrays = [np.zeros((ROWS, n), np.int32) for n in (SOURCE, SOURCE, TARGET, TARGET)]
    for row, segments in enumerate(lengths):
        starts = [0, 0]
        for number, sizes in enumerate(segments, start=1):
            for side, size in enumerate(sizes):
                place = slice(starts[side], starts[side] + size)
                arrays[2 * side][row, place] = rng.integers(2, VOCAB, size)
                arrays[2 * side + 1][row, place] = number
                starts[side] += size
    return batch.Batch(*arrays)


@pytest.fixture(scope="module")
def examples():
    """Ragged, packed in one row, with padding on either side."""
    return ragged([[(5, 4), (6, 5)], [(12, 10)], [(1, 2)], [(7, 3)]])


def change(examples, **places):
    """A copy with other tokens where the boolean array `inputs` or `targets` says so."""
    arrays = examples._asdict()
    for field, where in places.items():
        arrays[field] = np.where(where, 2 + (arrays[field] + 7) % (VOCAB - 2), arrays[field])
    return batch.Batch(**arrays)


# Who has a say. ------------------------------------------------------------------------------


def test_packing_two_examples_gives_the_logits_of_each_alone(tiny, examples):
    alone = batch.Batch(*(np.zeros_like(x) for x in examples))
    for number in (1, 2):
        for side in (0, 2):
            mine = examples[side + 1][0] == number
            alone[side][number][: mine.sum()] = examples[side][0][mine]
            alone[side + 1][number][: mine.sum()] = 1
    packed, single = tiny.logits(examples), tiny.logits(alone)
    for number in (1, 2):
        mine = examples.targets_segment_ids[0] == number
        np.testing.assert_allclose(packed[0][mine], single[number][: mine.sum()], atol=2e-5)


@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_target_has_a_say_only_in_what_follows_it(tiny, examples, place):
    where = np.arange(TARGET) == place
    before, after = tiny.logits(examples), tiny.logits(change(examples, targets=where))
    earlier = (examples.targets_segment_ids > 0) & (np.arange(TARGET) <= place)
    np.testing.assert_array_equal(before[earlier], after[earlier])
    assert np.abs(before - after)[1, place + 1 :].max(-1).min() > 1e-4  # row 1 is one segment


def test_a_segment_has_no_say_in_its_neighbour(tiny, examples):
    first = dict(inputs=examples.inputs_segment_ids == 1, targets=examples.targets_segment_ids == 1)
    changed = np.abs(tiny.logits(examples) - tiny.logits(change(examples, **first))).max(-1)[0]
    assert (changed[examples.targets_segment_ids[0] == 2] == 0).all()
    assert (changed[examples.targets_segment_ids[0] == 1] > 0).all()


def test_the_tokens_under_padding_have_no_say(tiny, examples):
    padding = dict(
        inputs=examples.inputs_segment_ids == 0, targets=examples.targets_segment_ids == 0
    )
    real = examples.targets_segment_ids > 0
    noisy = tiny.logits(change(examples, **padding))
    np.testing.assert_array_equal(tiny.logits(examples)[real], noisy[real])


def test_padding_leaves_logits_and_gradients_finite(tiny):
    empty = ragged([[], [(3, 2)], [(0, 4)], [(4, 0)]])
    assert np.isfinite(tiny.logits(empty)).all()


def test_each_position_of_the_encoder_sees_all_of_its_segment_and_nothing_else(tiny, examples):
    encode = jax.jit(
        lambda inputs: tiny.apply(inputs, examples.inputs_segment_ids, method="encode")
    )
    before = encode(examples.inputs)
    for place in (0, 4, 5, 10):
        changed = change(examples, inputs=np.arange(SOURCE) == place).inputs
        moved = np.abs(encode(changed) - before).max(-1) > 0
        segments = examples.inputs_segment_ids
        seen = (segments == segments[:, place : place + 1]) & (segments > 0)
        np.testing.assert_array_equal(moved[segments > 0], seen[segments > 0])


def test_the_order_of_inputs_matters_through_distance_alone(tiny, examples):
    """Moving a whole example along its row changes nothing: there are no absolute positions."""
    moved = batch.Batch(*(np.roll(x, 3, axis=1) for x in examples))
    real = examples.targets_segment_ids > 0
    real[:2] = False  # these rows are full
    shifted = np.roll(tiny.logits(moved), -3, axis=1)
    np.testing.assert_allclose(shifted[real], tiny.logits(examples)[real], atol=2e-5)


@pytest.mark.parametrize("tower, idle", [("encoder", [4]), ("decoder", [])])
def test_every_bucket_has_a_say_but_that_of_distance_zero_ahead(tiny, examples, tower, idle):
    """The encoder halves its buckets between the directions; the decoder keeps all for the past."""
    before, unused = tiny.logits(examples), []
    for bucket in range(CONFIG.relative_buckets):
        table = tiny.params[tower]["relative"]["relative_bias"].at[bucket, 0].add(3.0)
        towers = tiny.params[tower] | {"relative": {"relative_bias": table}}
        moved = Tiny(CONFIG, tiny.params | {tower: towers}).logits(examples)[1]
        unused += [bucket] if (moved == before[1]).all() else []
    assert unused == idle


# One step and all steps. ---------------------------------------------------------------------


def decoded(tiny, examples):
    """Logits [B, T, V], the targets fed one by one into the cache; and the caches' cross keys."""

    def advance(cache, token):
        logits, cache = tiny.apply(token, cache, method="decode_step")
        return cache, (logits, cache.cross_key)

    cache = tiny.apply(examples.inputs, examples.inputs_segment_ids, TARGET, method="start")
    fed = batch.shift_right(examples.targets, examples.targets_segment_ids)
    _, (logits, cross_keys) = jax.lax.scan(advance, cache, fed.T)
    return jnp.moveaxis(logits, 0, 1), cross_keys, cache.cross_key


def test_decoding_step_by_step_gives_the_logits_of_all_at_once(tiny):
    examples = ragged([[(5, 10)], [(12, 10)], [(1, 10)], [(7, 10)]])
    steps, cross_keys, first = jax.jit(functools.partial(decoded, tiny))(examples)
    np.testing.assert_allclose(steps, tiny.logits(examples), atol=2e-5)
    assert (np.asarray(cross_keys) == np.asarray(first)).all()  # computed once a sequence


def test_scanned_and_unrolled_layers_are_one_model(tiny, examples):
    unrolled = Tiny(dataclasses.replace(CONFIG, layers="unrolled"), tiny.params)
    assert transformer.shapes(unrolled.config) == transformer.shapes(CONFIG)
    np.testing.assert_allclose(unrolled.logits(examples), tiny.logits(examples), atol=1e-6)


def test_bfloat16_gives_float32_logits_near_those_of_float32(tiny, examples):
    narrow = Tiny(dataclasses.replace(CONFIG, dtype="bfloat16"), tiny.params)
    ours, wide = narrow.logits(examples), tiny.logits(examples)
    real = examples.targets_segment_ids > 0
    assert ours.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(transformer.shapes(narrow.config))} == {
        jnp.dtype("float32")
    }
    # 8 bits of mantissa over some ten rounded products in a row.
    assert np.abs(ours - wide)[real].max() < 10 * 2**-8 * np.abs(wide[real]).max()


def test_a_tied_head_is_the_embedding_over_root_d_model(tiny, examples):
    """With one embedding row k times another's, so is its logit: the head is the embedding."""
    params = {key: value for key, value in tiny.params.items() if key != "head"}
    rows = params["embed"]["embedding"]
    tied = Tiny(dataclasses.replace(CONFIG, head="tied"), params)
    assert transformer.parameter_count(tied.config) == (
        transformer.parameter_count(CONFIG) - 16 * VOCAB
    )
    untied = Tiny(CONFIG, params | {"head": rows.T / np.sqrt(16)})
    np.testing.assert_allclose(tied.logits(examples), untied.logits(examples), atol=1e-5)


def test_dropout_falls_on_t5s_places(tiny, examples):
    """Embedded input, attention weights, hidden units, each residual branch and the output."""
    found = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, layers.Dropout):
            assert not args[1], "deterministic"
            path = context.module.path  # in the scan, once, however often it is traced
            found[path if "layers" in path else (*path, len(found))] = args[0].shape[1:]
        return call(*args, **kwargs)

    dropping = dataclasses.replace(CONFIG, dropout_rate=0.1)
    with nn.intercept_methods(note):
        train = functools.partial(transformer.Transformer(dropping).apply, deterministic=False)
        jax.eval_shape(train, {"params": tiny.params}, examples, rngs={"dropout": FAST_KEY})
    stream, hidden = lambda length: (length, 16), lambda length: (length, 32)
    weights = lambda queries, keys: (2, 2, queries, keys)  # K, N/K, T, S
    encoder = [stream(SOURCE)] * 4 + [hidden(SOURCE), weights(SOURCE, SOURCE)]
    decoder = [stream(TARGET)] * 5 + [hidden(TARGET), weights(TARGET, TARGET)]
    decoder += [weights(TARGET, SOURCE)]
    for tower, shapes in (("encoder", encoder), ("decoder", decoder)):
        ours = [shape for path, shape in found.items() if path[0] == tower]
        assert sorted(ours) == sorted(shapes)


# Words of the config. ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(num_heads=6, num_kv_heads=4),
            "num_heads=6 is not a multiple of .*num_kv_heads=6 for",
        ),
        (dict(num_encoder_layers=0), "model.num_encoder_layers=0 is too small; use 1 or more"),
        (dict(vocab_size=-1), "model.vocab_size=-1 is too small; use 1 or more"),
        (dict(dropout_rate=1.0), "model.dropout_rate=1.0 is no probability; use 0 to below 1"),
        (dict(dropout_rate=float("nan")), "model.dropout_rate=nan is no probability"),
        (dict(relative_buckets=30), "relative_buckets=30 .* use a multiple of 4"),
        (dict(relative_limit=16), "relative_limit=16 do not make bins; .* more than its half"),
        (dict(activation="gegelu"), "model.activation='gegelu' .* did you mean 'geglu'"),
        (dict(head="tide"), "model.head='tide' is unknown; choose one of tied, untied"),
        (dict(layers="scan"), "model.layers='scan' is unknown; choose one of scanned, unrolled"),
        (dict(dtype="float16"), "model.dtype='float16' is unknown; choose one of bfloat16"),
    ],
)
def test_an_impossible_model_is_refused_with_value_bound_and_cure(fields, message):
    with pytest.raises(ValueError, match=message):
        transformer.ModelConfig(**fields)
