"""Laws of the model: stepwise equals at once, compilation options, and which tokens affect which.

The models are those of test_transformer_words.py, which states the laws of packing and padding.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import attention, batch, layers, transformer
from lm.interop import names
from tests import models as words

SOURCE, TARGET, VOCAB = words.SOURCE, words.TARGET, words.VOCAB
FAST_KEY = jax.random.key(0, impl="rbg")  # compiles in a fraction of the time


@functools.cache
def forward(config):
    """(params, Batch) -> logits [B, T, V]."""
    model = transformer.Transformer(config)
    apply = lambda params, examples: model.apply({"params": params}, examples)
    return jax.jit(apply, compiler_options=words.QUICK)


def logits_of(config, examples, params=None):
    """Logits as numpy; by default of random parameters."""
    params = words.drawn(config) if params is None else params
    return np.asarray(forward(config)(params, jax.tree.map(jnp.asarray, examples)))


@pytest.fixture(scope="module")
def examples():
    """Ragged, packed, with padding on either side; row 1 is one example and full."""
    return words.laid_out(words.PACKED, late=(2,))[0]


def change(examples, **places):
    """A copy with other tokens where the boolean array `inputs` or `targets` says so."""
    arrays = examples._asdict()
    for field, where in places.items():
        arrays[field] = np.where(where, 2 + (arrays[field] + 7) % (VOCAB - 2), arrays[field])
    return batch.Batch(**arrays)


# One step and all steps. ---------------------------------------------------------------------


@functools.cache
def decoder(config):
    """start: (params, inputs, segments) -> cache; steps: (params, cache, int [B, t]) -> cache,
    logits [B, t, V]."""
    apply = transformer.Transformer(config).apply

    def start(params, inputs, segments):
        return apply({"params": params}, inputs, segments, TARGET + 2, method="start")

    def steps(params, cache, fed):
        def advance(cache, token):
            logits, cache = apply({"params": params}, token, cache, method="decode_step")
            return cache, logits

        cache, logits = jax.lax.scan(advance, cache, fed.T)
        return cache, jnp.moveaxis(logits, 0, 1)

    return [jax.jit(f, compiler_options=words.QUICK) for f in (start, steps)]


def spoilt(config):
    """The parameters with NaN for all that no decoding step may compute again."""

    def spoil(path, leaf):
        names = [key.key for key in path]
        read = names[0].startswith("encoder") and config.shared_params != "all"
        again = "cross_attention" in names and ("key" in names or "value" in names)
        return leaf * np.nan if read or again else leaf

    return jax.tree_util.tree_map_with_path(spoil, words.drawn(config))


@words.every_word
def test_stepwise_decoding_gives_the_logits_of_the_full_forward_pass(name):
    """The inputs are read once; beams branch, swap, end and continue alone."""
    config = words.model_of(name)
    ragged = words.laid_out(words.ONE_A_ROW, late=(1, 4))[0]
    targets = np.random.default_rng(3).integers(2, VOCAB, ragged.targets.shape, dtype=np.int32)
    other = np.concatenate([targets[:, :4], 2 + (targets[:, 4:] + 3) % (VOCAB - 2)], axis=1)
    pair = [batch.Batch(*ragged[:2], each, np.ones_like(each)) for each in (targets, other)]
    expected = np.stack([words.outcome(config, each)[1] for each in pair], axis=1)  # [B, 2, t, V]
    fed = [batch.shift_right(each.targets, each[3], config.decoder_start_token_id) for each in pair]
    fed = np.stack(fed, axis=1)
    start, steps = decoder(config)
    cache, params = start(words.drawn(config), *ragged[:2]), spoilt(config)
    cache, early = steps(params, cache, fed[:, 0, :5])
    _, late = steps(params, cache, fed[:, 0, 5:])
    words.close(np.concatenate([early, late], axis=1), expected[:, 0])

    stored, first = [0], 5
    for parents, last in (([0, 0], 7), ([1, 0], 9)):
        cache = transformer.gather_beams(cache, children(len(fed), len(stored), parents))
        stored = [0, 1] if first == 5 else [stored[parent] for parent in parents]
        given = fed[:, stored, first:last].reshape(-1, last - first)
        cache, taken = steps(params, cache, given)
        words.close(taken, expected[:, stored, first:last].reshape(taken.shape))
        first = last


def sigmoid_attention(query, key, value, mask, bias, keep, config):
    """Attention without a softmax: each weight is the sigmoid of its score."""
    (rows, length, heads, width), groups = query.shape, key.shape[2]
    weights = jax.nn.sigmoid(attention.scores(query, key, mask, bias, config))
    weights = weights.reshape(rows, groups, -1, length, key.shape[1])
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(rows, length, heads, width)


def test_an_attention_variant_of_ones_own_decodes_stepwise_as_it_trains(monkeypatch):
    fields = {"attention.implementation": "sigmoid", "num_kv_heads": 2}
    monkeypatch.setitem(layers.ATTENTION, "sigmoid", sigmoid_attention)
    monkeypatch.setitem(words.WORDS, "sigmoid", fields)
    test_stepwise_decoding_gives_the_logits_of_the_full_forward_pass("sigmoid")
    rows, softmax = (
        words.laid_out(words.ONE_A_ROW)[0],
        fields | {"attention.implementation": "einsum"},
    )
    monkeypatch.setitem(words.WORDS, "softmax", softmax)
    logits = [words.outcome(words.model_of(name), rows)[1] for name in ("sigmoid", "softmax")]
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    with pytest.raises(ValueError, match="model.attention.implementation='sigmoid' cannot be exp"):
        names.family_of(words.model_of("sigmoid"))


def children(rows, width, parents):
    """The rows to take, so that each row's beams, `width` so far, become these of its beams."""
    return (np.arange(rows)[:, None] * width + np.array(parents)).reshape(-1)


