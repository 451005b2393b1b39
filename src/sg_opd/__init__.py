"""SG-OPD: Sign-Gated On-Policy Distillation for TRL (arXiv 2606.09304).

The public names; each is imported when it is first asked for, so that a verifier does not pay for TRL.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["SGOPDConfig"],
        "trainer": ["SGOPDTrainer"],
        "method.loss": ["SignGatedLoss"],
        "method.teacher_phase": ["TeacherPhaseSampler"],
        "verifiers.verdicts": ["MathVerifier"],
        "views.gate_view": ["inspect_rollout", "load_gate_samples"],
        "views.gate_samples": ["score_rollout"],
    },
)
