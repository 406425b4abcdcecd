"""T5 1.1 with the squared ReLU of Primer (So et al. 2021, arXiv:2109.08668): an own activation.

python -m lm train --config=configs/squared_relu.py:tiny --workdir=runs/squared_relu
python -m lm predict --workdir=runs/squared_relu --extensions=configs/squared_relu.py
"""

import jax
import jax.numpy as jnp

from configs import pretrain
from lm import extensions, layers


def squared_relu(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


extensions.register(layers.ACTIVATIONS, "squared_relu", (squared_relu, False))  # no gate


def get_config(preset: str = "tiny"):
    config = pretrain.get_config(preset)
    config.model.activation = "squared_relu"
    return config
