"""Tables: the signs and the commands that have another spelling, for `notation`."""

from __future__ import annotations

CJK = "\u3400-\u9fff"
# signs that people type for LaTeX, which Unicode's own normal form would break or leave
SIGNS = {
    **dict.fromkeys("−‐‑‒–—﹣－", "-"),  # noqa: RUF001
    **dict.fromkeys("°º˚", r"^\circ "),
    **dict.fromkeys("·⋅∙・", r"\cdot "),
    **dict.fromkeys("≤≦⩽≼", r"\le "),
    **dict.fromkeys("≥≧⩾≽", r"\ge "),
    **dict.fromkeys("⁄∕", "/"),  # noqa: RUF001
    **dict.fromkeys("…⋯", r"\ldots "),
    **dict.fromkeys("∅⌀Ø", r"\emptyset "),
    **dict.fromkeys("→⟶", r"\to "),
    **dict.fromkeys("′ʹ’‘", "'"),  # noqa: RUF001
    **dict.fromkeys("″“”", '"'),
    "×": r"\times ",  # noqa: RUF001
    "÷": r"\div ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": r"\equiv ",
    "∞": r"\infty ",
    "∪": r"\cup ",  # noqa: RUF001
    "∩": r"\cap ",
    "∈": r"\in ",
    "∉": r"\notin ",
    "∖": r"\setminus ",  # noqa: RUF001
    "⊂": r"\subset ",
    "⊆": r"\subseteq ",
    "∧": r"\land ",
    "∨": r"\lor ",  # noqa: RUF001
    "¬": r"\neg ",
    "⇒": r"\Rightarrow ",
    "⇔": r"\Leftrightarrow ",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "∣": r"\mid ",  # noqa: RUF001
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "⟨": "(",
    "⟩": ")",
    "ℝ": r"\mathbb{R}",  # noqa: RUF001
    "ℤ": r"\mathbb{Z}",  # noqa: RUF001
    "ℚ": r"\mathbb{Q}",  # noqa: RUF001
    "ℕ": r"\mathbb{N}",  # noqa: RUF001
    "ℂ": r"\mathbb{C}",  # noqa: RUF001
    "。": ".",
    "、": ",",
    "．": ".",  # noqa: RUF001
    "％": "%",  # noqa: RUF001
    "‰": r"\text{ per mille}",
    "￥": "¥",
    "￡": "£",
    "\u200b": "",
    "\ufeff": "",
    "\u2061": "",
    "\u2062": "",
}

# before a number
CHINESE_WORDS = {
    **dict.fromkeys(("至少", "不少于", "不小于", "大于等于", "大于或等于"), "at least"),
    **dict.fromkeys(("至多", "最多", "不超过", "不大于", "小于等于", "小于或等于"), "at most"),
    **dict.fromkeys(("大于", "超过", "多于"), "more than"),
    **dict.fromkeys(("小于", "少于", "不足"), "less than"),
    **dict.fromkeys(("不等于", "不是"), "not equal to"),
    **dict.fromkeys(("以上", "及以上"), "or more"),
    **dict.fromkeys(("以下", "以内", "及以下"), "or less"),
    **dict.fromkeys(("大约", "约为"), "about"),
}
COMMANDS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"), r"\frac"),
    **dict.fromkeys(("dbinom", "tbinom"), r"\binom"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), r"\le"),
    **dict.fromkeys(("geq", "geqslant", "geqq"), r"\ge"),
    **dict.fromkeys(("neq",), r"\ne"),
    **dict.fromkeys(("lt",), "<"),
    **dict.fromkeys(("gt",), ">"),
    **dict.fromkeys(("infin",), r"\infty"),
    **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb", "dotso", "hdots"), r"\ldots"),
    **dict.fromkeys(("varnothing", "empty"), r"\emptyset"),
    **dict.fromkeys(("rightarrow", "longrightarrow", "implies", "Longrightarrow"), r"\to"),
    **dict.fromkeys(("wedge",), r"\land"),
    **dict.fromkeys(("vee",), r"\lor"),
    **dict.fromkeys(("lnot",), r"\neg"),
    **dict.fromkeys(("backslash", "smallsetminus"), r"\setminus"),
    **dict.fromkeys(("langle", "lparen"), "("),
    **dict.fromkeys(("rangle", "rparen"), ")"),
    **dict.fromkeys(("lbrace",), r"\{"),
    **dict.fromkeys(("rbrace",), r"\}"),
    **dict.fromkeys(("lbrack",), "["),
    **dict.fromkeys(("rbrack",), "]"),
    **dict.fromkeys(("lvert", "rvert", "vert"), "|"),
    **dict.fromkeys(("colon",), ":"),
    **dict.fromkeys(("ast",), "*"),
    **dict.fromkeys(("degree", "textdegree"), r"^\circ"),
    **dict.fromkeys(("celsius",), r"^\circ C"),
    **dict.fromkeys(("imath",), "i"),
    **dict.fromkeys(("textdollar",), r"\$"),
    **dict.fromkeys(("euro", "texteuro"), "€"),
    **dict.fromkeys(("pounds", "textsterling"), "£"),
    **dict.fromkeys(("yen", "textyen"), "¥"),
    **dict.fromkeys(("cent", "textcent"), "¢"),
    **dict.fromkeys(("percent", "percentage"), "%"),
    **dict.fromkeys(("varepsilon",), r"\epsilon"),
    **dict.fromkeys(("varphi",), r"\phi"),
}

# whose argument stays as mathematics
_WRAPPERS = (
    "mathbf boldsymbol bm mathit mathnormal underline uline emph boxed fbox framebox mathop mathord mathrel "
    "mathbin ensuremath displaymath pmb bold symbf symit"
)
WRAPPERS = frozenset(_WRAPPERS.split())
# whose argument is words, unless it holds mathematics
_TEXTS = (
    "text textbf textit textrm textsf texttt textnormal textup textmd textsc textsl mathrm mathsf mathtt "
    "operatorname mbox hbox unit si rm"
)
TEXTS = frozenset(_TEXTS.split())
