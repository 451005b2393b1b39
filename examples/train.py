"""Distil a teacher into a student with SG-OPD, from a recipe.

    accelerate launch examples/train.py --config examples/configs/<recipe>.yaml [--any_field value ...]

Without a recipe or a model it trains the embedded arithmetic recipe on the CPU. Every field of TRL's ScriptArguments
and ModelConfig, of SGOPDConfig, and `verifier` can stand in the recipe or on the command line; `--help` lists them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from sg_opd import SGOPDConfig, SGOPDTrainer
from sg_opd.data import load_data, prepare_dataset
from sg_opd.paths import check_path
from sg_opd.verifiers import load_verifier

EMBEDDED = Path(__file__).resolve().parent / "configs" / "arithmetic.yaml"


@dataclass
class TrainArguments(ScriptArguments):
    verifier: str | None = field(
        default=None,
        metadata={
            "help": "What judges answers, as module:function: a TRL reward function that answers 1, 0 or None. The "
            "dataset then is taken as it is, with the columns that it reads. Default: MathVerifier."
        },
    )


def main(script_args: TrainArguments, args: SGOPDConfig, model_args: ModelConfig) -> None:
    if not script_args.dataset_name or not model_args.model_name_or_path:
        raise SystemExit("Set `dataset_name` and `model_name_or_path`, in the recipe or on the command line.")
    verifier = load_verifier(script_args.verifier) if script_args.verifier else None
    check_path("model_name_or_path", model_args.model_name_or_path)
    if not args.teacher_server_url:  # else it is the id of the served model
        check_path("teacher_model_name_or_path", args.teacher_model_name_or_path)
    check_path("dataset_name", script_args.dataset_name, "dataset")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }

    def split(name: str):
        data = load_data(script_args.dataset_name, name, script_args.dataset_config, script_args.dataset_streaming)
        if verifier is not None:
            return data
        return prepare_dataset(data, keep=[args.teacher_column] if args.teacher_models else ())

    trainer = SGOPDTrainer(
        model=model_args.model_name_or_path,
        verifier=verifier,
        args=args,
        train_dataset=split(script_args.dataset_train_split),
        eval_dataset=split(script_args.dataset_test_split) if args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    last = str(args.resume_from_checkpoint).lower() == "true"  # the last whole checkpoint, not one of that name
    trainer.train(resume_from_checkpoint=last or args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()  # the log, for `python -m sg_opd.views.plot`
    trainer.accelerator.print(f"The student is saved in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if not args.use_vllm:  # a colocated engine still needs the process group when it shuts down
        trainer.accelerator.end_training()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not {"--config", "--model_name_or_path", "--help", "-h"} & set(arguments):
        os.chdir(EMBEDDED.parents[2])  # its paths begin at the repository's root
        arguments = ["--config", str(EMBEDDED), *arguments]
    parser = TrlParser((TrainArguments, SGOPDConfig, ModelConfig))
    main(*parser.parse_args_and_config(arguments))
