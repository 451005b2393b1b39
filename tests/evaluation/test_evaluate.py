"""Evaluations with known completions, on tiny models, stopped half-way, and repeated."""

import itertools
import json
import math

import pytest
import torch
from fault_proxy import FaultProxy, StandIn

from sg_opd import MathVerifier
from sg_opd.evaluation.engines import Completion, Sampling, ServerEngine
from sg_opd.evaluation.evaluator import derived, evaluate, evaluate_model
from sg_opd.evaluation.results import EvaluationResult, weights_checksum
from sg_opd.teachers import http as endpoints


class Script:
    """An engine that answers known texts, in turn, and keeps what it was asked."""

    context = 200

    def __init__(self, tokenizer, texts, seeds="sample", eos=True):
        self.tokenizer, self.texts, self.seeds = tokenizer, iter(texts), seeds
        self.asked = []

    def describe(self):
        return {"engine": "script", "model": "none"}

    def generate(self, prompt_ids, seeds, sampling):
        self.asked.append((prompt_ids, seeds))
        texts = list(itertools.islice(self.texts, len(prompt_ids)))
        ends = ["length" if text.endswith("=") else "stop" for text in texts]
        eos = {"stop": [self.tokenizer.eos_token_id], "length": []}
        return [Completion(self.tokenizer(t)["input_ids"] + eos[e], e) for t, e in zip(texts, ends, strict=True)]


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(workers=1)
    yield verifier
    verifier.close()


@pytest.fixture
def rows():
    solutions = ["5", "7", None]
    return [{"id": f"q{i}", "prompt": "Start with 5", "solution": solution} for i, solution in enumerate(solutions)]


