"""examples/train.py, for CPUs: DeepSpeed on plain gloo, without its shared-memory kernels.

Those are compiled first, for two minutes, and a process that used them may abort when it ends, its work done.
"""

import runpy
from pathlib import Path

import deepspeed.ops
from leaving import leave

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "train.py"), run_name="__main__")
    leave()
