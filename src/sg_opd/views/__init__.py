"""What a person looks at: the gate's decision on each token of a rollout, and the curves of a run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "gate_view": ["RolloutView", "inspect_rollout", "load_gate_samples", "render_page"],
        "gate_samples": ["GateSamples", "score_rollout"],
        "curves": ["RunLog", "Series"],
        "plot": ["interactive_figures", "page", "plot_runs", "static_figure"],
    },
)
