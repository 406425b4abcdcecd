"""Pure steps: (state, batch) -> (state, sums). No device count, file or clock is known here."""

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
Sums = dict[str, Array]  # float32 scalars, each a sum over target tokens; "weight" counts them
Loss = Callable[..., tuple[Array, Sums]]  # (params, examples, key, teacher, progress) ->


class State(NamedTuple):
    """All that training changes."""

    step: Array  # int32 [], the number of batches taken
    params: Any
    opt_state: Any
    skipped: Array  # int32 [], of them those left out: a loss or gradient was not finite
    average: Any = None  # of the weights over updates, like params; None where there is none


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
        """The share of the run before an update: 0 at the first, 1 at the last; float32 []."""
        if not self.total_steps:
            return None
        return step.astype(jnp.float32) * (1 / max(self.total_steps - 1, 1))


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to the cross-entropy."""

    z_loss: float = 1e-4
    label_smoothing: float = 0.0

    def __post_init__(self):
        for field, (low, high) in {"z_loss": (0, 1), "label_smoothing": (0, 0.999)}.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"loss.{field}={value} is out of bounds; use {low} to {high}.")


def key_for(seed: int, step: Array | int, purpose: str) -> Array:
    """The key for one purpose at one step; the same on every host and after every restart."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _address(purpose)), step)


def _address(purpose: str) -> int:
    return zlib.crc32(purpose.encode()) & 0x7FFFFFFF


def apply_model(model, params, examples: batch.Batch, key: Array | None) -> Array:
    """Logits [B, T, V]; with a key, dropout is on."""
    rngs = {} if key is None else {"dropout": key}
    return model.apply({"params": params}, examples, deterministic=key is None, rngs=rngs)


def token_sums(logits: Array, examples: batch.Batch, text_bytes: Array) -> Sums:
    """What any loss reports: nats, hits and text bytes of the targets, padding never counted.

    logits [B, T, V]; text_bytes int [V], the UTF-8 bytes each id stands for (0: no text). The keys
    text_nats and text_weight count only the targets that stand for text, so not eos or sentinels.
    Targets that the student wrote itself count in "weight" alone.
    """
    weights = batch.label_weights(examples)
    spelled = jnp.asarray(text_bytes)[examples.targets] * weights
    nats = losses.token_nats(logits, examples.targets) * weights
    hits = (jnp.argmax(logits, axis=-1) == examples.targets) * weights
    text = (spelled > 0).astype(jnp.float32)
    parts = {"weight": batch.loss_weights(examples), "nats": nats, "hits": hits, "bytes": spelled}
    parts |= {"text_nats": nats * text, "text_weight": text}
    parts["inputs"] = (examples.inputs_segment_ids > 0).astype(jnp.float32)
    return {name: jnp.sum(part) for name, part in parts.items()}


def make_language_loss(model, config: LossConfig, text_bytes: Array) -> Loss:
    """Cross-entropy of the targets (pre-training and fine-tuning), as (total, sums)."""

    def loss(params, examples, key=None, teacher=None, progress=None):
        logits = apply_model(model, params, examples, key)
        weights = batch.loss_weights(examples)
        total, _ = losses.cross_entropy(
            logits,
            examples.targets,
            weights,
            z_loss=config.z_loss,
            smoothing=config.label_smoothing,
        )
        return total, {"loss": total} | token_sums(logits, examples, text_bytes)

    return loss


def metrics_from_sums(sums: dict[str, float]) -> dict[str, float]:
    """Sums to figures: loss and nats per target token, bits per byte of text, token_accuracy.

    "labelled", where it is there, is the weight without what a student wrote itself, and nats and
    hits are of; where that is 0 they are left out. A term "teacher/x" is per "teacher/x/weight".
    """
    per = lambda name, of: sums[name] / max(sums.get(of, sums["weight"]), 1.0)
    figures = {"loss": per("loss", "weight")} if "loss" in sums else {}
    if sums.get("labelled", True):
        labelled = "labelled" if "labelled" in sums else "weight"
        figures |= {"nats": per("nats", labelled), "token_accuracy": per("hits", labelled)}
        figures["bits_per_byte"] = per("nats", "bytes") / math.log(2)
        figures["text_nats"] = per("text_nats", "text_weight")
    terms = [name for name in sums if re.fullmatch(r"teacher/\w+", name)]
    return figures | {name: per(name, f"{name}/weight") for name in terms}


