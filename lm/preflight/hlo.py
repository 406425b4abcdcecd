"""Bytes that a compiled program moves, read from its optimised HLO text (TPU, CPU, GPU)."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from typing import NamedTuple

# Collectives, and the bytes that each of n chips sends on a ring, over those of the whole array.
# Source: Thakur et al. 2005, "Optimization of collective communication operations in MPICH".
COLLECTIVES = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1,
    "collective-permute": lambda n: 1,
}

# What the text's words mean is documented at openxla.org/xla/operation_semantics; bytes are counted
# as xla/service/hlo_cost_analysis.cc does.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "while", "call"}
FREE |= {"conditional", "get-dimension-size"}
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollective")
PARTS = {"slice", "dynamic-slice", "gather"}  # read of their first operand what they give
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # write in place what this operand holds
SAME = {"bitcast", "convert", "copy", "reshape", "transpose"}  # an element of one for each of it
PRODUCTS = {"dot", "convolution"}
RUNS = {"while", "call", "fusion", "async-start"}

INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{$")
NAME = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d\w*)?\[([\d,<=]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(r"\b(?:calls|body|to_apply)=%?([\w.\-]+)")
BRANCHES = re.compile(
    r"\b(?:branch_computations=\{|(?:true|false)_computation=)([^},]*(?:, %[^},]*)*)"
)
LIBRARY = re.compile(r'custom_call_target="\S*(?:gemm|matmul|conv)')  # of a GPU or a CPU
CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
# Groups of chips, as {{0,1},{2,3}}, as [2,4]<=[8] or as mesh['x'=2,'y'=4] {'y'}.
LISTED = re.compile(r"\breplica_groups=\{\{([\d,]+)\}")
COUNTED = re.compile(r"\breplica_groups=\[(?:\d+,)*(\d+)\]<=")
NAMED = re.compile(r"\breplica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
AXIS = re.compile(r"'([^']+)'(?:=|:\(\d+\))?(\d+)?")
PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
PAIR = re.compile(r"\{(\d+),(\d+)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one chip moves in one run of a program.

    memory_bytes: to and from its memory. alone_bytes: of these the part that no matrix product
    hides, moved by instructions that have none. collectives: kind -> bytes that it sends to other
    chips. payload: kind -> bytes of the arrays before they are cut up. counts: kind -> how often.
    unknown_loops: loops whose length the text does not tell; their bodies are counted once.
    """

    memory_bytes: int
    alone_bytes: int
    collectives: dict[str, int]
    payload: dict[str, int]
    counts: dict[str, int]
    unknown_loops: int = 0

    @property
    def network_bytes(self) -> int:
        """The bytes that one chip sends to others, of all kinds."""
        return sum(self.collectives.values())


def traffic(text: str) -> Traffic:
    """The Traffic of one chip, from compiled.as_text(). Linear in the text's length."""
    program = _Program(text)
    found = program.sums(program.entry)
    of = lambda what: {kind: round(found[what, kind]) for kind in COLLECTIVES if found[what, kind]}
    return Traffic(
        round(found["memory"]),
        round(found["alone"]),
        of("sent"),
        of("payload"),
        of("count"),
        round(found["unknown"]),
    )


class _Instruction(NamedTuple):
    root: bool
    name: str
    shape: str
    kind: str  # the opcode
    rest: str  # operands, a bracket, attributes

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return NAME.findall(self.rest.partition(")")[0])

    @property
    def body(self) -> str:
        """The computation that it runs."""
        return CALLED.search(self.rest)[1]

    @property
    def moves(self) -> str:
        """The opcode without -start."""
        return self.kind.removesuffix("-start")

    @property
    def result(self) -> str:
        """What it gives; a -start gives also its operands, first but for copies."""
        if not self.kind.endswith("-start") or self.kind == "all-reduce-start":
            return self.shape
        return _elements(self.shape)[self.kind != "copy-start"]


@functools.cache
def _elements(shape: str) -> list[str]:
    # The elements of a tuple's shape.
    depth, cut = 0, [0]
    for place, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 1:
            cut.append(place)
    return [shape[a + 1 : b] for a, b in zip(cut, [*cut[1:], len(shape) - 1], strict=True)]


@functools.cache
def _sizes(shape: str) -> tuple[int, int, int]:
    # Elements, bytes, and bytes of those that are in the chip's main memory.
    elements, size, main = 0, 0, 0
    for word, dimensions, layout in ARRAY.findall(shape):
        count = math.prod(int(d.strip("<=")) for d in dimensions.split(",") if d)
        bits = re.search(r"\d+", word)
        width = int(bits[0]) / 8 if bits else float(word == "pred")
        elements, size = elements + count, size + round(count * width)
        # A TPU's arrays are in tiles, T(..); those in its other memories say which: S(1) is VMEM.
        main += 0 if "T(" in layout and "S(" in layout else round(count * width)
    return elements, size, main


