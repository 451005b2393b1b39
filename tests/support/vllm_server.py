"""A real vLLM server on the CPU, from the environment that make_vllm_env.sh makes."""

from __future__ import annotations

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
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


def vllm_python() -> str:
    """The interpreter that has vLLM; where there is none the test is skipped, and fails under SG_OPD_REQUIRE_VLLM."""
    python = Path(os.environ.get("SG_OPD_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if python.exists():
        return str(python)
    reason = f"no vLLM environment at {python}: run `bash tests/make_vllm_env.sh`"
    if os.environ.get("SG_OPD_REQUIRE_VLLM"):
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class VLLMServer:
    """`vllm serve` of a model on 127.0.0.1, from `start` to `stop`."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = log
        command = [
            vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
            "--port", self.url.rsplit(":", 1)[1], "--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager",
            "--served-model-name", "teacher", *options,
        ]  # fmt: skip
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
            )

    def wait(self) -> VLLMServer:
        """Until it is healthy and has answered once: the first request with log-probs takes 12 s."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx2.get(self.url + "/health", timeout=5).status_code == 200:
                    body = {"model": "teacher", "prompt": [[3, 4]], "max_tokens": 1, "prompt_logprobs": 0}
                    httpx2.post(self.url + "/v1/completions", json=body, timeout=120).raise_for_status()
                    return self
            except httpx2.ConnectError:
                time.sleep(1)
        self.stop()
        raise RuntimeError(f"the vLLM server did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """Ends the server with all it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(30)
