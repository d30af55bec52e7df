"""From the command line to typed settings: Hydra composes YAML, dataclasses check it.

Every key has a dataclass field, which lies beside the code that uses it; a key that none has is an
error that names the nearest. Values of prompts and paths reach the program as the shell gave them:
Hydra's grammar never sees them. Only an optional path may be unset with `null`.
"""

import dataclasses
import json
import typing
from pathlib import Path

from fluxlite.cli.options import check_sources, nearest_key, option_fields, typed_options

CONFIGS = Path(__file__).parents[3] / "configs"


def group_choices(name):
    """The groups that `configs/{name}.yaml` chooses from: {"model": ["flux_dev", …], …}."""
    from omegaconf import OmegaConf

    defaults = OmegaConf.load(CONFIGS / f"{name}.yaml").get("defaults", [])
    chosen = [key for entry in defaults if not isinstance(entry, str) for key in entry]
    return {group: sorted(f.stem for f in (CONFIGS / group).glob("*.yaml")) for group in chosen}


def load_config(cls, name, argv):
    """The configuration `configs/{name}.yaml` with the overrides of `argv`, checked.

    Raises `ValueError` with the remedy.
    """
    overrides, kept = _split_arguments(cls, name, argv)
    values = _composed(name, overrides)
    check_sources(cls, values, "a YAML file of configs")
    lists = {key: f for key, f in option_fields(cls).items() if typing.get_origin(f.type) is list}
    for key, value in kept:
        at = values
        *path, last = key.split(".")
        for part in path:
            at = at.setdefault(part, {})
        if key in lists:
            at[last] = [*(at.get(last) or []), _element(key, value, lists[key])]
        else:
            at[last] = value
    config = typed_options(cls, values)
    config.validate()
    return config


def _composed(name, overrides):
    """Nested dictionaries that Hydra composes."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return OmegaConf.to_container(compose(name, overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(str(error).split("\n")[0]) from None


def _split_arguments(cls, name, argv):
    """Arguments as Hydra overrides, and those whose values stay as they are: [(key, value)]."""
    fields, choices, overrides, kept = option_fields(cls), group_choices(name), [], []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument}: arguments have the form key=value; --help lists the keys")
        if key in fields and fields[key].metadata.get("verbatim"):
            optional = f"{fields[key].type}".endswith("None")  # a file of that name is ./null
            kept.append((key, None if optional and value == "null" else value))
        elif key in choices:
            if value not in choices[key]:
                near = nearest_key(value, choices[key])
                raise ValueError(
                    f"{argument}: no such {key}{near} There are {', '.join(choices[key])}"
                )
            overrides.append(argument)
        elif key in fields:
            overrides.append(f"++{argument}")  # the YAML need not name what the dataclasses do
        else:
            raise ValueError(f"{key} is not a key{nearest_key(key, [*fields, *choices])}")
    return overrides, kept


def _element(key, text, f):
    """One value of a key that may be given several times."""
    if typing.get_args(f.type)[0] is not float:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{key}={text} must be a number") from None


def help_text(cls, name, usage):
    """What `--help` prints: usage, groups, and every key with its default and meaning."""
    lines, choices = [usage.strip()], group_choices(name)
    if choices:
        lines += ["", "Groups, chosen with group=choice:"]
        lines += [f"  {group + '=':12}{', '.join(names)}" for group, names in choices.items()]
    lines += ["", "Keys, set with key=value (defaults before a group or recipe changes them):"]
    for key, f in option_fields(cls).items():
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        shown = "null" if default is None else json.dumps(default)
        lines.append(f"  {key}={shown}".ljust(42) + f"  {f.metadata.get('help', '')}")
    return "\n".join(lines)
