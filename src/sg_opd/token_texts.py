"""Tokens as text to be shown: what each adds to the text before it, and a visible name for what acts unseen."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

JOINERS = "\u200c\u200d"  # invisible, but they shape emoji and Persian, and reorder nothing
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token: what it adds to the text before it, in time linear in the number of tokens.

    A token that ends within a character has no text; the one that completes it has the character.
    """
    texts: list[str] = []
    start = read = 0  # a token is decoded together with the ones before it, as some decoders drop a first space

    def decoded(begin: int, end: int) -> str:
        return tokenizer.decode(ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    known = ""
    for end in range(1, len(ids) + 1):
        text = decoded(start, end)
        last = end == len(ids) or end - read == LONGEST_CHARACTER
        if text.endswith("\ufffd") and not last:
            texts.append("")
            continue
        # bytes that are no text may be read anew, so what is known need not be the beginning of it
        pairs = enumerate(zip(known, text, strict=False))
        texts.append(text[next((i for i, (a, b) in pairs if a != b), min(len(known), len(text))) :])
        start, read = read, end
        known = decoded(start, read)
    return texts


def visible(text: str, newline: str = "↵\n") -> str:
    """`text` with a visible name for each character that acts instead of being seen.

    Its code point, such as ⟨U+202E⟩: control characters, bidirectional and other format characters, separators of
    lines, and lone surrogates.
    """

    def shown(match: re.Match[str]) -> str:
        character = match[0]
        if character in "\n\t":
            return newline if character == "\n" else "⇥\t"
        acts = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS
        return f"⟨U+{ord(character):04X}⟩" if acts else character

    return re.sub(r"[^ -~]", shown, text)
