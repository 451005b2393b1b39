"""First on the path of the tests' engines (`vllm_server.ENVIRONMENT`): each of their processes hears of no AMX.

In a virtual machine whose processor shows `amx_tile` vLLM's AMX kernels may die of an illegal instruction, and weights
packed for them cannot be loaded anew. The answers change when their module is imported: `import torch` here would cost
each Python process two seconds.
"""

import sys
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path

QUESTIONS = {
    "torch.cpu": ("_is_amx_tile_supported", "_is_amx_fp16_supported"),
    "vllm._custom_ops": ("cpu_has_amx_fp8",),  # the experts of an fp8 mixture ask nothing else
}


class Denied(SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        for name in QUESTIONS[module.__name__]:
            setattr(module, name, lambda: False)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name in QUESTIONS else None
        if spec is not None:
            spec.loader = Denied(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder)

# Python runs one module of this name: the one that this file hides runs here
hidden = PathFinder.find_spec("sitecustomize", [path for path in sys.path if path != str(Path(__file__).parent)])
if hidden is not None:
    hidden.loader.exec_module(module_from_spec(hidden))
