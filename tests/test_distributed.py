"""Two processes do what one does: DDP, ZeRO-3 and FSDP2 on the CPU with gloo, in real subprocesses.

Each backend is one launch of `distributed_worker.py`, which trains all scenarios one after another: greedy decoding,
two prompts of four rollouts a step, one prompt a rank. The single process is the reference.
"""

import functools
import json
import math

import pytest
import torch
from launching import SUPPORT, run_worker
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sg_opd import load_gate_samples
from sg_opd.training.metrics import METRICS

pytestmark = pytest.mark.integration

WORKER = SUPPORT / "distributed_worker.py"
LIMIT = 280  # seconds for one launch, measured at 10 to 45
# for every worker, of this file and of others
SHARDED = ("zero3", "fsdp2")
PHASE = {"teacher_phase_steps": 6, "teacher_phase_fraction": 0.25, "teacher_candidates": 1}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True}
# every pair of {whole, lora} x {sampled, full} x {current, initial} x {no phase, phase}
SCENARIOS = {
    "whole-sampled-current": {
        "settings": {
            "learning_rate": 0.003,
            "mask_truncated_completions": True,
            "save_strategy": "steps",
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "log_gate_samples": 64,
        }
    },
    "whole-full-initial-phase": {
        "student": "padded",
        "settings": {
            "estimator": "full",
            "reference_policy": "initial",
            "gate_extrapolation": 1.2,
            "save_strategy": "steps",
            "save_steps": 2,
            "log_gate_samples": 64,
            **PHASE,
        },
    },
    "lora-sampled-initial-phase": {
        "lora": LORA,
        "settings": {"reference_policy": "initial", "learning_rate": 0.5, **PHASE},
    },
    "lora-full-current-phase": {
        "lora": LORA,
        "student": "padded",
        "settings": {"estimator": "full", "learning_rate": 0.2, "teacher_rollout_loss": "nll", **PHASE},
    },
    "lora-full-initial": {
        "lora": LORA,
        "settings": {
            "estimator": "full",
            "reference_policy": "initial",
            "gate_extrapolation": 1.2,
            "learning_rate": 0.2,
            "mask_truncated_completions": True,
            "save_strategy": "steps",
            "save_steps": 2,
        },
    },
    # beside the pairs: an embedding that is the head too, and activations computed twice
    "whole-full-tied": {"student": "tied", "settings": {"estimator": "full", "gradient_checkpointing": True}},
    "whole-full-tied-padded": {"student": "tied-padded", "settings": {"estimator": "full"}},
    # the teacher's likeliest ids, with heads of unequal size, and a third model of which each rank holds a part
    "whole-top_k-initial": {
        "student": "padded",
        "settings": {
            "estimator": "top_k",
            "teacher_top_k": 6,
            "reference_policy": "initial",
            "gate_extrapolation": 1.2,
            "mask_truncated_completions": True,
        },
    },
    # and a group that lies on both ranks, one verdict on the second: by itself that rank would have no sign
    "whole-sampled-group": {
        "verifier": "by_place",
        "settings": {"num_generations": 8, "gate_signal": "group", "advantage_weight": 0.3},
    },
    # and the student before training as teacher, which reads other prompts
    "whole-sampled-initial-teacher": {
        "teacher": "initial",
        "hinted": True,
        "settings": {"reference_policy": "initial", "gate_extrapolation": 1.2},
    },
    "lora-full-teacher-phase": {
        "teacher": "initial",
        "hinted": True,
        "lora": LORA,
        "settings": {"estimator": "full", "learning_rate": 0.2, **PHASE},
    },
    # and two teachers: a rank has rows of one of them alone
    "whole-full-teachers-phase": {
        "teachers": ["teacher", "tied"],
        "settings": {"estimator": "full", **PHASE},
    },
    "whole-full-sigmoid": {
        "settings": {
            "preset": "r2-opd",
            "estimator": "full",
            "gate_interpolation": 1.0,
            "gate_beta": 0.7,
            "truncated_verdict": "judge",
        }
    },
}
TIED = {"seed": 5, "scale": 1.0, "tie_word_embeddings": True, "initializer_range": 0.2}
BASE = {"padded": "student", "tied-padded": "tied"}
# no processes draw what one does, but a resumed run what the whole one did
DRAWN = {
    "whole-sampled-drawn": {
        "settings": {"generation_kwargs": {"do_sample": True}, "save_strategy": "steps", "save_steps": 2}
    }
}
# three questions on two processes, and sampling that is greedy, so that any number of processes samples the same
EVALUATED = {
    "whole-sampled-evaluated": {
        "settings": {"learning_rate": 0.003, "mask_truncated_completions": True, "top_k": 1},
        "evaluated": {"num_samples": 2, "every_steps": 1, "batch_size": 3},
    }
}
RESUMED = (*DRAWN, "whole-sampled-current", "whole-full-initial-phase", "lora-full-initial")
MASKED = ("whole-sampled-current", "lora-full-initial")
WITH_PHASE = [name for name in SCENARIOS if name.endswith("phase")]


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer, make_model, dataset):
    """A folder with the models and the data that every launch reads; EOS comes early for some prompts only."""
    folder = tmp_path_factory.mktemp("distributed")
    shapes = {"student": {"seed": 4}, "teacher": {"seed": 4, "hidden_size": 48}, "tied": TIED}
    shapes |= {"padded": {"seed": 5, "vocab_size": 40}, "tied-padded": {**TIED, "vocab_size": 40}}
    weights = {}
    for name, shape in shapes.items():
        model = make_model(**shape)
        with torch.no_grad():
            model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 2
            for key, value in model.state_dict().items():
                if name.endswith("padded"):  # the same model with more ids
                    value[: len(weights[BASE[name]][key])] = weights[BASE[name]][key]
        weights[name] = model.state_dict()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    dataset.to_json(folder / "data.jsonl")
    return folder


