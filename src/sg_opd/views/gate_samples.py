"""Views of the gate on rollouts of a training run, and on one row of a dataset.

`GateSamples` is the callback of `log_gate_samples`: it keeps rollouts in a file, and the newest on a page.
`score_rollout` samples a completion, or takes one, and scores it by both models.
"""

from __future__ import annotations

import importlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, groupby, islice, zip_longest
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
from ..verifiers.thinking import Openings
from ..verifiers.verdicts import MathVerifier, as_completion, checked_verdicts, columns_of
from .gate_view import SAMPLES_FILE, RolloutView, inspect_rollout, page_block, page_of_blocks, read_gate_samples

PAGE_SIZE = 5_000_000  # of the page, in characters of its lines in the file; it is written anew at each logging step
TITLE = "Gate samples"


class Step(NamedTuple):
    """A step on the page."""

    number: int
    size: int  #: characters of its lines in the file
    block: Callable[[], str]


@dataclass(eq=False, repr=False)
class GateSamples(TrainerCallback):
    """Keeps `count` rollouts at each logging step, of the micro-batches that were trained on last.

    The main process alone takes part, with rows of its own, the student's and the teacher's in turn. Rows without a
    gate are left out: those masked out whole, and those trained by maximum likelihood. The rollouts go to

    - `gate_samples.jsonl` in `output_dir`, which grows; `sg_opd.load_gate_samples` reads it,
    - `gate_samples.html`, a page of the newest steps, whole at any moment,
    - the trackers in `report_to`: W&B and trackio (a page of the step), TensorBoard (text).

    Raises:
        ValueError: a tracker that is too old to show a page.
    """

    output_dir: str | Path  #: folder of the run
    count: int  #: rollouts to keep at a logging step, >= 1
    tokenizer: PreTrainedTokenizerBase  #: turns ids into texts
    gate: SignGatedLoss  #: decided
    #: Returns the micro-batches of the last optimizer step, oldest first, each with `gate_logps` (the log-probabilities
    #: (B, T) by whose they are) and `gated` (B, T), the tokens whose loss is the gate's.
    trained: Callable[[], Sequence[dict[str, Any]]]
    report_to: Sequence[str] = ()  #: trackers, as in the trainer's arguments
    callbacks: Sequence[TrainerCallback] = ()  #: the trainer's, among them TensorBoard's

    def __post_init__(self) -> None:
        self.path = Path(self.output_dir) / SAMPLES_FILE
        self._steps: deque[Step] = deque()
        self._trackers = [importlib.import_module(name) for name in ("wandb", "trackio") if name in self.report_to]
        for tracker in self._trackers:
            if not hasattr(tracker, "Html"):
                name = tracker.__name__
                raise ValueError(f"`log_gate_samples` needs a newer {name}, one with `Html`: pip install -U {name}.")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the steps after the one that a run resumes from: it trains them again."""
        self._steps.clear()
        if not (state.is_world_process_zero and self.path.exists()):
            return
        part = self.path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as stream:
            for number, views in groupby(read_gate_samples(self.path), lambda view: view.step):
                if number <= state.global_step:
                    self._keep(list(views), stream)
        flush(part)
        part.replace(self.path)
        self._write_page()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep rollouts of the step where it will be logged."""
        done = bool(self._steps) and self._steps[-1].number == state.global_step
        if done or not (control.should_log and state.is_world_process_zero):
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
        rows: tuple[list, list] = ([], [])  # the student's and the teacher's
        for inputs in self.trained():
            if "gate_logps" in inputs:  # or decided before samples were asked for, as in a resumed run
                for row in inputs["gated"].any(1).nonzero().flatten().tolist():
                    rows[int(inputs["from_teacher"][row])].append((inputs, row))
        in_turn = filter(None, chain(*zip_longest(*rows)))
        return [self._view(inputs, row, step) for inputs, row in islice(in_turn, self.count)]

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
            sign=inputs["gate_signs"][row].item(),
            group_advantage=inputs["group_advantages"][row].item(),
        )

    def _keep(self, views: list[RolloutView], stream: TextIO) -> None:
        """Write them, and have them on the page, which older ones leave."""
        size = stream.write("".join(f"{view.to_json()}\n" for view in views))
        self._steps.append(Step(views[0].step or 0, size, cache(partial(page_block, views))))
        while len(self._steps) > 1 and sum(step.size for step in self._steps) > PAGE_SIZE:
            self._steps.popleft()

    def _write_page(self) -> None:
        part = self.path.with_suffix(".html.part")
        part.write_text(page_of_blocks([step.block() for step in self._steps], TITLE), encoding="utf-8")
        part.replace(self.path.with_suffix(".html"))

    def _report(self, views: list[RolloutView], step: int) -> None:
        for tracker in self._trackers:
            page = tracker.Html(page_of_blocks([self._steps[-1].block()], TITLE), inject=False)
            tracker.log({"gate_samples": page, "train/global_step": step})
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                text = "\n".join(view.plain() for view in views)
                indented = "    " + text.replace("\n", "\n    ")  # which Markdown shows as it is
                callback.tb_writer.add_text("gate_samples", indented, step)


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
    temperature = (gate or SignGatedLoss()).settings.temperature
    (prompt_ids,) = tokenize_prompts(processing_class, [row["prompt"]], **(chat_template_kwargs or {}))
    if completion is None:
        engine, sampling = TransformersEngine(student, processing_class), Sampling(max_completion_length, temperature)
        completion = engine.generate([prompt_ids], [seed], sampling)[0].ids
    elif isinstance(completion, str):
        completion = list(processing_class(completion, add_special_tokens=False)["input_ids"])
    verdict = judged(verifier or MathVerifier(), row, prompt_ids, list(completion), processing_class)
    logps = partial(token_logps, prompt=prompt_ids, completion=completion, temperature=temperature)
    return inspect_rollout(
        completion,
        logps(student),
        logps(teacher),
        verdict,
        gate,
        tokenizer=processing_class,
        reference_logps=None if reference is None else logps(reference),
        prompt=str(processing_class.decode(prompt_ids)),
        gold=row.get("solution"),
        source=source,
    )


def judged(
    verifier: Callable, row: dict[str, Any], prompt_ids: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """The verifier's verdict on a completion of a row."""
    completion = as_completion(row["prompt"], str(tokenizer.decode(ids, skip_special_tokens=True)))
    (completion,) = Openings(tokenizer, [prompt_ids]).before([0], [completion], [ids])
    return checked_verdicts(verifier, [row["prompt"]], [completion], **columns_of([row]), completion_ids=[ids])[0]


@torch.no_grad()
def token_logps(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], temperature: float) -> Tensor:
    """Log-probabilities of a completion's tokens over the model's whole head, (T,); never whole logits."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    with evaluating(model):
        states = last_hidden_state(model, ids, torch.ones_like(ids), len(completion))[0]
        return -chunked_nll(states, head_of(model), ids[0, len(prompt) :], temperature)
