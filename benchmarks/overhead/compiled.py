"""Measures what the compiler of a TPU or a GPU makes of one step."""

from typing import Any

import jax

from benchmarks.overhead import costs, programs, trees
from benchmarks.overhead.compilers import Compiler
from benchmarks.overhead.optimizers import Chain


def measure(compiler: Compiler, chain: Chain, tree: trees.Tree) -> dict[str, Any]:
    """Returns costs of the step on one device, and its collectives on a mesh.

    Returns:
        The numbers, or the compiler's message under "error".
    """
    about = {"compiler": compiler.version, "gradient_bytes": _num_bytes(tree)}
    try:
        return (
            about
            | _on_one_device(compiler, chain, tree)
            | _on_mesh(compiler, chain, tree)
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return about | {"error": str(error).split("\n")[0]}


def _on_one_device(
    compiler: Compiler, chain: Chain, tree: trees.Tree
) -> dict[str, Any]:
    def trace() -> jax.stages.Lowered:
        return programs.lower(chain, tree, lambda leaf: compiler.device)

    # Where it takes a second or two the quickest of three counts: others load what the
    # compiler needs, or meet a busy moment.
    few = len(jax.tree.leaves(tree)) <= 100
    repeats = [programs.timed_compilation(trace) for _ in range(3 if few else 1)]
    compiled, times = min(repeats, key=lambda repeat: sum(repeat[1]))
    always, branches = costs.count(compiled.as_text())
    return {
        "bytes": always.num_bytes,
        "branch_bytes": branches.num_bytes,
        "kernels": always.kernels,
        "branch_kernels": branches.kernels,
        "conditionals": always.conditionals + branches.conditionals,
        "temporary_bytes": programs.temporary_bytes(compiled),
        **{name: round(seconds, 3) for name, seconds in times._asdict().items()},
    }


def _on_mesh(compiler: Compiler, chain: Chain, tree: trees.Tree) -> dict[str, Any]:
    if compiler.mesh is None:
        return {}
    lowered = programs.lower(chain, tree, programs.sharded_over(compiler.mesh))
    always, branches = costs.count(lowered.compile().as_text())
    return {
        "all_reduces": always.all_reduces,
        "branch_all_reduces": branches.all_reduces,
        "other_collectives": always.other_collectives + branches.other_collectives,
    }


def _num_bytes(tree: trees.Tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
