"""Export LoRA factors alone, as the library peft writes them.

adapter_config.json lists the adapted modules; adapter_model.safetensors has per layer lora_A
[r, inputs], our a, and lora_B [outputs, r], our b.
"""

from __future__ import annotations

import math
import os
import pathlib
from typing import Any

from flax import traverse_util

from lm import transformer
from lm.interop import names, safetensors, transformers
from lm.transformer import lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name, as peft wraps the model


def write(
    params: Any,
    config: transformer.ModelConfig,
    lora_config: transformer.LoraConfig,
    directory: str | os.PathLike,
) -> None:
    """Write what peft.PeftModel.from_pretrained adds to an export of the base model.

    params: the tree of training. Raises ValueError for a model that no family can represent.
    """
    directory = pathlib.Path(directory)
    leaves = traverse_util.flatten_dict(params[lora.ADAPTERS], sep="/")
    shapes = traverse_util.flatten_dict(transformer.param_shapes(config), sep="/")
    family = names.family_of(config)
    kernels = names.tensor_maps(family, {path: leaf.shape for path, leaf in shapes.items()})
    kernels = [kernel for kernel in kernels.values() if f"{kernel.path}/a" in leaves]
    directory.mkdir(parents=True, exist_ok=True)
    factors = [factor for kernel in kernels for factor in _factors(kernel, lora_config.rank)]
    safetensors.write(directory / WEIGHTS, leaves, factors)
    keys = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "r": lora_config.rank,
        "lora_alpha": lora_config.alpha,
        "target_modules": [kernel.name.removesuffix(".weight") for kernel in kernels],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    transformers.write_json(directory / CONFIG, keys)


def _factors(kernel: names.TensorMap, rank: int) -> tuple[names.TensorMap, names.TensorMap]:
    """lora_A and lora_B of one of their matrices [outputs, inputs]."""
    module = PREFIX + kernel.name.removesuffix(".weight")
    cut = lora.num_input_axes(kernel.path)
    inputs, outputs = kernel.shape[:cut], kernel.shape[cut:]
    a = (*inputs, rank), (cut, *range(cut)), (rank, math.prod(inputs))
    b = (rank, *outputs), (*range(1, 1 + len(outputs)), 0), (math.prod(outputs), rank)
    return (
        names.TensorMap(f"{module}.lora_A.weight", f"{kernel.path}/a", kernel.layer, *a),
        names.TensorMap(f"{module}.lora_B.weight", f"{kernel.path}/b", kernel.layer, *b),
    )
