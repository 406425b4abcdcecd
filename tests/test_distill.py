"""Laws of a student's loss: the weighted sum of terms on any layout, with a live or cached teacher;
the student's own answers are not labels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import batch, distill, losses, parallel, steps, transformer

VOCAB, ROWS, LENGTH = 16, 16, 6
TEXT_BYTES = np.arange(VOCAB)
CONFIG = steps.LossConfig(z_loss=0.1, label_smoothing=0.1)
SOFT = {
    "forward_kl": {},
    "reverse_kl": {"temperature": 2.0},
    "jsd": {"beta": 0.3, "temperature": 0.5},
}
SAME = {
    "forward_kl": {"temperature": 2.0},
    "reverse_kl": {"temperature": 2.0},
    "jsd": {"beta": 0.3, "temperature": 2.0},
}  # cached
ALL = (
    {"labels": {"weight": 0.4}}
    | SOFT
    | {
        "jsd": SOFT["jsd"] | {"weight": 0.2, "final_weight": 3.0},
        "logit_mse": {"weight": 0.1},
    }
)


class Table:
    """The simplest model: its logits are the row of the input; it notes whether it has a key."""

    def __init__(self):
        self.keys = []

    def apply(self, variables, examples, *, deterministic, rngs):
        self.keys.append(rngs.get("dropout"))
        assert deterministic == (not rngs)
        return variables["params"]["embed"]["embedding"][examples.inputs]


def draw(seed):
    table = 2 * np.random.default_rng(seed).normal(size=(VOCAB, VOCAB))
    return {"embed": {"embedding": jnp.asarray(table, jnp.float32)}}


def ragged(seed=5):
    """Rows of increasing lengths; the last two are empty."""
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, LENGTH + 1, ROWS))
    lengths[-2:] = 0
    segments = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    tokens = rng.integers(1, VOCAB, (2, ROWS, LENGTH), dtype=np.int32) * segments
    return batch.Batch(tokens[0], segments, tokens[1], segments)


STUDENT, TEACHER, EXAMPLES = draw(0), draw(1), ragged()
WEIGHT = int(batch.loss_weights(EXAMPLES).sum())


def logits(params, examples=EXAMPLES):
    return params["embed"]["embedding"][examples.inputs]


def taught(params, examples, k):
    """The teacher's top k for SAME, as a cache has it."""
    known = jax.nn.log_softmax(logits(params, examples))
    top, ids = jax.lax.top_k(known, k)
    left = jnp.exp(known / 2).sum(-1) - jnp.exp(top / 2).sum(-1)
    tail = jnp.log(jnp.maximum(left, 1e-9)) if k < VOCAB else jnp.full(left.shape, -jnp.inf)
    return batch.TeacherTopK(*map(np.asarray, (ids.astype(jnp.int32), top, tail)))


def loss_of(text, student=None, teacher=None):
    models = student or Table(), teacher or Table()
    terms = distill.loss_terms({text: {}} if isinstance(text, str) else text)
    return distill.make_distillation_loss(models[0], CONFIG, TEXT_BYTES, models[1], terms)


language = steps.make_language_loss(Table(), CONFIG, TEXT_BYTES)


def gradients(loss, student=STUDENT, examples=EXAMPLES, **given):
    """(total, gradient of the student, gradient of the teacher)."""
    total = lambda student, teacher: loss(student, examples, None, teacher, **given)[0]
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(student, TEACHER)


def close(ours, theirs, **tolerance):
    check = functools.partial(np.testing.assert_allclose, **tolerance or {"rtol": 1e-5})
    jax.tree.map(check, ours, theirs)


# The sum of the terms. -----------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_its_terms_and_reports_each():
    total, sums = loss_of(ALL)(STUDENT, EXAMPLES, None, TEACHER)
    weights = batch.loss_weights(EXAMPLES)
    pair = logits(STUDENT), logits(TEACHER), weights
    parts = {
        "labels": losses.cross_entropy(
            pair[0], EXAMPLES.targets, weights, z_loss=0.1, smoothing=0.1
        ),
        "forward_kl": losses.forward_kl(*pair),
        "reverse_kl": losses.reverse_kl(*pair, temperature=2.0),
        "jsd": losses.jsd(*pair, beta=0.3, temperature=0.5),
        "logit_mse": losses.logit_mse(*pair),
    }
    shares = dict(labels=0.4, forward_kl=1.0, reverse_kl=1.0, jsd=3.0, logit_mse=0.1)
    close(total, sum(shares[name] * part[0] for name, part in parts.items()))
    figures = steps.metrics_from_sums({name: float(value) for name, value in sums.items()})
    for name, (part, weight) in parts.items():
        close(figures[f"teacher/{name}"], part / weight)
    assert sums["loss"] == total and figures["loss"] == pytest.approx(float(total) / WEIGHT)


