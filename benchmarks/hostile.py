r"""Completions made to hang, crash or fool a grader: seeded, and none of them equals its gold.

`attacks(count, seed)` goes through the kinds in turn; a shorter list is the beginning of a longer one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

Draw = random.Random
# equal, and sympy does not prove it within any time limit
HANGING, ITS_REFERENCE = r"\boxed{\sum_{k=0}^{300}\binom{300}{k}x^k}", "(1+x)^{300}"
# some need sympy, some do not; the last is missing
GOLDS = (
    "7x^2+3",
    r"\frac{\sqrt{7}}{3}",
    "-1417",
    r"\{11, 13\}",
    "(5,8]",
    r"\text{north}",
    r"17\pi",
    "ab+c",
    "x=77",
    "",
)


class Attack(NamedTuple):
    """One hostile completion, and a gold that it does not equal."""

    kind: str
    completion: Any
    gold: Any


def either(draw: Draw, forms: str, **values: Any) -> str:
    """One of the forms between the bars, with `<name>` replaced by the value of that name."""
    form = draw.choice([form.strip() for form in forms.split(" ¦ ")])
    for name, value in values.items():
        form = form.replace(f"<{name}>", str(value))
    return form


def digits(draw: Draw, count: int) -> str:
    return str(draw.randint(1, 9)) + "".join(draw.choices("0123456789", k=count - 1))


def big(draw: Draw) -> str:
    """A large number in one of the ways to write it."""
    n = draw.randint(5, 99)
    return either(draw, "<digits> ¦ 10^{<n>} ¦ 10^9 ¦ 99^{99} ¦ 1e<n>", digits=digits(draw, draw.randint(4, 40)), n=n)


def power_tower(draw: Draw) -> str:
    depth, base = draw.randint(3, 9), either(draw, r"9 ¦ 99 ¦ x ¦ 2 ¦ i ¦ e ¦ \pi ¦ 1.5 ¦ (-3)")
    joined = draw.choice(["^{", "^", "^{ ", "^ {", "**"])
    tower = joined.join([base] * depth) + "}" * (depth - 1) * ("{" in joined)
    return either(draw, r"<t> ¦ \frac{1}{<t>} ¦ x+<t> ¦ \sqrt{<t>} ¦ \log(<t>) ¦ (<t>, 1)", t=tower)


def huge_exponent(draw: Draw) -> str:
    forms = (
        r"2^{<n>} ¦ x^{<n>} ¦ (1+x)^{<n>} ¦ 1.0000001^{<n>} ¦ (2^{9999})^{<n>} ¦ 10^{-<n>} ¦ \frac{2^{<n>}}{3^{9}} ¦ "
    )
    forms += r"e^{e^{<n>}} ¦ 2^<n> ¦ 2^{\frac{<n>}{7}} ¦ ((2^{99})^{99})^{<n>} ¦ \exp(<n>) ¦ (\frac{1}{3})^{<n>}"
    return either(draw, forms, n=big(draw))


def factorial(draw: Draw) -> str:
    forms = (
        r"<n>! ¦ (<n>)! ¦ (<n>!)! ¦ <n>!! ¦ \Gamma(<n>) ¦ \binom{<n>}{<k>} ¦ \binom{10^9}{5\cdot 10^8} ¦ (((9!)!)!)! ¦ "
    )
    forms += r"\frac{<n>!}{<n>!+1} ¦ {<n>}! ¦ x^{<n>!} ¦ \sqrt{<n>!} ¦ (9^9)!"
    return either(draw, forms, n=draw.choice([big(draw), draw.randint(900, 9999)]), k=draw.randint(9, 10**9))


def long_sum(draw: Draw) -> str:
    term = either(draw, r"i^i ¦ \frac{1}{i^i} ¦ \sin(i^2) ¦ i! ¦ \sum_{j=1}^{10^9} (ij)^j ¦ \frac{\sin i}{i^3}")
    n = either(draw, r"<n> ¦ 10^9 ¦ \infty", n=big(draw))
    return either(draw, r"\sum_{i=1}^{<n>} <term> ¦ \prod_{i=1}^{<n>} <term>", n=n, term=term)


def calculus(draw: Draw) -> str:
    inner = either(draw, r"e^{-x^2}\sin(\cos(x^x)) ¦ x^{x^x} ¦ \frac{\sin x}{x^{77}+\ln x} ¦ \sqrt[7]{\tan x + x^x}")
    forms = r"\int_0^{1} <f> dx ¦ \int_0^\infty\int_0^1 <f> dx dy ¦ \int <f> dx ¦ \lim_{x\to 0} <f> ¦ \frac{d}{dx} <f>"
    return either(draw, forms, f=inner)


def expansion(draw: Draw) -> str:
    forms = r"(x+y+z)^{<n>} ¦ (a+b+c+d+e)^{<k>} ¦ \prod_{k=1}^{<n>}(x+k) ¦ (1+x)^{<k>}(1-x)^{<n>} ¦ (x^{<n>}-1)/(x-1) ¦ <product>"
    product = "".join(f"(x+{k}y)" for k in range(90))
    return either(draw, forms, n=draw.randint(40, 9999), k=draw.randint(9, 99), product=product)


def nesting(draw: Draw) -> str:
    pairs = r"\frac{1}{1+ @ } ¦ \sqrt{2+ @ } ¦ ( @ ) ¦ { @ } ¦ \left( @ \right) ¦ \sin( @ ) ¦ \{ @ \} ¦ -( @ ) ¦ \log( @ ) ¦ "
    pairs += r"| @ | ¦ \text{ @ } ¦ x_{ @ } ¦ \overline{ @ } ¦ \frac{1}{2^{999 @ }} ¦ [ @ ] ¦ \lfloor @ \rfloor ¦ 2^{\frac{1}{ @ }}"
    before, after = either(draw, pairs).split(" @ ")
    depth, closed = draw.choice([5, 30, 60, 150, 900]), draw.choice([True, True, False])
    return before * depth + either(draw, "1 ¦ x ¦ 9^9") + after * depth * closed


def matrix(draw: Draw) -> str:
    size = draw.choice([3, 12, 20, 100])
    rows = r"\\".join("&".join(str(draw.randint(0, 9)) for _ in range(size)) for _ in range(size))
    m = rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}"
    return either(draw, r"<m> ¦ \det<m> ¦ x^<m> ¦ <m>^{-1} ¦ <m>^{999} ¦ <m><m> ¦ e^{<m>} ¦ \frac{1}{<m>}", m=m)


def many_digits(draw: Draw) -> str:
    forms = r"<n> ¦ 0.<n> ¦ \frac{<n>}{7} ¦ 1/<n> ¦ -<n> ¦ <n> % ¦ <n>\text{ cm} ¦ x+<n> ¦ \sqrt{<n>} ¦ <n>! ¦ <n>^{<n>} ¦ <n>, 5 ¦ 3 <n>/7"
    return either(draw, forms, n=digits(draw, draw.choice([450, 990, 999, 1_001, 4_301, 19_000])))


def numeric(draw: Draw) -> str:
    """Numbers that are hard to evaluate, or whose rounding misleads."""
    forms = r"\sin(10^{<n>}) ¦ 10^{-<n>} ¦ e^{\pi\sqrt{163}}-262537412640768744 ¦ \tan(\frac{\pi}{2}-10^{-<n>}) ¦ \frac{0}{0} ¦ "
    forms += (
        r"(\sqrt{2}+\sqrt{3})^{<n>}-(\sqrt{2}-\sqrt{3})^{<n>} ¦ 1/0 ¦ \infty-\infty ¦ nan ¦ \cos(\cos(\cos(10^{9}))) ¦ "
    )
    forms += r"\sqrt[999]{2} ¦ \log_{<n>}(0) ¦ <n>e9999 ¦ i^{i^{i}} ¦ 0^0 ¦ \zeta(3) ¦ 0.\overline{<n>} ¦ <n>_7 ¦ \infty^{\infty}"
    return either(draw, forms, n=draw.randint(3, 60))


def sets(draw: Draw) -> str:
    members = [str(draw.randint(0, 10**6)) for _ in range(draw.choice([2, 20, 140]))]
    unions = r"\cup".join(f"({a},{a}.5]" for a in members[:60])
    forms = r"\{<m>\} ¦ <u> ¦ <m> ¦ (<m>) ¦ \mathbb{R}\setminus\{<m>\} ¦ \{x|x^{77}+x+1=0\} ¦ \{\{1\},\{2,\{3\}\}\} ¦ [1,0] ¦ <c>"
    return either(draw, forms, m=",".join(members), u=unions, c=r"\cap".join(["(0,1)"] * 99))


def relations(draw: Draw) -> str:
    n = draw.randint(5, 76)
    forms = r"<chain> ¦ x^{<n>}+x+1=0 ¦ x^{<n>}+\sin x<\cos x ¦ x^{<n>}\le y^{<n>}\le z^{<n>} ¦ = = = ¦ <less> ¦ x\ne <n> ¦ "
    forms += r"x><n>>x ¦ \pm<n>\pm1\pm x ¦ x\in(<n>,\infty) ¦ y=y^{y^{y}} ¦ <n>=1 ¦ x=<n>=y ¦ x=77=<n> ¦ x=77,y=<n> ¦ x\ge 77"
    return either(draw, forms, n=n, chain="<".join("abcdxyz" * 9), less="<" * n)


def units(draw: Draw) -> str:
    bomb = either(
        draw, r"\% ¦ ^\circ ¦ \text{ cm} ¦ \$ ¦ dollars ¦ \text{ m}^{9} ¦ ° ¦ \, ¦ ½ ¦ ! ¦ ' ¦ % ¦ \mathrm{kg} ¦ ¼"
    )
    return f"{draw.randint(1, 999)}{bomb * draw.randint(3, 300)}"[: draw.choice([400, 5000])]


def injection(draw: Draw) -> str:
    forms = r"__import__('os').system('true') ¦ x.__class__.__mro__[1].__subclasses__() ¦ lambda: 0 ¦ exec('1') ¦ S.Half ¦ `true` ¦ "
    forms += r"\operatorname{__import__}(os) ¦ eval(input()) ¦ sympify('1') ¦ {{7*7}} ¦ ${7*7} ¦ $(true) ¦ import socket ¦ %s%n%x ¦ "
    forms += r"open('/etc/passwd').read() ¦ {0.__class__} ¦ '; DROP TABLE golds; -- ¦ <script>alert(1)</script> ¦ ../../gold ¦ "
    forms += r"Symbol('x').func ¦ ().__class__ ¦ os.environ['HF_TOKEN'] ¦ \x41 ¦ x.free_symbols ¦ \text{__import__('os')} ¦ @x ¦ #"
    return either(draw, forms)


def tex_bomb(draw: Draw) -> str:
    forms = r"\def\x{\x\x}\x ¦ \newcommand{\a}{\a\a\a}\a ¦ \input{/etc/passwd} ¦ \write18{true} ¦ \loop\iftrue\repeat ¦ <many> ¦ <many> ¦ "
    forms += r"\csname end\endcsname ¦ \catcode`\%=12 % ¦ \uppercase{\x} ¦ \verb|\end| ¦ \begin{cases}1&x\\2&y\end{cases} ¦ <many>"
    many = either(
        draw,
        r"\expandafter ¦ \begin{x} ¦ #1 ¦ \left ¦ \\ ¦ & ¦ $ ¦ ^ ¦ _ ¦ ^_ ¦ % ¦ ~ ¦ ' ¦ \right ¦ \cdot ¦ \over ¦ \frac",
    )
    return either(draw, forms, many=many * (draw.choice([9, 990]) // len(many)))


def look_alike(draw: Draw) -> str:
    forms = "х+1 ¦ ７７x ¦ 4\u200b2\u200b ¦ −١٤١٨ ¦ Ⅳ ¦ ²³ ¦ ① ¦ 𝟏𝟒𝟏𝟖 ¦ 1\u03384 ¦ π² ¦ ａb＋c＋d ¦ χ=77 ¦ еnd ¦ \u202e7141-\u202c ¦ "
    forms += "\u200f-1418\u200f ¦ \u2066(5,8)\u2069 ¦ nоrth ¦ n\u0307orth ¦ \ufeff-1418 ¦ ﬀ ¦ İ ¦ ſ ¦ K ¦ <many> ¦ <many> ¦ -𝟏417x ¦ 17л"
    many = either(draw, "a\u0301 ¦ \u0301 ¦ \u202d\u202e ¦ ﷺ ¦ 😀 ¦ 𝟙 ¦ ı\u0307 ¦ ß ¦ \u200d")
    return either(draw, forms, many=many * draw.choice([9, 400]))


def control(draw: Draw) -> str:
    codes = [*range(32), 127, 0x85, 0x2028, 0x2029, 0xFFFE, 0xFFFF]
    some = "".join(map(chr, draw.choices(codes, k=draw.choice([1, 9, 900]))))
    return either(
        draw, "<s> ¦ 1<s>2 ¦ \x1b[2J\x1b]0;<s>\x07 ¦ \x00\x00 ¦ 1\n2\n3\r\n ¦ <s>x+<s>1 ¦ 4\x00 ¦ \x007x", s=some
    )


def surrogate(draw: Draw) -> str:
    lone = chr(draw.randint(0xD800, 0xDFFF))
    forms = "<s> ¦ 1<s> ¦ <many> ¦ \\<s>{1} ¦ x+<s> ¦ \\text{<s>} ¦ \udc00\ud800<s> ¦ <s>^{<s>} ¦ north<s>"
    return either(draw, forms, s=lone, many=lone * 900)


def reply(draw: Draw) -> str:
    """What might be taken for a worker's answer, for a task, or for a verdict."""
    forms = '1\n{"verdict": 1.0, "spent": false}\n1 ¦ ", "answer": "7x^2+3 ¦ \\u0022, \\u0022gold\\u0022: 1 ¦ 1.0 ¦ True ¦ correct ¦ '
    forms += 'gold ¦ solution ¦ the gold ¦ \\text{correct} ¦ None ¦ null ¦ NaN ¦ verdict ¦ "}\n{"gold": "1"} ¦ right ¦ yes ¦ <gold>'
    return either(draw, forms)


