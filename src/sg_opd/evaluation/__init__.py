"""avg@k, pass@k and maj@k of a model: sampling, grading, the figures with their intervals, and paired comparisons. It
meets the trainer only through a checkpoint, or through `EvaluationCallback`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "comparison": ["Comparison", "compare"],
        "engines": ["Completion", "Engine", "Sampling", "ServerEngine", "TransformersEngine", "VLLMEngine"],
        "evaluator": ["EvaluationCallback", "evaluate", "evaluate_model"],
        "figures": ["Interval", "QuestionResult", "Sample", "majority", "mean_interval", "pass_at_k"],
        "results": ["EvaluationResult", "provenance"],
    },
)
