"""Errors of libraries on one line."""

import pytest

from iptv2_diffusion.messages import first_line, one_line


@pytest.mark.parametrize(
    ("error", "options", "expected"),
    [
        (ValueError("first\n  second\tthird "), {}, "first second third"),
        (ValueError("first\nsecond"), {"limit": 8}, "first se"),
        (MemoryError(), {}, "MemoryError"),
        (MemoryError(), {"empty": "out of memory"}, "out of memory"),
        (ValueError("\n"), {"limit": 3}, "ValueError"),
    ],
)
def test_a_message_is_one_line(error, options, expected):
    assert one_line(error, **options) == expected


def test_the_first_line_of_a_message():
    assert first_line(ValueError("\n first\nsecond")) == "first"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
