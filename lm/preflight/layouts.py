"""The ways to lay out a run on a slice: which are allowed, what they hold, how fast they may be."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from lm import layers, parallel, runs
from lm.preflight import slices

KEYS = {  # field of a Layout: (section of the config, key)
    "strategy": ("parallel", "strategy"),
    "data": ("parallel", "data"),
    "fsdp": ("parallel", "fsdp"),
    "tensor": ("parallel", "tensor"),
    "num_microbatches": ("parallel", "num_microbatches"),
    "remat": ("model", "remat"),
    "layers": ("model", "layers"),
}
REMATS = ("none", "dots", "full")  # from the fastest to the smallest
STATE_PASSES = 3  # times that an update reads or writes what it keeps: gradients, old, new
WEIGHT_PASSES = 3  # times that a micro-batch reads the weights: forward, and twice backward
ACTIVATION_PASSES = 4  # times that it writes and reads what the backward pass needs


@dataclasses.dataclass(frozen=True)
class Layout:
    """What may change of a run for it to fit or to be faster; keys and words as configs/base.py."""

    strategy: str = "pmap"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    num_microbatches: int = 1
    remat: str = "none"
    layers: str = "scanned"

    def sizes(self, chips: int) -> dict[str, int]:
        """Chips along each axis of the mesh."""
        data = chips // (self.fsdp * self.tensor) if self.data == -1 else self.data
        return {"data": data, "fsdp": self.fsdp, "tensor": self.tensor}

    def shards(self, chips: int) -> int:
        """Parts that a batch is cut into by the chips."""
        return self.sizes(chips)["data"] * self.fsdp


def layout_of(config: dict) -> Layout:
    """The layout that a config has."""
    return Layout(**{field: config[section][key] for field, (section, key) in KEYS.items()})


def changed(config: dict, layout: Layout) -> dict:
    """The config with this layout; the other one stays as it is."""
    made = copy.deepcopy(config)
    for field, (section, key) in KEYS.items():
        made[section][key] = getattr(layout, field)
    return made


def flags(config: dict, layout: Layout) -> list[str]:
    """The flags that turn the config's layout into this one, as a command line takes them."""
    own = layout_of(config)
    return [
        f"--config.{section}.{key}={getattr(layout, field)}"
        for field, (section, key) in KEYS.items()
        if getattr(layout, field) != getattr(own, field)
    ]


def laid_out(run: runs.Run, layout: Layout) -> runs.Run:
    """The run with this layout. Raises ValueError where its words exclude each other."""
    of = lambda section: {
        field: getattr(layout, field) for field, (name, _) in KEYS.items() if name == section
    }
    return dataclasses.replace(
        run,
        config=changed(run.config, layout),
        parallel=dataclasses.replace(run.parallel, **of("parallel")),
        model=dataclasses.replace(run.model, **of("model")),
    )


def doublings(most: int) -> list[int]:
    """1, 2, 4, .. up to `most`."""
    return [1 << power for power in range(most.bit_length())]


def divisors(number: int) -> list[int]:
    """All divisors, from 1 to the number itself."""
    return [n for n in range(1, number + 1) if number % n == 0]


