"""A think block that the prompt opened counts as opened, in training, for proposals and in an evaluation."""

import pytest
from scoring import Countdown
from trainers import Recorder, make_config
from transformers import TrainerState
from trl.chat_template_utils import parse_response, qwen3_template

from sg_opd import MathVerifier, score_rollout
from sg_opd.data import COLLECTED
from sg_opd.evaluation.engines import Completion, Sampling
from sg_opd.evaluation.evaluator import evaluate
from sg_opd.training.rollouts import Generated, Rollouts
from sg_opd.verifiers.thinking import opened, opening_of


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(workers=1)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|Assistant|><think>", "<think>"),
        ("... <thinking>\n\n", "<thinking>\n\n"),
        ("<|begin_of_thought|>\n", "<|begin_of_thought|>\n"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),  # Qwen3 with enable_thinking=False
        ("<|end_of_thought|>\n", ""),
        ("Write <think> before you answer.<|im_end|>\n<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n", ""),
        ("", ""),
    ],
)
def test_what_a_prompt_opens(prompt, opening):
    assert opening_of(prompt) == opening


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        (r"so it is \boxed{5}", 0.0),
        (r"maybe \boxed{4}</think>\boxed{5}", 1.0),
        (r"maybe \boxed{5}</think>\boxed{4}", 0.0),
        (r"maybe \boxed{5}</think> I do not know", 0.0),
        (r"<think>maybe \boxed{4}</think>\boxed{5}", 1.0),
        ("", 0.0),
    ],
)
@pytest.mark.parametrize("form", [str, lambda text: [{"role": "assistant", "content": text}]], ids=["text", "messages"])
def test_what_it_makes_of_completions(verifier, completion, verdict, form):
    assert verifier([opened("<think>\n", form(completion))], ["5"]) == [verdict]


def test_completions_are_left_alone_without_it():
    message = [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "2", "name": "x"}]
    assert opened("", message) is message
    assert opened("<think>", message) == [message[0], {"role": "assistant", "content": "<think>2", "name": "x"}]
    assert message[1]["content"] == "2"
    for other in ([], None, [{"role": "assistant", "content": None}]):
        assert opened("<think>", other) == other


@pytest.mark.parametrize(
    ("text", "whole", "seen"),
    [
        ("It is 5.", "It is 5.<eos>", "<think>It is 5."),
        ("4\nIt is 5.", "4</think>\nIt is 5.<eos>", "4\nIt is 5."),  # the delimiter is a special token
        ("It is 5.", "</think>It is 5.<eos>", "It is 5."),  # a parser dropped the empty block
        ("4</think>It is 5.", "4</think>It is 5.<eos>", "<think>4</think>It is 5."),
        ("4\nIt is 5.", "4</think>\nIt <think>is 5.<eos>", "<think>4\nIt is 5."),
        ("It is 5.", None, "<think>It is 5."),
    ],
)
def test_a_closing_delimiter_that_the_text_lost(text, whole, seen):
    assert opened("<think>", text, whole) == seen
    assert opened("<think>", [{"content": text}], whole) == [{"content": seen}]


@pytest.fixture
def thinking(tokenizer):
    """The tokenizer with think delimiters, and a template that opens a block; `opens=False` closes it again."""
    from problems import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    end = "{% if add_generation_prompt and opens is not defined %}<think>\n{% endif %}"
    tokenizer.chat_template += end + "{% if opens is defined %}<think>\n\n</think>\n\n{% endif %}"
    return tokenizer


class Script:
    """An engine that answers two known texts by turns."""

    seeds, context = "sample", 200

    def __init__(self, tokenizer):
        texts = [r"\boxed{5}", r"\boxed{4}</think>\boxed{5}"]
        self.answers = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]

    def describe(self):
        return {"engine": "script", "model": "none"}

    def generate(self, prompt_ids, seeds, sampling):
        return [Completion(self.answers[i % 2], "stop") for i in range(len(prompt_ids))]


@pytest.mark.parametrize(("template", "verdicts"), [({}, [0.0, 1.0]), ({"opens": False}, [1.0, 1.0])])
def test_an_evaluation(thinking, verifier, template, verdicts, tmp_path):
    """One sample of two thinks to its end; its completion stays as it was sampled. Unclosed, there is no answer."""
    rows = [{"prompt": [{"role": "user", "content": "Start with 5."}], "solution": "5"}]
    args = Sampling(20), 2, 2, 0, False, tmp_path, template
    result = evaluate(Script(thinking), thinking, rows, verifier, *args)
    assert result.figures["avg@2"].mean == 50 * sum(verdicts)
    assert result.figures["parsed"].mean == 50 * sum(verdicts)
    assert r'"completion": "\\boxed{5}"' in (tmp_path / "samples.jsonl").read_text()


def test_delimiters_that_are_special_tokens(thinking, verifier):
    """Neither the text of an evaluation nor that of a rollout has them: what counts is in the token ids."""
    thinking.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    rows = [{"prompt": [{"role": "user", "content": "Start with 5."}], "solution": "5"}]
    result = evaluate(Script(thinking), thinking, rows, verifier, Sampling(20), 2, progress=False)
    assert (result.figures["avg@2"].mean, result.figures["parsed"].mean) == (50, 50)

    prompt_ids = thinking.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=True)
    ids = Script(thinking).answers
    texts = thinking.batch_decode(ids, skip_special_tokens=True)
    assert texts == [r"\boxed{5}", r"\boxed{4}\boxed{5}"]
    generated = Generated([None] * 2, [], ids, [[{"role": "assistant", "content": text}] for text in texts], None)
    for ahead in (False, True):
        rollouts = Rollouts(rows * 2, verifier, TrainerState())
        rollouts.read_prompts(thinking, [prompt_ids["input_ids"]] * 2, None)
        if ahead:
            rollouts.grade_ahead(generated)
        assert rollouts.reward([None] * 2, generated.completions, ids, solution=["5", "5"]) == [0.0, 1.0]


