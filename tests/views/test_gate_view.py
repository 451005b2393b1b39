"""One rollout made visible: its values, what is shown of hostile text, in a terminal and in a real browser."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from documents import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sg_opd import SignGatedLoss, inspect_rollout, load_gate_samples, score_rollout
from sg_opd.views.gate_view import RolloutView, render_page
from sg_opd.views.texts import token_texts, visible

HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "comment": "<!--<script>",
    "image": "<img src=x onerror=alert(1)>",
    "template": "$css ${js} {{ 7*7 }}",
    "ansi": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "c1": "\x9b31m",
    "override": " \u202eevil\u202c",
    "isolate": "\u2067x\u2069",
    "surrogate": "\ud800",
    "separator": "a\u2028b",
    "markup": "[red]x[/red] [link=https://example.org]y[/link]",
    "null": "\x00",
}


def three(verdict=1.0, **more):
    """delta is +0.6, -0.5 and 0."""
    return inspect_rollout(["one", " two", "\n"], [-1.0, -2.0, -0.5], [-0.4, -2.5, -0.5], verdict, **more)


def test_the_sign_in_a_group_decides(tmp_path):
    """An incorrect rollout of a uniform group is neutral throughout; of a mixed one it is as its verdict says. GRPO's
    advantage, -2, is added a tenth: 0.6 - 0.2, -0.5 - 0.2 and -0.2."""
    gate = SignGatedLoss(signal="group", advantage_weight=0.1)
    uniform, mixed = (three(0.0, gate=gate, sign=sign, group_advantage=-2.0) for sign in (0.0, -1.0))
    assert uniform.cases == [0, 0, 0]
    assert uniform.decision.advantage[0].tolist() == pytest.approx([0.4, -0.7, -0.2])
    assert mixed.cases == three(0.0).cases == [-1, 1, 0]
    assert "incorrect, sign 0 in its group" in uniform.headline()
    assert "sign -1 in its group" in mixed.headline()
    assert "in its group" not in three(0.0, sign=0.0).headline()
    assert "in its group" not in three(0.0, gate=gate).headline()
    assert RolloutView.from_json(uniform.to_json()) == uniform
    assert uniform.page_data()["sign"] == 0.0


def hostile_view(**more):
    texts = [*HOSTILE.values(), "\n", " السلام", " عليكم", "\n", "", "é"]
    logps = [-1.0] * len(texts)
    teacher = [-0.5 if i % 2 else -2.0 for i in range(len(texts))]
    everything = " ".join(HOSTILE.values())
    return inspect_rollout(texts, logps, teacher, 0.0, prompt=everything, gold=everything, source="teacher", **more)


@pytest.mark.parametrize("verdict", [1.0, 0.0, None])
def test_three_tokens_by_hand(verdict):
    """Deltas +0.6, -0.5, 0. Correct: consensus (1.8 * 0.6 = 1.08), conflict (1 * -0.5), neutral. Incorrect: the first
    two change places, so 0.6 and 1.8 * -0.5 = -0.9. Abstained: all neutral. Mean factors 3.8 / 3, 3.8 / 3 and 1."""
    view = three(verdict)
    cases, factors, advantages = {
        1.0: ([1, -1, 0], [1.8, 1.0, 1.0], [1.08, -0.5, 0.0]),
        0.0: ([-1, 1, 0], [1.0, 1.8, 1.0], [0.6, -0.9, 0.0]),
        None: ([0, 0, 0], [1.0, 1.0, 1.0], [0.6, -0.5, 0.0]),
    }[verdict]
    assert view.cases == cases
    assert view.decision.delta[0].tolist() == pytest.approx([0.6, -0.5, 0.0])
    assert view.decision.factor[0].tolist() == pytest.approx(factors)
    assert view.decision.advantage[0].tolist() == pytest.approx(advantages)
    assert view.teacher_logps == (-0.4, -2.5, -0.5)  # short, not float32's digits in double precision
    assert view.levels == [2, 2, 0]  # 0.6 and 0.5 nats are at or above 0.1 and 0.5, below 1
    assert view.summary["gate/factor"] == pytest.approx(sum(factors) / 3)
    for name, case in (("consensus", 1), ("conflict", -1), ("neutral", 0)):
        assert view.summary[f"gate/{name}"] == pytest.approx(cases.count(case) / 3)
    data = view.page_data()
    assert data["cases"] == "".join({1: "+", -1: "-", 0: "0"}[case] for case in cases)
    assert data["delta"] == [0.6, -0.5, 0.0]
    assert data["advantage"] == advantages


def test_settings_reference_and_untrained_tokens():
    """Dead zone 0.55: the second is neutral. Initial reference -1.4 and clip 0.7: the first gets clip(0.6) + 0.8 *
    clip(-0.4 + 1.4 = 1.0) = 0.6 + 0.56 = 1.16. The last is not trained on: shares over two tokens."""
    gate = SignGatedLoss(extrapolation=1.8, interpolation=1.0, dead_zone=0.55, log_ratio_clip=0.7)
    view = three(gate=gate, reference_logps=torch.tensor([-1.4, -2.0, -0.5]), trained=[True, True, False])
    assert view.cases == [1, 0, None]
    assert view.decision.advantage[0].tolist() == pytest.approx([1.16, -0.5, 0.0])
    assert view.summary["gate/consensus"] == pytest.approx(0.5)
    assert view.page_data()["cases"] == "+0."
    assert view.page_data()["reference"] == [-1.4, -2.0, -0.5]


def test_the_full_estimator_shows_no_advantage():
    assert "advantage" not in three(gate=SignGatedLoss(estimator="full")).page_data()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [1, 2, 3]}, "`tokens` are ids"),
        ({"verdict": 0.5}, "`verdict` must be"),
        ({"verdict": math.nan}, "`verdict` must be"),
        ({"source": "verifier"}, "`source` must be"),
        ({"student_logps": [-1.0]}, "`student_logps` must have one entry for each of the 3"),
        ({"teacher_logps": torch.zeros(1, 3)}, "`teacher_logps` must have one entry"),
        ({"reference_logps": []}, "`reference_logps` must have"),
        ({"trained": [True]}, "`trained` must have"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"tokens": list("abc"), "student_logps": [-1.0] * 3, "teacher_logps": [-2.0] * 3, "verdict": 1.0}
    with pytest.raises(ValueError, match=message):
        inspect_rollout(**{**good, **change})


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Each byte is a token, as a byte-level BPE without merges has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_part_of_a_character_has_no_text_of_its_own(byte_tokenizer):
    ids = byte_tokenizer("aé€👍b")["input_ids"]
    assert token_texts(byte_tokenizer, ids) == ["a", "", "é", "", "", "€", "", "", "", "👍", "b"]
    assert token_texts(byte_tokenizer, ids[:5]) == ["a", "", "é", "", "\ufffd"]  # it ends within a character
    view = inspect_rollout(ids, [-1.0] * 11, [-0.5] * 11, 1.0, tokenizer=byte_tokenizer)
    assert view.tokens[5] == "€"
    assert view.token_ids == tuple(ids)
    assert "①a②⋯③é⋯⋯€⋯⋯⋯👍b" in view.plain()


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_texts_of_tokens_are_the_text(byte_tokenizer, text):
    assert "".join(token_texts(byte_tokenizer, byte_tokenizer(text)["input_ids"])) == text


def test_bytes_that_are_no_text_end(byte_tokenizer):
    """300 continuation bytes: each group of four is let go; at most two groups are decoded at once, in linear time."""
    lengths = []

    class Counting:
        def decode(self, ids, **options):
            lengths.append(len(ids))
            return byte_tokenizer.decode(ids, **options)

    (continuation,) = byte_tokenizer.convert_tokens_to_ids(["Ģ"])
    texts = token_texts(Counting(), [continuation] * 300)
    assert "".join(texts) == "\ufffd" * 300
    assert max(lengths) <= 8


@settings(max_examples=100, deadline=None)
@given(
    data=st.binary(max_size=24) | st.lists(st.sampled_from(["😀".encode(), b"\xff", b"\xf0\x9f", b"ok"])).map(b"".join)
)
def test_no_text_is_lost_beside_bytes_that_are_none(byte_tokenizer, data):
    """Each character of the whole, but for signs of what is no text, stands in the tokens, in order."""
    letters = bytes_to_unicode()
    ids = byte_tokenizer.convert_tokens_to_ids([letters[byte] for byte in data])
    left = iter("".join(token_texts(byte_tokenizer, ids)))
    whole = byte_tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert all(character in left for character in whole.replace("\ufffd", ""))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 中 👍🏽", "plain é 中 👍🏽"),
        ("a\nb\tc", "a↵\nb⇥\tc"),
        ("\x1b[0m\x00\x7f\r\x9b", "⟨U+001B⟩[0m⟨U+0000⟩⟨U+007F⟩⟨U+000D⟩⟨U+009B⟩"),
        ("\u202ea\u2066\u200f\u061c", "⟨U+202E⟩a⟨U+2066⟩⟨U+200F⟩⟨U+061C⟩"),
        ("\ud83d \u2028\ufeff\u200b\U000e0041", "⟨U+D83D⟩ ⟨U+2028⟩⟨U+FEFF⟩⟨U+200B⟩⟨U+E0041⟩"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_what_acts_unseen_is_named(text, shown):
    assert visible(text) == shown


def test_the_terminal_gets_no_command_and_no_markup():
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system="truecolor", width=200).print(hostile_view())
    coloured = file.getvalue()
    text = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert text != coloured
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\ud800-\udfff]", text)
    assert "\x1b[31mred" not in coloured
    for shown in ("⟨U+001B⟩[31mred", "[red]x[/red] [link=https://example.org]y[/link]", "⟨U+202E⟩evil", "⟨U+D800⟩"):
        assert shown in text


def test_the_terminal_shows_cases_with_and_without_colours():
    """Correct: "one" is consensus (underlined), " two" conflict (bold, italic; brackets where there are no colours)."""
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system="truecolor").print(three(prompt="Q", gold="4", step=3))
    styles = dict(re.findall(r"\x1b\[([\d;]+)m(one| two)\x1b", file.getvalue()))
    assert {text: codes.split(";")[0] for codes, text in styles.items()} == {"one": "4", " two": "1"}
    plain = three(prompt="Q", gold="4", step=3).plain()
    assert (
        plain.splitlines()[0]
        == "step 3 · student's rollout · correct · reference answer 4 · 3 tokens, mean factor 1.27"
    )
    assert "①one②⟦ two⟧↵" in plain
    assert " 33.3% consensus  the teacher moves the token the way the outcome wants" in plain


def slip(verdict=0.0, **more):
    """delta is -1e-5, +1e-5, -8, +0.25, +0.125, -0.0625 and 0: of a wrong rollout the slip is the third token."""
    tokens = ["a", " b", " 35", " c", "\n", " d", " e"]
    student, teacher = [-1.0] * 7, [-1.00001, -0.99999, -9.0, -0.75, -0.875, -1.0625, -1.0]
    return inspect_rollout(tokens, student, teacher, verdict, **more)


def test_the_terminal_marks_what_differs_by_a_tenth_of_a_nat():
    """Conflicts are +1e-5, +0.25 and +0.125, of which the first is below 0.1; so are two of three consensus tokens."""
    lines = slip().plain(width=200).splitlines()
    assert lines[1] == (
        "largest delta: ① “ 35” -8 consensus, token 3 · ② “ c” +0.25 conflict, token 4 · ③ “↵” +0.125 conflict, token 5"
    )
    assert "a b① 35②⟦ c⟧③⟦↵⟧" in lines
    assert " d e" in lines
    assert lines[-1] == "3 of these 7 tokens differ by less than 0.1 nats, and are not marked"
    file = io.StringIO()
    slip().print(file=file, force_terminal=True, color_system="truecolor")
    styles = {text: codes for codes, text in re.findall(r"\x1b\[([\d;]+)m([^\x1b]+)\x1b", file.getvalue())}
    assert styles[" 35"].startswith("4;")  # underlined
    assert styles[" c"].startswith("1;3;")  # bold and italic
    assert not {"a", " b", " d", " e"} & styles.keys()


@pytest.mark.parametrize(
    ("mark_from", "shown", "left"),
    [(0, "a⟦ b⟧① 35②⟦ c⟧③⟦↵⟧", None), (0.2, "a b① 35②⟦ c⟧③↵", "4 of these 7 tokens differ by less than 0.2 nats")],
)
def test_what_is_marked_can_be_chosen(mark_from, shown, left):
    lines = slip().plain(mark_from=mark_from).splitlines()
    assert shown in lines
    assert lines[-1].startswith(left) if left else "are not marked" not in lines[-1]
    with pytest.raises(ValueError, match=r"`mark_from` must be a number of nats, >= 0"):
        slip().plain(mark_from=-0.1)


def test_the_largest_deltas_are_of_trained_tokens():
    """At most three, the first of equal ones first, neutral ones too; none with delta 0 or not trained on."""
    assert slip().largest == [2, 3, 4]
    assert slip(trained=[True, True, False, True, True, True, True]).largest == [3, 4, 5]
    assert inspect_rollout(list("abcd"), [-1.0] * 4, [-2.0, -3.0, -2.0, -2.0], 1.0).largest == [1, 0, 2]
    assert three().largest == [0, 1]
    assert three(None).largest == [0, 1]
    assert "① “one” +0.6 neutral, token 1" in three(None).plain()
    assert inspect_rollout(["a"], [-1.0], [-1.0], 1.0).plain().count("largest") == 0
    clipped = SignGatedLoss(log_ratio_clip=2.0)
    assert inspect_rollout(["a", "b"], [-1.0] * 2, [-9.0, -math.inf], 1.0, clipped).largest == [1, 0]


def test_it_is_read_back_as_it_was(tmp_path):
    """Infinite log-probabilities, lone surrogates and bfloat16 values too; a line that was cut off is left out."""
    odd = inspect_rollout(
        ["a", "\ud800\u2028"],
        torch.tensor([-0.1, -math.inf]),
        torch.tensor([-0.3, -1.7], dtype=torch.bfloat16),
        None,
        SignGatedLoss(log_ratio_clip=2.0),
        trained=torch.tensor([1, 0]),
        reference_logps=[-0.123456789, -1e-9],
        prompt=[{"role": "user", "content": "hi"}],
    )
    views = [three(step=1), odd, hostile_view(step=2)]
    path = tmp_path / "gate_samples.jsonl"
    path.write_text("".join(f"{view.to_json()}\n" for view in views) + views[0].to_json()[:50], encoding="utf-8")
    assert load_gate_samples(path) == load_gate_samples(tmp_path) == views
    assert all(json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()[:3])
    assert odd.prompt == "user: hi"
    for before, after in zip(views, load_gate_samples(path), strict=True):
        assert all(a.equal(b) for a, b in zip(before.decision, after.decision, strict=True))


def test_text_is_text_in_a_notebooks_kernel(monkeypatch):
    """There, rich would print it into the cell and write nothing."""
    import rich.console

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert three().headline() in three().plain()


def test_messages_with_calls_and_a_reference_answer_that_is_a_number():
    call = [{"type": "function", "function": {"name": "add"}}]
    view = three(prompt=[{"role": "user", "content": "1+1"}, {"role": "assistant", "tool_calls": call}], gold=4)
    assert view.prompt.startswith("user: 1+1\n\nassistant: [{'type'")
    assert view.gold == "4"
    assert "reference answer 4" in view.plain()


def test_a_step_of_a_foreign_file_is_a_number():
    line = three(step=3).to_json()
    assert RolloutView.from_json(line).step == 3
    with pytest.raises(ValueError, match="invalid literal"):
        RolloutView.from_json(line.replace('"step": 3', '"step": "3\\"></script><meta http-equiv=refresh>"'))


def test_the_page_holds_no_hostile_character_as_it_is():
    page = hostile_view().html()
    assert page.count("<script") == 2  # the data and the page's own
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "alert(1)" in page  # as data
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)
    assert data.isascii()
    assert json.loads(data)[0]["tokens"][0] == HOSTILE["script"]
    assert "http" not in re.sub(r"http-equiv|https://example\.org", "", page)
    assert render_page([], "<b>\u202e").count("&lt;b&gt;⟨U+202E⟩") == 2


def test_a_notebook_gets_the_page_in_a_frame():
    assert repr(three()) == "<RolloutView: student's rollout · correct · 3 tokens, mean factor 1.27>"
    frame = three()._repr_html_()
    assert re.match(r'<iframe sandbox="allow-scripts" [^<>]*srcdoc="[^"<>]*"></iframe>$', frame)


def test_the_wheel_has_the_pages_parts(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    parts = {f"sg_opd/views/{name}" for name in ("gate_view.html", "gate_view.css", "gate_view.js", "plot.html")}
    assert parts <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("given", ["sampled", "text", "ids"])
def test_score_rollout_scores_as_a_plain_forward_does(given, make_model, tokenizer, dataset):
    student, teacher, reference = make_model(1), make_model(2, hidden_size=48), make_model(3)
    row, gate = dataset[0], SignGatedLoss(extrapolation=1.5, interpolation=0.5, temperature=0.8)
    completion = {"sampled": None, "text": r"1+1=2 \boxed{2}", "ids": [5, 6, 7]}[given]
    state = torch.get_rng_state()
    seen = {}

    def verifier(prompts, completions, completion_ids, solution, **kwargs):
        seen.update(ids=completion_ids[0], solution=solution[0], text=completions[0][0]["content"])
        return [0.0]

    options = {"verifier": verifier, "gate": gate, "reference": reference, "max_completion_length": 12}
    view = score_rollout(student, teacher, tokenizer, row, completion, **options)
    assert view == score_rollout(student, teacher, tokenizer, row, completion, **options)
    assert state.equal(torch.get_rng_state())
    assert seen["solution"] == view.gold == row["solution"]
    assert tuple(seen["ids"]) == view.token_ids
    assert view.verdict == 0.0
    assert view.settings.extrapolation == 1.5
    assert "".join(view.tokens) == tokenizer.decode(view.token_ids)
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert view.prompt == tokenizer.decode(prompt)
    ids = torch.tensor([[*prompt, *view.token_ids]])
    for model, got in ((student, view.student_logps), (teacher, view.teacher_logps), (reference, view.reference_logps)):
        with torch.no_grad():
            logps = (model(ids).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
        expected = logps.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        assert got == pytest.approx(expected.tolist(), abs=1e-5)


# in a browser
WIDTHS = (400, 1280)


@pytest.fixture(scope="module")
def browser():
    """Chromium; where there is none the tests are skipped, and fail under SG_OPD_REQUIRE_CHROMIUM."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        reason = "no chromium on the PATH: `apt-get install chromium`"
        if os.environ.get("SG_OPD_REQUIRE_CHROMIUM"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """`open_page(html, width)`: the page from a file; it must ask for nothing else, report no error, open no dialog."""
    pages, faults = [], []

    def open_it(text, width=1280, **options):
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url in (path.as_uri(), "about:srcdoc") or faults.append(request.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert faults == []


def classes(page):
    return page.locator(".tokens .t").evaluate_all("all => all.map(t => t.className)")


def tip(page):
    return "\n".join(line for line in page.locator("#tip").inner_text().splitlines() if line)


def test_browser_shows_cases_numbers_and_facts(open_page):
    """What the three tokens were derived to be; -1 nats are 36.8 %, -0.4 are 67.0 %."""
    page = open_page(three(prompt="How many?", gold="4").html())
    assert classes(page) == ["t consensus s2", "t conflict s2", "t neutral"]
    assert page.locator(".tokens .t").all_inner_texts()[:2] == ["one", " two"]
    facts = page.locator("aside").inner_text()
    for text in (
        "✓ correct",
        "33.3 %",
        "mean factor\n1.27",
        "reference answer\n4",
        "written by\nstudent",
        "factors\n1.8 / 1",
        "How many?",
    ):
        assert text in facts, facts
    assert page.locator("#steps").is_hidden()
    assert page.locator("#tip").is_hidden()
    page.locator(".tokens .t").first.hover()
    lines = tip(page).splitlines()
    assert lines[:2] == ["“one”", "consensus: the teacher raises it, verdict correct"]
    words = " ".join(lines)
    for text in ("student −1.000 36.8 %", "teacher −0.400 67.0 %", "delta +0.600", "factor 1.80", "advantage +1.080"):
        assert text in words
    page.locator("h1").hover()
    assert page.locator("#tip").is_hidden()


def test_browser_tells_what_is_infinite_and_what_is_not_trained(open_page):
    gate, trained = SignGatedLoss(log_ratio_clip=2.0), [True, True, False]
    logps = [-1.0, -2.0, -0.5], [-0.4, -math.inf, -0.5]
    page = open_page(inspect_rollout(["one", " two", "\n"], *logps, 1.0, gate, trained=trained).html())
    page.locator(".tokens .t").nth(1).hover()
    assert tip(page).splitlines()[1] == "conflict: the teacher lowers it, verdict correct"
    assert "delta\n−inf" in tip(page).replace("\t", "\n")
    page.locator(".tokens .t").nth(2).hover()
    assert tip(page).splitlines()[1:] == ["not trained on", "token 3"]


def test_browser_shows_it_in_a_notebooks_frame(open_page):
    """Its script runs there too, and reaches nothing of the notebook."""
    page = open_page(f"<!doctype html><body>{three()._repr_html_()}")
    frame = page.frame_locator("iframe")
    assert frame.locator(".tokens .t").count() == 3
    frame.locator(".tokens .t").first.hover()
    assert "consensus: the teacher raises it" in frame.locator("#tip").inner_text()
    assert page.locator("iframe").evaluate("frame => frame.contentDocument") is None


def test_browser_keyboard(open_page):
    """Tab reaches the three largest, then the tokens once; arrows move on, End to the last, Shift to the next conflict,
    Escape closes."""
    tokens, teacher = ["one", " two", " three", " four", "\n"], [-0.4, -2.5, -0.4, -0.4, -1.0]
    page = open_page(inspect_rollout(tokens, [-1.0] * 5, teacher, 1.0).html())
    for _ in range(4):
        page.keyboard.press("Tab")
    assert tip(page).startswith("“one”")
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("ArrowRight")
    assert tip(page).startswith("“ two”")
    assert page.locator(".tokens [tabindex='0']").count() == 1
    page.keyboard.press("End")
    assert "neutral: the teacher leaves it, verdict correct" in tip(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowLeft")
    assert tip(page).splitlines()[:2] == ["“ two”", "conflict: the teacher lowers it, verdict correct"]
    page.keyboard.press("Home")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.locator(".tokens .t").nth(1).click()  # as a finger does
    assert tip(page).startswith("“ two”")


def test_browser_goes_to_the_largest_and_passes_over_what_has_no_line(open_page):
    """The slip by a click; Shift from the first token passes the conflict of 1e-5 nats. Three tokens have no line."""
    page = open_page(slip().html())
    assert page.locator(".largest button").all_inner_texts() == [" 35 −8.000", " c +0.250", "↵ +0.125"]
    assert "without a line\n3 below 0.1" in page.locator("aside").inner_text()
    page.locator(".largest button").first.click()
    assert tip(page).splitlines()[:2] == ["“ 35”", "consensus: the teacher lowers it, verdict incorrect"]
    page.keyboard.press("Home")
    assert tip(page).startswith("“a”")
    page.keyboard.press("Shift+ArrowRight")
    assert tip(page).startswith("“ c”")
    colour = "all => all.map(token => getComputedStyle(token).textDecorationColor)"
    lines = ["/ 0)" not in of and ", 0)" not in of for of in page.locator(".tokens .t").evaluate_all(colour)]
    assert lines[:6] == [False, False, True, True, True, False]
    assert open_page(three(None).html()).locator(".largest span.neutral").count() == 2


@pytest.mark.parametrize("width", WIDTHS)
def test_browser_runs_nothing_of_a_hostile_rollout(open_page, width):
    page = open_page(hostile_view().html(), width)
    assert page.locator(".tokens .t").count() == len(HOSTILE) + 6
    assert page.locator("img").count() == page.locator("iframe").count() == 0
    shown = page.locator(".tokens").text_content()  # also of lines below the window, which are not laid out
    for text in ("</script><script>alert(1)</script>", "<img src=x", "⟨U+202E⟩evil", "⟨U+D800⟩", "[red]x[/red]"):
        assert text in shown
    for i in range(page.locator(".tokens .t").count()):
        page.locator(".tokens .t").nth(i).hover()
    assert tip(page).startswith("“é”")
    page.locator(".mark", has_text="⋯").hover()
    assert tip(page).startswith("part of a character")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_browser_sets_right_to_left_text_by_itself(open_page):
    """An Arabic line reads from the right, token by token; the lines around it from the left."""
    page = open_page(hostile_view().html())
    box = {
        text: page.locator(".tokens .t", has_text=text).bounding_box() for text in ("السلام", "عليكم", "</script>", "é")
    }
    assert box["السلام"]["x"] > box["عليكم"]["x"] > 640
    assert box["</script>"]["x"] < 640 > box["é"]["x"]
    directions = page.locator(".line").evaluate_all("all => all.map(line => getComputedStyle(line).direction)")
    assert directions == ["ltr", "rtl", "ltr"]


def test_browser_selects_steps(open_page):
    views = [three(step=10), three(0.0, step=10), three(None, step=20), three(step=30)]
    page = open_page(render_page(views, "Gate samples"))
    verdicts = page.locator("h2")
    assert page.locator("#step").input_value() == "30"  # the newest
    page.locator("#step").select_option("10")
    assert verdicts.all_inner_texts() == ["✓ correct", "✗ incorrect"]
    assert classes(page)[3:] == ["t conflict s2", "t consensus s2", "t neutral"]
    page.locator("#later").click()
    assert verdicts.all_inner_texts() == ["– abstained"]
    assert classes(page) == ["t neutral"] * 3
    page.locator(".tokens .t").first.hover()
    assert tip(page).splitlines()[1] == "neutral: the teacher raises it, verdict abstained"
    assert page.locator("#earlier").is_enabled()
    page.locator("#later").press("Enter")
    assert page.locator("#later").is_disabled()
    assert verdicts.all_inner_texts() == ["✓ correct"]
    page.locator("#earlier").click()
    assert page.locator("#step").input_value() == "20"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_browser_fits_and_is_legible(open_page, width, scheme):
    """No overflow, a tip within the window, and WCAG's contrast (4.5) of the text on every strength of both colours."""
    words = ["word " * 3, "a" * 900, " end"]
    view = inspect_rollout(words, [-3.0] * 3, [-0.5] * 3, 1.0, prompt="p" * 900, gold="g" * 200)
    page = open_page(view.html(), width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    parts = "all => all.flatMap(element => [...element.getClientRects()].map(box => box.right))"
    assert max(page.locator(".tokens .t, pre, dd").evaluate_all(parts)) <= width
    page.locator(".tokens .t").last.hover()
    tip_box = page.locator("#tip").bounding_box()
    assert tip_box["x"] >= 0
    assert tip_box["x"] + tip_box["width"] <= width
    assert tip_box["y"] + tip_box["height"] <= 800
    contrasts = page.evaluate(
        """() => [...document.querySelectorAll('.ramp span, aside dt, #legend dd')].map(e => {
            const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
            const pixel = (...colours) => {
                for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
                    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
            };
            const style = getComputedStyle(e), page = getComputedStyle(document.body).backgroundColor;
            const [a, b] = [pixel(page, style.backgroundColor), pixel(style.color)].sort((x, y) => y - x);
            return (a + .05) / (b + .05);
        })"""
    )
    assert len(contrasts) > 12
    assert min(contrasts) >= 4.5


LONG_TASKS = """window.tasks = [];
new PerformanceObserver((list) => window.tasks.push(...list.getEntries().map((entry) => entry.duration)))
    .observe({type: "longtask", buffered: true});"""


def test_browser_bears_ten_thousand_tokens(open_page):
    """The last line's numbers are right, and no task of the page takes long (0.1 s here)."""
    number = 10_000
    tokens = [f" {i}" if i % 25 else "\n" for i in range(number)]
    student = [-1.0 - i / number for i in range(number)]
    page = open_page(inspect_rollout(tokens, student, [-1.5] * number, 1.0).html())
    page.add_init_script(LONG_TASKS)
    page.reload()
    assert page.locator(".tokens .t").count() == number
    page.locator(".tokens .t").nth(9_001).scroll_into_view_if_needed()
    page.locator(".tokens .t").nth(9_001).hover()
    assert "student\n−1.900" in tip(page)
    assert "token 9002" in tip(page)
    assert max(page.evaluate("window.tasks"), default=0) < 2_000  # ms
