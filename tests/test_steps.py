"""Laws of train and eval steps: sums, micro-batches, devices, keys, and a toy model that learns."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from lm import batch, decoding, optimizers, steps, transformer

EOS, VOCAB, ROWS, LENGTH, SENTINELS = 1, 24, 4, 6, 4
# Bytes of each id: nothing for pad, eos and unk, nothing for the last four ids, the sentinels.
TEXT_BYTES = np.array([0, 0, 0, *range(1, VOCAB - SENTINELS - 2), *[0] * SENTINELS])


def ragged(sizes=(6, 2, 0, 4), seed=0):
    """A batch whose inputs and targets have these lengths and end with eos; 0: padding."""
    rng = np.random.default_rng(seed)
    segments = (np.arange(LENGTH) < np.array(sizes)[:, None]).astype(np.int32)
    tokens = np.tile(np.arange(3, VOCAB, dtype=np.int32), (2, ROWS, 1))
    tokens = rng.permuted(tokens, axis=2)[:, :, :LENGTH]  # no token twice in a row
    tokens[:, np.arange(LENGTH) == np.array(sizes)[:, None] - 1] = EOS
    tokens *= segments
    return batch.Batch(tokens[0], segments, tokens[1], segments)


class Table:
    """The simplest model: its logits are the row of the input; with a key, noise is added."""

    def init(self, key, examples):
        return {"params": {"table": jax.random.normal(key, (VOCAB, VOCAB))}}

    def apply(self, variables, examples, *, deterministic, rngs):
        logits = variables["params"]["table"][examples.inputs]
        assert deterministic == (not rngs)
        return logits if deterministic else logits + jax.random.normal(rngs["dropout"], (1, 1, 1))


def table(seed=0):
    return {"table": jnp.asarray(np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)))}


def noiseless(params, examples, key=None, teacher=None, progress=None):
    """The language loss of `Table` without noise."""
    return steps.make_language_loss(Table(), LOSS, TEXT_BYTES)(params, examples)


LOSS = steps.LossConfig(z_loss=0.01, label_smoothing=0.1)
DESCENT = optax.sgd(0.5)  # the step is half the gradient


def step_of(loss=noiseless, optimizer=DESCENT, axis=None, **options):
    """The update with an optimizer, compiled unless it has a device axis."""
    options = dict(loss=loss, optimizer=optimizer, config=steps.StepConfig(**options), axis=axis)
    step = functools.partial(steps.train_step, **options)
    return step if axis else jax.jit(step)


def rows(devices):
    """The axis of a pmap over this number of devices."""
    return steps.Axis("rows", tuple(range(devices)))


def state_of(params, step=0, optimizer=DESCENT, average=None):
    count = lambda number: jnp.asarray(number, jnp.int32)
    return steps.State(count(step), params, optimizer.init(params), count(0), average)


def assert_same_update(ours, theirs):
    (state, sums), (other, others) = ours, theirs
    np.testing.assert_allclose(state.params["table"], other.params["table"], atol=1e-6)
    assert sums.keys() == others.keys()
    for name in sums:
        np.testing.assert_allclose(sums[name], others[name], rtol=1e-5, err_msg=name)


# One update. ---------------------------------------------------------------------------------


def test_an_update_is_the_gradient_of_the_loss_per_target_token():
    examples, params = ragged(), table()
    state, sums = step_of()(state_of(params), examples)
    mean = jax.jit(jax.value_and_grad(lambda params: noiseless(params, examples)[0] / 12))
    value, grad = mean(params)[0], mean(params)[1]["table"]  # 12 targets in the batch
    np.testing.assert_allclose(state.params["table"], params["table"] - grad / 2, atol=1e-6)
    np.testing.assert_allclose(sums["gradient_norm"], np.linalg.norm(grad), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"] / sums["weight"], value, rtol=1e-6)
    assert state.step == 1 and sums["weight"] == 12


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_update_of_the_whole_ragged_batch(parts):
    examples, state = ragged(), state_of(table())
    assert_same_update(step_of(num_microbatches=parts)(state, examples), step_of()(state, examples))


@pytest.mark.parametrize("devices, parts", [(2, 1), (4, 1), (2, 2)])
def test_devices_give_the_update_of_the_whole_ragged_batch(devices, parts):
    examples, state = ragged(), state_of(table())
    split = jax.tree.map(lambda x: x.reshape(devices, -1, LENGTH), examples)
    step = step_of(axis=rows(devices), num_microbatches=parts)
    many = jax.pmap(step, axis_name="rows", in_axes=(None, 0), devices=jax.devices()[:devices])(
        state, split
    )
    for device in range(devices):
        mine = jax.tree.map(lambda x, device=device: np.asarray(x[device]), many)
        assert_same_update(mine, step_of()(state, examples))


def test_a_batch_of_padding_changes_nothing():
    params = table()
    state, sums = step_of()(state_of(params), ragged((0, 0, 0, 0)))
    np.testing.assert_array_equal(state.params["table"], params["table"])
    shown = {"finite": 1, "weight_norm/table": np.linalg.norm(params["table"])}
    for name, value in sums.items():
        np.testing.assert_allclose(value, shown.get(name, 0), rtol=1e-6, err_msg=name)


def test_evaluation_sums_what_training_sums_and_adds_up_over_devices():
    examples, params = ragged(), table()
    _, trained = step_of()(state_of(params), examples)
    sums = jax.jit(functools.partial(steps.eval_step, loss=noiseless))(params, examples)
    split = jax.tree.map(lambda x: x.reshape(2, -1, LENGTH), examples)
    evaluate = functools.partial(steps.eval_step, loss=noiseless, axis=rows(2))
    many = jax.pmap(evaluate, "rows", in_axes=(None, 0), devices=jax.devices()[:2])(params, split)
    for name, value in sums.items():
        np.testing.assert_allclose(trained[name], value, rtol=1e-6)
        np.testing.assert_allclose(many[name], [value, value], rtol=1e-6)


# Metrics and updates that are not finite. -----------------------------------------------------

ADAM = optax.adam(0.1)


def grouped(params, examples, key=None, teacher=None, progress=None):
    """A loss of two groups of parameters with simple norms."""
    total = jnp.sum(params["a"]["x"] * 3 + params["a"]["y"] * 4) + jnp.sum(params["b"] * 12)
    return total, {"weight": jnp.asarray(2.0)}


def test_norms_are_reported_in_total_and_per_group():
    params = {"a": {"x": jnp.ones(4), "y": jnp.zeros(4)}, "b": jnp.full(4, -3.0)}
    state, sums = step_of(grouped)(state_of(params), ragged())
    expected = {  # a gradient of 3 / 2, 4 / 2 and 12 / 2 in each of four elements
        "gradient_norm": 13.0,
        "gradient_norm/a": 5.0,
        "gradient_norm/b": 12.0,
        "weight_norm/a": 2.0,
        "weight_norm/b": 6.0,
        "update_ratio/a": 2.5 / 2,
        "update_ratio/b": 6.0 / 6,  # descent by half the gradient
        "finite": 1.0,
        "skipped": 0.0,
        "weight": 2.0,
    }
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)
        assert sums[name].dtype == jnp.float32 and sums[name].shape == ()


def poisoned(params, examples, key, teacher, progress):
    """A loss whose value or gradient is NaN or infinite, as `teacher` selects."""
    total, sums = noiseless(params, examples)
    spoilt = params["table"][0, 0]
    nothing = jnp.where(teacher["gradient"] == 0, 0.0, spoilt * teacher["gradient"])
    return total + nothing + teacher["loss"], sums


FAULTS = [("loss", jnp.nan), ("loss", jnp.inf), ("gradient", jnp.nan), ("gradient", -jnp.inf)]


@pytest.fixture(scope="module")
def fragile():
    """The update with `poisoned`, of a state with all fields."""
    return step_of(poisoned, ADAM, ema_decay=0.9)


@pytest.mark.parametrize("where, value", FAULTS)
def test_an_update_that_is_not_finite_leaves_every_bit_but_the_counters(fragile, where, value):
    sound = {"loss": 0.0, "gradient": 0.0}
    before, sums = fragile(state_of(table(), 7, ADAM, table(1)), ragged(), sound)
    assert sums["finite"] == 1 and sums["skipped"] == 0
    after, sums = fragile(before, ragged(), sound | {where: value})
    assert sums["finite"] == 0 and sums["skipped"] == 1
    assert (after.step, after.skipped) == (9, 1)
    for kept in ("params", "opt_state", "average"):
        found, expected = getattr(after, kept), getattr(before, kept)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    healed, sums = fragile(after, ragged(), sound)
    assert sums["finite"] == 1 and sums["skipped"] == healed.skipped == 1 and healed.step == 10
    expected, _ = fragile(before, ragged(), sound)
    jax.tree.map(np.testing.assert_array_equal, healed.params, expected.params)


def test_one_device_that_is_not_finite_skips_the_update_on_all():
    examples, params = ragged(), table()
    split = jax.tree.map(lambda x: x.reshape(2, -1, LENGTH), examples)
    teacher = {"loss": jnp.array([0.0, jnp.nan]), "gradient": jnp.zeros(2)}
    step = jax.pmap(
        step_of(poisoned, axis=rows(2)), "rows", in_axes=(None, 0, 0), devices=jax.devices()[:2]
    )
    state, sums = step(state_of(params), split, teacher)
    assert sums["finite"].tolist() == [0, 0] and state.skipped.tolist() == [1, 1]
    for device in range(2):
        np.testing.assert_array_equal(state.params["table"][device], params["table"])


def test_the_average_decays_faster_at_the_start():
    step, decay = step_of(ema_decay=0.25), 0.25
    state = state_of(table(), average=table())
    expected = np.asarray(state.average["table"])
    for number in range(5):
        state, _ = step(state, ragged())
        kept = min(decay, (1 + number) / (10 + number))
        expected = kept * expected + (1 - kept) * np.asarray(state.params["table"])
        np.testing.assert_allclose(state.average["table"], expected, rtol=1e-5, atol=1e-6)
    assert [min(decay, (1 + n) / (10 + n)) == decay for n in range(5)] == [False] * 2 + [True] * 3


# Randomness. ---------------------------------------------------------------------------------


def test_a_key_depends_on_seed_step_and_purpose_only():
    addresses = [(s, n, p) for s in (0, 1) for n in (0, 1, 2**30) for p in ("init", "dropout")]
    bits = [jax.random.key_data(steps.key_for(*address)).tolist() for address in addresses]
    assert len(set(map(tuple, bits))) == len(addresses)
    compiled = jax.jit(lambda n: jax.random.key_data(steps.key_for(0, n, "dropout")))
    assert compiled(jnp.int32(1)).tolist() == bits[addresses.index((0, 1, "dropout"))]


# Computed once from jax.random alone: seed 3, the CRC-32 of "dropout" modulo 2^31, update 14.
FROZEN_KEY = [3178070298, 1405991383]


def test_a_key_is_a_constant_of_seed_step_and_purpose():
    """Checkpoints hold no keys, so they must not depend on the process, as Python's hash does."""
    assert jax.random.key_data(steps.key_for(3, 14, "dropout")).tolist() == FROZEN_KEY


