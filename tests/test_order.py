"""The order of the suite: long tests start first, and a core that runs out of tests takes over those of others."""

from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
MARKS = ("long", "model")


def is_long(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(mark) for mark in MARKS)


def test_long_tests_are_the_first_of_this_run(request):
    order = [is_long(item) for item in request.session.items]
    assert order == sorted(order, reverse=True)


def test_the_others_keep_their_order(request):
    class Item:
        def __init__(self, name: str, *marks: str):
            self.name, self.marks = name, marks

        def get_closest_marker(self, mark: str) -> str | None:
            return mark if mark in self.marks else None

    items = [Item("a"), Item("b", "long"), Item("c", "engine"), Item("d", "model"), Item("e")]
    (conftest,) = (own for own in request.config.pluginmanager.get_plugins() if hasattr(own, "make_tiny_model"))
    conftest.pytest_collection_modifyitems(items)
    assert [item.name for item in items] == ["b", "d", "a", "c", "e"]


def test_cores_share_what_is_left():
    """Chunks of tests that are given out in advance left one core with the last of them for a quarter of the time."""
    assert "pytest -n auto --dist worksteal" in MAKEFILE.read_text()
