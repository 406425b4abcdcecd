"""Bytes that a compiled program sends between chips, read from its optimized HLO text.

Programs of TPUs, CPUs and GPUs; openxla.org/xla/operation_semantics documents their operations.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from typing import NamedTuple

# Kind of collective -> bytes that each of n chips sends on a ring, per byte of its operands.
# Source: Thakur et al. 2005, "Optimization of collective communication operations in MPICH".
COLLECTIVES = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1,
    "collective-permute": lambda n: 1,
}
CALLERS = {"while", "call", "fusion", "async-start"}  # operations that run another computation

INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{$")
NAME = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d\w*)?\[([\d,<=]*)\]")
CALLED = re.compile(r"\b(?:calls|body|to_apply)=%?([\w.\-]+)")
BRANCHES = re.compile(
    r"\b(?:branch_computations=\{|(?:true|false)_computation=)([^},]*(?:, %[^},]*)*)"
)
CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
TRIP_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
# Groups of chips, as {{0,1},{2,3}}, as [2,4]<=[8] or as mesh['x'=2,'y'=4] {'y'}.
LISTED = re.compile(r"\breplica_groups=\{\{([\d,]+)\}")
COUNTED = re.compile(r"\breplica_groups=\[(?:\d+,)*(\d+)\]<=")
NAMED = re.compile(r"\breplica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
AXIS = re.compile(r"'([^']+)'(?:=|:\(\d+\))?(\d+)?")
PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
PAIR = re.compile(r"\{(\d+),(\d+)\}")


class Traffic(NamedTuple):
    """Bytes that one chip sends in one run of a program.

    sent: bytes by kind of collective. unknown_loops: loops whose trip count the text does not
    state; their bodies are counted once.
    """

    sent: dict[str, int]
    unknown_loops: int


def collective_traffic(text: str) -> Traffic:
    """Reads the collectives of a program from compiled.as_text(), in time linear in its length."""
    program = _Program(text)
    sums = program.sums(program.entry)
    return Traffic({kind: round(sums[kind]) for kind in COLLECTIVES if sums[kind]}, sums["unknown"])


class _Instruction(NamedTuple):
    root: bool
    name: str
    shape: str
    opcode: str
    rest: str  # operands, a bracket, attributes

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return NAME.findall(self.rest.partition(")")[0])

    @property
    def body(self) -> str:
        """The computation that it calls."""
        return CALLED.search(self.rest)[1]

    @property
    def kind(self) -> str:
        """The opcode without -start."""
        return self.opcode.removesuffix("-start")


@functools.cache
def _num_bytes(shape: str) -> int:
    """Sums the bytes of all arrays in a shape."""
    total = 0
    for dtype, dimensions in ARRAY.findall(shape):
        count = math.prod(int(d.strip("<=")) for d in dimensions.split(",") if d)
        bits = re.search(r"\d+", dtype)
        total += round(count * (int(bits[0]) / 8 if bits else float(dtype == "pred")))
    return total


class _Program:
    """The computations of a program: name -> {name: instruction}."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry, self.fused, computation = "", set(), {}
        for line in text.splitlines():
            if match := INSTRUCTION.match(line):
                instruction = _Instruction(bool(match[1]), *match.groups()[1:])
                computation[instruction.name] = instruction
                if instruction.opcode == "fusion":
                    self.fused.add(instruction.body)
            elif match := COMPUTATION.match(line):
                computation = self.computations.setdefault(match[2], {})
                self.entry = match[2] if match[1] else self.entry
        self.devices = math.prod(map(int, DEVICES.findall(text.partition("\n")[0])))
        self.sums = functools.cache(self._sums)

    def _sums(self, name: str) -> collections.Counter:
        """Sums one run of a computation: bytes sent by kind, and "unknown" loops."""
        sums = collections.Counter()
        for instruction in self.computations[name].values():
            if instruction.kind in COLLECTIVES and not self._is_continued(name, instruction):
                kind, sent = self._collective(name, instruction)
                sums[kind] += sent
            times, called = 1, []
            if instruction.opcode in CALLERS:
                called = [instruction.body]
            if instruction.opcode == "while":
                times = self._trip_count(instruction)
                sums["unknown"] += times is None
            elif instruction.opcode == "conditional":  # the branch that sends most
                branches = NAME.findall(" ".join(BRANCHES.findall(instruction.rest)))
                called = sorted(branches, key=self._sent)[-1:]
            for computation in called:
                for key, number in self.sums(computation).items():
                    sums[key] += number * (times or 1)
        return sums

    def _sent(self, name: str) -> float:
        return sum(self.sums(name)[kind] for kind in COLLECTIVES)

    def _trip_count(self, loop: _Instruction) -> int | None:
        """Returns how often a loop's body runs: jax's loops count from 0 by 1 up to a constant."""
        if match := TRIP_COUNT.search(loop.rest):
            return int(match[1])
        condition = list(self.computations[CONDITION.search(loop.rest)[1]].values())
        for caller in [item for item in condition if item.opcode in CALLERS]:
            condition += self.computations[caller.body].values()
        ends = {item.rest.partition(")")[0] for item in condition if item.opcode == "constant"}
        is_below = ["direction=LT" in item.rest for item in condition if item.opcode == "compare"]
        end = ends.pop() if len(ends) == 1 and is_below == [True] else ""
        return int(end) if end.isdigit() else None

    def _collective(self, name: str, instruction: _Instruction) -> tuple[str, float]:
        """Returns the kind, and the bytes that a chip sends."""
        kind, computation = instruction.kind, self.computations[name]
        if kind == "all-reduce" and self._is_reduce_scatter(name, instruction):
            kind = "reduce-scatter"
        size = sum(_num_bytes(computation[x].shape) for x in instruction.operands)
        group = self._group_size(instruction)
        return kind, size * COLLECTIVES[kind](group) if group > 1 else 0

    def _group_size(self, instruction: _Instruction) -> int:
        """Returns the number of chips in a collective's group; 1: no chip sends."""
        if pairs := PAIRS.search(instruction.rest):
            return 1 + any(a != b for a, b in PAIR.findall(pairs[1]))
        if listed := LISTED.search(instruction.rest):
            return listed[1].count(",") + 1
        if counted := COUNTED.search(instruction.rest):
            return int(counted[1])
        if named := NAMED.search(instruction.rest):
            sizes = dict(AXIS.findall(named[1]))
            return math.prod(int(size or sizes[axis]) for axis, size in AXIS.findall(named[2]))
        return self.devices

    def _is_reduce_scatter(self, name: str, instruction: _Instruction) -> bool:
        """Whether each chip slices the sum: TPU programs write a reduce-scatter so, in a fusion."""
        computation = self.computations[name]
        output = self._view_source(name, next(x for x in computation.values() if x.root))
        if name not in self.fused or output.opcode != "dynamic-slice":
            return False
        return self._view_source(name, computation[output.operands[0]]) == instruction

    def _view_source(self, name: str, instruction: _Instruction) -> _Instruction:
        """Follows bitcasts, and the first elements of tuples, to the instruction that computes."""
        while instruction.opcode in ("bitcast", "tuple"):
            instruction = self.computations[name][instruction.operands[0]]
        return instruction

    def _is_continued(self, name: str, instruction: _Instruction) -> bool:
        """Whether an earlier fusion of a chain, which overlaps with compute, counts the same."""
        starts = ('"AsyncCollectiveStart"' in x.rest for x in self.computations[name].values())
        return "chain_id=" in instruction.rest and not any(starts)
