"""The interface that Pmap and Mesh implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax


class Strategy(Protocol):
    """Places states and batches on devices, and compiles steps for them; see Pmap and Mesh.

    "Placed" trees are laid out on devices; every host passes its own rows of a batch.
    """

    devices: list  # jax devices of all hosts
    shards: int  # the number of parts that a batch is split into
    place_state: Callable[[Any], Any]  # state or parameters, equal on all hosts -> placed
    init: Callable[..., Any]  # make, *trees of parameters -> placed make(*trees)
    place_batch: Callable[[Any], Any]  # this host's rows -> placed
    shard_activations: Callable[[jax.Array], jax.Array]  # inside a program, [B, ...]
    compile: Callable[..., Callable]  # step(state, batch, ...), donate=False -> the program
    fetch: Callable[[Any], Any]  # placed state, or a result equal on all devices -> one copy
    fetch_numbers: Callable[[Any], Any]  # the same as numpy, without running a program
    fetch_rows: Callable[[Any], Any]  # placed batch, or a result with its rows -> numpy
    abstract_state: Callable[[Any], Any]  # shapes -> shapes with shardings, to restore into
    global_shapes: Callable[[Any, Any], tuple[Any, Any]]  # of a state and a batch, as placed
    find_disagreement: Callable[[Any], str | None]  # the path of a leaf whose copies differ
