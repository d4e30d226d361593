"""What a run's results depend on besides its arguments: versions, devices, the commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax

from training.command import Refused

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "spherical_optax")


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that results depend on; None if not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def devices() -> list[jax.Device]:
    """All devices of all processes.

    Raises:
      Refused: JAX finds none, such as with JAX_PLATFORMS=cuda where there is no GPU.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is one
        reason = str(error).partition("\n")[0]
        raise Refused(f"JAX has no device{': ' if reason else ''}{reason}") from error


def device_name() -> str:
    """The devices of this process: `gpu (NVIDIA H100 80GB HBM3)`, `cpu (AMD EPYC, 2 cores)`."""
    if jax.default_backend() == "cpu":
        return f"cpu ({_processor()}, {os.cpu_count()} cores)"
    several = f"{jax.device_count()} x " if jax.device_count() > 1 else ""
    return f"{jax.default_backend()} ({several}{jax.devices()[0].device_kind})"


def find_git_revision() -> str | None:
    """The commit that is checked out, with "-dirty" if tracked files differ from it."""
    # `git describe --dirty` would write the index, and a run that is killed leave its lock behind.
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    status = ["status", "--porcelain", "--untracked-files=no"]
    try:
        revision, changes = (
            subprocess.run([*git, *asked], capture_output=True, text=True, check=True).stdout
            for asked in (["rev-parse", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.strip() + ("-dirty" if changes else "")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
