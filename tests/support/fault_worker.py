"""Run by test_faults.py under torchrun: a few steps with the teacher behind URLs, whatever comes of it.

torchrun --nproc_per_node 2 fault_worker.py FOLDER URL [URL ...]
"""

import sys
from pathlib import Path

from datasets import load_dataset

from sg_opd import SGOPDConfig, SGOPDTrainer

ARITHMETIC = Path(__file__).parents[2] / "examples" / "arithmetic"


def main(folder: str, *urls: str) -> None:
    args = SGOPDConfig(
        folder, max_steps=3, per_device_train_batch_size=8, num_generations=4, max_completion_length=24,
        teacher_server_url=list(urls), teacher_server_retries=0, teacher_phase_steps=0, bf16=False, use_cpu=True,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = load_dataset("json", data_files=str(ARITHMETIC / "data" / "train.jsonl"), split="train[:64]")
    trainer = SGOPDTrainer(str(ARITHMETIC / "student"), None, None, args, data)
    assert trainer.accelerator.num_processes == 2
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
