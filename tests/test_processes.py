"""Signals, bad steps and deaths: what a run loses, says and leaves behind."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import poison
import pytest
import torch
from reference import last_of_each
from test_trainer import MOCK, ROOT, SMALL, command, train, wait_for_steps, weights

from fluxlite import parallel
from fluxlite.cli.processes import deferred_signals, held_signals
from fluxlite.cli.programs import stopping_at_once
from fluxlite.data.loading import load_batches
from fluxlite.weights import run_folder

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TELLS = ("Traceback", "DataLoader", "Exception ignored", "resource_tracker")


def wait_until(holds, what, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not after {seconds} s: {what}"
        time.sleep(0.02)


def group_of(pid):
    """Processes of a group or of a session that are still there."""
    found = subprocess.run(
        ["ps", "-eo", "pid,pgid,sess,stat"], capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in found.splitlines()[1:]]
    return [int(row[0]) for row in rows if str(pid) in row[1:3] and not row[3].startswith("Z")]


# --- bad steps ------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_changes_no_bit_on_one_process():
    """Weights, moments, momentum and average; NaN, infinity and overflow, and a loss alone; AdamW
    and Muon.
    """
    try:
        poison.main()
    finally:
        parallel.stop_ranks()


def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_bit_on_any():
    """FSDP2 and tensor parallelism on two ranks, with and without accumulation; the samples named
    are that rank's.
    """
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "tests/poison.py",
    ]
    result = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("bad_step", [3, 4])  # of 4
def test_a_bad_step_ends_the_run_and_leaves_a_checkpoint_to_go_on_from(tmp_path, bad_step):
    common = [*MOCK, "steps=4", "checkpoint.every=1"]
    whole = weights(train(*common, f"output={tmp_path}/whole"))
    with poison.poisoned_gradient(math.nan, call=bad_step):
        with pytest.raises(
            ValueError,
            match=rf"norm of step {bad_step} is nan.*mock.*: step-00000{bad_step - 1} is",
        ):
            train(*common, f"output={tmp_path}/run")
    last = tmp_path / "run/checkpoints/last"
    assert run_folder.read_meta(last).step == bad_step - 1
    assert all(torch.isfinite(value).all() for value in weights(last).values())
    resumed = weights(train(*common, f"output={tmp_path}/run", "resume=auto"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_bad_first_step_says_that_there_is_nothing_to_go_on_from(tmp_path):
    with poison.poisoned_gradient(math.nan):
        with pytest.raises(ValueError, match="is nan; .*: there is no checkpoint to go on from"):
            train(*MOCK, "steps=4", f"output={tmp_path}/run")


# --- a rank that dies -----------------------------------------------------------------------------


def two_ranks(folder, timeout, other):
    """What `watching_ranks` makes of a sum over two ranks where the second does `other()`
    instead.
    """
    import torch.distributed as dist

    children = []
    for rank in range(2):
        if not (child := os.fork()):
            store = dist.FileStore(str(folder / "store"), 2)
            options = dict(store=store, rank=rank, world_size=2)
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), **options)
            dist.all_reduce(torch.ones(1))
            if rank == 1:
                other()
                os._exit(0)
            try:
                with parallel.watching_ranks(parallel.ParallelConfig(timeout_s=timeout)):
                    dist.all_reduce(torch.ones(1))
            except BaseException as error:
                (folder / "said").write_text(f"{type(error).__name__}: {error}")
            os._exit(0)
        children.append(child)
    os.waitpid(children[0], 0)
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)
    return (folder / "said").read_text()


@pytest.mark.parametrize(
    "other,words",
    [
        (lambda: None, "has ended:"),
        (lambda: time.sleep(60), "kept this one waiting for parallel.t"),
    ],
    ids=["gone", "stuck"],
)
def test_a_rank_that_is_gone_or_stuck_is_said_in_one_line(tmp_path, other, words):
    said = two_ranks(tmp_path, 2, other)
    assert said.startswith(f"ValueError: another rank {words}") and "\n" not in said, said


@pytest.mark.parametrize(
    "error,words",
    [
        (
            torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690"),
            "has ended",
        ),
        (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes"), "has ended"),
        (torch.distributed.DistStoreError("wait timeout after 600000ms"), "kept this one waiting"),
        (RuntimeError("[/a/gloo/transport/tcp/pair.cc:5] Connection closed by peer"), "has ended"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_torch_raises_where_a_rank_is_lost_is_told_by_type_or_by_gloos_words(error, words):
    with pytest.raises(ValueError, match=f"another rank {words}"):
        with parallel.watching_ranks(parallel.ParallelConfig()):
            raise error


@pytest.mark.parametrize(
    "text",
    [
        "No backend type associated with device type cuda: gloo has none",
        "NCCL takes no tensors of this type",
        "[enforce fail at third_party/gloo/gloo/transport/tcp/pair.cc:99] rv == nbytes",
        "Connection closed by peer",
    ],
)
def test_a_bug_that_names_gloo_or_nccl_stays_a_bug(text):
    with pytest.raises(RuntimeError) as raised:
        with parallel.watching_ranks(parallel.ParallelConfig()):
            raise RuntimeError(text)
    assert str(raised.value) == text


# --- signals --------------------------------------------------------------------------------------


def test_deferred_signals_are_acted_on_after_the_block():
    caught = []
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    try:
        with deferred_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not caught
        assert caught == [signal.SIGTERM]
        with held_signals() as held:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        assert held == {"number": signal.SIGTERM} and len(caught) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number,code,line", [(2, 130, b"stopped\n"), (15, 143, b"stopped by S")])
def test_a_program_that_is_stopped_while_it_imports_ends_at_once_in_its_line(number, code, line):
    before = signal.getsignal(number)
    with stopping_at_once():
        pass
    assert signal.getsignal(number) == before
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        with stopping_at_once():
            try:
                os.kill(os.getpid(), number)
                time.sleep(60)
            finally:
                os.write(2, b"an exception")
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert os.read(read, 100).startswith(line) and not os.read(read, 100)


class Numbers:
    """A data set of its own indices that says which process read it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index, os.getpid()