def keys_of(seed=0, step=0, **options):
    """The keys that an update passes to its loss, one per micro-batch."""
    seen = []

    def loss(params, examples, key, teacher, progress):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return params["table"].sum(), {"weight": jnp.ones(())}

    step_of(loss, seed=seed, **options)(state_of(table(), step), ragged())
    jax.effects_barrier()
    return seen


def test_dropout_depends_on_seed_and_step():
    assert keys_of(0, 5) == keys_of(0, 5)
    assert len({keys_of(seed, step)[0] for seed in (0, 1) for step in (0, 1)}) == 4


def test_each_micro_batch_has_its_own_dropout():
    keys = keys_of(num_microbatches=4)
    assert len(keys) == len(set(keys)) == 4


def test_each_device_has_its_own_dropout():
    def key_of(_):
        seen = []

        def loss(params, examples, key, teacher, progress):
            seen.append(jax.random.key_data(key))
            return params["table"].sum(), {"weight": jnp.ones(())}

        step_of(loss, axis=rows(4))(state_of(table()), ragged())
        return seen[0]

    keys = jax.vmap(key_of, axis_name="rows")(jnp.arange(4))
    assert len({tuple(key.tolist()) for key in keys}) == 4


def test_initial_parameters_depend_on_the_seed_only():
    start = lambda seed: steps.init_state(Table(), DESCENT, steps.StepConfig(seed))
    np.testing.assert_array_equal(start(3).params["table"], start(3).params["table"])
    assert (start(3).params["table"] != start(4).params["table"]).all()
    assert start(3).step == 0


