"""`SGOPDTrainer`: TRL's GRPO trainer, distilling from a teacher whose tokens a verifier gates."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import _ForwardRedirection, disable_gradient_checkpointing
from trl.trainer.utils import get_callable_name, get_config_model_id

from .checkpoints.resume import ResumableTrainer
from .config import SGOPDConfig
from .data import check_datasets
from .method.divergence import full_per_token, head_of, last_hidden_state, sequence
from .method.gate import GateDecision
from .method.loss import policy_gradient
from .method.teacher_phase import TeacherPhaseSampler
from .teachers.local import LocalTeacher, load_teacher, loading_defaults, padding_ids
from .teachers.probe import check_server
from .teachers.protocol import MULTIMODAL_KEYS, Teacher, ask
from .teachers.server import ServerTeacher
from .training.checks import FiniteGuard, check_arguments, check_models, check_set_up
from .training.initial_policy import InitialPolicy, capture
from .training.metrics import rollout_totals, verdict_metrics
from .training.rollouts import Rollouts, suppress
from .verifiers.verdicts import MathVerifier
from .views.gate_samples import GateSamples


class SGOPDTrainer(ResumableTrainer):
    """Sign-Gated On-Policy Distillation (arXiv 2606.09304) as a subclass of [`~trl.GRPOTrainer`].

    The student samples completions; the verifier judges each; the teacher scores each token. Tokens that the teacher
    moves the way the verdict wants are extrapolated, the others interpolated; in a first phase, part of the rollouts
    are the teacher's own, where the verifier endorses them.

    Inherited as they are: generation (transformers, vLLM), prompt groups, PPO ratio and clipping, engine-mismatch
    correction, loss normalisation, logging, checkpoints, LoRA and quantisation. Replaced: rewards become verdicts,
    advantages become the gate's, evaluation generates and grades only.

    Args:
        model: the student; a path, a hub id, a `PreTrainedModel` or a `PeftModel`.
        teacher_model: the teacher; a path, a hub id, a `PreTrainedModel`, or any `sg_opd.teachers.Teacher`. Default:
            `args.teacher_model_name_or_path`. Its dtype is its checkpoint's unless `args.teacher_model_init_kwargs`
            asks for another. With `args.teacher_server_url` it is the id of the served model, and optional.
        verifier: judges completions in TRL's reward-function form, answering 1 (correct), 0 (incorrect) or `None`
            (abstained) each. Default: `MathVerifier()`, which needs the column `solution`.
        args: an [`SGOPDConfig`].
        train_dataset: columns `prompt` and those the verifier reads.
        eval_dataset: the same, or a dict of such.
        peft_config: wraps the student, as in GRPO.
        quantization_config: for loading the student by name; the teacher's is in its own `teacher_model_init_kwargs`.
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

    args: SGOPDConfig
    model: Any  # the student, of whatever class

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
        teacher_model: str | PreTrainedModel | Teacher | None = None,
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
        check_datasets(train_dataset, eval_dataset, verifier, args, kwargs.get("environment_factory"))
        if isinstance(model, str):
            args.model_init_kwargs = {"use_safetensors": True} | (args.model_init_kwargs or {})  # as loading_defaults
        self.verifier = verifier
        self._rollouts = Rollouts(self)
        self.sign_gated_loss = args.sign_gated_loss()
        self._gate_inputs: dict[str, Any] | None = None
        self.finite = FiniteGuard(self)
        self._redirect = _ForwardRedirection()
        captured = capture(model, peft_config, args)
        super().__init__(
            model=model,
            reward_funcs=self._rollouts.reward,
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
        for callback in (self.finite, *([GateSamples(self)] if args.log_gate_samples else [])):
            self.add_callback(callback)
        self.reward_func_names[0] = get_callable_name(verifier)
        self._set_up_teacher(teacher_model)
        if args.reference_policy == "initial":
            self.initial_policy = InitialPolicy(captured, self, quantization_config)
        check_set_up(self)

    def _set_up_teacher(self, teacher_model: str | PreTrainedModel | Teacher | None) -> None:
        args, student = self.args, self.accelerator.unwrap_model(self.model)
        self.shared_vocabulary = max(self._tokenizer.get_vocab().values()) + 1
        if isinstance(teacher_model, Teacher):
            self.teacher: Any = teacher_model
        elif args.teacher_server_url:
            self.teacher = ServerTeacher.of(self, teacher_model)
            with self.last_good_step.agreed():
                self.teacher.connect()
                check_server(self)
        else:
            settings = args.teacher_model_revision, args.teacher_model_init_kwargs
            teacher = load_teacher(teacher_model, *settings, **loading_defaults(args, on_host=args.teacher_offload))
            check_models(student, teacher, self._tokenizer, args)
            self.teacher = LocalTeacher(teacher, self)
            self.shared_vocabulary = self.teacher.shared_vocabulary
        suppress(self, padding_ids(student, self.shared_vocabulary))

    @property
    def teacher_phase(self) -> TeacherPhaseSampler:
        """The teacher phase of this run; a phase that is a share of the steps has its length once training began."""
        return self.args.teacher_phase_sampler(self.state.max_steps)

    def _generate(self, prompts: list) -> tuple:
        output = super()._generate(prompts)
        if self.model.training:
            self._rollouts.mix(prompts, output)
        return output

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        own = {name: value.to(self.accelerator.device) for name, value in self._rollouts.tensors().items()}
        labels, from_teacher = gather(own["verifier_labels"]), gather(own["from_teacher"])
        if self.model.training:
            self._meter.add(rollout_totals(*own.values()))
        else:
            for name, value in verdict_metrics(labels).items():
                self._metrics["eval"][name].append(value)
        if self.log_completions:
            for column, values in self._rollouts.columns().items():
                self._log_completion_extra(column, values)
        # NaN keeps abstentions, without the parent's warning for each, and teacher rows out of `reward`
        rewards[:, 0] = labels.masked_fill(from_teacher, math.nan)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rollouts.begin(inputs)  # `_generate` is not given the columns
        if self.model.training:
            self.last_good_step.begin()
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        device = self.accelerator.device
        output |= {name: value.to(device) for name, value in self._rollouts.tensors().items()}
        output |= {"row": torch.arange(len(inputs), device=device), "gold": self._rollouts.golds()}
        self._row_advantages = torch.full((len(inputs),), math.nan, device=device)
        if self.args.estimator == "full":
            if self.args.teacher_offload:  # for all micro-batches at once, or each would bring every block
                output["teacher_states"] = self.teacher.states(output)
        else:
            with self.last_good_step.agreed():
                clip = self.args.log_ratio_clip
                output["teacher_per_token_logps"] = ask(self.teacher, output, clip, self.finite.skips)
            if self.args.reference_policy == "initial":  # not the parent's: that one it reloads from the path
                with self.initial_policy.lend() as model:
                    output["initial_per_token_logps"] = self.completion_logps(model, output)
        return output

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
        """Set the advantages of the sampled estimator, and take the metrics."""
        old_logps = inputs.get("old_per_token_logps")
        old_logps = logps.detach() if old_logps is None else old_logps
        reference = inputs.get("initial_per_token_logps")
        teacher = inputs["teacher_per_token_logps"]
        decision = self._decide(inputs, student=old_logps, teacher=teacher, initial=reference, updated=logps.detach())
        mask, by_likelihood = self._loss_mask(inputs), self._by_likelihood(inputs)
        inputs["advantages"] = decision.advantage.masked_fill(by_likelihood, 0.0)
        per_token = policy_gradient(logps.detach(), inputs["advantages"], old_logps)
        if self.args.teacher_rollout_loss == "nll":
            inputs["nll"] = torch.where(mask & by_likelihood, -logps, 0.0).sum() / self._divisor(inputs)
            per_token = torch.where(by_likelihood, -logps.detach(), per_token)
        mask = mask & (not self.finite.found)
        self._meter.update(decision, per_token, mask, inputs["from_teacher"], mask & ~by_likelihood)

    def _full_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The full estimator: backbone, heads and divergence of the student within its wrapper's forward."""
        mask, by_likelihood = self._loss_mask(inputs), self._by_likelihood(inputs)
        gated, taught = mask & ~by_likelihood, mask & by_likelihood

        def states(model: nn.Module) -> Tensor:
            return self.run_within(model, last_hidden_state, *sequence(inputs), mask.size(1))

        def decide(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
            return self._decide(inputs, student=student_logps, teacher=teacher_logps).factor

        def per_token(student: PreTrainedModel) -> tuple[Tensor, Tensor]:
            own = last_hidden_state(student, *sequence(inputs), mask.size(1))
            heads = head_of(student), head_of(self.teacher.unwrapped)  # no arguments: DeepSpeed copies those
            nll = taught if self.args.teacher_rollout_loss == "nll" else None
            ids = inputs["completion_ids"]
            return full_per_token(
                own, heads[0], teacher, heads[1], ids, gated, self.temperature, decide, reference, nll
            )

        with self.accelerator.autocast():
            reference = None
            with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                teacher = inputs["teacher_states"] if self.args.teacher_offload else self.teacher.states(inputs)
                if self.args.reference_policy == "initial":
                    with self.initial_policy.lend() as policy:
                        reference = states(policy), head_of(self.accelerator.unwrap_model(policy))
            losses, entropy = self.run_within(model, per_token)
        mask, gated = (kept & (not self.finite.found) for kept in (mask, gated))
        self._meter.update(inputs["decision"], losses, mask, inputs["from_teacher"], gated, entropy)
        return losses.sum() / self._divisor(inputs)

    def run_within(self, model: nn.Module, method: Callable, *args: Any) -> Any:
        """`method(unwrapped model, *args)` within the wrapper's forward, where DDP, FSDP and ZeRO-3 expect it."""
        unwrapped = self.accelerator.unwrap_model(model)
        return self._redirect(model, unwrapped, method, unwrapped, *args)

    def _decide(self, inputs: dict[str, Any], **logps: Tensor | None) -> GateDecision:
        """The gate's decision on a micro-batch, made once and kept while its rollouts are trained on."""
        labels, mask = inputs["verifier_labels"], self._loss_mask(inputs)
        logps = self.finite.checked(inputs, mask, **logps)  # in each pass: the student may have gone bad meanwhile
        if "decision" not in inputs:
            decision = self.sign_gated_loss.decide(logps["student"], logps["teacher"], labels, logps.get("initial"))
            kept = self.args.log_gate_samples and not self.finite.found
            inputs |= {"decision": decision} | ({"gate_logps": logps} if kept else {})
            self._row_advantages[inputs["row"]] = (decision.advantage * mask).sum(1).float() / mask.sum(1)
        return inputs["decision"]

    @staticmethod
    def _loss_mask(inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()

    def _by_likelihood(self, inputs: dict[str, Any]) -> Tensor:
        """(B, 1), the rows trained by maximum likelihood."""
        return (inputs["from_teacher"] & (self.args.teacher_rollout_loss == "nll")).unsqueeze(1)

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
            for name, value in self._meter.compute(self.accelerator).items():
                self._metrics["train"][name].append(value)
        if self.log_completions:  # in place of the parent's advantages, which SG-OPD does not train on
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
            section = self.args.card_section(self.teacher.name)
            card.text = card.text.replace("### Framework versions", section + "### Framework versions")
            card.save(path)
