"""Pre-train with your own activation: the squared ReLU of Primer, registered in this file.

python -m lm train --config=configs/squared_relu.py:tiny --workdir=runs/squared_relu
python -m lm predict --workdir=runs/squared_relu --extensions=configs/squared_relu.py

Source: So et al. 2021, arXiv:2109.08668.
Cost: planned as configs/pretrain.py on two CPU cores, with 2.9 million parameters and 1.2e10 FLOPs
    per update. Time: not yet measured.
Score: not yet measured; configs/pretrain.py reaches 5.468 nats per text token in 1,000 updates.
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
