"""The section teacher of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lm import lookup, transformer
from lm.distill import on_policy, terms

DEFAULT_LOSS = {"labels": {"weight": 0.2}, "forward_kl": {"weight": 0.8, "temperature": 2.0}}


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Who teaches, where the student starts, and the loss; keys as in configs/base.py."""

    workdir: str = ""
    student_init: str = "even"
    loss: Mapping = dataclasses.field(default_factory=lambda: DEFAULT_LOSS, hash=False)
    dtype: str = "float32"
    cache: str = ""
    on_policy: on_policy.OnPolicyConfig = on_policy.OnPolicyConfig()

    def __post_init__(self):
        section = lookup.as_section(on_policy.OnPolicyConfig, self.on_policy, "teacher.on_policy")
        object.__setattr__(self, "on_policy", section)
        lookup.lookup(dict.fromkeys(transformer.DTYPES), self.dtype, "teacher.dtype")
        loss = self.terms
        if not self.cache:
            return
        if live := terms.uncached(loss):
            raise ValueError(
                f"teacher.cache={self.cache!r} stores top-k logits alone, but the teacher.loss "
                f"{', '.join(live)} needs the live teacher; remove teacher.cache."
            )
        if self.on_policy:
            raise ValueError(
                f"teacher.cache={self.cache!r} has no logits of the student's own answers, which "
                f"teacher.on_policy.fraction={self.on_policy.fraction} asks for; remove one."
            )
        terms.shared_temperature(loss)

    @property
    def terms(self) -> tuple[terms.Term, ...]:
        """The terms of the loss."""
        return terms.loss_terms(self.loss)
