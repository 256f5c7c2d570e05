"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner, as optax has it not."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.custom_batching import custom_vmap


class Side(NamedTuple):
    """Of the rows or of the columns of a matrix of gradients."""

    covariance: jax.Array  # f[n, n], running mean of G G^T, or of G^T G
    basis: jax.Array  # f[n, n], its eigenvectors as columns, the largest first


class Moments(NamedTuple):
    """Of one leaf; of a matrix, if it has two axes or more."""

    mean: jax.Array  # of the gradient
    square: jax.Array  # of the gradient's squares in the basis
    sides: tuple[Side, ...]  # rows and columns; none where the leaf is no matrix


class SoapState(NamedTuple):
    count: jax.Array  # i32[], updates seen
    leaves: list[Moments]


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    frequency: int = 10,
) -> optax.GradientTransformation:
    """SOAP.

    Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321
    (2024), Algorithm 3, with what their released code adds: the first gradient only
    gives the bases, the columns are sorted before a QR step, and Adam's bias
    correction. For a matrix of gradients G, with Q_L and Q_R the bases::

        M <- b1 M + (1 - b1) G
        V <- b2 V + (1 - b2) (Q_L^T G Q_R)^2
        update = -rate Q_L [(Q_L^T M Q_R) / (sqrt(V) + eps)] Q_R^T
        L <- b2 L + (1 - b2) G G^T,   R <- b2 R + (1 - b2) G^T G

    and after every `frequency` updates Q_L <- QR(L Q_L), Q_R <- QR(R Q_R), one step of
    orthogonal iteration. Leaves of one axis or none have Adam, of the same constants. A
    leaf of more axes is the matrix of all of them but the last. There is no decay, no
    limit of the matrices' size; all is in the leaf's dtype.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of M.
        b2: decay of V, L and R.
        eps: beside sqrt(V).
        frequency: updates between two QR steps.
    """
    return optax.chain(
        _scale_by_soap(b1, b2, eps, frequency),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_soap(
    b1: float, b2: float, eps: float, frequency: int
) -> optax.GradientTransformation:
    def init(params: optax.Params) -> SoapState:
        leaves = [_start(_matrix(leaf)) for leaf in jax.tree.leaves(params)]
        return SoapState(jnp.zeros((), jnp.int32), leaves)

    def update(
        updates: optax.Updates, state: SoapState, params: Any = None
    ) -> tuple[optax.Updates, SoapState]:
        del params
        grads, treedef = jax.tree.flatten(updates)
        steps, leaves = [], []
        for grad, moments in zip(grads, state.leaves, strict=True):
            step, moments = _adam(_matrix(grad), moments, state.count, b1, b2, eps)
            steps.append(step.reshape(grad.shape).astype(grad.dtype))
            leaves.append(moments)
        leaves = _eigenbases(state.count == 0, leaves)
        is_due = (state.count > 0) & (state.count % frequency == 0)
        leaves = _iterated(is_due, leaves)
        return treedef.unflatten(steps), SoapState(state.count + 1, leaves)

    return optax.GradientTransformation(init, update)


def _matrix(leaf: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.reshape(-1, leaf.shape[-1]) if leaf.ndim > 1 else leaf


def _start(leaf: jax.Array) -> Moments:
    sizes = leaf.shape if leaf.ndim == 2 else ()
    sides = tuple(
        Side(jnp.zeros((n, n), leaf.dtype), jnp.eye(n, dtype=leaf.dtype)) for n in sizes
    )
    return Moments(jnp.zeros_like(leaf), jnp.zeros_like(leaf), sides)


def _adam(
    grad: jax.Array,
    old: Moments,
    count: jax.Array,
    b1: float,
    b2: float,
    eps: float,
) -> tuple[jax.Array, Moments]:
    """The step, before the rate, and the moments; the first one takes none."""
    is_first = count == 0
    mean = jnp.where(is_first, old.mean, b1 * old.mean + (1 - b1) * grad)
    rotated = _rotate(grad, old.sides)
    square = b2 * old.square + (1 - b2) * rotated**2
    square = jnp.where(is_first, old.square, square)
    number = jnp.maximum(count, 1)  # of the steps taken, this one among them
    mean_hat = _rotate(mean, old.sides) / (1 - b1**number)
    square_hat = square / (1 - b2**number)
    step = _rotate(mean_hat / (jnp.sqrt(square_hat) + eps), old.sides, back=True)
    grams = (grad @ grad.T, grad.T @ grad) if old.sides else ()
    sides = tuple(
        side._replace(covariance=b2 * side.covariance + (1 - b2) * gram)
        for side, gram in zip(old.sides, grams, strict=True)
    )
    return step, Moments(mean, square, sides)


def _rotate(
    matrix: jax.Array, sides: tuple[Side, ...], *, back: bool = False
) -> jax.Array:
    """Into the basis, or back; what has no sides stays."""
    if not sides:
        return matrix
    left, right = (side.basis for side in sides)
    return left @ matrix @ right.T if back else left.T @ matrix @ right


def _when_due(change: Callable[[Moments], Moments]) -> Callable:
    """(is_due, leaves) -> the leaves, changed if it is due.

    A batch of runs that are all at the same step decides once: `vmap` of a `cond` would
    compute the decompositions at every step.
    """

    @custom_vmap
    def run(is_due: jax.Array, leaves: list[Moments]) -> list[Moments]:
        return lax.cond(is_due, partial(map_leaves, change), lambda old: old, leaves)

    def map_leaves(of_leaf: Callable, leaves: list[Moments]) -> list[Moments]:
        return [of_leaf(moments) for moments in leaves]

    @run.def_vmap
    def run_batch(size: int, is_batched: Any, is_due: jax.Array, leaves: Any) -> Any:
        is_due, leaves = jax.tree.map(
            lambda x, b: x if b else jnp.broadcast_to(x, (size, *jnp.shape(x))),
            (is_due, leaves),
            tuple(is_batched),
        )

        def changed(leaves: list[Moments]) -> list[Moments]:
            each = jax.vmap(lambda due, new, old: _select(due, new, old))
            return each(is_due, map_leaves(jax.vmap(change), leaves), leaves)

        result = lax.cond(is_due.any(), changed, lambda old: old, leaves)
        return result, jax.tree.map(lambda _: True, result)

    return run


def _select(which: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(partial(jnp.where, which), new, old)


def _first_basis(moments: Moments) -> Moments:
    """The eigenvectors of the covariances."""
    sides = (
        side._replace(basis=jnp.linalg.eigh(side.covariance)[1][:, ::-1])
        for side in moments.sides
    )
    return moments._replace(sides=tuple(sides))


def _next_basis(moments: Moments) -> Moments:
    """A step of orthogonal iteration from the columns, sorted; V moves with them."""
    square, sides = moments.square, []
    for axis, (covariance, basis) in enumerate(moments.sides):
        order = jnp.argsort(-jnp.sum(basis * (covariance @ basis), axis=0))
        square = jnp.take(square, order, axis=axis)
        basis = jnp.linalg.qr(covariance @ basis[:, order])[0]
        sides.append(Side(covariance, basis))
    return Moments(moments.mean, square, tuple(sides))


_eigenbases = _when_due(_first_basis)
_iterated = _when_due(_next_basis)
