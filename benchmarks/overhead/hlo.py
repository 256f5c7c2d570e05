"""Reads the text of an optimized HLO module: computations, instructions, sizes."""

import math
import re
from functools import cached_property
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" *([a-z][\w\-]*)(?=\()")
_PARENTHESIS = re.compile(r"[()]")
_NAME = re.compile(r"%([\w.\-]+)")
# f32[8,128]{1,0:T(8,128)S(1)}: type, shape, order of dimensions from the fastest on,
# the tile to whose multiples they are padded, the memory.
_ARRAY = re.compile(
    r"\b(?P<type>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]"
    r"(?:\{(?P<order>[\d,]*)(?::(?:T\((?P<tile>[\d,]+)\))?(?P<rest>[^}]*))?\})?"
)
_ON_CHIP = re.compile(r"S\([1-9]")


class Array(NamedTuple):
    """One array of a type.

    Attributes:
        num_bytes: with the padding to whole tiles.
        on_chip: whether it lies in VMEM or SMEM of a TPU; reading it costs no HBM.
    """

    num_bytes: int
    on_chip: bool


def arrays(shape: str) -> list[Array]:
    """The arrays of a type, those of a tuple in their order."""
    return [_array(match) for match in _ARRAY.finditer(shape)]


def _array(found: re.Match[str]) -> Array:
    sizes = _numbers(found["shape"])
    # A tile covers the fastest dimensions; its first size is of the slowest of them.
    fastest = _numbers(found["order"])
    for dimension, tile in zip(fastest, _numbers(found["tile"])[::-1], strict=False):
        sizes[dimension] = math.ceil(sizes[dimension] / tile) * tile
    bits = 8 if found["type"] == "pred" else int(found["bits"])
    return Array(
        math.ceil(math.prod(sizes) * bits / 8),
        bool(_ON_CHIP.search(found["rest"] or "")),
    )


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names in the same computation
    attributes: str

    def called(self, *attributes: str) -> list[str]:
        """The computations that these attributes name."""
        pattern = rf"\b(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%?[\w.\-]+)"
        found = re.findall(pattern, self.attributes)
        return [name.strip(" %{}") for text in found for name in text.split(",")]


class Computation:
    """Instructions in their order, by name.

    Attributes:
        root: whose value is the result.
    """

    def __init__(self) -> None:
        self.instructions: dict[str, Instruction] = {}
        self.root = ""

    @cached_property
    def parameters(self) -> list[str]:
        """Their names, in the order of the operands of who calls it."""
        numbered = [
            (int(instruction.operands[0]), instruction.name)
            for instruction in self.instructions.values()
            if instruction.opcode == "parameter"
        ]
        return [name for _, name in sorted(numbered)]

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Name -> who takes it, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for place, operand in enumerate(instruction.operands):
                users.setdefault(operand, []).append((instruction, place))
        return users


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parses the text of `jax.stages.Compiled.as_text`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if head := _COMPUTATION.match(line):
                current = computations[head[2]] = Computation()
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif head := _INSTRUCTION.match(line):
            instruction = _instruction(head[2], line[head.end() :])
            current.instructions[instruction.name] = instruction
            if head[1]:
                current.root = instruction.name
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"no instruction of HLO: {name} = {text[:80]}")
    close = _closing(text, opcode.end())
    inside = text[opcode.end() + 1 : close - 1]
    # A parameter has its number there, a constant its value.
    operands = _NAME.findall(inside) or [inside]
    return Instruction(name, text[:end], opcode[1], tuple(operands), text[close:])


def _closing(text: str, start: int) -> int:
    """Returns the place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"a parenthesis is not closed: {text[start : start + 80]}")
