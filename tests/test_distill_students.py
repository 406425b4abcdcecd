"""Laws of student_init: copies are exact, and unsupported starts are rejected."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lm import attention, batch, distill, transformer

BIG = transformer.ModelConfig(
    vocab_size=16,
    d_model=8,
    d_ff=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_encoder_layers=3,
    num_decoder_layers=4,
    scan_layers=True,
)
NARROW = dict(d_model=4, d_ff=6, num_heads=2, num_kv_heads=2, head_dim=4)
VARIANTS = {
    "t5": {},
    "tied": dict(lm_head="tied", activation="relu"),
    "unscaled": {
        "lm_head": "tied_unscaled",
        "embedding_scale": "sqrt_d_model",
        "norm.kind": "rms_offset",
    },
    "apart": dict(shared_params="none"),
    "all": dict(shared_params="all", num_decoder_layers=3),
    "each": {"position.kind": "relative_per_layer"},
    "rotary": {
        "position.kind": "rotary",
        "attention.query_key_norm": "rms",
        "norm.kind": "rms_offset",
    },
    "layer": {"norm.kind": "layer", "position.kind": "sinusoidal"},
    "gemma": {
        "norm.kind": "rms_offset",
        "norm.placement": "both",
        "shared_params": "none",
        "attention.pattern": "local_global_1_1",
    },
    "prefix": dict(architecture="prefix_lm", num_encoder_layers=0),
    "wide_encoder": dict(shared_params="none", encoder=dict(d_model=12, num_heads=6, d_ff=16)),
}


def variant(name: str, **fields) -> transformer.ModelConfig:
    return BIG.replace(VARIANTS[name] | fields)


@functools.cache
def shapes(config) -> dict:
    return transformer.param_shapes(config)


def drawn(config, seed=0):
    """Random parameters, with norms' scales around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        made = 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(made + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(config))


def flat(params) -> dict:
    return traverse_util.flatten_dict(params, sep="/")


def examples(rows=2, sources=7, length=5) -> batch.Batch:
    rng = np.random.default_rng(3)
    ids = lambda size: rng.integers(1, 16, (rows, size), dtype=np.int32)
    segments = lambda size: (np.arange(size) < rng.integers(2, size + 1, (rows, 1))).astype(
        np.int32
    )
    return batch.Batch(ids(sources), segments(sources), ids(length), segments(length))


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params):
    return transformer.Transformer(config).apply({"params": params}, examples())


# Depth. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "chosen"),
    [("first", ([0, 1], [0, 1])), ("last", ([1, 2], [2, 3])), ("even", ([0, 2], [0, 3]))],
)
def test_each_tower_copies_the_chosen_layers(word, chosen):
    teacher = drawn(BIG)
    small = dataclasses.replace(BIG, num_encoder_layers=2, num_decoder_layers=2)
    student = distill.init_student(word, teacher, BIG, small)
    for tower, layers in zip(("encoder", "decoder"), chosen, strict=True):
        theirs = flat(teacher[tower]["layers"])
        for path, leaf in flat(student[tower]["layers"]).items():
            np.testing.assert_array_equal(leaf, theirs[path][np.array(layers)], err_msg=path)
    for path in ("embed/embedding", "head", "encoder/norm/scale", "decoder/relative/relative_bias"):
        np.testing.assert_array_equal(flat(student)[path], flat(teacher)[path])


def test_a_shallow_decoder_keeps_the_whole_encoder():
    small = dataclasses.replace(BIG, num_decoder_layers=1)
    teacher = drawn(BIG)
    student = distill.init_student("last", teacher, BIG, small)
    jax.tree.map(np.testing.assert_array_equal, student["encoder"], teacher["encoder"])
    last = jax.tree.map(lambda leaf: leaf[3:], teacher["decoder"]["layers"])
    jax.tree.map(np.testing.assert_array_equal, student["decoder"]["layers"], last)