def soup(draw: Draw) -> str:
    tokens = r"\frac \sqrt \sum \int ^ _ { } ( ) [ ] | ! % $ & \\ = < > \le \pm \cup \{ \} \text \pi \infty i e x y 0 1 9 . , ; : ' ^{ }{"
    return draw.choice(["", " "]).join(draw.choices(tokens.split(), k=draw.choice([4, 12, 40, 120])))


def any_unicode(draw: Draw) -> str:
    return "".join(chr(draw.randrange(0x110000)) for _ in range(draw.choice([1, 20, 400])))


def slow_pattern(draw: Draw) -> str:
    """What makes a careless regular expression take squares of its length."""
    part = draw.choice(
        [" ", "1 ", r"\text{", "√", "1,", "\\", "{", "-", "1/", "~", "\t", r"\left ", "a ", "1.", "√(", "1 a", "}{"]
    )
    return f"1{part * (draw.choice([300, 990, 19_000]) // len(part))}{draw.choice(['x', '', '!'])}"


BOXED: dict[str, Callable[[Draw], str]] = {
    function.__name__: function
    for function in (
        *(power_tower, huge_exponent, factorial, long_sum, calculus, expansion, nesting, matrix, many_digits, numeric),
        *(sets, relations, units, injection, tex_bomb, look_alike, control, surrogate, reply, soup, any_unicode),
        slow_pattern,
    )
}


