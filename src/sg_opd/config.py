"""`SGOPDConfig`: TRL's `GRPOConfig` with the fields of SG-OPD, which presets fill."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from transformers.hf_argparser import HfArg
from trl import GRPOConfig

from .confidential import Confidential
from .method.gate import GateSettings, is_divergence
from .method.teacher_phase import SCHEDULES, TeacherPhaseSampler
from .presets import PRESETS, SOURCES, check_idle, check_unused
from .teachers.sampling import WHOLE_DISTRIBUTION
from .teachers.several import check_sources

CHOICES = {
    "preset": tuple(PRESETS),
    "teacher_phase_schedule": tuple(SCHEDULES),
    "teacher_rollout_loss": ("gated", "nll"),
    "truncated_verdict": ("judge", "abstain"),
    "non_finite_log_probs": ("stop", "skip"),
}
LEAST = {"teacher_candidates": 1, "log_gate_samples": 0, "teacher_server_concurrency": 1, "teacher_server_retries": 0}
LEAST |= {"teacher_rollout_weight": 0}
# the fields of `GateSettings` by their names here
GATE_FIELDS = {
    "extrapolation": "gate_extrapolation",
    "interpolation": "gate_interpolation",
    "estimator": "estimator",
    "dead_zone": "gate_dead_zone",
    "log_ratio_clip": "log_ratio_clip",
    "temperature": "temperature",
    "rule": "gate_rule",
    "reference": "reference_policy",
    "signal": "gate_signal",
    "neutral": "gate_neutral",
    "beta": "gate_beta",
    "row_threshold": "gate_row_threshold",
    "advantage_weight": "advantage_weight",
    "log_ratio_form": "log_ratio_form",
    "log_ratio_power": "log_ratio_power",
    "top_k": "teacher_top_k",
}


class _OneGeneration(int):
    """1, but not below 2: GRPO's check asks for a group to centre rewards in, which SG-OPD does not do."""

    def __lt__(self, other: object) -> bool:
        return False if other == 2 else super().__lt__(other)


