"""The meter's metrics by hand, whatever the split into micro-batches, and without waiting for the device."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from sg_opd import SignGatedLoss
from sg_opd.method.gate import GateDecision, GateSettings, decide, gate_metrics, gate_totals
from sg_opd.method.loss import policy_gradient
from sg_opd.training.metrics import METRICS, GateMeter, shares, verdict_metrics
from sg_opd.training.totals import rollout_totals

NAN = math.nan
LABELS = torch.tensor([1.0, 0.0, NAN, 1.0, 1.0, 0.0])
FROM_TEACHER = torch.tensor([False, False, False, False, True, False])
SLOTS = torch.tensor([False, False, False, False, True, True])


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        masked = name.startswith("aten::index") and any(
            index is not None and index.dtype == torch.bool for index in (args[1] if len(args) > 1 else [])
        )
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique")
        if masked or name.startswith(waits):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def batch(rows=6, length=5):
    torch.manual_seed(0)
    student, teacher = torch.randn(rows, length) - 2, torch.randn(rows, length) - 2
    mask = torch.rand(rows, length) > 0.3
    decision = SignGatedLoss().decide(student, teacher, LABELS[:rows], torch.ones_like(student))
    return decision, policy_gradient(student, decision.advantage), mask


def part(decision, rows):
    return type(decision)(*(value[rows] for value in decision))


def test_rollout_metrics_by_hand():
    """Student rows: 2 of 5 correct, 2 incorrect, 1 abstained; 2 of 6 rows are slots, 1 of the 2 endorsed."""
    totals = {name: value.item() for name, value in rollout_totals(LABELS, FROM_TEACHER, SLOTS).items()}
    assert shares(totals) == pytest.approx(
        {
            "verdict/correct": 2 / 5,
            "verdict/incorrect": 2 / 5,
            "verdict/abstained": 1 / 5,
            "teacher/slot_share": 2 / 6,
            "teacher/endorsed": 1 / 2,
        }
    )


def test_rollout_metrics_leave_out_what_there_is_none_of():
    everyone = torch.ones(2, dtype=torch.bool)
    taken = {name: v.item() for name, v in rollout_totals(torch.ones(2), everyone, everyone).items()}
    assert shares(taken) == {"teacher/slot_share": 1.0, "teacher/endorsed": 1.0}
    own = {name: v.item() for name, v in rollout_totals(torch.ones(2), ~everyone, ~everyone).items()}
    assert "teacher/endorsed" not in shares(own)


def test_verdict_metrics_of_an_evaluation():
    """3 of 6 correct, 2 incorrect, 1 abstained."""
    expected = {"verdict/correct": 3 / 6, "verdict/incorrect": 2 / 6, "verdict/abstained": 1 / 6}
    assert verdict_metrics(LABELS) == pytest.approx(expected)


@pytest.mark.parametrize("split", [[6], [1, 5], [2, 2, 2]])
def test_the_meter_is_a_loop_over_tokens_whatever_the_split(split):
    decision, loss, mask = batch()
    meter, start = GateMeter(), 0
    for size in split:
        rows = slice(start, start + size)
        meter.add(rollout_totals(LABELS[rows], FROM_TEACHER[rows], SLOTS[rows]))
        meter.update(part(decision, rows), loss[rows], mask[rows], FROM_TEACHER[rows], mask[rows])
        start += size
    metrics = meter.compute(Accelerator(cpu=True))
    places = [(r, t) for r in range(6) for t in range(5) if mask[r, t]]
    for name, case in (("consensus", 1), ("conflict", -1), ("neutral", 0)):
        expected = sum(decision.case[place].item() == case for place in places) / len(places)
        assert metrics[f"gate/{name}"] == pytest.approx(expected)
    of_teacher = [loss[place].item() for place in places if place[0] == 4]
    of_student = [loss[place].item() for place in places if place[0] != 4]
    assert metrics["loss/teacher"] == pytest.approx(sum(of_teacher) / len(of_teacher), rel=1e-5)
    assert metrics["loss/student"] == pytest.approx(sum(of_student) / len(of_student), rel=1e-5)
    deltas = sorted(decision.delta[place].item() for place in places)
    assert metrics["delta/p50"] == pytest.approx(torch.tensor(deltas).quantile(0.5).item())
    sizes = [abs(delta) for delta in deltas]
    assert metrics["delta/top_share"] == pytest.approx(max(sizes) / sum(sizes))
    for name, case in (("consensus", 1), ("conflict", -1)):
        on_case = sum(abs(decision.delta[place].item()) for place in places if decision.case[place].item() == case)
        assert metrics[f"gate/{name}_delta"] == pytest.approx(on_case / sum(sizes))
    assert metrics["verdict/correct"] == pytest.approx(2 / 5)
    of_others = {"gate/uniform_groups", "rest/student", "rest/teacher"}  # which need groups, and the estimator top_k
    assert set(metrics) == set(METRICS) - of_others
    assert meter.compute(Accelerator(cpu=True)) == {}


@pytest.mark.parametrize(
    ("deltas", "share"),
    [
        ([-8.0, *[0.01, -0.01] * 99, 2.0], 10 / 11.98),  # 200 tokens: two of them
        ([-8.0, *[0.01] * 198, 2.0, 0.01], 10.01 / 11.99),  # 201: 1 % is two and a bit, so three
        ([1.0, NAN, -3.0, NAN], 3 / 4),  # of less than 100 the largest
        ([math.inf, 1.0, -math.inf], 1 / 2),  # of two infinite ones one
        ([0.0, 0.0], 0.0),
        ([NAN, NAN], NAN),
        ([], NAN),
    ],
)
def test_the_share_of_the_largest_deltas_by_hand(deltas, share):
    metrics = gate_metrics({"tokens": torch.tensor(float(len(deltas)))}, torch.tensor(deltas))
    assert metrics["delta/top_share"].item() == pytest.approx(share, nan_ok=True)


@pytest.mark.parametrize(
    ("deltas", "consensus", "conflict"),
    [
        # a correct rollout and an incorrect one; three small conflicts, a large consensus, and what is not trained
        ([[-0.1, -0.1, NAN], [0.1, -2.7, 5.0]], 2.7 / 3.0, 0.3 / 3.0),
        ([[0.4, 0.0, 1.0], [0.0, 0.6, 1.0]], 0.4, 0.6),
        ([[math.inf, 1.0, 0.0], [1.0, 1.0, 0.0]], 1.0, 0.0),  # beside it the others weigh nothing
        ([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]], 0.0, 0.0),
    ],
)
def test_the_gates_shares_of_delta_by_hand(deltas, consensus, conflict):
    """Of the first two tokens of both rows."""
    delta, mask = torch.tensor(deltas), torch.tensor([[1, 1, 0], [1, 1, 0]])
    given = torch.zeros_like(delta), delta, torch.tensor([1.0, -1.0]), mask, GateSettings()
    metrics = gate_metrics(gate_totals(decide(*given), mask), delta[mask.bool()])
    assert metrics["gate/consensus_delta"].item() == pytest.approx(consensus)
    assert metrics["gate/conflict_delta"].item() == pytest.approx(conflict)


def test_the_mean_entropy_is_that_of_the_gated_tokens():
    """Row 4 is the teacher's and trained by its likelihood: the divergence has no entropy there."""
    decision, loss, mask = batch()
    meter, gated = GateMeter(), mask & ~FROM_TEACHER.unsqueeze(1)
    entropy = torch.rand(6, 5).masked_fill(~gated, 0.0)
    meter.update(decision, loss, mask, FROM_TEACHER, gated, {"entropy": entropy})
    assert gated.sum() < mask.sum()
    assert meter.compute(Accelerator(cpu=True))["entropy"] == pytest.approx(entropy[gated].mean().item(), rel=1e-5)