@pytest.mark.parametrize("text", ["labels", {"labels": {}, "forward_kl": {"weight": 0.0}}])
def test_labels_alone_are_the_language_loss(text):
    total, grad = jax.jit(jax.value_and_grad(lambda x: language(x, EXAMPLES)[0]))(STUDENT)
    ours, (mine, _) = gradients(loss_of(text))
    close(ours, total)
    close(mine, grad, atol=1e-5)


def test_without_a_teacher_the_loss_is_the_language_loss():
    assert loss_of(ALL)(STUDENT, EXAMPLES) == language(STUDENT, EXAMPLES)


@pytest.mark.parametrize("progress, weight", [(0.0, 2.0), (0.25, 1.75), (1.0, 1.0), (None, 1.0)])
def test_a_scheduled_weight_is_linear_and_evaluation_uses_the_last(progress, weight):
    once = loss_of("forward_kl")(STUDENT, EXAMPLES, None, TEACHER)[0]
    total, sums = loss_of({"forward_kl": {"weight": 2.0, "final_weight": 1.0}})(
        STUDENT, EXAMPLES, None, TEACHER, progress
    )
    close(total, weight * once)
    close(sums["teacher/forward_kl"], once)


def test_the_loss_of_a_batch_is_the_sum_of_its_splits():
    """A batch may mix span corruption and pairs of a task: rows are independent."""
    sums = jax.jit(lambda examples: loss_of(ALL)(STUDENT, examples, None, TEACHER)[1])
    added = [sums(jax.tree.map(lambda x, r=r: x[r::2], EXAMPLES)) for r in range(2)]
    whole = sums(EXAMPLES)
    close(jax.tree.map(lambda *x: sum(x), *added), whole)


# The teacher. --------------------------------------------------------------------------------


def test_the_teacher_has_no_gradient_and_the_student_only_at_targets():
    _, (student, teacher) = gradients(loss_of(SOFT))
    assert not np.asarray(teacher["embed"]["embedding"]).any()
    real = np.unique(EXAMPLES.inputs[EXAMPLES.targets_segment_ids > 0])
    moved = np.abs(student["embed"]["embedding"]).max(-1) > 0
    assert set(np.flatnonzero(moved)) == set(real)


