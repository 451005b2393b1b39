"""What foreign checkpoints, answers and servers cannot do, and what is written down nowhere."""

import ast
import copy
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from documents import ROOT
from fault_proxy import FaultProxy, StandIn
from hostile import attacks
from launching import SUPPORT

from sg_opd import MathVerifier, SGOPDConfig, SGOPDTrainer
from sg_opd.evaluation.engines import ServerEngine
from sg_opd.teachers.http import Endpoints, TeacherServerError, check_url
from sg_opd.verifiers import grader, worker

SOURCES = sorted((ROOT / "src" / "sg_opd").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
PATHS = ("examples", "examples/arithmetic", "benchmarks")
SECRETS = {
    "HF_TOKEN": "hf_s3cret0",
    "VLLM_API_KEY": "vllm-s3cret1",
    "WANDB_API_KEY": "wandb-s3cret2",
    "AWS_SECRET_ACCESS_KEY": "aws-s3cret3",
    "SOME_PASSWORD": "s3cret4",
}


SETTINGS = {
    **{"bf16": False, "use_cpu": True, "report_to": "none", "max_steps": 1, "logging_steps": 1},
    **{"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 8},
}


def calls(path):
    """Every call in a file, with the dotted name of what is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


# what loads a checkpoint; each must say whether its code is run, or be handed what says it
LOADERS = ("from_pretrained", "from_config", "create_model_from_path", "pipeline", "LLM", "load_teacher")


@pytest.mark.parametrize("path", [*SOURCES, *EXAMPLES], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_load_says_whether_remote_code_is_run(path):
    """In the call itself, or in the keyword arguments of `loading_defaults`, which a test below reads."""
    for node, name in calls(path):
        if name.split(".")[-1] in LOADERS:
            said = [keyword.arg for keyword in node.keywords]
            handed_on = any(
                (keyword.arg is None and ast.unparse(keyword.value) in ("kwargs", "loading"))
                or ast.unparse(keyword.value).startswith("loading_defaults(")
                for keyword in node.keywords
            )
            assert "trust_remote_code" in said or handed_on, f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_the_loads_are_seen():
    seen = [name for path in [*SOURCES, *EXAMPLES] for _, name in calls(path) if name.split(".")[-1] in LOADERS]
    assert len(seen) >= 9


@pytest.fixture
def saved(make_model, tokenizer, tmp_path):
    """Folders of a student and a teacher, with their tokenizer."""
    for seed, name in ((1, "student"), (2, "teacher")):
        make_model(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def make_trainer(saved, dataset, student="student", teacher="teacher", **overrides):
    args = SGOPDConfig(str(saved / "out"), **{**SETTINGS, **overrides})
    return SGOPDTrainer(str(saved / student), str(saved / teacher), args=args, train_dataset=dataset)


def test_student_teacher_reference_and_tokenizers_are_loaded_without_remote_code(saved, dataset, monkeypatch):
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel

    seen = []
    for loader in (AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel):
        original = loader.from_pretrained.__func__

        def record(cls, name, *args, original=original, loader=loader, **kwargs):
            seen.append((loader.__name__, Path(name).name, kwargs))
            return original(cls, name, *args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", classmethod(record))
    make_trainer(saved, dataset, reference_policy="initial")
    assert [where for kind, where, _ in seen if kind == "PreTrainedModel"] == ["student", "student", "teacher"]
    assert {"AutoConfig", "AutoTokenizer", "AutoProcessor"} <= {kind for kind, *_ in seen}
    for kind, where, kwargs in seen:
        assert kwargs["trust_remote_code"] is False, (kind, where)
        assert kind != "PreTrainedModel" or kwargs["use_safetensors"] is True, where


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_weights_in_a_pickle_are_refused_unless_asked_for(which, saved, dataset, make_model):
    (saved / which / "model.safetensors").unlink()
    torch.save(make_model(1 if which == "student" else 2).state_dict(), saved / which / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        make_trainer(saved, dataset)
    name = "model_init_kwargs" if which == "student" else "teacher_model_init_kwargs"
    assert make_trainer(saved, dataset, **{name: {"use_safetensors": False}})


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "input"}
FORBIDDEN_MODULES = {
    *("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "ctypes"),  # run what they read
    *("socket", "socketserver", "http.server", "xmlrpc", "multiprocessing.managers", "aiohttp", "flask", "fastapi"),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_no_foreign_data_is_run_and_nothing_listens(path):
    for node, name in calls(path):
        assert name not in FORBIDDEN_CALLS, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        assert name.split(".")[-1] not in ("bind", "listen", "create_server", "start_server"), ast.unparse(node)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("shell", "False") == "False"
        assert keywords.get("allow_pickle", "False") == "False"
        assert keywords.get("weights_only", "False" if name == "torch.load" else "True") == "True"  # else it unpickles
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert not {module, module.split(".")[0]} & FORBIDDEN_MODULES, f"{path.name}: {module}"


def test_a_run_listens_on_no_socket(saved):
    """A whole training run in a process of its own whose audit hook sees every socket that is bound."""
    code = (
        "import sys\nfrom importlib.util import find_spec\n"
        "if find_spec('urllib3'): import urllib3\n"  # which asks the system for IPv6 by a bind, and lets go of it
        "bound, listening = [], ('socket.bind', 'socket.listen')\n"
        "sys.addaudithook(lambda event, args: bound.append(args) if event in listening else None)\n"
        "sys.path += sys.argv[2:]\n"
        "import conftest, test_security\nfrom pathlib import Path\nfrom datasets import Dataset\n"
        "rows = Dataset.from_list([{'prompt': [{'role': 'user', 'content': '1+1'}], 'solution': '2'}] * 4)\n"
        "test_security.make_trainer(Path(sys.argv[1]), rows).train()\nprint('bound', bound)\n"
    )
    paths = [str(ROOT / name) for name in ("tests", "tests/project", "tests/support", *PATHS)]
    run = subprocess.run([sys.executable, "-c", code, str(saved), *paths], capture_output=True, text=True, timeout=300)
    assert "bound []" in run.stdout, run.stdout + run.stderr


@pytest.fixture
def worker_with_secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    verifier = MathVerifier(workers=1)
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    yield Path(f"/proc/{verifier._grader.pool[0].process.pid}")
    verifier.close()


def test_a_worker_gets_no_secrets(worker_with_secrets):
    environment = (worker_with_secrets / "environ").read_text()
    assert not [name for name, value in SECRETS.items() if name in environment or value in environment]
    names = {entry.split("=")[0] for entry in environment.split("\0") if entry}
    assert names <= {*grader.ENVIRONMENT, *grader.ENVIRONMENT_SET, "LC_CTYPE"}  # the last is Python's own


def test_a_worker_is_bounded(worker_with_secrets):
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (worker_with_secrets / "limits").open()}
    for name, most in (
        ("Max address space", worker.MEMORY_BYTES),
        ("Max open files", worker.LIMITS["NOFILE"]),
        ("Max file size", 0),
        ("Max core file size", 0),
    ):
        assert limits[name] == [str(most)] * 2, name
    assert int(limits["Max cpu time"][0]) < 60  # seconds so far and a task's


def test_a_worker_opens_no_socket_starts_no_process_and_writes_no_file(tmp_path, monkeypatch):
    fifo = tmp_path / "events"
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    audited = str(SUPPORT / "audited_worker.py")
    monkeypatch.setattr(grader, "PROGRAM", (audited, str(fifo), *grader.PROGRAM))
    verifier = MathVerifier(timeout=0.5, workers=2)
    kinds = ("injection", "tex_bomb", "reply", "soup", "sets", "numeric")
    cases = [case for case in attacks(200) if case.kind in kinds]
    verifier([case.completion for case in cases], [case.gold for case in cases])
    assert verifier([r"\boxed{2x}"], ["x+x"]) == [1.0]
    verifier.close()
    seen = os.read(reading, 65_536).decode() if os_readable(reading) else ""
    os.close(reading)
    assert "watching" in seen  # the hook was there
    assert set(seen.splitlines()) - {"watching"} == set()


def os_readable(descriptor: int) -> bool:
    import select

    return bool(select.select([descriptor], [], [], 0)[0])


def test_the_audit_sees_a_socket(tmp_path):
    """The hook itself: a grader that opens a socket and a file is reported."""
    fifo, bad = tmp_path / "events", tmp_path / "bad.py"
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    bad.write_text("import sys, socket\nsys.audit('sg_opd.ready')\nsocket.socket()\nopen(__file__, 'a')\neval('1')\n")
    subprocess.run([sys.executable, SUPPORT / "audited_worker.py", fifo, bad, "1"], check=True)
    seen = os.read(reading, 65_536).decode()
    os.close(reading)
    assert [line.split()[0] for line in seen.splitlines()] == ["watching", "socket.__new__", "open", "compile"]


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://user:s3cret@host:8000",
            "http://s3cret@host",
            "user:s3cret@host:8000",
            "http://host:8000/?key=s3cret",
        ),
        *("https://host/v1#s3cret", "http://user:s3cret@host:80a0"),
    ],
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url, tmp_path, tokenizer):
    for use in (
        lambda: SGOPDConfig(str(tmp_path), teacher_server_url=url, temperature=1.0, bf16=False, use_cpu=True),
        lambda: ServerEngine([url], tokenizer),
        lambda: check_url(url, "x"),
    ):
        with pytest.raises(ValueError, match="VLLM_API_KEY") as caught:
            use()
        assert "s3cret" not in str(caught.value)


def test_a_configuration_shows_and_saves_no_address_and_no_token(tmp_path):
    url, token = "http://teacher.internal:8000", "hf_s3cret"
    loading = {"token": token, "dtype": "float32", "config": {"use_auth_token": token}}
    args = SGOPDConfig(
        str(tmp_path), teacher_server_url=url, hub_token=token, temperature=1.0, bf16=False, use_cpu=True,
        model_init_kwargs=loading,
    )  # fmt: skip
    written = pickle.dumps(args.without_secrets())
    for text in (repr(args), str(args), str(args.to_dict()), args.to_json_string(), repr(written)):
        assert "teacher.internal" not in text
        assert token not in text
    for whole in (args, copy.copy(args), copy.deepcopy(args)):
        assert (whole.teacher_server_url, whole.hub_token, whole.model_init_kwargs) == ([url], token, loading)
    assert args.to_dict()["teacher_server_url"] == "<TEACHER_SERVER_URL>"
    shown = {"token": "<TOKEN>", "dtype": "float32", "config": {"use_auth_token": "<USE_AUTH_TOKEN>"}}
    assert args.to_dict()["model_init_kwargs"] == shown
    pickled = pickle.loads(written)
    assert (pickled.teacher_server_url, pickled.model_init_kwargs) == (None, shown)


def everything_written(folder: Path) -> bytes:
    """The bytes of all files, those within zip archives, as torch saves, unpacked."""
    content = b""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content += path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content += b"".join(archive.read(name) for name in archive.namelist())
    return content


def test_secrets_are_in_no_checkpoint_log_or_model_card(
    make_model, tokenizer, dataset, tmp_path, monkeypatch, caplog, capfd
):
    """A run with a server that fails once and repeats the key in its words, to its checkpoint and its model card."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    caplog.set_level("DEBUG")
    proxy = FaultProxy(StandIn(make_model(2), tokenizer))
    settings = {**SETTINGS, "max_steps": 2, "save_steps": 1, "hub_token": "hf_0ther"}
    args = SGOPDConfig(str(tmp_path), teacher_server_url=proxy.url, temperature=1.0, **settings)
    trainer = SGOPDTrainer(make_model(1), None, args=args, train_dataset=dataset, processing_class=tokenizer)
    proxy.faults = ["503"]
    trainer.train()
    trainer.create_model_card()
    address = proxy.url.removeprefix("http://").encode()
    proxy.close()
    shown = capfd.readouterr()
    written = everything_written(tmp_path)
    assert b"teacher_server" in written  # the files are read as they should be
    for secret in (*SECRETS.values(), "hf_0ther"):
        assert secret.encode() not in written
        assert secret not in caplog.text + shown.out + shown.err
    assert address not in written


def test_a_key_that_a_server_repeats_is_not_shown(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", SECRETS["VLLM_API_KEY"])
    endpoints = Endpoints(["http://host:1"], 1.0, 1, 0)

    class Response:
        status_code, text = 401, f"bad key 'Bearer {SECRETS['VLLM_API_KEY']}'\n\x1b[31mfake log line"

    shown = endpoints._shown(Response)
    assert SECRETS["VLLM_API_KEY"] not in shown
    assert "<VLLM_API_KEY>" in shown
    assert shown.isprintable()
    with pytest.raises(TeacherServerError, match="No usable answer"):
        endpoints.ask("/health", lambda body: body)
