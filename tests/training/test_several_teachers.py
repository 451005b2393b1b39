"""Several teachers, of which a column names each row's: updates, proposals, servers, checks and metrics by teacher."""

import json

import pytest
import torch
from datasets import IterableDataset
from fault_proxy import FaultProxy, StandIn
from scoring import Countdown
from trainers import (
    MIXED,
    Recorder,
    assert_same_weights,
    coin_verifier,
    make_config,
    plain_logits,
    sgd_step,
)
from trl import TrlParser

from sg_opd import SGOPDConfig, SGOPDTrainer, SignGatedLoss
from sg_opd.teachers import http
from sg_opd.teachers.protocol import TeacherError
from sg_opd.teachers.several import Teachers, sources_of

SHAPES = {"sums": {"seed": 2, "hidden_size": 48}, "products": {"seed": 3}}


@pytest.fixture(scope="module")
def routed(dataset):
    """Questions that belong to one teacher and to the other, in turn."""
    return dataset.add_column("teacher", ["sums", "products"] * 8)


@pytest.fixture
def build(make_model, tokenizer, routed, tmp_path):
    def build(teachers=None, rows=None, trainer=Recorder, student=None, **overrides):
        args = make_config(tmp_path, **overrides)
        if teachers is None and args.teacher_models is None:
            teachers = {name: make_model(**shape) for name, shape in SHAPES.items()}
        rows = routed if rows is None else rows
        return trainer(student or make_model(1), teachers, coin_verifier, args, rows, processing_class=tokenizer)

    return build


def own_rows(batch, rows, tokenizer):
    """The name of each row's teacher, found by its prompt."""
    names = {
        tuple(
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        ): row["teacher"]
        for row in rows
    }
    masked = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    return [names[tuple(prompt[mask].tolist())] for prompt, mask in masked]


CASES = {
    "sampled": {},
    "full": {"estimator": "full"},
    "full-initial": {"estimator": "full", "reference_policy": "initial"},
    "full-offloaded": {"estimator": "full", "teacher_offload": True},
}


@pytest.mark.parametrize("case", CASES)
def test_update_by_hand(case, build, make_model, routed, tokenizer):
    """A micro-batch of both teachers' rows, of different sizes: the step of an unpatched copy, on each row with the
    logits of its own teacher."""
    plain = {name: make_model(**shape) for name, shape in SHAPES.items()}
    simulated, initial = make_model(1), make_model(1)
    trainer = build(gate_interpolation=0.6, per_device_train_batch_size=8, **MIXED, **CASES[case])
    trainer.train()
    assert trainer.teacher is None
    estimator = trainer.args.estimator
    loss_fn = SignGatedLoss(extrapolation=1.8, interpolation=0.6, estimator=estimator, temperature=0.8)
    divisor = sum(batch["completion_mask"].sum() for batch in trainer.batches)
    losses = []
    for batch in trainer.batches:
        whose = own_rows(batch, routed, tokenizer)
        assert {*whose} == {*SHAPES}
        with torch.no_grad():
            logits = {name: plain_logits(teacher, batch) for name, teacher in plain.items()}
            taught = torch.stack([logits[name][row] for row, name in enumerate(whose)])
            reference = plain_logits(initial, batch) if "initial" in case else None
        of_rows = batch["completion_ids"], batch["verifier_labels"], batch["completion_mask"]
        losses.append(loss_fn(plain_logits(simulated, batch), taught, *of_rows, reference, divisor).loss)
    assert trainer.losses == pytest.approx([loss.item() for loss in losses], rel=1e-4, abs=1e-6)
    sgd_step(simulated, losses)
    assert_same_weights(trainer.model, simulated)


def test_top_k_is_that_of_single_runs(build, make_model, routed, tokenizer):
    """On the same rollouts each row's buckets are those of a run with its teacher alone, bit for bit."""
    settings = {"estimator": "top_k", "teacher_top_k": 4, "num_generations": 4}
    mixed = build(**settings)
    mixed.train()
    alone = {}
    for name, shape in SHAPES.items():
        alone[name] = build(make_model(**shape), **settings)
        alone[name].train()
    for place, batch in enumerate(mixed.batches):
        for row, name in enumerate(own_rows(batch, routed, tokenizer)):
            other = alone[name].batches[place]
            assert batch["completion_ids"][row].equal(other["completion_ids"][row])
            torch.testing.assert_close(batch["teacher_top_logps"][row], other["teacher_top_logps"][row])
            assert not batch["teacher_top_logps"][row].eq(0).all()


