"""Numbers in sentences and tables: signs, zero, what is no number, and significant digits."""

from __future__ import annotations

import math

import pytest

from workbench.ground.numbers import MINUS, figures, fixed, signed

INF = math.inf


@pytest.mark.parametrize(
    ("value", "decimals", "plain", "with_sign"),
    [
        (0.0, 1, "0.0", "0.0"),
        (-0.0, 1, "0.0", "0.0"),
        (-0.04, 1, "0.0", "0.0"),
        (0.04, 1, "0.0", "0.0"),
        (-0.05, 1, f"{MINUS}0.1", f"{MINUS}0.1"),
        (0.06, 1, "0.1", "+0.1"),
        (-0.4, 0, "0", "0"),
        (-0.6, 0, f"{MINUS}1", f"{MINUS}1"),
        (10.0, 0, "10", "+10"),
        (-100.0, 2, f"{MINUS}100.00", f"{MINUS}100.00"),
        (1234567.8, 0, "1234568", "+1234568"),
        (-1e-9, 3, "0.000", "0.000"),
        (math.nan, 2, "nan", "nan"),
        (INF, 1, "inf", "+inf"),
        (-INF, 1, f"{MINUS}inf", f"{MINUS}inf"),
    ],
)
def test_fixed_decimals(value: float, decimals: int, plain: str, with_sign: str) -> None:
    assert (fixed(value, decimals), signed(value, decimals)) == (plain, with_sign)


def test_the_sign_is_no_hyphen_unless_asked_for() -> None:
    assert MINUS == "\u2212"
    assert (fixed(-1.5, 1), fixed(-1.5, 1, minus="-"), signed(-0.01, 1, minus="-")) == ("\u22121.5", "-1.5", "0.0")


def test_thousands() -> None:
    assert (fixed(-1234.4, 0, thousands=","), signed(1e6, 0, thousands=","), fixed(0.2, 0, thousands=",")) == (
        "\u22121,234",
        "+1,000,000",
        "0",
    )


@pytest.mark.parametrize(
    ("value", "digits", "plain", "with_sign"),
    [
        (0.0, 3, "0", "0"),
        (-0.0, 3, "0", "0"),
        (0.04567, 2, "0.046", "+0.046"),
        (-0.04567, 2, f"{MINUS}0.046", f"{MINUS}0.046"),
        (-1.5e-7, 3, f"{MINUS}1.5e{MINUS}07", f"{MINUS}1.5e{MINUS}07"),
        (12, 6, "12", "+12"),
        (math.nan, 3, "nan", "nan"),
        (-INF, 3, f"{MINUS}inf", f"{MINUS}inf"),
    ],
)
def test_significant_digits(value: float, digits: int, plain: str, with_sign: str) -> None:
    assert (figures(value, digits), figures(value, digits, plus=True)) == (plain, with_sign)
