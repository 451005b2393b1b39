"""Run by test_vllm.py with the interpreter that has vLLM: student rollouts from a colocated engine on the CPU.

python colocate_worker.py FOLDER [SETTINGS]    writes FOLDER/result.json; SETTINGS: JSON for its generation config
"""

import json
import sys
from pathlib import Path

import torch

# test only: on CPUs the engine's oneDNN kernels keep a packed copy of the weights, which a reload does not reach
import vllm._custom_ops

vllm._custom_ops._supports_onednn = False

from datasets import load_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from sg_opd import SGOPDConfig, SGOPDTrainer  # noqa: E402

ARITHMETIC = Path(__file__).parents[2] / "examples" / "arithmetic"
PADDING = 5  # ids of the student's head that the tokenizer does not have


class Recorder(SGOPDTrainer):
    batches: list = []

    def _compute_loss(self, model, inputs):
        self.batches.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return super()._compute_loss(model, inputs)


def padded_student(folder: Path, settings: dict) -> str:
    """The student with further ids, as likely as the digit 1 unless an engine is told never to sample them."""
    model = AutoModelForCausalLM.from_pretrained(ARITHMETIC / "student", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ARITHMETIC / "student")
    known = model.config.vocab_size
    model.resize_token_embeddings(known + PADDING, mean_resizing=False)
    with torch.no_grad():
        one = tokenizer("1")["input_ids"][0]
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[known:] = table[one]
    model.generation_config.update(**settings)
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return str(folder / "student")


def main(folder: Path, settings: dict) -> None:
    args = SGOPDConfig(
        str(folder / "out"), max_steps=3, per_device_train_batch_size=16, num_generations=4, max_completion_length=48,
        learning_rate=1e-4, teacher_phase_steps=8, teacher_phase_fraction=0.5, teacher_candidates=2, seed=1,
        use_vllm=True, vllm_mode="colocate", vllm_max_model_length=256, vllm_gpu_memory_utilization=0.1,
        bf16=False, use_cpu=True, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = load_dataset("json", data_files=str(ARITHMETIC / "data" / "train.jsonl"), split="train[:64]")
    trainer = Recorder(padded_student(folder, settings), str(ARITHMETIC / "teacher"), None, args, data)
    trainer.train()
    rows = {"student": [], "teacher": []}
    largest_id, sampling = 0, {"student": [], "teacher": []}
    for batch in trainer.batches:
        mask, taken = batch["completion_mask"].bool(), batch["from_teacher"]
        ratio = batch["importance_sampling_ratio"].expand(mask.shape)
        logps = batch["sampling_per_token_logps"]
        largest_id = max(largest_id, int(batch["completion_ids"][mask].max()))
        for name, chosen in (("teacher", taken), ("student", ~taken)):
            of_rows = mask & chosen.unsqueeze(1)
            rows[name] += ratio[of_rows].tolist()
            sampling[name] += logps[of_rows].isnan().tolist()
    result = {
        "ratios": rows,
        "sampling_is_nan": sampling,
        "largest_id": largest_id,
        "completion_ids": [batch["completion_ids"].tolist() for batch in trainer.batches],
        "padding": int(trainer.model.config.vocab_size) - PADDING,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