# Width. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("width", ["sliced", "projected"])
def test_a_narrower_student_has_the_shapes_of_its_config(name, width):
    big = variant(name)
    small = dataclasses.replace(big, **NARROW)
    if name == "wide_encoder":
        small = dataclasses.replace(small, encoder=dict(d_model=6, num_heads=4, d_ff=8))
    if width == "projected" and name in ("layer", "gemma"):
        with pytest.raises(ValueError, match=r"model\.norm.* projected mixes; use sliced\."):
            distill.init_student(f"even {width}", drawn(big), big, small)
        return
    student = distill.init_student(f"even {width}", drawn(big), big, small)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert kinds(student) == kinds(shapes(small))
    if width == "sliced":
        return
    assert np.isfinite(logits(small, student)).all()


def test_a_sliced_student_is_a_bitwise_slice_of_its_teacher():
    small = dataclasses.replace(BIG, **NARROW, num_decoder_layers=2)
    teacher = drawn(BIG)
    student, theirs = flat(distill.init_student("first sliced", teacher, BIG, small)), flat(teacher)
    heads = [0, 2]  # of two groups of two, the first of each: its keys and values are kept
    look = "decoder/layers/self_attention"
    for path, part in {
        "embed/embedding": np.s_[:, :4],
        "head": np.s_[:4],
        f"{look}/query/kernel": np.s_[:2, :4, heads, :4],
        f"{look}/key/kernel": np.s_[:2, :4, :2, :4],
        f"{look}/out/kernel": np.s_[:2, heads, :4, :4],
        "encoder/layers/feed_forward/gate/kernel": np.s_[:, :4, :6],
        "encoder/layers/feed_forward/down/kernel": np.s_[:, :6, :4],
        "encoder/layers/self_norm/scale": np.s_[:, :4],
        "decoder/relative/relative_bias": np.s_[:, heads],
    }.items():
        np.testing.assert_array_equal(student[path], theirs[path][part], err_msg=path)


def test_slicing_equals_zeroing_the_rest_of_the_teacher():
    # Zeros in all that is left out of heads and d_ff: the teacher then computes the student.
    small = dataclasses.replace(BIG, d_ff=6, num_heads=2)
    teacher = flat(drawn(BIG))
    for path, leaf in teacher.items():
        if path.endswith("out/kernel"):
            teacher[path] = leaf.at[:, np.array([1, 3])].set(0)
        if path.endswith("down/kernel"):
            teacher[path] = leaf.at[:, 6:].set(0)
    teacher = traverse_util.unflatten_dict(teacher, sep="/")
    student = distill.init_student("even sliced", teacher, BIG, small)
    np.testing.assert_allclose(logits(small, student), logits(BIG, teacher), rtol=1e-4, atol=1e-4)


def test_sliced_rotary_heads_keep_their_frequencies():
    big = variant("rotary", **{"attention.query_key_norm": "none"})
    small = dataclasses.replace(big, head_dim=4)
    student = distill.init_student("even sliced", drawn(big), big, small)
    x = np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)
    rotated = {}
    for name, config, params in (("big", big, drawn(big)), ("small", small, student)):
        kernel = params["encoder"]["layers"]["self_attention"]["key"]["kernel"][0]
        keys = jnp.einsum("btd,dnh->btnh", x, kernel)
        rotated[name] = attention.rotate(keys, jnp.arange(6)[None], config.position.rotary_base)
    np.testing.assert_allclose(rotated["small"], rotated["big"][..., [0, 2, 4, 6]], atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"layer", "gemma"}))
def test_a_projection_of_full_width_changes_no_logit(name):
    config, teacher = variant(name), drawn(variant(name))
    if config.lm_head != "untied":  # which cannot take the last norm's scale: an even one it has
        last = teacher["decoder"]["norm"]
        last["scale"] = jnp.full_like(last["scale"], 0.7)
    student = distill.init_student("even projected", teacher, config, config, seed=1)
    assert not np.allclose(student["embed"]["embedding"], teacher["embed"]["embedding"], atol=0.1)
    np.testing.assert_allclose(
        logits(config, student), logits(config, teacher), rtol=2e-4, atol=2e-4
    )


