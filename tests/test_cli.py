import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from fluxlite.cli.descriptions import parse_json, read_json, read_text
from fluxlite.cli.messages import one_line
from fluxlite.cli.options import check_options, option, typed_description, typed_options


@dataclass
class Inner:
    rate: float = option(0.5, "a rate", above=0, at_most=1)


@dataclass
class Outer:
    count: int = option(1, "a count", at_least=1, at_most=1000)
    kind: str = option("a", "a kind", choices=("a", "b"))
    sides: tuple[int, ...] = option((1, 2), "sides", at_least=1)
    path: str | None = option(None, "a path")
    inner: Inner = option(Inner, "below")


@pytest.mark.parametrize(
    "values,named",
    [
        ({"count": 0}, "count=0 must be at least 1 and at most 1000"),
        ({"count": 10**9}, "count=1000000000 must be at least"),
        ({"count": 10**5000}, "count"),
        ({"count": True}, "not bool"),
        ({"count": "1"}, "not str"),
        ({"kind": "c"}, "kind=c: choose one of a, b"),
        ({"sides": [1, 0]}, "sides=0"),
        ({"sides": 3}, "not int"),
        ({"path": 3.5}, None),
        ({"inner": {"rate": 0}}, "inner.rate=0.0 must be above 0 and at most 1"),
        ({"inner": {"rate": float("nan")}}, "inner.rate=nan must be a finite"),
        ({"inner": {"rate": float("inf")}}, "inner.rate=inf must be a finite"),
        ({"inner": [1]}, "inner must be an object"),
        ({"coutn": 1}, "did you mean x.count"),
        ([], "Outer must be an object"),
    ],
)
def test_values_of_a_wrong_type_or_out_of_bounds_are_named(values, named):
    if named is None:
        assert typed_options(Outer, values).path == "3.5"
        return
    with pytest.raises(ValueError) as error:
        typed_options(Outer, values, "x." if isinstance(values, dict) else "")
    assert named in str(error.value) and "\n" not in str(error.value)


def test_bounds_are_checked_of_instances_too():
    with pytest.raises(ValueError, match="inner.rate=2"):
        check_options(Outer(inner=Inner(rate=2.0)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"3",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\\ud83d"}',
        b'{"a": "\xe9"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_no_json_object_is_one_line_that_names_the_file(data, tmp_path):
    (tmp_path / "about.json").write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "about.json")
    assert "about.json" in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_description_names_its_file_and_key(tmp_path):
    (tmp_path / "about.json").write_text('\ufeff{"count": 3}', encoding="utf-8")
    assert (
        typed_description(tmp_path / "about.json", Outer, read_json(tmp_path / "about.json")).count
        == 3
    )
    (tmp_path / "about.json").write_text(json.dumps({"count": [3]}))
    with pytest.raises(ValueError, match=r"about.json: count=\[3\]"):
        typed_description(tmp_path / "about.json", Outer, read_json(tmp_path / "about.json"))
    with pytest.raises(ValueError, match="metadata"):
        parse_json("[", "metadata of x")


def test_pipes_and_giants_are_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, named in ((tmp_path / "pipe", "is not a file"), (tmp_path, "is not a file")):
        with pytest.raises(ValueError, match=named):
            read_text(path)
    with open(tmp_path / "giant", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="too many"):
        read_text(tmp_path / "giant")


def program(body):
    """A process that runs `body`, a script's lines, through `run_program`."""
    lines = "".join(f"    {line}\n" for line in body)
    head = "from fluxlite.cli.programs import run_program\nimport os, sys, time\n"
    source = f"{head}def body(arguments):\n{lines}run_program(body)"
    return subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "body,code,text",
    [
        (["raise ValueError('a\\nb')"], 2, "error: a b\n"),
        (["open('/nowhere/x')"], 2, "error: /nowhere/x: No such file or directory\n"),
        (["raise MemoryError"], 2, "error: out of memory"),
        (["raise RuntimeError('CUDA out of memory. Tried 3 GB')"], 2, "error: out of memory"),
        (["raise RuntimeError('shapes')"], 1, "Traceback"),
        (["os.kill(os.getpid(), 15); time.sleep(9)"], 143, "stopped by SIGTERM\n"),
        (["print(1)"], 0, ""),
    ],
)
def test_a_program_ends_with_one_line_or_a_bugs_traceback(body, code, text):
    process = program(body)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and err.startswith(text)
    assert code == 1 or err.count("\n") <= 1


def test_a_program_ends_with_its_exit_functions_called_and_the_interpreter_whole():
    """A thread of gloo that frees a tensor while the interpreter is taken apart aborts it."""
    lines = [
        "import atexit, __main__, threading",
        "class Probe:",
        "    def __del__(self):",
        "        os.write(1, b'taken apart')",
        "__main__.probe = Probe()",
        "atexit.register(print, 'exit functions')",
        "threading.Thread(target=lambda: (time.sleep(0.3), print('threads'))).start()",
    ]
    for end, code in (([], 0), (["raise ValueError('x')"], 2), (["raise KeyError('x')"], 1)):
        process = program([*lines, *end])
        out, _ = process.communicate(timeout=30)
        assert (process.returncode, out) == (code, "threads\nexit functions\n")


def test_ctrl_c_ends_a_program_with_130():
    process = program(["print('ready', flush=True)", "time.sleep(30)"])
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "stopped\n")


def test_a_signal_that_a_library_swallowed_can_be_sent_again():
    swallow = [
        "try:",
        "    print('ready', flush=True); time.sleep(30)",
        "except BaseException:",
        "    print('swallowed', flush=True); time.sleep(30)",
    ]
    process = program(swallow)
    for word in ("ready", "swallowed"):
        assert process.stdout.readline() == f"{word}\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # passed on twice
        time.sleep(2.5)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "stopped by SIGTERM\n")


def test_a_reader_that_is_gone_is_no_error():
    process = program(["time.sleep(0.5)", "[print('x' * 1000) for _ in range(1000)]"])
    process.stdout.close()
    assert process.wait(timeout=30) == 141 and process.stderr.read() == ""


@pytest.mark.parametrize("end,code,said", [("interrupt", 130, "stopped\n"), ("close", 141, "")])
def test_help_is_stopped_as_a_program_is(end, code, said):
    source = "from fluxlite.cli.programs import run_program\nimport time\ndef usage():\n"
    source += "    print('ready', flush=True)\n    time.sleep(1)\n    return 'x' * 1_000_000\n"
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    called = [sys.executable, "-c", f"{source}run_program(None, usage=usage)", "--help"]
    process = subprocess.Popen(called, **options)
    assert process.stdout.readline() == "ready\n"
    if end == "interrupt":
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == said
    else:
        process.stdout.close()
        assert process.stderr.read() == said
    assert process.wait(timeout=30) == code


def test_errors_say_what_was_out_of_memory_and_what_to_try():
    assert "micro_batch" in one_line(RuntimeError("[enforce fail] can't allocate memory: 3"))
    assert one_line(KeyError("x")) is None
