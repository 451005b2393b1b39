"""SGOPDConfig: presets, each field's range, and GRPO's settings that it cannot honour."""

import math
import pickle
from dataclasses import dataclass, fields

import pytest
from trl import GRPOConfig, TrlParser

from sg_opd import SGOPDConfig
from sg_opd.config import own_fields
from sg_opd.method.gate import DIVERGENCES
from sg_opd.presets import PRESETS, UNUSED_BY_DIVERGENCES


def make(**kwargs):
    return SGOPDConfig(**{"output_dir": "out", "bf16": False, "use_cpu": True, "report_to": "none", **kwargs})


# the table of the method's page: rule, signal, extrapolation, interpolation, neutral, reference
TABLE = {
    "opd": ("sign", "verdict", 1.0, 1.0, 1.0, "current"),
    "exopd": ("sign", "verdict", 1.25, 1.25, 1.0, "initial"),
    "opdvr": ("sign", "verdict", 1.0, 0.0, 1.0, "current"),
    "grpd": ("sign", "group", 1.0, 0.0, 0.0, "current"),
    "r2-opd": ("sigmoid", "verdict", 1.0, 1.0, 1.0, "current"),
    "rg-opd": ("row", "verdict", 1.0, 1.0, 1.0, "current"),
    "power-opd": ("sign", "verdict", 1.0, 1.0, 1.0, "current"),
    "opd-grpo": ("sign", "verdict", 1.0, 1.0, 1.0, "current"),
    "sg-opd": ("sign", "group", 1.8, 1.0, 1.0, "initial"),
    "sg-opd-lite": ("sign", "verdict", 1.8, 1.0, 1.0, "current"),
}
FURTHER = {  # what else a preset has of its own
    "r2-opd": {"truncated_verdict": "abstain", "gate_beta": 1e-3},
    "rg-opd": {"gate_row_threshold": 0.0},
    "power-opd": {"log_ratio_form": "power", "log_ratio_power": 0.5},
    "opd-grpo": {"advantage_weight": 0.1},
    "sg-opd": {"teacher_phase_steps": 2 / 3, "teacher_phase_schedule": "three-phase", "teacher_rollout_loss": "nll"},
    "sg-opd-lite": {"teacher_phase_steps": 0.1},
}
PLAIN = {
    **{"teacher_phase_steps": 0, "teacher_phase_schedule": "linear", "teacher_rollout_loss": "gated"},
    **{"truncated_verdict": "judge", "advantage_weight": 0.0, "log_ratio_form": "log"},
    **{"teacher_phase_fraction": 0.25, "teacher_phase_hold": 0.5, "teacher_rollout_weight": 1.0},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_published_table(preset):
    args = make(preset=preset)
    factors = args.gate_extrapolation, args.gate_interpolation, args.gate_neutral
    assert (args.gate_rule, args.gate_signal, *factors, args.reference_policy) == TABLE[preset]
    expected = PLAIN | FURTHER.get(preset, {})
    assert {name: getattr(args, name) for name in expected} == expected


def test_trls_defaults_are_trls():
    """But for one field, whose help says so; a mixin could put those of TrainingArguments in their place."""
    ours, theirs = make(), GRPOConfig("out", bf16=False, use_cpu=True, report_to="none")
    differing = [f.name for f in fields(theirs) if getattr(ours, f.name) != getattr(theirs, f.name)]
    assert differing == ["enable_jit_checkpoint"]


def test_the_phase_of_sg_opd_has_thirds():
    """Of 60 steps 20 are held at a quarter, 20 decay by a cosine, 20 have none; halfway down it is an eighth."""
    phase = make().teacher_phase_sampler(max_steps=60)
    assert [phase.fraction_at(step) for step in (0, 19, 20, 40, 59)] == [0.25, 0.25, 0.25, 0.0, 0.0]
    assert phase.fraction_at(30) == pytest.approx(0.125)
    assert make(teacher_phase_steps=40, teacher_phase_hold=0.25).teacher_phase_sampler(60).fraction_at(10) == 0.25
    assert (
        make(teacher_phase_steps=40, teacher_phase_hold=0.25).teacher_phase_sampler(60).fraction_at(25) < 0.125 + 1e-9
    )


def test_the_default_is_sg_opd_and_a_given_value_wins():
    assert make().preset == "sg-opd"
    args = make(preset="opd", gate_extrapolation=3.0, teacher_phase_steps=7)
    assert (args.gate_extrapolation, args.gate_interpolation, args.teacher_phase_steps) == (3.0, 1.0, 7)


@pytest.mark.parametrize(("steps", "length"), [(0, 0), (0.1, 25), (0.001, 1), (1, 1), (40, 40), (40.0, 40)])
def test_phase_length(steps, length):
    assert make(teacher_phase_steps=steps).teacher_phase_length(max_steps=250) == length


BAD = [
    ({"preset": "sgopd"}, "preset"),
    ({"gate_rule": "signs"}, "gate_rule"),
    ({"gate_signal": "groups"}, "gate_signal"),
    ({"gate_neutral": -1.0}, "gate_neutral"),
    ({"gate_neutral": 0.0}, "gate_neutral"),  # with the initial reference
    ({"gate_beta": math.nan}, "gate_beta"),
    ({"gate_row_threshold": -1.0}, "gate_row_threshold"),
    ({"gate_rule": "sigmoid", "reference_policy": "initial"}, "gate_rule"),
    ({"gate_rule": "row", "reference_policy": "initial"}, "gate_rule"),
    ({"advantage_weight": -0.1}, "advantage_weight"),
    ({"advantage_weight": 0.1, "estimator": "full"}, "advantage_weight"),
    ({"preset": "opd", "advantage_weight": 0.1, "num_generations": 1}, "advantage_weight.*num_generations"),
    ({"num_generations": 1}, "gate_signal.*num_generations.*sg-opd-lite"),
    ({"log_ratio_form": "root"}, "log_ratio_form"),
    ({"log_ratio_form": "power", "estimator": "full"}, "log_ratio_form"),
    ({"log_ratio_form": "power", "log_ratio_clip": 1.0}, "log_ratio_clip"),
    ({"log_ratio_power": 0.0}, "log_ratio_power"),
    ({"log_ratio_power": 1.1}, "log_ratio_power"),
    ({"teacher_phase_hold": 1.0}, "teacher_phase_hold"),
    ({"preset": "opd", "teacher_phase_hold": 0.3}, "`teacher_phase_hold=0.3` has no effect.*teacher_phase_schedule"),
    ({"preset": "opd", "gate_beta": 0.1}, "gate_beta.*gate_rule='sign'"),
    ({"preset": "opd", "gate_row_threshold": 0.1}, "gate_row_threshold"),
    ({"preset": "opd", "log_ratio_power": 0.3}, "log_ratio_power.*log_ratio_form='log'"),
    ({"preset": "opd", "teacher_rollout_weight": 2.0}, "teacher_rollout_weight.*teacher_rollout_loss"),
    ({"preset": "r2-opd", "gate_extrapolation": 1.5}, "gate_extrapolation.*gate_rule='sigmoid'"),
    ({"preset": "r2-opd", "gate_neutral": 0.5}, "gate_neutral"),
    ({"preset": "rg-opd", "gate_dead_zone": 0.5}, "gate_dead_zone.*gate_rule='row'"),
    ({"teacher_rollout_weight": -1.0}, "teacher_rollout_weight"),
    ({"gate_extrapolation": -1.0}, "gate_extrapolation"),
    ({"gate_interpolation": math.inf}, "gate_interpolation"),
    ({"gate_interpolation": 0.0, "reference_policy": "initial"}, "gate_interpolation"),
    ({"gate_dead_zone": -0.1}, "gate_dead_zone"),
    ({"log_ratio_clip": 0.0}, "log_ratio_clip"),
    ({"log_ratio_clip": 2.0, "estimator": "full"}, "log_ratio_clip"),
    ({"log_ratio_clip": 2.0, "estimator": "top_k"}, "log_ratio_clip"),
    ({"preset": "opd-grpo", "estimator": "top_k"}, "advantage_weight"),
    ({"preset": "power-opd", "estimator": "top_k"}, "log_ratio_form"),
    ({"use_vllm": True, "estimator": "top_k"}, "vllm_importance_sampling_correction.*'top_k'"),
    ({"estimator": "top_k", "teacher_top_k": 0}, "`teacher_top_k` must be a whole number >= 1"),
    ({"teacher_top_k": 16}, "`teacher_top_k=16` has no effect with estimator='sampled'.*or set estimator"),
    ({"estimator": "full", "teacher_server_url": "http://host:8000", "temperature": 1.0}, "'top_k' or 'sampled'"),
    ({"estimator": "topk"}, "estimator"),
    ({"reference_policy": "base"}, "reference_policy"),
    ({"teacher_phase_steps": 1.5}, "teacher_phase_steps"),
    ({"teacher_phase_steps": -1}, "teacher_phase_steps"),
    ({"teacher_phase_fraction": 1.01}, "teacher_phase_fraction"),
    ({"teacher_phase_schedule": "step"}, "teacher_phase_schedule"),
    ({"teacher_candidates": 0}, "teacher_candidates"),
    ({"teacher_rollout_loss": "sft"}, "teacher_rollout_loss"),
    ({"teacher_rollout_loss": "nll", "loss_type": "grpo"}, "teacher_rollout_loss"),
    ({"metric_for_best_model": "loss"}, "metric_for_best_model"),
    ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, "metric_for_best_model"),
    ({"sync_ref_model": True, "reference_policy": "initial", "beta": 0.1}, "sync_ref_model"),
    ({"reward_weights": [2.0]}, "reward_weights"),
    (
        {"vllm_importance_sampling_clip_min": 3.0, "vllm_importance_sampling_clip_max": 2.0, "num_generations": 1},
        "clip_min",
    ),
    ({"generation_batch_size": 12, "num_generations": 8}, "generation_batch_size"),
]


