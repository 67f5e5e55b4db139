"""Which class has which number, as a file says (``--class-map``). timm reads such files too, and leaves out, without a
word, what has no name in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from timm.data.readers.class_map import load_class_map

from ...errors import TrainError, headline


def of_file(path: str) -> Mapping[str, int]:
    """The numbers of the classes by their names: of the lines of a text, or as a pickle of timm's form has them.

    Raises:
        TrainError: no such file, another form, or a name that is empty or there twice.
    """
    try:
        if not path.lower().endswith(".txt"):
            return load_class_map(path)
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except Exception as e:  # pickle has many
        raise TrainError(f"--class-map {path}: {headline(e)}; expected a text with a class a line") from e
    if not names:
        raise TrainError(f"--class-map {path} is empty; expected a class a line")
    name, times = Counter(names).most_common(1)[0]
    if "" in names or times > 1:
        what = "an empty line" if "" in names else f"{name!r} {times} times"
        raise TrainError(f"--class-map {path} has {what}; expected a class a line")
    return {name: number for number, name in enumerate(names)}