def test_the_number_of_beams_may_shrink_and_grow_again():
    config = words.model_of("language_umt5")
    inputs = words.laid_out(words.ONE_A_ROW)[0][:2]
    fed = np.random.default_rng(3).integers(2, VOCAB, (len(inputs[0]), 3, 6), dtype=np.int32)
    start, steps = decoder(config)
    empty, params = start(words.drawn(config), *inputs), words.drawn(config)
    width, cache = 1, empty
    for first, last, parents in ((0, 3, [0, 0, 0]), (3, 4, [2, 0]), (4, 5, [1, 0]), (5, 6, [1, 1])):
        cache = transformer.gather_beams(cache, children(len(fed), width, parents))
        width = len(parents)
        given = fed[:, :width, first:last].reshape(-1, last - first)
        cache, logits = steps(params, cache, given)
    # The last of the second beams, and, going back: 1, 0, and three times 2.
    alone = np.stack([fed[:, beam, path] for path, beam in enumerate([2, 2, 2, 0, 1, 1])], axis=1)
    words.close(logits[1::2, -1], steps(params, empty, alone)[1][:, -1])


# One model, however it is compiled. ----------------------------------------------------------


@pytest.mark.parametrize("name", ["t5gemma_unequal", "shared", "language_umt5"])
def test_scanned_and_unrolled_layers_give_the_same_bits(name, examples):
    pair = [words.model_of(name, scan_layers=scan) for scan in (False, True)]
    assert transformer.param_shapes(pair[0]) == transformer.param_shapes(pair[1])
    np.testing.assert_array_equal(*(logits_of(config, examples) for config in pair))


