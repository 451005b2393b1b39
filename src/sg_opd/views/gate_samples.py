"""Rollouts of a run kept to be looked at: `gate_samples.jsonl`, and a page of the newest ones beside it."""

from __future__ import annotations

import importlib
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..checkpoints.folders import flush
from ..evaluation.engines import Sampling, TransformersEngine, evaluating
from ..evaluation.evaluator import tokenize_prompts
from ..method.divergence import chunked_nll, head_of, last_hidden_state
from ..method.loss import SignGatedLoss
from ..verifiers.verdicts import MathVerifier, as_completion, checked_verdicts, columns_of
from .gate_view import RolloutView, inspect_rollout, page_block, page_of_blocks, read_gate_samples, render_page

FILE = "gate_samples.jsonl"
PAGE_SIZE = 5_000_000  # characters of its lines in FILE: the page is as large, and written anew at each logging step
HTML_TRACKERS = ("wandb", "trackio")  # whose modules have a class `Html`


class Step(NamedTuple):
    """A step on the page."""

    number: int
    size: int
    block: Callable[[], str]


class GateSamples(TrainerCallback):
    """At each logging step, `log_gate_samples` rollouts of the micro-batches that were trained on last.

    The main process alone takes part, with rows of its own, the student's and the teacher's in turn. Rows that are
    masked out whole or trained by maximum likelihood have no gate, and are passed over. They go to

    - `gate_samples.jsonl` in `output_dir`, which grows; `sg_opd.load_gate_samples` reads it,
    - `gate_samples.html`, a page of the newest steps, whole at any moment,
    - the trackers in `report_to`: W&B and trackio (a page of the step), TensorBoard (text).

    Args:
        output_dir: folder of the run.
        count: rollouts to keep at a logging step, >= 1.
        tokenizer: turns ids into texts.
        gate: decided.
        trained: answers the micro-batches of the last optimizer step, oldest first, each with `gate_logps` (the
            log-probabilities (B, T) by whose they are) and `gated` (B, T), the tokens that the gate had a say on.
        report_to: trackers, as in the trainer's arguments.
        callbacks: the trainer's, among them TensorBoard's.

    Raises:
        ValueError: a tracker that is too old to show a page.
    """

    def __init__(
        self,
        output_dir: str | Path,
        count: int,
        tokenizer: PreTrainedTokenizerBase,
        gate: SignGatedLoss,
        trained: Callable[[], Sequence[dict[str, Any]]],
        report_to: Sequence[str] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.path = Path(output_dir) / FILE
        self.count = count
        self.tokenizer = tokenizer
        self.gate = gate
        self.trained = trained
        self.callbacks = callbacks
        self._steps: deque[Step] = deque()
        self._trackers = [importlib.import_module(name) for name in HTML_TRACKERS if name in report_to]
        old = [tracker.__name__ for tracker in self._trackers if not hasattr(tracker, "Html")]
        if old:
            raise ValueError(
                f"`log_gate_samples` needs a newer {old[0]}, one that has `Html`: pip install -U {old[0]}."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the steps after the one that a run begins with: it trains them again."""
        if not state.is_world_process_zero:
            return
        self._steps.clear()
        if not self.path.exists():
            return
        part = self.path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as stream:
            for number, views in groupby(read_gate_samples(self.path), lambda view: view.step):
                if number <= state.global_step:
                    self._keep(list(views), stream)
        flush(part)
        os.replace(part, self.path)
        self._write_page()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep rollouts of the step where it will be logged."""
        done = bool(self._steps) and self._steps[-1].number == state.global_step
        if not (control.should_log and state.is_world_process_zero) or done:
            return
        views = self.views(state.global_step)
        if views:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                self._keep(views, stream)
            self._write_page()
            self._report(views, state.global_step)

    on_epoch_end = on_step_end  # where `logging_strategy="epoch"` asks for a log

    def views(self, step: int) -> list[RolloutView]:
        """The rollouts of this process to be kept of the step that was just trained."""
        own: list[tuple[dict[str, Any], int]] = []
        teachers: list[tuple[dict[str, Any], int]] = []
        for inputs in self.trained():
            if "gate_logps" not in inputs:  # decided before samples were asked for, as in a resumed run
                continue
            gated = inputs["gated"].any(1).tolist()
            for row, from_teacher in enumerate(inputs["from_teacher"].tolist()):
                if gated[row]:
                    (teachers if from_teacher else own).append((inputs, row))
        in_turn = [found for pair in zip_longest(own, teachers) for found in pair if found]
        return [self._view(inputs, row, step) for inputs, row in in_turn[: self.count]]

    def _view(self, inputs: dict[str, Any], row: int, step: int) -> RolloutView:
        kept, prompt = inputs["completion_mask"][row].bool(), inputs["prompt_mask"][row].bool()
        logps = {whose: of[row][kept] for whose, of in inputs["gate_logps"].items() if of is not None}
        verdict = inputs["verifier_labels"][row].item()
        return inspect_rollout(
            inputs["completion_ids"][row][kept],
            logps["student"],
            logps["teacher"],
            None if math.isnan(verdict) else verdict,
            self.gate,
            tokenizer=self.tokenizer,
            reference_logps=logps.get("initial"),
            trained=inputs["tool_mask"][row][kept] if "tool_mask" in inputs else None,
            prompt=str(self.tokenizer.decode(inputs["prompt_ids"][row][prompt])),
            gold=inputs["gold"][row],
            source="teacher" if inputs["from_teacher"][row] else "student",
            step=step,
        )

    def _keep(self, views: list[RolloutView], stream: TextIO) -> None:
        """Write them, and have them on the page, which older ones leave."""
        size = stream.write("".join(f"{view.to_json()}\n" for view in views))
        self._steps.append(Step(views[0].step or 0, size, cache(partial(page_block, views))))
        while len(self._steps) > 1 and sum(step.size for step in self._steps) > PAGE_SIZE:
            self._steps.popleft()

    def _write_page(self) -> None:
        part = self.path.with_suffix(".html.part")
        part.write_text(page_of_blocks([step.block() for step in self._steps], "Gate samples"), encoding="utf-8")
        os.replace(part, self.path.with_suffix(".html"))

    def _report(self, views: list[RolloutView], step: int) -> None:
        for tracker in self._trackers:
            page = tracker.Html(render_page(views, "Gate samples"), inject=False)
            tracker.log({"gate_samples": page, "train/global_step": step})
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                text = "\n".join(view.plain() for view in views)
                # an indented block of Markdown is shown as it is
                callback.tb_writer.add_text("gate_samples", "\n".join(f"    {line}" for line in text.split("\n")), step)


def score_rollout(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    row: dict[str, Any],
    completion: str | Sequence[int] | None = None,
    *,
    verifier: Callable[..., list[float | None]] | None = None,
    gate: SignGatedLoss | None = None,
    reference: PreTrainedModel | None = None,
    source: str = "student",
    max_completion_length: int = 256,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> RolloutView:
    """A rollout of one row of a dataset with the gate's decision on each token; see `inspect_rollout`.

    Args:
        student: a model, normalised over its own head, as are the others; the trainer's own is `trainer.model`.
        teacher: a model with the same tokenizer, so none on a server; the trainer's own is `trainer.teacher.unwrapped`.
        processing_class: their tokenizer.
        row: `prompt` (text or messages) and the columns that the verifier reads, such as `solution`.
        completion: token ids, or text, which gets no EOS; `None` samples one from the student.
        verifier: as in training; default: `MathVerifier()`.
        gate: whose settings and temperature count, such as `trainer.sign_gated_loss`; default: `SignGatedLoss()`.
        reference: the initial policy; `None` is the current one.
        source: who wrote a given completion, "student" or "teacher".
        max_completion_length: of a sampled completion, in tokens.
        seed: of its sampling; the caller's random state is left as it was.
        chat_template_kwargs: for the chat template, such as `enable_thinking`.

    Raises:
        ValueError: an argument out of its range, by name, or a verifier's answer that is no verdict.
    """
    gate = SignGatedLoss() if gate is None else gate
    temperature = gate.settings.temperature
    (prompt_ids,) = tokenize_prompts(processing_class, [row["prompt"]], **(chat_template_kwargs or {}))
    if completion is None:
        sampling = Sampling(max_completion_length, temperature)
        (sampled,) = TransformersEngine(student, processing_class).generate([prompt_ids], [seed], sampling)
        completion = sampled.ids
    elif isinstance(completion, str):
        completion = processing_class(completion, add_special_tokens=False)["input_ids"]
    ids = list(completion)
    judged = as_completion(row["prompt"], str(processing_class.decode(ids, skip_special_tokens=True)))
    columns = {**columns_of([row]), "completion_ids": [ids]}
    (verdict,) = checked_verdicts(verifier or MathVerifier(), [row["prompt"]], [judged], **columns)
    logps = partial(token_logps, prompt_ids=prompt_ids, completion_ids=ids, temperature=temperature)
    return inspect_rollout(
        ids,
        logps(student),
        logps(teacher),
        verdict,
        gate,
        tokenizer=processing_class,
        reference_logps=None if reference is None else logps(reference),
        prompt=str(processing_class.decode(prompt_ids)),
        gold=None if row.get("solution") is None else str(row["solution"]),
        source=source,
    )


@torch.no_grad()
def token_logps(
    model: PreTrainedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int], temperature: float
) -> Tensor:
    """Log-probabilities of a completion's tokens over the model's whole head, (T,); never whole logits."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
    with evaluating(model):
        states = last_hidden_state(model, ids, torch.ones_like(ids), len(completion_ids))[0]
        return -chunked_nll(states, head_of(model), ids[0, len(prompt_ids) :], temperature)
