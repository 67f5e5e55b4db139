"""``python -m timm_dd.train``: the entry point for torchrun; ``timm-dd train`` is the same in one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .. import console
from .run import train
from .settings import options


@console.program
def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 the work failed, with one line on stderr; 2 the command line was wrong."""
    args = options.parse(argv)
    with console.without_readers():
        return console.run("train", lambda args: train(args) and None, args)


if __name__ == "__main__":
    sys.exit(main())
