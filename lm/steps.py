"""Pure steps: (state, batch) -> (state, sums), without device counts, files or clocks."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import layout

from lm import batch, decoding, losses, transformer

Array = jax.Array
Model = transformer.Transformer
Sums = dict[str, Array]  # float32 scalars, each a sum over target tokens; "weight" counts them
Loss = Callable[..., tuple[Array, Sums]]  # (params, examples, key, teacher, progress) ->


class State(NamedTuple):
    """All that training changes."""

    step: Array  # int32 [], the number of batches
    params: Any
    opt_state: Any
    skipped: Array  # int32 [], the number of batches whose loss or gradient was not finite
    average: Any = None  # moving average of params, or None


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How to compute an update, for any loss.

    reduction_shards: parts of the batch, added in one fixed order; 0: in the fastest order.
    ema_decay: of the moving average of the weights; 0: none.
    total_steps: of the whole run, for the schedules of a loss; 0: they have none.
    """

    seed: int = 0
    num_microbatches: int = 1
    reduction_shards: int = 0
    ema_decay: float = 0.0
    total_steps: int = 0

    def progress(self, step: Array) -> Array | None:
        """The fraction of the run before an update: 0 at the first, 1 at the last; float32 []."""
        if not self.total_steps:
            return None
        return step.astype(jnp.float32) * (1 / max(self.total_steps - 1, 1))


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Additions to the cross-entropy."""

    z_loss: float = 1e-4
    label_smoothing: float = 0.0

    def __post_init__(self):
        for field, (low, high) in {"z_loss": (0, 1), "label_smoothing": (0, 0.999)}.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"loss.{field}={value} is out of bounds; use {low} to {high}.")


def key_for(seed: int, step: Array | int, purpose: str) -> Array:
    """The key for one purpose at one step; the same on every host and after every restart."""
    purpose_id = zlib.crc32(purpose.encode()) & 0x7FFFFFFF
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose_id), step)


def apply_model(model: Model, params: Any, examples: batch.Batch, key: Array | None) -> Array:
    """Logits [B, T, V]; with a key, dropout is on."""
    rngs = {} if key is None else {"dropout": key}
    return model.apply({"params": params}, examples, deterministic=key is None, rngs=rngs)


def token_sums(logits: Array, examples: batch.Batch, text_bytes: Array) -> Sums:
    """Sums over targets that every loss reports: nats, hits, text bytes; padding never counts.

    logits: [B, T, V]. text_bytes: int [V], UTF-8 bytes of each id's text (0: no text). text_nats
    and text_weight count only targets with text, so not eos or sentinels. Targets that the student
    generated count in "weight" only.
    """
    weights = batch.label_weights(examples)
    num_bytes = jnp.asarray(text_bytes)[examples.targets] * weights
    nats = losses.token_nats(logits, examples.targets) * weights
    hits = (jnp.argmax(logits, axis=-1) == examples.targets) * weights
    is_text = (num_bytes > 0).astype(jnp.float32)
    values = {"weight": batch.loss_weights(examples), "nats": nats, "hits": hits}
    values |= {"bytes": num_bytes, "text_nats": nats * is_text, "text_weight": is_text}
    values["inputs"] = (examples.inputs_segment_ids > 0).astype(jnp.float32)
    return {name: jnp.sum(value) for name, value in values.items()}


def make_language_loss(model: Model, config: LossConfig, text_bytes: Array) -> Loss:
    """Cross-entropy of the targets (pre-training and fine-tuning), as (total, sums)."""

    def loss(params, examples, key=None, teacher=None, progress=None):
        logits = apply_model(model, params, examples, key)
        weights = batch.loss_weights(examples)
        options = {"z_loss": config.z_loss, "smoothing": config.label_smoothing}
        total, _ = losses.cross_entropy(logits, examples.targets, weights, **options)
        return total, {"loss": total} | token_sums(logits, examples, text_bytes)

    return loss


def metrics_from_sums(sums: dict[str, float]) -> dict[str, float]:
    """Turn sums into metrics: loss and nats per target, bits per byte of text, token_accuracy.

    nats and hits are divided by "labelled", the number of targets that the student did not
    generate, or without it by "weight"; with 0 labels they are absent. A term "teacher/x" is
    divided by "teacher/x/weight".
    """
    ratio = lambda name, weight: sums[name] / max(sums.get(weight, sums["weight"]), 1.0)
    metrics = {"loss": ratio("loss", "weight")} if "loss" in sums else {}
    if sums.get("labelled", True):
        metrics |= {"nats": ratio("nats", "labelled"), "token_accuracy": ratio("hits", "labelled")}
        metrics["bits_per_byte"] = ratio("nats", "bytes") / math.log(2)
        metrics["text_nats"] = ratio("text_nats", "text_weight")
    terms = [name for name in sums if re.fullmatch(r"teacher/\w+", name)]
    return metrics | {name: ratio(name, f"{name}/weight") for name in terms}


def init_params(model: Model, seed: int) -> Any:
    """The random parameters of a seed."""
    return model.init(key_for(seed, 0, "init"), transformer.dummy_batch())["params"]


def init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    params: Any = None,
) -> State:
    """A fresh state, with these parameters or random ones."""
    params = init_params(model, config.seed) if params is None else params
    average = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    zero = jnp.zeros([], jnp.int32)
    return State(zero, params, optimizer.init(params), zero, average)


class Axis(NamedTuple):
    """The devices of an update under pmap.

    shard_ids: the data shard of each position along the axis; shard i of D has rows i::D.
    """

    name: str
    shard_ids: tuple[int, ...]


def _split(examples: batch.Batch, count: int) -> batch.Batch:
    """[B, ...] -> [count, B/count, ...]; part m has rows m, m + count, ... so shards stay put."""
    split = lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
    return jax.tree.map(split, examples)


def _add(tree: Any, addend: Any) -> Any:
    return jax.tree.map(jnp.add, tree, addend)


def _microbatch_sum(gradients: Callable, examples: batch.Batch, key: Array, count: int) -> Any:
    """The sum of gradients(rows, key) over micro-batches, computed one after the other."""
    if count == 1:
        return gradients(examples, key)
    microbatches = _split(examples, count)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], microbatches), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(total, item):
        index, rows = item
        return _add(total, gradients(rows, jax.random.fold_in(key, index))), None

    return jax.lax.scan(accumulate, zeros, (jnp.arange(count), microbatches))[0]


def _tree_sum(gradients: Callable, shards: Any, count: int) -> Any:
    """The sum of gradients(shard) over the leading axis, as a binary tree: shard i plus i + n/2.

    The last addition is that of the sums of the even and of the odd shards, and so on down.
    """
    if count == 1:
        return gradients(jax.tree.map(lambda x: x[0], shards))
    halves = _split(shards, 2)
    sums = jax.lax.map(lambda half: _tree_sum(gradients, half, count // 2), halves)
    return jax.tree.map(lambda x: x[0] + x[1], sums)


def _butterfly_all_reduce(tree: Any, axis: Axis) -> Any:
    """The same binary tree over devices: each adds its partner's sum, so all have equal bits."""
    position, half = axis.shard_ids.index, len(axis.shard_ids) // 2
    while half:
        pairs = [(position(i), position(i ^ half)) for i in range(len(axis.shard_ids))]
        send = functools.partial(jax.lax.ppermute, axis_name=axis.name, perm=pairs)
        tree, half = _add(tree, jax.tree.map(send, tree)), half // 2
    return tree


