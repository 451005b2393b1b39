"""examples/sglang_teacher.py against an exchange that was written after SGLang's source, as the file says."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT
from fault_proxy import FaultProxy

from sg_opd.teachers import Teacher, TeacherServerError
from sg_opd.teachers import http as endpoints_module

sys.path.insert(0, str(ROOT / "examples"))
from sglang_teacher import SGLangTeacher

EXCHANGES = json.loads((Path(__file__).parent / "recorded" / "sglang.json").read_text())["exchanges"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoints_module, "BACKOFF_SECONDS", (0.01, 0.02))
    spoilt = []

    def answer(method, path, request):
        found = [known["answer"] for known in EXCHANGES if (known["path"], known["request"]) == (path, request)]
        assert len(found) == 1, (path, request)
        if spoilt:
            body = json.loads(json.dumps(found[0]))
            body["meta_info"]["input_token_logprobs"][-1] = spoilt.pop()
            return 200, json.dumps(body).encode()
        return 200, json.dumps(found[0]).encode()

    proxy = FaultProxy(answer)
    proxy.spoilt = spoilt
    yield proxy
    proxy.close()


def test_it_is_a_teacher_that_scores_completions_after_their_prompts(server):
    """The entry of the prompt's last token has no number and is not counted; an empty completion has no token."""
    teacher = SGLangTeacher(server.url, 4, [2])
    assert isinstance(teacher, Teacher)
    assert teacher.context == 40960
    scores = teacher.score([[5, 6], [9]], [[7, 8], []])
    torch.testing.assert_close(scores, [torch.tensor([math.log(0.5), math.log(0.1)]), torch.empty(0)])


def test_it_proposes_one_or_several_completions(server):
    teacher = SGLangTeacher(server.url, 4, [2])
    assert teacher.propose([[5, 6]], candidates=2) == [[[7, 2], [8, 9, 10, 11]]]
    assert teacher.propose([[5, 6]]) == [[[7, 2]]]


def test_answers_about_other_tokens_are_asked_for_again_and_then_refused(server):
    teacher = SGLangTeacher(server.url, 4, [2])
    server.spoilt.append([-1.0, 3, None])
    assert teacher.score([[5, 6]], [[7, 8]])[0][1].item() == pytest.approx(math.log(0.1))
    assert len(server.posts) == 2
    server.spoilt.extend([[-1.0, 3, None]] * 6)
    with pytest.raises(TeacherServerError, match="other tokens"):
        teacher.score([[5, 6]], [[7, 8]])
