"""Eight virtual CPU devices, for the tests of sharded parameters; set before JAX starts."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def compiled_quickly():
    """Compiles in half the time, for tests that compile much and do not look at rounding."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