def _barrier(tree: Any) -> Any:
    """The same values; the compiler handles the code before and after independently.

    It neither fuses across, nor chooses a layout, which decides the order of a sum over elements.
    """
    plain = lambda x: layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))
    return jax.lax.optimization_barrier(jax.tree.map(plain, tree))


def _batch_sum(
    gradients: Callable, examples: batch.Batch, key: Array, config: StepConfig, axis: Axis | None
) -> Any:
    """The sum of gradients(rows, key) over the whole batch, on every device.

    With S reduction_shards, shard s has rows s::S and a key from s, and S alone decides the order
    of additions: any number of devices that divides S gives the same bits.
    """
    shard_ids = axis.shard_ids if axis else (0,)
    shard_id = jnp.array(shard_ids)[jax.lax.axis_index(axis.name)] if axis else 0
    if not config.reduction_shards:
        key = jax.random.fold_in(key, shard_id) if axis else key
        total = _microbatch_sum(gradients, examples, key, config.num_microbatches)
        return jax.lax.psum(total, axis.name) if axis else total

    def shard_gradients(shard):
        index, rows = _barrier(shard)
        shard_key = jax.random.fold_in(key, index)
        return _barrier(_microbatch_sum(gradients, rows, shard_key, config.num_microbatches))

    count = config.reduction_shards // len(shard_ids)  # on this device
    indices = shard_id + len(shard_ids) * jnp.arange(count)
    total = _tree_sum(shard_gradients, (indices, _split(examples, count)), count)
    return _butterfly_all_reduce(total, axis) if axis else total


def _norms(tree: Any) -> dict[str, Array]:
    """The norm of each group of parameters: those whose path starts alike."""
    squares: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        group = jax.tree_util.keystr(path[:1], simple=True)
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf))
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def _update_average(average: Any, params: Any, num_updates: Array, decay: float) -> Any:
    """The moving average after one more update; it starts as the first weights.

    The decay is at most (1 + n) / (10 + n) after n updates, so that the random start is forgotten.
    Source: tf.train.ExponentialMovingAverage's num_updates.
    """
    decay = jnp.minimum(decay, (1 + num_updates) / (10 + num_updates))
    # In this form a weight that does not change keeps its bits.
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, params)


