"""The tables of docs/gpu.md, from benchmarks/results/gpu.

python benchmarks/gpu_report.py    # fills the page anew
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cost_report import TITLES, targets_table, with_quartiles
from gpu import RESULTS, ROOT, judge, remarks_of
from gpu_cost import HELD, SIZES, VARIANTS, expected
from gpu_targets import Cases, without
from pages import filled, table, with_span

PAGE = ROOT / "docs" / "gpu.md"
NAMES = {**TITLES, "sampled, initial": "SG-OPD, sampled, initial reference"}
GB = 1e9


def content(part: str, folder: Path = RESULTS) -> dict[str, Any]:
    return json.loads((folder / f"{part}.json").read_text())


def valid(part: str, folder: Path = RESULTS) -> Cases:
    """The cases of a part; of the remarked figures those that compare unlike things, which the page says of them."""
    return without(
        content(part, folder)["cases"],
        [r for r in remarks_of(folder) if r["part"] == part and not r.get("unlike")],
    )


def where(folder: Path) -> str:
    made = content("cost", folder)["about"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"{made['device']} ({made['gib']:.1f} GiB), driver {made['driver']}, CUDA {made['cuda']}, Python "
        f"{made['python']}, at commit {made['commit']} on {made['date'][:10]}; {versions}."
    )


def agreement_table(folder: Path) -> str:
    """Each case with its largest difference from its reference, of losses or of weights."""
    cases, references = content("agreement", folder)["cases"], content("reference", folder)["cases"]
    agrees = judge(folder)["agrees"]
    rows = []
    for name, case in cases.items():
        apart = "finite losses"
        if "apart_resumed" in case:
            apart = f"{case['apart_resumed']:.2g} (weights)"
        elif name in references:
            pairs = zip(case["losses"], references[name]["losses"], strict=True)
            apart = f"{max(abs(a - b) for a, b in pairs):.2g}"
        rows.append([name, str(len(case["losses"])), apart, "yes" if agrees[name] else "no"])
    return table(["case", "steps", "largest difference", "agrees"], rows)


def sized(cases: Cases, kind: str) -> dict[str, dict[str, Any]]:
    """The cases of a kind (`time`, `memory`, ...) by size."""
    return {name.removeprefix(f"{kind}, "): case for name, case in cases.items() if name.startswith(f"{kind}, ")}


def seconds_table(cases: Cases) -> str:
    rows = []
    for size, case in sized(cases, "time").items():
        for name, step in case["step_seconds"].items():
            phases = case["phase_seconds"][name]
            apart = [f"{1000 * phases[p]:.0f}" for p in ("score teacher", "score student", "forward+backward", "gate")]
            rows.append([size, NAMES[name], with_quartiles(step, 3), *apart])
    heads = ["size", "trainer", "step, s (quartiles)", "score teacher, ms", "score student, ms"]
    return table([*heads, "forward+backward, ms", "gate, ms"], rows, left=2)


def ratios_table(cases: Cases) -> str:
    names = {
        "sampled_vs_grpo_plus_teacher": "sampled / (GRPO + teacher forward)",
        "sampled_vs_distillation": "sampled in bf16 / DistillationTrainer in fp32",
        "full_vs_distillation": "full in bf16 / DistillationTrainer in fp32",
    }
    rows = [
        [size, *(with_quartiles(case["ratios"][name]) for name in names)] for size, case in sized(cases, "time").items()
    ]
    return table(["size", *names.values()], rows)


def memory_table(cases: Cases) -> str:
    rows = []
    for size, case in sized(cases, "memory").items():
        for name in NAMES:
            if name in case:
                held = case[name]
                figures = [f"{held[part] / GB:.2f}" for part in ("resident", "peak", "total")]
                rows.append([size, NAMES[name], *figures])
    heads = ["size", "trainer", "weights and optimizer, GB", "the most beyond them, GB", "together, GB"]
    return table(heads, rows, left=2)


def beside_estimates(folder: Path) -> list[tuple[str, str, float, float, float]]:
    """Of each case that was held: setting, size, measured bytes, the estimate's then, and the estimate's today."""
    sizes, variants = {size.name: size for size in SIZES}, {v.name: v for v in VARIANTS + HELD}
    found = {
        (name, size): held
        for size, case in sized(valid("cost", folder), "memory").items()
        for name, held in case.items()
        if name in variants and "estimate" in held
    }
    for case, held in valid("memory", folder).items():
        ((name, size),) = [(v, s) for v in variants for s in sizes if case == f"{v}, {s}"]
        found[name, size] = held
    return [
        (name, size, held["total"], held["estimate"], expected(sizes[size], variants[name]))
        for (name, size), held in found.items()
    ]


def estimates_table(folder: Path) -> str:
    rows = [
        [name, size, f"{measured / GB:.2f}", f"{now / GB:.2f}", f"{measured / then:.2f}", f"{measured / now:.3f}"]
        for name, size, measured, then, now in beside_estimates(folder)
    ]
    heads = ["setting", "size", "measured, GB", "estimate, GB", "measured / the estimate then"]
    return table([*heads, "measured / the estimate now"], rows, left=2)


def waits_table(cases: Cases) -> str:
    rows = []
    for size, case in sized(cases, "waits").items():
        for name, sites in case.items():
            if name in NAMES:
                own = {site.split(":")[0]: n for site, n in sites.items() if site.startswith("sg_opd/")}
                lines = ", ".join(f"{n} in `{site}`" for site, n in own.items())
                rows.append([size, NAMES[name], str(sum(sites.values())), str(sum(own.values())), lines])
    return table(["size", "trainer", "waits a step", "of them sg_opd's", "where"], rows, left=2)


def real_table(folder: Path) -> str:
    rows = []
    for who, tests in content("real", folder)["before"].items():
        for test, found in tests.items():
            figures = found["figures"]
            cells = [with_span(figures[f]) for f in ("avg@8", "pass@8")]
            rows.append([who, {"test": "the same", "unseen": "never trained on"}[test], *cells])
    return table(["model", "templates", "avg@8, %", "pass@8, %"], rows, left=2)


def not_judged(folder: Path) -> str:
    rows = [[r["case"], ", ".join(f"`{name}`" for name in r["figures"]), r["why"]] for r in remarks_of(folder)]
    return table(["case", "figures", "why"], rows, left=3)


def page_of(page: str, folder: Path = RESULTS) -> str:
    """docs/gpu.md with its tables filled."""
    cost = valid("cost", folder)
    tables = {
        "where": where(folder),
        "agreement": agreement_table(folder),
        "targets": targets_table(judge(folder)),
        "not judged": not_judged(folder),
        "seconds": seconds_table(cost),
        "ratios": ratios_table(cost),
        "memory": memory_table(cost),
        "waits": waits_table(cost),
        "estimates": estimates_table(folder),
        "real": real_table(folder),
    }
    return filled(page, tables)


if __name__ == "__main__":
    PAGE.write_text(page_of(PAGE.read_text()))
