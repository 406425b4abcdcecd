"""Every choice of the architecture obeys the model's laws, and agrees with a reference in numpy.

The stranger reads one example at a time, in float64, with loops and without masks of segments:
that packed rows agree with it says that packing and padding have no say.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lm import transformer
from lm.transformer import config as words
from tests import models
from tests.models import (  # noqa: F401
    CHOICES,  # noqa: F401
    ONE_A_ROW,
    ONE_TOWER,
    PACKED,
    QUICK,
    SOURCE,
    TARGET,
    VOCAB,
    WORDS,
    close,
    drawn,
    every_word,
    laid_out,
    model_of,
    outcome,
    texts,
)

# The stranger. -------------------------------------------------------------------------------


def normed(config, params, x, offset=0.0):
    if config.norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
        return (
            x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]
        )
    offset = 1.0 if config.norm.kind == "rms_offset" else 0.0
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (offset + params["scale"])


def turned(x, base):
    """Rotary positions as complex numbers: x [T, H], from position 0."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    number = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([number.real, number.imag], axis=-1)


def looked(config, params, x, source, seen, bias, rotary):
    """One attention layer, head by head: x [T, D], source [S, D], seen bool [T, S] -> [T, D]."""
    kernel = {name: params[name]["kernel"] for name in ("query", "key", "value", "out")}
    cap, out = config.attention.logits_soft_cap, 0.0
    for n in range(config.num_heads):
        k = n // (config.num_heads // config.num_kv_heads)
        query, key = x @ kernel["query"][:, n], source @ kernel["key"][:, k]
        if config.attention.query_key_norm == "rms":
            rms = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
            query = rms(query) * params["query_norm"]["scale"]
            key = rms(key) * params["key_norm"]["scale"]
        if rotary:
            query, key = (
                turned(query, config.position.rotary_base),
                turned(key, config.position.rotary_base),
            )
        scores = config.attention.scale * query @ key.T + bias[n]
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.where(seen, np.exp(scores), 0)
        weights /= weights.sum(-1, keepdims=True)
        out = out + weights @ (source @ kernel["value"][:, k]) @ kernel["out"][n]
    return out


def fed(config, params, x):
    gelu = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    silu = lambda x: x / (1 + np.exp(-x))
    act = dict(relu=lambda x: np.maximum(x, 0), gelu=gelu, geglu=gelu, swiglu=silu)
    hidden = x @ params["up"]["kernel"]
    if "glu" in config.activation:
        hidden = act[config.activation](x @ params["gate"]["kernel"]) * hidden
    else:
        hidden = act[config.activation](hidden)
    return hidden @ params["down"]["kernel"]


def through(config, params, x, seen, table, depth, encoded=None):
    """A tower: x [T, D], seen bool [T, T] -> [T, D]. table: the relative one's name."""
    away = np.arange(len(x))[None] - np.arange(len(x))[:, None]
    pair = not table.startswith("causal")
    bucket = functools.partial(models.exact_bucket, bidirectional=pair, buckets=8, limit=10)
    buckets = np.vectorize(bucket)(away)
    pattern = dict(local="l", local_global_1_1="lg", local_global_5_1="lllllg")
    pattern = pattern.get(config.attention.pattern, "g")
    for layer in range(depth):
        own = jax.tree.map(lambda leaf: leaf[layer], params["layers"])  # noqa: B023
        local = pattern[layer % len(pattern)] == "l"
        sight = seen & (abs(away) < config.attention.window_size) if local else seen
        bias = np.zeros(config.num_heads)
        if config.position.kind.startswith("relative"):
            holder = own if config.position.kind == "relative_per_layer" else params
            name = table if table in holder else "relative"
            bias = np.moveaxis(holder[name]["relative_bias"][buckets], -1, 0)
        rotary = config.position.kind == "rotary"
        self_look = lambda x: looked(config, own["self_attention"], x, x, sight, bias, rotary)  # noqa: B023
        none = np.zeros(config.num_heads)
        cross = lambda x: looked(config, own["cross_attention"], x, encoded, True, none, False)  # noqa: B023
        feed = lambda x: fed(config, own["feed_forward"], x)  # noqa: B023
        parts = [("self", self_look), ("cross", cross), ("ff", feed)]
        for part, change in parts if encoded is not None else parts[::2]:
            if config.norm.placement == "post":
                x = normed(config, own[f"{part}_post_norm"], x + change(x))
                continue
            changed = change(normed(config, own[f"{part}_norm"], x))
            if config.norm.placement == "both":
                changed = normed(config, own[f"{part}_post_norm"], changed)
            x = x + changed
    return x if config.norm.placement == "post" else normed(config, params["norm"], x)


