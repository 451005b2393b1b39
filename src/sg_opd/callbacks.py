"""`EvaluationCallback`: avg@k, pass@k and maj@k on a small held-out set while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from trl.models import unwrap_model_for_generation

from .engines import Sampling, TransformersEngine
from .evaluate import Questions, Verifier, derived
from .results import QuestionResult, by_question, figures_over
from .verifiers import MathVerifier


class EvaluationCallback(TrainerCallback):
    """Evaluates the training model every few steps and logs `eval_avg@k`, `eval_pass@k`, `eval_maj@k` and the rest.

    The model generates with transformers in the training processes, as rollouts without vLLM do, under DDP, ZeRO-3 and
    FSDP2 too; the questions are spread over the processes. Random states, the training mode and the trainer's own
    metrics are left as they were, so training goes on as it would have. Every evaluation draws with the same seeds.

    Args:
        trainer: a `GRPOTrainer`, such as `SGOPDTrainer`.
        eval_dataset: rows with `prompt` and the columns that the verifier reads.
        verifier: default: the trainer's own, else `MathVerifier()`.
        num_samples: completions a question, >= 1.
        every_steps: optimizer steps between two evaluations; default: the trainer's `eval_steps`.
        max_completion_length: default: the trainer's; so are temperature, top-p and top-k.
        batch_size: samples a process generates at a time; default: `per_device_eval_batch_size`.
        seed: of the sampling.

    Raises:
        ValueError: an argument out of its range, or a dataset that cannot be evaluated.

    Example:

    ```python
    from sg_opd.callbacks import EvaluationCallback

    trainer.add_callback(EvaluationCallback(trainer, held_out, num_samples=8, every_steps=50))
    ```
    """

    def __init__(
        self,
        trainer: Any,
        eval_dataset: Sequence[dict[str, Any]],
        verifier: Verifier | None = None,
        num_samples: int = 8,
        every_steps: int | None = None,
        max_completion_length: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        args = trainer.args
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"`every_steps` must be >= 1, got {every_steps!r}.")
        if every_steps is None and not args.eval_steps:
            raise ValueError("Set `every_steps`, or `eval_steps` in the trainer's arguments.")
        self.trainer = trainer
        self.verifier = verifier or getattr(trainer, "verifier", None) or MathVerifier()
        self.num_samples = num_samples
        self.every_steps = every_steps
        self.batch_size = batch_size or args.per_device_eval_batch_size
        self.seed = seed
        length = max_completion_length or args.max_completion_length
        self.sampling = Sampling(length, args.temperature, args.top_p or 1.0, args.top_k or 0)
        self.questions = Questions.of(eval_dataset, trainer.processing_class, args.chat_template_kwargs)
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.questions.check(self._engine(model), self.sampling, num_samples, self.batch_size)
        self._last_step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate where it is time to."""
        step = state.global_step
        if step == self._last_step or step % (self.every_steps or state.eval_steps):
            return
        self._last_step = step
        figures = figures_over(self.evaluate())
        should_log = control.should_log
        # the base class's: a GRPO trainer's own would log, and forget, the training metrics of an unfinished interval
        Trainer.log(self.trainer, {f"eval_{name}": interval.mean for name, interval in figures.items()})
        control.should_log = should_log  # logging takes it for done

    def evaluate(self) -> list[QuestionResult]:
        """The counts of every question, on every process; all of them must enter it."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        number = len(self.questions.ids)
        # equally many on every process, some of them twice: sharded models must be entered equally often
        mine = [i % number for i in range(rank, -(-number // world) * world, world)]
        places = [(q, s) for q in mine for s in range(self.num_samples)]
        samples = []
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            engine = self._engine(model)
            for start in range(0, len(places), self.batch_size):
                chosen = places[start : start + self.batch_size]
                seeds = [derived(self.seed, rank, start)] * len(chosen)
                samples += self.questions.sample(chosen, seeds, engine, self.sampling, self.verifier)
        gathered = {question.id: question for question in gather_object(by_question(samples, self.num_samples))}
        return [gathered[id] for id in self.questions.ids]

    def _engine(self, model: Any) -> TransformersEngine:
        return TransformersEngine(model, self.trainer.processing_class)