def test_each_teacher_proposes_for_its_rows(build, routed, tokenizer):
    asked = {}
    trainer = build(**MIXED)
    for name, teacher in trainer.teachers.by_name.items():

        def noted(ids, count, name=name, propose=teacher.propose):
            asked.setdefault(name, []).extend(ids)
            return propose(ids, count)

        teacher.propose = noted
    trainer.train()
    slots = {name: [] for name in SHAPES}
    for batch in trainer.batches:
        for row, name in enumerate(own_rows(batch, routed, tokenizer)):
            if batch["slot"][row]:
                slots[name].append(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist())
    assert {name: sorted(ids) for name, ids in asked.items()} == {name: sorted(ids) for name, ids in slots.items()}
    assert all(slots.values())


@pytest.fixture
def servers(make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_SECONDS", (0.01, 0.02))
    proxies = {name: FaultProxy(StandIn(make_model(**shape), tokenizer)) for name, shape in SHAPES.items()}
    yield proxies
    for proxy in proxies.values():
        proxy.close()


def served(servers):
    urls = {name: {"server_url": proxy.url} for name, proxy in servers.items()}
    return {"temperature": 1.0, "teacher_models": urls, "teacher_server_retries": 1}


def test_two_servers_are_two_models(build, servers, tmp_path):
    """The run with both in this process; neither its card, its settings nor its text knows an address."""
    remote = build(**served(servers), max_steps=2)
    remote.train()
    local = build(temperature=1.0, max_steps=2)
    local.train()
    for got, want in zip(remote.model.parameters(), local.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert remote.own_settings()["teacher_model"] == "sums: served, products: served"
    shown = [remote.args.card_section(remote.teachers.name), str(remote.args), json.dumps(remote.run_settings())]
    assert "Teacher: `sums: served, products: served`" in shown[0]
    assert not any(proxy.url in text for text in shown for proxy in servers.values())


def test_the_teacher_whose_server_dies_is_named(build, servers, tmp_path):
    """In the second step, after a checkpoint of the first."""

    class Killer(SGOPDTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 1:
                servers["products"].faults = ["503"] * 1000
            return super().training_step(*args, **kwargs)

    trainer = build(**served(servers), max_steps=3, trainer=Killer)
    with pytest.raises(TeacherError, match=r"^Teacher 'products': No usable answer .* The last good step is 1, saved"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "complete.json").is_file()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["sums", None, "product"], r"2 of 3 rows name no teacher in the column 'teacher' .* row 1: None; row 2: 'pro"),
        (
            None,
            r"lacks the column 'teacher' \(`teacher_column`\), which names each row's teacher, one of 'sums', 'prod",
        ),
    ],
)
def test_rows_without_a_teacher_are_refused(names, message, build, dataset):
    rows = dataset.select(range(3))
    rows = rows if names is None else rows.add_column("teacher", names)
    for given in (rows, IterableDataset.from_generator(lambda: iter(rows.select([2]).to_list()))):
        with pytest.raises(ValueError, match=message if given is rows else "'teacher'"):
            build(rows=given)


def test_a_stream_is_checked_when_its_rows_come(build, routed):
    def rows():
        yield from routed.select(range(2)).to_list()
        yield {**routed[2], "teacher": "quotients"}
        yield from routed.select(range(8)).to_list()

    trainer = build(rows=IterableDataset.from_generator(rows), max_steps=4)
    with pytest.raises(ValueError, match=r"name no teacher .*: 'quotients'\. The teachers are 'sums', 'products'"):
        trainer.train()


def test_the_column_may_have_another_name(build, routed):
    trainer = build(rows=routed.rename_column("teacher", "task"), teacher_column="task")
    trainer.train()
    assert trainer.batches


def test_every_check_runs_for_each_teacher(build, make_model, routed, tokenizer, tmp_path, caplog):
    good = make_model(2)
    with pytest.raises(ValueError, match="Teacher 'b': The tokenizer has 27 ids but the teacher's vocabulary only 20"):
        build({"sums": good, "b": make_model(3, vocab_size=20)}, rows=routed.map(lambda r: {"teacher": "b"}))
    with pytest.raises(FileNotFoundError, match="Teacher 'b': `teacher_model`: there is no folder '/nowhere'"):
        build({"a": good, "b": "/nowhere"})
    with pytest.raises(ValueError, match=r"Teacher 'products': 8 teacher prompts .* context of 8 tokens, first row 1"):
        build({"sums": good, "products": make_model(3, max_position_embeddings=8)})
    with pytest.raises(ValueError, match="Teacher 'products': estimator='full' needs a model in this process"):
        build({"sums": good, "products": Countdown()}, estimator="full")
    with pytest.raises(
        ValueError, match="Teacher 'products': `teacher_model='initial'` is the student before training"
    ):
        build({"sums": good, "products": "initial"})
    assert build({"sums": good, "products": make_model(1)})
    assert "Teacher 'products' and student are the same model" in caplog.text
    assert "Teacher 'sums' and student" not in caplog.text


