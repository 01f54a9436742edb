"""What is known of a node's result before anything is read: the example in its metadata, a fake tensor or a number."""

from __future__ import annotations

from typing import Any

from torch import fx


def example_of(node: fx.Node) -> Any:
    """What Dynamo, or an export, noted of a node's result; None where neither did."""
    return node.meta.get("example_value", node.meta.get("val"))
