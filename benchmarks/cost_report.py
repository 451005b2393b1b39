"""The tables of docs/cost.md."""

from __future__ import annotations

from typing import Any

from pages import filled, table

TRAINERS = ("sampled", "full", "distillation", "grpo")
TITLES = {
    "sampled": "SG-OPD, sampled",
    "full": "SG-OPD, full",
    "distillation": "TRL DistillationTrainer",
    "grpo": "TRL GRPOTrainer",
    "plain": "plain models",
}
MIB = 2**20


def with_quartiles(ratio: dict[str, float], digits: int = 2) -> str:
    return f"{ratio['median']:.{digits}f} ({ratio['q25']:.{digits}f} to {ratio['q75']:.{digits}f})"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shape(size: dict[str, Any]) -> str:
    student, teacher = ("x".join(map(str, size[role])) for role in ("student", "teacher"))
    return f"{size['vocab']:,} ids, {size['batch']} x {size['tokens']:,} tokens, {student} from {teacher}"


def sizes_table(content: dict[str, Any]) -> str:
    rows = []
    for row in content["rows"]:
        ratio = {name: with_quartiles(value) for name, value in row["ratios"].items()}
        names = ("sampled_vs_distillation", "full_vs_distillation", "sampled_vs_grpo_plus_teacher")
        names += ("sampled_vs_floor", "sampled_vs_chunked_floor", "sampled_vs_plain")
        step = f"{row['step_seconds']['distillation']['median']:.2f}"
        rows.append(
            [row["size"]["name"], shape(row["size"]), f"{row['heads_share']:.2f}", step, *map(ratio.get, names)]
        )
    heads = ["size", "what", "heads' share of FLOPs", "DistillationTrainer, s", "sampled / DistillationTrainer"]
    heads += ["full / DistillationTrainer", "sampled / (GRPO + teacher forward)", "sampled / floor"]
    heads += ["sampled / floor with the head recomputed", "sampled / plain models"]
    return table(heads, rows, left=2)


def phases_table(content: dict[str, Any]) -> str:
    row = content["rows"][0]
    phases = list(next(iter(row["phase_seconds"].values())))
    rows = []
    for name, seconds in row["phase_seconds"].items():
        if name == "plain":
            continue
        cells = {phase: f"{1000 * seconds[phase]:.1f}" for phase in phases}
        cells["generate"] = f"{1000 * row['generate_seconds'].get(name, 0.0):.1f}"
        if "generate_seconds" in content.get("remarks", {}):  # they are no result
            cells["generate"] = "-"
        total = row["step_seconds"][name]["median"]
        rows.append([TITLES.get(name, name), *cells.values(), f"{1000 * total:.0f}"])
    return table(["trainer", *phases, "step without generation"], rows)


def memory_table(content: dict[str, Any]) -> str:
    rows = []
    for row in content["rows"]:
        memory = row["memory_bytes"]
        cells = [f"{memory[name]['total'] / MIB:,.0f}" for name in TRAINERS]
        shares = [f"{row['memory_vs_distillation'][name]:.2f}" for name in ("sampled", "full")]
        rows.append([row["size"]["name"], *cells, *shares])
    heads = [
        "size",
        *(TITLES[name] for name in TRAINERS),
        "sampled / DistillationTrainer",
        "full / DistillationTrainer",
    ]
    return table(heads, rows)


def presets_table(content: dict[str, Any]) -> str:
    row, rows = content["rows"][0], []
    base = row["step_seconds"]["distillation"]["median"]
    for name, step in row["step_seconds"].items():
        total = row["memory_vs_distillation"][name]
        rows.append([TITLES.get(name, name), f"{step['median'] / base:.2f}", f"{total:.2f}"])
    return table(["trainer", "time / DistillationTrainer", "memory / DistillationTrainer"], rows)


def ranks_table(content: dict[str, Any]) -> str:
    one = content["ranks"].get("1")
    rows = []
    for count, row in content["ranks"].items():
        growth = [
            f"{row['step_seconds'][name]['median'] / one['step_seconds'][name]['median']:.2f}" for name in TRAINERS
        ]
        rows.append([count, *growth, with_quartiles(row["ratios"]["sampled_vs_distillation"])])
    heads = ["ranks", *(f"{TITLES[name]}, step / one rank's" for name in TRAINERS), "sampled / DistillationTrainer"]
    return table(heads, rows)


def targets_table(content: dict[str, Any]) -> str:
    rows = [
        [f"`{t['name']}`", t["target"], number(t["measured"]), "yes" if t["met"] else "no", t["reason"]]
        for t in content["targets"]
    ]
    return table(["target", "asked", "measured (the worst size)", "met", "why not"], rows, left=5)


def sweep_table(content: dict[str, Any]) -> str:
    rows = [
        [row["estimator"], f"{row['tokens']:,}", f"{row['vocab']:,}", f"{row['peak'] / MIB:,.0f}"]
        for row in content["loss_memory"]
    ]
    return table(["estimator", "tokens", "ids", "peak, MiB"], rows)


def grading_table(content: dict[str, Any]) -> str:
    found = content["grading"]
    rows = [["integers and decimals", f"{found['plain_per_s']:,.0f}"], ["LaTeX", f"{found['latex_per_s']:,.0f}"]]
    return table(["answers", "a second"], rows)


def heads_table(content: dict[str, Any]) -> str:
    found = content["heads_alone"]
    names = {
        "whole": "plain: the student's whole logits, cross-entropy, backward",
        "log_prob": "`sampled`, GRPO: the student's fused head, backward",
        "log_prob of the teacher": "`sampled`: the teacher's fused head, no gradient",
        "divergence": "`full`, DistillationTrainer: divergence of both heads, backward",
    }
    return table(["what", "ms"], [[title, f"{1000 * found[name]:.0f}"] for name, title in names.items()])


def quantised_table(found: dict[str, Any]) -> str:
    """How often the gate changes its mind when the teacher is held in fewer bits."""

    def share(row: dict[str, Any], name: str, interval: str) -> str:
        low, high = (100 * end for end in row[interval])
        return f"{100 * row[name]:.2f} [{low:.2f}, {high:.2f}]"

    rows = [
        [
            row["teacher"],
            row["against"],
            share(row, "changed", "interval"),
            share(row, "changed_by_delta", "interval_by_delta"),
            f"{row['mean_abs_logp']:.4f}",
            f"{row['p99_abs_logp']:.3f}",
        ]
        for row in found["rows"]
    ]
    heads = ["teacher", "against", "tokens whose gate changes, %", "the same weighted by abs(delta), %"]
    return table([*heads, "mean difference of log-probs, nats", "its 99 % quantile"], rows, left=2)


def where(content: dict[str, Any]) -> str:
    made = content["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"Measured on {made['date'][:10]} at commit {made['commit'][:7]} on {made['device']} with {content['threads']} "
        f"threads; {content['rows'][0]['repetitions']} repetitions; {versions}."
    )


def page_of(page: str, content: dict[str, Any], quantised: dict[str, Any]) -> str:
    """docs/cost.md with its tables filled, from cost.json and quantised_teacher.json."""
    tables = {
        "where": where(content),
        "targets": targets_table(content),
        "sizes": sizes_table(content),
        "phases": phases_table(content),
        "presets": presets_table(content),
        "memory": memory_table(content),
        "heads": heads_table(content),
        "loss memory": sweep_table(content),
        "ranks": ranks_table(content),
        "grading": grading_table(content),
        "quantised teacher": quantised_table(quantised),
    }
    return filled(page, tables)
