"""The answer checker: what is right, what is wrong, and what hostile text can't do."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.recipes.answers import MAX_DIGITS, final_number, is_right, without_annotations

RIGHT = [
    ("#### 18", "18"),
    ("She makes 9 * 2 = $18 every day.\n#### 18", "18"),
    ("#### $18", "18"),
    ("#### 18 dollars", "18"),
    ("#### 18.", "18"),
    ("#### 18.0", "18"),
    ("####\n18", "18"),
    ("####18\nQuestion: 5 + 5?", "18"),
    ("#### 3 + 15 = 18", "18"),
    ("#### 7\nno, wait\n#### 18", "18"),
    ("#### **18**", "18"),
    ("so \\boxed{18}", "18"),
    ("so $\\boxed{\\$18}$, which I checked 3 times", "18"),
    ("\\boxed{\\text{about } 18 \\text{ (of } {x})}", "18"),
    ("\\boxed{7} or rather \\boxed{18}", "18"),
    ("The answer is 18", "18"),
    ("The answer is 18!", "18"),
    ("= ...18", "18"),
    ("(18)", "18"),
    ("#### 1,080", "1080"),
    ("#### $1,234,567.50", "1234567.5"),
    ("#### 1{,}080", "1080"),
    ("#### -5", "-5"),
    ("#### \u22125", "-5"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("x=-5", "-5"),
    ("10-5", "5"),
    ("#### +5", "5"),
    ("#### 50%", "50"),
    ("#### .5", "0.5"),
    ("#### 1/2", "0.5"),
    ("\\boxed{\\frac{1}{2}}", "0.5"),
    ("\\boxed{\\dfrac{10}{4}}", "2.5"),
    ("#### 007", "7"),
    ("#### -0", "0"),
    ("#### <<9*2=18>>18", "18"),
]

WRONG = [
    ("#### 19", "18"),
    ("#### 1", "18"),
    ("#### 181", "18"),
    ("#### -18", "18"),
    ("#### 18.01", "18"),
    ("#### 33.3", "100/3"),
    ("#### 50%", "0.5"),
    ("#### 18 or 19", "18"),
    ("", "18"),
    ("####", "18"),
    ("no number at all", "18"),
    ("eighteen", "18"),
    ("#### \u0661\u0668", "18"),
    ("#### \uff11\uff18", "18"),
    ("#### \u00b9\u2078", "18"),
    ("#### 1/0", "0"),
    ("#### 18/0", "18"),
    ("\\boxed{}", "18"),
    ("\\boxed{", "18"),
    ("#### nan", "18"),
    ("#### inf", "18"),
    ("#### 1e999999999", "18"),
    ("#### 9**9**9", "18"),
    ("__import__('os').getpid()", "18"),
]


@pytest.mark.parametrize(("completion", "reference"), RIGHT)
def test_right(completion: str, reference: str) -> None:
    assert is_right(completion, reference)


@pytest.mark.parametrize(("completion", "reference"), WRONG)
def test_wrong(completion: str, reference: str) -> None:
    assert not is_right(completion, reference)


def test_no_number_is_never_right() -> None:
    assert not is_right("none", "none")


@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        "#### " + "9" * 1_000_000,
        "1/" * 500_000,
        "1," * 500_000,
        "1,111" * 200_000,
        "1." * 500_000,
        "-" * 1_000_000 + "18",
        "$-+" * 333_333,
        "####" * 250_000,
        "\\boxed{" * 150_000,
        "\\boxed{" + "{" * 1_000_000,
        "\\frac{1" * 150_000,
        "<<" * 500_000,
        "\x00" * 1_000_000,
        "\ud800" * 1_000_000,
        "\u0661" * 1_000_000,
    ],
    ids=lambda text: repr(text[:8]),
)
def test_a_megabyte_of_anything_is_judged(text: str) -> None:
    """That it ends is the test: a regular expression that backtracks would outlast the time limit of any test."""
    number = final_number(text)
    assert number is None or abs(number) < 10**MAX_DIGITS


def test_a_number_is_not_cut_to_fit() -> None:
    assert final_number("0" * (MAX_DIGITS - 2) + "18") == 18
    assert final_number("0" * MAX_DIGITS + "18") is None


@given(st.text())
def test_any_text_is_judged(text: str) -> None:
    number = final_number(text)
    assert number is None or isinstance(number, Fraction)


@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc \n.,:;!()"))
def test_any_integer_is_read_after_the_mark(value: int, before: str) -> None:
    assert final_number(f"{before}#### {value}") == value
    assert final_number(f"{before}#### {value:,}.") == value
    assert final_number(f"{before}\\boxed{{{value}}}") == value


@given(st.decimals(-1_000_000, 1_000_000, places=4))
def test_decimals_are_compared_exactly(value: object) -> None:
    assert final_number(f"#### {value}") == Fraction(str(value))


def test_annotations_are_removed() -> None:
    assert without_annotations("48/2 = <<48/2=24>>24, 48+24 = <<48+24=72>>72") == "48/2 = 24, 48+24 = 72"
    assert without_annotations("1 << 2 and 3 >> 1") == "1 << 2 and 3 >> 1"
