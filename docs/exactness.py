"""The table of what is exact, from the rows by which the tests hold every rule to numbers.

    pip install '.[test]' && python docs/exactness.py

writes exactness.md beside this file. An operation is there as exact if it is part of a network of `tests/test_rules.py`
that is exact for K = 2, 3 and 4, by value; the reasons are those of the networks that are not.
"""

import importlib
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path

from timm_dd import Domain
from timm_dd.planning.graphs import skeleton
from timm_dd.planning.planner import analyse
from timm_dd.planning.rules import has_rule
from timm_dd.planning.rules.op import RULES, module_rule
from timm_dd.planning.trace import trace

PARTS = 4
HEAD = f"""# What is exact

Written by `python docs/exactness.py` from the rows of `tests/test_rules.py`, which compare every rule by value. An
operation is exact where networks with it are the sum of their parts; beside it, why others are not (K = {PARTS}).
[Architecture](architecture.md#exact-or-approximate) says what that means.

| operation | exact | approximate, and why |
|---|---|---|
"""


def seen(rows):
    """(rule, name of the operation, whether the row is exact, reasons given at the operation) of every row."""
    for make, _, size in rows.values():
        graph = trace(skeleton(make()), has_rule, (3, *size))
        analysis = analyse(graph, PARTS, Domain.full(PARTS), (3, *size))
        for op, _ in analysis.reading.operations:
            rule = module_rule(op.module) if op.module is not None else RULES.get(op.node.target)
            if rule is not None:
                reasons = {why for node, _, why in analysis.approximations if node == op.node.name}
                yield rule, _name(op), not analysis.approximations, reasons


def _name(op):
    """Of a module that of the class that has the rule."""
    kinds = type(op.module).__mro__ if op.module is not None else ()
    return next(
        (kind.__name__ for kind in kinds if kind in RULES), "a module that acts in training alone" if kinds else op.name
    )


def table(rows):
    """Markdown, of the rows of a `test_rules.py`: by families of rules, a line for what is alike."""
    exact, reasons = defaultdict(bool), defaultdict(set)
    for rule, name, is_exact, why in seen(rows):
        exact[rule, name] |= is_exact
        reasons[rule, name] |= {re.sub(r"^\d+ groups", "groups", reason) for reason in why}
    alike = defaultdict(list)
    for (rule, name), word in exact.items():
        if word or reasons[rule, name]:
            alike[rule.__module__, rule.__name__, word, "; ".join(sorted(reasons[rule, name]))].append(name)
    lines = [
        f"| {', '.join(f'`{name}`' for name in sorted(names, key=str.lower))} | {'yes' if word else 'no'} | {why} |\n"
        for (*_, word, why), names in sorted(
            alike.items(), key=lambda item: (item[0][0], min(item[1]).lower(), item[0])
        )
    ]
    return HEAD + "".join(lines)


def main(root: Path) -> None:
    sys.path.insert(0, str(root / "tests"))
    rows = importlib.import_module("test_rules").ROWS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (root / "docs" / "exactness.md").write_text(table(rows))


if __name__ == "__main__":
    main(Path(__file__).parent.parent)