@dataclass(repr=False)
class SGOPDConfig(Confidential, GRPOConfig):
    """Settings of [`SGOPDTrainer`]: all of [`~trl.GRPOConfig`], and the fields below.

    `num_generations=1` is allowed where nothing is compared within a group. The verifier's verdict is a sign: GRPO's
    reward weights have no effect, and its scaling has one where `advantage_weight` adds GRPO's advantage.
    A field that a preset sets is `None` until the preset fills it, and a value given here wins over the preset's.
    Checkpoints, trackers and the text of a configuration hold no address of a server and no token.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs", "teacher_models"]

    preset: str = HfArg(
        default="sg-opd",
        help="Variant that fills the fields left at None. "
        + "; ".join(f"'{n}': {text}" for n, text in SOURCES.items()),
    )
    gate_rule: str | None = HfArg(
        default=None,
        help="How the gate turns teacher preference and outcome into a factor: 'sign' (SG-OPD), 'sigmoid' (R2-OPD) or "
        "'row' (RG-OPD).",
    )
    gate_signal: str | None = HfArg(
        default=None,
        help="What the gate's sign is of: 'verdict', or 'group' (the outcome less the mean of its prompt's group; 0 "
        "where all of a group have one verdict), which needs num_generations >= 2.",
    )
    gate_extrapolation: float | None = HfArg(
        default=None, help="Reward-scaling factor of consensus tokens (teacher and verifier agree), finite, >= 0."
    )
    gate_interpolation: float | None = HfArg(
        default=None,
        help="Reward-scaling factor of conflict tokens (they disagree), finite, >= 0; > 0 with "
        "reference_policy='initial'.",
    )
    gate_neutral: float | None = HfArg(
        default=None, help="Factor of neutral tokens (one of them takes no side), finite, >= 0; rules 'sign' and 'row'."
    )
    gate_beta: float = HfArg(default=1e-3, help="Sharpness of gate_rule='sigmoid', finite, >= 0; 0 is plain OPD.")
    gate_row_threshold: float = HfArg(
        default=0.0, help="Nats by which a rollout's summed delta must agree with the outcome in gate_rule='row', >= 0."
    )
    gate_dead_zone: float = HfArg(
        default=0.0, help="Tokens whose teacher and student log-probs differ by at most this many nats are neutral."
    )
    log_ratio_clip: float | None = HfArg(
        default=None, help="Clip each log-ratio of the sampled estimator's advantage to [-c, c] nats. None: no clip."
    )
    log_ratio_form: str | None = HfArg(
        default=None,
        help="Teacher preference of the sampled estimator: 'log' (difference of log-probs) or 'power' (PowerOPD: of "
        "probabilities to the power log_ratio_power, bounded by 1).",
    )
    log_ratio_power: float = HfArg(default=0.5, help="Exponent of log_ratio_form='power', in (0, 1].")
    advantage_weight: float | None = HfArg(
        default=None,
        help="w >= 0 adds w times GRPO's group advantage, scaled as scale_rewards says, to the advantage of each token "
        "of the sampled estimator.",
    )
    estimator: str = HfArg(
        default="sampled",
        help="'sampled': policy gradient on the sampled token. 'full': divergence of the whole distribution at each "
        "position, computed in chunks. 'top_k': of the teacher's teacher_top_k likeliest ids and the sampled one, with "
        "one bucket for the rest; for teachers on servers too.",
    )
    teacher_top_k: int = HfArg(
        default=64,
        help="Likeliest ids of the teacher at each position of estimator='top_k', >= 1; a server's --max-logprobs must "
        "allow as many. (`top_k` is of generation.)",
    )
    reference_policy: str | None = HfArg(
        default=None,
        help="Policy the reward is measured against: 'current' (no third model) or 'initial' (the student before "
        "training, kept frozen).",
    )
    teacher_phase_steps: float | None = HfArg(
        default=None, help="Length of the teacher phase: optimizer steps, or, below 1, a share of all steps. 0: off."
    )
    teacher_phase_fraction: float = HfArg(
        default=0.25, help="Share of each prompt's rollouts that are teacher slots at step 0, in [0, 1]."
    )
    teacher_phase_schedule: str | None = HfArg(
        default=None,
        help="Decay of that share over the phase: 'constant', 'linear', 'cosine' or 'three-phase' (held, then cosine).",
    )
    teacher_phase_hold: float = HfArg(default=0.5, help="Share of the phase that 'three-phase' holds, in [0, 1).")
    teacher_candidates: int = HfArg(
        default=1, help="Completions the teacher proposes for each slot, >= 1; the first endorsed one is taken."
    )
    teacher_rollout_loss: str | None = HfArg(
        default=None, help="Loss on teacher rollouts: 'gated' (as on the student's) or 'nll' (maximum likelihood)."
    )
    teacher_rollout_weight: float = HfArg(default=1.0, help="Scales the loss of teacher_rollout_loss='nll', >= 0.")
    teacher_model_name_or_path: str | None = HfArg(default=None, help="Teacher to load when the trainer is given none.")
    teacher_model_revision: str | None = HfArg(default=None, help="Revision (branch, tag or commit) of the teacher.")
    teacher_model_init_kwargs: dict | str | None = HfArg(
        default=None, help="Keyword arguments for the teacher's from_pretrained. dtype defaults to the checkpoint's."
    )
    teacher_models: dict | str | None = HfArg(
        default=None,
        help="Several teachers by name, when the trainer is given none: each a path, a hub id or 'initial', or a "
        "mapping with `model_name_or_path`, `server_url`, `revision`, `init_kwargs`, as the fields of a single one.",
    )
    teacher_column: str = HfArg(
        default="teacher", help="Column of the dataset that names each row's teacher, where there are several."
    )
    teacher_offload: bool = HfArg(
        default=False,
        help="Keep the blocks of a teacher in this process in host memory; each comes to the device for its forward, "
        "and all of them while the teacher generates.",
    )
    teacher_server_url: list[str] | None = HfArg(
        default=None,
        help="Base URL of a `vllm serve` endpoint that holds the teacher, as http://host:8000; several share the load. "
        "`teacher_model_name_or_path` is then the id of the served model, for servers that have several.",
    )
    teacher_server_timeout: float = HfArg(
        default=240.0, help="Seconds one request to the teacher's server may take; above the server's warm-up."
    )
    teacher_server_concurrency: int = HfArg(
        default=8, help="Requests of one process to the teacher's server in flight at a time, >= 1."
    )
    teacher_server_retries: int = HfArg(
        default=5,
        help="Further attempts after a failed request (connection, time-out, 429, 5xx, malformed answer), >= 0.",
    )
    truncated_verdict: str | None = HfArg(
        default=None,
        help="Verdict on a rollout that was cut at `max_completion_length`, in training: 'judge' (as on any other) or "
        "'abstain' (neutral in the gate).",
    )
    non_finite_log_probs: str = HfArg(
        default="stop",
        help="What a NaN or infinite log-probability of a sampled token does: 'stop' ends the run, 'skip' drops its "
        "optimizer step. Either names the rollout and the token.",
    )
    log_gate_samples: int = HfArg(
        default=0,
        help="Rollouts to keep at each logging step, each token with its case, in `gate_samples.html` and "
        "`gate_samples.jsonl` in output_dir and in the trackers, >= 0.",
    )
    enable_jit_checkpoint: bool = HfArg(
        default=True,
        help="SIGTERM, as a preempted node gets it, ends the run after the step in progress, with a checkpoint and "
        "exit code 143. GRPO's default is False.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.teacher_server_url, str):  # as one URL in a recipe is
            self.teacher_server_url = [self.teacher_server_url]
        self._fill_from_preset()
        single = self.num_generations == 1
        if single:
            self.num_generations = _OneGeneration(1)
        super().__post_init__()
        if single:
            self.num_generations = 1
        self._check_fields()
        self._check_server_fields()
        self._check_parent_fields()

    def _fill_from_preset(self) -> None:
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"`{name}` must be one of {choices}; got {getattr(self, name)!r}.")

    def _check_fields(self) -> None:
        self.gate_settings()  # raises
        check_idle(self)
        steps = self.teacher_phase_steps
        if not (math.isfinite(steps) and steps >= 0 and (steps < 1 or steps == int(steps))):
            raise ValueError(
                f"`teacher_phase_steps` must be a whole number of steps, or a share in [0, 1); got {steps!r}."
            )
        if not 0.0 <= self.teacher_phase_fraction <= 1.0:
            raise ValueError(f"`teacher_phase_fraction` must be in [0, 1], got {self.teacher_phase_fraction!r}.")
        if not 0.0 <= self.teacher_phase_hold < 1.0:
            raise ValueError(f"`teacher_phase_hold` must be in [0, 1), got {self.teacher_phase_hold!r}.")
        self._check_groups()
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)!r}.")

        stated: Any = self.generation_kwargs or {}
        if stated.get("temperature", self.temperature) != self.temperature:
            raise ValueError(
                f"`generation_kwargs` has temperature={stated['temperature']!r}, but `temperature` is "
                f"{self.temperature!r}: log-probabilities are computed at the field's, and rollouts must be sampled at "
                "the same one. Set the field."
            )

    def _check_groups(self) -> None:
        """Refuse a single rollout a prompt where one is compared with its group."""
        if self.num_generations != 1:
            return
        for name, alone in (("gate_signal", "verdict"), ("advantage_weight", 0.0)):
            if getattr(self, name) != alone:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` (preset {self.preset!r}) compares a rollout with the others of "
                    f"its prompt, but `num_generations` is 1. Set num_generations >= 2, or {name}={alone!r}; "
                    "preset='sg-opd-lite' gates by the verdict alone."
                )

    def _check_server_fields(self) -> None:
        if not self.teacher_server_timeout > 0:
            raise ValueError(f"`teacher_server_timeout` must be > 0 seconds, got {self.teacher_server_timeout!r}.")
        check_sources(self)

    def _check_parent_fields(self) -> None:
        if self.metric_for_best_model in ("loss", "eval_loss"):
            raise ValueError(
                "`metric_for_best_model='loss'` has nothing to compare: evaluation generates and grades, it calls no "
                "teacher and has no loss. Use metric_for_best_model='eval_reward' with greater_is_better=True "
                "(load_best_model_at_end=True chooses 'loss' unless told otherwise)."
            )
        if is_divergence(self.estimator):
            check_unused(self)
        for name, whole in WHOLE_DISTRIBUTION.items():
            if getattr(self, name) is None and name != "min_p":  # else transformers' own default, a top_k of 50
                setattr(self, name, whole)
        if self.reward_weights is not None:
            raise ValueError(
                "`reward_weights` has nothing to weigh: a verdict is a sign, not a reward. Leave it at None."
            )
        if self.teacher_rollout_loss == "nll" and self.teacher_phase_steps and self.loss_type != "dapo":
            raise ValueError(
                f"`teacher_rollout_loss='nll'` (preset {self.preset!r}) needs loss_type='dapo', got "
                f"{self.loss_type!r}; with another one set teacher_rollout_loss='gated'."
            )
        if self.non_finite_log_probs == "skip" and self.deepspeed_plugin is not None:
            raise ValueError(
                "non_finite_log_probs='skip' does not run under DeepSpeed, whose engine steps by itself; use 'stop'."
            )
        if self.sync_ref_model and self.reference_policy == "initial":
            raise ValueError("`sync_ref_model=True` moves the reference; reference_policy='initial' keeps it fixed.")

    def gate_settings(self) -> GateSettings:
        """The gate that these fields describe."""
        return GateSettings(**{name: getattr(self, ours) for name, ours in GATE_FIELDS.items()}, names=GATE_FIELDS)

    def teacher_phase_length(self, max_steps: int) -> int:
        """The phase's length in optimizer steps, for a run of `max_steps`; a share is rounded up."""
        steps = self.teacher_phase_steps
        return int(steps) if steps >= 1 or steps == 0 else math.ceil(steps * max_steps)

    def teacher_phase_sampler(self, max_steps: int) -> TeacherPhaseSampler:
        """The sampler these settings describe, for a run of `max_steps` optimizer steps."""
        decay = self.teacher_phase_fraction, self.teacher_phase_length(max_steps), self.teacher_phase_schedule
        return TeacherPhaseSampler(*decay, self.teacher_candidates, seed=self.seed, hold=self.teacher_phase_hold)

    def card_section(self, teacher: str) -> str:
        """The section of a model card that names the teacher and the method's settings, as Markdown."""
        own = [name for name in own_fields(self) if not name.startswith(("teacher_model", "teacher_server_"))]
        rows = "\n".join(f"| `{name}` | `{getattr(self, name)}` |" for name in own)
        return f"### SG-OPD settings\n\nTeacher: `{teacher}`\n\n| field | value |\n| --- | --- |\n{rows}\n\n"


def own_fields(args: SGOPDConfig) -> list[str]:
    """The fields that are not TRL's: those above, and those of a user's subclass."""
    parents = {known.name for known in fields(GRPOConfig)}
    return [known.name for known in fields(args) if known.init and known.name not in parents]
