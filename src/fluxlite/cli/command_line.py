"""From the command line to typed settings: Hydra composes YAML, dataclasses check it.

Every key has a dataclass field, which lies beside the code that uses it; a key that none has is an
error that names the nearest. Values of prompts and paths reach the program as the shell gave them:
Hydra's grammar never sees them. Only an optional path may be unset with `null`.

Programs without YAML have flags, `--max-shard-size 5GB`, one for each field of their dataclass.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import typing
from pathlib import Path

from fluxlite.cli.options import (
    bounds_of,
    check_sources,
    checked_value,
    list_choices,
    nearest_key,
    option_fields,
    option_value,
    shortened,
    typed_options,
)

CONFIGS = Path(__file__).parents[3] / "configs"
# characters of a value in Hydra's grammar, whose parser is slow and recursive
LONGEST_VALUE = 10_000
LIST_REMEDY = """write one value or a list, as key=[a,b] or "key=['a[0-9]','b']\""""


def group_choices(name):
    """The groups that `configs/{name}.yaml` chooses from: {"model": ["flux_dev", …], …}."""
    from omegaconf import OmegaConf

    defaults = OmegaConf.load(CONFIGS / f"{name}.yaml").get("defaults", [])
    choices = {}
    for group in itertools.chain.from_iterable(d for d in defaults if not isinstance(d, str)):
        choices[group] = sorted(f.stem for f in (CONFIGS / group).glob("*.yaml"))
    return choices


def load_config(cls, name, argv, others=()):
    """The configuration `configs/{name}.yaml` with the overrides of `argv`, checked and `settled`.

    `others` are (class, name) of programs whose keys are told from mistakes. Raises `ValueError`
    with the remedy.
    """
    config = compose_config(cls, name, argv, others)
    config.validate()
    return config.settled()


def compose_config(cls, name, argv, others=()):
    """The same as it is given: its types and bounds are checked, and no more."""
    argv = full_keys(cls, argv)
    overrides, kept = _split_arguments(cls, name, argv, others)
    values = _composed(name, overrides)
    check_sources(cls, values, "a YAML file of configs")
    for key, value in _joined_lists(cls, kept).items():
        at = values
        *path, last = key.split(".")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    config = typed_options(cls, values)
    _refuse_unread(cls, config, argv)
    return config


def _joined_lists(cls, kept):
    """{key: value} of (key, value) pairs: a list's values joined, in place of what a recipe has."""
    lists = {key: f for key, f in option_fields(cls).items() if typing.get_origin(f.type) is list}
    joined = {}
    for key, value in kept:
        if key not in lists:
            joined[key] = value
            continue
        nothing = value == "null" and lists[key].metadata.get("path")
        more = [] if nothing else _elements(key, value, lists[key])
        joined[key] = [*joined.get(key, []), *more]
    return joined


def full_keys(cls, argv):
    """Arguments whose `short` keys are written out: `lora=` is `lora.file=`."""
    fields = option_fields(cls).items()
    full = {f.metadata["short"]: key for key, f in fields if "short" in f.metadata}
    parts = [argument.partition("=") for argument in argv]
    return [f"{full.get(key, key)}{equals}{value}" for key, equals, value in parts]


def _composed(name, overrides):
    """Nested dictionaries that Hydra composes."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return OmegaConf.to_container(compose(name, overrides), resolve=True)
    except OverrideParseException as error:
        raise ValueError(f"{error.override.lstrip('+')} cannot be read: {LIST_REMEDY}") from None
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error).split("\n")[0][:500].replace("'++", "'")
        remedy = f": {LIST_REMEDY}" if text.startswith("Ambiguous") else ""
        raise ValueError(text + remedy) from None
    except RecursionError:
        raise ValueError("a value is nested too deeply: write a number, a word or a list") from None


def check_text(argument):
    """Raise `ValueError` for an argument whose bytes are no UTF-8, which Python passes on as
    halves.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{ascii(argument)[1:80]}: no text in UTF-8; set the terminal to it, or use a file in "
            "UTF-8"
        ) from None


