"""A stand-in for a processor with AMX: with this folder on PYTHONPATH, torch reads of one on any machine."""

import torch

AMX = dict.fromkeys(("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"), True)
read = torch._C._cpu._get_cpu_capability
torch._C._cpu._get_cpu_capability = lambda: {**read(), **AMX}
