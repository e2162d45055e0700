"""Join the statistics of batches in an order that no interruption and no number of processes changes.

Floating-point sums depend on their order. Here batches are joined as leaves of a fixed binary tree: node (level, index)
covers batches [index * 2^level, (index + 1) * 2^level), and two neighbours are joined as soon as both are there. About
log2(batches) nodes are held at a time, wherever their parts came from.
"""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Part = TypeVar("Part")
Node = tuple[int, int]


def covered(node: Node) -> range:
    """The batches of a node."""
    level, index = node
    return range(index << level, (index + 1) << level)


class Tree(Generic[Part]):
    """Nodes of batches seen so far, as large as they can be. ``join`` takes the left part first."""

    def __init__(self, join: Callable[[Part, Part], Part]):
        self.join = join
        self.nodes: dict[Node, Part] = {}

    def add(self, node: Node, part: Part) -> None:
        """Add a node, a batch being (0, index), and join what can be joined."""
        level, index = node
        nodes = dict(self.nodes)
        while (level, index ^ 1) in nodes:
            other = nodes.pop((level, index ^ 1))
            part = self.join(other, part) if index & 1 else self.join(part, other)
            level, index = level + 1, index >> 1
        nodes[(level, index)] = part
        # One assignment: an interrupt leaves the tree before or after, never between.
        self.nodes = nodes

    def missing(self, batches: Iterable[int]) -> list[int]:
        """Those of the batches that no node covers."""
        return [batch for batch in batches if not any(batch in covered(node) for node in self.nodes)]

    def total(self) -> Part:
        """All nodes joined from left to right."""
        ordered = sorted(self.nodes, key=lambda node: covered(node).start)
        total = self.nodes[ordered[0]]
        for node in ordered[1:]:
            total = self.join(total, self.nodes[node])
        return total