def test_the_tails_are_seen_where_the_5_percent_are_not():
    """101 tokens, -4, -2, 97 times 0, and 3 twice: the 1 % and 99 % quantiles are the second and the last but one."""
    deltas = torch.tensor([0.0] * 49 + [-4.0, -2.0] + [0.0] * 48 + [3.0, 3.0])
    metrics = {k: v.item() for k, v in gate_metrics({"tokens": torch.tensor(101.0)}, deltas).items()}
    quantiles = {"delta/p01": -2.0, "delta/p05": 0.0, "delta/p50": 0.0, "delta/p95": 0.0, "delta/p99": 3.0}
    assert metrics == pytest.approx(quantiles | {"delta/top_share": (4 + 3) / 12})


class Cluster:
    """An accelerator of many ranks that all have the same."""

    num_processes = 512

    def reduce(self, tensor, reduction):
        return tensor

    def gather(self, tensor):
        return tensor.repeat(self.num_processes)


def test_a_log_long_in_coming_keeps_few_deltas_of_every_batch():
    """Of 100 micro-batches of 4,096 tokens, the i-th of delta i: few are kept, as many of the first as of the last."""
    meter, ones = GateMeter(), torch.ones(1, 4096)
    for batch in range(100):
        meter.update(GateDecision(batch * ones, ones, ones, ones, 0 * ones), ones, ones, torch.zeros(1), ones.bool())
    assert sum(map(len, meter.deltas)) <= 2 * 65_536
    metrics = meter.compute(Accelerator(cpu=True))
    expected = {"delta/p01": 1, "delta/p05": 5, "delta/p50": 49.5, "delta/p95": 94, "delta/p99": 98}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1)
    meter.update(GateDecision(ones, ones, ones, ones, 0 * ones), ones, ones, torch.zeros(1), ones.bool())
    assert sum(map(len, meter.deltas)) == 4096  # as densely as ever after a log


def test_quantiles_of_more_ranks_than_torch_takes_samples_of():
    """512 ranks of 65,536 samples would be 2^25; torch.quantile takes 2^24."""
    meter, ones = GateMeter(), torch.ones(1, 3)
    deltas = torch.tensor([[1.0, 2.0, 4.0]])
    meter.update(GateDecision(deltas, ones, ones, ones, 0 * ones), ones, ones, torch.zeros(1), ones.bool())
    assert meter.compute(Cluster())["delta/p50"] == 2.0


def test_neither_the_gate_nor_its_metrics_wait_for_the_device():
    """GRPOTrainer's own `.item()` calls stay."""
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    loss_fn, meter, mask = SignGatedLoss(), GateMeter(), torch.rand(6, 5) > 0.3
    with NoSynchronisation():
        for _ in range(2):
            decision = loss_fn.decide(student, teacher, LABELS, mask, teacher)
            loss = policy_gradient(student, decision.advantage)
            meter.update(decision, loss, mask, FROM_TEACHER, mask, {"entropy": loss})
            meter.add(rollout_totals(LABELS, FROM_TEACHER, SLOTS))
    with NoSynchronisation():  # but for one `.tolist()`, which shows on a device only
        meter.compute(Accelerator(cpu=True))
    for waits in (lambda: student[mask], lambda: bool(mask.any()), lambda: student.sum().item()):
        with pytest.raises(AssertionError, match="waits for the device"), NoSynchronisation():
            waits()