class Shapes:
    """What shapes alone say of a run on all chips of a slice, layout by layout.

    state: steps.State of shapes, whole.
    """

    def __init__(self, run: runs.Run, state: Any, target: slices.Slice):
        self.run, self.state, self.target = run, state, target
        self._held: dict[tuple, tuple[int, int] | str] = {}  # by axes: the rules are slow

    def refusal(self, layout: Layout) -> str | None:
        """Why a layout is impossible, in a sentence; None where nothing speaks against it."""
        sizes, chips = layout.sizes(self.target.chips), self.target.chips
        if math.prod(sizes.values()) != chips:
            return f"{' x '.join(map(str, sizes.values()))} is not the {chips} chips of the slice."
        if self.target.host_chips % layout.tensor:
            return f"parallel.tensor={layout.tensor} does not divide the chips of a host."
        try:
            words = laid_out(self.run, layout).parallel
            shards = max(layout.shards(chips), words.fixed_shards)
            rows = self.run.data.batch_size
            parallel.check_batch_size(rows, shards, layout.num_microbatches)
        except ValueError as error:
            return str(error)
        found = self._by_axes(layout)
        return found if isinstance(found, str) else None

    def allowed(self, layers: str = "scanned") -> Iterator[Layout]:
        """Every layout that nothing speaks against: data x fsdp x tensor, micro-batches by
        doubling, words of remat. Without fsdp and tensor it is pmap.
        """
        for fsdp in divisors(self.target.chips):
            for tensor in divisors(self.target.chips // fsdp):
                strategy = "pmap" if fsdp * tensor == 1 else "mesh"
                for micro in doublings(self.run.data.batch_size):
                    made = Layout(strategy, -1, fsdp, tensor, micro, layers=layers)
                    if self.refusal(made) is None:
                        yield from (dataclasses.replace(made, remat=word) for word in REMATS)

    def _by_axes(self, layout: Layout) -> tuple[int, int] | str:
        key = (layout.strategy, *layout.sizes(self.target.chips).values())
        if key not in self._held:
            mesh = layout.strategy == "mesh"
            sizes = (
                layout.sizes(self.target.chips)
                if mesh
                else dict.fromkeys(parallel.sharding.AXES, 1)
            )
            try:
                self._held[key] = tuple(
                    _held(tree, sizes) for tree in (self.state, self.state.params)
                )
            except ValueError as error:
                self._held[key] = str(error)
        return self._held[key]

    def least(self, layout: Layout) -> int:
        """Bytes of a chip that no compiler can do without: the state and all gradients.

        Gradients are as large as the parameters, and there at once, since their norm decides
        whether the update counts. Raises ValueError for a layout that is refused.
        """
        found = self._by_axes(layout)
        if isinstance(found, str):
            raise ValueError(found)
        return sum(found)

    def activations(self, layout: Layout) -> int:
        """About how many bytes a chip keeps of a micro-batch for the backward pass.

        A guess to put layouts in order with, no promise: of each layer what its matrix products
        take and give, scores in two precisions, and logits three times in float32.
        """
        model = self.run.model
        total = 12 * self._targets * model.vocab_size / layout.tensor
        for side, depth, tokens, keys in self._towers:
            kept, whole = _layer_bytes(side, layout, tokens, keys)
            total += depth * kept + (whole if layout.remat != "none" else 0)
        return int(self._rows(layout) * total)

    def traffic(self, layout: Layout) -> tuple[float, float]:
        """About how many bytes an update moves on a chip: (its memory, its links).

        The links by closed forms: gradients are summed over data, parameters gathered twice and
        gradients scattered over fsdp, activations summed over tensor; a ring moves n - 1 parts of
        n. Under a mesh each micro-batch adds its own gradients up; under pmap the update does.
        """
        sizes, parts = layout.sizes(self.target.chips), layout.num_microbatches
        ring = {axis: (size - 1) / size for axis, size in sizes.items()}
        kept, weights = self._by_axes(layout)
        gathered = weights * layout.fsdp
        links = 2 * weights * ring["data"] * (parts if layout.strategy == "mesh" else 1)
        links += 3 * parts * gathered * ring["fsdp"]
        links += 2 * parts * self._summed(layout) * ring["tensor"]
        memory = STATE_PASSES * (kept + weights) + parts * WEIGHT_PASSES * gathered
        return memory + parts * ACTIVATION_PASSES * self.activations(layout), links

    def _rows(self, layout: Layout) -> float:
        # Rows of a micro-batch on a chip.
        parts = layout.shards(self.target.chips) * layout.num_microbatches
        return self.run.data.batch_size / parts

    @property
    def _targets(self) -> int:
        return self.run.lengths[1]

    @property
    def _towers(self) -> list[tuple]:
        # (sizes, layers, tokens of a row, what each of them attends to) of encoder and decoder.
        model, (inputs, targets) = self.run.model, self.run.lengths
        if model.arrangement != "encoder_decoder":
            return [(model, model.num_decoder_layers, inputs + targets, inputs + targets)]
        encoder = (model.side("encoder"), model.num_encoder_layers, inputs, inputs)
        return [encoder, (model, model.num_decoder_layers, targets, inputs + targets)]

    def _summed(self, layout: Layout) -> float:
        # Bytes of a micro-batch's activations that tensor parallelism adds up: those of two
        # sub-layers (of a decoder with an encoder: three), forward and backward.
        item, total = _item(self.run.model), 0
        for at, (side, depth, tokens, _) in enumerate(self._towers):
            total += 2 * (2 + at) * depth * tokens * side.d_model * item
        return self._rows(layout) * total


def _held(tree: Any, sizes: dict[str, int]) -> int:
    # Bytes of a tree on one device.
    cut = jax.tree.leaves(parallel.sharding.partition_specs(tree, sizes))
    part = parallel.sharding.shape_per_device
    return sum(
        math.prod(part(leaf, tuple(spec), sizes)) * leaf.dtype.itemsize
        for leaf, spec in zip(jax.tree.leaves(tree), cut, strict=True)
    )


def _item(model) -> int:
    return {"bfloat16": 2, "float32": 4}[model.dtype]


def _layer_bytes(side, layout: Layout, tokens: int, keys: int) -> tuple[float, float]:
    # Bytes of one row and layer: (kept for the backward pass, kept without remat).
    item, heads = _item(side), side.num_heads * side.head_dim
    wide = 2 * side.d_ff if layers.ACTIVATIONS[side.activation][1] else side.d_ff
    products = tokens * (4 * heads + wide) / layout.tensor
    scores = side.num_heads * tokens * keys * (4 + item) / layout.tensor
    block = item * tokens * side.d_model
    whole = 4 * block + 2 * item * products + scores
    kept = {"none": whole, "dots": 3 * block + item * products, "full": block}
    return kept[layout.remat], whole


def forward_passes(layout: Layout) -> int:
    """Forward passes that an update costs: backward is two, and remat=full does one again."""
    return 4 if layout.remat == "full" else 3
