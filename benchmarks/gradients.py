"""Does my network need this? `gradient_report` on three networks at initialization.

A healthy one, one whose gradients explode, and one with the default initializer of
Equinox and PyTorch, whose gradients differ by orders of magnitude between layers.
"""

import sys

if __name__ == "__main__":
    from benchmarks import start

    sys.exit(start("benchmarks.gradients"))

import jax

import stablegrad_optax
from benchmarks.tasks.pinn.network import Network, Params
from benchmarks.tasks.pinn.problems import PROBLEMS, Problem
from benchmarks.tasks.pinn.task import Pinn

NETWORKS = {
    "Poisson, depth 8, gain 1": ("poisson", Network(depth=8, gain=1.0)),
    "Poisson, depth 32, gain 5/3": ("poisson", Network(depth=32, gain=5 / 3)),
    "Burgers, depth 20, width 100, Equinox's default": (
        "burgers",
        Network(depth=20, width=100, initializer="uniform"),
    ),
}


def first_gradient(problem: Problem, network: Network, seed: int = 0) -> Params:
    """The gradient of the loss at the initial weights."""
    task = Pinn(problem, network)
    key_weights, key_points = jax.random.split(jax.random.key(seed))
    points = problem.sample(key_points)
    return jax.jit(task.gradient_at)(network.init(key_weights), points).grads


def main() -> int:
    for title, (problem, network) in NETWORKS.items():
        grads = first_gradient(PROBLEMS[problem](), network)
        print(f"{title}\n\n{stablegrad_optax.gradient_report(grads)}\n")
    return 0
