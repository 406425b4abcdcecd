"""The words of a layout, and what of them can be checked without a device."""

from __future__ import annotations

import dataclasses

from lm import lookup

STRATEGIES = {"pmap": "a copy of the state on every device", "mesh": "its parts on each"}


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The strategy, the mesh's sizes (data=-1: all remaining devices), and how a batch is added up.

    Keys as in configs/base.py.
    """

    strategy: str = "pmap"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    num_microbatches: int = 1
    deterministic_reduction: bool = False
    reduction_shards: int = 8

    def __post_init__(self):
        lookup.lookup(STRATEGIES, self.strategy, "parallel.strategy")
        for field in ("fsdp", "tensor", "num_microbatches", "reduction_shards"):
            if getattr(self, field) < 1:
                raise ValueError(f"parallel.{field}={getattr(self, field)} is too small; use 1.")
        if self.data < 1 and self.data != -1:
            raise ValueError(f"parallel.data={self.data} is no size; use 1 or more, or -1 for all.")
        if self.strategy == "pmap" and (self.fsdp, self.tensor) != (1, 1):
            raise ValueError(
                f"parallel.fsdp={self.fsdp} and parallel.tensor={self.tensor} shard parameters, "
                f"which pmap replicates; use parallel.strategy='mesh'."
            )
        if self.deterministic_reduction and self.strategy == "mesh":
            raise ValueError(
                "parallel.deterministic_reduction=True orders the sums of pmap, but the compiler "
                "orders those of a mesh; use parallel.strategy='pmap', or False."
            )
        if self.reduction_shards & (self.reduction_shards - 1):
            raise ValueError(
                f"parallel.reduction_shards={self.reduction_shards} cannot be halved down "
                f"to one; use a power of 2."
            )

    @property
    def fixed_shards(self) -> int:
        """Parts of a batch that are added in one order; 0 where the order is free."""
        return self.reduction_shards if self.deterministic_reduction else 0


def check_batch_size(batch_size: int, shards: int, num_microbatches: int) -> None:
    """Raise ValueError unless a batch divides over data shards and micro-batches."""
    if batch_size % (shards * num_microbatches):
        raise ValueError(
            f"data.batch_size={batch_size} does not divide over {shards} shards x "
            f"parallel.num_microbatches={num_microbatches}; use a multiple of "
            f"{shards * num_microbatches}."
        )
