"""The section parallel of a config, and the check of the batch size."""

from __future__ import annotations

import dataclasses

from lm import lookup

STRATEGIES = {"pmap": "every device has a copy of the state", "mesh": "devices share the state"}


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The strategy, the sizes of the mesh, and the order of sums; keys as in configs/base.py."""

    strategy: str = "pmap"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    num_microbatches: int = 1
    deterministic_reduction: bool = False
    reduction_shards: int = 8

    def __post_init__(self):
        lookup.lookup(STRATEGIES, self.strategy, "parallel.strategy")
        positive = ("fsdp", "tensor", "num_microbatches", "reduction_shards")
        lookup.check_bounds(self, "parallel", dict.fromkeys(positive, (1, None)))
        if self.data < 1 and self.data != -1:
            raise ValueError(f"parallel.data={self.data} is no size; use 1 or more, or -1 for all.")
        if self.strategy == "pmap" and (self.fsdp, self.tensor) != (1, 1):
            raise ValueError(
                f"parallel.fsdp={self.fsdp} and parallel.tensor={self.tensor} shard parameters, "
                f"which pmap replicates; use parallel.strategy='mesh'."
            )
        if self.deterministic_reduction and self.strategy == "mesh":
            raise ValueError(
                "parallel.deterministic_reduction=True is unsupported for a mesh, whose sums the "
                "compiler orders; use parallel.strategy='pmap', or False."
            )
        if self.reduction_shards & (self.reduction_shards - 1):
            raise ValueError(
                f"parallel.reduction_shards={self.reduction_shards} is no power of 2; use one."
            )

    @property
    def fixed_shards(self) -> int:
        """The number of shards of a batch that are summed in a fixed order; 0 for any order."""
        return self.reduction_shards if self.deterministic_reduction else 0


def check_batch_size(batch_size: int, shards: int, num_microbatches: int) -> None:
    """Raise ValueError unless a batch divides over data shards and micro-batches."""
    divisor = shards * num_microbatches
    if batch_size % divisor:
        raise ValueError(
            f"data.batch_size={batch_size} does not divide over {shards} shards x "
            f"parallel.num_microbatches={num_microbatches}; use a multiple of {divisor}."
        )
