"""Counts the costs of an optimized HLO module: bytes, kernels, collectives.

The bytes are those that move to and from the device's main memory (HBM), instruction by
instruction: its operands and its results. A fusion reads an operand once, and only the
slices that it takes of it; an update in place costs the part that is updated; what lies
on a TPU's chip (VMEM, SMEM) costs nothing, and what is fetched there ahead counts once,
in the copy that fetches it. Caches are not modelled.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from benchmarks.overhead import hlo
from benchmarks.overhead.hlo import Computation, Instruction, Module

# Instructions that do nothing when the program runs: names for what is there.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
_FETCHES = {"copy-start", "slice-start", "dynamic-slice-start"}  # beside the kernels
_SLICES = {"slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start"}
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Cost(NamedTuple):
    """The costs of a part of a program."""

    kernels: int = 0  # all instructions that do something, fetches ahead apart
    num_bytes: int = 0
    conditionals: int = 0
    all_reduces: int = 0
    other_collectives: int = 0


class Program(NamedTuple):
    """Costs of a program."""

    always: Cost
    branches: Cost  # of all branches of conditionals, of which one runs


def count(text: str, unknown_rounds: int | None = None) -> Program:
    """Counts an optimized module, the text of `jax.stages.Compiled.as_text`.

    Args:
        text: the module.
        unknown_rounds: how often a loop counts whose length the compiler does not say.

    Raises:
        ValueError: for such a loop, if ``unknown_rounds`` is not given.
    """
    module = hlo.parse(text)
    totals: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    executed = _executed(module, unknown_rounds, module.entry)
    for where, instruction, times, in_branch in executed:
        for name, number in _cost(module, where, instruction)._asdict().items():
            totals[in_branch][name] += times * number
    return Program(Cost(**totals[False]), Cost(**totals[True]))


def _executed(
    module: Module,
    unknown_rounds: int | None,
    name: str,
    times: int = 1,
    in_branch: bool = False,
) -> Iterator[tuple[Computation, Instruction, int, bool]]:
    """Instructions that run, with where they stand, how often, and whether always."""
    executed = partial(_executed, module, unknown_rounds)
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            known = _ROUNDS.search(instruction.attributes)
            rounds = int(known[1]) if known else unknown_rounds
            if rounds is None:
                raise ValueError(f"how often {instruction.name} loops is not known")
            for called in instruction.called("condition", "body"):
                yield from executed(called, times * rounds, in_branch)
        elif instruction.opcode in ("call", "async-start"):
            for called in instruction.called("to_apply", "calls"):
                yield from executed(called, times, in_branch)
        else:
            yield computation, instruction, times, in_branch
            if instruction.opcode == "conditional":
                for called in instruction.called(*_BRANCHES):
                    yield from executed(called, times, True)


def _cost(module: Module, where: Computation, instruction: Instruction) -> Cost:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or _is_view(instruction):
        return Cost()
    if opcode == "conditional":
        return Cost(conditionals=1)
    collective = opcode.removesuffix("-start")
    return Cost(
        kernels=opcode not in _FETCHES,
        num_bytes=_num_bytes(module, where, instruction),
        all_reduces=collective == "all-reduce",
        other_collectives=collective in _COLLECTIVES and collective != "all-reduce",
    )


def _is_view(instruction: Instruction) -> bool:
    """Parts that were fetched side by side, taken as one array."""
    return 'custom_call_target="ConcatBitcast"' in instruction.attributes


def _num_bytes(module: Module, where: Computation, instruction: Instruction) -> int:
    total = _written(module, where, instruction)
    for operand in dict.fromkeys(instruction.operands):
        if operand not in where.instructions:  # the value of a constant
            continue
        sources = hlo.arrays(where.instructions[operand].shape)
        full = sum(array.num_bytes for array in sources if not array.on_chip)
        places = [i for i, name in enumerate(instruction.operands) if name == operand]
        parts = (_read(module, instruction, place, full) for place in places)
        total += min(full, sum(parts)) if full else 0
    return total


def _read(module: Module, user: Instruction, place: int, full: int) -> int:
    """Bytes that an instruction reads of one operand of `full` bytes."""
    if place == 0 and user.opcode in _SLICES:
        return min(full, _result(user))
    if place == 0 and user.opcode == "dynamic-update-slice":
        return 0
    if user.opcode == "fusion":
        (called,) = user.called("calls")
        inside = module.computations[called]
        return _read_of(module, inside, inside.parameters[place], full)
    return full


def _read_of(module: Module, inside: Computation, name: str, full: int) -> int:
    """Returns the bytes that all users of a value within a fusion read."""
    if name == inside.root:
        return full
    total = 0
    for user, place in inside.users.get(name, ()):
        if user.opcode == "bitcast":
            total += _read_of(module, inside, user.name, full)
        else:
            total += _read(module, user, place, full)
    return min(full, total)


def _result(instruction: Instruction) -> int:
    """Bytes of what an instruction makes, wherever it is put."""
    results = hlo.arrays(instruction.shape)
    if instruction.opcode in _FETCHES:
        return results[1].num_bytes
    return sum(array.num_bytes for array in results)


def _written(module: Module, where: Computation, instruction: Instruction) -> int:
    results = hlo.arrays(instruction.shape)
    if instruction.opcode == "copy-start":  # (the result, the source, a semaphore)
        results = results[:1]
    elif instruction.opcode in _FETCHES:  # (the source, the result, a semaphore)
        results = results[1:2]
    elif instruction.opcode == "dynamic-update-slice":
        return _result(where.instructions[instruction.operands[1]])
    full = [0 if array.on_chip else array.num_bytes for array in results]
    if instruction.opcode != "fusion":
        return sum(full)
    (called,) = instruction.called("calls")
    inside = module.computations[called]
    root = inside.instructions[inside.root]
    makers = root.operands if root.opcode == "tuple" else (root.name,)
    if len(makers) != len(full):
        return sum(full)
    updated = (_updated_in_place(inside, name) for name in makers)
    return sum(
        size if part is None else min(size, part)
        for size, part in zip(full, updated, strict=True)
    )


def _updated_in_place(inside: Computation, name: str) -> int | None:
    """Bytes that a fusion changes of an operand; None if it makes the whole result."""
    maker = _behind_bitcasts(inside, name)
    if maker.opcode != "dynamic-update-slice":
        return None
    target, part, *_ = maker.operands
    if _behind_bitcasts(inside, target).opcode != "parameter":
        return None
    return _result(inside.instructions[part])


def _behind_bitcasts(inside: Computation, name: str) -> Instruction:
    instruction = inside.instructions[name]
    while instruction.opcode == "bitcast":
        instruction = inside.instructions[instruction.operands[0]]
    return instruction