@pytest.mark.parametrize("text", [*({name: SOFT[name]} for name in SOFT), "logit_mse"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(text):
    total, (grad, _) = gradients(loss_of(text), TEACHER)
    close(total, 0, atol=1e-5)
    close(grad["embed"]["embedding"], 0, atol=1e-5)


def test_the_teacher_has_no_dropout_when_the_student_has():
    student, teacher, key = Table(), Table(), jax.random.key(0)
    loss_of(ALL, student, teacher)(STUDENT, EXAMPLES, key, TEACHER)
    assert student.keys == [key] and teacher.keys == [None]


def test_metrics_are_those_of_the_student():
    _, sums = loss_of(ALL)(STUDENT, EXAMPLES, None, TEACHER)
    for name, value in steps.token_sums(logits(STUDENT), EXAMPLES, TEXT_BYTES).items():
        assert sums[name] == value, name


def test_padding_never_counts():
    real = EXAMPLES.targets_segment_ids > 0
    spoilt = EXAMPLES._replace(
        inputs=np.where(real, EXAMPLES.inputs, 3), targets=np.where(real, EXAMPLES.targets, 7)
    )
    for told in (None, taught(TEACHER, EXAMPLES, 4)):
        text = ALL if told is None else {"labels": {}} | SAME
        teacher = TEACHER if told is None else None
        ours = loss_of(text)(STUDENT, EXAMPLES._replace(teacher_top_k=told), None, teacher)
        close(loss_of(text)(STUDENT, spoilt._replace(teacher_top_k=told), None, teacher), ours)


# A cached teacher. ---------------------------------------------------------------------------


def test_a_cache_of_all_ids_equals_the_live_teacher():
    jsd = SAME["jsd"] | {"weight": 0.2, "final_weight": 3.0}
    text = {"labels": {}} | SAME | {"jsd": jsd}
    cached = EXAMPLES._replace(teacher_top_k=taught(TEACHER, EXAMPLES, VOCAB))
    live, (grad, _) = gradients(loss_of(text), progress=0.5)
    without = lambda x, examples, key, teacher, **given: loss_of(text)(x, examples, key, **given)
    total, (mine, _) = gradients(without, examples=cached, progress=0.5)
    close(total, live)
    close(mine, grad, atol=2e-5)


def test_a_cached_teacher_does_not_change_labels_or_metrics():
    cached = EXAMPLES._replace(teacher_top_k=taught(TEACHER, EXAMPLES, 3))
    ours = loss_of({"labels": {}} | SAME)(STUDENT, cached)[1]
    live = loss_of({"labels": {}} | SAME)(STUDENT, EXAMPLES, None, TEACHER)[1]
    assert ours.keys() == live.keys()
    for name in live.keys() - {"loss"}:
        soft = name in ("teacher/forward_kl", "teacher/reverse_kl", "teacher/jsd")
        assert (ours[name] < live[name]) if soft else (ours[name] == live[name]), name


# The student's own answers. ------------------------------------------------------------------


def test_labels_and_metrics_exclude_the_students_answers_and_divergences_do_not():
    own = np.arange(ROWS) % 2 == 1
    marked = EXAMPLES._replace(from_student=own)
    others = jax.tree.map(lambda x: x[~own], EXAMPLES)
    sums = loss_of({"labels": {}} | SOFT)(STUDENT, marked, None, TEACHER)[1]
    whole = loss_of({"labels": {}} | SOFT)(STUDENT, EXAMPLES, None, TEACHER)[1]
    theirs = loss_of({"labels": {}} | SOFT)(STUDENT, others, None, TEACHER)[1]
    counted = {"labelled", "nats", "hits", "bytes", "text_nats", "text_weight"}
    for name in counted | {"teacher/labels", "teacher/labels/weight"}:
        assert 0 < theirs[name] < whole[name], name
        close(sums[name], theirs[name], rtol=1e-5, err_msg=name)
    for name in ("weight", "inputs", "teacher/forward_kl", "teacher/reverse_kl", "teacher/jsd"):
        close(sums[name], whole[name], rtol=1e-5, err_msg=name)
    figures = steps.metrics_from_sums({name: float(value) for name, value in sums.items()})
    alone = steps.metrics_from_sums({name: float(value) for name, value in theirs.items()})
    for name in ("nats", "token_accuracy", "teacher/labels"):
        assert figures[name] == pytest.approx(alone[name], rel=1e-5), name


def test_the_policy_term_counts_only_the_students_answers():
    loss = loss_of("policy")
    assert loss(STUDENT, EXAMPLES, None, TEACHER)[0] == 0
    own = np.arange(ROWS) % 2 == 1
    mine = jax.tree.map(lambda x: x[own], EXAMPLES)._replace(from_student=np.ones(own.sum(), bool))
    total, sums = loss(STUDENT, EXAMPLES._replace(from_student=own), None, TEACHER)
    close(total, loss(STUDENT, mine, None, TEACHER)[0])
    assert total != 0 and sums["teacher/policy/weight"] == WEIGHT - sums["labelled"]


# Every layout. -------------------------------------------------------------------------------

MESH = {"strategy": "mesh"}
LAYOUTS = {  # name: (devices, ParallelConfig)
    "pmap 1, 2 parts": (1, {"num_microbatches": 2}),
    "pmap 4, 2 parts": (4, {"num_microbatches": 2}),
    "pmap 8": (8, {}),
    "data 2, fsdp 2, tensor 2": (8, MESH | {"fsdp": 2, "tensor": 2}),
    "data 4, fsdp 2, 2 parts": (8, MESH | {"fsdp": 2, "num_microbatches": 2}),
}
UPDATES = 3
DESCENT = optax.sgd(0.5)
MARKED = [ragged(seed)._replace(from_student=np.arange(ROWS) % 3 == 0) for seed in range(UPDATES)]
CACHED = [examples._replace(teacher_top_k=taught(TEACHER, examples, 4)) for examples in MARKED]
LIVE = ALL | {"policy": {"weight": 0.0, "final_weight": 0.5}}
DECAYING = {"labels": {}} | SAME
DECAYING |= {"jsd": SAME["jsd"] | {"weight": 2.0, "final_weight": 1.0}}


def fresh():
    count = lambda: jnp.zeros([], jnp.int32)
    return jax.device_get(steps.State(count(), STUDENT, DESCENT.init(STUDENT), count()))


def learnt(text, batches, strategy, num_microbatches=1, shards=0):
    """(last parameters, sums of each update); checks that there is one compilation."""
    step_config = steps.StepConfig(0, num_microbatches, shards, total_steps=UPDATES)
    student = Table()
    step = functools.partial(
        steps.train_step, loss=loss_of(text, student), optimizer=DESCENT, config=step_config
    )
    step, traced = strategy.compile(step), []
    state, found = strategy.place_state(fresh()), []
    teacher = strategy.place_state(TEACHER) if batches[0].teacher_top_k is None else None
    for examples in batches:
        state, sums = step(state, strategy.place_batch(examples), teacher)
        found.append(jax.device_get(strategy.fetch(sums)))
        traced.append(len(student.keys))
    assert len(set(traced)) == 1  # whatever the schedule says
    return jax.device_get(strategy.fetch(state.params)), found


@functools.cache
def alone(is_live):
    """The result on one device."""
    strategy = parallel.make_strategy(parallel.ParallelConfig(), jax.devices()[:1])
    text, batches = (LIVE, MARKED) if is_live else (DECAYING, CACHED)
    return learnt(text, batches, strategy)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("text", [LIVE, DECAYING], ids=["live", "cached"])
def test_every_layout_learns_the_same_from_a_teacher(name, text):
    count, options = LAYOUTS[name]
    config = parallel.ParallelConfig(**options)
    strategy = parallel.make_strategy(config, jax.devices()[:count])
    batches = CACHED if text != LIVE else MARKED
    params, found = learnt(text, batches, strategy, config.num_microbatches)
    for ours, theirs in zip(found, alone(text == LIVE)[1], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-5, err_msg=key)
    close(params, alone(text == LIVE)[0], atol=1e-5)


def test_progress_is_the_fraction_of_the_run():
    """0 at the first update and 1 at the last."""
    for number, sums in enumerate(alone(False)[1]):
        parts = [sums[f"teacher/{name}"] for name in ("labels", "forward_kl", "reverse_kl", "jsd")]
        jsd = 2 - number / (UPDATES - 1)
        close(sums["loss"], np.dot(parts, [1, 1, 1, jsd]))
    assert steps.StepConfig().progress(jnp.int32(3)) is None
    assert [float(steps.StepConfig(total_steps=n).progress(jnp.int32(0))) for n in (1, 2)] == [0, 0]


def test_deterministic_reduction_gives_equal_bits_on_any_number_of_devices():
    found = []
    for devices in (1, 2, 8):
        config = parallel.ParallelConfig(deterministic_reduction=True)
        strategy = parallel.make_strategy(config, jax.devices()[:devices])
        found.append(learnt(LIVE, MARKED, strategy, shards=config.fixed_shards))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])


