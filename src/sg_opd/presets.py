"""The published variants as one table: what each preset sets, and where it comes from.

Sources, as in the documentation's page on the method: [P] the SG-OPD abstract (arXiv 2606.09304), [N] notes by readers
of its full text, [R] its reproductions, [G] G-OPD (arXiv 2602.12125), [O] our own reading.
"""

from __future__ import annotations

from typing import Any

# plain on-policy distillation; the others say where they differ from it
OPD: dict[str, Any] = {
    "gate_rule": "sign",
    "gate_signal": "verdict",
    "gate_extrapolation": 1.0,
    "gate_interpolation": 1.0,
    "gate_neutral": 1.0,
    "reference_policy": "current",
    "teacher_phase_steps": 0,
    "teacher_phase_schedule": "linear",
    "teacher_rollout_loss": "gated",
    "truncated_verdict": "judge",
    "advantage_weight": 0.0,
    "log_ratio_form": "log",
}
CHANGES: dict[str, dict[str, Any]] = {
    "opd": {},
    "exopd": {"gate_extrapolation": 1.25, "gate_interpolation": 1.25, "reference_policy": "initial"},
    "opdvr": {"gate_interpolation": 0.0},
    "grpd": {"gate_signal": "group", "gate_interpolation": 0.0, "gate_neutral": 0.0},
    "r2-opd": {"gate_rule": "sigmoid", "truncated_verdict": "abstain"},
    "rg-opd": {"gate_rule": "row"},
    "power-opd": {"log_ratio_form": "power"},
    "opd-grpo": {"advantage_weight": 0.1},
    "sg-opd": {
        "gate_signal": "group",
        "gate_extrapolation": 1.8,
        "reference_policy": "initial",
        "teacher_phase_steps": 2 / 3,
        "teacher_phase_schedule": "three-phase",
        "teacher_rollout_loss": "nll",
    },
    "sg-opd-lite": {"gate_extrapolation": 1.8, "teacher_phase_steps": 0.1},
}
PRESETS = {name: OPD | changes for name, changes in CHANGES.items()}
SOURCES = {
    "opd": "on-policy distillation: no gate, no teacher phase",
    "exopd": "one factor above 1 for every token, against the initial policy [G]",
    "opdvr": "conflict tokens are dropped (arXiv 2608.24696); an abstention is plain OPD [O]",
    "grpd": "conflict tokens are dropped by the group's sign; uniform groups and abstentions teach nothing (arXiv "
    "2608.24696)",
    "r2-opd": "sigmoid weights that keep a row's mass, 1 on cut rollouts (arXiv 2609.35517)",
    "rg-opd": "whole rollouts, where the teacher's sum agrees with the verdict (arXiv 2607.04037); "
    "on the sampled token's delta, and an abstention is plain OPD [O]",
    "power-opd": "bounded preference pi_T^a - pi_S^a (PowerOPD); a = 0.5 [O]",
    "opd-grpo": "OPD with GRPO's group advantage added to every token; its weight 0.1 [O]",
    "sg-opd": "sign gate [P] as readers of the full text describe it [N]: group sign, 1.8 and 1.0 [R], initial "
    "reference, cross-entropy on teacher rollouts, three-phase cosine; a quarter of the rollouts, thirds of the run, "
    "and neutral uniform groups [O]. One more forward of the student, and without LoRA one more model in memory",
    "sg-opd-lite": "sign gate [P] without a third model: verdict sign, 1.8 and 1.0 [R], current reference, gated "
    "teacher rollouts, a quarter of them decaying over the first tenth of the steps [O]",
}

# field: the value at which it does nothing, the field that decides whether it is read, and at which values it is not
IDLE = {
    "gate_extrapolation": (1.0, "gate_rule", ("sigmoid", "row")),
    "gate_interpolation": (1.0, "gate_rule", ("sigmoid", "row")),
    "gate_dead_zone": (0.0, "gate_rule", ("sigmoid", "row")),
    "gate_neutral": (1.0, "gate_rule", ("sigmoid",)),
    "gate_beta": (1e-3, "gate_rule", ("sign", "row")),
    "gate_row_threshold": (0.0, "gate_rule", ("sign", "sigmoid")),
    "log_ratio_power": (0.5, "log_ratio_form", ("log",)),
    "teacher_phase_hold": (0.5, "teacher_phase_schedule", ("constant", "linear", "cosine")),
    "teacher_rollout_weight": (1.0, "teacher_rollout_loss", ("gated",)),
    "teacher_top_k": (64, "estimator", ("sampled", "full")),
}
# what a divergence replaces of GRPO's settings, with the value at which each does nothing
UNUSED_BY_DIVERGENCES = {
    "loss_type": "dapo",
    "beta": 0.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
    "importance_sampling_level": "token",
    "off_policy_mask_threshold": None,
    "delta": None,
    "cast_lm_head_to_fp32": False,
}


def check_idle(args: Any) -> None:
    """Refuse a setting that another one keeps from having any effect, by name."""
    for field, (idle, by, values) in IDLE.items():
        if getattr(args, by) in values and getattr(args, field) != idle:
            of_preset = f" (preset {args.preset!r} has {PRESETS[args.preset][by]!r})" if by in OPD else ""
            raise ValueError(
                f"`{field}={getattr(args, field)!r}` has no effect with {by}={getattr(args, by)!r}: leave it at "
                f"{idle!r}, or set {by}{of_preset}."
            )


def check_unused(args: Any) -> None:
    """Refuse settings of GRPO's policy gradient by name, where a divergence is trained."""
    for name, idle in UNUSED_BY_DIVERGENCES.items():
        if getattr(args, name) != idle:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no meaning with estimator={args.estimator!r}; leave it at "
                f"{idle!r}."
            )
    if args.use_vllm and args.vllm_importance_sampling_correction:
        raise ValueError(
            f"`vllm_importance_sampling_correction=True` corrects a ratio that estimator={args.estimator!r} does not "
            "have; set it to False."
        )
