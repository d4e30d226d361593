"""The command in several processes that train together, or do not find each other."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_cifar
from ends import figures

COMMAND = Path(__file__).with_name("tiny_command.py")
FAST = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start_command(arguments: str, command: Path = COMMAND, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(command), *arguments.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | FAST | environment,
    )


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_processes(
    arguments: str, count: int = 2, command: Path = COMMAND, **environment: str
) -> list[subprocess.Popen]:
    """Processes that train together, each with 4 virtual devices."""
    common = f"{arguments} --coordinator 127.0.0.1:{free_port()} --num_processes {count}"
    return [
        start_command(f"{common} --process_id {i}", command, JAX_NUM_CPU_DEVICES="4", **environment)
        for i in range(count)
    ]


def start_in_cluster(arguments: str, count: int = 2) -> list[subprocess.Popen]:
    """The same, started as Open MPI would."""
    environment = {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": str(count),
    }
    return [
        start_command(
            f"{arguments} --coordinator auto",
            OMPI_COMM_WORLD_RANK=str(i),
            OMPI_COMM_WORLD_LOCAL_RANK=str(i),
            **environment,
        )
        for i in range(count)
    ]


def wait_for(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_one_device_and_two_processes_of_four_give_the_same_curve(tmp_path):
    """21 steps in float32: two batches of 8 in each epoch are shared out, and one of 6 is not."""
    arguments = "--epochs 7 --batch_size 8 --seeds 1 --optimizer adamsrt --geometry --output"
    alone = start_command(f"{arguments} {tmp_path / 'alone'}", JAX_NUM_CPU_DEVICES="1")
    ((code, _, err),) = wait_for([alone])
    assert code == 0, err
    leader, other = wait_for(start_processes(f"{arguments} {tmp_path / 'processes'}"))
    assert leader[0] == other[0] == 0, leader[2] + other[2]
    assert "on 8 x cpu" in leader[1] and "epoch 7/7" in leader[1]
    # One process prints and writes; the other's lines are Gloo's, whose threads tear them.
    assert not any(word in other[1] for word in ("resnet20", "epoch", "accuracy"))
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "processes").iterdir()} == names

    expected, lines = figures(tmp_path / "alone")
    result, curve = figures(tmp_path / "processes")
    assert result.pop("arguments") == expected.pop("arguments")
    assert result == pytest.approx(expected, abs=1e-4)
    assert len(curve) == 7
    for line, wanted in zip(curve, lines, strict=True):
        assert line == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_processes_stop_together_and_go_on(tmp_path):
    """SIGTERM to one of them: both write the checkpoint of the same step and exit alike."""
    output = tmp_path / "run"
    arguments = f"--epochs 2000 --batch_size 8 --resume --output {output}"
    processes = start_processes(arguments)
    leader, other = processes
    assert leader.stdout is not None
    for line in leader.stdout:
        if line.startswith("epoch 5/"):
            break
    other.send_signal(signal.SIGTERM)
    for code, _, err in wait_for(processes):
        assert code == 143 and err.endswith(
            f"terminated; --resume goes on with what is in {output}\n"
        )
    done = len((output / "metrics.jsonl").read_text().splitlines())
    assert done >= 5
    processes = start_in_cluster(arguments)
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        if line.startswith("going on"):
            assert f"epoch {done + 1}" in line
            break
    processes[0].send_signal(signal.SIGINT)
    assert [code for code, *_ in wait_for(processes)] == [130, 130]


def test_a_cluster_that_is_not_recognised_is_refused(tmp_path):
    ((code, _, err),) = wait_for([start_command(f"--coordinator auto --output {tmp_path / 'run'}")])
    assert code == 2 and err.splitlines()[-1] == (
        "train_cifar.py: error: --coordinator auto finds no cluster that JAX knows here"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_coordinator_that_is_silent_or_whose_port_is_taken(tmp_path):
    """A process that waits for it ends by a signal, one that would be it is refused."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        common = f"--output {tmp_path / 'run'} --num_processes 2"
        common += f" --coordinator 127.0.0.1:{silent.getsockname()[1]}"
        ((code, _, err),) = wait_for([start_command(f"{common} --process_id 0")])
        assert code == 2 and err.endswith(": Address already in use\n")
        waiting = start_command(f"{common} --process_id 1")
        silent.settimeout(60)
        with silent.accept()[0]:  # it has asked, and gets no answer
            waiting.terminate()
            began = time.monotonic()
            ((code, _, err),) = wait_for([waiting])
    assert code == 143 and err.endswith("train_cifar.py: terminated; nothing was begun\n")
    assert time.monotonic() - began < 30  # JAX itself would wait for minutes


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_are_refused():
    code = f"""from training import processes
processes.PATIENCE = 1
processes.join("127.0.0.1:{free_port()}", 2, 1)"""
    environment = os.environ | FAST | {"PYTHONPATH": str(Path(train_cifar.__file__).parent)}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100
    )
    assert "did not find each other at 127.0.0.1:" in process.stderr.splitlines()[-1]


def test_a_host_without_an_address_is_refused(tmp_path):
    options = "--coordinator nowhere.invalid:1 --num_processes 2 --process_id 1"
    ((code, _, err),) = wait_for([start_command(f"{options} --output {tmp_path / 'run'}")])
    assert code == 2 and "--coordinator nowhere.invalid:1: " in err.splitlines()[-1]
