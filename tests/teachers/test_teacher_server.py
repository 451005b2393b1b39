"""A teacher's server: what is asked and read, faults and retries, start-up checks, and training through it.

Against a stand-in on a real socket that answers from a model in this process; a real vLLM server is in test_vllm.py.
"""

import asyncio
import logging
import math
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from datasets import Dataset
from fault_proxy import FaultProxy, StandIn
from scoring import COMPLETIONS, PROMPTS, expected_logps
from trainers import coin_verifier, make_config

from sg_opd import SGOPDConfig, SGOPDTrainer
from sg_opd.teachers import http as endpoints_module
from sg_opd.teachers import probe, server
from sg_opd.teachers.http import Endpoints, TeacherServerError
from sg_opd.teachers.probe import logit_spacing, rounded_up
from sg_opd.teachers.protocol import Teacher, TeacherError, TopKTeacher
from sg_opd.teachers.server import ServerTeacher
from sg_opd.training import datasets

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 8}


@pytest.fixture(autouse=True)
def _quick_pauses(monkeypatch):
    monkeypatch.setattr(endpoints_module, "BACKOFF_SECONDS", (0.01, 0.02))


@pytest.fixture
def proxy(make_model, tokenizer):
    proxy = FaultProxy(StandIn(make_model(2), tokenizer))
    yield proxy
    proxy.close()


def teacher_at(*urls, timeout=20.0, concurrency=4, retries=2, model=None, eos=(2,)):
    teacher = ServerTeacher(Endpoints(urls, timeout, concurrency, retries), model, SAMPLING, frozenset(eos))
    teacher.connect()
    return teacher


def test_scores_are_the_models(proxy, make_model):
    teacher = teacher_at(proxy.url + "/v1/")
    assert isinstance(teacher, Teacher)
    assert (teacher.model, teacher.context) == ("served", 256)
    model = make_model(2)
    for got, prompt, completion in zip(teacher.score(PROMPTS, COMPLETIONS), PROMPTS, COMPLETIONS, strict=True):
        torch.testing.assert_close(got, expected_logps(model, prompt, completion), rtol=0, atol=2e-5)


def test_requests_are_chunked_bounded_and_in_order(proxy, make_model, monkeypatch):
    """Thirty completions of 1 to 5 tokens, an empty one among them: 8 sequences a request, 3 at a time."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    teacher = teacher_at(proxy.url, concurrency=3)
    completions = [[9 + i % 7] * (i % 6) for i in range(30)]
    proxy.posts.clear()
    scored = teacher.score([[3, 4]] * 30, completions)
    assert [len(row) for row in scored] == [i % 6 for i in range(30)]
    assert sorted(len(post["prompt"]) for post in proxy.posts) == [1, 8, 8, 8]
    assert proxy.most_in_flight <= 3
    assert all(headers["Authorization"] == "Bearer secret" for headers in proxy.headers)
    torch.testing.assert_close(scored[29], expected_logps(make_model(2), [3, 4], completions[29]), rtol=0, atol=2e-5)
    assert teacher.score([[3]], [[]])[0].shape == (0,)


def test_likeliest_ids_are_the_models(proxy, make_model, monkeypatch):
    """With the sampled token's score, whether it is among them or not; requests are of some 10 kB of answer each."""
    monkeypatch.setattr(server, "ANSWER_BYTES", 10_000)
    teacher, model = teacher_at(proxy.url), make_model(2)
    assert isinstance(teacher, TopKTeacher)
    proxy.posts.clear()
    prompts, completions = [*PROMPTS * 6, [3]], [*COMPLETIONS * 6, []]
    scored = teacher.score_top(prompts, completions, 6)
    assert [post["prompt_logprobs"] for post in proxy.posts] == [6] * len(proxy.posts)
    sizes = [sum(map(len, post["prompt"])) * 7 * server.ENTRY_BYTES for post in proxy.posts]
    assert len(sizes) > 4
    assert all(5_000 < size <= 10_000 for size in sizes[:-1])
    assert [part.shape for part in scored[-1]] == [(0,), (0, 6), (0, 6)]
    inside = set()
    for got, prompt, ids in zip(scored, prompts, completions, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for row, said, token in zip(logps, zip(*got, strict=True), ids, strict=False):
            assert said[0].item() == pytest.approx(row[token].item(), abs=2e-5)
            assert {*said[1].tolist()} == {*row.topk(6).indices.tolist()}
            torch.testing.assert_close(said[2], row[said[1]], rtol=0, atol=2e-5)
            inside.add(token in said[1])
    assert inside == {True, False}


def test_a_sequence_with_a_large_answer_is_a_request_of_its_own():
    """15,750 bytes a token with 209 likeliest ids, of 8 MiB: the second sequence goes with the third."""
    assert [len(chunk) for chunk in server.chunked([[3] * 500, [3] * 100, [3] * 100], 209)] == [1, 2]
    assert [len(chunk) for chunk in server.chunked([[3] * 5000] * 17, 0)] == [8, 8, 1]


def entry(**of):
    return {f"{token.removeprefix('id')}": {"logprob": logp} for token, logp in of.items()}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"id4": -1.0, "id5": -2.0, "id6": -3.0, "id7": -3.0}, "3 likeliest ids instead of 2"),
        ({"id4": -1.0}, "0 likeliest ids instead of 2"),
        ({"id4": -1.0, "id5": math.nan}, "not a finite number"),
    ],
    ids=["many", "few", "nan"],
)
def test_a_malformed_answer_with_likeliest_ids(entries, said):
    body = {"choices": [{"index": 0, "prompt_logprobs": [None, entry(**entries)]}]}
    with pytest.raises(ValueError, match=said):
        server._read_tops(2, [[3, 4]], body)


