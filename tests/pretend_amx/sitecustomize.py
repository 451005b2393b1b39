"""A stand-in for a processor with AMX: with this folder on PYTHONPATH, torch reads of one on any machine."""

import torch

read = torch._C._cpu._get_cpu_capability
torch._C._cpu._get_cpu_capability = lambda: {**read(), "amx_tile": True, "amx_bf16": True, "amx_int8": True}
