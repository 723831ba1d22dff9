"""Windows written as text."""

import pytest

from nha_jax.models.windows import parse_windows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", (64,)),
        (64, (64,)),
        ("full", ("full",)),
        ("64x3,full", (64, 64, 64, "full")),
        (" 64 x 2 , fullx2,0", (64, 64, "full", "full", 0)),
        ("[32, full]", (32, "full")),
        ("[32, 'full']", (32, "full")),
        ([32, "full"], (32, "full")),
        (["64x2", 8], (64, 64, 8)),
    ],
)
def test_text_and_lists_are_windows(text, expected):
    assert parse_windows(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "entry ''"),
        ("64,", "entry ''"),
        ("-1", "entry '-1'"),
        ("64x0", "entry '64x0'"),
        ("64y7", "entry '64y7'"),
        ("half", "entry 'half'"),
        ([], "windows is empty"),
        ([-1], "windows=-1: expected 'full' or an int"),
    ],
)
def test_other_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_windows(text)
