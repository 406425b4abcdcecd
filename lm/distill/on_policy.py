"""On-policy distillation: when the student generates its own answers, and how it learns from them.

Source: Agarwal et al. 2023, arXiv:2306.13649 (GKD); Gu et al. 2023, arXiv:2306.08543 (MiniLLM).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm import batch, decoding, lookup, losses, steps, transformer
from lm.distill.terms import Term

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig:
    """The section teacher.on_policy: how often and how the student generates its own targets.

    fraction: of the updates, 0 to 1, spread evenly. It depends on a batch's number alone, so it is
    the same on every host and after every restart.
    """

    fraction: float = 0.0
    decoding: decoding.DecodingConfig = decoding.DecodingConfig("sample")

    def __post_init__(self):
        section = lookup.as_section(
            decoding.DecodingConfig, self.decoding, "teacher.on_policy.decoding"
        )
        object.__setattr__(self, "decoding", section)
        lookup.check_bounds(self, "teacher.on_policy", {"fraction": (0, 1)})
        if section.num_return_sequences > 1:
            raise ValueError(
                f"teacher.on_policy.decoding.num_return_sequences={section.num_return_sequences} "
                f"is more than the one answer that an input has in a batch; use 1."
            )

    def __bool__(self) -> bool:
        return self.fraction > 0

    def is_on_policy(self, index: int) -> bool:
        """Whether the student generates the targets of this batch; batches count from 0."""
        return math.floor((index + 1) * self.fraction) > math.floor(index * self.fraction)

    def is_usual(self, index: int) -> bool:
        """Whether that batch is of the more frequent kind, whose losses can be compared."""
        return self.is_on_policy(index) == (self.fraction > 0.5)


def check(
    config: OnPolicyConfig, terms: tuple[Term, ...], *, packing: str, pairs: bool, length: int
) -> None:
    """Raise ValueError if the section teacher.on_policy does not suit the rest of the config.

    terms: of the loss. packing: data.packing. pairs: whether all tasks have inputs and targets,
    not running text. length: data.target_length.
    """
    names = {term.name for term in terms}
    path = f"teacher.on_policy.fraction={config.fraction}"
    if config and names == {"labels"}:
        raise ValueError(
            f"{path} would teach nothing: teacher.loss has labels alone, which the student's own "
            f"answers are not; add a term that asks the teacher, as jsd."
        )
    if "policy" in names:
        sampling = decoding.DecodingConfig("sample", max_length=config.decoding.max_length)
        if not config or config.decoding != sampling:
            raise ValueError(
                f"teacher.loss.policy needs plain samples, but {path} has the decoding "
                f"'{config.decoding}'; set a fraction above 0, and no option but max_length."
            )
    if config and packing != "none":
        raise ValueError(
            f"data.packing={packing!r} has several inputs in a row, of which teacher.on_policy "
            f"answers one; set data.packing='none'."
        )
    if config and not pairs:
        raise ValueError(
            f"{path} has no effect on running text, which has no answers; set it to 0, or use "
            f"tasks of inputs and targets."
        )
    if config and config.decoding.max_tokens(length) > length:
        raise ValueError(
            f"teacher.on_policy.decoding.max_length={config.decoding.max_length} is more than the "
            f"{length} tokens of a target; lower it, or raise data.target_length."
        )


def answer_batch(
    params: Any,
    examples: batch.Batch,
    addresses: Array,
    *,
    model: transformer.Transformer,
    length: int,
    eos: int,
    config: decoding.DecodingConfig,
    axis: steps.Axis | None = None,
) -> batch.Batch:
    """The batch with the model's own answers to its inputs as targets, and from_student set.

    addresses: int32 [B, 2] of steps.decode_step, which decide a row's samples. An answer ends with
    its eos, which is a target too, or after `length` tokens. Rows have one segment each, and no
    targets if they have no inputs.
    """
    decoded = steps.decode_step(
        params, examples, addresses, model=model, length=length, eos=eos, config=config, axis=axis
    )
    ids = decoded.ids[:, 0]
    ids = jnp.pad(ids, ((0, 0), (0, examples.targets.shape[1] - ids.shape[1])))
    is_after_eos = jnp.cumsum(ids == eos, axis=1) - (ids == eos) > 0
    has_inputs = jnp.any(examples.inputs_segment_ids > 0, axis=1, keepdims=True)
    is_target = has_inputs & ~is_after_eos & (jnp.arange(ids.shape[1]) < config.max_tokens(length))
    return examples._replace(
        targets=jnp.where(is_target, ids, 0),
        targets_segment_ids=is_target.astype(jnp.int32),
        from_student=jnp.ones(len(ids), bool),
    )


def policy_gradient(
    student: Array, teacher: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    """MiniLLM's long-term part, the effect of a token on those after it, as (total, weight).

    student, teacher: logits float [B, T, V]; targets: int [B, T], sampled from the student at
    temperature 1; weights: float [B, T]. The value of a token is log q - log p averaged over the
    rest of its row, with q of the student and p of the teacher; its gradient is the REINFORCE
    estimate. Summed instead of averaged, the gradient with that of reverse_kl would be that of
    KL(q || p) of whole answers; averaged, long answers weigh no more than short ones. There is no
    importance ratio: each answer is used for one update.
    Source: Gu et al. 2023, arXiv:2306.08543, section 2.2 (single-step decomposition, length
    normalisation).
    """
    nats = losses.token_nats(student, targets)
    excess = jax.lax.stop_gradient(losses.token_nats(teacher, targets) - nats) * weights
    sum_after = lambda x: jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1] - x
    rest = sum_after(excess) / jnp.maximum(sum_after(weights), 1.0)
    # exp(0) is 1: the value is the rest, and the gradient the rest times that of log q.
    ratio = jnp.exp(jax.lax.stop_gradient(nats) - nats)
    return jnp.sum(rest * ratio * weights), jnp.sum(weights)
