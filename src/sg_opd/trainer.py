"""`SGOPDTrainer`: TRL's GRPO trainer, distilling from a teacher whose tokens a verifier gates."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from datasets import Dataset
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import _ForwardRedirection, disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, get_callable_name, get_config_model_id

from .checks import check_arguments, check_dataset, check_models, check_prompts
from .config import SGOPDConfig
from .divergence import (
    check_linear,
    chunked_divergence,
    chunked_nll,
    head_of,
    last_hidden_state,
    tilted_target,
)
from .loss import GateDecision, SignGatedLoss, policy_gradient
from .metrics import GateMeter, rollout_metrics
from .reference import InitialPolicy, capture
from .teacher import LocalTeacher, freeze, load_teacher, padding_ids, shared_vocabulary
from .teacher_phase import Proposal, TeacherPhaseSampler
from .verifiers import MathVerifier, checked_verdicts

# what a multimodal batch carries beside token ids, as the parent's forward takes it
FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# what the parent does not hand to a reward function either
NOT_FORWARDED = ("prompt", "completion", "completion_ids")



class SGOPDTrainer(GRPOTrainer):
    """Sign-Gated On-Policy Distillation (arXiv 2606.09304) as a subclass of [`~trl.GRPOTrainer`].

    The student samples completions; the verifier judges each; the teacher scores each token. Tokens that the teacher
    moves the way the verdict wants are extrapolated, the others interpolated; in a first phase, part of the rollouts
    are the teacher's own, where the verifier endorses them.

    Inherited as they are: generation (transformers, vLLM), prompt groups, PPO ratio and clipping, engine-mismatch
    correction, loss normalisation, logging, checkpoints, LoRA and quantisation. Replaced: rewards become verdicts,
    advantages become the gate's, evaluation generates and grades only.

    Args:
        model: the student; a path, a hub id, a `PreTrainedModel` or a `PeftModel`.
        teacher_model: the teacher; a path, a hub id or a `PreTrainedModel`. Default: `args.teacher_model_name_or_path`.
            Its dtype is its checkpoint's unless `args.teacher_model_init_kwargs` asks for another.
        verifier: judges completions in TRL's reward-function form, answering 1 (correct), 0 (incorrect) or `None`
            (abstained) each. Default: `MathVerifier()`, which needs the column `solution`.
        args: an [`SGOPDConfig`].
        train_dataset: columns `prompt` and those the verifier reads.
        eval_dataset: the same, or a dict of such.
        peft_config: wraps the student, as in GRPO.
        quantization_config: for loading the student by name; the teacher is never quantised unless its own
            `teacher_model_init_kwargs` say so.
        **kwargs: `processing_class`, `callbacks`, `optimizers` and all else that GRPO's trainer takes.

    Raises:
        ValueError, TypeError: an argument, a dataset or a pair of models that cannot work, by name.

    Example:

    ```python
    from sg_opd import SGOPDConfig, SGOPDTrainer

    trainer = SGOPDTrainer(
        model="Qwen/Qwen3-1.7B",
        teacher_model="Qwen/Qwen3-4B",
        args=SGOPDConfig(output_dir="out"),
        train_dataset=dataset,  # columns: prompt, solution
    )
    trainer.train()
    ```
    """

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

    def __init__(
        self,
        model: Any,
        teacher_model: str | PreTrainedModel | None = None,
        verifier: Callable[..., list[float | None]] | None = None,
        args: SGOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SGOPDConfig(f"{name.split('/')[-1]}-SG-OPD")
        verifier = MathVerifier() if verifier is None else verifier
        teacher_model = getattr(args, "teacher_model_name_or_path", None) if teacher_model is None else teacher_model
        check_arguments(teacher_model, model, verifier, args, eval_dataset, kwargs)
        check_dataset("train_dataset", train_dataset, verifier, args)
        check_dataset("eval_dataset", eval_dataset, verifier, args)
        self.verifier = verifier
        self.sign_gated_loss = SignGatedLoss(
            args.gate_extrapolation,
            args.gate_interpolation,
            args.estimator,
            args.gate_dead_zone,
            args.log_ratio_clip,
            args.temperature,
        )
        self._meter = GateMeter()
        self._gate_inputs: dict[str, Any] | None = None
        self._taken: dict[int, Proposal] = {}
        self._slots: list[int] = []
        self._row_advantages: Tensor | None = None
        self._redirect = _ForwardRedirection()
        captured = capture(model, peft_config, args)
        super().__init__(
            model=model,
            reward_funcs=self._reward,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            quantization_config=quantization_config,
            **kwargs,
        )
        self.reward_func_names[0] = get_callable_name(verifier)
        self._set_up_teacher(teacher_model)
        if args.reference_policy == "initial":
            loading = {**self._loading_defaults(), "dtype": self.model.dtype, **(args.model_init_kwargs or {})}
            if quantization_config is not None:
                loading["quantization_config"] = quantization_config
            self.initial_policy = InitialPolicy(captured, self, loading)
        self._check_set_up()

    def _set_up_teacher(self, teacher_model: str | PreTrainedModel) -> None:
        args = self.args
        teacher = load_teacher(
            teacher_model, args.teacher_model_revision, args.teacher_model_init_kwargs, **self._loading_defaults()
        )
        student = self.accelerator.unwrap_model(self.model)
        check_models(student, teacher, self._tokenizer, args)
        shared = shared_vocabulary(student, teacher)
        self._suppress_padding(padding_ids(student, shared))
        add_fused_lm_head(freeze(teacher), temperature=self.temperature)
        self.teacher = LocalTeacher(teacher, self, shared)

    def _loading_defaults(self) -> dict[str, Any]:
        defaults = {"trust_remote_code": self.args.trust_remote_code}
        if self.args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
            defaults["device_map"] = None  # as the parent does: "auto" fails there
        return defaults

    def _suppress_padding(self, ids: list[int] | None) -> None:
        """Never sample the student's ids that the teacher does not have."""
        if ids is None:
            return
        if self.use_vllm:
            self.vllm_generation.generation_kwargs["logit_bias"] = dict.fromkeys(ids, -100.0)
        else:
            self.generation_config.suppress_tokens = ids
            self.generation_kwargs["suppress_tokens"] = ids

    def _check_set_up(self) -> None:
        contexts = [
            getattr(model.config.get_text_config(), "max_position_embeddings", None)
            for model in (self.accelerator.unwrap_model(self.model), self.teacher.unwrapped)
        ]
        context = min((c for c in contexts if c), default=None)
        if context and isinstance(self.train_dataset, Dataset) and not self._is_vlm and self.environment_factories is None:
            tokenize = lambda prompts: self._tokenize_prompts(prompts)[0]  # noqa: E731
            check_prompts("train_dataset", self.train_dataset, tokenize, context, self.max_completion_length)
        if self.args.estimator == "full":
            if self._is_vlm:
                raise ValueError("estimator='full' is for text models; use estimator='sampled' with this processor.")
            if self.aux_loss_enabled:
                raise ValueError("estimator='full' has no router loss: set `router_aux_loss_coef=0`.")
            if self.args.reference_policy == "initial":
                check_linear(head_of(self.teacher.unwrapped), head_of(self.accelerator.unwrap_model(self.model)))

    @property
    def teacher_phase(self) -> TeacherPhaseSampler:
        """The teacher phase of this run; its length is known once training has begun."""
        return self.args.teacher_phase_sampler(self.state.max_steps)

    def _generate(self, prompts: list) -> tuple:
        output = super()._generate(prompts)
        self._taken, self._slots = {}, []
        if self.model.training:
            self._mix_teacher_rollouts(prompts, output)
        return output

    def _mix_teacher_rollouts(self, prompts: list, output: tuple) -> None:
        """Put endorsed teacher rollouts into the slots of this rank's rows, in place."""
        prompt_ids, completion_ids, _, completions, logprobs, *_ = output
        phase, step, local = self.teacher_phase, self.state.global_step, len(prompts)
        first = self.accelerator.process_index * local
        num_prompts = local * self.accelerator.num_processes // self.num_generations
        if not phase.slots(step, num_prompts, self.num_generations).any():
            return
        self._slots = phase.slot_rows(step, num_prompts, self.num_generations, range(first, first + local))
        if self.teacher.sharded and not self._slots:
            self.teacher.propose(prompt_ids[:1])  # every rank holds a part of the weights: take part, keep nothing
            return

        def propose(rows: list[int], candidates: int) -> list[list[Proposal]]:
            proposed = self.teacher.propose([prompt_ids[row] for row in rows])
            return [
                [Proposal(ids, self._as_completion(prompts[row], ids), self.teacher.ended(ids)) for ids in some]
                for row, some in zip(rows, proposed, strict=True)
            ]

        def endorse(rows: list[int], proposals: list[Proposal]) -> list[float | None]:
            completions = [p.completion for p in proposals]
            return self._judge(rows, prompts, completions, [p.token_ids for p in proposals], log_extra=_discard)

        self._taken = phase.fill(self._slots, propose, endorse)
        for row, proposal in self._taken.items():
            completion_ids[row], completions[row] = proposal.token_ids, proposal.completion
            if logprobs is not None:  # NaN: an engine ratio of exactly 1, in all of the parent's modes
                logprobs[row] = [math.nan] * len(proposal.token_ids)

    def _as_completion(self, prompt: Any, ids: list[int]) -> Any:
        text = self.processing_class.batch_decode([ids], skip_special_tokens=True)[0]
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    def _judge(self, rows: list[int], prompts: list, completions: list, ids: list, **extras: Any) -> list:
        """The verifier's answer to completions of some rows of this rank's batch, with those rows' columns."""
        inputs = [self._rows[row] for row in rows]
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in NOT_FORWARDED}
        extras = {"trainer_state": self.state, "log_metric": self._log_metric, **extras}
        return checked_verdicts(
            self.verifier, [prompts[row] for row in rows], completions, completion_ids=ids, **columns, **extras
        )

    def _reward(self, prompts: list, completions: list, completion_ids: list, **extras: Any) -> list[float]:
        """The reward function given to the parent: keeps the verdicts, and answers a number for each row."""
        rows = [row for row in range(len(prompts)) if row not in self._taken]
        verdicts: list[float | None] = [1.0] * len(prompts)  # an endorsement stands, it is not graded again

        def log_extra(column: str, values: list) -> None:
            by_row = dict(zip(rows, values, strict=True))
            self._log_completion_extra(column, [by_row.get(row) for row in range(len(prompts))])

        if rows:
            ids = [completion_ids[row] for row in rows]
            graded = self._judge(rows, prompts, [completions[row] for row in rows], ids, log_extra=log_extra)
            for row, verdict in zip(rows, graded, strict=True):
                verdicts[row] = verdict
        self._verdicts = verdicts
        return [0.0 if verdict is None else verdict for verdict in verdicts]

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        mode = "train" if self.model.training else "eval"
        device = self.accelerator.device
        labels = torch.tensor([math.nan if v is None else v for v in self._verdicts], device=device)
        from_teacher = torch.tensor([row in self._taken for row in range(len(prompts))], device=device)
        slots = None
        if mode == "train":
            slots = gather(torch.tensor([row in self._slots for row in range(len(prompts))], device=device))
        all_labels, all_from_teacher = gather(labels), gather(from_teacher)
        for name, value in rollout_metrics(all_labels, all_from_teacher, slots).items():
            self._metrics[mode][name].append(value)
        if self.log_completions:
            words = {1.0: "correct", 0.0: "incorrect", None: "abstained"}
            self._log_completion_extra("verdict", [words[verdict] for verdict in self._verdicts])
            self._log_completion_extra("source", ["teacher" if taken else "student" for taken in from_teacher.tolist()])
        self._rollouts = {"verifier_labels": labels, "from_teacher": from_teacher}
        # NaN keeps abstentions, without the parent's warning for each, and teacher rows out of `reward`
        rewards[:, 0] = all_labels.masked_fill(all_from_teacher, math.nan)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs  # the columns, which `_generate` is not given
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        output.update(self._rollouts)
        output["row"] = torch.arange(len(inputs), device=self.accelerator.device)
        self._row_advantages = torch.full((len(inputs),), math.nan, device=self.accelerator.device)
        if self.args.estimator == "sampled":
            output["teacher_per_token_logps"] = self._score(self.teacher.model, output)
            if self.args.reference_policy == "initial" and "ref_per_token_logps" not in output:
                with self.initial_policy.lend() as model:
                    output["ref_per_token_logps"] = self._score(model, output)
        return output

    @torch.no_grad()
    def _score(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of the batch's completion tokens under a frozen model, (B, T)."""
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, _, _ = super()._get_per_token_logps_and_entropies(
                model,
                *_sequence(batch),
                batch["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **{key: batch[key] for key in FORWARD_KEYS if key in batch},
            )
        return logps

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.args.estimator == "full":
            return self._full_loss(model, inputs)
        self._gate_inputs = inputs
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._gate_inputs = None
        return loss + inputs.pop("nll", 0.0)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        """The parent's; within the loss it also decides the gate, whose advantages the parent reads after this call."""
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._gate_inputs is not None:
            self._gate(outputs[0], self._gate_inputs)
        return outputs

    def _gate(self, logps: Tensor, inputs: dict[str, Any]) -> None:
        """Set the advantages of the sampled estimator, once a rollout, and take the metrics."""
        old_logps = inputs.get("old_per_token_logps")
        old_logps = logps.detach() if old_logps is None else old_logps
        mask, from_teacher = self._loss_mask(inputs), inputs["from_teacher"]
        nll_rows = from_teacher & (self.args.teacher_rollout_loss == "nll")
        if "decision" not in inputs:
            reference = inputs["ref_per_token_logps"] if self.args.reference_policy == "initial" else None
            decision = self.sign_gated_loss.decide(
                old_logps, inputs["teacher_per_token_logps"], inputs["verifier_labels"], reference
            )
            self._keep_decision(inputs, decision, mask)
            inputs["advantages"] = decision.advantage.masked_fill(nll_rows.unsqueeze(1), 0.0)
        per_token = policy_gradient(logps.detach(), inputs["advantages"], old_logps)
        if self.args.teacher_rollout_loss == "nll":
            nll = torch.where(mask & nll_rows.unsqueeze(1), -logps, 0.0)
            inputs["nll"] = nll.sum() / self._divisor(inputs)
            per_token = torch.where(nll_rows.unsqueeze(1), -logps.detach(), per_token)
        self._meter.update(inputs["decision"], per_token, mask, from_teacher, ~nll_rows)

    def _full_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The full estimator: backbone, heads and divergence of the student within its wrapper's forward."""
        mask, from_teacher = self._loss_mask(inputs), inputs["from_teacher"]
        nll_rows = from_teacher & (self.args.teacher_rollout_loss == "nll")
        student = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            frozen = [(self._states(self.teacher.model, inputs), head_of(self.teacher.unwrapped))]
            if self.args.reference_policy == "initial":
                with self.initial_policy.lend() as reference:
                    head = head_of(self.accelerator.unwrap_model(reference))
                    frozen.append((self._states(reference, inputs), head))
            per_token, entropy = self._redirect(
                model, student, self._full_per_token, student, inputs, mask, nll_rows.unsqueeze(1), *frozen
            )
        self._meter.update(inputs["decision"], per_token, mask, from_teacher, ~nll_rows, entropy)
        return per_token.sum() / self._divisor(inputs)

    @torch.no_grad()
    def _states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The last hidden states of a frozen policy at the completion's positions, (B, T, H)."""
        unwrapped, keep = self.accelerator.unwrap_model(model), inputs["completion_ids"].size(1)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return self._redirect(model, unwrapped, last_hidden_state, unwrapped, *_sequence(inputs), keep)

    def _full_per_token(
        self, student: PreTrainedModel, inputs: dict, mask: Tensor, nll_rows: Tensor, teacher: tuple, reference: tuple = ()
    ) -> tuple[Tensor, Tensor]:
        """Loss and entropy of each position, (B, T), zero where masked; decides the gate on the way, once a rollout."""
        ids, temperature, head = inputs["completion_ids"], self.temperature, head_of(student)
        states = last_hidden_state(student, *_sequence(inputs), ids.size(1))
        gated = mask & ~nll_rows
        teacher_states, teacher_head = teacher[0][gated], teacher[1]
        # under the initial reference this pass only decides; the next one is differentiated
        given = states[gated].detach() if reference else states[gated]
        current = chunked_divergence(given, head, teacher_states, teacher_head, ids[gated], temperature)
        if "decision" not in inputs:
            student_logps, teacher_logps = _spread(current.student_logps, gated), _spread(current.target_logps, gated)
            decision = self.sign_gated_loss.decide(student_logps, teacher_logps, inputs["verifier_labels"])
            self._keep_decision(inputs, decision, mask)
        factor = inputs["decision"].factor[gated]
        if reference:
            target = tilted_target(teacher_states, teacher_head, reference[0][gated], reference[1], factor)
            divergence = chunked_divergence(states[gated], head, *target, ids[gated], temperature).divergence
        else:
            divergence = factor * current.divergence
        per_token = _spread(divergence, gated)
        if self.args.teacher_rollout_loss == "nll":
            taught = mask & nll_rows
            per_token = per_token + _spread(chunked_nll(states[taught], head, ids[taught], temperature), taught)
        return per_token, _spread(current.entropy, gated)

    def _keep_decision(self, inputs: dict[str, Any], decision: GateDecision, mask: Tensor) -> None:
        inputs["decision"] = decision
        mean = torch.where(mask, decision.advantage, 0.0).sum(1) / mask.sum(1)
        self._row_advantages[inputs["row"]] = mean.float()

    @staticmethod
    def _loss_mask(inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()

    def _divisor(self, inputs: dict[str, Any]) -> Tensor:
        """The trained tokens of one accumulation window over all ranks, a rank's share: as the parent's "dapo"."""
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * share

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Evaluation generates and grades; it calls no teacher and has no loss."""
        self._prepare_inputs(inputs)
        return None, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        training = self.model.training
        if training:
            for name, value in self._meter.compute(self.accelerator, self.args.estimator == "full").items():
                self._metrics["train"][name].append(value)
        if self.log_completions:  # in place of the parent's, which SG-OPD does not train on
            shown = [math.nan] * len(self._logs["advantages"])
            if training and self._row_advantages is not None:
                shown = gather(self._row_advantages).tolist()
            self._logs["advantages"].clear()
            self._logs["advantages"].extend(shown)
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's card, with the settings of the method."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            card = ModelCard.load(path)
            rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in self.args.method_settings().items())
            teacher = get_config_model_id(self.teacher.unwrapped.config) or "a model in memory"
            section = f"### SG-OPD settings\n\nTeacher: `{teacher}`\n\n| field | value |\n| --- | --- |\n{rows}\n\n"
            card.text = card.text.replace("### Framework versions", section + "### Framework versions")
            card.save(path)


def _sequence(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompts with their completions, (B, P + T)."""
    return (
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
    )


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (N,) at the N true places of `mask` (B, T), zero elsewhere; keeps the graph where N is 0."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _discard(column: str, values: list) -> None:
    """Takes the extra columns a verifier logs for proposals, which have no row in the table."""
