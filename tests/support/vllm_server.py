"""A real vLLM server on the CPU, from the environment that make_vllm_env.sh makes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 300  # 27 to 64 measured, 120 the first time
STOP_SECONDS = 30
LOG = "first errors and end of its log"
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    # no AMX whatever the processor: no_amx/sitecustomize.py answers what vLLM asks, oneDNN and MKL ask the processor
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(ROOT / "tests" / "support" / "no_amx"), os.environ.get("PYTHONPATH")])
    ),
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    "MKL_ENABLE_INSTRUCTIONS": "AVX512_E1",
}
# waits until its input ends, which it does with the process that holds the other end, however that ends
GUARD = f"""
read -r
kill -TERM -- "-$0"
for _ in $(seq {STOP_SECONDS}); do kill -0 -- "-$0" || exit; sleep 1; done
kill -KILL -- "-$0"
"""


def vllm_python() -> str:
    """The interpreter that has vLLM; where there is none the test is skipped, and fails under SG_OPD_REQUIRE_VLLM."""
    python = Path(os.environ.get("SG_OPD_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if python.exists():
        return str(python)
    reason = f"no vLLM environment at {python}: run `bash tests/make_vllm_env.sh`"
    if os.environ.get("SG_OPD_REQUIRE_VLLM"):
        pytest.fail(reason)
    pytest.skip(reason)


def vllm_serve() -> list[str]:
    """The command that serves, before the model's name."""
    return [str(Path(vllm_python()).with_name("vllm")), "serve"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Engine:
    """A command that starts processes: they end with the `with` block, and with this process, even a killed one."""

    def __init__(self, command: list, environment: dict = ENVIRONMENT, **options) -> None:
        self.stopped = False
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **options)
        self.guard = subprocess.Popen(
            ["bash", "-c", GUARD, str(self.process.pid)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the command with all it started, also what outlived it."""
        if self.stopped:
            return
        self.stopped = True
        try:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signal.SIGTERM)
                self.process.wait(STOP_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.guard.kill()
            self.guard.communicate()


def run(command: list, environment: dict = ENVIRONMENT, cwd: Path = ROOT, timeout: float = 600):
    """As `subprocess.run`, and nothing of it is left."""
    options = {"cwd": cwd, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Engine(command, environment, **options) as engine:
        said = engine.process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, engine.process.returncode, *said)


class VLLMServer(Engine):
    """`vllm serve` of a model on 127.0.0.1, from its start to `stop`."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = log
        self.deadline = time.monotonic() + START_SECONDS
        self.answered = False
        self.failure = ""
        command = [
            *vllm_serve(), str(model), "--host", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1],
            "--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager", "--served-model-name", "teacher",
            *options,
        ]  # fmt: skip
        with log.open("w") as output:
            super().__init__(command, stdout=output, stderr=subprocess.STDOUT)

    def wait(self) -> VLLMServer:
        """Until it has answered; fails with what its log says, at once where it failed or died before."""
        if not self.failure and not self.stopped:
            self.failure = self._failure()
        if self.failure:
            self.stop()
            log = self.log.read_text()
            # the cause may stand far above: a server whose worker died says more than 10,000 characters after that
            errors = [line for line in log[:-3000].splitlines(keepends=True) if " ERROR " in line][:3]
            raise RuntimeError(f"the vLLM server {self.failure}; {LOG}:\n{''.join(errors)}{log[-3000:]}")
        return self

    def _failure(self) -> str:
        """Empty once it is healthy and has answered: the first request with log-probs takes 12 s."""
        while self.process.poll() is None:
            if self.answered:
                return ""
            try:
                if httpx2.get(self.url + "/health", timeout=5).status_code == 200:
                    body = {"model": "teacher", "prompt": [[3, 4]], "max_tokens": 1, "prompt_logprobs": 0}
                    answer = httpx2.post(self.url + "/v1/completions", json=body, timeout=120)
                    if not answer.is_success:
                        return f"answered its first request with {answer.status_code}"
                    self.answered = True
                    continue
            except httpx2.TransportError:
                pass
            if time.monotonic() > self.deadline:
                return f"did not answer in {START_SECONDS} s"
            time.sleep(1)
        return f"ended with exit code {self.process.returncode}"
