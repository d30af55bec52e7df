"""Command lines of every program: what is accepted lies within its bounds and says the same
again.
"""

import dataclasses
import runpy
from pathlib import Path

import pytest
from fuzzing import BOTH, try_cases

from fluxlite.cli.command_line import flag_of, group_choices, load_config, parse_flags
from fluxlite.cli.options import check_options, option_fields, typed_options
from fluxlite.data.fill50k import GeneratorConfig
from fluxlite.draw.proof import ProofConfig
from fluxlite.preflight.__main__ import PreflightConfig
from fluxlite.settings import InferConfig, TrainConfig

ROOT = Path(__file__).parents[2]
ConvertConfig = runpy.run_path(str(ROOT / "convert_hf.py"))["ConvertConfig"]
RandomConfig = runpy.run_path(str(ROOT / "scripts" / "make_random.py"))["RandomConfig"]

NUMBERS = [
    "0",
    "1",
    "2",
    "16",
    "64",
    "-1",
    "-0.0",
    "0.5",
    "1e9",
    "1000000000",
    "9" * 400,
    "9" * 5000,
]
NUMBERS += ["nan", "NaN", "inf", "-inf", ".inf", "1e400", "-1e400", "1e-400", "0x10", "1_000", "٣"]
TEXTS = [
    "",
    " ",
    "null",
    "none",
    "true",
    "no",
    "abc",
    "auto",
    "=",
    "==x",
    "a=b",
    "~",
    "~/x",
    "../..",
    "/",
]
TEXTS += [
    "caf\udce9",
    "\ud83d",
    "🦊",
    "\n",
    "\x1b[2J",
    "\0",
    "a" * 20_000,
    "'",
    '"',
    "#",
    "@",
    "%",
    "\\",
]
GRAMMAR = [
    "[",
    "]",
    "{",
    "[" * 3000,
    "{a:" * 500,
    "[1,2]",
    "[a,b]",
    "[[8],[28]]",
    "{a: 1}",
    "1,2",
    "a,b",
]
GRAMMAR += ["${seed}", "${oc.env:HOME}", "${a", "${nothing.here}", "???", "int(3.7)", "range(1,9)"]
GRAMMAR += [
    "glob(*)",
    "choice(1,2)",
    "sort(2,1)",
    "!!python/object:os.system",
    "&a *a",
    "1:2:3",
    "[nan]",
]
NASTY = NUMBERS + TEXTS + GRAMMAR


def random_value(rng, f=None):
    choices = list(f.metadata.get("choices", ())) if f else []
    if choices and rng.random() < 0.3:
        return rng.choice(choices)
    if rng.random() < 0.2:
        return str(
            rng.choice([rng.randint(-10, 100), rng.randint(-(10**12), 10**12), rng.random()])
        )
    return rng.choice(NASTY)


def random_key(rng, keys):
    key = rng.choice(keys)
    if rng.random() < 0.9:
        return key
    return rng.choice(["+", "++", "~", "hydra.", "model.", "", "_self_"]) + key[rng.randint(0, 2) :]


def hydra_case(cls, name, needed):
    fields, groups = option_fields(cls), group_choices(name)

    def case(rng):
        arguments = list(needed)
        for _ in range(rng.randint(1, 3)):
            key = random_key(rng, [*fields, *groups, *groups])
            value = random_value(rng, fields.get(key))
            if key in groups and rng.random() < 0.7:
                value = rng.choice(groups[key])
            arguments.append(rng.choice([f"{key}={value}"] * 30 + [key, value]))
        return check_accepted(cls, load_config(cls, name, arguments))

    return case


def flag_case(cls, needed, rest=False):
    fields = dataclasses.fields(cls)

    def case(rng):
        arguments = list(needed)
        for f in rng.choices(fields, k=rng.randint(1, 3)):
            flag = rng.choice([flag_of(f)] * 15 + [f.name, flag_of(f)[:-1], flag_of(f)[1:]])
            value = random_value(rng, f)
            joined = [f"{flag}={value}"]
            arguments += [flag] if f.type is bool else rng.choice([[flag, value], joined])
        found = parse_flags(cls, arguments, rest=rest)
        found = found[0] if rest else found
        getattr(found, "validate", lambda: None)()
        return check_accepted(cls, found)

    return case


def check_accepted(cls, config):
    """Assert that a configuration is within its bounds, and that what it says makes it again."""
    check_options(config)
    again = typed_options(cls, dataclasses.asdict(config))
    assert again == config, "is another one when it is read again"
    for key, f in option_fields(cls).items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        paths = value if isinstance(value, list) else [value]
        if f.metadata.get("path"):
            assert all(path is None or path.strip() for path in paths), f"{key} is empty"
    return config


CASES = {
    "train": hydra_case(TrainConfig, "train", []),
    "infer": hydra_case(InferConfig, "infer", ["prompt=a"]),
    "convert_hf": flag_case(ConvertConfig, ["--src", "a"]),
    "prove": flag_case(ProofConfig, []),
    "fill50k": flag_case(GeneratorConfig, ["--dst", "/nowhere/x"]),
    "preflight": flag_case(PreflightConfig, [], rest=True),
    "make_random": flag_case(RandomConfig, ["--dst", "a"]),
}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("count", BOTH)
@pytest.mark.parametrize("program", CASES)
def test_any_command_line_is_accepted_within_bounds_or_refused_in_one_line(program, count):
    verdicts = try_cases(count, CASES[program])
    kinds = [kind for kind, _ in verdicts]
    assert kinds.count("refused") > count / 10 and "accepted" in kinds
    for kind, line in verdicts:
        assert kind == "accepted" or ("\n" not in line and len(line) < 2000), line[:99]
