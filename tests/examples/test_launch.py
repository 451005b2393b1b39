"""The launch scripts: they parse, run what they say, wait for the server, and leave none behind. No GPU, no vLLM."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from documents import ROOT
from launching import gone
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, TrlParser
from vllm_server import free_port

from sg_opd import SGOPDConfig

SCRIPTS = sorted((ROOT / "examples" / "launch").glob("*.sh"))
ON_CPU = ("--bf16", "false", "--use_cpu", "true")
# stands for `accelerate launch`: writes its arguments and devices, then does as told
RECORD = """
import json, os, subprocess, sys, time
sleep = "import os, time; time.sleep(float(os.environ.get('TRAINING', 0)))"
rank = subprocess.Popen([sys.executable, "-c", sleep])
seen = {"pid": os.getpid(), "rank": rank.pid, "arguments": sys.argv[1:], "devices": os.environ["CUDA_VISIBLE_DEVICES"]}
open(os.environ["RECORD"], "w").write(json.dumps(seen))
time.sleep(float(os.environ.get("TRAINING", 0)))
sys.exit(int(os.environ.get("TRAINER_EXIT", 0)))
"""
# stands for `vllm serve`: answers /health after a while, or dies
SERVE = """
import http.server, os, sys, time
open(os.environ["SERVED"], "w").write(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']} {' '.join(sys.argv[1:])}")
time.sleep(0.5)
if os.environ.get("DIES"):
    sys.exit("no such model")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stage(tmp_path):
    """Environment of a script whose launcher and server are stand-ins."""
    (tmp_path / "record.py").write_text(RECORD)
    (tmp_path / "serve.py").write_text(SERVE)
    port = free_port()
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "LAUNCH": f"{sys.executable} {tmp_path / 'record.py'}",
        "SERVE": f"{sys.executable} {tmp_path / 'serve.py'}",
        "RECORD": str(tmp_path / "record.json"),
        "SERVED": str(tmp_path / "served"),
        "LOG": str(tmp_path / "log"),
        "PORT": str(port),
        "WAIT": "60",
    }


def launch(name, environment, *arguments):
    command = ["bash", str(ROOT / "examples" / "launch" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def recorded(environment):
    return json.loads(Path(environment["RECORD"]).read_text())


def parse(arguments):
    script, *rest = arguments
    assert script == "examples/train.py"
    parser = TrlParser((ScriptArguments, SGOPDConfig, ModelConfig))
    return parser.parse_args_and_config([*rest, *ON_CPU])


def test_there_is_a_script_a_topology():
    assert [path.name for path in SCRIPTS] == ["single_gpu.sh", "teacher_server.sh", "vllm_colocate.sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_scripts_are_sound(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# Topology: ")
    assert "\n# Hardware: " in text
    assert "\nset -euo pipefail\n" in text
    assert not any(word in text for word in ("pkill", "killall"))
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)


def test_single_gpu_prints_the_estimate_and_trains_the_recipe(stage):
    run = launch("single_gpu.sh", stage, "--max_steps", "3")
    assert run.returncode == 0, run.stderr
    assert "GiB  peak" in run.stdout
    seen = recorded(stage)
    assert seen["devices"] == "0"
    _, args, model = parse(seen["arguments"])
    assert (args.max_steps, model.model_name_or_path, model.use_peft) == (3, "Qwen/Qwen3-1.7B", True)


def test_vllm_colocate_sets_trls_fields(stage):
    run = launch("vllm_colocate.sh", {**stage, "SHARE": "0.25"}, "--seed", "5")
    assert run.returncode == 0, run.stderr
    seen = recorded(stage)
    assert seen["devices"] == "0,1"
    _, args, _ = parse(seen["arguments"])
    assert (args.use_vllm, args.vllm_mode, args.vllm_gpu_memory_utilization) == (True, "colocate", 0.25)
    assert (args.vllm_enable_sleep_mode, args.vllm_max_model_length, args.seed) == (True, 1536, 5)
    assert not args.vllm_importance_sampling_correction  # of the sampled estimator; the recipe has the full one


def test_teacher_server_waits_trains_and_ends_its_server(stage):
    run = launch("teacher_server.sh", stage, "--max_steps", "3")
    assert run.returncode == 0, run.stderr
    url = f"http://127.0.0.1:{stage['PORT']}"
    assert f"The teacher answers at {url}" in run.stdout
    seen = recorded(stage)
    assert seen["devices"] == "0,1,2,3,4,5"
    expected = ["examples/train.py", "--config", "examples/configs/qwen3_full_zero3_server.yaml"]
    expected += ["--teacher_model_name_or_path", "Qwen/Qwen3-32B", "--teacher_server_url", url, "--max_steps", "3"]
    assert seen["arguments"] == expected
    pid, devices, *served = Path(stage["SERVED"]).read_text().split()
    assert devices == "6,7"
    assert " ".join(served) == (
        f"Qwen/Qwen3-32B --host 127.0.0.1 --port {stage['PORT']} --max-model-len 5120 --max-logprobs 64 "
        "--tensor-parallel-size 2 --max-num-batched-tokens 2048 "
        "--no-enable-prefix-caching --gpu-memory-utilization 0.85"
    )
    assert gone(int(pid))


def test_teacher_server_hands_on_a_failure(stage):
    run = launch("teacher_server.sh", {**stage, "TRAINER_EXIT": "7"})
    assert run.returncode == 7
    assert gone(int(Path(stage["SERVED"]).read_text().split()[0]))


def test_teacher_server_says_why_its_server_died(stage):
    run = launch("teacher_server.sh", {**stage, "DIES": "1"})
    assert run.returncode == 1
    assert "The server ended before it answered" in run.stderr
    assert "no such model" in run.stderr
    assert not Path(stage["RECORD"]).exists()


def test_teacher_server_gives_up_at_the_deadline(stage):
    url = f"http://127.0.0.1:{stage['PORT']}"
    run = launch("teacher_server.sh", {**stage, "SERVER_URLS": url, "WAIT": "1"})
    assert run.returncode == 1
    assert f"No answer from {url} (/health) after 1 s" in run.stderr


def test_teacher_server_uses_a_server_that_runs_and_starts_none_beside_it(stage, tmp_path):
    url = f"http://127.0.0.1:{stage['PORT']}"
    command = [sys.executable, str(tmp_path / "serve.py"), "--port", stage["PORT"]]
    server = subprocess.Popen(command, env={**stage, "CUDA_VISIBLE_DEVICES": ""})
    try:
        run = launch("teacher_server.sh", {**stage, "SERVER_URLS": url})
        assert run.returncode == 0, run.stderr
        assert server.poll() is None  # not this script's to end
        run = launch("teacher_server.sh", stage)
        assert run.returncode == 1
        assert f"Something answers at {url} already" in run.stderr
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_server_and_trainer_too(number, code, stage):
    """Ctrl-C reaches the whole foreground group, an operator's or a scheduler's SIGTERM the script alone."""
    command = ["bash", str(ROOT / "examples" / "launch" / "teacher_server.sh")]
    run = subprocess.Popen(command, env={**stage, "TRAINING": "60"}, start_new_session=True)
    record = Path(stage["RECORD"])
    for _ in range(300):
        if record.exists() and record.read_text().endswith("}"):
            break
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)
    else:
        run.send_signal(number)
    assert run.wait(timeout=30) == code
    assert gone(int(Path(stage["SERVED"]).read_text().split()[0]))
    launched = json.loads(record.read_text())
    assert gone(launched["pid"])
    assert gone(launched["rank"])  # which a launcher's own end does not end


