"""What a compiled step consists of: memory, kernels, collectives, time to compile."""

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.overhead import trees
from benchmarks.overhead.arms import Arm

# Instructions of a program that cost nothing when it runs.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_INSTRUCTION = re.compile(r" = (?:\([^=]*?\)|\S+) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


class State(NamedTuple):
    """Of the two parts of an arm; Adam's moments can be lent to another arm."""

    before: optax.OptState
    optimizer: optax.OptState


def step_of(arm: Arm) -> Any:
    """A jitted step ``(grads, state, params) -> (state, params)``, buffers donated.

    The results stand in the order of the donated arguments: XLA aliases buffers of a
    shape in that order, and copies moments and parameters where they are swapped.
    """
    before, optimizer = arm.parts()

    def step(
        grads: trees.Tree, state: State, params: trees.Tree
    ) -> tuple[State, trees.Tree]:
        updates, first = before.update(grads, state.before, params)
        updates, second = optimizer.update(updates, state.optimizer, params)
        return State(first, second), optax.apply_updates(params, updates)

    return jax.jit(step, donate_argnums=(1, 2))


def abstract_state(arm: Arm, tree: trees.Tree) -> State:
    before, optimizer = arm.parts()
    return State(
        jax.eval_shape(before.init, tree), jax.eval_shape(optimizer.init, tree)
    )


def compile_step(arm: Arm, tree: trees.Tree) -> jax.stages.Compiled:
    """For a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return step_of(arm).lower(tree, abstract_state(arm, tree), tree).compile()


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What the program needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


class Kernels(NamedTuple):
    """Instructions that cost something, the branches of conditionals apart."""

    always: int
    branches: int


def kernels(compiled: jax.stages.Compiled) -> Kernels:
    """How many kernels the program launches, copies and collectives included."""
    counts, computation, called, entry = {}, "", set(), ""
    for line in compiled.as_text().splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[2]
            counts[computation] = 0
            entry = computation if head[1] else entry
        elif (found := _INSTRUCTION.search(line)) and computation:
            counts[computation] += found[1] not in _FREE
            called.update(_CALLED.findall(line))
    always = counts.pop(entry)
    return Kernels(always, sum(n for name, n in counts.items() if name not in called))


def kernels_per_leaf(
    arm: Arm, width: int, *, first: int = 10, second: int = 20
) -> Kernels:
    """The kernels that one more leaf of so many rows and columns adds."""

    def count(num_leaves: int) -> Kernels:
        shapes = trees.equal(num_leaves, (width, width))
        return kernels(compile_step(arm, trees.abstract(shapes, jnp.dtype("float32"))))

    few, many, leaves = count(first), count(second), second - first
    return Kernels(*((b - a) / leaves for a, b in zip(few, many, strict=True)))


class CompileTime(NamedTuple):
    """Seconds of the processor."""

    trace: float
    compile: float


def compile_time(arm: Arm, num_leaves: int) -> CompileTime:
    """Of a step for equal leaves, from the function to the executable."""
    tree = trees.abstract(trees.equal(num_leaves), jnp.dtype("float32"))
    state = abstract_state(arm, tree)
    jax.clear_caches()
    begin = time.process_time()
    lowered = step_of(arm).lower(tree, state, tree)
    traced = time.process_time()
    lowered.compile()
    return CompileTime(traced - begin, time.process_time() - traced)


def all_reduces(arm: Arm, num_leaves: int, width: int = 256) -> Kernels:
    """Collectives of a step for square leaves that are sharded over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("shards",))
    sharding = NamedSharding(mesh, PartitionSpec("shards"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = sharding if leaf.ndim == 2 else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    shapes = trees.equal(num_leaves, (width, width))
    tree = trees.abstract(shapes, jnp.dtype("float32"))
    tree, state = jax.tree.map(place, (tree, abstract_state(arm, tree)))
    text = step_of(arm).lower(tree, state, tree).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    in_entry, everything = (
        len(re.findall(r" all-reduce(?:-start)?\(", part)) for part in (entry, text)
    )
    return Kernels(in_entry, everything - in_entry)
