r"""The final number of a solution, read from hostile text without evaluating anything.

Where it is looked for, in this order: the line after the last `####`, the last `\boxed{}`,
the whole text. The last number found there counts. Commas, currency and percent signs are
ignored, `1/2` and `\frac{1}{2}` are fractions, values are compared exactly: 18.0 is 18 and
33.3 is not 100/3. Only ASCII digits are digits; a number of more than 40 digits is none.
Scientific notation and mixed numbers (`1 1/2`) are not understood.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_DIGITS = 40
MAX_CHARS = 8_192
"""Only this much of the end of a text is read: an answer stands at the end."""

_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)]) [-+$€£\u2212]{1,3} )?      # 10-5 subtracts, =-5 is negative
    (?P<top> (?: [0-9]{1,3} (?: ,[0-9]{3} (?![0-9]) )+ | [0-9]+ ) (?: \.[0-9]+ )?
           | (?<![0-9.]) \.[0-9]+ )                 # .5, but not the end of an ellipsis: ...802
    (?: / (?P<bottom> [0-9]+ ) )?
    """,
    re.VERBOSE,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]{1,40})\}\{([0-9]{1,40})\}")
_ANNOTATION = re.compile(r"<<[^<>=\n]{1,100}=[^<>=\n]{0,100}>>")


def is_right(completion: str, reference: str) -> bool:
    """Whether both texts end in the same number.

    >>> is_right("so she pays $1,080.00.", "#### 1080")
    True
    """
    answer = final_number(completion)
    return answer is not None and answer == final_number(reference)


def final_number(text: str) -> Fraction | None:
    """The number a solution ends in, or None where there is none.

    >>> final_number("6 and 3 make 9 #### 9 apples")
    Fraction(9, 1)
    """
    found = list(_NUMBER.finditer(_tidy(_answer_place(text[-MAX_CHARS:]))))
    return _value(found[-1]) if found else None


def without_annotations(text: str) -> str:
    """The text without calculator annotations.

    >>> without_annotations("48/2 = <<48/2=24>>24 clips")
    '48/2 = 24 clips'
    """
    return _ANNOTATION.sub("", text)


def _answer_place(text: str) -> str:
    """The part of a text in which the answer stands."""
    _before, marker, after = text.rpartition("####")
    if marker:
        return after.lstrip().partition("\n")[0]
    _before, marker, after = text.rpartition("\\boxed{")
    return _up_to_closing_brace(after) if marker else after


def _up_to_closing_brace(text: str) -> str:
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return text


def _tidy(text: str) -> str:
    return _LATEX_FRACTION.sub(r"\1/\2", without_annotations(text).replace("{,}", ","))


def _value(match: re.Match[str]) -> Fraction | None:
    top, bottom = match["top"].replace(",", ""), match["bottom"] or "1"
    if max(len(top), len(bottom)) > MAX_DIGITS or not bottom.strip("0"):
        return None
    sign = match["sign"] or ""
    return Fraction(top) / int(bottom) * (-1 if "-" in sign or "\u2212" in sign else 1)