def launch(world, backend, scenarios, out):
    """Run the worker to its end, or fail with what it printed."""
    job = {"backend": backend, "out": str(out), "data": str(world / "data.jsonl"), "scenarios": {}}
    for name, scenario in scenarios.items():
        student = str(world / scenario.get("student", "student"))
        job["scenarios"][name] = {"teacher": str(world / "teacher"), **scenario, "student": student}
        if "teachers" in scenario:
            job["scenarios"][name]["teacher"] = {which: str(world / which) for which in scenario["teachers"]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "job.json").write_text(json.dumps(job))
    code = run_worker(WORKER, out / "job.json", backend, out / "log.txt", LIMIT)
    assert code == 0, f"{backend}: {code}\n{(out / 'log.txt').read_text()[-6000:]}"


@pytest.fixture(scope="session")
def outcome(world):
    """`outcome(backend, scenario)`: the ranks' notes and the trained weights, from one launch of each backend."""

    @functools.cache
    def launched(backend):
        out = world / backend
        every = SCENARIOS | DRAWN | EVALUATED
        again = {f"{name}-resumed": {**every[name], "resume": str(out / name / "checkpoint-2")} for name in RESUMED}
        try:
            launch(world, backend, every | again, out)
        except AssertionError as error:  # cached, so that one failed launch is not repeated for every test
            return error
        return out

    def get(backend, name):
        out = launched(backend)
        if isinstance(out, AssertionError):
            pytest.fail(str(out))
        ranks = [json.loads(path.read_text()) for path in sorted((out / name).glob("rank*.json"))]
        return ranks, torch.load(out / name / "weights.pt")

    return get


def logged(ranks, wanted):
    """The logged values of some metrics, one dict a log entry; NaN where there was nothing to measure."""
    logs = [{k: v for k, v in entry.items() if wanted(k)} for entry in ranks[0]["logs"]]
    return [{k: math.nan if v is None else v for k, v in entry.items()} for entry in logs]


def generations(ranks):
    """The rows of each generation in the order of the global batch."""
    return [[row for rows in parts for row in rows] for parts in zip(*(rank["rows"] for rank in ranks), strict=True)]