def embedded(config, table, ids):
    x, width = table[ids], table.shape[1]
    if config.embedding_scale == "sqrt_d_model":
        x = x * np.sqrt(width)
    if config.position.kind == "sinusoidal":
        at, wave = np.arange(len(ids))[:, None], np.arange(width // 2)
        angle = at / 10_000 ** (2 * wave / width)
        x = x + np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    return x


def told(config, inputs, targets, params=None):
    """The reference's logits [T, V] of one example."""
    params = jax.tree.map(np.float64, drawn(config) if params is None else params)
    table = params["embed"]["embedding"]
    given = np.concatenate([[config.decoder_start_token_id], targets[:-1]]).astype(int)
    depth, causal = config.num_decoder_layers, "causal_relative"
    if config.architecture == "encoder_decoder":
        own = {key: size for key, size in dataclasses.asdict(config.encoder).items() if size}
        actual = dataclasses.replace(config, encoder=words.EncoderConfig(), **own)
        read = embedded(actual, params.get("encoder_embed", params["embed"])["embedding"], inputs)
        all_seen = np.ones((len(inputs), len(inputs)), bool)
        encoded = through(
            actual, params["encoder"], read, all_seen, "relative", config.num_encoder_layers
        )
        tower = params["encoder" if config.shared_params == "all" else "decoder"]
        past = np.tri(len(given), dtype=bool)
        x = through(config, tower, embedded(config, table, given), past, causal, depth, encoded)
    else:
        x = embedded(config, table, np.concatenate([inputs, given]))
        seen, relative = np.tri(len(x), dtype=bool), causal
        if config.architecture == "prefix_lm":
            seen, relative = seen | (np.arange(len(x)) < len(inputs)), "relative"
        x = through(config, params["decoder"], x, seen, relative, depth)[len(inputs) :]
    if config.lm_head == "tied":
        x = x / np.sqrt(config.d_model)
    logits = x @ (params["head"] if config.lm_head == "untied" else table.T)
    cap = config.final_logits_soft_cap
    return cap * np.tanh(logits / cap) if cap else logits


# Packed, padded, alone. ----------------------------------------------------------------------


def test_every_choice_of_every_key_is_tested():
    tested = {name: model_of(name) for name in WORDS}
    for field, table in CHOICES.items():
        missing = set(table) - {config.to_flat()[field] for config in tested.values()}
        assert missing <= {"bfloat16"}, f"{field}: {missing}"


@every_word
@pytest.mark.parametrize("rows, late", [(PACKED, (0,)), (ONE_A_ROW, (1, 4))])
def test_packed_and_padded_logits_equal_the_references_of_each_example(name, rows, late):
    config = model_of(name)
    examples, places = laid_out(rows, late)
    _, logits, _ = outcome(config, examples)
    for number, (row, path) in places.items():
        close(logits[row, path], told(config, *texts()[number]))


@every_word
def test_packed_loss_and_gradient_are_sums_over_single_examples(name):
    config = model_of(name)
    packed, alone = (outcome(config, laid_out(rows)[0]) for rows in (PACKED, ONE_A_ROW))
    close((packed[0], packed[2]), (alone[0], alone[2]))


@every_word
def test_the_ids_and_the_side_of_padding_change_no_number(name):
    config = model_of(name)
    (examples, places), (moved, others) = laid_out(PACKED), laid_out(PACKED, (0, 1, 2), seed=7)
    (_, logits, grads), (_, after, grads_after) = (outcome(config, x) for x in (examples, moved))
    for number, (row, path) in places.items():
        close(after[others[number]], logits[row, path])
    close(grads_after, grads)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads)), "all have a say"


@every_word
def test_a_target_affects_only_later_logits(name):
    config = model_of(name)
    examples, places = laid_out(PACKED)
    before = outcome(config, examples)[1]
    for number, index in ((2, 4), (1, 1)):
        row, path = places[number]
        at = path.start + index
        targets = examples.targets.copy()
        targets[row, at] = 2 + (targets[row, at] + 3) % (VOCAB - 2)
        moved = (outcome(config, examples._replace(targets=targets))[1] != before).any(-1)
        moved &= examples.targets_segment_ids > 0
        assert not moved[row, : at + 1].any() and moved[row, at + 1]
        assert not moved[row, path.stop :].any() and not np.delete(moved, row, axis=0).any()


@pytest.mark.parametrize("name", ONE_TOWER)
def test_without_encoder_the_architecture_decides_how_inputs_are_masked(name):
    """A prefix LM's inputs see each other whole, a language model's only what is before."""
    config = model_of(name, num_decoder_layers=1, **{"attention.pattern": "global"})
    model, (examples, _) = transformer.Transformer(config), laid_out(((2,), (), (), (), (), ()))

    def hidden(inputs):
        given = examples._replace(inputs=inputs)
        tower = lambda module, method: module.name == "decoder"
        stored = model.apply(
            {"params": drawn(config)}, given, capture_intermediates=tower, mutable="intermediates"
        )
        return stored[1]["intermediates"]["decoder"]["__call__"][0][0][0]

    hidden = jax.jit(hidden, compiler_options=QUICK)
    inputs = examples.inputs.copy()
    inputs[0, 6] = 2 + (inputs[0, 6] + 3) % (VOCAB - 2)
    moved = np.asarray((hidden(inputs) != hidden(examples.inputs)).any(-1))
    prefix = config.architecture == "prefix_lm"
    np.testing.assert_array_equal(moved, prefix | (np.arange(SOURCE + TARGET) >= 6))


@pytest.mark.parametrize(
    "name", ["t5_1_1", "t5gemma_unequal", "2017", "prefix_lm", "language_umt5"]
)
def test_the_amount_of_padding_changes_no_number(name):
    config = model_of(name)
    examples, places = laid_out(ONE_A_ROW, (1,))
    wider = jax.tree.map(lambda x: np.pad(x, ((0, 0), (3, 2))), examples)
    (total, logits, grads), (more, after, grads_after) = (
        outcome(config, x) for x in (examples, wider)
    )
    for row, path in places.values():
        close(after[:, 3:-2][row, path], logits[row, path])
    close((more, grads_after), (total, grads))


def test_shared_towers_have_separate_relative_biases_as_encoder_and_decoder():
    config = model_of("shared", scan_layers=True, **{"position.kind": "relative_per_layer"})
    examples, places = laid_out(PACKED)
    assert {"relative", "causal_relative"} <= set(drawn(config)["encoder"]["layers"])
    for number, (row, path) in places.items():
        close(outcome(config, examples)[1][row, path], told(config, *texts()[number]))
