"""What the papers say, in torch alone: the gate and its settings, the loss on logits, the divergence on hidden states,
and the teacher phase. It imports no other room. A new gate rule is one function in `rules.py`, in the table
`GATE_RULES`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "gate": ["GateDecision", "GateSettings", "decide", "group_sign", "verdict_sign"],
        "rules": ["GATE_RULES"],
        "loss": ["LossOutput", "SignGatedLoss", "gated_divergence", "policy_gradient"],
        "teacher_phase": ["Proposal", "TeacherPhaseSampler"],
    },
)