def test_init_state_uses_the_passed_parameters():
    given = table(5)
    state = steps.init_state(Table(), DESCENT, steps.StepConfig(ema_decay=0.9), given)
    assert state.params is given and state.step == state.skipped == 0
    np.testing.assert_array_equal(state.average["table"], given["table"])
    assert steps.init_state(Table(), DESCENT, steps.StepConfig(), given).average is None


# Metrics. ------------------------------------------------------------------------------------


def test_token_sums_count_targets_nats_hits_and_text_bytes():
    examples = ragged()
    examples.targets[0, :2] = VOCAB - 1, VOCAB - SENTINELS  # sentinels
    logits = np.random.default_rng(1).normal(size=(ROWS, LENGTH, VOCAB))
    logits[1, 0, examples.targets[1, 0]] = 99.0
    sums = steps.token_sums(jnp.asarray(logits), examples, TEXT_BYTES)
    real = examples.targets_segment_ids > 0
    text = real & (examples.targets != EOS) & (examples.targets < VOCAB - SENTINELS)
    log_p = scipy.special.log_softmax(logits, -1)
    nats = -np.take_along_axis(log_p, examples.targets[..., None], -1)[..., 0]
    expected = {
        "weight": 12,
        "nats": nats[real].sum(),
        "hits": (logits.argmax(-1) == examples.targets)[real].sum(),
        "bytes": TEXT_BYTES[examples.targets][real].sum(),
        "text_nats": nats[text].sum(),
        "text_weight": text.sum(),
        "inputs": (examples.inputs_segment_ids > 0).sum(),
    }
    assert sums.keys() == expected.keys() and expected["hits"] > 0
    for name in sums:
        np.testing.assert_allclose(sums[name], expected[name], rtol=1e-5, err_msg=name)