def loaded(dataset, workers):
    """Its samples one by one."""
    return load_batches(dataset, workers=workers, batch_size=None, collate_fn=tuple)


class Slow(Numbers):
    """Whose later samples take a while."""

    def __getitem__(self, index):
        time.sleep(5 * (index > 0))
        return super().__getitem__(index)


def test_loader_processes_survive_what_stops_a_run_and_end_with_their_batches():
    batches = loaded(Numbers(), 2)
    (_, first), (_, second) = next(batches), next(batches)
    for worker in (first, second):
        assert worker != os.getpid()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker, number)
    time.sleep(0.1)
    assert [index for index, _ in batches] == [2, 3]
    batches.close()
    wait_until(
        lambda: not any(os.path.exists(f"/proc/{w}") for w in (first, second)),
        "the loader processes end",
    )


def test_a_loader_process_that_is_killed_is_one_line_where_its_batch_is_awaited():
    before = signal.getsignal(signal.SIGCHLD)
    batches = loaded(Slow(), 1)
    _, worker = next(batches)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not alive(worker), "the loader process ends")
    assert signal.getsignal(signal.SIGCHLD) is before  # nothing was raised until here
    with pytest.raises(ValueError, match="a loader process died, perhaps of too little memory"):
        list(batches)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_loader_processes_die_with_their_parent():
    read, write = os.pipe()
    child = os.fork()
    if not child:
        found = [worker for _, worker in loaded(Numbers(), 2)]
        batches = loaded(Numbers(), 2)
        os.write(write, f"{next(batches)[1]} {next(batches)[1]} {len(found)}\n".encode())
        time.sleep(60)
    first, second, count = os.read(read, 100).split()
    assert count == b"4" and all(os.path.exists(f"/proc/{int(w)}") for w in (first, second))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(
        lambda: not any(alive(int(w)) for w in (first, second)), "the loader processes end", 3
    )


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


