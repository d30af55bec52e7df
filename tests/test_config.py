import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fluxlite
from fluxlite.cli.command_line import (
    compose_config,
    flag_of,
    group_choices,
    help_text,
    load_config,
    parse_flags,
)
from fluxlite.cli.options import OTHER_NAMES, option_fields, resumable_keys
from fluxlite.draw.pipeline import DRAW_FIELDS, LOAD_OPTIONS
from fluxlite.draw.proof import ProofConfig
from fluxlite.nets.configs import FluxConfig
from fluxlite.preflight import __main__ as preflight
from fluxlite.preflight.__main__ import PreflightConfig
from fluxlite.settings import PROGRAMS, InferConfig, TrainConfig, load_settings

ROOT = Path(__file__).parents[1]
PROMPTS = [
    "A cat, holding a sign",
    "it's",
    '"quoted"',
    "(a:1.2)",
    "a=b",
    "#1",
    "$5",
    "红色圆",
    "null",
    "[x]",
    "",
    "${seed}",
    "a b\nc",
]


def train(*argv):
    return load_config(TrainConfig, "train", list(argv))


def infer(*argv):
    return load_config(InferConfig, "infer", list(argv))


@pytest.mark.parametrize("text", PROMPTS)
def test_prompts_and_paths_arrive_verbatim(text):
    prompt = text or "an empty one is refused"
    config = infer(f"prompt={prompt}", f"negative_prompt={text}", "true_cfg=2")
    assert (config.prompt, config.negative_prompt) == ([prompt], text)
    if not text:
        return  # an empty path is refused
    config = infer("prompt=a", f"output={text}", f"model.t5={text}")
    path = None if text == "null" else text
    assert (config.output, config.model.t5) == (text, path)
    assert train(f"data.path={text}", f"data.cache={text}").data.path == path


def test_null_is_no_file_of_a_list():
    assert infer("prompt=a", "lora=null").lora.file == []
    assert infer("prompt=null").prompt == ["null"]


def test_true_where_a_word_is_to_be_chosen_is_told_the_words():
    with pytest.raises(ValueError, match="parallel.float8=true: choose one of none, rowwise"):
        train("parallel.float8=true")


PATHS = {
    train: [key for key, f in option_fields(TrainConfig).items() if f.metadata.get("path")],
    infer: [key for key, f in option_fields(InferConfig).items() if f.metadata.get("path")],
}


@pytest.mark.parametrize("load,key", [(load, key) for load, keys in PATHS.items() for key in keys])
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_path_is_refused_and_its_key_named(load, key, text):
    with pytest.raises(ValueError, match=f"{key}=.*names no file or folder"):
        load(f"{key}={text}")


def test_every_program_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a red circle")
    config = train("output=~/run", "data.cache=~")  # data.path is patterns: expanded when opened
    assert config.output == f"{tmp_path}/run"
    assert config.data.cache == str(tmp_path)
    with pytest.raises(ValueError, match="model.t5=~x: there is no such user"):
        train("model.t5=~x")
    assert config.data.download == f"{tmp_path}/.cache/fluxlite/shards"
    config = infer("prompt_file=~/p.txt", "output=~/o", "control_image=~/a.png")
    assert config.prompt_file == f"{tmp_path}/p.txt" and config.output == f"{tmp_path}/o"
    assert config.control_image == [f"{tmp_path}/a.png"]
    assert parse_flags(ProofConfig, ["--output", "~/o"]).output == f"{tmp_path}/o"


def test_a_key_given_twice_is_refused_with_both_values():
    for arguments in (
        ["steps=1", "steps=2"],
        ["recipe=laptop", "recipe=debug"],
        ["output=a", "output=a"],
    ):
        with pytest.raises(ValueError, match="given twice") as error:
            train(*arguments)
        assert all(argument.split("=")[1] in str(error.value) for argument in arguments)
    assert infer("prompt=a", "prompt=b").prompt == ["a", "b"]


def test_keys_that_a_group_sets_are_refused():
    for argument, named in (("data.kind=mock", "data="), ("controlnet.train=true", "controlnet=")):
        with pytest.raises(ValueError, match=f"{argument}: {named} sets it"):
            train(argument)


def test_a_prompt_that_is_no_utf8_is_one_line():
    with pytest.raises(ValueError, match="prompt=caf.*no text in UTF-8"):
        infer("prompt=caf\udce9")


