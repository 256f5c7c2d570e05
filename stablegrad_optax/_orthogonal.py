"""Orthonormal bases of stacks of small matrices, without batched LAPACK on a CPU.

XLA for a CPU runs a batched LAPACK call on its thread pool, and the call waits for
other work of that pool. With many such calls in one program, or one in each of two
threads, every worker waits and none works.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

Precision = Any  # what jax.numpy.matmul takes: a string, jax.lax.Precision or None

# Columns that are orthogonalized one by one. More columns are taken in blocks of this
# size, whose products with earlier blocks are matrix products.
BLOCK_SIZE = 32


# Under vmap, too, each call decomposes a single matrix.
_single_eigenvectors = sequential_vmap(lambda matrix: jnp.linalg.eigh(matrix)[1])


def eigenvectors(matrices: jax.Array) -> jax.Array:
    """The eigenvectors of each Hermitian f[k, n, n], largest eigenvalue first."""
    columns = lax.platform_dependent(
        matrices,
        cpu=lambda stack: lax.map(_single_eigenvectors, stack),
        default=lambda stack: jnp.linalg.eigh(stack)[1],
    )
    return columns[..., ::-1]


def orthonormal_columns(matrices: jax.Array, precision: Precision) -> jax.Array:
    """The factor Q of a QR decomposition of each f[k, n, n], up to signs.

    A CPU runs block Gram-Schmidt, every projection twice: for small matrices, and for
    many of them, it is faster there than one LAPACK call per matrix. It needs matrices
    that are not numerically singular.
    """
    return lax.platform_dependent(
        matrices,
        cpu=lambda stack: gram_schmidt(stack, precision),
        default=lambda stack: jnp.linalg.qr(stack)[0],
    )


def gram_schmidt(matrices: jax.Array, precision: Precision) -> jax.Array:
    """Block Gram-Schmidt with reorthogonalization, f[k, n, n]."""
    size = matrices.shape[-1]
    if size <= BLOCK_SIZE:
        return _gram_schmidt_by_column(matrices, precision)

    def add_block(i: jax.Array, bases: jax.Array) -> jax.Array:
        # The last block may overlap the one before: it orthogonalizes those again.
        start = jnp.minimum(i * BLOCK_SIZE, size - BLOCK_SIZE)
        block = lax.dynamic_slice_in_dim(bases, start, BLOCK_SIZE, 2)
        for _ in range(2):
            block = _remove(block, bases, start, precision)
            block = _gram_schmidt_by_column(block, precision)
        return lax.dynamic_update_slice_in_dim(bases, block, start, 2)

    return lax.fori_loop(0, -(-size // BLOCK_SIZE), add_block, matrices)


def _gram_schmidt_by_column(columns: jax.Array, precision: Precision) -> jax.Array:
    def add_column(i: jax.Array, bases: jax.Array) -> jax.Array:
        column = lax.dynamic_slice_in_dim(bases, i, 1, 2)
        for _ in range(2):
            column = _remove(column, bases, i, precision)
        norm = jnp.linalg.norm(column, axis=1, keepdims=True)
        column = column / jnp.where(norm > 0, norm, 1).astype(column.dtype)
        return lax.dynamic_update_slice_in_dim(bases, column, i, 2)

    return lax.fori_loop(0, columns.shape[-1], add_column, columns)


def _remove(
    block: jax.Array, bases: jax.Array, count: jax.Array, precision: Precision
) -> jax.Array:
    """The block without its components along the first ``count`` columns."""
    is_earlier = (jnp.arange(bases.shape[-1]) < count).astype(bases.dtype)
    components = jnp.einsum("kia,kib->kab", bases.conj(), block, precision=precision)
    components = components * is_earlier[None, :, None]
    return block - jnp.einsum("kia,kab->kib", bases, components, precision=precision)
