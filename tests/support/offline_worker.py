"""Run by test_vllm_evaluate.py with the interpreter that has vLLM: the offline engine, twice, and a stopped run.

python offline_worker.py FOLDER [MODEL]    writes FOLDER/{first,second,stopped}/samples.jsonl; MODEL: a student's folder
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer

from sg_opd import MathVerifier
from sg_opd.data import load_data
from sg_opd.evaluation.engines import Sampling, VLLMEngine
from sg_opd.evaluation.evaluator import evaluate

ARITHMETIC = Path(__file__).parents[2] / "examples" / "arithmetic"


class StoppedError(Exception):
    pass


class Stops(MathVerifier):
    """Stops a run in its third batch."""

    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise StoppedError
        return super().__call__(*args, **kwargs)


def main(folder: Path, student: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    engine = VLLMEngine(student, tokenizer, dtype="float32", max_model_len=256, max_num_seqs=16, enforce_eager=True)
    rows = load_data(str(ARITHMETIC / "data"), "test").select(range(20))

    def run(name: str, verifier: MathVerifier) -> None:
        evaluate(engine, tokenizer, rows, verifier, Sampling(48), 4, 16, 7, False, folder / name)

    verifier, stops = MathVerifier(workers=1), Stops(workers=1)
    stops.__name__ = verifier.__name__
    run("first", verifier)
    run("second", verifier)
    try:
        run("stopped", stops)
    except StoppedError:
        run("stopped", verifier)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else str(ARITHMETIC / "student"))
