"""`SGOPDTrainer`: TRL's GRPO trainer, distilling from a teacher whose tokens a verifier gates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import _ForwardRedirection, disable_gradient_checkpointing
from trl.trainer.utils import get_callable_name, get_config_model_id

from .checkpoints.folders import loading
from .checkpoints.resume import ResumableTrainer
from .checkpoints.stops import FiniteGuard
from .config import SGOPDConfig, own_fields
from .method.divergence import full_per_token, head_of, last_hidden_state, sequence
from .method.gate import GateDecision, is_divergence
from .method.loss import SignGatedLoss, policy_gradient, sequence_old_logps
from .method.teacher_phase import TeacherPhaseSampler
from .method.top_k import top_k_per_token
from .teachers.local import padding_ids
from .teachers.protocol import Teacher
from .teachers.sampling import only_stated
from .teachers.several import sources_of
from .training import checks
from .training.datasets import check_box, check_datasets
from .training.environments import probed, verifier_of
from .training.frozen import InitialPolicy, Run, build_teachers, capture
from .training.metrics import verdict_metrics
from .training.prompts import RowsOfTeachers, check_read, has_own_prompts, readable, teacher_prompt_tensors
from .training.reports import RunReports
from .training.rollouts import MULTIMODAL_KEYS, Generated, Proposer, Rollouts, state_sampling, teacher_slots
from .training.scoring import Scoring
from .verifiers.verdicts import MathVerifier
from .views.gate_samples import GateSamples

# own settings that do not alter what is computed, or are compared in another form
NOT_COMPARED = ("teacher_server_", "teacher_models", "log_gate_samples")


class SGOPDTrainer(RunReports, ResumableTrainer):
    """Sign-Gated On-Policy Distillation (arXiv 2606.09304) as a subclass of [`~trl.GRPOTrainer`].

    The student samples completions; the verifier judges each; the teacher scores each token. Tokens that the teacher
    moves the way the outcome wants are extrapolated, the others interpolated; in a first phase, part of the rollouts
    are the teacher's own, where the verifier endorses them.

    Inherited as they are: generation (transformers, vLLM), prompt groups, PPO ratio and clipping, engine-mismatch
    correction, loss normalisation, logging, checkpoints, LoRA and quantisation. Replaced: rewards become verdicts,
    advantages become the gate's, evaluation generates and grades only.

    Args:
        model: the student; a path, a hub id, a `PreTrainedModel` or a `PeftModel`.
        teacher_model: the teacher; a path, a hub id, a `PreTrainedModel`, any `sg_opd.teachers.Teacher`, or "initial":
            the student before training, which then reads the column `teacher_prompt`. Several: a dict of these by
            name, of which the column `teacher` names each row's. Default: `args.teacher_model_name_or_path`, or
            `args.teacher_models`. Its dtype is its checkpoint's unless `args.teacher_model_init_kwargs`
            asks for another. With `args.teacher_server_url` it is the id of the served model, and optional.
        verifier: judges completions in TRL's reward-function form, returning 1 (correct), 0 (incorrect) or `None`
            (abstained) each. Default: `MathVerifier()`, which needs the column `solution`.
        args: an [`SGOPDConfig`].
        train_dataset: columns `prompt` and those the verifier reads.
        eval_dataset: the same, or a dict of such.
        peft_config: wraps the student, as in GRPO.
        quantization_config: for loading the student by name; the teacher's is in its own `teacher_model_init_kwargs`.
        **kwargs: `processing_class`, `callbacks`, `optimizers` and all else that GRPOTrainer takes.

    Raises:
        ValueError, TypeError, FileNotFoundError: an argument, a dataset or models that cannot work, by name.

    Example:

    ```python
    from sg_opd import SGOPDConfig, SGOPDTrainer

    trainer = SGOPDTrainer(
        model="Qwen/Qwen3-1.7B",
        teacher_model="Qwen/Qwen3-4B",
        args=SGOPDConfig(output_dir="out", chat_template_kwargs={"enable_thinking": False}),
        train_dataset=dataset,  # columns: prompt, solution
    )
    trainer.train()
    ```
    """

    args: SGOPDConfig

    def __init__(
        self,
        model: Any,
        teacher_model: str | PreTrainedModel | Teacher | dict[str, Any] | None = None,
        verifier: Callable[..., list[float | None]] | None = None,
        args: SGOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        peft_config: Any = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SGOPDConfig(f"{name.split('/')[-1]}-SG-OPD")
        checks.check_arguments(teacher_model, model, verifier, args, eval_dataset, kwargs)
        kwargs["environment_factory"], environments = probed(kwargs.get("environment_factory"))
        verifier = verifier_of(verifier, environments, train_dataset, lambda: self.async_loop)
        turns = next((name for name in ("environment_factory", "tools") if kwargs.get(name)), None)
        check_datasets(train_dataset, eval_dataset, checks.unparseable_by(verifier), args, turns)
        self._sources = sources_of(teacher_model, args)
        checks.check_rows_of_teachers(self._sources, train_dataset, args, turns)
        args = copy.copy(args)  # the caller's stays as it is
        if isinstance(model, str):
            args.model_init_kwargs = {"use_safetensors": True} | (args.model_init_kwargs or {})  # as loading_defaults
        self._keeps_initial = args.reference_policy == "initial" or any(source.is_initial for source in self._sources)
        captured = capture(model, args) if self._keeps_initial and peft_config is None else None
        self.verifier = verifier
        self.sign_gated_loss = SignGatedLoss(args.gate_settings())
        self._gate_inputs: dict[str, Any] | None = None
        inherited = {"model": model, "args": args, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
        inherited |= {"peft_config": peft_config, "quantization_config": quantization_config}
        super().__init__(reward_funcs=lambda **columns: self._rollouts.reward(**columns), **inherited, **kwargs)
        self.reward_func_names[0] = get_callable_name(verifier)
        for of_each in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
            del of_each[1:]  # GRPOTrainer adds the environments' own rewards, which only the verifier may ask
        self.reward_weights = self.reward_weights[:1]
        self.importance_sampling_level = "token"  # the sequence's ratio comes by `sequence_old_logps`
        skips, clipped = args.non_finite_log_probs == "skip", args.log_ratio_clip is not None
        self.finite = FiniteGuard(self._tokenizer, self.accelerator, skips, clipped, self.last_good_step.save)
        self.add_callback(self.finite)
        if args.log_gate_samples:
            samples = args.output_dir, args.log_gate_samples, self._tokenizer, self.sign_gated_loss, self._trained_last
            self.add_callback(GateSamples(*samples, args.report_to, self.callback_handler.callbacks))
        self._set_up_frozen(captured, quantization_config)

    def _set_up_frozen(self, captured: PreTrainedModel | None, quantization: Any) -> None:
        """Set up the teachers and, where it is one or the reference, the initial policy; check both and the student."""
        args, student = self.args, self.accelerator.unwrap_model(self.model)
        own = self.train_dataset if self.environment_factories is None else None  # without environments: its prompts
        of_student = args, self.accelerator, captured, lambda: self.model, quantization
        self.initial_policy = InitialPolicy.of_run(*of_student) if self._keeps_initial else None
        rows, agreed = RowsOfTeachers(own, args.teacher_column, self.tokens_of), self.last_good_step.agreed
        run = student, self._tokenizer, self.eos_token_ids, self.accelerator, self, rows, agreed, self.initial_policy
        self.teachers, self.shared_vocabulary = build_teachers(self._sources, args, Run(*run))
        self.teacher = self.teachers.only
        padding = padding_ids(student, self.shared_vocabulary) or []
        state_sampling(args, student, padding, self.vllm_generation if self.use_vllm else self)
        reference = self.initial_policy if args.reference_policy == "initial" else None
        frozen = self.teachers, self.shared_vocabulary, reference, self
        self.scoring = Scoring(args, *frozen, agreed, self.finite.skips)
        several = self.teacher is None or has_own_prompts(own)
        of_run = self._is_vlm, self._dist.fsdp_version, self.shared_vocabulary, several
        checks.check_teachers(args, student, self.teachers, *of_run)
        if own is not None and isinstance(self.verifier, MathVerifier):
            check_box(own, getattr(self.processing_class, "chat_template", None))
        if own is not None and not self._is_vlm:
            check_read(rows, self._tokenizer, args.max_completion_length, checks.context_of(student), self.teachers)

    @property
    def teacher_phase(self) -> TeacherPhaseSampler:
        """The teacher phase of this run; a phase that is a share of the steps has its length once training began."""
        return self.args.teacher_phase_sampler(self.state.max_steps)

    def tokens_of(self, prompts: list) -> tuple:
        """What GRPOTrainer makes of prompts, all text or all messages: their token ids come first."""
        return self._tokenize_prompts(readable(prompts, self._is_vlm))

    def _generate(self, prompts: list) -> tuple:
        """Same as GRPOTrainer; in the teacher phase, endorsed teacher rollouts take their slots."""
        with only_stated(self.accelerator.unwrap_model(self.model)):
            output = super()._generate(readable(prompts, self._is_vlm or self.rollout_func is not None))
        self._rollouts.read_prompts(self._tokenizer, output[0], self.tokens_of if self.model.training else None)
        if self.model.training and self.rollout_func is not None:
            checks.check_ids(self.shared_vocabulary, prompt_ids=output[0], completion_ids=output[1])
        if self.model.training:
            generated = Generated(prompts, *output[:2], *output[3:5])
            self._mix(generated)
            if not output[5]:  # a `rollout_func` has more columns for the verifier
                self._rollouts.grade_ahead(generated)
            read = self._rollouts.teacher_prompt_ids or generated.prompt_ids
            self.scoring.begin(read, generated.completion_ids, self._rollouts.whose)
        return output

    def _mix(self, generated: Generated) -> None:
        phase, accelerator, args = self.teacher_phase, self.accelerator, self.args
        # an optimizer step may take several generations, one after another
        earlier = self._step % args.gradient_accumulation_steps // args.steps_per_generation
        place = len(self._rollouts.rows), accelerator.process_index, accelerator.num_processes, earlier
        slots, anywhere = teacher_slots(phase, self.state.global_step, self.num_generations, *place)
        if anywhere:
            reads = self.processing_class, self._tokenizer, frozenset(self.eos_token_ids), self.shared_vocabulary
            proposer = Proposer(self.teachers, self.last_good_step.agreed, *reads, args.max_completion_length)
            self._rollouts.mix(phase, slots, proposer, generated)

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        """Same as GRPOTrainer, with verdicts for rewards; abstentions and teacher rows are NaN."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        own = self._rollouts.tensors(self.accelerator.device)
        labels, from_teacher = gather(own["verifier_labels"]), gather(own["from_teacher"])
        if self.model.training:
            signal = self.num_generations, self.args.gate_signal == "group"
            self._rollouts.compare(labels, from_teacher, *signal, self.accelerator.process_index)
            self._count(self._rollouts)
        else:
            for name, value in verdict_metrics(labels).items():
                self._metrics["eval"][name].append(value)
        if self.log_completions:
            for column, values in self._rollouts.columns().items():
                self._log_completion_extra(column, values)
        # NaN keeps abstentions, without GRPOTrainer's warning for each, and teacher rows out of `reward`
        rewards[:, 0] = labels.masked_fill(from_teacher, math.nan)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Same as GRPOTrainer; adds the verdicts and, in training, the frozen models' scores."""
        neutral = self.model.training and self.args.truncated_verdict == "abstain"  # evaluation judges all
        ends = frozenset([*self.eos_token_ids, self._tokenizer.pad_token_id]) if neutral else None
        whose = self.teachers.of_rows(inputs) if self.model.training else None
        self._rollouts = Rollouts(inputs, self.verifier, self.state, ends, whose)  # `_generate` has not the columns
        if self.model.training:
            self.last_good_step.begin()
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        device, own = self.accelerator.device, {"group_advantages": output["advantages"]}
        own |= {"row": torch.arange(len(inputs), device=device), "gold": self._rollouts.reference_answers()}
        own |= teacher_prompt_tensors(self._rollouts.teacher_prompt_ids, self._tokenizer.pad_token_id, device)
        own |= self.teachers.numbers(whose, device)
        output |= self._rollouts.tensors(device) | own
        self._row_advantages = torch.full((len(inputs),), math.nan, device=device)
        return output | self.scoring.of_generation(output)

    @torch.no_grad()
    def completion_logps(self, model: nn.Module, batch: dict[str, Any], rows: int | None = None) -> Tensor:
        """Log-probabilities of the batch's completion tokens under a frozen policy, (B, T); `rows` in one forward."""
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, _, _ = super()._get_per_token_logps_and_entropies(
                model,
                *sequence(batch),
                batch["completion_ids"].size(1),
                batch_size=rows or self.args.per_device_train_batch_size,
                **{key: batch[key] for key in MULTIMODAL_KEYS if key in batch},
            )
        return logps

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Same as GRPOTrainer with the gate's advantages; with estimator="full" or "top_k" a divergence instead."""
        if is_divergence(self.args.estimator):
            return self._divergence_loss(model, inputs)
        self._gate_inputs = inputs
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._gate_inputs = None
        return loss + inputs.pop("nll", 0.0)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        """Same as GRPOTrainer. During `_compute_loss` it also sets what that reads next of `inputs`."""
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._gate_inputs is not None:
            self._set_advantages(outputs[0], self._gate_inputs)
        return outputs

    def _set_advantages(self, logps: Tensor, inputs: dict[str, Any]) -> None:
        """Set the advantages of the sampled estimator, and the loss of rows trained by maximum likelihood."""
        old_logps = inputs.get("old_per_token_logps", logps.detach())
        given = {"teacher": inputs["teacher_per_token_logps"], "initial": inputs.get("initial_per_token_logps")}
        decision = self._decide(inputs, student=old_logps, updated=logps.detach(), **given)
        mask, by_likelihood = self._loss_mask(inputs), self._by_likelihood(inputs)
        if self.args.importance_sampling_level == "sequence":
            inputs["old_per_token_logps"] = old_logps = sequence_old_logps(logps, old_logps, mask)
        inputs["advantages"] = decision.advantage.masked_fill(by_likelihood, 0.0)
        per_token = policy_gradient(logps.detach(), inputs["advantages"], old_logps)
        if self.args.teacher_rollout_loss == "nll":
            nll = -self.args.teacher_rollout_weight * logps
            inputs["nll"] = torch.where(mask & by_likelihood, nll, 0.0).sum() / self._divisor(inputs)
            per_token = torch.where(by_likelihood, nll.detach(), per_token)
        self._measure(inputs, decision, per_token)

    def _divergence_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The full and the top-k estimator: the student's backbone, head and divergence in its wrapper's forward."""
        mask, by_likelihood = self._loss_mask(inputs), self._by_likelihood(inputs)
        gated = mask & ~by_likelihood
        by_nll = mask & by_likelihood if self.args.teacher_rollout_loss == "nll" else None
        taught = by_nll, self.args.teacher_rollout_weight
        top = self.scoring.top_targets(inputs) if self.args.estimator == "top_k" else None

        def decide(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
            return self._decide(inputs, student=student_logps, teacher=teacher_logps).factor

        def per_token(student: PreTrainedModel) -> tuple[Tensor, ...]:
            # no arguments: DeepSpeed copies heads among those
            own = last_hidden_state(student, *sequence(inputs), mask.size(1)), head_of(student)
            given = inputs["completion_ids"], gated, self.temperature, decide, reference, *taught
            if top is not None:
                return top_k_per_token(*own, top, *given)
            return full_per_token(*own, self.scoring.targets(teachers), *given)

        with self.accelerator.autocast():
            with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                teachers = [] if top is not None else self.scoring.teacher_states(inputs)
                reference = self.scoring.reference(inputs)
            losses, *measured = self.run_within(model, per_token)
        measures = dict(zip(("entropy", "rest/student"), measured, strict=False))
        if top is not None:
            measures["rest/teacher"] = top.logps[..., -1].exp().masked_fill(~gated, 0.0)
        self._measure(inputs, GateDecision(**inputs["decision"]), losses, measures)
        return losses.sum() / self._divisor(inputs)

    def run_within(self, model: nn.Module, method: Callable, *args: Any) -> Any:
        """`method(unwrapped model, *args)` within the wrapper's forward, where DDP, FSDP and ZeRO-3 expect it."""
        unwrapped = self.accelerator.unwrap_model(model)
        return _ForwardRedirection()(model, unwrapped, method, unwrapped, *args)

    def _decide(self, inputs: dict[str, Any], **logps: Tensor | None) -> GateDecision:
        """The gate's decision on a micro-batch, made once and kept while its rollouts are trained on."""
        mask = self._loss_mask(inputs)
        logps = self.finite.checked(inputs, mask, **logps)  # in each pass: the student may have gone bad meanwhile
        if "decision" in inputs:
            return GateDecision(**inputs["decision"])
        given = logps["student"], logps["teacher"], inputs["verifier_labels"], mask, logps.get("initial")
        decision = self.sign_gated_loss.decide(*given, inputs["gate_signs"], inputs["group_advantages"])
        inputs["decision"] = decision._asdict()
        if self.args.log_gate_samples and not self.finite.found:
            inputs |= {"gate_logps": logps, "gated": mask & ~self._by_likelihood(inputs)}
        self._row_advantages[inputs["row"]] = (decision.advantage * mask).sum(1).float() / mask.sum(1)
        return decision

    def _divisor(self, inputs: dict[str, Any]) -> Tensor:
        """A rank's share of the trained tokens of an accumulation window over all ranks, as GRPOTrainer's "dapo"."""
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * share

    def own_settings(self) -> dict[str, Any]:
        values = self.args.to_dict()
        own = {name: values[name] for name in own_fields(self.args) if not name.startswith(NOT_COMPARED)}
        of_each = {source.name: loading(source.init_kwargs) for source in self._sources}
        return own | {
            "teacher_model": self.teachers.name,
            "teacher_model_init_kwargs": of_each.get(None, of_each),
            "verifier": get_callable_name(self.verifier),
        }

    def written_args(self) -> SGOPDConfig:
        return super().written_args().without_secrets()
