"""A teacher's server that fails one rank of two: both stop at once, with the same words, after one checkpoint."""

import os
import subprocess
import sys

import pytest
from documents import ROOT
from fault_proxy import FaultProxy, StandIn
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.integration
TEACHER = ROOT / "examples" / "arithmetic" / "teacher"


def test_one_rank_fails_and_both_stop_after_a_checkpoint(tmp_path):
    """Each rank begins at a URL of its own; the second one's is dead from the second step on."""
    stand_in = StandIn(AutoModelForCausalLM.from_pretrained(TEACHER), AutoTokenizer.from_pretrained(TEACHER))
    good = FaultProxy(stand_in)
    asked = []

    def dying(method, path, body):
        asked.append(len(body["prompt"]) if body and "prompt_logprobs" in body else 0)
        if asked.count(8) > 1:  # a rank's rollouts, eight a step
            return 503, b'{"error": {"message": "out of order"}}'
        return stand_in(method, path, body)

    bad = FaultProxy(dying)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "127.0.0.1:0", ROOT / "tests" / "support" / "fault_worker.py", tmp_path, good.url, bad.url,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        _, said = process.communicate(timeout=180)
    finally:
        process.terminate()  # torchrun ends its ranks, which are in sessions of their own
        good.close()
        bad.close()
    assert process.wait(60) != 0
    words = f"attempts, the last: {bad.url}/v1/completions: status 503: "
    words_of_rank = [line for line in said.splitlines() if "TeacherError: No usable answer" in line]
    assert sorted(line.split(":")[0] for line in words_of_rank) == ["[rank0]", "[rank1]"]
    assert all(words in line for line in words_of_rank)
    assert all(f"The last good step is 1, saved in {tmp_path}/checkpoint-1" in line for line in words_of_rank)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "rng_state_1.pth").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
