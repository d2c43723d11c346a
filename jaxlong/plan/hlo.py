"""Collectives of a compiled program: how many, how large, how often, and what runs meanwhile.

Reads the text of a scheduled module. A loop whose counter is compared with a constant counts its body that often; one
whose end is a value of the program counts once, and is reported. Every branch of a conditional counts as if taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

HEAVY = frozenset({"while", "conditional", "fusion", "convolution", "dot", "custom-call", "call", "async-start"})
"""Instructions that compute for longer than it takes to start them."""

KERNEL = 'custom_call_target="tpu_custom_call"'

WIDTHS: Mapping[str, float] = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2} | {
    f"{kind}{bits}": bits / 8 for kind in "sufc" for bits in (8, 16, 32, 64, 128)
}
"""Bytes of an element by its type's name; names as f8e4m3fn by what they begin with."""

_OP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+)[a-z0-9]*\[([\d,]*)\]|\b(pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"%([\w.\-]+)")


class Op(NamedTuple):
    """An instruction: `type` is its result's, `rest` all after the opening bracket of its operands."""

    name: str
    type: str
    kind: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.rest.split(")", 1)[0])


@dataclass
class Traffic:
    """Collectives of one kind, of one device.

    Fields:
        sites: instructions.    runs: executions, loops counted as far as they can be read.
        bytes: sent in all executions, as a ring over the group sends them.
    """

    sites: int = 0
    runs: int = 0
    bytes: float = 0.0


@dataclass
class Permutes:
    """How collective-permutes are scheduled: `hidden` ones start and end with computation between."""

    synchronous: int = 0
    asynchronous: int = 0
    hidden: int = 0


@dataclass
class Program:
    """What the text of a module says. `unread` loops have an end that is no constant; `kernels` are Pallas programs."""

    collectives: dict[str, Traffic] = field(default_factory=dict)
    permutes: Permutes = field(default_factory=Permutes)
    unread: int = 0
    kernels: int = 0


def read(text: str) -> Program:
    """The collectives of a compiled module, `compiled.as_text()`."""
    computations, entry = split(text)
    found = Program(kernels=text.count(KERNEL))
    for ops, times in _executions(computations, entry, found):
        for op in ops:
            kind = op.kind.removesuffix("-start")
            if kind in KINDS:
                traffic = found.collectives.setdefault(kind, Traffic())
                traffic.sites += 1
                traffic.runs += times
                traffic.bytes += times * sent(op, kind)
        _schedule(ops, found.permutes)
    return found


def split(text: str) -> tuple[dict[str, list[Op]], str]:
    """Computations by name, in the order of their schedule, and the name of the one that is run first."""
    computations: dict[str, list[Op]] = {}
    entry, ops = "", None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            words = line.replace("(", " (").split()
            name = words[1 if words[0] == "ENTRY" else 0].lstrip("%")
            ops = computations.setdefault(name, [])
            entry = name if words[0] == "ENTRY" else entry
        elif ops is not None and (match := _OP.match(line)):
            ops.append(Op(*match.groups()))
    return computations, entry


def _executions(computations: dict[str, list[Op]], entry: str, found: Program) -> Iterator[tuple[list[Op], int]]:
    """Each computation that is reached, once for each place that calls it, and how often that place runs it."""
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        ops = computations.get(name, [])
        yield ops, times
        for op in ops:
            called = _CALLED.findall(op.rest)
            for branches in _BRANCHES.findall(op.rest):
                called += _NAME.findall(branches)
            if op.kind == "while":
                trips = trip_count(computations, ops, op)
                found.unread += trips is None
                waiting += [(body, times * (1 if trips is None else trips)) for body in called]
            elif op.kind.removesuffix("-start") not in KINDS:  # whose computation only adds two numbers
                waiting += [(callee, times) for callee in called]


