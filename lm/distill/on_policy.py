"""The student's own answers: when it writes them, how they are learnt from.

Source: Agarwal et al. 2023, arXiv:2306.13649 (GKD); Gu et al. 2023, arXiv:2306.08543 (MiniLLM).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lm import batch, decoding, losses, steps
from lm.distill.terms import Term

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Policy:
    """How often the student learns from its own answers, and how it finds them.

    share: of the updates, in 0..1; 0: none. They lie as evenly as can be: which ones follows from
    the batches' numbers alone, so it is the same on every host and after every restart.
    """

    share: float = 0.0
    how: decoding.DecodingConfig = decoding.DecodingConfig()

    def __post_init__(self):
        if not (math.isfinite(self.share) and 0 <= self.share <= 1):
            raise ValueError(f"teacher.on_policy share={self.share} is no share; use 0 to 1.")
        if self.how.n_best > 1:
            raise ValueError(
                f"teacher.on_policy n_best={self.how.n_best} is more than the one answer that an "
                f"input has in a batch; leave n_best out."
            )

    def __bool__(self) -> bool:
        return self.share > 0

    def is_on_policy(self, index: int) -> bool:
        """Whether the student writes the targets of the batch of this number, from 0."""
        return math.floor((index + 1) * self.share) > math.floor(index * self.share)

    def usual(self, index: int) -> bool:
        """Whether that batch is of the commoner kind, whose losses can be compared."""
        return self.is_on_policy(index) == (self.share > 0.5)


def parse(text: str) -> Policy:
    """The Policy of a line such as "share=0.5 sample temperature=1"; empty: never.

    The words after the share are those of lm/decoding. Raises ValueError for what it cannot read.
    """
    if not text.strip():
        return Policy()
    first, _, rest = text.strip().partition(" ")
    name, _, value = first.partition("=")
    try:
        share = float(value)
    except ValueError:
        name = ""
    if name != "share":
        raise ValueError(
            f"teacher.on_policy={text!r} does not begin with its share of the updates; write it "
            f"as 'share=0.5 sample temperature=1'."
        )
    return Policy(share, decoding.parse(rest))


def check(text: str, terms: tuple[Term, ...], *, packing: str, pairs: bool, length: int) -> None:
    """Raise ValueError where a policy, in words, does not suit what else is asked.

    terms: of the loss. packing: data.packing. pairs: whether all tasks have inputs and targets, or
    else running text. length: columns of the targets.
    """
    asked, names = parse(text), {term.name for term in terms}
    if asked and names == {"labels"}:
        raise ValueError(
            f"teacher.on_policy={text!r} would teach nothing: teacher.loss has labels alone, which "
            f"the student's own answers are not; add a term that asks the teacher, as jsd."
        )
    if "policy" in names:
        drawn = decoding.DecodingConfig("sample", max_length=asked.how.max_length)
        if not asked or asked.how != drawn:
            raise ValueError(
                f"teacher.loss has the term policy, which learns from answers drawn as they come, "
                f"and not from teacher.on_policy={text!r}; write it as 'share=1 sample'."
            )
    if asked and packing != "none":
        raise ValueError(
            f"data.packing={packing!r} has several inputs in a row, of which teacher.on_policy "
            f"answers one; set data.packing='none'."
        )
    if asked and not pairs:
        raise ValueError(
            f"teacher.on_policy={text!r} has no use for running text, which asks for no answer; "
            f"leave it empty, or use tasks of inputs and targets."
        )
    if asked and asked.how.room(length) > length:
        raise ValueError(
            f"teacher.on_policy max_length={asked.how.max_length} is more than the {length} tokens "
            f"of a target; lower it, or raise data.target_length."
        )


def answered(
    params,
    examples: batch.Batch,
    addresses: Array,
    *,
    model,
    length: int,
    eos: int,
    how: decoding.DecodingConfig,
    axis: steps.Axis | None = None,
) -> batch.Batch:
    """The batch with the model's own answers to its inputs as targets, marked as its own.

    addresses: int32 [B, 2], as of steps.decode_step: all that a row's draws follow from. An answer
    ends with its eos, which is to be predicted too, or after `length` tokens. The rows have one
    segment each; those without inputs have no targets.
    """
    found = steps.decode_step(
        params, examples, addresses, model=model, length=length, eos=eos, how=how, axis=axis
    )
    ids = found.ids[:, 0]
    ids = jnp.pad(ids, ((0, 0), (0, examples.targets.shape[1] - ids.shape[1])))
    place = jnp.arange(ids.shape[1])
    ended = jnp.cumsum(ids == eos, axis=1) - (ids == eos) > 0
    asked = jnp.any(examples.inputs_segment_ids > 0, axis=1, keepdims=True)
    said = asked & ~ended & (place < how.room(length))
    return examples._replace(
        targets=jnp.where(said, ids, 0),
        targets_segment_ids=said.astype(jnp.int32),
        from_student=jnp.ones(len(ids), bool),
    )


def policy_gradient(
    student: Array, teacher: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    """What a token does to the tokens after it, as (total, weight); on the student's own answers.

    student, teacher: logits float [B, T, V]; targets int [B, T], drawn from the student at
    temperature 1; weights float [B, T]. The value estimates, of each token, log q - log p averaged
    over the rest of its row, q the student's probabilities and p the teacher's; its gradient is
    the REINFORCE estimate of that. Summed instead of averaged it would make, with reverse_kl, the
    gradient of KL(q || p) of whole answers; averaged, long answers weigh no more than short ones.
    An answer is used for one update; without dropout, which answers are found without, no
    importance ratio would differ from 1, and none is taken.
    Source: Gu et al. 2023, arXiv:2306.08543, section 2.2 (single-step decomposition, length
    normalisation).
    """
    surprise = losses.token_nats(student, targets)
    excess = jax.lax.stop_gradient(losses.token_nats(teacher, targets) - surprise) * weights
    after = lambda x: jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1] - x
    rest = after(excess) / jnp.maximum(after(weights), 1.0)
    # exp(0) times: the value is the rest, the gradient the rest times that of log q.
    ratio = jnp.exp(jax.lax.stop_gradient(surprise) - surprise)
    return jnp.sum(rest * ratio * weights), jnp.sum(weights)