def train_step(
    state: State,
    examples: batch.Batch,
    teacher: Any = None,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    axis: Axis | None = None,
) -> tuple[State, Sums]:
    """One update: gradients are summed over micro-batches and devices, then divided once.

    axis: None under jit. Returns the new state and global sums, equal on all devices: the loss's,
    "gradient_norm", "finite" (1 or 0), "skipped" (so far), and of each group g of parameters
    "gradient_norm/g", "weight_norm/g" and "update_ratio/g", the update's norm over the weights'.
    If the loss or the gradient is not finite, only step and skipped change in the state.
    """

    def gradients(rows, key):
        grad = jax.value_and_grad(loss, has_aux=True)
        (total, sums), grads = grad(state.params, rows, key, teacher, progress)
        return total, sums, grads

    key, progress = key_for(config.seed, state.step, "dropout"), config.progress(state.step)
    total, sums, grads = _batch_sum(gradients, examples, key, config, axis)
    # A product with the inverse, because the compiler turns only some divisions into one.
    inverse = 1.0 / jnp.maximum(sums["weight"], 1.0)
    grads = jax.tree.map(lambda g: g * inverse, grads)
    grads = _barrier(grads) if config.reduction_shards else grads
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params, average = optax.apply_updates(state.params, updates), state.average
    if average is not None:
        average = _update_average(average, params, state.step - state.skipped, config.ema_decay)

    grad_norms, weight_norms, update_norms = _norms(grads), _norms(state.params), _norms(updates)
    norm = jnp.sqrt(sum(jnp.square(norm) for norm in grad_norms.values()))
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    skipped = state.skipped + (1 - finite.astype(jnp.int32))
    new = State(state.step, params, opt_state, skipped, average)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    metrics = {"gradient_norm": norm, "finite": finite, "skipped": skipped}
    for group, weight_norm in weight_norms.items():
        metrics[f"gradient_norm/{group}"] = grad_norms[group]
        metrics[f"weight_norm/{group}"] = weight_norm
        metrics[f"update_ratio/{group}"] = update_norms[group] / jnp.maximum(weight_norm, 1e-30)
    metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
    return state._replace(step=state.step + 1, skipped=skipped), sums | metrics


def eval_step(params: Any, examples: batch.Batch, *, loss: Loss, axis: Axis | None = None) -> Sums:
    """The sums of a batch without dropout; equal on all devices."""
    _, sums = loss(params, examples)
    return sums if axis is None else jax.lax.psum(sums, axis.name)


def _decoding_inputs(params, examples, addresses, model, length) -> tuple:
    """Return (step function, cache, first tokens, keys) of a search."""
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
    step = lambda token, cache: apply(token, cache, method="decode_step")
    cache = apply(examples.inputs, examples.inputs_segment_ids, length, method="start")
    has_inputs = jnp.any(examples.inputs_segment_ids > 0, axis=1)
    start = jnp.where(has_inputs, model.config.decoder_start_token_id, -1)
    key = jax.vmap(lambda address: key_for(address[0], address[1], "decoding"))
    return step, cache, start, None if addresses is None else key(addresses)


def init_decoding(
    params: Any,
    examples: batch.Batch,
    addresses: Array | None = None,
    *,
    model: Model,
    length: int,
    config: decoding.DecodingConfig,
) -> decoding.DecodeState:
    """Return the state before the first token, for decoding.decode_token; not for beams."""
    length = config.max_tokens(length)
    _, cache, start, keys = _decoding_inputs(params, examples, addresses, model, length)
    gather = transformer.gather_beams
    return decoding.init_state(cache, start, gather, config, length=length, keys=keys)


def decode_step(
    params: Any,
    examples: batch.Batch,
    addresses: Array | None = None,
    *,
    model: Model,
    length: int,
    eos: int,
    config: decoding.DecodingConfig,
    axis: Axis | None = None,
) -> decoding.Hypotheses:
    """Decode answers to the inputs of a batch: ids int32 [B, n, length] and scores [B, n].

    A row without inputs, which fills up a batch, has an answer of pad alone and delays no other.

    Args:
      params: of the model.
      examples: the inputs; targets are not read.
      addresses: int32 [B, 2], a seed and the row's number, from which alone its samples follow;
        None if nothing is sampled.
      model: the transformer.
      length: the most tokens of an answer, unless the config has a max_length.
      eos: the id that ends an answer.
      config: the method and its options.
      axis: unused; all steps have it.
    """
    length = config.max_tokens(length)
    step, cache, start, keys = _decoding_inputs(params, examples, addresses, model, length)
    gather, options = transformer.gather_beams, {"length": length, "eos": eos, "keys": keys}
    return decoding.search(step, cache, start, gather, config, **options)