def farthest(weights, others):
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_the_backend_is_what_it_says(backend, outcome):
    """Two ranks; under ZeRO-3 and FSDP2 each holds half of the student, of the teacher and of the initial policy."""
    for name in SCENARIOS:
        ranks, _ = outcome(backend, name)
        assert [rank["world"] for rank in ranks] == [2, 2]
        kind = {"ddp": "MULTI_CPU", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}[backend]
        assert {rank["backend"] for rank in ranks} == {f"DistributedType.{kind}"}
        third = {"initial"} if SCENARIOS[name]["settings"].get("reference_policy") and "lora" not in name else set()
        for rank in ranks:
            assert (rank["device_map"] is None) == (backend in SHARDED)  # "auto" would spread a shard over all GPUs
            assert rank["shares"].keys() == {"student", "teacher"} | third
            for share in rank["shares"].values():
                assert share == pytest.approx(0.5 if backend in SHARDED else 1.0, abs=0.02)


@pytest.mark.parametrize("name", ["whole-sampled-current", "whole-full-initial-phase"])
@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_the_main_process_keeps_its_rollouts(backend, name, outcome, world):
    """Of two ranks its half of them, each with the log-probabilities that one process has for it."""
    for launched in ("single", backend):
        outcome(launched, name)
    alone, kept = (
        {(view.step, view.prompt, view.token_ids): view for view in load_gate_samples(world / launched / name)}
        for launched in ("single", backend)
    )
    assert 0 < len(kept) < len(alone)
    assert kept.keys() <= alone.keys()
    for place, view in kept.items():
        assert (view.source, view.verdict, view.gold) == (alone[place].source, alone[place].verdict, alone[place].gold)
        for logps in ("student_logps", "teacher_logps"):
            assert getattr(view, logps) == pytest.approx(getattr(alone[place], logps), abs=1e-3)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_losses_metrics_and_weights_are_a_single_processs(backend, name, outcome, world):
    """Within 1e-5 after four steps, which moved the weights at least a hundred times as far."""
    (one, expected), (two, weights) = outcome("single", name), outcome(backend, name)
    initial = AutoModelForCausalLM.from_pretrained(world / SCENARIOS[name].get("student", "student"))
    if "lora" not in name:
        assert farthest(dict(initial.named_parameters()), expected) > 1e-3
    assert farthest(expected, weights) < 1e-5
    for got, want in zip(logged(two, lambda k: k == "loss"), logged(one, lambda k: k == "loss"), strict=True):
        assert got == pytest.approx(want, abs=1e-5, rel=1e-5)
    ours = lambda key: key in METRICS or key in ("reward", "eval_reward", "completions/mean_length")  # noqa: E731
    for got, want in zip(logged(two, ours), logged(one, ours), strict=True):
        assert got == pytest.approx(want, abs=2e-4, rel=1e-4, nan_ok=True)
    assert any(entry.get("gate/consensus", 0) > 0.1 for entry in one[0]["logs"])
    least = 0.05 if "teachers" in SCENARIOS[name] else 0.1  # two teachers, each of half of the rows
    assert any(entry.get("gate/conflict", 0) > least for entry in one[0]["logs"])


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_rows_verdicts_and_slots_are_the_global_batchs(backend, name, outcome):
    """Row i of the global batch has the same rollout, verdict, slot and source however many ranks there are."""
    (one, _), (two, _) = outcome("single", name), outcome(backend, name)
    expected, got = generations(one), generations(two)
    assert len(got) == len(expected) == 4
    for ours, theirs in zip(got, expected, strict=True):
        assert [row | {"ids": row["ids"][: row["kept"]]} for row in ours] == [
            row | {"ids": row["ids"][: row["kept"]]} for row in theirs
        ]
    halves = [[{row["verdict"] for row in rows} for rows in rank["rows"]] for rank in two]
    assert any(first != second for first, second in zip(*halves, strict=True))  # or a wrong slice would not show


@pytest.mark.parametrize("name", WITH_PHASE)
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_every_rank_enters_the_sharded_teacher(backend, name, outcome):
    """Equally often, in a generation where only one rank has slots too, and never without any slot."""
    ranks, _ = outcome(backend, name)
    assert ranks[0]["teacher_calls"] == ranks[1]["teacher_calls"]
    slots = [[sum(row["slot"] for row in rows) for rows in rank["rows"]] for rank in ranks]
    assert any((first == 0) != (second == 0) for first, second in zip(*slots, strict=True))
    assert [calls > 0 for calls in ranks[0]["teacher_calls"]] == [any(both) for both in zip(*slots, strict=True)]
    assert any(row["from_teacher"] for rank in ranks for rows in rank["rows"] for row in rows)


