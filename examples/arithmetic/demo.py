"""`make demo`: the embedded student distilled with SG-OPD and, on the same budget, with plain OPD.

Prints avg@8 and pass@8 on 200 held-out questions for the student before, OPD, SG-OPD and the teacher, and the gate's
shares; writes to runs/demo: result.json, the curves of both runs (curves.png, curves.html), and the students, each with
rollouts token by token (gate_samples.html).

    python examples/arithmetic/demo.py [--seed 0] [--output runs/demo] [--max_steps N]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from trl import ModelConfig, ScriptArguments, TrlParser

from sg_opd import MathVerifier, SGOPDConfig, SGOPDTrainer
from sg_opd.data import load_data
from sg_opd.evaluation import EvaluationResult, evaluate_model
from sg_opd.views import plot_runs

HERE = Path(__file__).parent
RECIPE = HERE.parent / "configs" / "arithmetic.yaml"
SAMPLES = 8
FIGURES = (f"avg@{SAMPLES}", f"pass@{SAMPLES}")
GATE = ("gate/consensus_delta", "gate/conflict_delta", "gate/factor")


class Bar(ProgressCallback):
    """The usual progress bar, with the accuracy beside it instead of every metric below it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "verdict/correct" in (logs or {}):
            self.training_bar.set_postfix(correct=f"{logs['verdict/correct']:.0%}")


def evaluate(model, tokenizer, verifier: MathVerifier, completion_length: int) -> EvaluationResult:
    questions = load_data(str(HERE / "data"), "test")
    return evaluate_model(model, tokenizer, questions, verifier, SAMPLES, completion_length, batch_size=400)


def train(preset: str, verifier: MathVerifier, seed: int, output: Path, extra: list[str]) -> tuple[SGOPDTrainer, float]:
    """The recipe with another preset, begun anew; the trainer after training, and the seconds `train()` took."""
    shutil.rmtree(output / preset, ignore_errors=True)  # of an earlier demo
    parser = TrlParser((ScriptArguments, SGOPDConfig, ModelConfig))
    changes = ["--preset", preset, "--seed", str(seed), "--output_dir", str(output / preset)]
    changes += ["--log_gate_samples", "2", *extra]
    _, args, _ = parser.parse_args_and_config(["--config", str(RECIPE), *changes])
    trainer = SGOPDTrainer(
        model=str(HERE / "student"),
        teacher_model=str(HERE / "teacher"),
        verifier=verifier,
        args=args,
        train_dataset=load_data(str(HERE / "data"), "train"),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    start = time.perf_counter()
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return trainer, time.perf_counter() - start


def show(results: dict[str, EvaluationResult], gates: dict[str, dict[str, float]], console: Console) -> None:
    table = Table(title=f"200 held-out questions, {SAMPLES} samples each, standard error over questions")
    for column in ("", *(f"{name} %" for name in FIGURES), *GATE):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        table.add_row(
            name,
            *(f"{figure.mean:.1f} ± {figure.standard_error:.1f}" for figure in map(result.figures.get, FIGURES)),
            *(f"{gates[name][metric]:.3f}" if name in gates else "" for metric in GATE),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    options, extra = parser.parse_known_args()
    console, verifier = Console(width=110), MathVerifier()
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "student", trust_remote_code=False)
    results, gates, seconds, length = {}, {}, {}, 64
    for name, folder in (("student before", "student"), ("teacher", "teacher")):
        model = AutoModelForCausalLM.from_pretrained(HERE / folder, trust_remote_code=False)
        results[name] = evaluate(model, tokenizer, verifier, length)
    for name, preset in (("OPD", "opd"), ("SG-OPD lite", "sg-opd-lite")):
        console.print(f"[bold]training {name}[/bold]")
        trainer, seconds[name] = train(preset, verifier, options.seed, options.output, extra)
        results[name] = evaluate(trainer.model, tokenizer, verifier, length)
        logged = [entry for entry in trainer.state.log_history if GATE[0] in entry]
        gates[name] = {metric: sum(entry[metric] for entry in logged) / len(logged) for metric in GATE}
    results = {name: results[name] for name in ("student before", "OPD", "SG-OPD lite", "teacher")}
    show(results, gates, console)
    console.print(f"training took {seconds['OPD']:.0f} s (OPD) and {seconds['SG-OPD lite']:.0f} s (SG-OPD lite)")
    written = plot_runs([options.output / preset for preset in ("opd", "sg-opd-lite")], options.output / "curves")
    keys = {"student before": "student_before", "SG-OPD lite": "student_after", "OPD": "opd", "teacher": "teacher"}
    summary = {keys[name]: result.means() for name, result in results.items()}
    summary.update(
        train_seconds=seconds["SG-OPD lite"], opd_train_seconds=seconds["OPD"], seed=options.seed, gate=gates
    )
    (options.output / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
    samples = options.output / "sg-opd-lite" / "gate_samples.html"
    console.print(f"written: {options.output}/result.json, {', '.join(map(str, [*written, samples]))}")


if __name__ == "__main__":
    main()
