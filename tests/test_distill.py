"""Laws of distillation: the teacher only teaches; a student starts from layers it can use."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, distill, losses, steps, transformer

VOCAB, ROWS, LENGTH = 11, 3, 5
TEXT_BYTES = np.arange(VOCAB)


class Logits:
    """A model whose parameters are its logits; it notes whether its dropout is on."""

    def __init__(self):
        self.keys = []

    def apply(self, variables, examples, *, deterministic, rngs):
        self.keys.append(rngs.get("dropout"))
        assert deterministic == (not rngs)
        return variables["params"]


def draw(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(ROWS, LENGTH, VOCAB)), jnp.float32)


def ragged():
    segments = (np.arange(LENGTH) < np.array([[5], [2], [3]])).astype(np.int32)
    targets = np.random.default_rng(5).integers(1, VOCAB, (ROWS, LENGTH), dtype=np.int32) * segments
    return batch.Batch(targets, segments, targets, segments)


STUDENT, TEACHER, EXAMPLES = draw(0), draw(1), ragged()


def loss_of(student=None, teacher=None, **fields):
    config = steps.LossConfig(z_loss=0.1, smoothing=0.1)
    a, t = fields.get("teacher_weight", 0.8), fields.get("temperature", 2.0)
    terms = distill.parse(f"labels weight={1 - a}, forward_kl weight={a} temperature={t}")
    models = student or Logits(), teacher or Logits()
    return distill.make_distillation_loss(models[0], config, TEXT_BYTES, models[1], terms)


def gradients(loss):
    """(total, gradient of the student, gradient of the teacher)."""
    total = lambda student, teacher: loss(student, EXAMPLES, None, teacher)[0]
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(STUDENT, TEACHER)


# The loss. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_mixture_of_label_and_teacher(weight):
    total, sums = loss_of(teacher_weight=weight)(STUDENT, EXAMPLES, None, TEACHER)
    weights = batch.loss_weights(EXAMPLES)
    hard, _ = losses.cross_entropy(STUDENT, EXAMPLES.targets, weights, z_loss=0.1, smoothing=0.1)
    soft, _ = losses.forward_kl(STUDENT, TEACHER, weights, temperature=2.0)
    np.testing.assert_allclose(total, (1 - weight) * hard + weight * soft, rtol=1e-6)
    np.testing.assert_allclose(sums["teacher/forward_kl"], soft, rtol=1e-6)
    assert sums["loss"] == total


def test_a_teacher_without_weight_leaves_the_language_loss():
    config = steps.LossConfig(z_loss=0.1, smoothing=0.1)
    language = steps.make_language_loss(Logits(), config, TEXT_BYTES)
    total, grad = jax.jit(jax.value_and_grad(lambda x: language(x, EXAMPLES)[0]))(STUDENT)
    ours, (mine, _) = gradients(loss_of(teacher_weight=0.0))
    np.testing.assert_allclose(ours, total, rtol=1e-6)
    np.testing.assert_allclose(mine, grad, atol=1e-6)


def test_without_a_teacher_the_loss_is_the_language_loss():
    config = steps.LossConfig(z_loss=0.1, smoothing=0.1)
    language = steps.make_language_loss(Logits(), config, TEXT_BYTES)(STUDENT, EXAMPLES)
    assert loss_of()(STUDENT, EXAMPLES) == language


def test_the_teacher_gets_no_gradient_and_the_student_one_on_every_target():
    _, (student, teacher) = gradients(loss_of(teacher_weight=1.0))
    assert not np.asarray(teacher).any()
    real = EXAMPLES.targets_segment_ids > 0
    np.testing.assert_array_equal(np.abs(student).max(-1) > 0, real)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it():
    loss = loss_of(teacher_weight=1.0, temperature=1.0)
    alone = lambda x: loss(x, EXAMPLES, None, STUDENT)[0]
    total, grad = jax.jit(jax.value_and_grad(alone))(STUDENT)
    np.testing.assert_allclose(total, 0, atol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_the_teacher_has_no_dropout_when_the_student_has():
    student, teacher = Logits(), Logits()
    key = jax.random.key(0)
    loss_of(student, teacher)(STUDENT, EXAMPLES, key, TEACHER)
    assert student.keys == [key] and teacher.keys == [None]


def test_what_is_measured_is_the_student():
    _, sums = loss_of()(STUDENT, EXAMPLES, None, TEACHER)
    for name, value in steps.measure(STUDENT, EXAMPLES, TEXT_BYTES).items():
        assert sums[name] == value, name


# Where a student starts. ---------------------------------------------------------------------

BIG = transformer.ModelConfig(
    vocab_size=16,
    d_model=8,
    d_ff=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    num_encoder_layers=5,
    num_decoder_layers=4,
    layers="scanned",
)
SMALL = dataclasses.replace(BIG, num_encoder_layers=3, num_decoder_layers=2)


def random_params(config):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(draw, transformer.shapes(config))


@pytest.mark.parametrize("theirs", [1, 2, 3, 6, 8, 12, 24, 31])
def test_evenly_takes_first_and_last_in_order_and_as_far_apart_as_can_be(theirs):
    assert distill.evenly(theirs, theirs) == list(range(theirs))
    for ours in range(2, theirs + 1):
        chosen = distill.evenly(theirs, ours)
        gaps = np.diff(chosen)
        assert len(chosen) == ours and chosen[0] == 0 and chosen[-1] == theirs - 1
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
        mirrored = [theirs - 1 - layer for layer in reversed(chosen)]
        assert np.abs(np.subtract(chosen, mirrored)).max() <= 1


def test_a_student_has_the_shapes_of_its_config_and_the_bits_of_its_teacher():
    teacher = random_params(BIG)
    student = distill.init_student("even", teacher, BIG, SMALL)
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shape(student) == shape(transformer.shapes(SMALL))
    copied = {"encoder": [0, 2, 4], "decoder": [0, 3]}
    for path, ours in jax.tree_util.tree_leaves_with_path(student):
        theirs = teacher
        for entry in path:
            theirs = theirs[entry.key]
        if path[1:2] and path[1].key == "layers":
            theirs = theirs[jnp.array(copied[path[0].key])]
        np.testing.assert_array_equal(ours, theirs)


def test_a_student_as_deep_as_its_teacher_is_its_teacher():
    teacher = random_params(BIG)
    student = distill.init_student("even", teacher, BIG, BIG)
    jax.tree.map(np.testing.assert_array_equal, student, teacher)


def test_leaving_out_layers_that_do_nothing_changes_no_logit():
    teacher = random_params(BIG)
    for tower, idle in (("encoder", [1, 3]), ("decoder", [1, 2])):
        silence = lambda path, x, idle=idle: (
            x.at[jnp.array(idle)].set(0) if path[-2].key in ("out", "down") else x
        )
        layers = jax.tree_util.tree_map_with_path(silence, teacher[tower]["layers"])
        teacher[tower] = teacher[tower] | {"layers": layers}
    student = distill.init_student("even", teacher, BIG, SMALL)
    forward = lambda config, params: jax.jit(transformer.Transformer(config).apply)(
        {"params": params}, EXAMPLES
    )
    taught, whole = forward(SMALL, student), forward(BIG, teacher)
    np.testing.assert_allclose(taught, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "field, ours, theirs",
    [
        ("vocab_size", 32, 16),
        ("d_model", 16, 8),
        ("d_ff", 8, 16),
        ("num_kv_heads", 1, 2),
        ("head_dim", 8, 4),
        ("activation", "swiglu", "geglu"),
        ("head", "tied", "untied"),
        ("relative_buckets", 16, 32),
        ("relative_limit", 64, 128),
    ],
)
def test_a_student_of_another_shape_or_function_is_refused(field, ours, theirs):
    config = dataclasses.replace(SMALL, **{field: ours})
    message = f"model.{field}={ours!r} differs from the teacher's {theirs!r}, .*use {theirs!r}"
    with pytest.raises(ValueError, match=message):
        distill.init_student("even", random_params(BIG), BIG, config)


def test_a_student_deeper_than_its_teacher_is_refused():
    with pytest.raises(ValueError, match="num_encoder_layers=5 is more than the teacher's 3; use"):
        distill.init_student("even", random_params(SMALL), SMALL, BIG)


def test_a_random_student_takes_nothing_from_its_teacher():
    other = dataclasses.replace(BIG, d_model=12)
    assert distill.init_student("random", random_params(BIG), BIG, other) is None
    with pytest.raises(ValueError, match="teacher.init='rnadom' is unknown; .*'random'"):
        distill.init_student("rnadom", None, BIG, BIG)