def test_metrics_divide_each_sum_by_its_weight():
    sums = {"loss": 30.0, "nats": 20.0, "weight": 10.0, "hits": 4.0}
    sums |= {"bytes": 40.0, "text_nats": 12.0, "text_weight": 8.0}
    whole = {"loss": 3.0, "nats": 2.0, "token_accuracy": 0.4, "text_nats": 1.5}
    whole |= {"bits_per_byte": 20 / math.log(2) / 40}
    assert steps.metrics_from_sums(sums) == pytest.approx(whole)
    sums |= {"teacher/jsd": 5.0, "teacher/jsd/weight": 10.0}
    sums |= {"teacher/hidden": 6.0, "teacher/hidden/weight": 3.0}
    whole |= {"teacher/jsd": 0.5, "teacher/hidden": 2.0}
    assert steps.metrics_from_sums(sums) == pytest.approx(whole)
    # Half of the targets are the student's own: nats and hits are of the others.
    whole |= {"nats": 4.0, "token_accuracy": 0.8}
    assert steps.metrics_from_sums(sums | {"labelled": 5.0}) == pytest.approx(whole)
    own = {"loss": 3.0, "teacher/jsd": 0.5, "teacher/hidden": 2.0}
    assert steps.metrics_from_sums(sums | {"labelled": 0.0}) == pytest.approx(own)


