"""The interface that Pmap and Mesh implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax


class Strategy(Protocol):
    """Places states and batches on devices, and compiles steps for them.

    Placed trees are laid out on devices; every host passes its own rows of a batch.
    """

    devices: Any  # jax devices of all hosts
    shards: int  # the number of parts that a batch is split into

    def place_state(self, tree: Any) -> Any:
        """Place a state or parameters, equal on all hosts."""

    def init(self, make: Callable, *args: Any) -> Any:
        """Return make(*args) as a placed state, for placed trees of parameters."""

    def place_batch(self, tree: Any) -> Any:
        """Place this host's rows."""

    def shard_activations(self, x: jax.Array) -> jax.Array:
        """Constrain the layout of activations [B, ...] inside a program."""
        ...

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """Return the program of step(state, batch, ...); donate: reuse the state's memory."""
        ...

    def fetch(self, tree: Any) -> Any:
        """Return one copy of a placed state, or of a result that is equal on all devices."""

    def fetch_numbers(self, tree: Any) -> Any:
        """Fetch as numpy arrays, without running a program."""

    def fetch_rows(self, tree: Any) -> Any:
        """Return all rows of a placed batch, or of a result with its rows, as numpy arrays."""

    def abstract_state(self, tree: Any) -> Any:
        """Return shapes with shardings, to restore a state into."""

    def global_shapes(self, state: Any, rows: Any) -> tuple[Any, Any]:
        """Return the shapes of a state and a batch as they are placed."""
        ...

    def find_disagreement(self, state: Any) -> str | None:
        """Return the path of a leaf whose copies differ between devices."""
        ...
