"""Every test sees eight CPU devices, so that sharding is tested anywhere."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
