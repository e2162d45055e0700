"""Batches are joined in one order, whatever was interrupted and however they are split over processes."""

import pytest

from kvq.calib.tree import Tree, covered


def join(left: str, right: str) -> str:
    """Neither commutative nor associative, so that every order shows."""
    return f"({left}+{right})"


def tree_of(batches) -> Tree:
    tree = Tree(join)
    for batch in batches:
        tree.add((0, batch), str(batch))
    return tree


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 13])
def test_any_order_and_any_split_give_one_total(count):
    whole = tree_of(range(count))
    for order in (reversed(range(count)), sorted(range(count), key=lambda b: (b * 7) % 11)):
        assert tree_of(order).total() == whole.total()
    for cut in range(count + 1):
        first, second = tree_of(range(cut)), tree_of(range(cut, count))
        for node, part in second.nodes.items():
            first.add(node, part)
        assert first.total() == whole.total()
        assert first.nodes.keys() == whole.nodes.keys()


def test_the_order_is_that_of_a_binary_tree():
    assert tree_of(range(7)).total() == "((((0+1)+(2+3))+(4+5))+6)"


def test_few_nodes_are_held():
    assert max(len(tree_of(range(n)).nodes) for n in range(1, 129)) == 7


def test_missing_batches_are_those_of_no_node():
    tree = tree_of([0, 1, 2, 3, 6])
    assert sorted(tree.nodes) == [(0, 6), (2, 0)]
    assert list(covered((2, 0))) == [0, 1, 2, 3]
    assert tree.missing(range(9)) == [4, 5, 7, 8]
