"""Log-probabilities that are no numbers: whose, of which rollout and token, and what is done about it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import TrainerCallback

logger = get_logger(__name__)

# by whose log-probabilities are checked; "updated" is the student after updates on the rollout
MODELS = {"student": "student", "teacher": "teacher", "initial": "initial policy", "updated": "student"}


class NonFiniteError(RuntimeError):
    """A model gave a sampled token a log-probability that is NaN or infinite, on which no delta can be trained."""


class FiniteGuard(TrainerCallback):
    """Stops at log-probabilities that are NaN or infinite, or has their optimizer step skipped on every rank.

    As `non_finite_log_probs` says. An infinite one of the teacher or the reference is bounded by `log_ratio_clip`
    where that is set, and then let through.

    Args:
        trainer: whose tokenizer names the tokens.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.found = False
        """Whether this rank is within a step that will be skipped."""

    @property
    def skips(self) -> bool:
        """Whether such a step is skipped instead of ending the run."""
        return self.trainer.args.non_finite_log_probs == "skip"

    def checked(self, inputs: dict[str, Any], mask: Tensor, **logps: Tensor | None) -> dict[str, Any]:
        """The log-probabilities (B, T) as given, or with zeros for what is no number where the step is to be skipped.

        Args:
            inputs: the micro-batch, for its tokens and prompts.
            mask: (B, T), the trained tokens.
            **logps: by whose they are, see `MODELS`.

        Raises:
            NonFiniteError: at the first such token, unless the step is to be skipped.
        """
        bad = {whose: self._bad(whose, values, mask) for whose, values in logps.items() if values is not None}
        if not torch.stack([*bad.values()]).any():  # the host waits for the device here, once a micro-batch
            return logps
        for whose, places in bad.items():
            values = logps[whose]
            if values is not None and places.any():
                self._report(self._words(inputs, places, whose, values))
                logps[whose] = values.masked_fill(places, 0.0)
        return logps

    def _bad(self, whose: str, values: Tensor, mask: Tensor) -> Tensor:
        bounded = MODELS[whose] != "student" and self.trainer.args.log_ratio_clip is not None
        return mask & (values.isnan() if bounded else ~values.isfinite())

    def _report(self, message: str) -> None:
        if not self.skips:
            raise NonFiniteError(f"{message} Nothing was trained on it; set non_finite_log_probs='skip' to go on.")
        if not self.found:
            logger.warning("%s This optimizer step is skipped.", message, main_process_only=False)
        self.found = True

    def _words(self, inputs: dict[str, Any], bad: Tensor, whose: str, values: Tensor) -> str:
        row, place = (int(index) for index in bad.nonzero()[0])
        tokenizer = self.trainer._tokenizer
        token = int(inputs["completion_ids"][row, place])
        prompt = tokenizer.decode(inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()])
        rank = self.trainer.accelerator.process_index
        return (
            f"Step {self.trainer.state.global_step}, rank {rank}: the {MODELS[whose]}'s log-probability of "
            f"token {place} ({token}, {tokenizer.decode([token])!r}) of the rollout in row {row} of "
            f"its micro-batch is {values[row, place].item():g}, and {int(bad.sum())} in all are no numbers. Its prompt "
            f"ends with {prompt[-80:]!r}."
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradients where any rank found one, so that no optimizer moves a weight."""
        if not self.skips:
            return
        accelerator = self.trainer.accelerator
        found = accelerator.reduce(torch.tensor([float(self.found)], device=accelerator.device), reduction="sum")
        self.found = False
        if found.item() > 0:
            kwargs["model"].zero_grad(set_to_none=True)