def by_parity(prompts, completions, completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


def box(number):
    return rf"\boxed{{{number}}}"


def test_known_completions_give_the_known_figures(tokenizer, verifier, rows):
    """q0: 5, 5, 4 and one cut off, so c = 2 of 4; q1: a wrong majority, c = 1; q2 has none, so all abstain.

    avg = (50 + 25 + 0) / 3; pass@2 = (5/6 + 1/2 + 0) / 3; maj = (1 + 0 + 0) / 3; parsed = 11 of 12.
    """
    texts = [box(5), box(5), box(4), "5+5=", box(7), box(8), box(8), box(8), *[box(1)] * 4]
    engine = Script(tokenizer, texts)
    result = evaluate(engine, tokenizer, rows, verifier, Sampling(20), 4, batch_size=5, progress=False, task="mine")
    lengths = [len(tokenizer(text)["input_ids"]) + (not text.endswith("=")) for text in texts]
    assert result.means() == pytest.approx(
        {
            "avg@4": 25.0,
            "pass@1": 25.0,
            "pass@2": 100 * (5 / 6 + 1 / 2) / 3,
            "pass@4": 200 / 3,
            "maj@4": 100 / 3,
            "parsed": 1100 / 12,
            "abstained": 100 / 3,
            "truncated": 100 / 12,
            "tokens": sum(lengths) / 12,
        }
    )
    assert [(q.id, q.correct, q.abstained, q.truncated) for q in result.questions] == [
        ("q0", 2, 0, 1),
        ("q1", 1, 0, 0),
        ("q2", 0, 4, 0),
    ]
    assert [len(prompts) for prompts, _ in engine.asked] == [5, 5, 2]
    assert result.settings["task"] == "mine"
    assert result.provenance["example_prompt"] == "Start with 5"
    assert result.provenance["versions"]["torch"] == torch.__version__


def test_seeds_are_of_samples_or_of_batches(tokenizer, verifier, rows):
    """Of each sample: its own, whatever the batches are. Of batches: one a batch. None repeats."""
    asked = {}
    for kind, size in (("sample", 5), ("sample", 12), ("batch", 5)):
        engine = Script(tokenizer, [box(5)] * 12, kind)
        evaluate(engine, tokenizer, rows, verifier, Sampling(20), 4, size, seed=3, progress=False)
        asked[kind, size] = [list(seeds) for _, seeds in engine.asked]
    flat = [*itertools.chain(*asked["sample", 5])]
    assert flat == asked["sample", 12][0] == [derived(3, q, s) for q in range(3) for s in range(4)]
    assert len(set(flat)) == 12
    assert asked["batch", 5] == [[derived(3, 0)] * 5, [derived(3, 1)] * 5, [derived(3, 2)] * 2]
    assert len({derived(3, 0), derived(3, 1), derived(4, 0)}) == 3


def test_evaluate_model(make_model, tokenizer, dataset):
    """A verifier that knows the third question only: 4 of 4 there; random state and training mode are untouched."""
    rows = dataset.select(range(3))

    def knows_the_third(prompts, completions, completion_ids, solution, **kwargs):
        assert all(isinstance(c[0]["content"], str) for c in completions)
        return [1.0 if s == rows[2]["solution"] else (0.0 if s == rows[0]["solution"] else None) for s in solution]

    model = make_model(1).train()
    before = torch.get_rng_state()
    result = evaluate_model(model, tokenizer, rows, knows_the_third, 4, 8, batch_size=5, progress=False)
    assert torch.get_rng_state().equal(before)
    assert model.training
    assert (result.num_questions, result.num_samples) == (3, 4)
    means = result.means()
    assert [means[name] for name in ("avg@4", "pass@4", "abstained")] == pytest.approx([100 / 3] * 3)
    assert 0 < means["tokens"] <= 8
    error = math.sqrt(((100 - 100 / 3) ** 2 + 2 * (100 / 3) ** 2) / 2 / 3)
    assert result.figures["avg@4"].standard_error == pytest.approx(error)


def test_a_checkpoints_own_sampling_settings_do_not_count(make_model, tokenizer, dataset):
    """transformers fills what a generation config leaves out from the checkpoint's, which would change the figures."""
    plain, narrow = make_model(1), make_model(1)
    narrow.generation_config.update(top_p=0.1, min_p=0.5, repetition_penalty=2.0, top_k=1, eos_token_id=None)
    for temperature in (1.0, 0.0):
        runs = [
            evaluate_model(model, tokenizer, dataset, by_parity, 2, 8, temperature, progress=False)
            for model in (plain, narrow)
        ]
        assert runs[0].questions == runs[1].questions


def test_sampling_settings_reach_the_model(make_model, tokenizer, dataset, tmp_path):
    """top_k=1 and a tiny top_p are greedy, as temperature 0 is; the whole distribution is not."""
    texts = {}
    for name, settings in {"greedy": {"temperature": 0.0}, "k": {"top_k": 1}, "p": {"top_p": 1e-6}, "all": {}}.items():
        folder = tmp_path / name
        evaluate_model(
            make_model(1), tokenizer, dataset, by_parity, 2, 8, progress=False, output_dir=folder, **settings
        )
        lines = (folder / "samples.jsonl").read_text().splitlines()
        texts[name] = [json.loads(line)["completion"] for line in lines]
    assert texts["greedy"] == texts["k"] == texts["p"] != texts["all"]


@pytest.mark.parametrize(
    "name", ["max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"]
)
def test_sampling_out_of_range_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        Sampling(**{name: -1})


def run(folder, make_model, tokenizer, dataset, verifier=by_parity, seed=3, **settings):
    given = {"batch_size": 7, "progress": False, "output_dir": folder, **settings}
    model = make_model(1)
    torch.seed()  # what the caller's generator has seen does not count
    return evaluate_model(model, tokenizer, dataset, verifier, 2, 8, seed=seed, **given)


def test_one_seed_gives_identical_files(make_model, tokenizer, dataset, tmp_path):
    results = [
        run(tmp_path / name, make_model, tokenizer, dataset, seed=s) for name, s in (("a", 3), ("b", 3), ("c", 4))
    ]
    files = [(tmp_path / name / "samples.jsonl").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    assert results[0].questions == results[1].questions
    lines, others = ([json.loads(line) for line in some.splitlines()] for some in (files[0], files[2]))
    assert [line["completion"] for line in lines] != [line["completion"] for line in others]
    assert [(line["question_id"], line["sample_id"]) for line in lines] == [(str(i // 2), i % 2) for i in range(32)]
    assert [line["seed"] for line in lines[6:8]] == [derived(3, 0), derived(3, 1)]
    for line in lines:
        assert (line["finish_reason"] == "length") <= (line["num_tokens"] == 8)
        assert line["verdict"] in (0.0, 1.0)


class CrashError(Exception):
    pass


@pytest.mark.parametrize("damage", ["none", "half a line", "half a batch", "all but the end of a batch"])
def test_a_stopped_run_resumes_as_if_it_had_not(make_model, tokenizer, dataset, tmp_path, damage):
    """The verifier crashes in the third of five batches: two stay, the error is the verifier's, the rest is as ever."""
    whole = run(tmp_path / "whole", make_model, tokenizer, dataset)
    folder, calls = tmp_path / "stopped", []

    def crashes(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        if len(calls) == 3:
            raise CrashError
        return by_parity(completion_ids=completion_ids, **kwargs)

    crashes.__name__ = "by_parity"
    with pytest.raises(CrashError):
        run(folder, make_model, tokenizer, dataset, crashes)
    path = folder / "samples.jsonl"
    full = (tmp_path / "whole" / "samples.jsonl").read_bytes()
    lines = full.splitlines(keepends=True)
    assert path.read_bytes() == b"".join(lines[:14])
    assert not (folder / "result.json").exists()
    with path.open("ab") as stream:
        left = {"none": 0, "half a line": 1, "half a batch": 4, "all but the end of a batch": 7}[damage]
        stream.write(b"".join(lines[14 : 14 + left])[: -5 if "line" in damage or "end" in damage else None])
    resumed = run(folder, make_model, tokenizer, dataset, crashes)
    assert calls == [7, 7, 7, 7, 7, 4]
    assert path.read_bytes() == full
    assert (resumed.questions, resumed.figures, resumed.settings) == (whole.questions, whole.figures, whole.settings)
    assert EvaluationResult.from_json(folder / "result.json") == resumed


def test_a_finished_run_is_not_run_again(make_model, tokenizer, dataset, tmp_path):
    first = run(tmp_path, make_model, tokenizer, dataset)
    (tmp_path / "samples.jsonl").unlink()
    assert run(tmp_path, make_model, tokenizer, dataset) == first
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, r"another `seed`: 3 there, 4 now\. Choose another `output_dir`"),
        ({"batch_size": 8}, "another `batch_size`: 7 there, 8 now"),
        ({"temperature": 0.5}, r"another `temperature`: 1\.0 there, 0\.5 now"),
        ({"verifier": lambda **_: []}, "another `verifier`: 'by_parity' there, '<lambda>' now"),
    ],
)
def test_a_run_with_other_settings_is_refused(make_model, tokenizer, dataset, tmp_path, change, words):
    run(tmp_path, make_model, tokenizer, dataset)
    with pytest.raises(ValueError, match=words):
        run(tmp_path, make_model, tokenizer, dataset, **change)


def test_other_weights_questions_and_prompts_are_refused(make_model, tokenizer, dataset, tmp_path):
    """A checkpoint that was trained on under the same name, another reference answer."""
    run(tmp_path, make_model, tokenizer, dataset)
    with pytest.raises(ValueError, match="another `weights`"):
        evaluate_model(make_model(2), tokenizer, dataset, by_parity, 2, 8, seed=3, batch_size=7, output_dir=tmp_path)
    rows = dataset.to_list()
    rows[3]["solution"] = "another"
    with pytest.raises(ValueError, match="another `dataset_sha256`"):
        run(tmp_path, make_model, tokenizer, rows)


def test_a_file_of_two_runs_is_refused(make_model, tokenizer, dataset, tmp_path):
    run(tmp_path, make_model, tokenizer, dataset)
    (tmp_path / "result.json").unlink()
    path = tmp_path / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:7], *lines[:7]]))
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 8: not the sample of this place"):
        run(tmp_path, make_model, tokenizer, dataset)
    path.write_text("".join([*lines[:3], "{}\n", *lines[4:7]]))
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 4: a Sample lacks 'answer'"):
        run(tmp_path, make_model, tokenizer, dataset)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has results but no settings\.json"):
        run(tmp_path, make_model, tokenizer, dataset)


