"""SOAP written out in NumPy, one array at a time, as its released code computes it."""

import numpy as np


def rotate(tensor, bases, back=False):
    """Into the bases, one axis after the other, or back; None is no basis."""
    for axis, basis in enumerate(bases):
        if basis is not None:
            matrix = basis if back else basis.conj().T
            tensor = np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)
    return tensor


def unfold(tensor, axis):
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def soap(grads, b1, b2, eps, frequency, max_size=10_000, normalize=False):
    """The updates for a list of gradients of one array, before the learning rate."""
    shape = grads[0].shape
    has_side = [len(shape) > 1 and size <= max_size for size in shape]
    covariances = [
        np.zeros((n, n)) if has else None
        for n, has in zip(shape, has_side, strict=True)
    ]
    bases, updates, steps = None, [], 0
    mean, square = np.zeros(shape), np.zeros(shape)
    for grad in grads:
        if bases is None:
            updates.append(np.zeros(shape))
        else:
            steps += 1
            mean = b1 * mean + (1 - b1) * grad
            square = b2 * square + (1 - b2) * np.abs(rotate(grad, bases)) ** 2
            update = rotate(rotate(mean, bases) / (np.sqrt(square) + eps), bases, True)
            if normalize:
                update = update / (1e-30 + np.sqrt(np.mean(update**2)))
            factor = np.sqrt(1 - b2**steps) / (1 - b1**steps)
            updates.append(-factor * update)
        for axis, has in enumerate(has_side):
            if has:
                matrix = unfold(grad, axis)
                product = matrix @ matrix.conj().T
                covariances[axis] = b2 * covariances[axis] + (1 - b2) * product
        if bases is None:
            bases = [
                c if c is None else np.linalg.eigh(c)[1][:, ::-1] for c in covariances
            ]
        elif steps % frequency == 0:
            for axis, covariance in enumerate(covariances):
                if covariance is not None:
                    basis = bases[axis]
                    variances = np.diag(basis.conj().T @ covariance @ basis).real
                    order = np.argsort(-variances)
                    square = np.take(square, order, axis)
                    bases[axis] = np.linalg.qr(covariance @ basis[:, order])[0]
    return updates