def _split_arguments(cls, name, argv, others):
    """Arguments as Hydra overrides, and those whose values stay as they are: [(key, value)]."""
    fields, choices, overrides, kept = option_fields(cls), group_choices(name), [], []
    for argument in argv:
        check_text(argument)
        key, equals, value = argument.partition("=")
        if not equals:
            flag = argument.startswith("--")  # of another program
            near = nearest_key(argument, [*fields, *choices]) if flag else ""
            remedy = near or "; --help lists the keys"
            raise ValueError(f"{argument}: arguments have the form key=value{remedy}")
    _refuse_twice(cls, argv)
    for argument in argv:
        key, _, value = argument.partition("=")
        if key in fields and fields[key].metadata.get("group"):
            group = fields[key].metadata["group"]
            raise ValueError(f"{argument}: {group}= sets it; choose {', '.join(choices[group])}")
        if key in fields and _verbatim(fields[key]):
            optional = f"{fields[key].type}".endswith("None")  # a file of that name is ./null
            kept.append((key, None if optional and value == "null" else value))
        elif key in choices:
            if value not in choices[key]:
                near = nearest_key(value, choices[key], ".")
                raise ValueError(
                    f"{argument}: no such {key}{near} There are {', '.join(choices[key])}"
                )
            overrides.append(argument)
        elif key in fields and len(value) > LONGEST_VALUE:
            raise ValueError(f"{key}={shortened(value)} is longer than {LONGEST_VALUE} characters")
        elif key in fields:
            overrides.append(f"++{argument}")  # the YAML need not name what the dataclasses do
        else:
            _refuse_unknown(key, [*fields, *choices], others)
    return overrides, kept


def _refuse_unknown(key, known, others):
    """Raise `ValueError` for a key that is not `known`, with the program of `others` that has it,
    or the nearest.
    """
    near = nearest_key(key, known, ": --help lists the keys")
    for cls, name in others:
        if key in [*option_fields(cls), *group_choices(name)]:
            raise ValueError(f"{key} is a key of {name}.py, not of this program{near}")
    raise ValueError(f"{key} is not a key{near}")


def _refuse_twice(cls, argv):
    """Raise `ValueError` for a key with two values that does not take several."""
    seen = {}
    fields = option_fields(cls)
    several = {
        key for key, f in fields.items() if typing.get_origin(f.type) is list and _verbatim(f)
    }
    for key, _, value in (argument.partition("=") for argument in argv):
        if key in seen and key not in several:
            both = f"{shortened(seen[key])} and {shortened(value)}"
            raise ValueError(f"{key}= is given twice, {both}: give it once")
        seen[key] = value


def _refuse_unread(cls, config, argv):
    """Raise `ValueError` for a key that is given and that another's value leaves unread."""
    fields = option_fields(cls)
    for key in {argument.partition("=")[0] for argument in argv} & fields.keys():
        for other, readers in fields[key].metadata.get("only_with", {}).items():
            value = option_value(config, other)
            if value not in readers:
                setting = fields[other].metadata.get("group", other)
                raise ValueError(f"{key}= is not read with {setting}={value}: leave it out")


def _verbatim(f):
    return f.metadata.get("verbatim") or f.metadata.get("path")


def _elements(key, text, f):
    """The value of a key that may be given several times; of numbers, [1, 0.5] too."""
    if typing.get_args(f.type)[0] is not float:
        return [text]
    whole = text.strip()
    if whole == "[]":
        return []
    listed = whole.startswith("[") and whole.endswith("]")
    parts = whole[1:-1].split(",") if listed else [whole]
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"{key}={text} must be a number, or several as [1, 0.5]") from None


