"""Checkpoints that are whole or do not count, exact resume, and the ends of a run that leave one behind. It imports no
other room, so it knows neither teachers nor verifiers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "folders": ["flaw", "last_whole"],
        "resume": ["ResumableTrainer"],
        "stops": ["CheckpointError", "EXIT_CODE", "NonFiniteError"],
    },
)
