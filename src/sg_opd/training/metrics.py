"""The metrics beside GRPOTrainer's: what each means, and how they are summed, gathered over ranks and logged."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather, send_to_device
from torch import Tensor, nn

from ..method.gate import GateDecision, gate_metrics, gate_totals
from .totals import rollout_totals, rollouts_by_teacher, tokens_by_teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..checkpoints.resume import ResumableTrainer
    from ..checkpoints.stops import FiniteGuard
    from ..config import SGOPDConfig
    from ..teachers.several import Teachers
    from .rollouts import Rollouts
else:  # the plots read METRICS, and must not pay for TRL
    ResumableTrainer = object

logger = get_logger(__name__)  # of the main process only

# definitions; computed by `gate_totals` in method/gate.py, in totals.py and by `GateMeter`
METRICS = {
    "gate/consensus": "share of trained tokens that the teacher moves the way the outcome wants (s * delta > 0)",
    "gate/conflict": "share of trained tokens that the teacher moves against the outcome (s * delta < 0)",
    "gate/neutral": "share of trained tokens without a side: sign 0 (verdict abstained, or by gate_signal='group' a "
    "uniform group), or abs(delta) within the dead zone",
    "gate/consensus_delta": "share of the sum of abs(delta) over trained tokens that lies on consensus ones: how much "
    "of the teacher's pull the outcome endorses",
    "gate/conflict_delta": "the same of conflict ones; the rest is neutral",
    "gate/factor": "mean reward-scaling factor of the trained tokens",
    "gate/uniform_groups": "share of the prompts' groups whose judged student rollouts all have one verdict; not "
    "logged with one rollout a prompt",
    "delta/p01": "1 % quantile of delta = log pi_T - log pi_S over trained tokens, in nats",
    "delta/p05": "5 % quantile of delta",
    "delta/p50": "median of delta",
    "delta/p95": "95 % quantile of delta",
    "delta/p99": "99 % quantile of delta",
    "delta/top_share": "share of the sum of abs(delta) over trained tokens that the 1 % with the largest carry",
    "delta/clipped": "share of trained tokens with a log-ratio beyond log_ratio_clip",
    "verdict/correct": "share of the student's rollouts that the verifier calls correct",
    "verdict/incorrect": "share of the student's rollouts that the verifier calls incorrect",
    "verdict/abstained": "share of the student's rollouts on which the verifier abstains, or truncated_verdict does",
    "teacher/slot_share": "share of all rollouts that are teacher slots in this step",
    "teacher/endorsed": "share of the teacher slots that an endorsed teacher rollout took",
    "rest/teacher": "mean probability, at trained tokens, that the teacher gives to the rest: all ids but its "
    "teacher_top_k likeliest and the sampled one; estimator 'top_k'",
    "rest/student": "the same of the student: what the estimator sees as one bucket, however it is spread there",
    "loss/student": "mean loss of a trained token in the student's rollouts, before GRPO's clip and corrections",
    "loss/teacher": "the same in the teacher's rollouts",
}
# by teacher, where there are several, as teachers/<name>/<metric>
BY_TEACHER = {
    "share": "share of all rollouts whose teacher it is",
    "correct": "share of the student's rollouts among them that the verifier calls correct",
    "consensus": "as gate/consensus, of its trained tokens",
    "conflict": "as gate/conflict, of its trained tokens",
    "delta": "mean abs(delta) of its trained tokens, in nats",
}
SAMPLE_PER_BATCH = 4_096  # deltas kept of a micro-batch, for the quantiles
SAMPLE_PER_LOG = 65_536  # deltas gathered from a rank at a logging step, at most
MOST_QUANTILES = 2**24  # torch.quantile takes no more


# what a sum is divided by to give the metric of its name, by `divisor_of`; no metric where that is zero
DIVISORS = {
    **dict.fromkeys(("verdict/correct", "verdict/incorrect", "verdict/abstained"), "student_rollouts"),
    "teacher/slot_share": "rollouts",
    "gate/uniform_groups": "rollouts",
    "teacher/endorsed": "teacher/slot_share",
    "loss/student": "student_tokens",
    "loss/teacher": "teacher_tokens",
    **dict.fromkeys(("entropy", "rest/teacher", "rest/student"), "tokens"),
}


def divisor_of(name: str) -> str | None:
    """What a sum is divided by to give the metric of its name; `None` where that is no metric."""
    if not name.startswith("teachers/"):
        return DIVISORS.get(name)
    its, _, metric = name.rpartition("/")
    by = {"share": "rollouts", "correct": f"{its}/rollouts"}
    return by.get(metric, f"{its}/tokens" if metric in BY_TEACHER else None)


def shares(totals: dict[str, float]) -> dict[str, float]:
    """The metrics from sums over rows and tokens; without those that there is none of."""
    divided = {name: by for name in totals if (by := divisor_of(name)) and totals.get(by)}
    return {name: totals[name] / totals[by] for name, by in divided.items()}


def verdict_metrics(labels: Tensor) -> dict[str, float]:
    """The `verdict/` shares of one generation without teacher rows; labels as in `rollout_totals`."""
    nobody = torch.zeros_like(labels, dtype=torch.bool)
    found = shares({name: value.item() for name, value in rollout_totals(labels, nobody, nobody).items()})
    return {name: share for name, share in found.items() if name.startswith("verdict/")}


def sampled(values: Tensor, count: int) -> Tensor:
    """At most `count` of the values (N,): strided, not drawn, since a resumed run relies on the random state."""
    return values[:: math.ceil(values.numel() / count)]


class GateMeter:
    """Adds up what the gate did and the verifier said, on the device; `compute` reduces it over ranks."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.deltas: list[Tensor] = []
        self.stride = 1  #: of the deltas that are kept; it doubles where a log is long in coming

    def update(
        self,
        decision: GateDecision,
        per_token_loss: Tensor,
        mask: Tensor,
        from_teacher: Tensor,
        gated: Tensor,
        measures: dict[str, Tensor] | None = None,
    ) -> None:
        """Take in one micro-batch; no synchronisation with the device.

        All are (B, T), `mask` the trained tokens and `gated` those whose loss is the gate's; but `from_teacher`, the
        teacher's rows, is (B,). `measures` are further means by name, such as the entropy, which GRPOTrainer does not
        log where it has none; zero at trained tokens that are not gated.
        """
        mask, loss = mask.bool(), per_token_loss.detach()
        totals = gate_totals(decision, gated)
        for name, rows in (("student", ~from_teacher.bool()), ("teacher", from_teacher.bool())):
            of_rows = mask & rows.unsqueeze(1)
            totals[f"loss/{name}"] = torch.where(of_rows, loss, 0.0).sum()
            totals[f"{name}_tokens"] = of_rows.sum()
        totals |= {name: torch.where(mask, value, 0.0).sum() for name, value in (measures or {}).items()}
        self.add(totals)
        deltas = sampled(decision.delta.masked_fill(~gated, math.nan).flatten(), SAMPLE_PER_BATCH)
        self.deltas.append(deltas[:: self.stride].float())
        if len(self.deltas) > 2 * SAMPLE_PER_LOG // SAMPLE_PER_BATCH:
            kept = torch.cat(self.deltas)
            if len(kept) > 2 * SAMPLE_PER_LOG:
                kept, self.stride = kept[::2].clone(), 2 * self.stride
            self.deltas = [kept]

    def add(self, totals: dict[str, Tensor]) -> None:
        """Take in sums over some rows or tokens of this rank; no synchronisation with the device."""
        for name, value in totals.items():
            exact = torch.float32 if value.device.type == "mps" else torch.float64  # Metal has no doubles
            self.totals[name] = self.totals.get(name, 0.0) + value.detach().to(exact)

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics since the last call, over all ranks; every rank must call this."""
        if not self.totals:
            return {}
        names = sorted(self.totals)
        sums = accelerator.reduce(torch.stack([self.totals[name] for name in names]), reduction="sum")
        count = min(SAMPLE_PER_LOG, MOST_QUANTILES // accelerator.num_processes)
        deltas = sampled(torch.cat(self.deltas), count)
        padded = deltas.new_full((count,), math.nan)
        padded[: deltas.numel()] = deltas
        of_gate = ("tokens", "gate/", "delta/")
        gate = {name: total for name, total in zip(names, sums.float(), strict=True) if name.startswith(of_gate)}
        gate = {name: total for name, total in gate.items() if name not in DIVISORS}
        gate = gate_metrics(gate, accelerator.gather(padded))
        # the host waits for the device here, once
        values = torch.cat([sums, torch.stack([*gate.values()]).to(sums)]).tolist()
        counts = dict(zip(names, values, strict=False))
        metrics = shares(counts)
        if counts["tokens"] > 0:
            metrics |= dict(zip(gate, values[len(names) :], strict=True))
        self.totals, self.deltas, self.stride = {}, [], 1
        return metrics


class GateLogging(ResumableTrainer):
    """Mixed into a ResumableTrainer: logs the metrics above and, in the completions table, the gate's advantages."""

    args: SGOPDConfig
    finite: FiniteGuard
    teachers: Teachers

    _tag_names = ["trl", "sg-opd"]
    _name = "SG-OPD"
    _paper = {
        "title": "Sign-Gated On-Policy Distillation",
        "id": "2606.09304",
        "citation": textwrap.dedent("""\
            @article{sgopd2026,
                title  = {{Sign-Gated On-Policy Distillation}},
                year   = 2026,
                eprint = {arXiv:2606.09304},
            }"""),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._eval_set = ""  # the key of the set that is evaluated, in a dict of several
        self._meter = GateMeter()
        #: the mean advantage of each row of this rank's last generation, NaN until it is trained
        self._row_advantages: Tensor | None = None
        super().__init__(*args, **kwargs)
        self._empty_logs, self._eval_logs = copy.deepcopy(self._logs), copy.deepcopy(self._logs)

    @contextmanager
    def _table_of_mode(self) -> Iterator[None]:
        """Evaluation has a completions table of its own: training may log its rollouts again after it."""
        kept, self._logs = self._logs, self._logs if self.model.training else self._eval_logs
        try:
            yield
        finally:
            self._logs = kept

    def _show_advantages(self, advantages: list[float]) -> None:
        shown: Any = self._logs["advantages"]
        shown.clear()
        shown.extend(advantages)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Same as GRPOTrainer, without its advantages in the completions table: SG-OPD does not train on them."""
        with self._table_of_mode():
            output = super()._generate_and_score_completions(inputs)
            self._show_advantages([math.nan] * len(self._logs["advantages"]))
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Same as GRPOTrainer; its completions table begins anew, and of a dict each set logs metrics of its own."""
        self._eval_logs = copy.deepcopy(self._empty_logs)
        self._eval_set = metric_key_prefix.removeprefix("eval_") if metric_key_prefix.startswith("eval_") else ""
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Evaluation generates and grades; it calls no teacher and has no loss."""
        self._prepare_inputs(inputs)
        return None, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Same as GRPOTrainer, and like it not collective: a callback may call it on one rank."""
        if self._eval_set and not self.model.training:  # GRPOTrainer would call each set's metrics by one name
            metrics = self._metrics["eval"]
            for name in list(metrics):
                metrics[f"{self._eval_set}_{name}"] = metrics.pop(name)
        with self._table_of_mode():
            super().log(logs, start_time)

    def _gather_metrics(self) -> None:
        """Reduce over ranks what the next log will show; every rank enters it."""
        for name, value in self._meter.compute(self.accelerator).items():
            self._metrics["train"][name].append(value)
        if self.log_completions and self._row_advantages is not None:
            self._show_advantages(gather(self._row_advantages).tolist())

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Same as GRPOTrainer; gathers the metrics first where it will log."""
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._gather_metrics()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Same as GRPOTrainer; gathers the metrics since the last log first."""
        self._gather_metrics()
        return super()._finalize_training(*args, **kwargs)

    def _trained_last(self) -> list[dict[str, Any]]:
        """The micro-batches of the last optimizer step, oldest first."""
        buffered: Any = self._buffered_inputs
        count = min(self.current_gradient_accumulation_steps, len(buffered))
        return [buffered[(self._step - back) % len(buffered)] for back in range(count, 0, -1)]

    def _count(self, rollouts: Rollouts) -> None:
        """Take the counts of a generation's rows."""
        self._meter.add(rollout_totals(**rollouts.by_row))
        if rollouts.whose is not None:
            self._meter.add(rollouts_by_teacher(self.teachers.names, rollouts.whose, **rollouts.by_row))

    def _measure(
        self,
        inputs: dict[str, Any],
        decision: GateDecision,
        per_token: Tensor,
        measures: dict[str, Tensor] | None = None,
    ) -> None:
        """Take the metrics of a micro-batch, unless its step will be skipped."""
        mask = self._loss_mask(inputs) & (not self.finite.found)
        gated = mask & ~self._by_likelihood(inputs)
        self._meter.update(decision, per_token, mask, inputs["from_teacher"], gated, measures)
        if "teacher_number" in inputs:
            self._meter.add(tokens_by_teacher(self.teachers.names, inputs["teacher_number"], decision, gated))

    @staticmethod
    def _loss_mask(inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()

    def _by_likelihood(self, inputs: dict[str, Any]) -> Tensor:
        """(B, 1), the rows trained by maximum likelihood."""
        return (inputs["from_teacher"] & (self.args.teacher_rollout_loss == "nll")).unsqueeze(1)

    def own_state(self) -> dict[str, Any]:
        meter = {name: copy.copy(value) for name, value in vars(self._meter).items()}
        return {"meter": meter, "row_advantages": self._row_advantages}

    def set_own_state(self, saved: dict[str, Any]) -> None:
        own = send_to_device({name: saved[name] for name in ("meter", "row_advantages")}, self.accelerator.device)
        vars(self._meter).update(own["meter"])
        self._row_advantages = own["row_advantages"]