def test_scanned_and_unrolled_layers_start_from_the_same_bits():
    pair = [words.model_of("t5_1_1", scan_layers=scan) for scan in (False, True)]
    inits = [transformer.Transformer(config).init for config in pair]
    actual, expected = (
        jax.jit(init, compiler_options=words.QUICK)(FAST_KEY, transformer.dummy_batch())
        for init in inits
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    "name, remat, compiled",
    [
        ("ul2", "dots", False),
        ("t5_1_0", "full", True),
    ],
)
def test_rematerialization_changes_no_number(name, remat, compiled):
    examples = words.laid_out(words.PACKED)[0]
    again, stored = (
        words.model_of(name, scan_layers=compiled, remat_policy=r) for r in (remat, "none")
    )
    actual, expected = words.outcome(again, examples), words.outcome(stored, examples)
    jax.tree.map(np.testing.assert_array_equal, actual[:2], expected[:2])
    words.close(actual[2], expected[2], part=2e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_rematerialization_stores_less_for_the_backward_pass(compiled):
    stored, jaxprs = {}, {}
    for remat in ("none", "dots", "full"):
        config = words.model_of("t5_1_1", scan_layers=compiled, remat_policy=remat)
        model = transformer.Transformer(config)
        loss = lambda params: model.apply({"params": params}, transformer.dummy_batch(8, 8)).sum()  # noqa: B023
        shapes = transformer.param_shapes(config)
        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], shapes)  # noqa: B023
        stored[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
        jaxprs[remat] = str(jax.make_jaxpr(loss)(shapes))
    parameters = transformer.parameter_count(config)
    assert (
        stored["full"] - parameters
        < stored["dots"] - parameters
        < (stored["none"] - parameters) / 2
    )
    assert "prevent_cse" not in jaxprs["none"]
    # In unrolled layers XLA would merge the recomputation with the forward pass.
    expected = f"prevent_cse={not compiled}"
    assert expected in jaxprs["full"] and expected in jaxprs["dots"]


@pytest.mark.parametrize("name", ["t5_1_1", "t5gemma_unequal", "2017"])
def test_bfloat16_differs_from_float32_by_rounding_only(name, examples):
    config = words.model_of(name)
    narrow = dataclasses.replace(config, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(transformer.param_shapes(narrow))} == {
        jnp.dtype("float32")
    }
    actual = logits_of(narrow, examples, words.drawn(config))
    assert actual.dtype == np.float32
    real = examples.targets_segment_ids > 0
    wide = logits_of(config, examples)[real]
    # Each result is off by at most 2**-8 of itself, and the errors of results in a row add as
    # independent ones do, in squares. A sub-layer has at most 8 results in a row (its norms, two
    # products, what is between, the sum); there are 2 of them in an encoder's layer, 3 in a
    # decoder's, and 6 more results about the towers (embeddings, final norms, the head's).
    depths = 2 * config.num_encoder_layers + 3 * config.num_decoder_layers
    error = np.sqrt(np.mean((actual[real] - wide) ** 2) / np.mean(wide**2))
    assert 2**-8 / 10 < error < 2**-8 * np.sqrt(8 * depths + 6)


# Sharing. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5_1_0", "prefix_t5gemma"])
def test_the_gradient_of_a_tied_head_is_the_sum_of_the_embedding_and_head_gradients(name, examples):
    tied = words.model_of(name)
    untied, params = dataclasses.replace(tied, lm_head="untied"), words.drawn(tied)
    factor = 16**-0.5 if tied.lm_head == "tied" else 1.0
    apart = params | {"head": factor * params["embed"]["embedding"].T}
    (total, logits, grads) = words.outcome(tied, examples)
    (same, alike, parts) = words.outcome(untied, examples, apart)
    words.close((total, logits), (same, alike))
    expected = parts["embed"]["embedding"] + factor * parts["head"].T
    words.close(grads["embed"]["embedding"], expected)
    assert set(parts) - set(grads) == {"head"}


def test_shared_towers_equal_two_with_equal_kernels_and_their_gradients_add(examples):
    shared = words.model_of("shared")
    apart, params = dataclasses.replace(shared, shared_params="embeddings"), words.drawn(shared)
    one = params["encoder"]
    cross = [name for name in one["layers"] if name.startswith("cross")]
    layers_ = {name: leaf for name, leaf in one["layers"].items() if name not in cross}
    alike = {"norm": one["norm"]}
    encoder = alike | {"layers": layers_, "relative": one["relative"]}
    decoder = alike | {"layers": one["layers"], "relative": one["causal_relative"]}
    pair = {"embed": params["embed"], "head": params["head"], "encoder": encoder}
    (total, logits, grads) = words.outcome(shared, examples)
    (same, expected, parts) = words.outcome(apart, examples, pair | {"decoder": decoder})
    words.close((total, logits), (same, expected))
    actual, added = grads["encoder"], parts["decoder"]["layers"]
    for name in layers_:
        summed = jax.tree.map(np.add, added[name], parts["encoder"]["layers"][name])
        words.close(actual["layers"][name], summed)
    for name in cross:
        words.close(actual["layers"][name], added[name])
    words.close(actual["relative"], parts["encoder"]["relative"])
    words.close(actual["causal_relative"], parts["decoder"]["relative"])
    assert "decoder" not in params and "relative" in one


@pytest.mark.parametrize("name, kv_heads", [("no_position", 1), ("t5gemma", 2), ("prefix_lm", 2)])
def test_grouped_key_value_heads_equal_repeated_heads(name, kv_heads, examples):
    few = words.model_of(name, num_kv_heads=kv_heads)
    many = dataclasses.replace(few, num_kv_heads=4)

    def repeat(path, leaf):
        kernel = path[-1].key == "kernel" and path[-2].key in ("key", "value")
        return jnp.repeat(leaf, 4 // kv_heads, axis=2) if kernel else leaf

    repeated = jax.tree_util.tree_map_with_path(repeat, words.drawn(few))
    real = examples.targets_segment_ids > 0
    actual, expected = logits_of(few, examples), logits_of(many, examples, repeated)
    words.close(actual[real], expected[real], part=5e-6)


@pytest.mark.parametrize("name", ["umt5", "language_umt5"])
def test_relative_biases_per_layer_have_separate_gradients(name, examples):
    config, grads = words.model_of(name), words.outcome(words.model_of(name), examples)[2]
    towers = ["decoder"] + ["encoder"] * ("encoder" in grads)
    for tower in towers:
        assert "relative" not in grads[tower]
        first, second = grads[tower]["layers"]["relative"]["relative_bias"]
        assert first.shape == (config.position.relative_attention_num_buckets, config.num_heads)
        assert np.abs(first).max() > 1e-4 and np.abs(second).max() > 1e-4
        assert np.abs(first - second).max() > 1e-4


@pytest.mark.parametrize("name", words.ONE_TOWER)
def test_a_model_without_encoder_has_no_cross_attention(name):
    shapes = transformer.param_shapes(words.model_of(name))
    assert set(shapes) <= {"embed", "head", "decoder"}
    assert not [part for part in shapes["decoder"]["layers"] if part.startswith("cross")]


# Who has a say. ------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", ["local", "local_global_1_1", "local_global_5_1"])
def test_a_token_beyond_the_window_does_not_affect_the_first_layer(windows):
    config = words.model_of(
        "language_umt5",
        num_decoder_layers=1,
        **{"attention.pattern": windows, "attention.window_size": 4, "position.kind": "rotary"},
    )
    examples = words.laid_out(((2,), (), (), (), (), ()))[0]
    before = logits_of(config, examples)[0]
    for path in (0, 3, 5):  # a target is read one place later
        after = logits_of(config, change(examples, targets=np.arange(TARGET) == path))[0]
        moved = (after != before).any(-1)
        distance = np.arange(TARGET) - (path + 1)
        np.testing.assert_array_equal(moved, (distance >= 0) & (distance < 4))


def test_a_fully_masked_query_gives_finite_numbers():
    config, (examples, _) = words.model_of("t5gemma"), words.laid_out(((), (0,), (), (), (), ()))
    blind = examples._replace(inputs_segment_ids=np.zeros_like(examples.inputs_segment_ids))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(words.outcome(config, blind)))


@pytest.mark.parametrize("tower, idle", [("encoder", [4]), ("decoder", [])])
def test_every_bucket_has_a_gradient_except_that_of_distance_zero_ahead(examples, tower, idle):
    """The encoder halves its buckets between the directions; the decoder keeps all for the past."""
    grads, unused = words.outcome(words.model_of("t5_1_1"), examples)[2], []
    for bucket, heads in enumerate(grads[tower]["relative"]["relative_bias"]):
        unused += [] if heads.any() else [bucket]
    assert unused == idle


# Dropout. ------------------------------------------------------------------------------------


def test_dropout_is_applied_where_t5_applies_it(examples):
    """Embedded input, attention weights, hidden units, each residual branch and the output."""
    found, dropping = {}, words.model_of("t5_1_1", num_kv_heads=2, dropout_rate=0.1)
    variables = {"params": words.drawn(dropping)}

    def note(call, args, kwargs, context):
        if isinstance(context.module, layers.Dropout):
            assert not args[1], "deterministic"
            path = context.module.path  # in the scan, once, however often it is traced
            found[path if "layers" in path else (*path, len(found))] = args[0].shape[1:]
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        train = functools.partial(transformer.Transformer(dropping).apply, deterministic=False)
        jax.eval_shape(train, variables, examples, rngs={"dropout": FAST_KEY})
    stream, hidden = lambda length: (length, 16), lambda length: (length, 24)
    weights = lambda keys: (2, 2, 1, keys)  # K, N/K, S: the same for all queries
    encoder = [stream(SOURCE)] * 4 + [hidden(SOURCE), weights(SOURCE)]
    decoder = [stream(TARGET)] * 5 + [hidden(TARGET), weights(TARGET)]
    decoder += [weights(SOURCE)]
    for tower, shapes in (("encoder", encoder), ("decoder", decoder)):
        actual = [shape for path, shape in found.items() if path[0] == tower]
        assert sorted(actual) == sorted(shapes)


def test_each_key_drops_differently_and_evaluation_drops_nothing(examples):
    config = words.model_of("t5_1_0", dropout_rate=0.5)
    apply, variables = transformer.Transformer(config).apply, {"params": words.drawn(config)}
    given = jax.tree.map(jnp.asarray, examples)

    def logits(key, deterministic):
        return apply(variables, given, deterministic=deterministic, rngs={"dropout": key})

    run = jax.jit(logits, static_argnums=1, compiler_options=words.QUICK)
    keys = [jax.random.key(seed, impl="rbg") for seed in range(2)]
    train, again, other = run(keys[0], False), run(keys[0], False), run(keys[1], False)
    np.testing.assert_array_equal(train, again)
    assert np.abs(train - other)[examples.targets_segment_ids > 0].max() > 0.01
    quiet = dataclasses.replace(config, dropout_rate=0.0)
    words.close(run(keys[0], True), logits_of(quiet, examples), part=1e-6)


# Words of the config. ------------------------------------------------------------------------

ALONE = dict(architecture="prefix_lm", num_encoder_layers=0)
OTHER = dict(shared_params="none")
IMPOSSIBLE = [
    (
        dict(num_heads=6, num_kv_heads=4),
        "num_heads=6 is not a multiple of model.num_kv_heads=4; .*num_kv_heads=6 for",
    ),
    (dict(num_encoder_layers=0), "num_encoder_layers=0 is too small for .*; use 1 or more"),
    (dict(num_encoder_layers=-1), "model.num_encoder_layers=-1 is too small; use 0 or more"),
    (dict(num_decoder_layers=0), "model.num_decoder_layers=0 is too small; use 1 or more"),
    (dict(vocab_size=-1), "model.vocab_size=-1 is too small; use 1 or more"),
    ({"attention.window_size": 0}, "model.attention.window_size=0 is too small; use 1 or more"),
    (
        dict(decoder_start_token_id=-1),
        "model.decoder_start_token_id=-1 is too small; use 0 or more",
    ),
    (
        dict(vocab_size=9, decoder_start_token_id=9),
        "decoder_start_token_id=9 is not an id; use 0 to below 9",
    ),
    (
        {"attention.logits_soft_cap": -1.0},
        "model.attention.logits_soft_cap=-1.0 is too small; use 0 or more",
    ),
    (
        dict(final_logits_soft_cap=float("nan")),
        "model.final_logits_soft_cap=nan is too small; use 0 or more",
    ),
    ({"attention.scale": 0.0}, "model.attention.scale=0.0 is too small; use more than 0.0001"),
    ({"position.rotary_base": 1.0}, "model.position.rotary_base=1.0 is too small; use more than 1"),
    (dict(dropout_rate=1.0), "model.dropout_rate=1.0 is not a probability; use 0 to below 1"),
    (dict(dropout_rate=float("nan")), "model.dropout_rate=nan is not a probability"),
    ({"position.relative_attention_num_buckets": 30}, "num_buckets=30 .* use a multiple of 4"),
    (
        {"position.relative_attention_max_distance": 16},
        "max_distance=16 do not make bins; .* more than its half",
    ),
    ({"position.kind": "rotary", "head_dim": 7}, "model.head_dim=7 is odd; .* use an even number"),
    (
        {"position.kind": "sinusoidal", "d_model": 7},
        "model.d_model=7 is odd; .* use an even number",
    ),
    (OTHER | dict(encoder=dict(d_ff=-1)), "encoder.d_ff=-1 is too small; use 1 or more, or 0"),
    (
        OTHER | dict(encoder=dict(num_heads=6, num_kv_heads=4)),
        "model.encoder.num_heads=6 is not a multiple of model.encoder.num_kv_heads=4",
    ),
    (
        OTHER | {"position.kind": "rotary", "encoder": dict(head_dim=5)},
        "model.encoder.head_dim=5 is odd; .* use an even number",
    ),
    (dict(encoder=dict(d_model=8)), "encoder.d_model=8 needs a separate embedding; use .*none"),
    (
        dict(shared_params="all", encoder=dict(d_ff=8)),
        "shared_params='all' needs equal towers",
    ),
    (
        dict(shared_params="all", num_encoder_layers=3),
        "shared_params='all' needs .* equal depths",
    ),
    (ALONE | dict(num_encoder_layers=2), "num_encoder_layers=2 is unused with .*; use 0"),
    (ALONE | dict(encoder=dict(d_ff=8)), r"model.encoder=.*d_ff=8.* is unused with .*prefix_lm"),
    (
        ALONE | dict(shared_params="all"),
        "model.shared_params='all' is unused with .*; leave it 'embeddings'",
    ),
    (dict(activation="gegelu"), "model.activation='gegelu' .* did you mean 'geglu'"),
    (dict(lm_head="tide"), "model.lm_head='tide' is unknown; .* 'tied'"),
    (dict(scan_layers="scan"), "model.scan_layers='scan' is not a boolean; use True or False"),
    (dict(dtype="float16"), "model.dtype='float16' is unknown; choose one of bfloat16"),
]


@pytest.mark.parametrize("fields, message", IMPOSSIBLE)
def test_an_impossible_model_is_refused_with_value_bound_and_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        transformer.ModelConfig.from_flat(fields)


@pytest.mark.parametrize("field", words.CHOICES)
def test_an_unknown_choice_is_refused_with_the_choices(field):
    with pytest.raises(ValueError, match=f"model.{field}='xyzzy' is unknown; choose one of"):
        transformer.ModelConfig.from_flat({field: "xyzzy"})
