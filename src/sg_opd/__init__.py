"""SG-OPD: Sign-Gated On-Policy Distillation for TRL (arXiv 2606.09304)."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "SGOPDConfig": "config",
    "SGOPDTrainer": "trainer",
    "SignGatedLoss": "method.loss",
    "TeacherPhaseSampler": "method.teacher_phase",
    "MathVerifier": "verifiers.verdicts",
    "inspect_rollout": "views.gate_view",
    "load_gate_samples": "views.gate_view",
    "score_rollout": "views.gate_samples",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # lazy: importing TRL costs seconds, and a verifier must not pay for it
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