# stands for a trainer that finishes its step, for which it needs the server, and saves
SAVING = """
import os, signal, sys, time, urllib.request
def save(*_):
    time.sleep(1.5)
    url = sys.argv[sys.argv.index("--teacher_server_url") + 1]
    open(os.environ["RECORD"], "a").write(f" {urllib.request.urlopen(url + '/health').status}")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
open(os.environ["RECORD"], "w").write("up")
time.sleep(60)
"""


def test_a_signalled_trainer_may_save_before_its_server_ends(stage, tmp_path):
    (tmp_path / "record.py").write_text(SAVING)
    run = subprocess.Popen(["bash", str(ROOT / "examples" / "launch" / "teacher_server.sh")], env=stage)
    record = Path(stage["RECORD"])
    for _ in range(300):
        if record.exists() and record.read_text() == "up":
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 143
    assert record.read_text() == "up 200"
    assert gone(int(Path(stage["SERVED"]).read_text().split()[0]))


# in processes of their own on the CPU; the losses of the first are those of all others with two processes
# not fsdp2: on the CPU accelerate makes DDP of it, unnoticed; test_distributed.py has its settings
CONFIGS = ("ddp", "zero2", "zero3", "zero3_offload", "single_gpu")


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory):
    """`accelerated(config)`: the losses that `accelerate launch` of examples/train.py logged, and the saved student."""

    @functools.cache
    def launch(config):
        out, processes = tmp_path_factory.mktemp(config), 1 if config == "single_gpu" else 2
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"examples/accelerate/{config}.yaml",
            "--num_processes", processes, "--mixed_precision", "no", "--main_process_port", free_port(),
            "tests/support/train_on_cpu.py", "--config", "examples/configs/arithmetic.yaml", "--estimator", "sampled",
            "--max_steps", 3, "--learning_rate", 1e-3, "--warmup_steps", 0, "--teacher_phase_steps", 2,
            "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 3,
            "--per_device_train_batch_size", 32 // processes, "--output_dir", out,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (out / "log").open("w") as log:
            process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log, env=environment)
            try:
                code = process.wait(280)
            finally:
                process.terminate()  # ends its ranks too
        assert code == 0, (out / "log").read_text()[-4000:]
        assert (out / "checkpoint-3" / "global_step3").is_dir() == config.startswith("zero")  # DeepSpeed's own folder
        state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        return losses, state["log_history"][0], AutoModelForCausalLM.from_pretrained(out).state_dict()

    return launch


@pytest.mark.integration
@pytest.mark.parametrize("config", CONFIGS)
def test_each_accelerate_config_trains(config, accelerated):
    """Three steps of 32 rollouts: two processes log the same losses under every configuration, and save one student."""
    losses, first, student = accelerated(config)
    assert len(losses) == 3
    assert first["teacher/slot_share"] == pytest.approx(0.25)
    before = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "arithmetic" / "student").state_dict()
    assert student.keys() == before.keys()
    assert max((student[name] - before[name]).abs().max().item() for name in before) > 1e-3
    if config != "single_gpu":  # one process draws other rollouts than two
        expected, _, reference = accelerated("ddp")
        assert losses == pytest.approx(expected, abs=2e-4)
        assert max((student[name] - reference[name]).abs().max().item() for name in student) < 1e-3
