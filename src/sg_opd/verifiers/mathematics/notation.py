r"""One notation for what people type: Unicode, Markdown and LaTeX's many spellings become plain LaTeX.

`plain` undoes what changes an answer's look and not its meaning: fonts, sizes, colours, spacing, delimiters, full-width
forms. Standard library only; nothing is evaluated.
"""

from __future__ import annotations

import re
import unicodedata

from .brackets import MAX_DEPTH, PARENTHESES, closing
from .signs import CHINESE_WORDS, CJK, COMMANDS, SIGNS, TEXTS, WRAPPERS

RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
LOWERED = "₀₁₂₃₄₅₆₇₈₉₊₋"
SCRIPT = re.compile(rf"[{RAISED}]+|[{LOWERED}]+")
ROOT = re.compile(r"([√∛∜])\s*(?=[({\w\\])")
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
CONNECTIVE = re.compile(rf"(?<![{CJK}])([或和与且及])(?![{CJK}])")
CHINESE = re.compile("|".join(sorted(CHINESE_WORDS, key=len, reverse=True)))
GREEK = re.compile(r"[α-λν-ωΓΔΘΛΞΠΣΦΨ]|(?<![A-Za-z])[μΩ](?![A-Za-z])")  # noqa: RUF001

# commands that change the look of what follows, or of the line
LOOKS = re.compile(
    r"\\(?:(?:display|text|script|scriptscript)style|(?:no)?limits|left|right|middle|[bB]igg?[lrm]?|tiny|footnotesize|small"
    r"|normalsize|large|Large|LARGE|huge|Huge|rm|bf|it|sf|tt|sl|cal|boldmath|strut|mathstrut|null|noindent|centering"
    r"|hfill|relax|allowbreak|protect|nonumber)(?![A-Za-z])(?:(?<=left)\s*\.|(?<=right)\s*\.)?|\\[!/]"
)
SPACING = re.compile(r"\\[hv]space\*?\s*\{[^{}]*\}|\\(?:hphantom|vphantom|phantom|label|tag)\*?\s*\{[^{}]*\}")
WIDE = re.compile(
    r"\\[,;:> \t\n]|\\(?:q?quad|enspace|thinspace|medspace|thickspace|space|nobreakspace|newline)(?![A-Za-z])|~"
)
COLOUR = re.compile(
    r"\\color\s*(?:\[[^\[\]]*\])?\s*\{[^{}]*\}|\\(?:text|color)?color(?:box)?\s*(?=\{[^{}]*\}\s*\{)\{[^{}]*\}"
)
DELIMITERS = re.compile(r"\\[\[\]()]|\$\$")
COMMAND = re.compile(r"\\([A-Za-z]+)")
MATHS = re.compile(r"[\\$^_=<>]|\d")
MARKDOWN = re.compile(r"(\*\*|__|\*|`)(?=\S)(.+)(?<=\S)\1")
GROUPED = re.compile(r"(?<=\d)(?:\{,\}|,\\!\s*|\\,)\s*(?=\d{3}(?!\d))")
COMMA_POINT = re.compile(r"(?<=\d)\{,\}(?=\d)")
SPACED = re.compile(r"(?<![\d.,/\w])(\d{1,3}(?: \d{3})+)(?![\d/]|\s*\\frac)")
BARE_ROOT = re.compile(r"\\sqrt\s*(\d+|[A-Za-z])")
LONG_POWER = re.compile(r"\^\s*(-?\d{2,}|-\d)")
WORDS = {"pi": r"\pi ", "infinity": r"\infty ", "inf": r"\infty ", "infty": r"\infty "}
WORD = re.compile(r"(?<![A-Za-z\\{])(pi|infinity|infty|inf)(?![A-Za-z])")
FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|csc|log|ln|lim|gcd|lcm|binom)"
    r"(?![A-Za-z])(?=[\s({^_\\\d]|$)"
)
ROW = "\ue001"  # between the rows of a matrix while spacing is removed
SYSTEM = re.compile(r"\\left\s*\\\{\s*(?=\\begin)|\\lbrace\s*(?=\\begin)")
FRACTION_OF_UNITS = re.compile(r"\\frac\{ ?\\text\{([^{}]*)\} ?\}\{ ?\\text\{([^{}]*)\}((?:\^(?:\d|\{\d\}))?) ?\}")
CHOOSE = re.compile(r"\{ ?([^{}]{1,20}?) ?\\choose ?([^{}]{1,20}?) ?\}")
FULL_STOP = re.compile(r"(?<![.\s])\s*\.$")
BOUNDARY = re.compile(r"^(?:[\s;]|,\s|=(?!=)\s*|\\approx\s*|\\sim\s*(?=\d))+|(?:[\s,;]|\\\\|(?<!\\)\\)+$")


