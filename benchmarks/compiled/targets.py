"""The GPUs that programs are compiled for where there is none, by their data sheets."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from training.command import Refused

if TYPE_CHECKING:
    import jax


class Gpu(NamedTuple):
    """What XLA is told of a GPU; sizes are in bytes."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    clock: float  # GHz
    bandwidth: int  # of the memory, bytes per second
    memory: int
    l2_cache: int
    shared_memory: int  # of each core
    shared_memory_of_block: int  # the most that a block may ask for


GPUS = {
    "h100": Gpu(
        *("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98),
        *(3_352_320_000_000, 84_929_347_584, 52_428_800, 233_472, 232_448),
    ),
    "h200": Gpu(
        *("NVIDIA H200", (9, 0), 132, 128, 1.98),
        *(4_800_000_000_000, 150_754_820_096, 62_914_560, 233_472, 232_448),
    ),
    "a100": Gpu(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41),
        *(2_039_000_000_000, 85_899_345_920, 41_943_040, 167_936, 166_912),
    ),
}
FLAG = "--xla_gpu_autotune_level=0"  # which would time kernels on a GPU
REMEDY = "pip install '.[gpu_compile]'"
# JAX's plugin for CUDA; and the compiler behind it, without which the plugin ends the process.
_NEEDED = ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")
_TARGET = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: {gpu.shared_memory_of_block}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{gpu.name}"
"""


def prepare() -> dict[str, str | None]:
    """Set JAX up, before it starts, to compile for GPUs from a CPU.

    Returns:
      The version of its plugin for CUDA.

    Raises:
      Refused: the plugin is missing, or the compiler behind it.
    """
    for module in _NEEDED:
        if not _is_there(module):
            raise Refused(f"to compile for GPUs JAX needs {module}, which is missing: {REMEDY}")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
    import jax

    jax.config.update("jax_platforms", "cpu")
    return {"jax-cuda12-plugin": metadata.version("jax-cuda12-plugin")}


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def devices(gpu: str, count: int) -> Sequence[jax.Device]:
    """So many GPUs of a kind, for which can be compiled and nothing else.

    Args:
      gpu: a key of `GPUS`.
      count: how many of them, in one machine.

    Raises:
      Refused: the plugin does not start.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="cuda",
            target_config=_TARGET.format(gpu=GPUS[gpu]),
            topology=f"1x1x{count}",
        ).devices
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise Refused(f"JAX's plugin for CUDA does not start ({reason}): {REMEDY}") from error