def init_params(model, seed: int) -> Any:
    """The random parameters of a seed."""
    return model.init(key_for(seed, 0, "init"), transformer.dummy_batch())["params"]


def init_state(model, optimizer, config: StepConfig, params=None) -> State:
    """A fresh state; `params`, where given, are where training starts from."""
    params = init_params(model, config.seed) if params is None else params
    average = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    zero = jnp.zeros([], jnp.int32)
    return State(zero, params, optimizer.init(params), zero, average)


class Axis(NamedTuple):
    """The devices that take an update together under pmap.

    numbers: the data shard that each position along the axis holds: of D devices, i has rows i::D.
    """

    name: str
    numbers: tuple[int, ...]


def _split(examples: batch.Batch, parts: int) -> batch.Batch:
    """[B, ...] -> [parts, B/parts, ...]; part m takes rows m, m + parts, ... so shards stay put."""
    split = lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    return jax.tree.map(split, examples)


def _added(tree: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, tree, other)


def _over_micro_batches(gradients: Callable, examples: batch.Batch, key: Array, parts: int) -> Any:
    """The sum of gradients(part, key) over parts of the batch, one after the other."""
    if parts == 1:
        return gradients(examples, key)
    split = _split(examples, parts)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], split), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(total, item):
        index, part = item
        return _added(total, gradients(part, jax.random.fold_in(key, index))), None

    return jax.lax.scan(accumulate, zeros, (jnp.arange(parts), split))[0]


def _tree_sum(gradients: Callable, shards: Any, count: int) -> Any:
    """The sum of gradients(shard) over the leading axis, folded in half: i and i + n/2 are added.

    The last two to be added are the sums of the even and of the odd shards, and so on down.
    """
    if count == 1:
        return gradients(jax.tree.map(lambda x: x[0], shards))
    halves = _split(shards, 2)
    both = jax.lax.map(lambda half: _tree_sum(gradients, half, count // 2), halves)
    return jax.tree.map(lambda x: x[0] + x[1], both)


def _butterfly_all_reduce(tree: Any, axis: Axis) -> Any:
    """The same fold over devices: each adds what its partner has, so all end with the same bits."""
    place, half = axis.numbers.index, len(axis.numbers) // 2
    while half:
        pairs = [(place(i), place(i ^ half)) for i in range(len(axis.numbers))]
        send = functools.partial(jax.lax.ppermute, axis_name=axis.name, perm=pairs)
        tree, half = _added(tree, jax.tree.map(send, tree)), half // 2
    return tree


def _barrier(tree: Any) -> Any:
    """The same values, so that what is before has no say in how what is after is compiled.

    Neither by fusion nor by layout, which decides the order of a later sum over all elements.
    """
    plain = lambda x: layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))
    return jax.lax.optimization_barrier(jax.tree.map(plain, tree))


def _summed(
    gradients: Callable, examples: batch.Batch, key: Array, config: StepConfig, axis: Axis | None
):
    """The sum of gradients(rows, key) over the whole batch, on every device.

    With S reduction_shards, shard s has rows s::S and a key from s, and S alone decides the order
    of additions: any number of devices that divides S gives the same bits.
    """
    numbers = axis.numbers if axis else (0,)
    own = jnp.array(numbers)[jax.lax.axis_index(axis.name)] if axis else 0
    if not config.reduction_shards:
        key = jax.random.fold_in(key, own) if axis else key
        added = _over_micro_batches(gradients, examples, key, config.num_microbatches)
        return jax.lax.psum(added, axis.name) if axis else added

    def of_shard(shard):
        number, part = _barrier(shard)
        part_key = jax.random.fold_in(key, number)
        return _barrier(_over_micro_batches(gradients, part, part_key, config.num_microbatches))

    held = config.reduction_shards // len(numbers)
    shards = (own + len(numbers) * jnp.arange(held), _split(examples, held))
    added = _tree_sum(of_shard, shards, held)
    return _butterfly_all_reduce(added, axis) if axis else added