def test_what_a_resumed_run_may_change_is_said_by_its_fields():
    keys = resumable_keys(TrainConfig)
    assert {"steps", "parallel.tp", "sample.count", "data.workers", "controlnet.patience"} <= keys
    assert not keys & {
        "seed",
        "optim.lr",
        "data.path",
        "model.num_heads",
        "dtype",
        "data.global_batch",
    }


def test_prompts_may_be_given_several_times():
    assert infer("prompt=a", "prompt=b, c").prompt == ["a", "b, c"]


@pytest.mark.parametrize("given", [["[1, 0.5]"], ["[1,0.5]"], ["1", "0.5"], ["[1]", "[0.5]"]])
def test_a_list_of_numbers_takes_the_place_of_the_recipes(given):
    config = train("recipe=lora_tiny", *[f"data.repeats={value}" for value in given])
    assert config.data.repeats == [1.0, 0.5]
    own = train("recipe=lora_tiny").data.repeats
    assert len(own) == 2 and own != config.data.repeats
    assert train("recipe=lora_tiny", "data.repeats=[]").data.repeats == []


@pytest.mark.parametrize("given", ["[1, x]", "[1,,2]", "1, 2", "[1", "much"])
def test_what_is_no_list_of_numbers_is_refused_with_the_form_of_one(given):
    with pytest.raises(ValueError, match=r"must be a number, or several as \[1, 0.5\]"):
        train("recipe=lora_tiny", f"data.repeats={given}")


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["model=flux_dov"], "flux_dev"),
        (["recipe=convergense"], "convergence"),
        (["optim.learning_rate=1"], "optim."),
        (["optim.lrr=1"], "optim.lr"),
        (["model.num_doubel_blocks=2"], "model.num_double_blocks"),
        (["lr=1"], "optim.lr"),
        (["optim.lr=fast"], "optim.lr"),
        (["steps=1.5"], "steps"),
        (["steps=null"], "steps"),
        (["nonsense"], "key=value"),
        (["data.height=100"], "data.height=100 must be a multiple of 16: 96 and 112"),
        (["device=mps"], "device=mps: fluxlite computes on cpu and cuda"),
        (["data=fill50k", "data.path=setup.cfg/x"], "/setup.cfg is a file; name a folder"),
        (["data.cache=setup.cfg"], "data.cache=setup.cfg: setup.cfg is a file"),
        (["data.download=setup.cfg"], "data.download=setup.cfg: setup.cfg is a file"),
        (["data.global_batch=3", "data.micro_batch=2"], "data.global_batch=4"),
        (["data=mock", "data.path=shards/"], "is not read with data=mock"),
        (["data=mock", "data.val_path=v.tar"], "data.val_path=v.tar"),
        (["model.attention=cudnn", "device=cpu"], "model.attention"),
        (["model.attention=fast"], "flash"),
        (["device=cuda:7x"], "device"),
        (["dtype=float8"], "bfloat16"),
        (["flow.density=normal"], "logit_normal"),
        (["flow.guidance=uniform[7,1]"], "flow.guidance"),
        (["parallel.tp=2"], "parallel.tp"),
        (["optim.kind=sgd"], "adamw, adamw8bit, muon, prodigy"),
        (["optim.beta1=2"], "optim.beta1"),
        (["model.save_converted=a.safetensors"], "model.checkpoint="),
        (["optim.lr=nan"], "optim.lr"),
        (["model.num_double_blocks=-1"], "num_double_blocks"),
        (["resume=yes"], "auto"),
        (["model.rope_axes=[16,56,50]"], "rope_axes"),
        (["seed="], "seed"),
        (["data.resolutions=512"], "data.resolutions=512 must be a list, as [a,b]"),
        (["data.resolutions=512,768"], "'data.resolutions=512,768': write one value or a list"),
        (["lora.targets=[a[0]]"], "lora.targets=[a[0]] cannot be read: write one value or a list"),
    ],
)
def test_mistakes_are_refused_and_named(arguments, named, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError) as error:
        train(*arguments)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_settings_that_would_do_nothing_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, named in (
        (["negative_prompt=b"], "true_cfg"),
        (["prompt="], "prompt= is empty"),
        (["prompt=a", "prompt= "], "prompt= is empty"),
        (["negative_prompt=b", "true_cfg=nan"], "true_cfg"),
        ([f"output={tmp_path}/file/x"], "is a file"),
    ):
        with pytest.raises(ValueError, match=named):
            infer("prompt=a", *arguments)


def test_compilation_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    for load in (
        lambda: train("compile=true"),
        lambda: infer("prompt=a", "compile=true", "device=cpu"),
    ):
        with pytest.raises(ValueError, match=r"C\+\+ compiler"):
            load()


