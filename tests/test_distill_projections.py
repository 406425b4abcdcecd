"""Laws of the pairs of compared layers, and of projections between different widths."""

from __future__ import annotations

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import checkpoints, distill, inference, runs, show, steps, train, transformer
from lm.distill import features
from tests.layouts import LAYOUTS, make
from tests.tiny_runs import assert_same_bits, go, last, pretrained  # noqa: F401
from tests.towers import EXAMPLES, MODEL, drawn, term

SIZES = {field: getattr(MODEL, field) for field in ("vocab_size", "d_ff", "num_heads", "head_dim")}
WIDE = dataclasses.replace(MODEL, d_model=32, num_heads=8, num_kv_heads=8)
HIDDEN = {"hidden": {"encoder": "even", "decoder": ((1, 1), (3, 2))}}
TERMS = distill.loss_terms({"labels": {}, "relations": {"heads": 2, "weight": 0.5}} | HIDDEN)


def deep(ours: int, theirs: int, **words):
    """Configs of a student and a teacher with these numbers of layers in each tower."""
    depths = [
        {f"num_{tower}_layers": n for tower in ("encoder", "decoder")} for n in (ours, theirs)
    ]
    return [MODEL.replace(sizes | words) for sizes in depths]


@pytest.fixture(scope="module")
def models():
    """(model, parameters) of a student with projections and of a wider teacher."""
    student, teacher = transformer.Transformer(MODEL), transformer.Transformer(WIDE)
    wanted = features.projection_shapes(TERMS, MODEL, WIDE)
    beside = {features.PROJECTIONS: features.init_projections(wanted, jax.random.key(0))}
    return (student, drawn(student, 0) | beside), (teacher, drawn(teacher, 1))


# Pairs of layers. ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, expected",
    [
        ("none", None),
        ("last", ((4, 12),)),
        ("all", ((1, 1), (2, 5), (3, 8), (4, 12))),
        ("even", ((2, 5), (4, 12))),
        ((1, 4), ((1, 1), (4, 12))),
        ((0, (3, 9)), ((0, 0), (3, 9))),
        (((4, 10),), ((4, 10),)),
        (((0, 3),), ((0, 3),)),
    ],
)
def test_layers_are_paired_as_configured_or_as_even_copies_them(words, expected):
    found = features.layer_pairs(
        term({"hidden": {"decoder": "last", "encoder": words}}), *deep(4, 12)
    )
    assert found.get("encoder") == expected and found["decoder"] == ((4, 12),)


def test_a_layer_is_paired_with_the_layer_that_it_copies():
    for ours, theirs in ((2, 6), (3, 6), (4, 5), (6, 6)):
        found = features.layer_pairs(term({"hidden": {"encoder": "all"}}), *deep(ours, theirs))[
            "encoder"
        ]
        assert [pair[1] - 1 for pair in found] == distill.evenly(theirs, ours)


def test_the_only_layer_of_a_tower_is_paired_with_the_last():
    for words in ("last", "all", "even"):
        found = features.layer_pairs(term({"relations": {"encoder": words}}), *deep(1, 6))
        assert found["encoder"] == ((1, 6),)


WINDOWS = {"attention.pattern": "local_global_1_1", "attention.window_size": 4}
REFUSED = [
    ({"hidden": {"encoder": (1, 5)}}, {}, {}, "encoder=(1, 5) has layer 5; use 0 to 4"),
    ({"hidden": {"decoder": ((2, 13),)}}, {}, {}, "decoder=((2, 13),) has layer 13; use 0 to 12"),
    ({"relations": {"encoder": (0,)}}, {}, {}, "has layer 0; use 1 to 4"),
    (
        {"hidden": {"encoder": "none", "decoder": "none"}},
        {},
        {},
        "compares no layers; set encoder or decoder to 'last'",
    ),
    (
        {"attention": {}},
        {"num_heads": 2, "num_kv_heads": 2},
        {},
        "has 2 and the teacher's 4; use relat",
    ),
    (
        {"attention": {"encoder": ((1, 2),)}},
        WINDOWS,
        WINDOWS,
        "layer 1 of the encoder with the teacher's 2",
    ),
    (
        {"relations": {"heads": 3}},
        {},
        {},
        "heads=3 does not divide the 16 units of the student's encoder",
    ),
    (
        {"relations": {}},
        {"num_heads": 8, "num_kv_heads": 8},
        {"head_dim": 3},
        "8 does not divide the 12",
    ),
    (
        {"hidden": {}},
        {"architecture": "prefix_lm", "num_encoder_layers": 0},
        {},
        "model.architecture='prefix_lm' is not the teacher's 'encoder_decoder'; use forward_kl",
    ),
]


