"""Texts of models and data as they are shown: each token's own, and with a name for what acts unseen."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's controls, formats, surrogates, separators of lines and paragraphs
JOINERS = "\u200c\u200d"  # formats that shape emoji and Persian, and reorder nothing
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token: what it adds to the text before it, in time linear in the number of tokens.

    A token that ends within a character has no text; the one that completes it has the character. `DecodeStream` of
    tokenizers would lose bytes at the end that are no text, take quadratic time over many, and need a fast tokenizer.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts: list[str] = []
    known, start, read = "", 0, 0  # a token is decoded with the ones before it: some decoders drop a first space
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids) and end - read < LONGEST_CHARACTER:
            texts.append("")
            continue
        # bytes that are no text may be read anew, so what is known need not be the beginning of it
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, text, strict=False)))
        texts.append(text[same:])
        known, start, read = decode(ids[read:end]), read, end
    return texts


def visible(text: str, newline: str = "↵\n") -> str:
    """`text` with a code point, such as ⟨U+202E⟩, for each character that acts on a terminal or on the text's order."""
    named = (char for char in set(text).difference(JOINERS) if unicodedata.category(char) in ACTING)
    names = {ord(char): f"⟨U+{ord(char):04X}⟩" for char in named} | {ord("\n"): newline, ord("\t"): "⇥\t"}
    return text.translate(names)
