"""What a sample's caption says, of its text or of its json, or why it is none."""

import codecs

from fluxlite.cli.descriptions import foreign_json
from fluxlite.data.images import BadSample
from fluxlite.data.parts import JSON, TEXT

UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


def read_caption(parts, read):
    """What the first of `SampleParts.captions` that a sample has says, without blanks around it.

    `read(column)` gives the bytes of its text or its json, None where it has none. Raises
    `BadSample`.
    """
    columns = {column: read(column) for column in (TEXT, JSON)}
    for column, *keys in parts.captions:
        text = _decoded_text(columns[column], keys)
        if text is not None:
            return _checked_caption(text)
    raise BadSample(f"no caption: {parts.wanted()}")


def _decoded_text(data, keys):
    """A file as text, or a json's value behind `keys`; None where it is not there."""
    if data is None:
        return None
    try:
        if not keys:
            return data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig")
        value = foreign_json(data)
    except ValueError as error:
        remedy = "" if keys else ": save it as UTF-8"
        raise BadSample(f"unreadable caption ({error}){remedy}") from None
    for key in keys:
        value = _part_of(value, key)
    return value


def _part_of(value, key):
    """A member of a json's object or list; None where it is not there."""
    if isinstance(value, dict):
        return value.get(key)
    inside = isinstance(value, list) and key.isdecimal() and int(key) < len(value)
    return value[int(key)] if inside else None


def _checked_caption(text):
    """A caption without blanks around it; raises `BadSample`."""
    if not isinstance(text, str):
        raise BadSample(f"a caption of type {type(text).__name__}")
    text = text.strip().removeprefix("\ufeff").strip()
    if not text:
        raise BadSample("an empty caption")
    if "\0" in text:
        raise BadSample("a caption with zero bytes, as UTF-16 without its mark: save it as UTF-8")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("a caption with half a character, as a cut emoji leaves it") from None
    return text
