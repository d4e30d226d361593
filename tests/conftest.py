"""Eight virtual CPU devices, for the tests of sharded parameters; set before JAX starts.

Hypothesis draws the same examples each time; with `--hypothesis-profile=long` others, and 25 times
as many.
"""

import signal

import hypothesis
import jax
import pytest

# A shell makes what it starts in the background deaf to Ctrl-C, and so all that this starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 8)

# The explanations that it could add run a failing example hundreds of times.
PHASES = [phase for phase in hypothesis.Phase if phase != hypothesis.Phase.explain]
COMMON = {"deadline": None, "database": None, "phases": PHASES}
hypothesis.settings.register_profile("short", max_examples=2_000, derandomize=True, **COMMON)
hypothesis.settings.register_profile("long", max_examples=50_000, print_blob=True, **COMMON)
hypothesis.settings.load_profile("short")


@pytest.fixture(scope="module")
def compiled_quickly():
    """Compiles in half the time, for tests that compile much and do not look at rounding."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