def imitation(draw: Draw) -> Attack:
    """Texts that hold the gold, or begin or end with it, and say something else."""
    forms = r"<g> million ¦ <g> minus seven ¦ <g> dozen ¦ <g> squared ¦ <g> negative ¦ <g>\text{ thousand} ¦ -<g> ¦ <g>.5 ¦ 0.<g> ¦ "
    forms += r"<g>,<o> ¦ <g>\text{ or }<o> ¦ <o>=<g> ¦ <o>/<g> ¦ \neq <g> ¦ ><g> ¦ <g>0 ¦ <g>! ¦ <g>\text{ or }\text{<o>} ¦ <g>x ¦ "
    forms += r"<g> is wrong ¦ <g>\pm 1 ¦ <g>^<o> ¦ (<o>,<g>) ¦ \{<g>,<o>\} ¦ <g>+<o> ¦ not <g> ¦ \text{not }<g> ¦ <g>^{-1} ¦ <g> <o>"
    gold = draw.randint(100, 998)
    return Attack("imitation", boxed(draw, either(draw, forms, g=gold, o=gold + 1)), str(gold))


def misplaced(draw: Draw) -> Attack:
    """The gold where no answer is: unboxed, in thoughts, before the last box, in a box that never closes."""
    forms = r"<g> ¦ The answer is <g>. ¦ <think><b> ¦ <think><b></think> so ¦ \boxed{<g> ¦ <b>\boxed{0} ¦ <b><far> ¦ <b></think> ¦ "
    forms += (
        r"\boxed(<g>) ¦ \bboxed{<g>} ¦ <b><think> ¦ <|begin_of_thought|><b> ¦ <b> \boxed{} ¦ boxed{<g>} ¦ /boxed{<g>}"
    )
    gold = draw.choice(GOLDS[:-1])
    return Attack("misplaced", either(draw, forms, g=gold, b=rf"\boxed{{{gold}}}", far=" " * 30_000), gold)