# A real model. -------------------------------------------------------------------------------

SMALL = dict(num_heads=2, num_kv_heads=2, head_dim=4, d_ff=8, num_encoder_layers=1)
MODELS = [
    transformer.ModelConfig(vocab_size=VOCAB, d_model=8, num_decoder_layers=depth, **SMALL)
    for depth in (1, 2)
]


def test_packed_examples_have_the_loss_of_separate_ones():
    rng = np.random.default_rng(0)
    apart = rng.integers(2, VOCAB, (2, 4, 3), dtype=np.int32)  # side, example, position
    ones = np.ones((4, 3), np.int32)
    apart = batch.Batch(apart[0], ones, apart[1], ones)
    pack = lambda x: np.concatenate([x[:2], x[2:]], axis=1)
    numbers = np.repeat([[1, 2]], 3, axis=1).repeat(2, axis=0).reshape(2, 2, 3)
    numbers = np.sort(numbers.reshape(2, 6), axis=1).astype(np.int32)
    packed = batch.Batch(pack(apart.inputs), numbers, pack(apart.targets), numbers)
    models = [transformer.Transformer(config) for config in MODELS]
    params = [steps.init_params(model, seed) for seed, model in enumerate(models)]
    terms = distill.loss_terms({"labels": {}, "logit_mse": {}} | SOFT)
    loss = distill.make_distillation_loss(models[0], CONFIG, TEXT_BYTES, models[1], terms)
    total = jax.jit(lambda examples: loss(params[0], examples, None, params[1])[1])
    ours, theirs = total(packed), total(apart)
    assert ours["teacher/forward_kl"] > 0.01
    close(ours, theirs, rtol=1e-4, atol=1e-4)
