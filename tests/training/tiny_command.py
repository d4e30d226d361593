"""The command in a process of its own, with the tiny network and its images.

HEARTBEAT takes the place of the 100 seconds after which JAX gives another process up.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # first of all, as the command does

import os
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

    import jax

    import train_cifar
    from images import data, models
    from tiny import Tiny, make_data
    from training import ending

    models.MODELS["resnet20"] = Tiny
    data.load = lambda *_, **__: make_data(pad=2, flip=True)
    if "HEARTBEAT" in os.environ:
        jax.distributed.initialize = partial(
            jax.distributed.initialize, heartbeat_timeout_seconds=int(os.environ["HEARTBEAT"])
        )
    ending.leave(train_cifar.main())
