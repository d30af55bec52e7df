"""What files on a disk say (JSON, YAML, text), read in one place and refused where it is no such.

`options.typed_description` checks the values that they hold.
"""

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path

MAX_BYTES = 1 << 26  # a description is text; a diffusers index of 12 billion weights has 0.2 MB
MAX_YAML_BYTES = 1 << 24  # read at some 5 MB/s
DAMAGED = "it is damaged: fetch or write it again"


def check_regular(path):
    """Raise `ValueError` unless `path` is a file: opening a pipe or a device would wait for
    ever.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a file: name one")


def inside_folder(folder, name, where):
    """The path that the description `where` names in its `folder` or below it.

    Raises `ValueError`, naming `where`, for any other. So is a link that leads out, except to the
    blobs of the Hugging Face cache, where a snapshot holds nothing but links.
    """
    path = Path(folder) / name
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(
            f"{where} names {name!r}, which is not in its folder: name what lies in it"
        )
    place, inside = (Path(os.path.realpath(p)) for p in (path, folder))
    snapshots = next((p for p in inside.parents if p.name == "snapshots"), None)
    roots = [inside] + ([snapshots.parent / "blobs"] if snapshots else [])
    if not any(place.is_relative_to(os.path.realpath(root)) for root in roots):
        raise ValueError(f"{where} names {name}, a link to {place} outside: put the file there")
    return path


def read_text(path, *, limit=MAX_BYTES):
    """The UTF-8 text of a file of at most `limit` bytes, without a byte-order mark.

    Raises `ValueError` that names it, `OSError` where it cannot be opened.
    """
    check_regular(path)
    if os.path.getsize(path) > limit:
        raise ValueError(f"{path} has more than {limit} bytes, too many for a description")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8: name another, or write it again") from None


def parse_json(text, where, kind=dict):
    """JSON text as Python values of type `kind`; `where` names it in the `ValueError` for anything
    else.

    NaN, infinities, a name given twice and nesting deeper than Python's stack are refused: others
    would read something else.
    """
    try:
        values = json_values(text)
        json.dumps(
            values, ensure_ascii=False
        ).encode()  # half an emoji's escape is JSON and no text
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({_reason_of(error)}): {DAMAGED}") from None
    if not isinstance(values, kind):
        names = {dict: "an object", list: "a list"}
        raise ValueError(f"{where} holds {type(values).__name__}, not {names[kind]}: {DAMAGED}")
    return values


def json_values(text):
    """JSON text as Python values; raises `ValueError`, which names nothing, for what `parse_json`
    refuses.
    """
    try:
        return json.loads(
            text, parse_constant=_refused, parse_float=_finite, object_pairs_hook=_once
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason_of(error)) from None


def foreign_json(data):
    """The same of another program's bytes, where NaN and infinities, which many write, are null."""
    try:
        return json.loads(data, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason_of(error)) from None


def _reason_of(error):
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).split("\n")[0][:120]


def _refused(name):
    raise ValueError(f"{name} is no number of JSON")


def _finite(text):
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


def _once(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice[:80]!r} is there twice")
    return values


def read_json(path, kind=dict):
    """`parse_json` of a file."""
    return parse_json(read_text(path), path, kind)


def read_yaml(path, kind=dict):
    """A YAML file's plain values of type `kind`; an empty one is an empty `kind`.

    Raises `ValueError` that names it. Anchors are refused: a few lines of them stand for gigabytes.
    So is a name given twice.
    """
    import yaml

    try:
        text = read_text(path, limit=MAX_YAML_BYTES)
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        node = loader.get_single_node()
        if node is not None:
            _check_plain(node, set())
        values = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        if str(path) in str(error):
            raise
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is no plain YAML ({' '.join(reason.split())[:120]})") from None
    values = kind() if values is None else values
    if not isinstance(values, kind):
        names = {dict: "named values", list: "a list"}
        raise ValueError(f"{path} holds {type(values).__name__}, not {names[kind]}: {DAMAGED}")
    return values


PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")
}


def _check_plain(node, seen):
    """Raise `ValueError` unless a node of YAML is a tree of JSON's types, each name there once."""
    if id(node) in seen:
        raise ValueError("anchors and aliases are not read")
    seen.add(id(node))
    if node.tag not in PLAIN_TAGS:
        raise ValueError(f"a value of type {node.tag}")
    if node.id == "mapping":
        _once([(str(key.value), value) for key, value in node.value])
    for part in node.value if node.id in ("mapping", "sequence") else []:
        for one in part if isinstance(part, tuple) else [part]:
            _check_plain(one, seen)
