"""Starts workers of the tests as processes of their own, two of them or one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vllm_server import free_port

SUPPORT = Path(__file__).parent


SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


def run_worker(worker, job, backend, log, limit):
    """A worker's exit code, run on its job's file in two processes, or in one for the backend `single`."""
    port = f"--master_port={free_port()}"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", port]
    command = [sys.executable, *([] if backend == "single" else torchrun), str(worker), str(job)]
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **SETTINGS})
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks, which are in sessions of their own
            process.wait(60)
            pytest.fail(f"{backend}: no end within {limit} s\n{log.read_text()[-6000:]}")


def gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
