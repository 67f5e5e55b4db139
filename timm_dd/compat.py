"""What this package uses of other libraries' private APIs, in one place, each with a test."""

from torch.fx._symbolic_trace import _assert_is_none

ASSERT_IS_NONE = _assert_is_none  # what fx records where an argument is fixed to None
