"""Verdicts on answers: `MathVerifier`, the answers it reads, the worker processes it grades in, and how any verifier
is called and checked. It imports no other room, and neither torch nor TRL.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answers": ["after_thinking", "extract_answer", "last_box"],
        "grader": ["Grader", "Task"],
        "named": ["load_verifier"],
        "verdicts": ["MathVerifier", "checked_verdicts", "completion_text", "time_limit"],
    },
)
