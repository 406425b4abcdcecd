"""Every objective with every option, and a vocabulary for them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lm import objectives

SENTINEL, NUM_SENTINELS, EOS = 32099, 1000, 1
PIECES = SENTINEL + 1 - NUM_SENTINELS
SENTINELS = np.arange(SENTINEL, SENTINEL - NUM_SENTINELS, -1, dtype=np.int32)
WORDS = np.arange(2, PIECES, dtype=np.int32)
VOCABULARY = objectives.Vocabulary(SENTINELS, EOS, WORDS, np.arange(SENTINEL + 1) % 10 == 0)
SPAN, MASK = "span_corruption", "token_masking"
CHOICES = {
    name: [
        dict(zip(objective.choices, values, strict=True))
        for values in itertools.product(*objective.choices.values())
    ]
    for name, objective in objectives.OBJECTIVES.items()
}
ALL_KEYS = [dict(name=name) | values for name, choices in CHOICES.items() for values in choices]


def name_of(keys: dict) -> str:
    return "-".join(keys.values())


every_objective = pytest.mark.parametrize("keys", ALL_KEYS, ids=name_of)


def config_of(density=0.15, span=3.0, name=SPAN, **keys):
    return objectives.ObjectiveConfig(name, density, span, **keys)


def rng_of(seed):
    return np.random.default_rng(seed)