def plain(text: str) -> str:
    r"""The text in plain LaTeX, with one space where there was any, and words in `\text{}`; it may be empty."""
    text = _typed(text)
    is_table = r"\begin" in text  # of a matrix or a system; elsewhere a backslash may be doubled
    text = text.replace("\\\\", ROW) if is_table else re.sub(r"\\\\(?=[A-Za-z$%])", r"\\", text)
    text = COMMAND.sub(lambda match: COMMANDS.get(match[1], match[0]) + " " * (match[1] in COMMANDS), text)
    text = COMMA_POINT.sub(".", GROUPED.sub("", text))
    text = COLOUR.sub("", SPACING.sub(" ", LOOKS.sub(" ", SYSTEM.sub("", text))))
    text = _unwrapped(_delimiters(text))
    text = WIDE.sub(" ", text).replace("\\%", "%").replace("\\ ", " ")
    text = CHOOSE.sub(r"\\binom{\1}{\2}", text).replace(r"\mu \text{", r"\text{μ").replace(r"\mu\text{", r"\text{μ")
    text = re.sub(r"(?<=\d) ?\\Omega(?![A-Za-z])", " Ω", text)
    text = FRACTION_OF_UNITS.sub(r" \\text{\1}/\\text{\2}\3 ", _trimmed(_arguments(text)))
    text = text.replace("**", "^").replace("^{\\circ}", r"^\circ ").replace("^ \\circ", r"^\circ ")
    text = text.replace("...", r"\ldots ")
    text = LONG_POWER.sub(r"^{\1}", FUNCTION.sub(r"\\\1", WORD.sub(lambda match: WORDS[match[0]], text)))
    text = SPACED.sub(lambda match: match[1].replace(" ", ""), " ".join(text.split()))
    return _trimmed(text).replace(ROW, "\\\\")


def _typed(text: str) -> str:
    """Without the signs of Unicode that LaTeX writes otherwise; first those that Unicode's normal form would break."""
    if text.isascii():
        return text
    text = SCRIPT.sub(_script, ROOT.sub(_root, text))
    text = CONNECTIVE.sub(lambda match: " or " if match[1] == "或" else " and ", text)
    text = CHINESE.sub(lambda match: f" {CHINESE_WORDS[match[0]]} ", text)
    parts = []
    for character in text:
        if character in SIGNS:
            parts.append(SIGNS[character])
        elif unicodedata.decomposition(character).startswith("<fraction>"):
            top, _, bottom = unicodedata.normalize("NFKC", character).partition("⁄")  # noqa: RUF001
            parts.append(rf"\frac{{{top}}}{{{bottom or 1}}}")
        else:
            parts.append(character)
    text = unicodedata.normalize("NFKC", "".join(parts))
    return GREEK.sub(_greek, text)


def _script(match: re.Match) -> str:
    run = match[0]
    return ("^" if run[0] in RAISED else "_") + "{" + unicodedata.normalize("NFKC", run).replace("−", "-") + "}"  # noqa: RUF001


def _root(match: re.Match) -> str:
    return ROOTS[match[1]]


