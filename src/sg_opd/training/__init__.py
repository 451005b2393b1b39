"""What a run is made of beside the method: its rollouts, its teacher and the initial policy, its metrics, and what is
checked before the first step.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "metrics": ["METRICS", "GateMeter"],
        "frozen": ["InitialPolicy", "build_teacher", "build_teachers"],
        "rollouts": ["Rollouts"],
    },
)
