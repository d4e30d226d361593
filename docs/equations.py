r"""Typesets the equations of docstrings, which are written to be read in a terminal.

    mu <- (<x, y> mu - <mu, y> x) / |y|²

becomes `\mu\leftarrow (\langle x,y\rangle \,\mu-…)/\lVert y\rVert ^{2}`. An equation is a line
indented by four spaces above a docstring's `Args:`; two spaces or more begin a new column. Names
are those of the function's parameters, the symbols below and English words: any other one is an
error, so that nothing comes out half translated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

# What is neither one letter nor a parameter of the function.
SYMBOLS = {
    **{name: f"\\{name} " for name in ("mu", "nu", "rho", "delta", "beta", "max", "cos", "sin")},
    **{name: f"\\{name} " for name in ("tan", "exp")},
    **{name: rf"\mathrm{{{name}}}" for name in ("adam", "atan2", "mean")},
    **{"eps": r"\varepsilon ", "sqrt": r"\sqrt"},
    **{"η": r"\eta ", "θ": r"\theta ", "λ": r"\lambda ", "ν": r"\nu ", "π": r"\pi "},
}
OPERATORS = {
    **{sign: sign for sign in "+-/=,:"},
    **{"<-": r"\leftarrow ", "<=": r"\le ", ">=": r"\ge ", "<": "< ", ">": "> "},
    **{"·": r"\cdot ", "⊘": r"\oslash ", "∠": r"\angle "},
}
WORDS = frozenset(
    "SGD about also and angle at between classic deformation directions drawn each else first for "
    "from gradient group group's groups if in is leaf's leaves momentum momentum_radial_fraction "
    "neither new number old one or orthogonalised over per radial_fraction radius random so "
    "retraction spherical step the to transported turn_per_gradient versa vice with without".split()
)
TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<string>"[^"]*")|(?P<number>\d+(?:\.\d+)?)|\^(?P<power>\w)|(?P<square>²)"""
    r"""|(?P<name>[A-Za-zα-ω][A-Za-z0-9_α-ω]*(?:'s\b|')?)|(?P<sign><-|<=|>=|.)"""
)
SECTION = re.compile(r"(Args|Returns|Raises|Source):|>>> ")


class UnknownToken(ValueError):
    """A name or a sign without a translation, or a bracket without a partner."""


def latex(text: str, parameters: Collection[str] = ()) -> str:
    """Translates one column of a line; `parameters` are names that are set upright."""
    out: list[str] = []
    opened: list[tuple[str, str]] = []  # how each open bracket closes, here and there
    after_operand = after_space = False

    def add(piece: str, *, starts: bool = False, ends: bool = False) -> None:
        nonlocal after_operand, after_space
        product = after_operand and starts and after_space
        out.append(f"\\,{piece}" if product else piece)
        after_operand, after_space = ends, False

    def open_bracket(piece: str, *ends: str) -> None:
        opened.append((ends[0], ends[1]))
        add(piece, starts=True)

    for match in TOKEN.finditer(text):
        kind, token = match.lastgroup, match[match.lastgroup or 0]
        rest = text[match.end() :]
        if kind == "space":
            after_space = True
        elif kind == "string" or token in WORDS and token not in parameters:
            word = token.strip('"')
            if "_" in word:
                add(rf"\mathrm{{{word}}}".replace("_", r"\_"))
                continue
            if out and out[-1].startswith(r"\text{"):  # neighbours are one text
                word = f"{out.pop()[6:-1].rstrip()} {word}"
            elif out and after_space:
                word = f" {word}"
            add(rf"\text{{{word}{' ' if rest.startswith(' ') else ''}}}")
        elif kind == "name":
            add(_name(token, parameters, text), starts=True, ends=True)
        elif kind == "number":
            add(token, starts=True, ends=True)
        elif kind in ("power", "square"):
            add(f"^{{{token if kind == 'power' else 2}}}", ends=True)
        elif opened and token == opened[-1][0]:
            add(opened.pop()[1], ends=True)
        elif token == "(":
            root = bool(out) and out[-1].endswith(r"\sqrt")
            open_bracket(*("{", ")", "}") if root else ("(", ")", ")"))
        elif token == "<" and rest[:1].strip():
            open_bracket(r"\langle ", ">", r"\rangle ")
        elif token == "|":  # a norm, or the absolute value of a number
            bar = "vert" if re.match(r"<|f\(", rest) else "Vert"
            open_bracket(rf"\l{bar} ", "|", rf"\r{bar} ")
        elif token in OPERATORS:
            add(OPERATORS[token])
        else:
            raise UnknownToken(f"{token!r} in {text!r}")
    if opened:
        raise UnknownToken(f"{opened[-1][0]!r} is missing in {text!r}")
    return "".join(out).strip()


def _name(name: str, parameters: Collection[str], text: str) -> str:
    if name in SYMBOLS:
        return SYMBOLS[name]
    if name in parameters and len(name) > 2:
        return rf"\mathrm{{{name}}}".replace("_", r"\_")
    if part := re.fullmatch(r"(exp|[A-Za-zη])_([a-z])", name):  # P_x, η_e
        return f"{SYMBOLS.get(part[1], part[1]).strip()}_{{{part[2]}}}"
    if part := re.fullmatch(r"([a-z])(\d)", name):  # b1
        return f"{part[1]}_{{{part[2]}}}"
    if re.fullmatch(r"[A-Za-z]'?", name):
        return name
    raise UnknownToken(f"{name!r} in {text!r}")


def typeset(lines: Sequence[str], parameters: Collection[str] = ()) -> list[str]:
    """Makes `.. math::` of the equations in the lines of a docstring, and keeps all others."""
    out: list[str] = []
    block: list[list[str]] = []
    end = next((i for i, line in enumerate(lines) if SECTION.match(line)), len(lines))
    for line in [*lines[:end], ""]:
        if line.startswith("    "):
            columns = re.split(r"\s{2,}", line.strip())
            block.append([latex(column, parameters) for column in columns])
        elif block:
            out += [".. math::", "", *(f"    {row}" for row in _array(block)), "", line]
            block = []
        else:
            out.append(line)
    return [*out[:-1], *lines[end:]]


def _array(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of columns that begin at one place each."""
    columns = "l" * max(map(len, rows))
    body = [r" & \quad ".join(row) for row in rows]
    ends = [r" \\"] * (len(rows) - 1) + [""]
    inside = [line + end for line, end in zip(body, ends, strict=True)]
    return [rf"\begin{{array}}{{{columns}}}", *inside, r"\end{array}"]
