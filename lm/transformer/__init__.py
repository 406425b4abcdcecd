"""The encoder-decoder: one block, two towers, one embedding; T5 1.1 unless told otherwise."""

from __future__ import annotations

from lm.transformer.adapters import LoraConfig
from lm.transformer.cache import Cache, Layer, take_rows
from lm.transformer.config import COMPUTED, DTYPES, SHARED, ModelConfig, Shape
from lm.transformer.counts import forward_flops, parameter_count, shapes
from lm.transformer.model import Transformer, anywhere, example

__all__ = [
    "COMPUTED",
    "DTYPES",
    "SHARED",
    "Cache",
    "Layer",
    "LoraConfig",
    "ModelConfig",
    "Shape",
    "Transformer",
    "anywhere",
    "example",
    "forward_flops",
    "parameter_count",
    "shapes",
    "take_rows",
]
