"""What a GPU launches for a compiled program, read from the program's text alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# They name memory that is there already, or only order what is around them.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("after-all", "add-dependency", "opt-barrier", "domain"),
)
_HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([^\s,(){}]+)")
_CALLED = re.compile(r"\b(to_apply|calls|body|condition|\w+_computations?)=(\{[^}]*\}|[^\s,]+)")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Kernel(NamedTuple):
    """An instruction that launches something."""

    kind: str  # "fusion", "custom-call", "copy", "all-reduce", ...
    nbytes: int  # of operands and results
    times: int  # in a run of the program


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    operands: list[str]
    attributes: str


_Computation = dict[str, _Instruction]


def launches(text: str) -> list[Kernel]:
    """The kernels that a run of a program launches, in the order of the text.

    What is in a loop has the number of its rounds, or 1 where this is not known before; then the
    loop's condition is launched too. Of the branches of a conditional, the one counts that launches
    most. A library's call and a collective are one each, however many kernels they are. Bytes are
    the sizes of operands and results, also where a part of an operand is read, or written in place.

    Args:
      text: a scheduled module of XLA, as `as_text()` of what `jax.jit(...).lower(...).compile()`
        gives.

    Raises:
      ValueError: it has no entry, or calls what it does not hold.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("the text is no program of XLA: it has no ENTRY")
    try:
        return list(_of_computation(entry, computations, times=1))
    except KeyError as error:
        raise ValueError(f"the text is no whole program of XLA: it lacks {error}") from error


def count(launched: Iterable[Kernel]) -> dict[str, int]:
    """How many launches there are of each kind, the most frequent first."""
    found: Counter[str] = Counter()
    for kernel in launched:
        found[kernel.kind] += kernel.times
    return dict(found.most_common())


def moved(launched: Iterable[Kernel]) -> int:
    """Bytes of all launches."""
    return sum(kernel.times * kernel.nbytes for kernel in launched)


def size(shape: str) -> int:
    """Bytes of an array or a tuple of them; tokens have none.

    Args:
      shape: as XLA writes it, `f32[3,3,64]{2,1,0}` or `(bf16[8]{0}, (pred[], s4[3]))`.
    """
    total = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or ["0"])[0])
        elements = math.prod(int(n) for n in dimensions.split(",") if n)
        total += -(-elements * bits // 8)
    return total


def _of_computation(
    name: str, computations: Mapping[str, _Computation], *, times: int
) -> Iterator[Kernel]:
    within = computations[name]
    for instruction in within.values():
        shape, opcode, operands, attributes = instruction
        called = _called(attributes)
        kind = opcode.removesuffix("-start")
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            continue
        if kind in ("call", "async"):
            for callee in called.get("to_apply", []) + called.get("calls", []):
                yield from _of_computation(callee, computations, times=times)
        elif kind == "while":
            if rounds := _ROUNDS.search(attributes):
                times_of_body = times * int(rounds[1])
            else:
                times_of_body = times
                yield from _of_computation(called["condition"][0], computations, times=times)
            yield from _of_computation(called["body"][0], computations, times=times_of_body)
        elif kind == "conditional":
            names = [n for key in called if key.endswith(_BRANCHES) for n in called[key]]
            branches = [
                list(_of_computation(branch, computations, times=times)) for branch in names
            ]
            yield from max(branches, key=len, default=[])
        else:
            nbytes = size(shape)
            # What begins a transfer hands its operands on as part of its result.
            if opcode == kind or kind == "all-reduce":
                nbytes += sum(size(within[operand].shape) for operand in dict.fromkeys(operands))
            yield Kernel(kind, nbytes, times)


_BRANCHES = ("true_computation", "false_computation", "branch_computations")


def _called(attributes: str) -> dict[str, list[str]]:
    return {key: _NAME.findall(names) for key, names in _CALLED.findall(attributes)}


def _parse(text: str) -> tuple[dict[str, _Computation], str | None]:
    """The instructions of each computation, by name, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry, current = None, {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = _instruction(found[2])
    return computations, entry


def _instruction(text: str) -> _Instruction:
    """Of what follows the name, `f32[8]{0} fusion(%a, %b), kind=kLoop, calls=%c`."""
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opened = rest.index("(")
    closed = _closed(rest, opened)
    return _Instruction(shape, rest[:opened], _NAME.findall(rest[opened:closed]), rest[closed:])


def _closed(text: str, opened: int) -> int:
    """The place behind the parenthesis that closes the one at `opened`."""
    depth = 0
    for place in range(opened, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"the text is no whole program of XLA: an open parenthesis in {text[:60]!r}")
