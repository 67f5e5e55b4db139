"""``python -m timm_dd.train``: the entry point for torchrun; ``timm-dd train`` is the same in one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import MergeError, SplitError, TrainError
from . import options
from .run import train


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 the work failed, with one line on stderr; 2 the command line was wrong."""
    args = options.parse(argv)
    try:
        train(args)
    except (SplitError, MergeError, TrainError, OSError) as e:
        print(f"timm-dd train: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
