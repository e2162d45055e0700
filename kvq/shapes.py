"""Shapes in signatures, ``Float[Tensor, "B K T D"]``: text for readers, and checked at every call while tests run.

Letters are sizes that must agree within a call; ``*B`` is any number of dimensions, ``{self.head_dim}`` an attribute.
The environment variable KVQ_CHECK_SHAPES=1, set before kvq is imported, switches the checks on; they take jaxtyping and
beartype (extra ``test``). Without it nothing here is called and neither package is imported.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
CHECKED = os.environ.get("KVQ_CHECK_SHAPES") == "1"

if TYPE_CHECKING or CHECKED:
    from jaxtyping import Float, Float64, Int16, Shaped, UInt8
else:

    class Shaped:
        """``Shaped[Tensor, "..."]`` is the tensor's own type."""

        def __class_getitem__(cls, item: tuple[type, str]) -> type:
            return item[0]

    Float = Float64 = Int16 = UInt8 = Shaped

__all__ = ["CHECKED", "Float", "Float64", "Int16", "Shaped", "UInt8", "checked", "held_to"]


def checked(function: Function) -> Function:
    """The function, which raises a type error for arguments or results of other shapes than its signature's if CHECKED.

    Not for what a compiler reads (Triton, numba, torch.compile).
    """
    if not CHECKED:
        return function
    from beartype import BeartypeConf, beartype
    from jaxtyping import jaxtyped

    # An int is a float here, as in all of typing.
    return jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))(function)


def held_to(contract: Callable[..., Any], function: Function) -> Function:
    """A derived class's method, checked by the signature of the base's."""
    if CHECKED:
        function.__annotations__ = dict(contract.__annotations__)
    return checked(function)
