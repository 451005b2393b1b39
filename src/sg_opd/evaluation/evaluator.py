"""Evaluates a model: samples completions of a dataset's questions, grades them, and reports avg@k, pass@k and maj@k."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl.models import unwrap_model_for_generation

from ..data import plain_messages
from ..teachers.sampling import run_sampling, tell_unused
from ..verifiers.answers import extract_answer
from ..verifiers.thinking import Openings
from ..verifiers.verdicts import MathVerifier, as_completion, check_columns, checked_verdicts, columns_of
from .engines import Engine, Sampling, TransformersEngine
from .figures import QuestionResult, Sample, by_question, figures_over
from .results import EvaluationFolder, EvaluationResult, provenance, sha256

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)
Verifier = Callable[..., list[float | None]]


def evaluate_model(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    dataset: Sequence[dict[str, Any]],
    verifier: Verifier,
    num_samples: int = 8,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
    top_p: float = 1.0,
    top_k: int = 0,
    output_dir: str | Path | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> EvaluationResult:
    """`evaluate` with a transformers model in this process.

    The caller's random state and the model's training mode are left as they were.
    """
    engine = TransformersEngine(model, processing_class)
    sampling = Sampling(max_completion_length, temperature, top_p, top_k, min_p, repetition_penalty)
    common = num_samples, batch_size, seed, progress, output_dir, chat_template_kwargs
    return evaluate(engine, processing_class, dataset, verifier, sampling, *common)


def evaluate(
    engine: Engine,
    processing_class: PreTrainedTokenizerBase,
    dataset: Sequence[dict[str, Any]],
    verifier: Verifier,
    sampling: Sampling | None = None,
    num_samples: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
    output_dir: str | Path | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> EvaluationResult:
    """avg@k, pass@k and maj@k of `num_samples` completions of each question.

    An abstained verdict counts as not correct and is reported. With an `output_dir`, every batch is kept as soon as it
    is graded; a run that was stopped resumes there and ends as it would have, and a finished one is not run again.

    Args:
        engine: samples the completions.
        processing_class: the model's tokenizer.
        dataset: rows with `prompt` (text or messages), the columns that the verifier reads, and an optional `id`.
        verifier: as in training: 1, 0 or `None` a completion.
        sampling: `Sampling()` by default.
        num_samples: completions a question, >= 1. Take twice the largest k for which pass@k is to be trusted.
        batch_size: samples that are generated, graded and kept at a time; with transformers it also decides the draws.
        seed: of the whole evaluation; each batch or sample draws with a seed of its own made from it.
        progress: a bar over the samples.
        output_dir: folder for `settings.json`, `samples.jsonl` and `result.json`; `None` keeps nothing.
        chat_template_kwargs: for the chat template, such as `enable_thinking`.
        **settings: further ones to keep in the result, such as the task's name; JSON values.

    Raises:
        ValueError: an argument out of its range, a question without room for its completion, questions of one id, or an
            `output_dir` of an evaluation with other settings.
    """
    draws = Draws(
        engine, processing_class, dataset, verifier, sampling, num_samples, batch_size, seed, chat_template_kwargs
    )
    used = {"do_sample": draws.sampling.temperature > 0, **draws.sampling.effective()}
    tell_unused(logger, "model", getattr(engine, "generation_config", {}), used, "the evaluation")
    settings |= draws.describe()
    folder = None if output_dir is None else EvaluationFolder(output_dir, settings)
    if folder and folder.result.exists():
        return EvaluationResult.from_json(folder.result)
    samples = draws.all(folder, progress)
    origin = {**provenance(), "example_prompt": processing_class.decode(draws.prompts[0])}
    result = EvaluationResult.of(samples, num_samples, settings, origin, verifier)
    if folder:
        result.to_json(folder.result)
    return result


class Draws:
    """The questions of a dataset, and the graded samples that are drawn of each; arguments as in `evaluate`.

    A question's id is its row's column `id`, else the row's number.

    Raises:
        ValueError: a size < 1, no rows, a column that a verifier cannot be given, two rows of one id, or a question
            that leaves no room for its completion.
    """

    def __init__(
        self,
        engine: Engine,
        processing_class: PreTrainedTokenizerBase,
        dataset: Sequence[dict[str, Any]],
        verifier: Verifier,
        sampling: Sampling | None,
        num_samples: int,
        batch_size: int,
        seed: int,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value!r}.")
        self.engine, self.sampling, self.verifier = engine, sampling or Sampling(), verifier
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.processing_class = processing_class
        self.template = chat_template_kwargs or {}
        self.rows = list(dataset)
        if not self.rows:
            raise ValueError("`dataset` is empty: there is nothing to evaluate.")
        check_columns("dataset", self.rows[0])
        self.ids = [str(row.get("id", index)) for index, row in enumerate(self.rows)]
        twice = next((id for id, count in Counter(self.ids).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"`dataset` has several rows with the `id` {twice!r}; results are kept by id.")
        self.prompts = tokenize_prompts(processing_class, [row["prompt"] for row in self.rows], **self.template)
        self.openings = Openings(processing_class, self.prompts)
        self._check_room()

    def _check_room(self) -> None:
        longest = max(range(len(self.ids)), key=lambda q: len(self.prompts[q]))
        needed, context = len(self.prompts[longest]) + self.sampling.max_completion_length, self.engine.context
        if context is not None and needed > context:
            raise ValueError(
                f"The question {self.ids[longest]!r} needs {needed} tokens with its completion, but the model has room "
                f"for {context}: lower `max_completion_length` (now {self.sampling.max_completion_length})."
            )

    def describe(self) -> dict[str, Any]:
        """All that decides the samples, for JSON; questions and prompts as hashes."""
        return {
            **self.engine.describe(),
            **self.sampling.effective(),
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "chat_template_kwargs": self.template,
            "verifier": getattr(self.verifier, "__name__", type(self.verifier).__name__),
            "dataset_sha256": sha256([{**row, "id": id} for row, id in zip(self.rows, self.ids, strict=True)]),
            "chat_template_sha256": sha256(self.processing_class.chat_template),
            "prompts_sha256": sha256(self.prompts),
        }

    def all(self, folder: EvaluationFolder | None, progress: bool) -> list[Sample]:
        """All samples, question by question, in batches that are always the same.

        With a folder those that it holds already, and the others once they are kept there.
        """
        places = [(q, s) for q in range(len(self.ids)) for s in range(self.num_samples)]
        samples = folder.resume(self.batch_size, [(self.ids[q], s) for q, s in places]) if folder else []
        with tqdm(total=len(places), initial=len(samples), desc="evaluate", unit="sample", disable=not progress) as bar:
            for start in range(len(samples), len(places), self.batch_size):
                chosen = places[start : start + self.batch_size]
                number = start // self.batch_size
                batch = self.batch(chosen, [(number,)] * len(chosen) if self.engine.seeds == "batch" else chosen)
                if folder:
                    folder.append(batch)
                samples += batch
                bar.update(len(batch))
                bar.set_postfix(correct=f"{sum(sample.verdict == 1.0 for sample in samples) / len(samples):.1%}")
        return samples

    def batch(self, places: Sequence[tuple[int, int]], sources: Sequence[tuple[int, ...]]) -> list[Sample]:
        """A batch of samples, graded by the verifier, which is given the columns of each one's row.

        Args:
            places: each one's question, by its row, and its number within the samples of that question.
            sources: numbers >= 0 from which each one's seed is made, together with the evaluation's.
        """
        rows = [self.rows[q] for q, _ in places]
        seeds = [derived(self.seed, *numbers) for numbers in sources]
        completions = self.engine.generate([self.prompts[q] for q, _ in places], seeds, self.sampling)
        ids = [completion.ids for completion in completions]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        seen = self.openings.before([q for q, _ in places], texts, ids)
        messages = [as_completion(prompt, text) for prompt, text in zip(prompts, seen, strict=True)]
        verdicts = checked_verdicts(self.verifier, prompts, messages, completion_ids=ids, **columns_of(rows))
        extract = getattr(self.verifier, "extract_answer", extract_answer)
        return [
            Sample(
                question_id=self.ids[q],
                sample_id=number,
                seed=seed,
                num_tokens=len(done.ids),
                finish_reason=done.finish_reason,
                verdict=verdict,
                answer=extract(whole) or None,
                completion=text,
            )
            for (q, number), seed, done, verdict, text, whole in zip(
                places, seeds, completions, verdicts, texts, seen, strict=True
            )
        ]


def derived(*numbers: int) -> int:
    """A seed made from numbers >= 0, below 2^32, the same in every version of NumPy."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def tokenize_prompts(
    processing_class: PreTrainedTokenizerBase, prompts: Sequence[Any], **template: Any
) -> list[list[int]]:
    """Token ids of prompts, each plain text or a list of messages ready for the assistant's turn."""
    plain: Any = processing_class
    chat: Any = partial(processing_class.apply_chat_template, add_generation_prompt=True, return_dict=True, **template)
    return [(plain if isinstance(prompt, str) else chat)(plain_messages(prompt))["input_ids"] for prompt in prompts]


