"""Evaluate a checkpoint, or compare evaluations of the same questions.

    python examples/evaluate.py --model_name_or_path MODEL --task aime24 --num_samples 32 --output_dir runs/evaluate/X
    python examples/evaluate.py compare BASELINE/result.json OTHER/result.json
    python examples/evaluate.py compare --baseline A0/result.json A1/result.json --other B0/result.json B1/result.json

The folder holds `samples.jsonl`, a line a sample, and `result.json`. A run that was stopped resumes where it stopped
when it is started again. `docs/evaluation.md` defines the figures; `--help` lists the options.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import TrlParser

from sg_opd import MathVerifier
from sg_opd.data import TASKS, load_data, load_task, prepare_dataset
from sg_opd.evaluation import (
    Engine,
    EvaluationResult,
    Sampling,
    ServerEngine,
    TransformersEngine,
    VLLMEngine,
    compare,
    evaluate,
)
from sg_opd.paths import check_path
from sg_opd.verifiers import load_verifier


@dataclass
class EvaluationArguments:
    model_name_or_path: str = field(
        metadata={"help": "Path or hub id; also a folder of a PEFT adapter. With a server, where its tokenizer is."}
    )
    output_dir: str = field(metadata={"help": "Folder for settings.json, samples.jsonl and result.json."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub id."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, bfloat16, float32."})
    task: str | None = field(default=None, metadata={"help": f"A benchmark: {', '.join(TASKS)}."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Without a task: a local file or folder, or a hub id. With one: its local file or folder."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a folder or of a dataset on the hub."})
    verifier: str | None = field(
        default=None,
        metadata={
            "help": "What judges answers, as module:function, as in training. A dataset that is no task then is taken "
            "as it is. Default: MathVerifier."
        },
    )
    engine: Literal["transformers", "vllm", "server"] = field(
        default="transformers",
        metadata={"help": "What samples: a model in this process, vLLM in it, or a vLLM server."},
    )
    server_url: list[str] | None = field(
        default=None, metadata={"help": "Base URLs of `vllm serve` endpoints of one model, for `engine=server`."}
    )
    served_model: str | None = field(default=None, metadata={"help": "Id of the served model; default: the only one."})
    vllm_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON of further arguments of vllm.LLM, such as tensor_parallel_size."}
    )
    num_samples: int = field(
        default=8, metadata={"help": "Completions a question; twice the largest k for which pass@k is to be trusted."}
    )
    max_completion_length: int = field(default=4096, metadata={"help": "Tokens after which a completion is cut off."})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "1 is the whole distribution."})
    top_k: int = field(default=0, metadata={"help": "0 is the whole distribution."})
    min_p: float = field(default=0.0, metadata={"help": "0 is the whole distribution."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "1 is none."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": """JSON for the chat template, such as '{"enable_thinking": false}'."""}
    )
    batch_size: int = field(default=256, metadata={"help": "Samples generated, graded and saved at a time."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})


def make_engine(args: EvaluationArguments, tokenizer: PreTrainedTokenizerBase) -> Engine:
    if args.engine == "server":
        if not args.server_url:
            raise SystemExit("`engine=server` needs `server_url`.")
        return ServerEngine(args.server_url, tokenizer, args.served_model)
    if args.engine == "vllm":
        options = {"revision": args.model_revision, "dtype": args.dtype, **as_dict(args.vllm_options)}
        return VLLMEngine(args.model_name_or_path, tokenizer, args.trust_remote_code, **options)
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        revision=args.model_revision,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        use_safetensors=True,
    )
    return TransformersEngine(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    return json.loads(value) if isinstance(value, str) else value or {}


def main(args: EvaluationArguments) -> None:
    verifier = load_verifier(args.verifier) if args.verifier else MathVerifier()
    check_path("model_name_or_path", args.model_name_or_path)
    check_path("dataset_name", args.dataset_name, "dataset")
    if args.task:
        dataset = load_task(args.task, args.dataset_name)
    elif args.dataset_name:
        split = "train" if Path(args.dataset_name).is_file() else args.dataset_split  # a file is a split by itself
        data = load_data(args.dataset_name, split, args.dataset_config)
        dataset = data if args.verifier else prepare_dataset(data)
    else:
        raise SystemExit("Set `task` or `dataset_name`.")
    tokenizer = AutoTokenizer.from_pretrained(
        args.model_name_or_path, revision=args.model_revision, trust_remote_code=args.trust_remote_code
    )
    shaping = args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty
    sampling = Sampling(args.max_completion_length, *shaping)
    result = evaluate(
        make_engine(args, tokenizer),
        tokenizer,
        dataset,
        verifier,
        sampling,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        output_dir=args.output_dir,
        chat_template_kwargs=as_dict(args.chat_template_kwargs),
        task=args.task or args.dataset_name,
    )
    print(result)
    print(f"written: {args.output_dir}/samples.jsonl, {args.output_dir}/result.json")


def compare_files(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="evaluate.py compare", description="Other minus baseline, paired by question."
    )
    parser.add_argument("results", nargs="*", help="two result.json: baseline and other")
    parser.add_argument("--baseline", nargs="+", default=[], help="result.json of each of several runs")
    parser.add_argument("--other", nargs="+", default=[], help="as many of the other side")
    options = parser.parse_args(arguments)
    sides = (options.baseline, options.other) if not options.results else [[path] for path in options.results]
    if len(sides) != 2 or not all(sides) or (options.results and (options.baseline or options.other)):
        parser.error("give two results, or --baseline and --other")
    print(compare(*([EvaluationResult.from_json(path) for path in side] for side in sides)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        compare_files(sys.argv[2:])
    else:
        (arguments,) = TrlParser((EvaluationArguments,)).parse_args_and_config()
        main(arguments)