@pytest.mark.parametrize("said, ours, theirs, sentence", REFUSED)
def test_models_that_cannot_be_compared_are_rejected(said, ours, theirs, sentence):
    student, teacher = deep(4, 12)
    models = student.replace(ours), teacher.replace(theirs)
    with pytest.raises(ValueError) as caught:
        features.projection_shapes((term(said),), *models)
    assert sentence in str(caught.value)


# Projections. --------------------------------------------------------------------------------


def test_only_towers_of_another_width_have_projections():
    assert features.projection_shapes(TERMS, MODEL, MODEL) == {}
    assert (
        features.projection_shapes(
            distill.loss_terms({"labels": {}, "relations": {"heads": 2}}),
            MODEL,
            WIDE,
        )
        == {}
    )
    both = features.projection_shapes(TERMS, MODEL, WIDE)
    found = {tower: made["layers"]["kernel"].shape for tower, made in both.items()}
    assert found == {"encoder": (1, 16, 32), "decoder": (2, 16, 32)}
    wide = dataclasses.replace(MODEL, shared_params="none", encoder={"d_model": 24})
    assert features.projection_shapes(TERMS, MODEL, wide).keys() == {"encoder"}


def test_fresh_projections_preserve_norms_and_differ():
    shapes = features.projection_shapes(TERMS, dataclasses.replace(MODEL, d_model=200), WIDE)
    one, other = (features.init_projections(shapes, jax.random.key(seed)) for seed in (0, 1))
    leaves = [leaf for leaf in jax.tree.leaves((one, other))]
    assert all(abs(float(jnp.std(leaf)) * 200**0.5 - 1) < 0.05 for leaf in leaves)
    layers = [layer for leaf in leaves for layer in np.asarray(leaf)]
    assert all((a != b).all() for i, a in enumerate(layers) for b in layers[:i])


def test_an_identity_projection_changes_no_loss():
    model = transformer.Transformer(MODEL)
    shown = [features.forward(model, drawn(model, s), EXAMPLES, None, True)[1] for s in (0, 1)]
    same = {"layers": {"kernel": jnp.broadcast_to(jnp.eye(16), (2, 16, 16))}}
    same = {tower: same for tower in ("encoder", "decoder")}
    totals = [features.compare(term(HIDDEN), *shown, EXAMPLES, p)[0] for p in (None, same)]
    np.testing.assert_allclose(*totals, rtol=1e-5)


def test_each_pair_of_layers_trains_its_own_projection(models):
    shown = [features.forward(*each, EXAMPLES, None, True)[1] for each in models]
    total = lambda beside: features.compare(term(HIDDEN), *shown, EXAMPLES, beside)[0]
    slope = jax.grad(total)(models[0][1][features.PROJECTIONS])
    assert all(jnp.max(jnp.abs(layer)) > 1e-3 for leaf in jax.tree.leaves(slope) for layer in leaf)
    first = {"layers": {"kernel": slope["decoder"]["layers"]["kernel"].at[1].set(0)}}
    alone = jax.grad(lambda beside: features.compare(
        term({"hidden": {"encoder": "none", "decoder": ((1, 1),)}}), *shown, EXAMPLES, beside
    )[0] / 2
    )({"decoder": models[0][1][features.PROJECTIONS]["decoder"]})  # fmt: skip
    np.testing.assert_allclose(alone["decoder"]["layers"]["kernel"], first["layers"]["kernel"])


# The update, on many devices. ----------------------------------------------------------------