def help_text(cls, name, usage, everything=False):
    """What `--help` prints: usage, groups, and every key with its default and meaning.

    Keys that are marked `rare` are left out, unless `everything` is asked for.
    """
    lines, choices = [usage.strip()], group_choices(name)
    if choices:
        lines += ["", "Groups, chosen with group=choice:"]
        lines += [f"  {group + '=':12}{', '.join(names)}" for group, names in choices.items()]
    lines += ["", "Keys, set with key=value (defaults before a group or recipe changes them):"]
    fields = option_fields(cls).items()
    shown = [(key, f) for key, f in fields if everything or not f.metadata.get("rare")]
    lines += [_help_line(f"{f.metadata.get('short', key)}=", f, 42) for key, f in shown]
    hidden = len(fields) - len(shown)
    lines += ["", f"{hidden} more, which a checkpoint decides itself: --help all"] * (hidden > 0)
    return "\n".join(lines)


def _help_line(name, f, width=42):
    """A field's line: its default, what it means, its choices or bounds."""
    default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    if default is not dataclasses.MISSING and not (f.type is bool and name.startswith("--")):
        name += "null" if default is None else json.dumps(default)
    allowed = list_choices(f.metadata) or bounds_of(f.metadata)
    return (
        f"  {name}".ljust(width) + f"  {f.metadata['help']}" + (f" ({allowed})" if allowed else "")
    )


# --- flags --------------------------------------------------------------------------------------


def parse_flags(cls, arguments, *, rest=False):
    """The dataclass `cls` from flags, one for each of its fields, checked; a bool's has no value,
    a list's may be given several times.

    With `rest` also the arguments that belong to no flag. Raises `ValueError` that names the flag.
    """
    for argument in arguments:
        check_text(argument)
    given, others = _flag_parser(cls).parse_known_args(arguments)
    unknown = [text for text in others if not rest or text.startswith("--")]
    if unknown:
        raise ValueError(f"{unknown[0]}: no such flag; --help lists them")
    hints, values = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        flag, texts = flag_of(f), getattr(given, f.name, [])
        several = typing.get_origin(hints[f.name]) is list
        if several:
            values[f.name] = [_flag_value(text, str, f.metadata, flag) for text in texts]
        elif len(texts) > 1:
            both = ", ".join(map(shortened, texts))
            raise ValueError(f"{flag} is given twice: {both}; give it once")
        elif texts:
            values[f.name] = _flag_value(texts[0], hints[f.name], f.metadata, flag)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{flag} is missing: {f.metadata['help']}")
    return (cls(**values), others) if rest else cls(**values)


@contextlib.contextmanager
def naming_flags(cls):
    """Have a `ValueError` of the block name the flags of `cls` in place of other programs' keys."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for f in dataclasses.fields(cls):
            if "key" in f.metadata:
                text = text.replace(f.metadata["key"], flag_of(f))
        raise ValueError(text) from error


def flag_of(f):
    """`--max-shard-size` for the field `max_shard_size`."""
    return "--" + f.name.replace("_", "-")


def _flag_parser(cls):
    """argparse for a dataclass: each flag's texts in a list, errors as `ValueError`."""

    def refuse(message):
        raise ValueError(f"{message}; --help lists the flags")

    suppress = argparse.SUPPRESS
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=suppress)
    parser.error = refuse
    for f in dataclasses.fields(cls):
        store = (
            {"action": "append_const", "const": True} if f.type is bool else {"action": "append"}
        )
        parser.add_argument(flag_of(f), dest=f.name, **store)
    return parser


def _flag_value(text, hint, metadata, flag):
    """The text of a flag as its field's type, checked."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    if "parse" in metadata:
        text = metadata["parse"](text)
    for kind in {int, float} & set(kinds):
        with contextlib.suppress(ValueError, TypeError):
            text = kind(text)
    return checked_value(text, kinds[0], metadata, flag)


def flags_help(cls, usage):
    """What `--help` prints: usage, and every flag with its default and meaning."""
    lines = [_help_line(f"{flag_of(f)} ", f, 28) for f in dataclasses.fields(cls)]
    return "\n".join([usage.strip(), "", "Flags and their defaults:", *lines])