@pytest.mark.parametrize(
    "name,argument,named",
    [
        ("infer", "optim.lr=1", "optim.lr is a key of train.py, not of this program"),
        ("infer", "data.height=64", "data.height is a key of train.py.*: did you mean height"),
        ("infer", "recipe=laptop", "recipe is a key of train.py"),
        ("train", "prompt=a", "prompt is a key of infer.py"),
        ("train", "images_per_prompt=4", "images_per_prompt is a key of infer.py"),
        ("train", "optim.lrr=4", "optim.lrr is not a key: did you mean optim.lr"),
        ("train", "trainer.max_steps=9", "trainer.max_steps is not a key: did you mean steps"),
        ("train", "guidance_scale=1", "guidance_scale is not a key: did you mean flow.guidance"),
        ("infer", "guidance_scale=1", "guidance_scale is not a key: did you mean guidance"),
        ("infer", "mask_image=a.png", "mask_image is not a key: did you mean mask"),
        ("train", "--network_dim", "--network_dim: arguments .*: did you mean lora.rank"),
        ("train", "--yes", "--yes: arguments have the form key=value; --help lists the keys"),
    ],
)
def test_a_key_of_the_other_program_is_told_from_a_mistake(name, argument, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        load_settings(name, [argument])


def test_what_other_programs_call_a_setting_is_a_setting_here():
    known = {*inspect.signature(fluxlite.generate).parameters, *DRAW_FIELDS, *LOAD_OPTIONS}
    for name, cls in PROGRAMS.items():
        known |= {*option_fields(cls), *group_choices(name)}
    named = {ours for text in OTHER_NAMES.values() for ours in text.split()}
    assert named <= known and not OTHER_NAMES.keys() & known


@pytest.mark.parametrize("name,arguments", [("train", []), ("infer", ["prompt=a"])])
def test_checking_changes_nothing_and_what_is_left_open_is_the_machines(name, arguments):
    config = compose_config(PROGRAMS[name], name, arguments)
    before = dataclasses.asdict(config)
    config.validate()
    assert dataclasses.asdict(config) == before and config.device is config.dtype is None
    assert config.compile == "auto"
    settled = load_settings(name, arguments)
    assert settled.device in ("cpu", "cuda") and settled.dtype in ("float32", "bfloat16")
    assert settled.compile is (settled.device == "cuda")
    assert dataclasses.replace(settled, device=None, dtype=None, compile="auto") == config


def test_missing_encoders_are_named_all_at_once():
    with pytest.raises(ValueError, match="model.t5=, model.clip=, model.autoencoder="):
        train("model=flux_dev", "data=fill50k")


def test_parts_that_are_not_named_are_those_beside_the_transformer(tmp_path):
    def parts(*arguments):
        model = train("model=flux_dev", *arguments).model
        return model.t5, model.clip, model.autoencoder

    for folder in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        (tmp_path / folder).mkdir()
    beside = tuple(f"{tmp_path}/{name}" for name in ("text_encoder_2", "text_encoder", "vae"))
    data, own = "data=fill50k", f"model.checkpoint={tmp_path}"
    assert parts(data, own) == parts(data, f"{own}/transformer") == beside
    assert parts(data, own, "model.t5=t5xxl.safetensors") == ("t5xxl.safetensors", *beside[1:])
    assert parts(data, "model.checkpoint=owner/name") == ("owner/name",) * 3
    assert parts(data, "model.checkpoint=owner/name/transformer") == ("owner/name",) * 3
    assert parts("data=mock", own) == (None,) * 3
    with pytest.raises(ValueError, match="model.t5=, .* as model.checkpoint="):
        parts(data, "model.checkpoint=owner/name/flux1-dev.safetensors")
    with pytest.raises(ValueError, match="model.checkpoint=.*missing does not exist"):
        parts(data, f"{own}/missing")


def test_help_lists_the_prompt_first_and_what_a_checkpoint_decides_only_where_all_is_asked():
    def keys(**options):
        lines = help_text(InferConfig, "infer", "", **options).split("Keys, set")[1].splitlines()
        return [line.split("=")[0].strip() for line in lines if line.startswith("  ")]

    shown, every = keys(), keys(everything=True)
    first = [shown.index(key) for key in ("prompt", "height", "seed", "model.checkpoint", "device")]
    assert first == sorted(first) and first[0] == 0
    fields = option_fields(InferConfig).items()
    assert every == [f.metadata.get("short", key) for key, f in fields]
    hidden = {f"model.{f.name}" for f in dataclasses.fields(FluxConfig)}
    assert set(every) - set(shown) == hidden | {"model.max_sequence_length"}
    assert f"{len(hidden) + 1} more" in help_text(InferConfig, "infer", "")


def test_every_field_says_what_it_means():
    for cls in (TrainConfig, InferConfig):
        assert [key for key, f in option_fields(cls).items() if not f.metadata.get("help")] == []


@pytest.mark.parametrize("recipe", ["default", "laptop", "flux_tiny", "debug", "benchmark"])
def test_recipes_are_valid(recipe):
    assert (
        train(f"recipe={recipe}", *(["data.global_batch=8"] if recipe == "benchmark" else [])).steps
        > 0
    )


def test_convergence_is_nemos(tmp_path):
    parts = [f"model.{part}={tmp_path}" for part in ("t5", "clip", "autoencoder")]
    config = train("recipe=convergence", *parts)
    assert (
        config.steps,
        config.data.global_batch,
        config.model.num_double_blocks,
        config.model.num_single_blocks,
    ) == (
        30_000,
        8,
        19,
        38,
    )


def test_the_command_line_wins_over_the_recipe():
    assert train("recipe=laptop", "steps=7").steps == 7


def test_scripts_exit_with_2_and_one_line():
    result = subprocess.run(
        [sys.executable, "train.py", "model=flux_dov"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and "flux_dev" in result.stderr and result.stderr.count("\n") == 1
    shown = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert "optim.lr=" in shown and "recipe=" in shown


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["data=webdataset", "data.count=9"], "data.count= is not read with data=webdataset"),
        (["data=webdataset", "data.generate_size=64"], "data.generate_size= is not read with"),
        (["data=mock", "data.generate_size=64"], "data.generate_size= is not read with data=mock"),
        (["data=webdataset", "data.caption_field="], "data.caption_field= is empty: name a field"),
        (["data=mock", "optim.momentum=0.9"], "optim.momentum= is not read with optim.kind=adamw"),
        (["data=mock", "flow.mode_scale=1"], "mode_scale= is not read with flow.density=logit_n"),
    ],
)
def test_what_other_settings_leave_unread_is_refused(arguments, named):
    path = ["data.path=x"] if "data=webdataset" in arguments else []
    with pytest.raises(ValueError, match=named):
        load_config(TrainConfig, "train", [*arguments, *path])


