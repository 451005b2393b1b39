"""What the tests with vLLM stand on: engines without AMX, servers that fail alone and are always stopped.

The servers here are stand-ins, which need no vLLM.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import vllm_server
from documents import ROOT
from vllm_server import ENVIRONMENT, LOG, VLLMServer, vllm_python

pytestmark = pytest.mark.integration
# the answers of one process, and of one that it spawns as vLLM does
ASK = """
import json, multiprocessing, sys
def ask():
    import torch
    from vllm import _custom_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    torch.ops._C.cpu_has_amx_fp8 = lambda: True  # this library speaks for the processor too
    print("answers " + json.dumps({
        "processor": torch._C._cpu._get_cpu_capability()["amx_tile"],
        "tile": torch.cpu._is_amx_tile_supported(), "fp16": torch.cpu._is_amx_fp16_supported(),
        "fp8": _custom_ops.cpu_has_amx_fp8(), "attention": _get_attn_isa(torch.bfloat16, 128, 64),
        "others": torch.cpu._is_avx2_supported() == torch._C._cpu._get_cpu_capability()["avx2"],
    }), flush=True)
    torch.nn.functional.linear(*torch.ones(2, 64, 64, dtype=torch.bfloat16))  # oneDNN says what it may use
if __name__ == "__main__":
    ask()
    spawned = multiprocessing.get_context("spawn").Process(target=ask)
    spawned.start()
    spawned.join()
    sys.exit(spawned.exitcode)
"""
# stands for `vllm`: fails as told by the model's name, or answers
SERVE = """
import http.server, os, subprocess, sys, threading
options = " ".join(sys.argv)
assert sys.argv[1] == "serve", options
pids = os.path.join(os.path.dirname(sys.argv[0]), os.path.basename(sys.argv[2]) + ".pids")
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(pids, "a").write(f"{os.getpid()} {worker.pid} ")
if os.environ.get("DIES", "never") in options:
    sys.exit("no such model")
print("loading" if "silent" in options else "", end="", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass
    def do_GET(self):
        self.send_response(503 if "silent" in options else 200)
        self.end_headers()
    def do_POST(self):
        print("[core.py:1] ERROR Worker died (exit code: -4)", *["[shutdown] complete"] * 200, sep="\\n", flush=True)
        self.send_response(500 if "broken" in options else 200)
        self.end_headers()
        if "fleeting" in options:
            threading.Timer(0.5, os._exit, [3]).start()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An environment whose `vllm` is the stand-in."""
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "vllm").write_text(f"#!{sys.executable}\n{SERVE}")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("SG_OPD_VLLM_PYTHON", str(tmp_path / "python"))
    yield tmp_path
    for pid in " ".join(path.read_text() for path in tmp_path.glob("*.pids")).split():  # what a failed test has left
        if runs(pid):
            os.kill(int(pid), signal.SIGKILL)


def runs(pid: int | str) -> bool:
    """Whether it is there and no zombie, which a container's first process may leave for long."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_ended(model: Path, seconds: float = 10) -> bool:
    """Whether the server of a model and its worker end in time."""
    pids = [int(pid) for pid in Path(f"{model}.pids").read_text().split()]
    deadline = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(pids) == 2 and not any(map(runs, pids))


def test_engines_hear_of_no_amx_on_a_processor_that_has_it(tmp_path):
    """In a process of their environment and in one that it spawns; `pretend_amx` makes any processor one with AMX."""
    (tmp_path / "ask.py").write_text(ASK)
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(ROOT / "tests" / "support" / "pretend_amx")])
    ended = vllm_server.run(
        [vllm_python(), tmp_path / "ask.py"], {**ENVIRONMENT, "PYTHONPATH": path, "ONEDNN_VERBOSE": "1"}
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = ended.stdout.splitlines()
    answers = [json.loads(line.removeprefix("answers ")) for line in lines if line.startswith("answers ")]
    assert len(answers) == 2
    for answer in answers:
        assert answer.pop("attention") in ("vec", "neon", "rvv", "vxe", "vsx")
        assert answer == {"processor": True, "tile": False, "fp16": False, "fp8": False, "others": True}
    assert not [line for line in lines if line.startswith("onednn_verbose") and "amx" in line.lower()]


def test_no_process_of_the_engines_imports_torch_before_it_asks():
    command = [sys.executable, "-c", "import sys; print('torch' in sys.modules, 'sitecustomize' in sys.modules)"]
    assert vllm_server.run(command).stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    ("name", "words"),
    [  # the first is healthy at no time, the last dies at its first request
        ("silent", f"did not answer in 3 s; {LOG}:\nloading"),
        ("dead", f"ended with exit code 1; {LOG}:\nno such model"),
        ("broken", f"answered its first request with 500; {LOG}:\n[core.py:1] ERROR Worker died (exit code: -4)\n"),
    ],
    ids=["silent", "dead", "broken"],
)
def test_a_server_that_does_not_start_fails_once_and_is_stopped(stand_in, monkeypatch, name, words):
    """With what its log says; the second time at once."""
    monkeypatch.setattr(vllm_server, "START_SECONDS", 3 if name == "silent" else 30)
    monkeypatch.setitem(ENVIRONMENT, "DIES", "dead")
    model = stand_in / name
    server = VLLMServer(model, stand_in / "log")
    with pytest.raises(RuntimeError) as first:
        server.wait()
    assert words in str(first.value)
    assert all_ended(model)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as second:
        server.wait()
    assert time.monotonic() - start < 0.5
    assert str(second.value) == str(first.value)


def test_a_server_that_died_says_so_and_one_that_was_stopped_does_not(stand_in):
    with VLLMServer(stand_in / "fleeting", stand_in / "log") as server:
        server.wait()
        server.process.wait(10)
        with pytest.raises(RuntimeError, match=rf"ended with exit code 3; {LOG}:\n.*Worker died"):
            server.wait()
        assert all_ended(stand_in / "fleeting")  # with the worker, which outlived it
    with VLLMServer(stand_in / "good", stand_in / "log") as server:
        server.wait()
    assert all_ended(stand_in / "good")
    server.wait()


TESTS = """
from test_vllm import bfloat16, servers, url
def test_first(bfloat16): pass
def test_second(url): assert url
def test_third(bfloat16): pass
"""


def test_a_server_that_fails_takes_its_own_tests_with_it(stand_in):
    """The fixtures of test_vllm.py, with a server in bf16 that dies."""
    (stand_in / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "--rootdir", stand_in, stand_in]
    path = os.pathsep.join(
        str(ROOT / folder) for folder in ("tests/support", "tests/teachers", "tests", "examples", "examples/arithmetic")
    )
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, "DIES": "bfloat16"}, capture_output=True, text=True, timeout=120
    )
    assert "1 passed, 2 errors" in ended.stdout, ended.stdout + ended.stderr
    assert len(re.findall(rf"ended with exit code 1; {LOG}:\nE +no such model", ended.stdout)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_server(stand_in, number):
    model = stand_in / "silent"
    code = f"import pathlib; from vllm_server import VLLMServer\nwith VLLMServer(pathlib.Path({str(model)!r}), "
    code += f"pathlib.Path({str(stand_in / 'log')!r})) as server: server.wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")},
        stderr=subprocess.DEVNULL,
    )
    while not Path(f"{model}.pids").exists() or len(Path(f"{model}.pids").read_text().split()) < 2:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(20) != 0
    assert all_ended(model)
