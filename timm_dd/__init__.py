"""Split a timm network's width into K parts, train them without a word between them, merge them back.

parts = timm_dd.split("resnet50", 4)
model = timm_dd.merge(parts)
"""

from . import networks as networks  # registers the papers' networks with timm
from .domain import Box, Domain
from .errors import MergeError, PushError, SplitError
from .hub import push
from .merge import merge, merge_files
from .plan import Plan
from .profile import Profile, profile
from .split import Parts, plan, split
from .verify import Report, verify
from .version import __version__

__all__ = [
    "Box",
    "Domain",
    "MergeError",
    "Parts",
    "Plan",
    "Profile",
    "PushError",
    "Report",
    "SplitError",
    "__version__",
    "merge",
    "merge_files",
    "plan",
    "profile",
    "push",
    "split",
    "verify",
]
