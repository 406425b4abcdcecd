"""What LoRA has learnt, alone, as the library peft writes it: to be put on the model started from.

adapter_config.json says what is adapted, adapter_model.safetensors has the factors: their lora_A
[r, inputs] is our a, their lora_B [outputs, r] our b, of every layer by itself.
"""

from __future__ import annotations

import math
import os
import pathlib
from typing import Any

from flax import traverse_util

from lm import transformer
from lm.interop import names, transformers
from lm.transformer import lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name, as peft wraps the model


def write(
    params: Any,
    config: transformer.ModelConfig,
    lora_config: transformer.LoraConfig,
    directory: str | os.PathLike,
) -> None:
    """The files that peft.PeftModel.from_pretrained puts on an export of the model started from.

    params: as training holds them. Raises ValueError for a model that no family can express.
    """
    directory = pathlib.Path(directory)
    leaves = traverse_util.flatten_dict(params[lora.ADAPTERS], sep="/")
    shapes = traverse_util.flatten_dict(transformer.param_shapes(config), sep="/")
    family = names.family_of(config)
    places = names.places(family, {path: leaf.shape for path, leaf in shapes.items()})
    adapted = [place for place in places.values() if f"{place.path}/a" in leaves]
    directory.mkdir(parents=True, exist_ok=True)
    factors = [factor for place in adapted for factor in _factors(place, lora_config.rank)]
    transformers.write_tensors(directory / WEIGHTS, leaves, factors)
    theirs = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "r": lora_config.rank,
        "lora_alpha": lora_config.alpha,
        "target_modules": [place.name.removesuffix(".weight") for place in adapted],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    transformers.write_json(directory / CONFIG, theirs)


def _factors(kernel: names.Place, rank: int) -> tuple[names.Place, names.Place]:
    # lora_A and lora_B of one of their matrices, which is [outputs, inputs].
    module, cut = PREFIX + kernel.name.removesuffix(".weight"), lora.inputs_of(kernel.path)
    into, out = kernel.ours[:cut], kernel.ours[cut:]
    last = len(out)
    a = names.Place(
        f"{module}.lora_A.weight",
        f"{kernel.path}/a",
        kernel.layer,
        (*into, rank),
        (cut, *range(cut)),
        (rank, math.prod(into)),
    )
    b = names.Place(
        f"{module}.lora_B.weight",
        f"{kernel.path}/b",
        kernel.layer,
        (rank, *out),
        (*range(1, 1 + last), 0),
        (math.prod(out), rank),
    )
    return a, b