@pytest.mark.parametrize(("kwargs", "name"), BAD, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_bad_values_are_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        make(**kwargs)


OTHER_VALUES = {
    "loss_type": "grpo",
    "beta": 0.1,
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "top_entropy_quantile": 0.5,
    "importance_sampling_level": "sequence",
    "off_policy_mask_threshold": 0.5,
    "delta": 2.0,
    "cast_lm_head_to_fp32": True,
}


@pytest.mark.parametrize("estimator", DIVERGENCES)
@pytest.mark.parametrize("name", UNUSED_BY_DIVERGENCES)
def test_a_divergence_refuses_what_it_cannot_honour(name, estimator):
    make(preset="opd", **{name: OTHER_VALUES[name]})
    with pytest.raises(ValueError, match=f"`{name}=.*estimator='{estimator}'"):
        make(preset="opd", estimator=estimator, **{name: OTHER_VALUES[name]})


def test_idle_values_are_the_parents_defaults():
    args = make()
    assert {name: getattr(args, name) for name in UNUSED_BY_DIVERGENCES} == UNUSED_BY_DIVERGENCES


def test_one_generation_is_allowed_and_plain_afterwards():
    args = make(preset="sg-opd-lite", num_generations=1, per_device_train_batch_size=3)
    assert args.num_generations == 1
    assert type(args.num_generations) is int
    assert args.to_json_string()


def test_trls_parser_reads_every_field(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: out\nbf16: false\nuse_cpu: true\npreset: opdvr\nlog_ratio_clip: 2.0\nteacher_phase_steps: 0.2\n"
        "teacher_model_name_or_path: t\nteacher_model_init_kwargs: {dtype: bfloat16}\n"
    )
    (args,) = TrlParser(SGOPDConfig).parse_args_and_config(["--config", str(path), "--gate_dead_zone", "0.05"])
    assert (args.preset, args.log_ratio_clip, args.teacher_phase_steps) == ("opdvr", 2.0, 0.2)
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert args.gate_dead_zone == 0.05


def test_every_new_field_is_described_once():
    new = set(SGOPDConfig.__annotations__)
    fields = {name: f for name, f in SGOPDConfig.__dataclass_fields__.items() if name in new}
    assert all(f.metadata.get("help") for f in fields.values())
    assert "config" not in new  # TRL's parsers refuse it


def test_a_configuration_of_ones_own_shows_all_of_its_settings():
    @dataclass(repr=False)
    class Own(SGOPDConfig):
        mine: int = 3

    args = Own(output_dir="out", bf16=False, use_cpu=True, report_to="none")
    assert own_fields(args)[0] == "preset"
    assert own_fields(args)[-1] == "mine"
    assert "| `gate_dead_zone` | `0.0` |" in args.card_section("a teacher")
    assert "| `mine` | `3` |" in args.card_section("a teacher")


def test_a_pickle_keeps_what_the_receiver_needs(tmp_path):
    """As a spawned worker or a launcher gets it: without the address it would load the served model itself."""
    url, loading = "http://teacher.internal:8000", {"token": "hf_s3cret"}
    args = SGOPDConfig(
        str(tmp_path), teacher_server_url=url, hub_token="hf_s3cret", temperature=1.0, bf16=False, use_cpu=True,
        model_init_kwargs=loading,
    )  # fmt: skip
    received = pickle.loads(pickle.dumps(args))
    assert received.teacher_server_url == [url]
    assert (received.hub_token, received.model_init_kwargs) == ("hf_s3cret", loading)
    assert received.__dict__.keys() == args.__dict__.keys()
