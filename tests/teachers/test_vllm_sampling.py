"""vLLM on the CPU, given checkpoints whose generation_config.json would have it sample otherwise: it does not count.

Where there is no vLLM environment these tests are skipped with the reason; CI fails on that skip.
"""

import json
import shutil

import pytest
import torch
from documents import ROOT
from transformers import AutoTokenizer
from vllm_server import VLLMServer, run, vllm_python

from sg_opd import MathVerifier
from sg_opd.data import load_data
from sg_opd.evaluation.engines import Sampling, ServerEngine
from sg_opd.evaluation.evaluator import evaluate, tokenize_prompts
from sg_opd.teachers.http import Endpoints
from sg_opd.teachers.sampling import SERVED
from sg_opd.teachers.server import ServerTeacher

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
STUDENT = ROOT / "examples" / "arithmetic" / "student"
SUPPORT = ROOT / "tests" / "support"
# all that vLLM reads of a file, each by itself enough to change what is sampled
LEAK = {"temperature": 0.3, "top_k": 2, "top_p": 0.5, "min_p": 0.9, "repetition_penalty": 1.5}
LEAK |= {"presence_penalty": 1.5, "frequency_penalty": 1.5, "max_new_tokens": 5, "do_sample": True}


@pytest.fixture
def spoiled(tmp_path):
    folder = tmp_path / "spoiled"
    shutil.copytree(STUDENT, folder)
    path = folder / "generation_config.json"
    own = json.loads(path.read_text())
    del own["_from_model_config"]  # with it transformers drops what it does not know itself, such as vLLM's penalties
    path.write_text(json.dumps(own | LEAK))
    return folder


def test_requests_state_all_that_a_server_would_fill_in():
    """By the table of the installed vLLM itself."""
    code = (
        "from vllm.entrypoints.openai.completion.protocol import CompletionRequest as R;"
        "import json; print(json.dumps([*R._DEFAULT_SAMPLING_PARAMS.default]))"
    )
    ended = run([vllm_python(), "-c", code])
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert set(json.loads(ended.stdout.splitlines()[-1])) == {"temperature", *SERVED}


def test_a_server_samples_as_one_of_a_clean_checkpoint(spoiled, tmp_path):
    """Evaluation, the teacher's proposals and TRL's client for the student, with one seed each."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    rows, verifier = load_data(str(STUDENT.parent / "data"), "test").select(range(20)), MathVerifier(workers=1)
    prompts = tokenize_prompts(tokenizer, rows["prompt"])
    found = {}
    for model in (STUDENT, spoiled):
        folder = tmp_path / f"of {model.name}"
        folder.mkdir()
        with VLLMServer(model, folder / "log", "--dtype", "float32") as server:
            url = server.wait().url
            evaluate(ServerEngine([url], tokenizer), tokenizer, rows, verifier, Sampling(48), 4, 80, 7, False, folder)
            stated = {"temperature": 1.0, "max_tokens": 48}
            teacher = ServerTeacher(Endpoints([url], 240, 8, 2), None, stated, frozenset([tokenizer.eos_token_id]))
            teacher.connect()
            torch.manual_seed(0)
            proposals = teacher.propose(prompts[:8], 2)
            ended = run([vllm_python(), SUPPORT / "client_worker.py", folder, url])
            assert ended.returncode == 0, ended.stderr[-3000:]
        samples = (folder / "samples.jsonl").read_text()
        found[model.name] = samples, proposals, json.loads((folder / "client.json").read_text())
    verifier.close()
    for clean, leaking in zip(*found.values(), strict=True):
        assert clean == leaking
    assert max(len(ids) for ids in found["student"][2]) > 5


def test_the_offline_engine_samples_as_that_of_a_clean_checkpoint(spoiled, tmp_path):
    """And says what it leaves out."""
    for name, model in (("clean", STUDENT), ("leaking", spoiled)):
        ended = run([vllm_python(), SUPPORT / "offline_worker.py", tmp_path / name, model])
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ("generation_config.json of the model sets" in ended.stderr) == (name == "leaking")
    for value in ("temperature=0.3", "min_p=0.9", "presence_penalty=1.5"):
        assert value in ended.stderr
    files = [(tmp_path / name / "first" / "samples.jsonl").read_bytes() for name in ("clean", "leaking")]
    assert files[0] == files[1]


def test_a_colocated_engine_samples_as_that_of_a_clean_checkpoint(tmp_path):
    found = []
    for name, settings in (("clean", {}), ("leaking", LEAK)):
        (tmp_path / name).mkdir()
        ended = run([vllm_python(), SUPPORT / "colocate_worker.py", tmp_path / name, json.dumps(settings)])
        assert ended.returncode == 0, ended.stderr[-3000:]
        found.append(json.loads((tmp_path / name / "result.json").read_text())["completion_ids"])
    assert found[0] == found[1]