class EvaluationCallback(TrainerCallback):
    """Evaluates the training model every few steps and logs `eval_avg@k`, `eval_pass@k`, `eval_maj@k` and the rest.

    The model generates with transformers in the training processes, as rollouts without vLLM do, under DDP, ZeRO-3 and
    FSDP2 too; the questions are spread over the processes. Random states, the training mode and the trainer's own
    metrics are left as they were, so training continues as it would have. Every evaluation draws with the same seeds.

    Args:
        trainer: a `GRPOTrainer`, such as `SGOPDTrainer`.
        eval_dataset: rows with `prompt` and the columns that the verifier reads.
        verifier: default: the trainer's own, else `MathVerifier()`.
        num_samples: completions a question, >= 1.
        every_steps: optimizer steps between two evaluations; default: the trainer's `eval_steps`.
        max_completion_length: default: the trainer's; so are temperature, top-p, top-k, min-p and repetition penalty.
        batch_size: samples a process generates at a time; default: `per_device_eval_batch_size`.
        seed: of the sampling.

    Raises:
        ValueError: an argument out of its range, or a dataset that cannot be evaluated.

    Example:

    ```python
    from sg_opd.evaluation import EvaluationCallback

    trainer.add_callback(EvaluationCallback(trainer, held_out, num_samples=8, every_steps=50))
    ```
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        eval_dataset: Sequence[dict[str, Any]],
        verifier: Verifier | None = None,
        num_samples: int = 8,
        every_steps: int | None = None,
        max_completion_length: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        args: Any = trainer.args  # a GRPOConfig
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"`every_steps` must be >= 1, got {every_steps!r}.")
        if every_steps is None and not args.eval_steps:
            raise ValueError("Set `every_steps`, or `eval_steps` in the trainer's arguments.")
        self.trainer = trainer
        self.every_steps = every_steps
        self._last_step = 0
        tokenizer: Any = trainer.processing_class
        engine = TransformersEngine(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
        verifier = verifier or getattr(trainer, "verifier", None) or MathVerifier()
        if getattr(verifier, "needs_environments", False):
            raise ValueError(
                "Pass a `verifier`: the trainer's is the reward of its environments, and here there are none."
            )
        length = max_completion_length or args.max_completion_length
        sampling = Sampling(length, **run_sampling(args))
        size, template = batch_size or args.per_device_eval_batch_size, args.chat_template_kwargs
        self.draws = Draws(engine, tokenizer, eval_dataset, verifier, sampling, num_samples, size, seed, template)

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
        trainer, accelerator, draws = self.trainer, self.trainer.accelerator, self.draws
        args: Any = trainer.args
        rank, world, number = accelerator.process_index, accelerator.num_processes, len(draws.ids)
        # equally many on every process, some of them twice: sharded models must be entered equally often
        mine = [i % number for i in range(rank, -(-number // world) * world, world)]
        places = [(q, s) for q in mine for s in range(draws.num_samples)]
        samples = []
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                accelerator,
                gather_deepspeed3_params=args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as model,
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            draws.engine = TransformersEngine(model, draws.processing_class)
            for start in range(0, len(places), draws.batch_size):
                chosen = places[start : start + draws.batch_size]
                samples += draws.batch(chosen, [(rank, start)] * len(chosen))
        gathered = {
            question.id: question for question in gather_object(by_question(samples, draws.num_samples, draws.verifier))
        }
        return [gathered[id] for id in draws.ids]
