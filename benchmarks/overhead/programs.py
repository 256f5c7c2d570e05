"""Memory, kernels, collectives and time to compile of a step."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from benchmarks.overhead import costs, trees
from benchmarks.overhead.optimizers import Chain


class State(NamedTuple):
    """The states of both parts of a chain; Adam's moments can be lent to another."""

    before: optax.OptState
    optimizer: optax.OptState


def step_of(chain: Chain) -> Any:
    """A jitted step ``(grads, state, params) -> (state, params)``, buffers donated.

    The results stand in the order of the donated arguments: XLA aliases buffers of a
    shape in that order, and copies moments and parameters where they are swapped.
    """
    before, optimizer = chain.parts()

    def step(
        grads: trees.Tree, state: State, params: trees.Tree
    ) -> tuple[State, trees.Tree]:
        updates, first = before.update(grads, state.before, params)
        updates, second = optimizer.update(updates, state.optimizer, params)
        return State(first, second), optax.apply_updates(params, updates)

    return jax.jit(step, donate_argnums=(1, 2))


def abstract_state(chain: Chain, tree: trees.Tree) -> State:
    before, optimizer = chain.parts()
    return State(
        jax.eval_shape(before.init, tree), jax.eval_shape(optimizer.init, tree)
    )


def compile_step(chain: Chain, tree: trees.Tree) -> jax.stages.Compiled:
    """Compiles a step for a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return lower(chain, tree).compile()


def lower(
    chain: Chain,
    tree: trees.Tree,
    sharding_of: Callable[[jax.ShapeDtypeStruct], Sharding | None] = lambda leaf: None,
) -> jax.stages.Lowered:
    """The step, traced.

    Args:
        chain: what takes the step.
        tree: gradients and parameters, of arrays or of `jax.ShapeDtypeStruct`.
        sharding_of: where a leaf of the tree or of a state of its shape lies.
    """

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf))

    tree, state = jax.tree.map(place, (tree, abstract_state(chain, tree)))
    return step_of(chain).lower(tree, state, tree)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that the program needs in addition to arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


class Kernels(NamedTuple):
    """Instructions of a kind, those in the branches of conditionals apart."""

    always: int
    branches: int


def kernels(compiled: jax.stages.Compiled) -> Kernels:
    """How many kernels the program launches, copies and collectives included."""
    program = costs.count(compiled.as_text())
    return Kernels(program.always.kernels, program.branches.kernels)


def kernels_per_leaf(
    chain: Chain, width: int, *, first: int = 10, second: int = 20
) -> Kernels:
    """The kernels that one more leaf of so many rows and columns adds."""

    def count(num_leaves: int) -> Kernels:
        shapes = trees.equal(num_leaves, (width, width))
        return kernels(
            compile_step(chain, trees.abstract(shapes, jnp.dtype("float32")))
        )

    few, many, leaves = count(first), count(second), second - first
    return Kernels(*((b - a) / leaves for a, b in zip(few, many, strict=True)))


class CompileTime(NamedTuple):
    """Seconds of the processor."""

    trace: float
    compile: float


def compile_time(chain: Chain, num_leaves: int) -> CompileTime:
    """Times a step for equal arrays, from the function to the executable."""
    tree = trees.abstract(trees.equal(num_leaves), jnp.dtype("float32"))
    _, times = timed_compilation(lambda: lower(chain, tree))
    return times


def timed_compilation(
    trace: Callable[[], jax.stages.Lowered],
) -> tuple[jax.stages.Compiled, CompileTime]:
    """Traces and compiles, with empty caches."""
    jax.clear_caches()
    begin = time.process_time()
    lowered = trace()
    traced = time.process_time()
    compiled = lowered.compile()
    done = time.process_time()
    return compiled, CompileTime(traced - begin, done - traced)


def sharded_over(mesh: Mesh) -> Callable[[jax.ShapeDtypeStruct], NamedSharding]:
    """Leaves are cut along their last dimensions, one an axis of the mesh.

    Vectors, and leaves that the mesh does not divide, lie on every device.
    """
    axes = tuple(mesh.shape)

    def sharding_of(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        cut = leaf.shape[-len(axes) :]
        whole = any(n % mesh.shape[axis] for n, axis in zip(cut, axes, strict=False))
        if leaf.ndim < 2 or whole:
            return NamedSharding(mesh, PartitionSpec())
        spec = PartitionSpec(*[None] * (leaf.ndim - len(axes)), *axes)
        return NamedSharding(mesh, spec)

    return sharding_of


def all_reduces(chain: Chain, num_leaves: int, width: int = 256) -> Kernels:
    """Collectives of a step for square leaves that are sharded over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("shards",))
    shapes = trees.equal(num_leaves, (width, width))
    tree = trees.abstract(shapes, jnp.dtype("float32"))
    program = costs.count(lower(chain, tree, sharded_over(mesh)).compile().as_text())
    return Kernels(program.always.all_reduces, program.branches.all_reduces)