def _many(one: _Instruction) -> int:
    return _sizes(one.shape)[0]


class _Program:
    """The computations of a text: name -> {name: instruction}."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry, self.fused, inside = "", set(), {}
        for line in text.splitlines():
            if match := INSTRUCTION.match(line):
                one = _Instruction(bool(match[1]), *match.groups()[1:])
                inside[one.name] = one
                if one.kind == "fusion":
                    self.fused.add(one.body)
            elif match := COMPUTATION.match(line):
                inside = self.computations.setdefault(match[2], {})
                self.entry = match[2] if match[1] else self.entry
        self.devices = math.prod(map(int, DEVICES.findall(text.partition("\n")[0])))
        for name in ("sums", "users", "outputs", "parameters", "has_product"):
            setattr(self, name, functools.cache(getattr(self, name)))

    def sums(self, name: str) -> collections.Counter:
        """What one run of a computation moves: "memory", "alone", "unknown", (figure, kind)."""
        sums = collections.Counter()
        for one in self.computations[name].values():
            moved = 0 if name in self.fused else self.memory(name, one)
            sums["memory"] += moved
            apart = one.kind.endswith("-start") or one.kind in COLLECTIVES or self.product(one)
            sums["alone"] += 0 if apart else moved
            if one.moves in COLLECTIVES and not self.continued(name, one):
                kind, sent, size = self.collective(name, one)
                sums.update({("sent", kind): sent, ("payload", kind): size, ("count", kind): 1})
            times, parts = 1, [one.body] if one.kind in RUNS else []
            if one.kind == "while":
                times = self.trips(one)
                sums["unknown"] += times is None
            elif one.kind == "conditional":
                names = NAME.findall(" ".join(BRANCHES.findall(one.rest)))
                parts = sorted(names, key=lambda name: self.sums(name)["memory"])[-1:]
            for part in parts:
                for what, number in self.sums(part).items():
                    sums[what] += number * (times or 1)
        return sums

    def trips(self, loop: _Instruction) -> int | None:
        """How often a loop's body runs; jax's loops count from 0 by 1 up to a constant."""
        if known := TRIPS.search(loop.rest):
            return int(known[1])
        inside = list(self.computations[CONDITION.search(loop.rest)[1]].values())
        for one in [one for one in inside if one.kind in RUNS]:
            inside += self.computations[one.body].values()
        ends = {one.rest.partition(")")[0] for one in inside if one.kind == "constant"}
        below = ["direction=LT" in one.rest for one in inside if one.kind == "compare"]
        end = ends.pop() if len(ends) == 1 and below == [True] else ""
        return int(end) if end.isdigit() else None

    def collective(self, name: str, one: _Instruction) -> tuple[str, float, int]:
        """Kind, bytes that a chip sends, and bytes of the whole array."""
        kind, inside = one.moves, self.computations[name]
        if kind == "all-reduce" and self.scattered(name, one):
            kind = "reduce-scatter"
        if kind in ("all-gather", "collective-permute"):
            size = _sizes(one.result)[1]
        else:
            size = sum(_sizes(inside[x].shape)[1] for x in one.operands)
        return kind, size * COLLECTIVES[kind](self.group(one)) if self.group(one) > 1 else 0, size

    def group(self, one: _Instruction) -> int:
        """Chips that take part together; 1: none sends."""
        if pairs := PAIRS.search(one.rest):
            return 1 + any(a != b for a, b in PAIR.findall(pairs[1]))
        if listed := LISTED.search(one.rest):
            return listed[1].count(",") + 1
        if counted := COUNTED.search(one.rest):
            return int(counted[1])
        if named := NAMED.search(one.rest):
            whole = dict(AXIS.findall(named[1]))
            return math.prod(int(part or whole[axis]) for axis, part in AXIS.findall(named[2]))
        return self.devices

    def scattered(self, name: str, one: _Instruction) -> bool:
        """Whether of this sum each chip keeps its part alone: how a TPU writes a reduce-scatter."""
        inside, outputs = self.computations[name], self.outputs(name)
        if name not in self.fused or outputs[0].kind != "dynamic-slice":
            return False
        return self.source(name, inside[outputs[0].operands[0]]) == one

    def continued(self, name: str, one: _Instruction) -> bool:
        """Whether this is a later part of a collective that a chain of fusions hides."""
        starts = ('"AsyncCollectiveStart"' in x.rest for x in self.computations[name].values())
        return "chain_id=" in one.rest and not any(starts)

    def product(self, one: _Instruction) -> bool:
        """Whether an instruction is or has a matrix product."""
        if one.kind == "fusion":
            return self.has_product(one.body)
        return one.kind in PRODUCTS or one.kind == "custom-call" and bool(LIBRARY.search(one.rest))

    def has_product(self, name: str) -> bool:
        """The same of any instruction of a computation."""
        return any(map(self.product, self.computations[name].values()))

    def memory(self, name: str, one: _Instruction) -> float:
        """Bytes that one instruction reads from main memory and writes there."""
        inside, kind = self.computations[name], one.moves
        if kind in FREE or kind.endswith(("-done", "-update")) or kind == "async-start":
            return 0
        if kind == "custom-call" and any(f'target="{free}' in one.rest for free in FREE_CALLS):
            return 0
        operands = [_sizes(inside[x].shape)[2] for x in one.operands]
        _, given, written = _sizes(one.result)
        if kind == "fusion":
            return self.fusion(name, one)
        if kind in PARTS:
            operands[0] = given if operands[0] else 0
        elif kind in UPDATES:
            written = operands[UPDATES[kind]] if written else 0
            operands[0] = written if kind == "scatter" else 0
        return sum(operands) + written

    def fusion(self, name: str, one: _Instruction) -> float:
        """Bytes of a fusion: of what goes in and out, the parts that are read and written."""
        inside, body = self.computations[name], one.body
        sizes = [_sizes(inside[x].shape)[2] for x in one.operands]
        moved = sum(
            n * self.read(body, x) for n, x in zip(sizes, self.parameters(body), strict=True) if n
        )
        outputs = self.outputs(body)
        shapes = _elements(one.shape) if one.shape.startswith("(") else [one.shape]
        if len(shapes) != len(outputs):
            return moved + _sizes(one.shape)[2]
        return moved + sum(
            _sizes(s)[2] * self.wrote(body, x) for s, x in zip(shapes, outputs, strict=True)
        )

    def parameters(self, name: str) -> list[_Instruction]:
        """Those of a computation, in the order of the operands."""
        found = [one for one in self.computations[name].values() if one.kind == "parameter"]
        return sorted(found, key=lambda one: int(one.rest.partition(")")[0]))

    def source(self, name: str, one: _Instruction) -> _Instruction:
        """What it is a view of, or itself."""
        while one.kind == "bitcast":
            one = self.computations[name][one.operands[0]]
        return one

    def outputs(self, name: str) -> list[_Instruction]:
        """What a computation gives, element by element."""
        inside = self.computations[name]
        root = next(one for one in inside.values() if one.root)
        given = [inside[x] for x in root.operands] if root.kind == "tuple" else [root]
        return [self.source(name, one) for one in given]

    def users(self, name: str) -> dict[str, list]:
        """Name -> its users, each with the operand's place."""
        users = collections.defaultdict(list)
        for one in self.computations[name].values():
            for place, operand in enumerate(one.operands):
                users[operand].append((one, place))
        return users

    def read(self, name: str, one: _Instruction) -> float:
        """The share of a value of a fused computation that is read."""
        total, outputs = 0.0, self.outputs(name)
        for user, place in self.users(name)[one.name]:
            if user.kind in PARTS and place == 0:
                total += _many(user) / _many(one)
            elif user.kind in SAME and not user.root:
                total += self.read(name, user)
            elif user.kind == "fusion":
                total += self.read(user.body, self.parameters(user.body)[place])
            elif user.kind in UPDATES and place == 0 and user in outputs:
                adds = user.kind == "scatter"  # to what is there; the other one writes over it
                total += adds * self.wrote(name, user)
            elif user.kind != "tuple" or self.source(name, one).kind != "parameter":
                return 1.0
        return min(total, 1.0)

    def wrote(self, name: str, one: _Instruction) -> float:
        """The share of an output of a fused computation that is written."""
        inside = self.computations[name]
        if one.kind == "parameter" or one.kind in COLLECTIVES and self.continued(name, one):
            return 0.0  # it is there already
        if one.kind in UPDATES and self.source(name, inside[one.operands[0]]).kind == "parameter":
            return _many(inside[one.operands[UPDATES[one.kind]]]) / _many(one)
        if one.kind == "fusion" and len(self.outputs(one.body)) == 1:
            return self.wrote(one.body, self.outputs(one.body)[0])
        return 1.0
