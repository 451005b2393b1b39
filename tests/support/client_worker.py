"""Run by test_vllm_sampling.py with the interpreter that has vLLM: what TRL's client samples from a server.

python client_worker.py FOLDER URL    writes FOLDER/client.json, four completions of a prompt
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from sg_opd import SGOPDConfig
from sg_opd.training.rollouts import state_sampling

STUDENT = Path(__file__).parents[2] / "examples" / "arithmetic" / "student"


def main(folder: Path, url: str) -> None:
    generation = object.__new__(VLLMGeneration)  # of it, what it sends: pushing weights needs a GPU
    generation.generation_kwargs = {"seed": 3}
    args = SGOPDConfig(str(folder), use_cpu=True, bf16=False, report_to="none")
    state_sampling(args, AutoModelForCausalLM.from_pretrained(STUDENT), [], generation)
    prompt = AutoTokenizer.from_pretrained(STUDENT)("Start with 5, add 6, times 7.")["input_ids"]
    sampling = {"n": 4, "max_tokens": 48, "logprobs": 0, "generation_kwargs": generation.generation_kwargs}
    (folder / "client.json").write_text(json.dumps(VLLMClient(url).generate([prompt], **sampling)["completion_ids"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