RANK = """
import os, sys, time
from fluxlite.cli.programs import run_program
def body(arguments):
    print(os.getpid(), flush=True)
    time.sleep(60)
run_program(body)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_a_rank_dies_with_torchrun_and_a_plain_run_outlives_its_shell():
    for launched, survives in (({"TORCHELASTIC_RUN_ID": "1", "RANK": "0"}, False), ({}, True)):
        source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}])"
        launcher = subprocess.Popen(
            [sys.executable, "-c", source],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | launched,
        )
        rank = int(launcher.stdout.readline())
        launcher.kill()
        launcher.wait()
        if survives:
            time.sleep(0.3)
            assert alive(rank)
            os.kill(rank, signal.SIGKILL)
        else:
            wait_until(lambda rank=rank: not alive(rank), "the rank ends", 3)


def test_a_rank_whose_torchrun_is_gone_says_so_and_does_not_wait(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=f"torchrun is gone: 127.0.0.1:{port} does not answer"):
        parallel.start_ranks(parallel.ParallelConfig(), "cpu")


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match="process 3 .* has no GPU, .* 2: torchrun --nproc_per_node"
    ):
        parallel.start_ranks(parallel.ParallelConfig(), "cuda")


# --- every phase ----------------------------------------------------------------------------------


BEFORE = (
    "composing",
    "generating",
    "loading",
    "encoding",
    "first validation",
)  # nothing to save yet
WITHIN = ("training", "validating", "drawing", "saving")  # saved after the step
STOPPED = {"SIGTERM": (143, "stopped by SIGTERM"), "SIGINT": (130, "stopped")}


def case_of(folder, phase, name, *more):
    """Arguments of a run on pictures yet to be generated and encoded, with loader processes."""
    data = [
        "data=fill50k",
        f"data.path={folder}/data",
        "data.count=1000",
        "data.generate_size=16",
        f"data.cache={folder}/cache",
    ]
    rest = [
        "steps=3",
        "validate_every=2",
        "sample.every=2",
        "checkpoint.every=2",
        "data.workers=2",
        f"output={folder}/run",
    ]
    few = ["data.count=8"] if phase != "generating" else []
    return [phase, name, *last_of_each([*SMALL, *data, *rest, *few, *more])]


def check_stopped(found, phase, name, folder):
    """One line, the right exit code, no process and no half-written file left, the work saved."""
    code, text, left = found["code"], found["text"], found["left"]
    where = f"{phase}, {name}: exit code {code}, {text[-1500:]}"
    assert not left and not any(tell in text for tell in TELLS), where
    said = [line for line in text.splitlines() if line.startswith("stopped")]
    last = folder / "run/checkpoints/last"
    if phase in BEFORE:
        assert (code, said) == (STOPPED[name][0], [STOPPED[name][1]]) and not last.exists(), where
    elif phase in WITHIN:
        step = {"saving": 2}.get(phase) or run_folder.read_meta(last).step
        assert code == 0 and said == [
            f"stopped by {name} after step {step}, which is saved; resume=auto goes on"
        ], where
        assert run_folder.read_meta(last).step == step >= 2, where
    else:
        assert (code, said) == (0, []) and (folder / "run/losses.png").is_file(), where
    hidden = hidden_files(folder)
    assert not hidden, f"{where} leaves {hidden}"


def hidden_files(folder):
    """What is half written has a hidden name; locks stay, and a checkpoint's description is
    torch's.
    """
    return [p for p in folder.rglob(".*") if not p.name.endswith((".lock", ".metadata"))]


def check_phases(folder, cases):
    asked = []
    for phase, name in cases:
        place = folder / f"{phase}-{name}".replace(" ", "-")
        place.mkdir()
        asked.append({"arguments": case_of(place, phase, name), "folder": str(place)})
    run = subprocess.run(
        [sys.executable, "tests/phases.py"],
        cwd=ROOT,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"},
    )
    assert run.returncode == 0, run.stderr
    for found, (phase, name), case in zip(json.loads(run.stdout), cases, asked, strict=True):
        check_stopped(found, phase, name, Path(case["folder"]))


def test_a_signal_in_any_phase_ends_a_run_in_one_line_with_nothing_left(tmp_path):
    """Also the group's loader processes get it. Two phases stand for those before the first
    step.
    """
    check_phases(
        tmp_path,
        [
            ("generating", "SIGTERM"),
            ("encoding", "SIGINT"),
            ("drawing", "SIGTERM"),
            ("plotting", "SIGTERM"),
        ],
    )


@pytest.mark.slow
def test_each_signal_in_each_phase_ends_a_run_in_one_line_with_nothing_left(tmp_path):
    check_phases(
        tmp_path, [(phase, name) for phase in (*BEFORE, *WITHIN, "plotting") for name in STOPPED]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
def test_a_signal_while_importing_ends_a_run_in_one_line(tmp_path, name):
    for delay in (0.1, 0.5, 1.5):
        process = subprocess.Popen(
            command(*MOCK, f"output={tmp_path}/run"),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=ENVIRONMENT,
        )
        wait_until(
            lambda pid=process.pid: (
                b"fluxlite" in Path(f"/proc/{pid}/cmdline").read_bytes() or imports(pid)
            ),
            "it runs",
        )
        time.sleep(delay)
        os.killpg(process.pid, signal.Signals[name])
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors.strip()) == STOPPED[name]


SCRIPTS = {
    "generator": ["-m", "fluxlite.data.fill50k", "--dst"],
    "make_random": ["scripts/make_random.py", "--doubles", "1", "--singles", "1", "--dst"],
    "make_tiny": ["scripts/make_tiny.py", "--stage"],
    "convert_first_edition": ["scripts/convert_first_edition.py", "--src", "nowhere", "--dst"],
}


@pytest.mark.parametrize("script,name", list(zip(SCRIPTS, [*STOPPED] * 2)), ids=SCRIPTS)
def test_a_signal_while_importing_ends_a_script_in_one_line(tmp_path, script, name):
    process = subprocess.Popen(
        [sys.executable, *SCRIPTS[script], str(tmp_path / "out")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT / "src")},
    )
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "numpy" in maps.read_text() or "libtorch" in maps.read_text(), "it imports")
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == STOPPED[name] and not os.listdir(tmp_path)


def imports(pid):
    """Whether a Python has come to a library of its own."""
    return (
        "_signal" in Path(f"/proc/{pid}/maps").read_text()
        or "_ctypes" in Path(f"/proc/{pid}/maps").read_text()
    )


# --- torchrun -------------------------------------------------------------------------------------


def torchrun(folder, *arguments):
    """Two ranks with loader processes, in a session of their own."""
    options = [*MOCK, "data.micro_batch=1", "data.workers=2", f"output={folder}/run", *arguments]
    return subprocess.Popen(
        command(*options, ranks=2), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def descendants(pid):
    """All processes that descend from one, itself among them."""
    found = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    parents = {int(row[0]): int(row[1]) for row in map(str.split, found.splitlines()[1:])}
    tree = {pid}
    while grown := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    return tree


def test_sigterm_to_torchrun_saves_and_leaves_no_process(tmp_path):
    process = torchrun(tmp_path, "steps=100000")
    wait_for_steps(tmp_path / "run", process)
    tree = descendants(process.pid)
    assert len(tree) == 1 + 2 + 4
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert (
        errors.count("stopped by SIGTERM after step") == 1 and "DataLoader worker" not in errors
    ), errors
    assert run_folder.read_meta(tmp_path / "run/checkpoints/last").step >= 3
    assert not any(alive(pid) for pid in tree)


@pytest.mark.slow
def test_sigkill_to_torchrun_ends_its_ranks_and_their_loaders(tmp_path):
    process = torchrun(tmp_path, "steps=100000")
    wait_for_steps(tmp_path / "run", process)
    tree = descendants(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: not any(alive(pid) for pid in tree), "all ranks and loaders end", 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
@pytest.mark.parametrize("phase", [*BEFORE, *WITHIN, "plotting"])
def test_a_signal_to_torchrun_in_each_phase_leaves_nothing(tmp_path, phase, name):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "tests/phases.py",
    ]
    run = subprocess.Popen(
        [*launch, *case_of(tmp_path, phase, name, "data.micro_batch=1")],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"},
    )
    text, _ = run.communicate(timeout=240)
    ours = text.split("Traceback (most recent call last):\n  File")[
        0
    ]  # torchrun's own, of the signal that it got
    assert ours.count("\nstopped") == (phase != "plotting") and "DataLoader" not in text, text
    hidden = hidden_files(tmp_path)
    assert not hidden and (phase in BEFORE) != (tmp_path / "run/checkpoints/last").exists(), text
    assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout


# --- Slurm ----------------------------------------------------------------------------------------


SHIMS = {
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" > requeued; else echo localhost; fi',
    "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
    "python": "",
}


@pytest.mark.parametrize("log", ["fluxlite-7.log", "elsewhere.txt"])  # sbatch --output
@pytest.mark.parametrize(
    "earlier,lines,code,requeued",
    [
        ("", "echo stopped by SIGTERM after step 3", 0, True),
        ("", "printf 'stopped by SIGTERM after step 3'", 0, True),
        ("", "echo stopped by SIGTERM", 143, True),  # while it was set up
        ("", "true", 143, True),  # on a rank that is not the first
        ("stopped by SIGTERM after step 3", "echo done", 0, False),
        ("stopped by SIGTERM after step 3", "echo stopped by SIGTERM after step 6", 0, True),
        ("", "echo error: no such file", 2, False),
    ],
)
def test_the_slurm_script_requeues_a_run_that_was_told_to_stop_and_no_other(
    tmp_path, earlier, lines, code, requeued, log
):
    (tmp_path / "bin").mkdir()
    for name, body in (SHIMS | {"python": f"{lines} >&2\nseq 30\nexit {code}"}).items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {
        "SLURM_JOB_NODELIST": "a",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    job |= {
        "SLURM_JOB_NAME": "fluxlite",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_LOCALID": "0",
    }
    log = tmp_path / log
    log.write_text(f"{earlier}\n")
    with open(log, "a") as out:
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        done = subprocess.run(
            [shutil.which("bash"), f"{ROOT}/scripts/train.sbatch", "data=mock"],
            cwd=tmp_path,
            stdout=out,
            stderr=out,
            env=os.environ | job | {"PATH": path},
        )
    assert done.returncode == code, log.read_text()
    said, printed = lines.partition(" ")[2].strip("'"), "".join(f"{n}\n" for n in range(1, 31))
    assert said in log.read_text() and printed in log.read_text()
    assert (tmp_path / "requeued").exists() == requeued
