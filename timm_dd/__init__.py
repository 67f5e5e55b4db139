"""Split a timm network's width into K parts, train them without communication, merge them back.

parts = timm_dd.split("resnet50", 4)
model = timm_dd.merge(parts)
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from .version import __version__

if TYPE_CHECKING:
    from .algebra.domain import Domain
    from .algebra.view import Box
    from .errors import BugError, FileError, MergeError, PushError, ReportError, SplitError, TimmDDError, TrainError
    from .hub.push import push
    from .planning.plan import Plan
    from .reports.profile import Profile, profile
    from .reports.verify import Report, verify
    from .storage.merge_files import merge_files
    from .surgery.merge import merge
    from .surgery.parts import Parts
    from .surgery.split import plan, split
    from .train.pages import report
    from .two_level.network import TwoLevel

_HOMES = {
    "Box": "algebra.view", "BugError": "errors", "Domain": "algebra.domain", "FileError": "errors",
    "MergeError": "errors", "PushError": "errors", "ReportError": "errors", "SplitError": "errors",
    "TimmDDError": "errors", "TrainError": "errors", "merge_files": "storage.merge_files", "push": "hub.push",
    "merge": "surgery.merge", "Plan": "planning.plan", "Profile": "reports.profile", "profile": "reports.profile",
    "Parts": "surgery.parts", "plan": "surgery.split", "split": "surgery.split", "Report": "reports.verify",
    "verify": "reports.verify", "TwoLevel": "two_level.network", "report": "train.pages",
}  # fmt: skip

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """What is public, imported when it is first asked for (PEP 562): merging files needs no timm."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("timm")
def _register_networks(timm: ModuleType) -> None:
    """The papers' networks are timm models as soon as there is timm."""
    importlib.import_module(f"{__name__}.paper_networks")