class Seen(MathVerifier):
    def __init__(self):
        super().__init__(workers=1)
        self.completions = []

    def __call__(self, completions, solution, **kwargs):
        self.completions += [completion[-1]["content"] for completion in completions]
        return super().__call__(completions, solution, **kwargs)


@pytest.mark.parametrize("opens", [True, False], ids=["opened", "closed"])
def test_a_run(thinking, make_model, dataset, tmp_path, opens):
    """Rollouts, evaluation and collected proposals: the verifier gets them with the delimiter, the log without it. Of
    the proposals one leaves its block unclosed, and is endorsed only where the template closes it itself."""
    rows = dataset.select(range(2))
    boxed = [rf"\boxed{{{solution}}}" for solution in rows["solution"]]
    rows = rows.add_column(COLLECTED, [[answer, f"1</think>{answer}"] for answer in boxed])
    template = {} if opens else {"opens": False}
    args = make_config(
        tmp_path, temperature=1.0, teacher_phase_steps=10, teacher_phase_fraction=0.25, chat_template_kwargs=template,
        log_completions=True,
        generation_kwargs={"suppress_tokens": thinking.convert_tokens_to_ids(["<think>", "</think>"])},
    )  # fmt: skip
    verifier, student = Seen(), make_model(1, len(thinking))
    trainer = Recorder(student, Countdown(), verifier, args, rows, dataset.select(range(4)), processing_class=thinking)
    trainer.train()
    trained = len(verifier.completions)
    trainer.evaluate()
    verifier.close()
    assert trained > 8  # and the proposals
    assert len(verifier.completions) > trained
    assert {text.startswith("<think>") for text in verifier.completions} == {opens}
    assert not any(completion[-1]["content"].startswith("<think>") for completion in trainer._logs["completion"])
    taken = [
        thinking.decode(ids[mask.bool()], skip_special_tokens=True)
        for batch in trainer.batches
        for ids, mask, mine in zip(
            batch["completion_ids"], batch["completion_mask"], batch["from_teacher"], strict=True
        )
        if mine
    ]
    assert sorted(taken) == sorted(f"1</think>{answer}" if opens else answer for answer in boxed)


@pytest.mark.parametrize(("template", "verdict"), [({}, 0.0), ({"opens": False}, 1.0)])
def test_a_rollout_that_is_looked_at(thinking, make_model, verifier, template, verdict):
    row = {"prompt": [{"role": "user", "content": "Start with 5."}], "solution": "5"}
    models = make_model(1, len(thinking)), make_model(2, len(thinking))
    told = {"verifier": verifier, "chat_template_kwargs": template}
    view = score_rollout(*models, thinking, row, r"\boxed{5}", **told)
    assert view.verdict == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (r"\boxed{5}", 0.0),
        (r"\boxed{4}</think>\boxed{5}", 1.0),
        (r"\boxed{5}</think>", 0.0),
        (r"</think>\boxed{5}", 1.0),  # the parser splits nothing off, and drops the delimiter
    ],
)
@pytest.mark.parametrize("parsed", [False, True], ids=["as sampled", "parsed"])
def test_messages_that_grpo_parsed(thinking, verifier, text, verdict, parsed):
    """With a tokenizer that splits think blocks off, the content is what follows; the delimiter would hide it."""
    question = [{"role": "user", "content": "Start with 5."}]
    prompt_ids = thinking.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids, message = thinking(text)["input_ids"], {"role": "assistant", "content": text}
    if parsed:
        thinking.response_template = qwen3_template | {"start_anchor": "<|assistant|>"}
        message = parse_response(thinking, ids, prefix=prompt_ids)
        assert "<think>" not in message["content"]
        assert ("reasoning_content" in message) == (not text.startswith("</think>"))
    rollouts = Rollouts([{"solution": "5"}], verifier, TrainerState())
    rollouts.read_prompts(thinking, [prompt_ids], None)
    answers = {"prompts": [question], "completions": [[message]], "completion_ids": [ids], "solution": ["5"]}
    assert rollouts.reward(**answers) == [verdict]


def test_a_parser_that_leaves_a_cut_block_in_the_content(thinking, verifier):
    """As those of DeepSeek-R1 and Nemotron do: what is split off is told by the message, not by the tokenizer."""
    thinking.response_template = qwen3_template
    question = [{"role": "user", "content": "Start with 5."}]
    prompt_ids = thinking.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    cut = {"role": "assistant", "content": r"Try \boxed{5}, but wait"}
    whole = {"role": "assistant", "reasoning_content": "It is 5.", "content": r"\boxed{5}"}
    rollouts = Rollouts([{"solution": "5"}] * 2, verifier, TrainerState())
    rollouts.read_prompts(thinking, [prompt_ids] * 2, None)
    answers = {"completions": [[cut], [whole]], "completion_ids": [[1], [1]], "solution": ["5", "5"]}
    assert rollouts.reward(prompts=[question] * 2, **answers) == [0.0, 1.0]
