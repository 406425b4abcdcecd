"""The encoder-decoder: one block, two towers, one embedding; by default T5 1.1.

config  ModelConfig and its sections
model   Block, Tower, Transformer: batch to logits, and one token at a time
cache   the KV cache and beam reordering
lora    low-rank adaptation of kernels
counts  parameters and FLOPs
"""

from __future__ import annotations

from lm.transformer.cache import Cache, Layer, gather_beams
from lm.transformer.config import (
    COMPUTE_KEYS,
    DTYPES,
    SHARED_KEYS,
    EncoderConfig,
    ModelConfig,
    flatten,
)
from lm.transformer.counts import forward_flops, param_shapes, parameter_count
from lm.transformer.lora import LoraConfig
from lm.transformer.model import Transformer, dummy_batch, no_constraint