def test_one_of_them_may_be_the_student_before_training(build, make_model, routed, tokenizer):
    """It reads more; the other reads the prompt."""
    hint = [{"role": "user", "content": "3*4=12"}]
    own = [[*hint, *row["prompt"]] if row["teacher"] == "sums" else None for row in routed]
    trainer = build({"sums": "initial", "products": make_model(3)}, rows=routed.add_column("teacher_prompt", own))
    trainer.train()
    assert trainer.teachers.name == "sums: the student before training, products: a model in memory"
    logged = trainer.state.log_history[0]
    assert logged["teachers/sums/delta"] > 0
    assert logged["teachers/products/delta"] > 0


def test_metrics_by_teacher(build, make_model, routed, tokenizer):
    """By hand from the decisions on one step's rows."""
    trainer = build(**MIXED)
    trainer.train()
    logged, batches = trainer.state.log_history[0], trainer._trained_last()
    for name in SHAPES:
        counts = dict.fromkeys(("rows", "student", "correct", "tokens", "consensus", "conflict", "delta"), 0.0)
        for batch in batches:
            its = torch.tensor([whose == name for whose in own_rows(batch, routed, tokenizer)])
            tokens = its.unsqueeze(1) & batch["completion_mask"].bool()
            student = its & ~batch["from_teacher"]
            counts["rows"] += its.sum().item()
            counts["student"] += student.sum().item()
            counts["correct"] += (student & (batch["verifier_labels"] == 1)).sum().item()
            counts["tokens"] += tokens.sum().item()
            counts["consensus"] += (tokens & (batch["decision"]["case"] == 1)).sum().item()
            counts["conflict"] += (tokens & (batch["decision"]["case"] == -1)).sum().item()
            counts["delta"] += batch["decision"]["delta"].abs()[tokens].sum().item()
        expected = {name: counts[name] / counts["tokens"] for name in ("consensus", "conflict", "delta")}
        expected |= {"share": counts["rows"] / 8, "correct": counts["correct"] / counts["student"]}
        found = {key.rpartition("/")[2]: value for key, value in logged.items() if key.startswith(f"teachers/{name}/")}
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_sharded_teacher_without_rows_is_asked_about_another_one():
    """So that every rank enters it equally often; one that is not sharded is left alone."""
    sharded, plain = Countdown(), Countdown()
    sharded.sharded = True
    teachers = Teachers({"a": sharded, "b": plain, "c": plain}, "teacher")
    ids = torch.arange(6).reshape(3, 2)
    batch = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), ids)
    parts = list(teachers.parts({**batch, "teacher_number": torch.tensor([1, 1, 1]), "other": None}))
    assert [(part.name, part.rows) for part in parts] == [("a", []), ("b", [0, 1, 2]), ("c", [])]
    assert parts[0].batch["completion_ids"].equal(ids[:1])
    assert parts[1].batch["prompt_ids"].equal(ids)
    assert parts[2].batch is None


def test_the_form_in_a_recipe(tmp_path):
    """As YAML and on the command line; one URL or a list."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\nbf16: false\nuse_cpu: true\ntemperature: 1.0\nteacher_models:\n  math: org/math\n"
        "  code:\n    model_name_or_path: coder\n    server_url: http://host:8000\n"
    )
    parser = TrlParser(SGOPDConfig)
    (args,) = parser.parse_args_and_config(["--config", str(recipe)])
    math, code = sources_of(None, args)
    assert (math.name, math.model, math.server_url) == ("math", "org/math", None)
    assert (code.name, code.model, code.server_url) == ("code", "coder", ["http://host:8000"])
    assert "host:8000" not in str(args)
    said = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true", "--teacher_models"]
    (args,) = parser.parse_args_and_config([*said, '{"a": "x", "b": {"model_name_or_path": "y", "revision": "r"}}'])
    assert [(source.model, source.revision) for source in sources_of(None, args)] == [("x", None), ("y", "r")]


SERVED = {"a": {"server_url": "http://host:8000"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher_models": {"a": "x"}, "teacher_model_name_or_path": "y"},
            "`teacher_model_name_or_path` is of a single",
        ),
        ({"teacher_models": {}}, "`teacher_models` is empty"),
        (
            {"teacher_models": {"a": {"url": "x"}}},
            r"`teacher_models\['a'\]` has 'url'; a teacher is a path, or a mapping",
        ),
        ({"teacher_models": {"": "x"}}, "'' is no name"),
        ({"teacher_models": SERVED, "temperature": 0.7}, "Teacher 'a': `temperature=0.7` and `server_url`"),
        ({"teacher_models": SERVED, "estimator": "full"}, "Teacher 'a': estimator='full' needs"),
        ({"teacher_models": {"a": {"server_url": "host"}}}, "Teacher 'a': `server_url` must hold URLs"),
    ],
)
def test_settings_that_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **{"temperature": 1.0, **settings})
