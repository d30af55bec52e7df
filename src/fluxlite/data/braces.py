"""Brace patterns, as `shard-{000..099}.tar`, counted before they are expanded."""

import re

MAX_NAMES = 1_000_000
MAX_PATTERN = 4096  # characters
MAX_DEPTH = 20
RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?(\d+))?")


def expand_braces(patterns, setting, *, escape=True):
    """The names that brace patterns stand for, in order.

    Raises `ValueError`, naming `setting`, for unbalanced braces and more than `MAX_NAMES` names.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    names = []
    for pattern in patterns:
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}…"
        try:
            total = len(names) + count_names(pattern, escape=escape)
            if total <= MAX_NAMES:
                names += braceexpand(pattern, escape=escape)
        except UnbalancedBracesError:
            raise ValueError(f"{setting}={shown}: its braces are unbalanced") from None
        except ValueError as error:
            raise ValueError(f"{setting}={shown} {error}") from None
        if total > MAX_NAMES:
            raise ValueError(
                f"{setting}={shown} stands for more than {MAX_NAMES} names: name fewer"
            )
    return names


def count_names(pattern, *, escape=True):
    """How many names a brace pattern stands for, without making them."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"is longer than {MAX_PATTERN} characters: name a folder or a glob")
    groups, position = (
        [[0, 1, 0]],
        0,
    )  # of each open brace: names so far, of this alternative, its start
    while position < len(pattern):
        c = pattern[position]
        if escape and c == "\\":
            position += 1
        elif c == "{":
            groups.append([0, 1, position + 1])
        elif c == "," and len(groups) > 1:
            groups[-1][0] += groups[-1][1]
            groups[-1][1] = 1
        elif c == "}" and len(groups) > 1:
            before, here, start = groups.pop()
            groups[-1][1] *= _range_size(pattern[start:position]) or before + here
        if len(groups) > MAX_DEPTH:
            raise ValueError("nests its braces too deeply")
        position += 1
    return groups[0][1]


def _range_size(text):
    """The members of `1..9`, `1..9..2` or `a..z`; None for anything else."""
    found = RANGE.fullmatch(text)
    if found is None:
        return None
    first, last, step = (
        int(n or 1) if (n or "1").lstrip("-").isdigit() else ord(n) for n in found.groups()
    )
    return abs(last - first) // (step or 1) + 1
