"""What a run says of itself beside its metrics: that its rollouts are cut or not judged, and its model card."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from accelerate.logging import get_logger
from trl.trainer.utils import get_config_model_id

from .metrics import GateLogging

logger = get_logger(__name__)  # of the main process only

FIRST_CUT = (
    "%.0f %% of the first rollouts were cut at max_completion_length=%d, before they had an answer. Raise it. If the "
    "model thinks first, as Qwen3 does unless told otherwise, chat_template_kwargs={'enable_thinking': False} keeps it "
    "from that. %s"
)
NEUTRAL = {
    "judge": "truncated_verdict='abstain' makes cut rollouts neutral.",
    "abstain": "They are neutral (truncated_verdict='abstain').",
}
CUT = (
    "%.0f %% of the rollouts since the last log (now at step %d) were cut at max_completion_length=%d, before they had "
    "an answer. Raise it where the task needs more. Where answers have grown, a lower learning rate, `log_ratio_clip` "
    "or `mask_truncated_completions=True` hold them."
)
UNTRAINED = (
    "Every rollout since the last log (now at step %d) was cut at max_completion_length=%d, and "
    "`mask_truncated_completions=True` leaves those out: nothing was trained. Raise `max_completion_length`."
)
ABSTAINED = (
    "The verifier %s abstained on every rollout since the last log (now at step %d), so the gate takes no side. Look "
    "at the verifier's answers (`log_completions=True`) and at the columns it reads."
)
NO_HUB = "[None](https://huggingface.co/None)", 'model="None"'  # as TRL's template has it for what is on no hub


class RunReports(GateLogging):
    """Mixed into a ResumableTrainer, with `GateLogging`: warnings while it runs, once each, and the model card."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._cut_told: bool | None = None  # None: before the first rollouts
        self._untrained_told = self._abstention_told = False
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Same as GateLogging; warns where most of the first rollouts were cut."""
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self._cut_told is None:
            share = self._metrics["train"]["completions/clipped_ratio"][-1]
            self._cut_told = share > 0.5
            if self._cut_told:
                neutral = NEUTRAL[str(self.args.truncated_verdict)]
                logger.warning(FIRST_CUT, 100 * share, self.args.max_completion_length, neutral)
        return output

    def _gather_metrics(self) -> None:
        """Same as GateLogging; warns where most rollouts since the last log were cut, or none was judged or trained."""
        super()._gather_metrics()
        shares, step = self._metrics["train"].get("completions/clipped_ratio"), self.state.global_step
        if shares:  # none when training ends after a log
            self._tell_cut(mean(shares), step)
        cut = self.args.truncated_verdict == "abstain" and shares and shares[-1] == 1.0
        abstained = self._metrics["train"].get("verdict/abstained", [])[-1:] == [1.0]
        if abstained and not self._abstention_told and not cut:
            self._abstention_told = True
            logger.warning(ABSTAINED, self.reward_func_names[0], step)

    def _tell_cut(self, share: float, step: int) -> None:
        limit = self.args.max_completion_length
        if self.args.mask_truncated_completions and share == 1.0:
            if not self._untrained_told:
                logger.warning(UNTRAINED, step, limit)
            self._untrained_told = True
        elif share > 0.5 and not self._cut_told:
            logger.warning(CUT, 100 * share, step, limit)
            self._cut_told = True

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Same as GRPOTrainer, with the settings of the method, and no "None" for what is on no hub."""
        folder = Path(str(self.args.output_dir)).resolve()
        if not args and not kwargs.get("model_name"):
            kwargs["model_name"] = folder.name
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            from huggingface_hub import ModelCard

            card = ModelCard.load(folder / "README.md")
            section = self.args.card_section(self.teachers.card_name)
            text = card.text.replace("### Framework versions", section + "### Framework versions")
            card.text = named(text, get_config_model_id(self.model.config), folder.name)
            card.save(folder / "README.md")


def named(card: str, student: str, model: str) -> str:
    """A model card that says what it left open.

    `student` is the path that the student came from, of which the folder alone is told; empty for a model in memory.
    `model` is the name of the folder that holds what was trained.
    """
    source = f"`{Path(student).name}`, a model in a local folder" if student else "a model that was given in memory"
    return card.replace(NO_HUB[0], source).replace(NO_HUB[1], f'model="path/to/{model}"')
