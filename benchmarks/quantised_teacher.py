"""How often does the gate change its mind when the teacher is held in bf16, 8 bits or 4?

    python benchmarks/quantised_teacher.py                        # 40 seconds on two CPU cores; writes the results
    python benchmarks/quantised_teacher.py --quick --output X.json    # the same on 100 rollouts

The embedded arithmetic student samples one rollout for each of the first training questions, and the verifier judges
them. The embedded teacher scores them in each precision, in the same batches; the student's log-probs are fp32
throughout, so that all changes are the teacher's. The gate's case of a token is the sign of s * delta. Linear maps of
the layers are quantised, as bitsandbytes does by default; all that is not is held and computed in bf16. The teacher's
layers (128 and 384 wide) are multiples of the 64 weights that bitsandbytes' 4-bit kernel packs: nothing was padded.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    set_seed,
)

from sg_opd import MathVerifier
from sg_opd.data import load_data
from sg_opd.evaluation.evaluator import tokenize_prompts
from sg_opd.evaluation.figures import CONFIDENCE
from sg_opd.evaluation.results import as_table, installed, provenance, write_json
from sg_opd.method.gate import GateSettings, decide, verdict_sign
from sg_opd.teachers.protocol import padded
from sg_opd.teachers.sampling import sample_completions

ROOT = Path(__file__).resolve().parent.parent
ARITHMETIC, RESULT = ROOT / "examples" / "arithmetic", ROOT / "benchmarks" / "results" / "quantised_teacher.json"
ROLLOUTS, QUICK = 1_000, 100
LENGTH, BATCH = 64, 50  # tokens of a completion, as in the demo; rollouts sampled or scored at once
RESAMPLES = 2_000
# how `from_pretrained` loads each; 4 bits as in examples/configs/qwen3_qlora_16gb.yaml
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization_config": {"load_in_8bit": True}},
    "nf4": {"dtype": "bfloat16", "quantization_config": {**NF4, "bnb_4bit_compute_dtype": "bfloat16"}},
}
COMPARED = [("bf16", "fp32"), ("int8", "fp32"), ("nf4", "fp32"), ("int8", "bf16"), ("nf4", "bf16")]
COLUMNS = {
    "changed": "changed %",
    "interval": "95 %",
    "changed_by_delta": "by |delta| %",
    "interval_by_delta": "95 %",
    "mean_abs_logp": "mean |dlogp|",
    "p99_abs_logp": "99 % |dlogp|",
}


class Rollouts(NamedTuple):
    """Rollouts by row: token ids of prompts and completions, and verdicts, (B,), as the gate takes them."""

    prompts: list[list[int]]
    completions: list[list[int]]
    labels: Tensor


def sampled(count: int, seed: int) -> Rollouts:
    """One rollout of the embedded student for each of `count` training questions."""
    tokenizer = AutoTokenizer.from_pretrained(ARITHMETIC / "student")
    student = loaded("student", "fp32")
    rows = load_data(str(ARITHMETIC / "data"), "train").select(range(count))
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    prompts = tokenize_prompts(tokenizer, rows["prompt"])
    completions = [
        ids for start in range(0, count, BATCH) for ids in sample_completions(student, prompts[start:][:BATCH], config)
    ]
    verifier = MathVerifier()
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    verdicts = verifier(completions=texts, solution=rows["solution"])
    verifier.close()
    return Rollouts(prompts, completions, torch.tensor([float("nan") if v is None else v for v in verdicts]))


def loaded(role: str, precision: str) -> PreTrainedModel:
    """The embedded `student` or `teacher` in one of `PRECISIONS`."""
    settings = dict(PRECISIONS[precision])
    if "quantization_config" in settings:
        settings["quantization_config"] = BitsAndBytesConfig(**settings["quantization_config"])
    return AutoModelForCausalLM.from_pretrained(ARITHMETIC / role, **settings).eval()


@torch.no_grad()
def logps(model: PreTrainedModel, rollouts: Rollouts) -> list[Tensor]:
    """Log-probabilities in nats of each completion's tokens, (T_i,) in fp32, from the model's own logits."""
    scored = []
    for start in range(0, len(rollouts.prompts), BATCH):
        pairs = zip(rollouts.prompts[start:][:BATCH], rollouts.completions[start:][:BATCH], strict=True)
        rows = [(prompt + completion, len(completion)) for prompt, completion in pairs]
        ids, mask = padded([whole for whole, _ in rows], model.config.pad_token_id, "right", model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        every = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        scored += [row[len(whole) - 1 - kept : len(whole) - 1] for row, (whole, kept) in zip(every, rows, strict=True)]
    return scored


def compared(
    student: Sequence[Tensor], teacher: Sequence[Tensor], against: Sequence[Tensor], labels: Tensor, seed: int
) -> dict[str, Any]:
    """What the gate makes of two teachers' log-probabilities of the same rollouts.

    Args:
        student, teacher, against: by rollout, (T_i,) in nats.
        labels: verdicts, (B,), 1, 0 or NaN.
        seed: of the bootstrap over rollouts.

    Returns:
        `changed`, the share of tokens with another case, `changed_by_delta`, the same weighted by |delta| of `against`,
        each with its interval; mean and 99 % quantile of the absolute difference, and the median |delta| of all and of
        the changed tokens, in nats.
    """
    mask = pad_sequence([torch.ones(len(row)) for row in student], batch_first=True).bool()
    own, one, other = (pad_sequence(rows, batch_first=True) for rows in (student, teacher, against))
    signs = verdict_sign(labels)
    cases = [decide(own, it, signs, mask, GateSettings(1.0, 1.0)).case for it in (one, other)]
    changed, delta, apart = (cases[0] != cases[1]) & mask, (other - own).abs() * mask, (one - other).abs()[mask]
    share, interval = ratio(changed.sum(1), mask.sum(1), seed)
    weighted, weighted_interval = ratio((changed * delta).sum(1), delta.sum(1), seed)
    return {
        "tokens": int(mask.sum()),
        "changed": share,
        "interval": interval,
        "changed_by_delta": weighted,
        "interval_by_delta": weighted_interval,
        "mean_abs_logp": apart.mean().item(),
        "p99_abs_logp": apart.quantile(0.99).item(),
        "median_abs_delta": delta[mask].median().item(),
        "median_abs_delta_changed": delta[changed].median().item() if changed.any() else None,
    }


def ratio(parts: Tensor, wholes: Tensor, seed: int) -> tuple[float, list[float]]:
    """The ratio of two sums over rollouts, both (B,), and its percentile interval by a bootstrap over rollouts."""
    given = np.stack([parts.double().numpy(), wholes.double().numpy()])
    count = given.shape[1]
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drawn = given @ times.T
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn[0] / drawn[1], [tail, 1 - tail])
    return float(given[0].sum() / given[1].sum()), [float(low), float(high)]


def measured(count: int, seed: int) -> dict[str, Any]:
    """The content of the result: `rows` of teachers compared, and what was done."""
    rollouts = sampled(count, seed)
    student = logps(loaded("student", "fp32"), rollouts)
    teachers = {precision: logps(loaded("teacher", precision), rollouts) for precision in PRECISIONS}
    rows = [
        {"teacher": teacher, "against": against}
        | compared(student, teachers[teacher], teachers[against], rollouts.labels, seed)
        for teacher, against in COMPARED
    ]
    about = provenance()
    about["versions"]["bitsandbytes"] = installed("bitsandbytes")
    verdicts = {
        "correct": int((rollouts.labels == 1).sum()),
        "incorrect": int((rollouts.labels == 0).sum()),
        "abstained": int(rollouts.labels.isnan().sum()),
    }
    settings = {"seed": seed, "batch_size": BATCH, "max_completion_length": LENGTH, "resamples": RESAMPLES}
    how = {"precisions": PRECISIONS, "settings": settings, "provenance": about}
    return {"rows": rows, "rollouts": count, "verdicts": verdicts, **how}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text; shares and their intervals in percent, differences in nats."""

    def cell(name: str, value: Any) -> str:
        if name.startswith("interval"):
            return " to ".join(f"{100 * end:.2f}" for end in value)
        return f"{100 * value:.2f}" if name.startswith("changed") else f"{value:.4f}"

    heads = ["teacher", "against", *COLUMNS.values()]
    return as_table(
        heads, [[row["teacher"], row["against"], *(cell(name, row[name]) for name in COLUMNS)] for row in rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rollouts instead of {ROLLOUTS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help=f"default, unless --quick: {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")  # once a layer and batch
    result = measured(QUICK if options.quick else ROLLOUTS, options.seed)
    print(table(result["rows"]))
    output = options.output or (None if options.quick else RESULT)
    if output:
        write_json(output, result)
        print(f"written: {output}")


if __name__ == "__main__":
    main()