def test_metrics_of_an_empty_batch_are_zero():
    nothing = dict.fromkeys(["loss", "nats", "weight", "hits"], 0.0)
    nothing |= dict.fromkeys(["bytes", "text_nats", "text_weight"], 0.0)
    assert set(steps.metrics_from_sums(nothing).values()) == {0.0}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(steps.LossConfig)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 101.0])
def test_a_loss_config_out_of_bounds_is_rejected(field, value):
    with pytest.raises(ValueError, match=rf"loss.{field}={value} is out of bounds; use 0.* to "):
        steps.LossConfig(**{field: value})


# A model that learns. ------------------------------------------------------------------------

CONFIG = transformer.ModelConfig(
    vocab_size=VOCAB,
    d_model=32,
    d_ff=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
MODEL = transformer.Transformer(CONFIG)
UPDATES = 30
FAST_KEY = jax.random.key(0, impl="rbg")  # compiles in a fraction of the time


@pytest.fixture(scope="module")
def learn():
    """Batch -> (last state, losses per token) after UPDATES updates on it from seed 0."""
    config = optimizers.OptimizerConfig(
        "adamw", learning_rate=0.01, schedule="constant", warmup={"steps": 0}
    )
    optimizer, _ = optimizers.make_optimizer(
        config, UPDATES, transformer.param_shapes(CONFIG), optimizers.RunLength(1.0, 1)
    )
    loss = steps.make_language_loss(MODEL, steps.LossConfig(), TEXT_BYTES)
    step = step_of(loss, optimizer)
    params = jax.jit(MODEL.init)(FAST_KEY, transformer.dummy_batch())["params"]

    def run(examples):
        state, curve = steps.init_state(MODEL, optimizer, steps.StepConfig(), params), []
        for _ in range(UPDATES):
            state, sums = step(state, examples)
            curve.append(float(sums["loss"] / sums["weight"]))
        return state, curve

    return run


@pytest.fixture(scope="module")
def lesson():
    """A ragged batch without empty rows."""
    return ragged((6, 2, 5, 4))


@pytest.fixture(scope="module")
def learnt(learn, lesson):
    return learn(lesson)


def test_thirty_updates_memorize_a_batch(learnt):
    _, curve = learnt
    assert curve[0] == pytest.approx(np.log(VOCAB), rel=0.3) and curve[-1] < 0.1


def test_a_memorized_batch_is_decoded_exactly(learnt, lesson):
    greedy = dict(model=MODEL, length=LENGTH + 2, eos=EOS, config=decoding.DecodingConfig())
    decode = functools.partial(steps.decode_step, **greedy)
    answers = np.asarray(jax.jit(decode)(learnt[0].params, lesson).ids[:, 0])
    np.testing.assert_array_equal(answers[:, :LENGTH], lesson.targets)
    assert not answers[:, LENGTH:].any()


def test_training_twice_gives_the_same_bits(learn, learnt, lesson):
    again, curve = learn(lesson)
    assert curve == learnt[1]
    jax.tree.map(np.testing.assert_array_equal, again, learnt[0])


def test_dropout_changes_training_and_not_evaluation(learnt, lesson):
    params = learnt[0].params
    dropping = transformer.Transformer(dataclasses.replace(CONFIG, dropout_rate=0.3))
    predict = jax.jit(functools.partial(steps.apply_model, dropping))
    plain = jax.jit(functools.partial(steps.apply_model, MODEL))(params, lesson, None)
    np.testing.assert_array_equal(predict(params, lesson, None), plain)
    first, again = (predict(params, lesson, FAST_KEY) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = predict(params, lesson, jax.random.fold_in(FAST_KEY, 1))
    real = lesson.targets_segment_ids > 0
    for changed in (first - plain, first - other):
        assert np.abs(changed).max(-1)[real].min() > 1e-3


def test_the_average_of_a_constant_weight_keeps_its_bits():
    weights = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    average = weights
    for updates in range(100):
        average = steps._update_average(average, weights, jnp.asarray(updates), 0.999)
    np.testing.assert_array_equal(average, weights)
