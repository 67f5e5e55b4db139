"""Split a timm network's width into K parts, train them without a word between them, merge them back.

parts = timm_dd.split("resnet50", 4)
model = timm_dd.merge(parts)
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from .version import __version__

if TYPE_CHECKING:
    from .domain import Box, Domain
    from .errors import MergeError, PushError, SplitError
    from .files import merge_files
    from .hub import push
    from .merge import merge
    from .plan import Plan
    from .profile import Profile, profile
    from .split import Parts, plan, split
    from .verify import Report, verify

_HOMES = {
    "Box": "domain", "Domain": "domain", "MergeError": "errors", "PushError": "errors", "SplitError": "errors",
    "merge_files": "files", "push": "hub", "merge": "merge", "Plan": "plan", "Profile": "profile",
    "profile": "profile", "Parts": "split", "plan": "split", "split": "split", "Report": "verify", "verify": "verify",
}  # fmt: skip

__all__ = [*_HOMES, "__version__"]


class _Package(ModuleType):
    """Imports what is public when it is first asked for: merging files needs neither timm nor the memory that it takes.

    A function may have the name of its module; the import system, which binds modules here, does not replace it.
    """

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
            vars(self)[name] = value
            return value
        if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package


@wrapt.when_imported("timm")
def _register_networks(timm: ModuleType) -> None:
    """The papers' networks are timm models as soon as there is timm."""
    importlib.import_module(f"{__name__}.networks")