def _greek(match: re.Match) -> str:
    case, name = unicodedata.name(match[0]).split()[1], unicodedata.name(match[0]).split()[-1].lower()
    name = "lambda" if name == "lamda" else name
    return f"\\{name.capitalize() if case == 'CAPITAL' else name} "


def _delimiters(text: str) -> str:
    r"""Without the marks around mathematics; a dollar sign that has no partner is money."""
    text = DELIMITERS.sub(" ", text)
    lone = re.findall(r"(?<!\\)\$", text)
    if not lone:
        return text
    if len(lone) % 2 == 0:
        return re.sub(r"(?<!\\)\$", " ", text)
    return re.sub(r"(?<!\\)\$", r"\\$", text)


def _unwrapped(text: str, depth: int = 0) -> str:
    r"""Without commands that only change a font; what they, and `\text`, hold that is mathematics stands bare."""
    if "\\" not in text or depth > MAX_DEPTH:
        return text
    parts, place = [], 0
    for match in COMMAND.finditer(text):
        if match.start() < place or (match[1] not in WRAPPERS and match[1] not in TEXTS):
            continue
        opening = match.end() + (text[match.end() : match.end() + 1] == "*")
        opening += len(text[opening:]) - len(text[opening:].lstrip())
        if text[opening : opening + 1] != "{":
            parts.append(text[place : match.start()] + " ")
            place = match.end()
            continue
        end = closing(text, opening)
        if end < 0:
            break
        inner = _unwrapped(text[opening + 1 : end], depth + 1)
        parts.append(text[place : match.start()])
        parts.append(inner if match[1] in WRAPPERS and match[1] != "mbox" else _text(inner))
        place = end + 1
    parts.append(text[place:])
    return "".join(parts)


def _text(inner: str) -> str:
    r"""The argument of `\text`: words stay words, single letters that are constants and mathematics stand bare."""
    inner = re.sub(r"(?<!\\)\$", " ", WIDE.sub(" ", inner)) if "\\" in inner or "$" in inner else inner
    bare = inner.strip()
    if MATHS.search(bare) or not bare or bare in ("e", "i", "d") or not any(map(str.isalnum, bare)):
        return f" {inner} " if inner != bare or len(bare) > 1 else bare
    return rf"\text{{{inner}}}"


def _arguments(text: str) -> str:
    r"""`\frac12`, `\frac a b`, `\sqrt2` and `sqrt(2)` with their arguments in braces."""
    text = re.sub(r"(?<![A-Za-z\\])sqrt(?=\s*[({\d])", r"\\sqrt", text)
    text = BARE_ROOT.sub(r"\\sqrt{\1}", text)
    place = 0
    while (place := text.find(r"\sqrt", place)) >= 0:
        place += 5
        rest = text[place:].lstrip()
        if rest.startswith("(") and (end := closing(rest, 0, *PARENTHESES)) > 0:
            text = f"{text[:place]}{{{rest[1:end]}}}{rest[end + 1 :]}"
    place = 0
    while (place := text.find(r"\frac", place)) >= 0:
        place += 5
        rest, arguments = text[place:], []
        for _ in range(2):
            rest = rest.lstrip()
            end = closing(rest, 0) + 1 if rest.startswith("{") else 0
            command = COMMAND.match(rest)
            end = end or (command.end() if command else 1)
            argument, rest = rest[:end], rest[end:]
            arguments.append(argument if argument.startswith("{") else f"{{{argument}}}")
        text = text[:place] + "".join(arguments) + rest
    return text


def _trimmed(text: str) -> str:
    """Without what stands around an answer: spaces, a full stop, Markdown's stars, quotation marks, braces."""
    for _ in range(MAX_DEPTH):
        before = text
        text = FULL_STOP.sub("", BOUNDARY.sub("", text)).strip()
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1].strip()
        mark = MARKDOWN.fullmatch(text)
        if mark and mark[1] not in mark[2]:
            text = mark[2].strip()
        if text.endswith("*") and text.startswith("*") and len(text) > 2:
            text = text.strip("*")
        if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
            text = text[1:-1]
        if text == before:
            break
    return text