def test_a_tied_student_copies_the_embedding_of_an_untied_teacher():
    config, teacher = variant("t5"), drawn(variant("t5"))
    student_config = dataclasses.replace(config, lm_head="tied")
    student = distill.init_student("even", teacher, config, student_config)
    assert jax.tree.structure(student) == jax.tree.structure(shapes(student_config))
    jax.tree.map(np.testing.assert_array_equal, student, {k: teacher[k] for k in student})
    turned = distill.init_student("even projected", teacher, config, student_config, seed=1)
    last = teacher["decoder"]["norm"]["scale"].mean()
    np.testing.assert_allclose(turned["decoder"]["norm"]["scale"], last, rtol=1e-6)
    for theirs, ours in (("tied", "untied"), ("tied", "tied_unscaled")):
        pair = (dataclasses.replace(config, lm_head=head) for head in (theirs, ours))
        with pytest.raises(ValueError, match=f"model.lm_head='{ours}' differs from the teacher's"):
            distill.check_student("even", *pair)


def test_a_projection_depends_on_the_seed_and_preserves_norms_on_average():
    one = dict(num_encoder_layers=1, num_decoder_layers=1)
    big = BIG.replace({"d_model": 256} | one)
    small = dataclasses.replace(big, d_model=64)
    teacher = drawn(big)
    made = [distill.init_student("even projected", teacher, big, small, s) for s in (0, 0, 1)]
    embeddings = [student["embed"]["embedding"] for student in made]
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    assert not np.allclose(embeddings[0], embeddings[2])
    part = np.square(embeddings[0]).sum() / np.square(teacher["embed"]["embedding"]).sum()
    assert 0.2 < part < 0.3, "a quarter of the axes has a quarter of the squares"


# Errors. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "fields", "sentence"),
    [
        ("evn", {}, "teacher.student_init='evn' is unknown; .*did you mean 'even'"),
        (
            "",
            {},
            "teacher.student_init='' is unsupported; write even, first or last, .* or random alone",
        ),
        ("sliced", {}, "is unsupported"),
        ("even last", {}, "is unsupported"),
        ("random sliced", {}, "is unsupported"),
        ("even shared", {}, "is unsupported"),
        ("shared even sliced", {}, "is unsupported"),
        (
            "even",
            dict(d_ff=6),
            "d_ff=6 differs .* 12, .* teacher.student_init='even sliced' for a part",
        ),
        ("even sliced", dict(d_ff=24), "d_ff=24 is more than the teacher's 12; use at most 12, or"),
        ("even sliced", dict(num_decoder_layers=5), "=5 is more than the teacher's 4; use at most"),
        ("even sliced", dict(num_kv_heads=1), "has 4 to each of model.num_kv_heads=1, and the te"),
        ("even sliced", dict(activation="relu"), "model.activation='relu' differs from the teach"),
        ("even sliced", dict(vocab_size=8), "model.vocab_size=8 differs from the teacher's 16"),
        ("shared even", dict(num_encoder_layers=2), "=2 is not the teacher's 3, .* use 3, or 'ev"),
        ("shared even", dict(d_ff=6), "model.d_ff=6 differs from the teacher's 12, .* use 12, or"),
    ],
)
def test_an_unsupported_start_is_rejected(init, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        distill.check_student(init, BIG, BIG.replace(fields))


@pytest.mark.parametrize("name", ["all", "prefix"])
def test_shared_requires_a_separate_encoder(name):
    with pytest.raises(ValueError, match="'shared even' needs an encoder of its own; use"):
        distill.check_student("shared even", variant(name), variant(name))


def test_rotary_heads_are_sliced_only_to_divisors():
    big = variant("rotary", head_dim=12)
    with pytest.raises(ValueError, match="model.head_dim=8 does not divide the teacher's 12"):
        distill.check_student("even sliced", big, variant("rotary", head_dim=8))


@pytest.mark.parametrize(("name", "own"), [("t5", "embed/"), ("apart", "encoder_embed/")])
def test_only_the_shared_encoder_is_frozen(name, own):
    config = variant(name)
    stays = distill.frozen("shared even", config)
    paths = {path for path in flat(shapes(config)) if re.search(stays, path)}
    assert paths == {p for p in flat(shapes(config)) if p.startswith(("encoder/", own))}
    assert distill.frozen("even", config) == distill.frozen("random", config) == ""
