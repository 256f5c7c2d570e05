"""Reference solutions computed here, in float64, and those read from a file."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.integrate
import scipy.io

BURGERS_VISCOSITY = 0.01 / np.pi
ALLEN_CAHN_DIFFUSION = 1e-4


class ReferenceFile(NamedTuple):
    """A solution on the tensor grid of two axes."""

    x: np.ndarray  # f[nx]
    t: np.ndarray  # f[nt]
    values: np.ndarray  # f[nx, nt]


def cole_hopf(
    x: np.ndarray,
    t: np.ndarray,
    *,
    viscosity: float = BURGERS_VISCOSITY,
    spacing: float = 0.1,
) -> np.ndarray:
    """Burgers' equation u_t + u u_x = nu u_xx from u(x, 0) = -sin(pi x), exactly.

    With eta = x - z sqrt(4 nu t) the transform of Cole and Hopf gives::

        u(x, t) = - int sin(pi eta) w(z) dz / int w(z) dz,
        w(z) = exp(-cos(pi eta) / (2 pi nu) - z^2)

    Both integrands are entire and decay like a Gaussian, so the trapezoidal rule
    converges faster than any power of its spacing. The first exponent varies by
    1 / (pi nu), so beyond |z| = sqrt(1 / (pi nu) + 50) a weight is below exp(-50) of
    the largest. u(+-1, t) = 0 holds by symmetry.

    Source: Basdevant et al., "Spectral and finite difference solutions of the Burgers
    equation", Computers & Fluids 14 (1986).

    Args:
        x: f[nx].
        t: f[nt], at least 0.
        viscosity: nu.
        spacing: of the quadrature nodes z.

    Returns:
        f64[nx, nt].
    """
    reach = np.sqrt(1 / (np.pi * viscosity) + 50)
    z = np.arange(-reach, reach + spacing, spacing)
    solution = np.empty((len(x), len(t)))
    for column, time in enumerate(t):  # one time at once keeps the memory at nx * nz
        eta = np.asarray(x)[:, None] - z * np.sqrt(4 * viscosity * time)
        exponent = -np.cos(np.pi * eta) / (2 * np.pi * viscosity) - z**2
        weight = np.exp(exponent - exponent.max(axis=1, keepdims=True))
        solution[:, column] = -(np.sin(np.pi * eta) * weight).sum(1) / weight.sum(1)
    return solution


def allen_cahn(
    x: np.ndarray, t: np.ndarray, *, modes: int = 512, tolerance: float = 1e-9
) -> np.ndarray:
    """Allen-Cahn u_t = 0.0001 u_xx + 5 (u - u^3), period 2, u(x, 0) = x^2 cos(pi x).

    Fourier collocation on `modes` points of [-1, 1), integrated in time by the
    eighth-order Runge-Kutta method of Dormand and Prince: with so small a diffusion
    the stiffest mode decays at a rate of 65, so no implicit method is needed. The
    series is then summed at x.

    Args:
        x: f[nx].
        t: f[nt], increasing, from 0 on.
        modes: number of collocation points, even.
        tolerance: relative and absolute, of each time step.

    Returns:
        f64[nx, nt].
    """
    nodes = -1 + 2 * np.arange(modes) / modes
    wavenumber = np.pi * np.arange(modes // 2 + 1)
    decay = -ALLEN_CAHN_DIFFUSION * wavenumber**2

    def rate(_: float, u: np.ndarray) -> np.ndarray:
        return np.fft.irfft(decay * np.fft.rfft(u), modes) + 5 * (u - u**3)

    path = scipy.integrate.solve_ivp(
        rate,
        (0.0, float(t[-1])),
        nodes**2 * np.cos(np.pi * nodes),
        method="DOP853",
        t_eval=t,
        rtol=tolerance,
        atol=tolerance,
    )
    # Each mode but the first and the last stands for its conjugate as well.
    share = np.full(len(wavenumber), 2.0)
    share[[0, -1]] = 1.0
    coefficients = share[:, None] * np.fft.rfft(path.y, axis=0) / modes
    phases = np.exp(1j * np.outer(np.asarray(x) + 1, wavenumber))
    return (phases @ coefficients).real


def read_burgers(path: Path) -> ReferenceFile:
    """Read `x`, `t` and `usol` [x, t] of a MATLAB file such as burgers_shock.mat.

    Raises:
        ValueError: in one line, if the file is not there or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = scipy.io.loadmat(path)
        x, t, values = (np.asarray(content[k], float) for k in ("x", "t", "usol"))
        x, t = x.ravel(), t.ravel()
    except Exception as error:  # loadmat has no common class for what it raises
        raise ValueError(
            f"{path} is not a MATLAB file with the arrays x, t and usol ({error})"
        ) from None
    if values.shape != (len(x), len(t)):
        raise ValueError(
            f"{path}: usol must have the shape (x, t) = {(len(x), len(t))}, "
            f"got {values.shape}"
        )
    if not all(np.isfinite(array).all() for array in (x, t, values)):
        raise ValueError(f"{path}: x, t and usol must be finite numbers")
    return ReferenceFile(x, t, values)