def _norms(tree: Any) -> dict[str, Array]:
    """The norm of each group of parameters: those whose path starts alike."""
    squares: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        group = jax.tree_util.keystr(path[:1], simple=True)
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf))
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def _averaged(average: Any, params: Any, updates: Array, decay: float) -> Any:
    """The running average after one more update; it starts as the first weights.

    Early on it forgets faster, (1 + n) / (10 + n) after n updates, so that the start, which is
    random, does not stay in it. Source: tf.train.ExponentialMovingAverage's num_updates.
    """
    kept = jnp.minimum(decay, (1 + updates) / (10 + updates))
    # So written, a weight that stays keeps its bits.
    return jax.tree.map(lambda old, new: old + (1 - kept) * (new - old), average, params)


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

    axis: None under jit. Returns the new state and global sums, equal on all devices. Beside the
    loss's they have "gradient_norm", "finite" (1 or 0), "skipped" (so far), and of each group g of
    parameters "gradient_norm/g", "weight_norm/g" and "update_ratio/g", the update's norm over the
    weights'. Where the loss or the gradient is not finite the update is left out: step and skipped
    count it, and all else in the state keeps its bits.
    """

    def gradients(part, key):
        grad = jax.value_and_grad(loss, has_aux=True)
        (total, sums), grads = grad(state.params, part, key, teacher, progress)
        return total, sums, grads

    key, progress = key_for(config.seed, state.step, "dropout"), config.progress(state.step)
    total, sums, grads = _summed(gradients, examples, key, config, axis)
    # Times the inverse: the compiler makes that of some divisions and not of others.
    share = 1.0 / jnp.maximum(sums["weight"], 1.0)
    grads = jax.tree.map(lambda g: g * share, grads)
    grads = _barrier(grads) if config.reduction_shards else grads
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params, average = optax.apply_updates(state.params, updates), state.average
    if average is not None:
        average = _averaged(average, params, state.step - state.skipped, config.ema_decay)

    of_grads, of_weights, of_updates = _norms(grads), _norms(state.params), _norms(updates)
    norm = jnp.sqrt(sum(jnp.square(norm) for norm in of_grads.values()))
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    skipped = state.skipped + (1 - finite.astype(jnp.int32))
    new = State(state.step, params, opt_state, skipped, average)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    shown = {"gradient_norm": norm, "finite": finite, "skipped": skipped}
    for group in of_grads:
        shown[f"gradient_norm/{group}"] = of_grads[group]
        shown[f"weight_norm/{group}"] = of_weights[group]
        ratio = of_updates[group] / jnp.maximum(of_weights[group], 1e-30)
        shown[f"update_ratio/{group}"] = ratio
    shown = {name: jnp.asarray(value, jnp.float32) for name, value in shown.items()}
    return state._replace(step=state.step + 1, skipped=skipped), sums | shown


def eval_step(params, examples: batch.Batch, *, loss: Loss, axis: Axis | None = None) -> Sums:
    """The sums of a batch without dropout; equal on all devices."""
    _, sums = loss(params, examples)
    return sums if axis is None else jax.lax.psum(sums, axis.name)


def _decoding_inputs(params, examples, addresses, model, length) -> tuple:
    """Return (step function, cache, first tokens, keys) of a search."""
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
    step = lambda token, cache: apply(token, cache, method="decode_step")
    cache = apply(examples.inputs, examples.inputs_segment_ids, length, method="start")
    asked = jnp.any(examples.inputs_segment_ids > 0, axis=1)
    start = jnp.where(asked, model.config.decoder_start_token_id, -1)
    key = jax.vmap(lambda address: key_for(address[0], address[1], "decoding"))
    return step, cache, start, None if addresses is None else key(addresses)


def init_decoding(
    params,
    examples: batch.Batch,
    addresses: Array | None = None,
    *,
    model: Any,
    length: int,
    config: decoding.DecodingConfig,
) -> decoding.DecodeState:
    """Return the state before the first token, for decoding.decode_token; not for beams."""
    length = config.max_tokens(length)
    _, cache, start, keys = _decoding_inputs(params, examples, addresses, model, length)
    gather = transformer.gather_beams
    return decoding.init_state(cache, start, gather, config, length=length, keys=keys)


def decode_step(
    params,
    examples: batch.Batch,
    addresses: Array | None = None,
    *,
    model: Any,
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