def test_the_checksum_sees_one_changed_weight(make_model):
    model, same = make_model(1), make_model(1)
    assert weights_checksum(model) == weights_checksum(same)
    with torch.no_grad():
        same.lm_head.weight[0, 0] *= 1.01
    assert weights_checksum(model) != weights_checksum(same)


def test_a_verdict_is_checked_as_in_training(make_model, tokenizer, dataset):
    def graded(prompts, completions, **kwargs):
        return [0.5 for _ in completions]

    with pytest.raises(ValueError, match=r"graded answered 0\.5 for row 0"):
        evaluate_model(make_model(1), tokenizer, dataset, graded, 1, 2, progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": []}, "empty"),
        ({"num_samples": 0}, "`num_samples` must be >= 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be >= 1, got 0"),
        ({"max_completion_length": 256}, r"The question '\d+' needs \d+ tokens .* room for 256: lower `max_completion"),
        ({"dataset": [{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}]}, "several rows with the `id` '1'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(make_model, tokenizer, dataset, change, words):
    given = {"dataset": dataset, "num_samples": 1, "max_completion_length": 8, **change}
    with pytest.raises(ValueError, match=words):
        evaluate_model(make_model(1), tokenizer, verifier=by_parity, **given)


def test_settings_of_the_template_reach_it(make_model, tokenizer, dataset):
    """A template that knows a switch: another value is another prompt, and another hash of the prompts."""
    import copy

    switching = copy.deepcopy(tokenizer)
    switching.chat_template = "{{ messages[0].content }}{% if think %}={% endif %}"
    results = [
        evaluate_model(
            make_model(1), switching, dataset, by_parity, 1, 2, progress=False, chat_template_kwargs={"think": think}
        )
        for think in (True, False)
    ]
    assert [r.provenance["example_prompt"][-1] == "=" for r in results] == [True, False]
    assert results[0].settings["prompts_sha256"] != results[1].settings["prompts_sha256"]
    assert results[0].settings["chat_template_sha256"] == results[1].settings["chat_template_sha256"]


@pytest.fixture
def server(make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(endpoints, "BACKOFF_SECONDS", (0.01, 0.02))
    proxy = FaultProxy(StandIn(make_model(1), tokenizer))
    yield proxy
    proxy.close()


def test_a_server_samples_as_it_is_told(server, tokenizer, dataset, tmp_path):
    """Token ids in, all sampling settings said, a seed a sample; the same files twice, through faults as without."""
    files = []
    for name, faults in (("plain", []), ("faulty", ["500", None, "truncated", "short", "refuse"])):
        server.faults, server.posts[:] = list(faults), []
        engine = ServerEngine([server.url], tokenizer, concurrency=2, retries=6)
        sampling = Sampling(8, 0.7, 0.9, 5)
        rows = dataset.select(range(3))
        result = evaluate(engine, tokenizer, rows, by_parity, sampling, 2, 4, 3, False, tmp_path / name)
        assert server.faults == []
        files.append((tmp_path / name / "samples.jsonl").read_bytes())
    assert files[0] == files[1]
    assert len(server.posts) == 6 + 4
    ids = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    said = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 8}
    said |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    said |= {"model": "served", "stop_token_ids": [tokenizer.eos_token_id], "return_token_ids": True}
    assert {**said, "prompt": ids, "seed": derived(3, 0, 1)} in server.posts
    assert result.settings["engine"] == "vllm-server"
    assert result.settings["model"] == "served"


def test_a_server_that_cannot_serve_is_named(server, tokenizer, dataset):
    with pytest.raises(ValueError, match=rf"`served_model='mine'` is not served by {server.url}, which has 'served'"):
        ServerEngine([server.url], tokenizer, "mine")
    engine = ServerEngine([server.url], tokenizer, retries=1)
    with pytest.raises(ValueError, match=r"room for 256: lower `max_completion_length` \(now 250"):
        evaluate(engine, tokenizer, dataset, by_parity, Sampling(250), 1)
    server.faults = ["503"] * 10
    with pytest.raises(endpoints.TeacherServerError, match="No usable answer from the server in 2 attempts"):
        evaluate(engine, tokenizer, dataset.select([0]), by_parity, Sampling(4), 1, progress=False)