@pytest.mark.parametrize(
    "argument,named",
    [
        ("resident_blocks=2", "resident_blocks= is not read with offload=text"),
        ("lora.merge=false", "name lora= too"),
        ("lora.split_qkv=training", "name lora= too"),
    ],
)
def test_what_a_drawing_does_not_read_is_refused(argument, named):
    with pytest.raises(ValueError, match=named):
        infer("prompt=a", argument)
    other = "offload=all" if "resident" in argument else "lora=a.safetensors"
    infer("prompt=a", argument, other)


def test_a_flag_that_preflight_has_not_is_refused_and_its_own_are_named_as_they_are():
    with pytest.raises(ValueError, match="--per_node: no such flag"):
        parse_flags(PreflightConfig, ["--ranks", "8", "--per_node", "4", "steps=1"], rest=True)
    config, rest = parse_flags(PreflightConfig, ["--ranks=8", "--per-node=4", "steps=1"], rest=True)
    assert config.per_node == 4 and rest == ["steps=1"]
    pages = [preflight.__doc__, (ROOT / "docs" / "parallel.md").read_text()]
    flags = {flag for page in pages for flag in re.findall("`(--[a-z_-]+)`", page)}
    known = {flag_of(f) for f in dataclasses.fields(PreflightConfig)}
    assert {"--per-node", "--memory"} <= flags <= known


def test_what_a_recipe_says_of_pictures_it_would_generate_is_no_error_with_other_data():
    config = load_config(TrainConfig, "train", ["recipe=laptop", "data=webdataset", "data.path=x"])
    assert config.data.kind == "webdataset"


def test_a_recipes_cache_is_of_as_many_pictures_as_it_says():
    for recipe in ("laptop", "flux_tiny", "controlnet_tiny"):
        few, many = (
            load_config(TrainConfig, "train", [f"recipe={recipe}", f"data.count={count}"])
            for count in (200, 300)
        )
        assert "-200-" in few.data.cache and "-300-" in many.data.cache


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs /proc, where nobody makes a folder"
)
def test_an_output_that_only_trying_shows_to_be_unusable_is_refused_at_once():
    with pytest.raises(ValueError, match="output=/proc/x: /proc cannot be written to"):
        load_config(InferConfig, "infer", ["prompt=a", "output=/proc/x"])