def test_several_urls_share_the_load_and_stand_in_for_each_other(proxy, make_model, tokenizer):
    other = FaultProxy(proxy.upstream)
    teacher = teacher_at(proxy.url, other.url, concurrency=2)
    whole = teacher.score(PROMPTS * 16, COMPLETIONS * 16)
    assert len(proxy.posts) == len(other.posts) == 3
    other.close()
    proxy.posts.clear()
    for got, want in zip(teacher.score(PROMPTS * 16, COMPLETIONS * 16), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert len(proxy.posts) == 6


STATUSES = ["429", "500", "502", "503"]
FAULTS = [*STATUSES, "refuse", "slow", "trickle", "drop", "truncated", "short", "shifted", "nan", "-inf"]
SAID = {"short": "log-probs for", "nan": "not a finite number", "-inf": "not a finite number", "trickle": "after 0.5 s"}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_ends_in_a_retry_or_in_the_error(fault, proxy, make_model):
    teacher = teacher_at(proxy.url, timeout=0.5 if fault in ("slow", "trickle") else 20.0)
    proxy.delay = 1.0
    proxy.faults = [fault, fault]
    scored = teacher.score(PROMPTS, COMPLETIONS)
    for got, prompt, completion in zip(scored, PROMPTS, COMPLETIONS, strict=True):
        torch.testing.assert_close(got, expected_logps(make_model(2), prompt, completion), rtol=0, atol=2e-5)
    assert len(proxy.posts) == 3
    proxy.faults = [fault] * 3
    with pytest.raises(TeacherServerError, match=rf"3 attempts.*{proxy.url}/v1/completions") as caught:
        teacher.score(PROMPTS, COMPLETIONS)
    assert SAID.get(fault, f"status {fault}" if fault.isdigit() else "") in str(caught.value)
    assert not proxy.faults


def test_a_server_that_is_not_there():
    with pytest.raises(TeacherServerError, match=r"2 attempts.*http://127\.0\.0\.1:9/health: ConnectError"):
        teacher_at("http://127.0.0.1:9", retries=1)


def test_the_first_failure_stops_the_other_requests(proxy):
    """Of 20 requests, 2 at a time, the first is refused for good: what had not begun is never sent."""
    teacher = teacher_at(proxy.url, concurrency=2)
    proxy.faults = ["400", *[None] * 19]
    proxy.posts.clear()
    with pytest.raises(TeacherServerError, match=r"refused the request with status 400: .*as the test asked"):
        teacher.score([[3]] * 160, [[4]] * 160)
    time.sleep(0.5)
    assert len(proxy.posts) <= 4


def test_a_failure_is_not_waited_for(proxy):
    """The second request is refused while the first one takes its time: the error comes at once and ends the rest."""
    teacher = teacher_at(proxy.url, concurrency=2)
    proxy.delay = 3.0
    proxy.faults = ["slow", "400"]
    proxy.posts.clear()
    start = time.monotonic()
    with pytest.raises(TeacherServerError, match="400"):
        teacher.score([[3]] * 160, [[4]] * 160)
    assert time.monotonic() - start < 2.0
    time.sleep(0.5)
    assert len(proxy.posts) <= 4


def test_an_interrupt_ends_the_questions(proxy):
    """Of 20 requests, 2 at a time, each takes its time: none is sent after the caller was interrupted."""
    teacher = teacher_at(proxy.url, concurrency=2)
    proxy.delay, proxy.faults = 1.0, ["slow"] * 20
    proxy.posts.clear()

    def interrupt():
        while len(proxy.posts) < 2:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        teacher.score([[3]] * 160, [[4]] * 160)
    time.sleep(1.5)
    assert len(proxy.posts) == 2


def test_a_caller_may_be_in_a_loop_of_its_own(proxy):
    """As a cell of a notebook is."""

    async def cell():
        return teacher_at(proxy.url).score(PROMPTS, COMPLETIONS)

    assert len(asyncio.run(cell())) == 3


IN_FLIGHT = """
import os, socket, sys, time
from sg_opd.teachers import Endpoints
address, hangs = sys.argv[1:]
ask = lambda path, *payload: Endpoints([address], 60, 2, 0).ask(path, lambda body: "fine", *payload)
ask("/health")
if not (child := os.fork()):
    os._exit(ask("/health") != "fine")
assert os.waitpid(child, 0)[1] == 0
if hangs == "name":
    socket.getaddrinfo = lambda *args, **kwargs: time.sleep(60)
print("asking", flush=True)
ask("/v1/completions", {})
"""


@pytest.mark.parametrize("hangs", ["answer", "name"])
def test_a_process_may_fork_and_be_interrupted(hangs, proxy):
    """The child of one that has asked may ask; an interrupt ends the process while an answer, or the look-up of the
    server's name, takes a minute."""
    proxy.delay, proxy.faults = 60.0, ["slow"]
    command = [sys.executable, "-c", IN_FLIGHT, proxy.url.replace("127.0.0.1", "localhost"), hangs]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ended = threading.Timer(120, process.kill)
        ended.start()
        try:
            assert process.stdout.readline() == "asking\n"
            time.sleep(1)
            assert len(proxy.posts) == (hangs == "answer")
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            ended.cancel()
            process.kill()
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "destroyed" not in said  # a task that nobody ended


def test_a_server_may_ask_for_the_longest_pause_and_not_for_a_day(proxy, monkeypatch):
    monkeypatch.setattr(endpoints_module, "BACKOFF_SECONDS", (0.01, 0.7))
    teacher = teacher_at(proxy.url)
    proxy.retry_after = "86400"
    proxy.faults = ["429"]
    start = time.monotonic()
    assert len(teacher.score(PROMPTS, COMPLETIONS)) == 3
    assert 0.7 <= time.monotonic() - start < 10


def test_a_sequence_beyond_the_context_is_not_sent(proxy):
    proxy.upstream.context = 10
    teacher = teacher_at(proxy.url)
    proxy.posts.clear()
    with pytest.raises(TeacherServerError, match="needs 11 tokens, one more included, of the 10"):
        teacher.score([[3] * 5], [[4] * 5])
    assert proxy.posts == []
    assert len(teacher.score([[3] * 5], [[4] * 4])[0]) == 4


def test_hints_for_keys_and_models(proxy):
    teacher = teacher_at(proxy.url)
    proxy.faults = ["401"]
    with pytest.raises(TeacherServerError, match="VLLM_API_KEY"):
        teacher.score(PROMPTS, COMPLETIONS)
    teacher.model = "another"
    with pytest.raises(TeacherServerError, match=r"404.*teacher_model_name_or_path"):
        teacher.score(PROMPTS, COMPLETIONS)


def test_the_served_model_is_found_or_named(proxy, make_model, tokenizer):
    with pytest.raises(ValueError, match=r"`teacher_model_name_or_path='x'` is not served by .* which has 'served'"):
        teacher_at(proxy.url, model="x")
    two = FaultProxy(StandIn(make_model(2), tokenizer, "base adapter", context=100))
    with pytest.raises(ValueError, match="serves 'base', 'adapter': set `teacher_model_name_or_path`"):
        teacher_at(two.url)
    assert teacher_at(two.url, model="adapter").model == "adapter"
    two.upstream.name = "other"
    with pytest.raises(ValueError, match=r"The servers hold different models \(other, served\)"):
        teacher_at(proxy.url, two.url)
    two.close()


def test_proposals_are_cut_at_the_first_eos_and_seeded(proxy, make_model):
    """Two prompts, three candidates: ids that end with EOS or at the limit; the same seed state asks the same."""
    teacher = teacher_at(proxy.url, eos=(9, 20, 14))
    proposals = []
    for _ in range(2):
        torch.manual_seed(5)
        proposals.append(teacher.propose(PROMPTS[:2], 3))
    assert proposals[0] == proposals[1]
    seeds = [post["seed"] for post in sorted(proxy.posts, key=lambda post: len(post["prompt"]))]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert [len(some) for some in proposals[0]] == [3, 3]
    assert len({tuple(ids) for some in proposals[0] for ids in some}) > 1
    for ids in (ids for some in proposals[0] for ids in some):
        ends = [token in (9, 20, 14) for token in ids]
        assert not any(ends[:-1])
        assert ends[-1] or len(ids) == SAMPLING["max_tokens"]
    post = proxy.posts[-1]
    assert {name: post[name] for name in SAMPLING} == SAMPLING
    assert post["stop_token_ids"] == [9, 14, 20]
    proxy.faults = ["short"] * 3  # of a sample: no tokens
    with pytest.raises(TeacherServerError, match="a sample that is no list of 1 to 8 token ids"):
        teacher.propose(PROMPTS[:1])


def test_logit_spacing():
    """bf16 keeps 8 bits: logits of 4 to 8 lie 2^-5 apart, their differences too; those of fp32 on no such grid."""
    torch.manual_seed(0)
    logits = 4 + 3.9 * torch.rand(40, 6)
    coarse = logits.bfloat16().float().log_softmax(-1)
    assert logit_spacing(coarse.tolist()) == 2**-5
    assert logit_spacing(logits.half().float().log_softmax(-1).tolist()) == 2**-8
    assert logit_spacing(logits.log_softmax(-1).tolist()) == 0.0
    assert logit_spacing([[-1.0]]) == 0.0


def test_rounded_up():
    assert [rounded_up(x) for x in (0.031, 0.03, 0.0016, 1.2)] == [0.04, 0.03, 0.002, 2.0]


@pytest.fixture
def build(proxy, make_model, tokenizer, dataset, tmp_path):
    def build(student=None, train_dataset=None, trainer=SGOPDTrainer, teacher=None, **overrides):
        settings = {"temperature": 1.0, "teacher_server_url": proxy.url, "teacher_server_retries": 2, **overrides}
        args = make_config(tmp_path, **settings)
        rows = dataset if train_dataset is None else train_dataset
        return trainer(student or make_model(1), teacher, coin_verifier, args, rows, processing_class=tokenizer)

    return build


def test_a_run_equals_one_with_the_teacher_in_process(build, make_model, tokenizer, dataset, tmp_path):
    served = build(max_steps=3)
    served.train()
    args = make_config(tmp_path, temperature=1.0, max_steps=3)
    local = SGOPDTrainer(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    local.train()
    for got, want in zip(served.model.parameters(), local.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert "Teacher: `served`\n" in served.args.card_section(served.teacher.name)


def test_a_run_with_likeliest_ids_equals_one_with_the_teacher_in_process(
    build, make_model, tokenizer, dataset, tmp_path, proxy
):
    settings = {"temperature": 1.0, "max_steps": 2, "estimator": "top_k", "teacher_top_k": 6}
    served = build(**settings)
    served.train()
    assert {post["prompt_logprobs"] for post in proxy.posts if "prompt_logprobs" in post} == {0, 5, 6}
    args = make_config(tmp_path, **settings)
    local = SGOPDTrainer(make_model(1), make_model(2), coin_verifier, args, dataset, processing_class=tokenizer)
    local.train()
    for got, want in zip(served.model.parameters(), local.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    shares = [run.state.log_history[0]["rest/teacher"] for run in (served, local)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)


def test_a_server_that_gives_too_few_likeliest_ids(build, proxy):
    """vLLM's own words, with what to do; the other checks ask for five."""
    proxy.upstream.max_logprobs = 5
    message = r"logprobs of 6, which is greater than max allowed: 5.*`teacher_top_k=6` needs a server that was started "
    with pytest.raises(TeacherError, match=message + "with --max-logprobs 6 or more"):
        build(estimator="top_k", teacher_top_k=6)
    build(estimator="top_k", teacher_top_k=5)
    proxy.upstream.max_logprobs = 4
    message = r"5, which is greater than max allowed: 4.*The check of its .* --max-logprobs 5 or more.*restart it so\. "
    with pytest.raises(TeacherError, match=message):
        build()


def test_proposals_of_a_server_take_their_slots(build):
    trainer = build(teacher_phase_steps=10, teacher_phase_fraction=0.5, teacher_candidates=16, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["teacher/slot_share"] == 0.5
    assert logged["teacher/endorsed"] > 0


@pytest.mark.parametrize("generations", [1, 2])
def test_a_dead_server_ends_the_run_after_a_checkpoint(generations, build, proxy, tmp_path):
    """Dead in the third step: the weights of step 2 are saved, and the resumed run ends as one never stopped does."""
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 2 // generations}
    whole = build(**settings)
    whole.train()
    before = {}

    class Killer(SGOPDTrainer):
        def training_step(self, *args, **kwargs):
            if self._step == 3 + generations and not before:  # in the third step's last generation
                before.update({name: value.clone() for name, value in self.model.state_dict().items()})
                proxy.faults = ["503"] * 1000
            return super().training_step(*args, **kwargs)

    trainer = build(trainer=Killer, **settings)
    message = rf"status 503.*The last good step is 2, saved in {tmp_path}/checkpoint-2"
    with pytest.raises(TeacherError, match=message):
        trainer.train()
    proxy.faults = []
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    resumed = build(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for got, want in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want)
    content = {path: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    again = build(**settings)
    proxy.faults = ["503"] * 1000
    with pytest.raises(TeacherError, match="The last good step is 2"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(path.read_bytes() == before for path, before in content.items())  # the only good one is left alone


def test_a_saved_step_is_not_saved_again(build, proxy, tmp_path):
    trainer = build(max_steps=4, save_strategy="steps", save_steps=1)

    saved = {}

    def kill(args, state, control, **kwargs):
        proxy.faults = ["503"] * 1000
        saved.update({path: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()})

    from transformers import TrainerCallback

    killer = TrainerCallback()
    killer.on_save = kill
    trainer.add_callback(killer)
    with pytest.raises(TeacherError, match=r"The last good step is 1, saved in"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert saved
    # a second save would hold the random state of the step that failed
    assert all(path.read_bytes() == content for path, content in saved.items())


def test_a_server_dead_from_the_start(build, proxy, tmp_path):
    trainer = build()
    proxy.faults = ["503"] * 1000
    with pytest.raises(TeacherError, match="No step was finished"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, r"`temperature=0\.7` and `teacher_server_url`"),
        ({"estimator": "full"}, r"estimator='full' needs the teacher's whole distributions"),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "`teacher_model_init_kwargs` is for loading"),
        ({"teacher_server_url": "127.0.0.1:8000"}, "must hold URLs as http://host:8000"),
        ({"teacher_server_url": "http://host:80a0"}, "must hold URLs as http://host:8000"),
        ({"teacher_server_url": []}, "must hold URLs as http://host:8000"),
        ({"teacher_server_timeout": 0}, "`teacher_server_timeout` must be > 0"),
        ({"teacher_server_concurrency": 0}, "`teacher_server_concurrency` must be >= 1"),
        ({"teacher_server_retries": -1}, "`teacher_server_retries` must be >= 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_with_a_server(settings, message, tmp_path):
    base = {"temperature": 1.0, "teacher_server_url": "http://127.0.0.1:9", "bf16": False, "use_cpu": True}
    with pytest.raises(ValueError, match=message):
        SGOPDConfig(str(tmp_path), **{**base, **settings})


def test_a_model_and_a_server_are_one_teacher_too_many(build, make_model):
    with pytest.raises(ValueError, match="`teacher_server_url` has the teacher already"):
        build(teacher=make_model(2))


def test_a_prompt_beyond_the_servers_context_is_refused(build, proxy, make_model, tokenizer):
    proxy.upstream.context = 40
    with pytest.raises(ValueError, match=r"pass the 40 of the teacher's server: start it with --max-model-len \d+"):
        build(max_completion_length=30)


def test_another_vocabulary_is_refused(build, proxy):
    class Reversed:
        def decode(self, ids):
            return proxy_tokenizer.decode([26 - ids[0]])

    proxy_tokenizer = proxy.upstream.tokenizer
    proxy.upstream.tokenizer = Reversed()
    with pytest.raises(ValueError, match=r"has another vocabulary: \d+ of \d+ probed ids decode differently"):
        build()


def test_every_row_that_may_be_too_long_is_checked(build, proxy, dataset, monkeypatch):
    """The only long prompt is one that the evenly spread rows leave out."""
    monkeypatch.setattr(datasets, "ROWS_CHECKED", 4)
    rows = [{**row, "prompt": [{"role": "user", "content": "Start with 3"}]} for row in dataset]
    proxy.upstream.context = 60
    build(train_dataset=Dataset.from_list(rows))
    rows[5]["prompt"] = [{"role": "user", "content": "1" * 50}]
    with pytest.raises(ValueError, match=r"The longest prompt in `train_dataset` \(\d\d tokens\).*pass the 60 of"):
        build(train_dataset=Dataset.from_list(rows))


def test_added_tokens_are_probed_however_large_the_vocabulary(build, proxy, monkeypatch, tokenizer):
    """Siblings of one family decode all ids alike but those that one of them added."""

    class Sibling:
        def decode(self, ids):
            return "<|other|>" if ids == [tokenizer.unk_token_id] else tokenizer.decode(ids)

    monkeypatch.setattr(probe, "PROBE_TOKENS", 5)
    proxy.upstream.tokenizer = Sibling()
    with pytest.raises(ValueError, match=r"another vocabulary: 1 of \d+ probed ids decode differently, first 4"):
        build()


def test_ranks_that_wait_less_than_a_question_takes(caplog):
    """Three attempts of 240 s each."""
    with caplog.at_level(logging.WARNING, logger="sg_opd"):
        probe.check_patience(longest=720, ranks_wait=720)
        assert caplog.text == ""
        probe.check_patience(longest=720, ranks_wait=60)
    assert "may take 720 s, but ranks wait 60 s for each other" in caplog.text


def warnings_of(build, caplog, **settings):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sg_opd"):
        build(**settings)
    return " ".join(record.getMessage() for record in caplog.records if record.name == "sg_opd.teachers.probe")


def test_the_checks_of_a_good_server_warn_of_nothing(build, caplog):
    assert warnings_of(build, caplog) == ""


def test_what_the_checks_warn_of(build, proxy, make_model, caplog):
    upstream = proxy.upstream
    upstream.noise = 0.02
    assert "scores the same tokens 0.02 nats apart when asked twice" in warnings_of(build, caplog)
    upstream.noise, upstream.rounding = 0.0, torch.bfloat16
    text = warnings_of(build, caplog)
    assert "works at a precision of about" in text
    zone = float(text.split("gate_dead_zone=")[1].split(",")[0])
    assert 2**-8 <= zone <= 2**-2
    assert warnings_of(build, caplog, gate_dead_zone=zone) == ""
    upstream.rounding, upstream.end = None, 5
    assert "ends its completions with token 5" in warnings_of(build, caplog)
    upstream.end = None
    assert "scores as the student does" in warnings_of(build, caplog, student=make_model(2))
    upstream.rounding = torch.bfloat16
    assert "scores as the student does" in warnings_of(build, caplog, student=make_model(2), gate_dead_zone=0.5)
