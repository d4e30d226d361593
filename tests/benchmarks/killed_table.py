"""reproduce_table.py with the trainer TRAINER and without the slow picture, killed where KILL says.

That is before or after the first call of a function, in the middle of a write, or at the nth event
of the profiler. PATIENCE takes the place of the command's.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(kill: str) -> None:
    if kill.isdigit():
        events = 0

        def count(frame, event, argument) -> None:
            nonlocal events
            if frame.f_code.co_filename.startswith(BENCHMARKS):
                events += 1
                if events == int(kill):
                    die()

        sys.setprofile(count)
    elif kill == "torn write":
        write = os.write
        os.write = lambda file, content: (write(file, content[: len(content) * 2 // 3]), die())
    elif kill == "part of the checkpoints":
        shutil.rmtree = lambda path, **_: (os.unlink(path / "1"), die())
    elif kill:
        when, module, name = kill.split()
        function = getattr(sys.modules[module], name)

        def wrapped(*args, **kwargs) -> None:
            if when == "before":
                die()
            function(*args, **kwargs)
            die()

        setattr(sys.modules[module], name, wrapped)


if __name__ == "__main__":
    sys.path.insert(0, BENCHMARKS)

    import reproduce_table
    from common import trainer_calls

    reproduce_table.TRAINER = Path(os.environ["TRAINER"])
    trainer_calls.PATIENCE = float(os.environ["PATIENCE"])
    reproduce_table.table_report.draw = lambda path, runs: path.write_bytes(b"picture")
    die_at(os.environ["KILL"])
    sys.exit(reproduce_table.main())
