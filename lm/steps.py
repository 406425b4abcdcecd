"""Pure steps: (state, batch) -> (state, sums). No device count, file or clock is known here."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import batch, decoding, losses, transformer

Array = jax.Array
Sums = dict[str, Array]  # float32 scalars, each a sum over target tokens; "weight" counts them
Loss = Callable[..., tuple[Array, Sums]]  # (params, examples, key, teacher) -> total, sums


class State(NamedTuple):
    """All that training changes."""

    step: Array  # int32 [], the number of batches taken
    params: Any
    opt_state: Any
    skipped: Array  # int32 [], of them those left out: a loss or gradient was not finite
    average: Any = None  # of the weights over updates, like params; None where there is none


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an update is taken, whatever the loss.

    shards: parts of the batch whose gradients are added in one fixed order; 0: in the fastest.
    average: decay of the running average of the weights; 0: none is kept.
    """

    seed: int = 0
    micro_batches: int = 1
    shards: int = 0
    average: float = 0.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to the cross-entropy, and for distillation how much the teacher counts."""

    z_loss: float = 1e-4
    smoothing: float = 0.0
    temperature: float = 2.0
    teacher_weight: float = 0.8

    def __post_init__(self):
        bounds = {"z_loss": (0, 1), "smoothing": (0, 0.999), "teacher_weight": (0, 1)}
        for field, (low, high) in (bounds | {"temperature": (0.01, 100)}).items():
            value = getattr(self, field)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"loss.{field}={value} is out of bounds; use {low} to {high}.")


def key_for(seed: int, step: Array | int, purpose: str) -> Array:
    """The key for one purpose at one step; the same on every host and after every restart."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _address(purpose)), step)


def _address(purpose: str) -> int:
    return zlib.crc32(purpose.encode()) & 0x7FFFFFFF


def predict(model, params, examples: batch.Batch, key: Array | None) -> Array:
    """Logits [B, T, V]; with a key, dropout is on."""
    rngs = {} if key is None else {"dropout": key}
    return model.apply({"params": params}, examples, deterministic=key is None, rngs=rngs)


def measure(logits: Array, examples: batch.Batch, text_bytes: Array) -> Sums:
    """What any loss reports: nats, hits and text bytes of the targets, padding never counted.

    logits [B, T, V]; text_bytes int [V], the UTF-8 bytes each id stands for (0: no text). The keys
    text_nats and text_weight count only the targets that stand for text, so not eos or sentinels.
    """
    weights = batch.loss_weights(examples)
    spelled = jnp.asarray(text_bytes)[examples.targets] * weights
    nats = losses.token_nats(logits, examples.targets) * weights
    hits = (jnp.argmax(logits, axis=-1) == examples.targets) * weights
    text = (spelled > 0).astype(jnp.float32)
    parts = {"weight": weights, "nats": nats, "hits": hits, "bytes": spelled}
    parts |= {"text_nats": nats * text, "text_weight": text}
    parts["inputs"] = (examples.inputs_segment_ids > 0).astype(jnp.float32)
    return {name: jnp.sum(part) for name, part in parts.items()}


def make_language_loss(model, config: LossConfig, text_bytes: Array) -> Loss:
    """Cross-entropy of the targets (pre-training and fine-tuning), as (total, sums)."""

    def loss(params, examples, key=None, teacher=None):
        logits = predict(model, params, examples, key)
        weights = batch.loss_weights(examples)
        total, _ = losses.cross_entropy(
            logits, examples.targets, weights, z_loss=config.z_loss, smoothing=config.smoothing
        )
        return total, {"loss": total} | measure(logits, examples, text_bytes)

    return loss


def ratios(sums: dict[str, float]) -> dict[str, float]:
    """Sums to figures: loss and nats per target token, bits per byte of text, accuracy."""
    weight = max(sums["weight"], 1.0)
    figures = {name: sums[name] / weight for name in ("loss", "nats", "kl") if name in sums}
    figures["bits_per_byte"] = sums["nats"] / math.log(2) / max(sums["bytes"], 1.0)
    figures["accuracy"] = sums["hits"] / weight
    figures["text_nats"] = sums["text_nats"] / max(sums["text_weight"], 1.0)
    return figures


def first_params(model, seed: int) -> Any:
    """The random parameters of a seed."""
    return model.init(key_for(seed, 0, "init"), transformer.example())["params"]


def init_state(model, optimizer, plan: Plan, params=None) -> State:
    """A fresh state; `params`, where given, are where training starts from."""
    params = first_params(model, plan.seed) if params is None else params
    average = jax.tree.map(jnp.copy, params) if plan.average else None
    zero = jnp.zeros([], jnp.int32)
    return State(zero, params, optimizer.init(params), zero, average)


def _split(examples: batch.Batch, parts: int) -> batch.Batch:
    """[B, ...] -> [parts, B/parts, ...]; part m takes rows m, m + parts, ... so shards stay put."""
    split = lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    return jax.tree.map(split, examples)


def train_step(
    state: State,
    examples: batch.Batch,
    teacher: Any = None,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    plan: Plan,
    axis: str | None = None,
) -> tuple[State, Sums]:
    """One update: gradients are summed over micro-batches and devices, then divided once.

    axis: the pmap axis, None under jit. Returns the new state and global sums, with the gradient's
    norm under "gradient_norm".
    """
    key, micro_batches = key_for(plan.seed, state.step, "dropout"), plan.micro_batches
    if axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))

    def gradients(part, part_key):
        grad = jax.value_and_grad(loss, has_aux=True)
        (_, sums), grads = grad(state.params, part, part_key, teacher)
        return sums, grads

    if micro_batches == 1:
        added = gradients(examples, key)
    else:
        parts = _split(examples, micro_batches)
        shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def accumulate(total, item):
            index, part = item
            more = gradients(part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, more), None

        added, _ = jax.lax.scan(accumulate, zeros, (jnp.arange(micro_batches), parts))

    sums, grads = added if axis is None else jax.lax.psum(added, axis)
    grads = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1.0), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    sums["gradient_norm"] = optax.tree.norm(grads)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), sums


def eval_step(params, examples: batch.Batch, *, loss: Loss, axis: str | None = None) -> Sums:
    """The sums of a batch without dropout; equal on all devices."""
    _, sums = loss(params, examples)
    return sums if axis is None else jax.lax.psum(sums, axis)


def decode_step(
    params,
    examples: batch.Batch,
    *,
    model,
    length: int,
    eos: int,
    beam: decoding.BeamConfig | None = None,
    axis: str | None = None,
) -> Array:
    """Answers to the inputs of a batch: int32 [B, length], pad after eos; greedy without a beam."""
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)
    cache = apply(examples.inputs, examples.inputs_segment_ids, length, method="start")
    step = lambda token, cache: apply(token, cache, method="decode_step")
    start = jnp.full(examples.inputs.shape[0], model.config.start_id, jnp.int32)
    if beam is None:
        return decoding.greedy(step, cache, start, length=length, eos=eos)
    take = transformer.take_rows
    return decoding.beam(step, cache, start, take, beam, length=length, eos=eos).ids[:, 0]
