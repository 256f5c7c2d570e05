"""Tools that check the theory of scaled gradients on your own network.

They speak of the plain step ``theta - eta P g``, not of an optimizer with a memory.
"""

from stablegrad_optax._kernel import effective_kernel, effective_kernel_operator
from stablegrad_optax._step_bound import local_decrease_bound

__all__ = ["effective_kernel", "effective_kernel_operator", "local_decrease_bound"]
