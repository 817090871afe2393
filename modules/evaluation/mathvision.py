r"""MathVision: accuracy over short mathematical answers, by level and subject.

Rule: evaluation/evaluate.py and evaluation/utils.py of mathllm/MATH-V. The answer is read out of the response (an
option's letter at either end, what follows "the answer is", the last ``\boxed{}``), stripped of LaTeX's decoration, and
right if it is the letter or the text of the right option as text, or as a number to two decimals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from modules.evaluation.common import Row, Score, ScoreError, annotated, earned, mean, shares

FLAGS = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
LONGEST = 200  # characters; what is longer is compared as text only
_TOO_LARGE = re.compile(r"\^\s*\{?\s*[-\d.]{4,}|\^[^^]{0,20}\^|!|\d{20,}")  # powers and factorials without end


def extract(response: str) -> str:
    """What a response answers, in lower case and plain; see the module."""
    text = response.strip()
    for letter in "ABCDE":
        ends = (f" {letter}.", f" ({letter}).")
        if text.endswith(ends) or text.startswith((f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")):
            text = letter
    last = text.split("is ")[-1].rstrip(".")
    if _is_number(last):
        text = last
    if "oxed{" not in text:
        for flag in FLAGS:
            for spelt in (flag, flag.replace("the", "The")):
                said = spelt in text
                text = text.split(spelt)[-1].strip()
                if said:
                    text = text.split("\n")[0].split(". ")[0]
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = plain(text)
    for letter in "abcde":
        text = text.replace(f"({letter})", letter)
    for letter in "abcde":
        text = text.replace(f"{{{letter}}}", letter)
    return text.rstrip(".").lstrip(":").strip()


def plain(text: str) -> str:
    """What is boxed, or all of it, behind its last equals sign and without spaces, units and LaTeX's decoration."""
    text = text.lower().replace("{}", "")
    boxed = re.findall("oxed{(.*)}", text, flags=re.DOTALL)
    text = boxed[-1] if boxed else text
    if "}" in text and ("{" not in text or text.find("}") < text.find("{")):
        text = text.split("}")[0]
    text = text.split("=")[-1].split("\\approx")[-1]
    for old, new in _DECORATION:
        text = text.replace(old, new)
    return _stripped(text)


_DECORATION = (
    *((" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", "")),
    *(("\\text", ""), ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", "")),
    *(("^{\\circ}", ""), ("^\\circ", ""), ("{m}^3", ""), ("m^3", "")),
    *(("{units}", ""), ("units", ""), ("{km}", ""), ("km", "")),
)


def equal(right: str, said: str) -> bool:
    """Whether two answers are the same text, the same tuple, or numbers that agree to two decimals."""
    right, said = right.lower(), said.lower()
    if not right.replace(" ", "") or not said.replace(" ", ""):
        return False
    if right.strip() == said.strip():
        return True
    right, said = _evaluated(right), _evaluated(said)
    if right == said:
        return True
    a, b = value(right), value(said)
    return a is not None and b is not None and round(a, 2) == round(b, 2)


def value(text: str) -> float | int | None:
    """The real number that LaTeX stands for, an int if it is whole by its form; None if it is none.

    What could not be computed in bounded time is none either.
    """
    if len(text) > LONGEST or _TOO_LARGE.search(text):
        return None
    try:
        found = _latex()(text)
        return int(found) if found.is_Integer else float(found.evalf())
    except Exception:  # the parser raises whatever a broken formula leads it into
        return None


def score(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``response`` or ``model_answer``; answer, options, level and subject may be in either file."""
    rows = annotated(predictions, annotations)
    right = [_right(row) for row in rows]
    groups = [[f"level{row.value('level')}", row.text("subject")] for row in rows]
    return Score(len(rows), mean(right), shares(right, groups), values=earned(right))


def _right(row: Row) -> bool:
    answer, options = str(row.value("answer")), row.value("options")
    if not isinstance(options, list):
        raise ScoreError(f"Expected `options` of {row.where} to be a list, but got {options!r}.")
    text = ""
    if options:
        index = ord(answer) - ord("A") if len(answer) == 1 else -1
        if not 0 <= index < len(options):
            raise ScoreError(f"Expected `answer` of {row.where} to be an option's letter, but got {answer!r}.")
        text = str(options[index])
    said = row.text("model_answer") if "model_answer" in row.fields else extract(row.text("response"))
    return equal(answer, said) or equal(text, said)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _evaluated(text: str) -> str:
    """A tuple or list with its elements as numbers of two decimals; anything else as it is. 1 and 1.0 differ here."""
    parts = text[1:-1].split(",")
    if len(parts) < 2 or (text[0], text[-1]) not in (("(", ")"), ("[", "]")):
        return text
    shown = []
    for part in parts:
        number = value(part)
        kept = "infty" in part or part in ("a", "-a")
        if number is None and not kept:
            return text
        shown.append(part if kept else str(round(number or 0, 2)))
    return f"{text[0]}{','.join(shown)}{text[-1]}"


def _stripped(text: str) -> str:
    for old, new in (("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\$", ""), ("$", "")):
        text = text.replace(old, new)
    text = text.split("\\text{ ")[0].replace("\\%", "").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    for mark in ("=", "\\approx"):
        text = text.split(mark)[-1] if text.count(mark) == 1 else text
    if "sqrt" in text:
        text = re.sub(r"\\sqrt(?!\\sqrt)([^{])", r"\\sqrt{\1}", text)
        text = re.sub(
            r"\\frac([^{])(\{|[^{])", lambda m: f"\\frac{{{m[1]}}}" + (m[2] if m[2] == "{" else f"{{{m[2]}}}"), text
        )
    if text == "0.5":
        return "\\frac{1}{2}"
    fraction = re.fullmatch(r"(-?[1-9]\d*|0)/(-?[1-9]\d*|0)", text)
    return f"\\frac{{{fraction[1]}}}{{{fraction[2]}}}" if fraction else text


def _latex() -> Callable[[str], Any]:
    from latex2sympy2_extended import latex2sympy  # slow to import; comes with math-verify

    parse: Callable[[str], Any] = latex2sympy
    return parse
