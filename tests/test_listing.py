"""Lists in messages."""

from trak_dist.listing import first_few


def test_a_short_list_is_whole() -> None:
    assert first_few([]) == ""
    assert first_few([3, 5]) == "3, 5"
    assert first_few(["a", "b"], 2, separator="; ") == "a; b"


def test_of_a_long_list_the_others_are_counted() -> None:
    assert first_few(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert first_few(["a", "b", "c"], 1, separator="; ") == "a and 2 more"
