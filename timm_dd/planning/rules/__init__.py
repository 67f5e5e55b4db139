"""The rules, one file for each family of operations; importing this package fills the registry.

`laws` says how parts' tensors relate to the global network's, `op` what a rule sees of its node. A rule names axes,
edits and a law, and knows nothing of Plans.
"""

from . import (  # noqa: F401  (each registers its rules)
    attention,
    conv,
    fourier,
    linear,
    norm,
    pieces,
    pointwise,
    pool,
    recurrent,
    reduce,
    view,
)
from .op import has_rule

__all__ = ["has_rule"]