@functools.cache
def update_of(name: str | None):
    """(state, sums) after an update on a layout; None: one device."""
    strategy = make(name) if name else None
    place = strategy.shard_activations if name else transformer.no_constraint
    student, teacher = (transformer.Transformer(config, place) for config in (MODEL, WIDE))
    beside = features.init_projections(
        features.projection_shapes(TERMS, MODEL, WIDE), jax.random.key(0)
    )
    params = jax.device_get(drawn(student, 0) | {features.PROJECTIONS: beside})
    taught = jax.device_get(drawn(teacher, 1))
    optimizer = optax.sgd(0.1)  # linear: Adam makes of a gradient near 0 a step of any sign
    parts = LAYOUTS[name][1].get("num_microbatches", 1) if name else 1
    step_config = steps.StepConfig(num_microbatches=parts, total_steps=10)
    state = jax.device_get(steps.init_state(student, optimizer, step_config, params))
    words = steps.LossConfig(), np.ones(48, np.int32)
    loss = distill.make_distillation_loss(student, *words, teacher, TERMS)
    step = functools.partial(steps.train_step, loss=loss, optimizer=optimizer, config=step_config)
    examples = jax.tree.map(lambda x: np.tile(x, (4, 1)), EXAMPLES)  # 16 rows
    if not name:
        return jax.device_get(jax.jit(step)(state, examples, taught))
    placed = (
        strategy.place_state(state),
        strategy.place_batch(examples),
        strategy.place_state(taught),
    )
    return jax.device_get(tuple(map(strategy.fetch, strategy.compile(step)(*placed))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pmap 8, 2 parts", "data 2, fsdp 2, tensor 2"])
def test_every_layout_computes_the_update_of_one_device(name):
    (ours, sums), (theirs, expected) = update_of(name), update_of(None)
    assert sums.keys() == expected.keys() >= {"teacher/hidden", "gradient_norm/projections"}
    for key in expected:
        np.testing.assert_allclose(sums[key], expected[key], rtol=1e-4, err_msg=key)
    for one, other in zip(*map(jax.tree.leaves, (ours.params, theirs.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


# A run. --------------------------------------------------------------------------------------

NARROW = {"model.d_model": 8, "model.num_encoder_layers": 1, "teacher.student_init": "random"}
NARROW |= {
    "teacher.loss": {"labels": {}, "hidden": {"decoder": "all"}},
    "stage": "distill",
}


@pytest.fixture(scope="module")
def narrow(go, pretrained):  # noqa: F811
    return go(**NARROW, **{"teacher.workdir": str(pretrained)})


def held(workdir, which: int):
    """The trained parameters of the checkpoint after an update."""
    run = runs.read_run(workdir)
    with checkpoints.Checkpoints(workdir / "checkpoints", read_only=True) as saved:
        return saved.restore_params(runs.trained_shapes(run), which)[0]


def test_projections_are_trained_and_not_read_with_the_model(narrow):
    before, after = (held(narrow, step)[features.PROJECTIONS] for step in (4, 6))
    assert {tower: leaf["layers"]["kernel"].shape for tower, leaf in after.items()} == {
        "encoder": (1, 8, 16),
        "decoder": (2, 8, 16),
    }
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.all(np.asarray(one) != np.asarray(other))
    run = runs.read_run(narrow)
    params, step = inference.read_params(run, runs.make_tokenizer(run))
    assert step == 6 and jax.tree.structure(params) == jax.tree.structure(run.shapes)
    assert_same_bits(params, features.model_params(held(narrow, 6)))
    assert "projections.encoder" in show.parameters(run)
    assert "projections/encoder" in show.sharding(run)


def test_a_student_is_readable_without_its_teacher(narrow, pretrained, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runs.trained_shapes.__globals__["checks"], "read_run", None)
    run = runs.read_run(narrow)
    assert inference.read_params(run, runs.make_tokenizer(run))[1] == 6


@pytest.mark.slow
def test_a_resumed_run_restores_its_projections(go, narrow, pretrained):  # noqa: F811
    whole = held(narrow, 6)
    other = go(
        **NARROW, **{"teacher.workdir": str(pretrained), "checkpoint.max_to_keep": 10, "steps": 6}
    )
    shutil.rmtree(other / "checkpoints" / "6")  # as if stopped before
    go(
        other,
        **NARROW,
        **{"teacher.workdir": str(pretrained), "checkpoint.max_to_keep": 10, "steps": 6},
    )
    assert_same_bits(held(other, 6), whole)


def test_init_from_a_student_ignores_its_projections(go, narrow):  # noqa: F811
    small = {key: NARROW[key] for key in ("model.d_model", "model.num_encoder_layers")}
    started = go(**small, init_from=str(narrow), steps=1)
    assert features.PROJECTIONS not in last(started)[0].params


def test_projections_with_lora_are_rejected(tiny_config, pretrained, tmp_path):  # noqa: F811
    changes = NARROW | {"teacher.workdir": str(pretrained), "lora.rank": 2}
    config = tiny_config(**changes | {"teacher.student_init": "even sliced"})
    with pytest.raises(ValueError) as caught:
        train.check(runs.make_run(config, tmp_path / "run"))
    assert "use relations, or lora.rank=0" in str(caught.value)
