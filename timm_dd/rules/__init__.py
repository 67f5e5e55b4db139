"""One file for each family of operations; importing this package fills the registry."""

from . import attention, conv, linear, norm, pointwise, pool, recurrent, shape  # noqa: F401  (each registers its rules)
from .registry import has_rule

__all__ = ["has_rule"]