def many_boxes(draw: Draw) -> Attack:
    part = either(
        draw,
        r"\boxed{1} ¦ \boxed{ ¦ \boxed{1}\boxed{ ¦ } ¦ \boxed{} ¦ \text{\boxed{1}} ¦ <think> ¦ </think><think> ¦ \fbox{ ¦ \{",
    )
    many = part * draw.choice([3, 2_000, 200_000])
    return Attack(
        "many_boxes", either(draw, r"<m> ¦ <m>\boxed{1} ¦ \boxed{<m>} ¦ <m>}}}}}", m=many), draw.choice(GOLDS)
    )


def megabyte(draw: Draw) -> Attack:
    text = draw.choice(
        [digits(draw, 10**6), " " * 10**6, "x+" * 500_000, "\\" * 10**6, "\ud800" * 10**6, "\x00" * 10**6]
    )
    completion = draw.choice([boxed(draw, text), text, rf"{text}\boxed{{0}}"])
    return Attack("megabyte", completion, draw.choice(GOLDS))


def nothing(draw: Draw) -> Attack:
    forms = "\\boxed{} ¦ \\boxed{ } ¦ \\boxed{\\ } ¦ \\boxed{\\text{}} ¦ \\boxed{$$} ¦ \\boxed{\u00a0} ¦ \\boxed{\\,}"
    return Attack("nothing", draw.choice(["", " ", "\n\t \n", "\u00a0\u2003", either(draw, forms)]), draw.choice(GOLDS))


