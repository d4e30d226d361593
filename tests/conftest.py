"""Eight virtual CPU devices, for the tests of sharded parameters; set before JAX starts."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
