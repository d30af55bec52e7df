"""What README.md and docs/ name is there: links, files, functions, and the keys and flags of every
command. Nothing of it is run.
"""

import inspect
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import convert_hf
import fluxlite
from fluxlite.cli.command_line import full_keys, group_choices, parse_flags
from fluxlite.cli.options import checked_value, option_fields
from fluxlite.data.fill50k import GeneratorConfig
from fluxlite.data.rings import RingsConfig
from fluxlite.draw.pipeline import DRAW_FIELDS, LOAD_OPTIONS
from fluxlite.draw.proof import ProofConfig
from fluxlite.preflight.__main__ import PreflightConfig
from fluxlite.settings import PROGRAMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = {
    "convert_hf.py": convert_hf.ConvertConfig,
    "prove.py": ProofConfig,
    "fluxlite.data.rings": RingsConfig,
    "fluxlite.data.fill50k": GeneratorConfig,
    "fluxlite.preflight": PreflightConfig,
}
# of other programs, and arguments of the networks
OTHERS = """num_inference_steps guidance_scale sigmas output_type callback_on_step_end mask_image
    torch_dtype padding_mask_crop prompt_embeds_scale prediction_type use_flow_sigmas generator
    image_reference weight_name dora_wd NCCL_DEBUG FLUXLITE_TRACEBACK t pooled hint""".split()
THEIRS = "scripts/flux"  # a folder of NeMo's


def blocks_of(page, language):
    """The code of a page's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands_of(page):
    """The commands of a page's shell blocks, as lists of words."""
    found = []
    for block in blocks_of(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for command in " ".join(map(shlex.quote, words)).split(" '&&' "):
                found.append([word for word in shlex.split(command) if word != "…"])
    return [command for command in found if command]


@cache
def known_keys(program):
    return option_fields(PROGRAMS[program]), group_choices(program)


def check_keys(program, arguments):
    """Each argument is a key of the program with a value of its type, or a choice of a group."""
    fields, choices = known_keys(program)
    for argument in full_keys(PROGRAMS[program], arguments):
        key, equals, value = argument.partition("=")
        assert equals and (key in fields or value in choices.get(key, ())), argument
        about = fields[key].metadata if key in fields else {"verbatim": True}
        if not (about.get("verbatim") or about.get("path")):
            given = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            checked_value(given["value"], fields[key].type, about, key)


def check_command(words):
    """A command's program exists and has its flags or keys."""
    names = [w.removeprefix(".venv/bin/") for w in words]
    if names[0] in ("python3", "hf", "ruff"):
        return
    if names[0] == "pip":
        extras = (ROOT / "setup.cfg").read_text()
        assert all(f"\n{name} =" in extras for name in re.findall(r"\.\[(\w+)\]", " ".join(names)))
        return
    at = next(
        i for i, w in enumerate(names) if re.search(r"\.py$|\.sbatch$|^fluxlite\.|^pytest$", w)
    )
    program, arguments = names[at], names[at + 1 :]
    if program == "pytest":
        return
    if program in FLAGS:
        rest = parse_flags(FLAGS[program], arguments, rest=program == "fluxlite.preflight")
        check_keys("train", rest[1] if isinstance(rest, tuple) else [])
    elif program in ("train.py", "infer.py", "scripts/train.sbatch"):
        name = "infer" if program == "infer.py" else "train"
        check_keys(name, [a for a in arguments if a != "--help"])
    else:
        source = (ROOT / program).read_text()
        flags = [a for a in arguments if a.startswith("--")]
        assert all(re.search(rf"\b{f[2:].replace('-', '[-_]')}\b", source) for f in flags), flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_has_its_files_keys_and_flags(page):
    for words in commands_of(page):
        check_command(words)


def heading_anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in heading_anchors(there), target


def spans_of(page):
    """The words in a page's inline code."""
    plain = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return [word for span in re.findall(r"`([^`]+)`", plain) for word in span.split()]


def known_words():
    """What stands before = in the pages: keys, groups, arguments of the library."""
    found = {*OTHERS, *DRAW_FIELDS, *LOAD_OPTIONS}
    for program in PROGRAMS:
        fields, choices = known_keys(program)
        found |= {*fields, *choices, *(f.metadata.get("short") for f in fields.values())}
    for name in fluxlite.PUBLIC:
        found |= inspect.signature(getattr(fluxlite, name)).parameters.keys()
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_is_one(page):
    known, groups = known_words(), {*known_keys("train")[1], *"optim parallel flow redux".split()}
    for word in spans_of(page):
        key, equals, _ = word.partition("=")
        dotted = re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+(?<!safetensors)", key)
        in_group = dotted and key.split(".")[0] in groups
        if in_group or (equals and re.fullmatch(r"[a-z][\w.]*", key)):
            assert key in known, word


def test_the_page_of_the_library_has_every_argument():
    page = (ROOT / "docs" / "library.md").read_text()
    given = {*inspect.signature(fluxlite.generate).parameters} - {"options"}
    lacking = [n for n in {*given, *DRAW_FIELDS, *LOAD_OPTIONS} if not re.search(rf"\b{n}\b", page)]
    assert not lacking, lacking


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_function_that_a_page_names_is_there(page):
    for word in spans_of(page):
        if re.fullmatch(r"(docs|tests|benchmarks|scripts|configs|assets|src)/[\w./-]+\w", word):
            assert (ROOT / word).exists() or word == THEIRS, word
        match = re.match(r"((?:nets|train|draw|parallel|weights|data|cli)/\w+)(?:\.(\w+))?", word)
        if match and page.name == "changing.md":
            file = ROOT / "src" / "fluxlite" / f"{match[1]}.py"
            assert file.exists() or file.with_suffix("").is_dir(), word
            named = rf"^(def|class) {match[2]}\b|^{match[2]} = "
            assert not match[2] or re.search(named, file.read_text(), re.M), word