def trip_count(computations: Mapping[str, list[Op]], ops: list[Op], loop: Op) -> int | None:
    """How often a loop runs, if its condition compares a counter with a constant."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", loop.rest):
        return int(known[1])
    named = lambda part: re.search(rf"{part}=%?([\w.\-]+)", loop.rest)
    condition = {op.name: op for op in computations.get(named("condition")[1], [])}
    compare = next((op for op in condition.values() if op.kind == "compare"), None)
    if compare is None or "direction=LT" not in compare.rest:
        return None
    counter, limit = (condition[name] for name in compare.operands[:2])
    place = re.search(r"index=(\d+)", counter.rest)
    end = _constant(limit)
    if place is None or end is None:
        return None
    index = int(place[1])
    before, body = {op.name: op for op in ops}, {op.name: op for op in computations.get(named("body")[1], [])}
    start = _element(before, loop.operands[0], index)
    root = next((op for op in reversed(list(body.values())) if op.kind == "tuple"), None)
    after = _element(body, root.name, index) if root is not None else None
    begin = 0 if start is None else _constant(_origin(before, start)) or 0
    step = 1
    if after is not None and after.kind == "add":
        step = next((value for name in after.operands if (value := _constant(body.get(name)))), 1)
    return max(0, -(-(end - begin) // step))


def _element(ops: Mapping[str, Op], name: str, index: int) -> Op | None:
    """What a tuple holds at a place."""
    made = ops.get(name)
    if made is None or made.kind != "tuple" or index >= len(made.operands):
        return None
    return ops.get(made.operands[index])


def _origin(ops: Mapping[str, Op], op: Op) -> Op:
    """What a copy is a copy of."""
    while op.kind in ("copy", "bitcast") and op.operands and op.operands[0] in ops:
        op = ops[op.operands[0]]
    return op


def _constant(op: Op | None) -> int | None:
    if op is None or op.kind != "constant":
        return None
    number = re.match(r"(-?\d+)\)", op.rest)
    return int(number[1]) if number else None


def sent(op: Op, kind: str) -> float:
    """Bytes that a device sends in one execution, around a ring of the group."""
    sizes = [size for size in _sizes(op.type) if size]
    if op.kind == "collective-permute-start":
        return sizes[0]
    if kind == "collective-permute":
        return sum(sizes)
    n = group_size(op.rest)
    # the result of a started gather stands beside its operand; started reductions give their result alone
    whole = sum(sizes) * (n / (n + 1) if op.kind == "all-gather-start" else 1)
    share = (n - 1) / n
    return {
        "all-gather": share * whole,
        "reduce-scatter": share * whole * n,
        "all-reduce": 2 * share * whole,
        "all-to-all": share * whole,
    }[kind]


def group_size(rest: str) -> int:
    """Devices that take part together: `{{0,1},...}`, `[groups,size]<=[...]` or `mesh['x'=4,'y'=2] {'y'}`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])  # 'y':(1)4 is a part of an axis, of size 4
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return 1


def _sizes(type_: str) -> list[float]:
    """Bytes of each array in a type; scalars of an asynchronous call's bookkeeping are none."""
    found = []
    for dtype, dims, boolean, more in _ARRAY.findall(type_):
        dims = dims or more
        if not dims and "(" in type_[:1]:
            continue
        found.append(WIDTHS[boolean or dtype] * math.prod(int(n) for n in dims.split(",") if n))
    return found


def _schedule(ops: list[Op], permutes: Permutes) -> None:
    """Counts the permutes of one computation by what stands between their start and their end."""
    started: dict[str, int] = {}
    for place, op in enumerate(ops):
        if op.kind == "collective-permute":
            permutes.synchronous += 1
        elif op.kind == "collective-permute-start":
            started[op.name] = place
        elif op.kind == "collective-permute-done":
            first = started.pop(op.operands[0], place)
            permutes.asynchronous += 1
            permutes.hidden += any(between.kind in HEAVY for between in ops[first + 1 : place])