@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_ranks_of_unequal_lengths_go_on(backend, outcome):
    """Some generation ended on one rank well before the other's, and training went on to the last step."""
    unequal = 0
    for name in SCENARIOS:
        ranks, _ = outcome(backend, name)
        lengths = [[max(row["kept"] for row in rows) for rows in rank["rows"]] for rank in ranks]
        unequal += sum(abs(first - second) > 2 for first, second in zip(*lengths, strict=True))
        assert ranks[0]["logs"][-1]["step"] == 4
    assert unequal > 2


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_a_rank_of_masked_rows_runs_its_backward(backend, name, outcome):
    """In some micro-batch one rank trained no token and the other did; the weights are compared above."""
    ranks, _ = outcome(backend, name)
    tokens = list(zip(*(rank["trained_tokens"] for rank in ranks), strict=True))
    assert any((first == 0) != (second == 0) for first, second in tokens)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_resuming_is_bit_identical(backend, name, outcome):
    (whole, weights), (resumed, again) = outcome(backend, name), outcome(backend, f"{name}-resumed")
    assert [entry["step"] for entry in resumed[0]["logs"] if "loss" in entry] == [1, 2, 3, 4]
    assert generations(resumed) == generations(whole)[2:]
    assert farthest(weights, again) == 0.0


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("backend", ["ddp", "zero3", "fsdp2"])
def test_the_saved_model_is_the_trained_one(backend, name, outcome, world):
    _, weights = outcome(backend, name)
    saved = world / backend / name / "saved"
    if "lora" in name:
        model = AutoModelForCausalLM.from_pretrained(world / SCENARIOS[name].get("student", "student"))
        model = PeftModel.from_pretrained(model, saved)
    else:
        model = AutoModelForCausalLM.from_pretrained(saved)
    assert farthest(dict(model.named_parameters()), weights) == 0.0


def test_each_rank_of_ddp_offloads_its_own_teacher(outcome, world):
    """With a teacher phase, both estimators: the run of DDP without offload; a rank holds the teacher's tables only."""
    out, names = world / "ddp-offloaded", ("whole-full-initial-phase", "lora-sampled-initial-phase")
    settings = {name: {**SCENARIOS[name]["settings"], "teacher_offload": True} for name in names}
    launch(world, "ddp", {name: {**SCENARIOS[name], "settings": settings[name]} for name in names}, out)
    for name in names:
        ranks, expected = outcome("ddp", name)
        assert farthest(torch.load(out / name / "weights.pt"), expected) < 1e-5
        offloaded = [json.loads((out / name / f"rank{rank}.json").read_text()) for rank in range(2)]
        assert generations(offloaded) == generations(ranks)
        for rank in offloaded:
            assert 0.05 < rank["shares"]["teacher"] < 0.25
            assert rank["shares"]["student"] == 1.0


@pytest.mark.parametrize("backend", ["ddp", *SHARDED])
def test_an_evaluation_while_training(outcome, backend):
    """After every step the figures of one process, on both ranks; and the weights of a run without it, to the bit."""
    (alone,), _ = outcome("single", "whole-sampled-evaluated")
    ranks, weights = outcome(backend, "whole-sampled-evaluated")
    wanted = [{k: v for k, v in entry.items() if k != "epoch"} for entry in alone["logs"] if "eval_avg@2" in entry]
    assert [entry["step"] for entry in wanted] == [1, 2, 3, 4]
    assert len({entry["eval_tokens"] for entry in wanted} | {entry["eval_avg@2"] for entry in wanted}) > 2
    for rank in ranks:
        got = [{k: v for k, v in entry.items() if k != "epoch"} for entry in rank["logs"] if "eval_avg@2" in entry]
        assert got == [pytest.approx(entry) for entry in wanted]
    _, without = outcome(backend, "whole-sampled-current")
    assert weights.keys() == without.keys()
    assert all(torch.equal(weights[name], without[name]) for name in weights)