def no_text(draw: Draw) -> Attack:
    """Completions of other types than a text or a list of messages."""
    contents = [None, 5, [], {}, [None], ["x"], [{"text": None}], [{"text": 5}], b"x", float("inf")]
    message = {"role": "assistant", "content": draw.choice(contents)}
    plain = [None, 42, 4.2, True, b"\\boxed{1}", {}, {"a": 1}, [], [1, 2], [None], ["x"], (), object, {1, 2}]
    return Attack("no_text", draw.choice([*plain, message, [message], [message], [[message]]]), draw.choice(GOLDS))


def hostile_gold(draw: Draw) -> Attack:
    """Golds as broken as any answer, and answers that are not equal to them."""
    long = digits(draw, draw.choice([3_999, 4_400, 100_000])) + either(draw, r"! ¦ /7 ¦ , 5 ¦ \text{ cm} ¦ % ¦ .5")
    others = [long, long, float("inf"), float("nan"), 10**5000, {"a": [1]}, b"1", True, [], object, " " * 10**6]
    gold = draw.choice([*others, *(make(draw) for make in BOXED.values())])
    return Attack("hostile_gold", boxed(draw, either(draw, r"\frac{1}{77771} ¦ q^7+w ¦ (3,3331]")), gold)


WHOLE: dict[str, Callable[[Draw], Attack]] = {
    function.__name__: function
    for function in (imitation, misplaced, many_boxes, megabyte, nothing, no_text, hostile_gold)
}
KINDS = (*BOXED, *WHOLE)


def boxed(draw: Draw, answer: str) -> str:
    """A completion whose answer it is."""
    forms = r"\boxed{@} ¦ So it is $\boxed{@}$. ¦ <think>hm</think> \boxed{@} ¦ \[\fbox{ @ }\] ¦ \boxed{1} \boxed{@}. That is it."
    before, after = either(draw, forms).split("@")
    return before + answer + after


def attacks(count: int, seed: int = 0) -> list[Attack]:
    """The first `count` hostile completions of a seed, kind after kind."""
    made = []
    for number in range(count):
        draw, kind = random.Random(f"{seed} {number}"), KINDS[number % len(KINDS)]
        if kind in WHOLE:
            made.append(WHOLE[kind](draw))
        else:
            made.append(Attack(kind, boxed(draw, BOXED[kind](draw)), draw.choice(GOLDS)))
    return made
