"""What users and disks do to data: it is right, or one line. Nothing is lost in silence."""

import errno
import http.server
import io
import json
import logging
import multiprocessing
import os
import resource
import shutil
import socket
import tarfile
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_data import batches, config_for, fill50k_config, make_cache, members, write_tar
from test_data import tars as tars

from fluxlite.cli import atomic
from fluxlite.cli.atomic import atomic_file, atomic_folder, locked
from fluxlite.cli.messages import one_line
from fluxlite.cli.options import check_sources
from fluxlite.data import cache as cache_module
from fluxlite.data import fill50k, images, urls
from fluxlite.data.braces import count_names, expand_braces
from fluxlite.data.cache import CachedSamples
from fluxlite.data.opening import open_dataset, prepare_data
from fluxlite.data.rows import CHECKSUM, RowFile, write_rows
from fluxlite.draw.control import read_picture
from fluxlite.settings import TrainConfig
from fluxlite.train.setup import open_data, warn_of_warmup

COLOURS = {
    "red": (255, 0, 0),
    "lime": (0, 255, 0),
    "blue": (0, 0, 255),
    "white": (255,) * 3,
    "black": (0,) * 3,
}


def colour(name, kind="png"):
    """An encoded picture of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), COLOURS[name]).save(
        stream, kind, **({"quality": 95} if kind == "jpeg" else {})
    )
    return stream.getvalue()


def write_members(path, files):
    """A tar of (name, bytes) pairs, names repeated or not; bytes that are a str link to that
    name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.LNKTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def pairs_of(path, **changes):
    """{key: (colour seen, caption)} of all usable samples, read one by one."""
    config = config_for(path, shuffle=False, val_path=str(path), **changes)
    dataset, found = open_dataset(config, "train", 0), {}
    for i in range(len(dataset)):
        sample = dataset[i]
        mean = sample["images"].float().mean((1, 2))
        near = min(COLOURS, key=lambda name: (mean - torch.tensor(COLOURS[name])).abs().sum())
        found[sample["keys"]] = near, sample["captions"]
    return found


# --- which files are a sample ---------------------------------------------------------------------

GOOD = [
    (f"good{i}.{e}", d) for i in range(9) for e, d in (("png", colour("white")), ("txt", b"white"))
]
MIXED = {
    "repeated": [
        ("a.png", colour("red")),
        ("a.txt", b"red"),
        ("a.png", colour("blue")),
        ("a.txt", b"blue"),
    ],
    "repeated apart": [
        ("a.png", colour("red")),
        ("a.txt", b"red"),
        *GOOD[:2],
        ("a.png", colour("blue")),
        ("a.txt", b"blue"),
    ],
    "endings differ": [
        ("a.png", colour("red")),
        ("a.txt", b"red"),
        *GOOD[:2],
        ("a.webp", colour("blue", "webp")),
        ("a.json", b'{"caption": "blue"}'),
    ],
    "endings differ, beside": [
        ("a.jpg", colour("red", "jpeg")),
        ("a.txt", b"red"),
        ("a.webp", colour("blue", "webp")),
        ("a.json", b'{"caption": "blue"}'),
    ],
    "upper case": [
        ("a.png", colour("red")),
        ("a.txt", b"red"),
        ("a.PNG", colour("blue")),
        ("a.TXT", b"blue"),
    ],
}


@pytest.mark.parametrize("name", MIXED)
def test_two_samples_of_one_key_are_lost_and_never_mixed(tmp_path, caplog, name):
    files = MIXED[name] + [entry for entry in GOOD if entry not in MIXED[name]]
    write_members(tmp_path / "0.tar", files)
    found = pairs_of(tmp_path)
    assert len(found) == 9 and all(seen == said for seen, said in found.values())
    assert "skipped 0/a:" in caplog.text
    lost = {"beside": 1}.get(name.split(", ")[-1], 2)
    with pytest.raises(ValueError, match=f"{lost} of {9 + lost} samples"):
        pairs_of(tmp_path, max_bad_fraction=0.05)


def test_names_with_dots_are_as_many_lost_samples(tmp_path, caplog):
    files = [
        (f"frame.{i:03d}.{e}", d)
        for i in range(5)
        for e, d in (("jpg", colour("red", "jpeg")), ("txt", b"red"))
    ]
    write_members(tmp_path / "0.tar", files + GOOD)
    assert len(pairs_of(tmp_path)) == 9
    assert (
        "skipped 0/frame: 003.jpg is no part of a sample: a key ends at its first dot"
        in caplog.text
    )
    with pytest.raises(ValueError, match="5 of 14 samples.*a key ends at its first dot"):
        pairs_of(tmp_path, max_bad_fraction=0.3)


def test_several_unknown_pictures_of_a_key_are_counted_and_known_kinds_are_not(tmp_path):
    files = (
        GOOD
        + [(f"a{e}", colour("red")) for e in (".png", ".1.png", ".2.png")]
        + [("a.txt", b"red")]
    )
    write_members(tmp_path / "0.tar", files)
    assert pairs_of(tmp_path)["0/a"] == ("red", "red")
    with pytest.raises(ValueError, match="2 of 12 samples"):
        pairs_of(tmp_path, max_bad_fraction=0.1)
    kinds = [(f"a.{kind}.png", colour("black")) for kind in ("depth", "canny", "pose", "mask")]
    write_members(tmp_path / "0.tar", GOOD + [("a.png", colour("red")), ("a.txt", b"red"), *kinds])
    assert pairs_of(tmp_path, max_bad_fraction=0.0)["0/a"] == ("red", "red")


def test_files_of_one_key_may_lie_apart_where_they_can_be_of_one_sample_alone(tmp_path):
    both = [("a.png", colour("red")), ("b.png", colour("blue"))]
    write_members(tmp_path / "0.tar", both + [("a.txt", b"red"), ("b.txt", b"blue")])
    assert pairs_of(tmp_path, max_bad_fraction=0.0) == {
        "0/a": ("red", "red"),
        "0/b": ("blue", "blue"),
    }


def test_hard_links_are_the_file_they_name(tmp_path):
    files = [
        ("./a.png", colour("red")),
        ("./a.txt", b"red"),
        ("b.png", colour("red")),
        ("b.txt", "./a.txt"),
        ("c.png", "a.png"),
    ]
    write_members(tmp_path / "0.tar", files + [("c.txt", "a.txt")])
    assert (
        set(pairs_of(tmp_path, max_bad_fraction=0.0).values()) == {("red", "red")}
        and len(pairs_of(tmp_path)) == 3
    )


def test_names_that_are_no_text_are_used_and_logged_safely(tmp_path, caplog):
    names = ["caf\udce9", "line\nbreak", "\x1b[31mred"]
    files = [(f"{n}.{e}", d) for n in names for e, d in (("png", colour("red")), ("txt", b"red"))]
    write_members(
        tmp_path / "0.tar", files + [("x\udce9\n.txt", b"no picture"), ("y" * 3000 + ".txt", b"")]
    )
    found = pairs_of(tmp_path)
    assert set(found) == {"0/caf\\xe9", "0/line\\nbreak", "0/\\x1b[31mred"} and set(
        found.values()
    ) == {("red", "red")}
    assert "x\\xe9\\n: no picture" in caplog.text and "a name of 3000 bytes" in caplog.text
    assert all(message.isprintable() for message in caplog.messages)


def test_tars_joined_are_refused_and_links_in_one_are_told(tmp_path, caplog):
    link = tarfile.TarInfo("z.png")
    link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
    write_members(tmp_path / "0.tar", GOOD)
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        tar.addfile(link)
    open_dataset(config_for(tmp_path), "train", 0)
    assert "1 members are links or sparse files and not read, z.png first" in caplog.text
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole + whole)
    with pytest.raises(ValueError, match="more behind its end at byte .*, as of tars joined"):
        open_dataset(config_for(tmp_path), "train", 0)


def test_a_folders_tars_end_in_any_case_and_compressed_ones_are_told(tmp_path, caplog):
    write_members(tmp_path / "0.TAR", GOOD)
    (tmp_path / "1.tar.gz").write_bytes(b"?")
    assert len(open_dataset(config_for(tmp_path), "train", 0)) == len(GOOD) // 2 - 1
    assert "1 compressed tars are not read, 1.tar.gz first" in caplog.text


def test_a_tar_that_goes_back_in_its_file_is_refused(tmp_path):
    write_members(tmp_path / "0.tar", GOOD)
    data = bytearray((tmp_path / "0.tar").read_bytes())
    header = bytearray(data[512 * 2 : 512 * 3])
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    data[512 * 2 : 512 * 3] = header
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match="0.tar is no whole, uncompressed tar"):
        pairs_of(tmp_path)


def test_a_tar_changed_while_it_is_read_ends_the_run_and_one_touched_does_not(tmp_path):
    write_tar(tmp_path / "0.tar", members(range(8)))
    dataset = open_dataset(config_for(tmp_path, shuffle=False), "train", 0)
    first = dataset[0]["captions"]
    os.utime(tmp_path / "0.tar", ns=(1, 1))
    assert dataset[0]["captions"] == first
    write_tar(tmp_path / "0.tar", members(range(3, 11)))
    with pytest.raises(ValueError, match="0.tar was changed while it is read: start again"):
        dataset[1]


# --- Energon --------------------------------------------------------------------------------------


def energon(
    path,
    dataset=None,
    split="split_parts:\n  train: [s.tar]\n",
    json_text='{"caption": "alt", "long": {"en": ["no", "red"]}}',
):
    """An Energon dataset of one tar whose samples are red by png and black by jpg, and the caption
    red in several places.
    """
    sample = {
        "png": colour("red"),
        "jpg": colour("black", "jpeg"),
        "txt": b"wrong",
        "caption.txt": b"red",
        "json": json_text.encode(),
    }
    write_members(path / "s.tar", [(f"{i}.{e}", d) for i in range(3) for e, d in sample.items()])
    (path / ".nv-meta").mkdir()
    (path / ".nv-meta" / "split.yaml").write_text(split)
    if dataset is not None:
        (path / ".nv-meta" / "dataset.yaml").write_text(dataset)
    return path


HEAD = "__module__: megatron.energon\n__class__: CaptioningWebdataset\nsubflavors: {source: web}\n"


@pytest.mark.parametrize(
    "caption",
    ["caption.txt", "json[long][en][1]", "json[none],caption.txt", "none.txt,json[long][en][1]"],
)
def test_a_field_map_says_which_files_are_picture_and_caption(tmp_path, caption):
    path = energon(tmp_path / "d", f"{HEAD}field_map:\n  image: png\n  caption: '{caption}'\n")
    for place in (path, path / "s.tar", f"{path}/*.tar"):
        assert set(pairs_of(place).values()) == {("red", "red")}
    assert set(
        pairs_of(
            path, caption_field="long" if "long" in caption and caption[0] == "l" else "caption"
        ).values()
    )


@pytest.mark.parametrize(
    "dataset", ["", "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors: {}\n"]
)
def test_without_a_field_map_the_endings_are_the_usual_ones(tmp_path, dataset):
    assert set(pairs_of(energon(tmp_path / "d", dataset)).values()) == {("black", "alt")}


@pytest.mark.parametrize(
    "dataset,named",
    [
        ("field_map: {image: jpg}", "field_map must name image and caption"),
        ("field_map: [jpg, txt]", "field_map must name"),
        ("field_map: {image: jpg, caption: 'txt[a]'}", "one text and one json"),
        ("field_map: {image: jpg, caption: 'a.txt,b.txt'}", "one text and one json"),
        ("field_map: {image: jpg, caption: json}", "json is no text"),
        ("field_map: {image: 'json[i]', caption: txt}", "field_map.image"),
        ("field_map: {image: jpg, caption: 7}", "field_map.caption=7"),
        ("field_map: {image: jpg, caption: 'a b[['}", "is no ending"),
        (
            "sample_loader: sample_loader.py:load\npart_filter: sample_loader.py:filter",
            "sample_loader is code, which is not run",
        ),
        ("sample_type: !!python/object/apply:os.system [touch x]", "is no plain YAML"),
        ("- a\n- b", "holds list"),
        ("\x00\x01", "is no plain YAML"),
    ],
)
def test_what_of_a_dataset_yaml_cannot_be_followed_is_refused_by_name(tmp_path, dataset, named):
    with pytest.raises(ValueError, match="dataset.yaml") as raised:
        pairs_of(energon(tmp_path / "d", dataset))
    assert named in str(raised.value)


BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghijklmn", "bcdefghijklmno")
)


@pytest.mark.parametrize(
    "split",
    [
        "split_parts:\n  train: [../out.tar]\n",
        "split_parts:\n  train: [/OUT/out.tar]\n",
        "split_parts:\n  train: [link.tar]\n",
        "split_parts:\n  train: ['{1..99999999999}.tar']\n",
        "split_parts:\n  train: ['" + "{a,b}" * 60 + "']\n",
        "split_parts:\n  train: {a: b}\n",
        "split_parts:\n  train: [[s.tar]]\n",
        "split_parts:\n  train: [7]\n",
        "split_parts: 7\n",
        "exclude: [{a: b}]\nsplit_parts:\n  train: [s.tar]\n",
        "split_parts:\n  train: ['pipe:touch MARK']\n",
        "split_parts:\n  train: [!!python/object/apply:os.system ['touch MARK']]\n",
        "what: is this\n",
        "split_parts:\n  train: [s.tar]\nsplit_parts:\n  train: [t.tar]\n",
        "[" * 20_000,
        "{" * 20_000,
        BOMB,
        "\x00",
        "a: !!binary aGFsbG8=\n",
    ],
)
def test_a_split_names_what_lies_in_its_folder_and_nothing_else(tmp_path, split):
    write_members(tmp_path / "out.tar", GOOD)
    path = energon(
        tmp_path / "d",
        split=split.replace("/OUT", str(tmp_path)).replace("MARK", str(tmp_path / "mark")),
    )
    (path / "link.tar").symlink_to("../out.tar")
    start = time.monotonic()
    with pytest.raises(ValueError, match="split.yaml"):
        pairs_of(path)
    assert time.monotonic() - start < 2 and not (tmp_path / "mark").exists()


def test_a_prompt_json_names_what_lies_in_its_folder_and_nothing_else(tmp_path):
    source = tmp_path / "fill50k"
    for folder in ("source", "target"):
        (source / folder).mkdir(parents=True)
        (source / folder / "0.png").write_bytes(colour("red"))
    (tmp_path / "secret.png").write_bytes(colour("blue"))
    (source / "source" / "link.png").symlink_to("../../secret.png")
    os.mkfifo(source / "source" / "pipe.png")
    good = {"source": "source/0.png", "target": "target/0.png", "prompt": "red"}
    for bad in (
        {"source": "../secret.png"},
        {"target": f"{tmp_path}/secret.png"},
        {"source": "source/link.png"},
        {"prompt": ["a"]},
        {"target": None},
        {"extra": 1},
        {"target": "target/none.png"},
        {"source": "source/pipe.png"},
    ):
        (source / "prompt.json").write_text(
            "\n".join(json.dumps(row) for row in (good, good | bad))
        )
        with pytest.raises((ValueError, OSError)) as raised:
            fill50k.write_shards(fill50k.imported_samples(source), tmp_path / "tars")
        named = ("prompt.json line 2", "none.png", "pipe.png is not a file")
        assert any(part in one_line(raised.value) for part in named)
        assert not (tmp_path / "tars").exists() and not list(tmp_path.glob(".tars*"))


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..3}",
        "{a,b}x{c,d,e}",
        "{a,{1..3},{x,y}z}",
        "{b..e..2}{07..10}",
        "{a}{}",
        "a,b",
        "{,x}",
        "{3..1}",
    ],
)
def test_names_of_a_pattern_are_counted_as_they_are_expanded(pattern):
    assert count_names(pattern) == len(expand_braces([pattern], "data.path"))


@pytest.mark.parametrize(
    "pattern",
    [
        "{1..999999999}",
        "{a,b}" * 40,
        "{{1..99999}{1..99999},x}",
        "{a..z}" * 9,
        "{" * 3000,
        "x" * 9999,
        "{a",
    ],
)
def test_patterns_of_too_many_names_are_refused_at_once(pattern):
    start = time.monotonic()
    with pytest.raises(ValueError, match="data.path="):
        open_dataset(config_for(pattern), "train", 0)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("name", ["pipe.tar", "*.tar", ".", "file:pipe.tar"])
def test_pipes_and_devices_are_never_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.tar")
    where = f"file:{tmp_path}/pipe.tar" if name.startswith("file:") else str(tmp_path / name)
    start = time.monotonic()
    for place in (where, "/dev/zero"):
        with pytest.raises(ValueError, match="is not a file"):
            open_dataset(config_for(place), "train", 0)
    assert time.monotonic() - start < 1


def test_a_command_is_taken_from_the_command_line_alone():
    for values in (
        {"data": {"path": "pipe:touch x"}},
        {"data": {"val_path": "a.tar::PIPE:touch x"}},
    ):
        with pytest.raises(ValueError, match="data.*a.yaml: pipe: runs a command"):
            check_sources(TrainConfig, values, "a.yaml")
    check_sources(TrainConfig, {"data": {"path": "a pipe.tar"}}, "a.yaml")
    with pytest.raises(ValueError, match="write pipe: as it is"):
        open_dataset(config_for("pip{e:,}touch x"), "train", 0)


def test_the_same_tar_twice_and_validation_inside_training_are_said(tars, caplog):  # noqa: F811
    (tars / "again").symlink_to(tars / "0.tar")
    open_dataset(config_for(f"{tars}/0.tar::{tars}/again"), "train", 0)
    assert "0.tar twice" in caplog.text
    open_dataset(config_for(tars, val_path=f"{tars}/1.tar"), "val", 0)
    assert "1 of 1 places of data.val_path are trained on too" in caplog.text


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "d" / "0.tar", members(range(9)))
    assert len(open_dataset(config_for("~/{d,d}/0.tar::~/d", val_path="~/d"), "train", 0)) == 27
    dataset = open_dataset(config_for("~/d"), "train", 0)
    assert make_cache(dataset, "~/cache").parent == tmp_path / "cache"
    prepare_data(fill50k_config("~/made"), "train")
    open_dataset(config_for(f"pipe:cat {tmp_path}/d/0.tar", download="~/fetched"), "train", 0)
    assert sorted(os.listdir(tmp_path)) == ["cache", "d", "fetched", "made"]
    with pytest.raises(ValueError, match="there is no such user"):
        open_dataset(config_for("~nobody-of-this-name/d"), "train", 0)


@contextmanager
def serving(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_tar_replaced_behind_its_url_is_fetched_again(tmp_path, caplog):
    write_tar(tmp_path / "server" / "a.tar", members(range(6)))
    with serving(tmp_path / "server") as address:
        config = config_for(f"{address}/a.tar", download=str(tmp_path / "fetched"), shuffle=False)
        old = open_dataset(config, "train", 0)
        digest = old.digest()
        assert old[0]["captions"] == "picture 0"
        write_tar(tmp_path / "server" / "a.tar", members(range(10, 16)))
        os.utime(tmp_path / "server" / "a.tar", (10**9, 10**9))
        new = open_dataset(config, "train", 0)
        assert new[0]["captions"] == "picture 10" and new.digest() != digest
        assert "is another tar than was fetched" in caplog.text
        assert old[1]["captions"] == "picture 1"  # of the file that it holds open
        assert open_dataset(config, "train", 0).digest() == new.digest()
    assert (
        len(open_dataset(config, "train", 0)) == 5
        and "using what was fetched before" in caplog.text
    )
    assert len([n for n in os.listdir(tmp_path / "fetched") if n.endswith(".tar")]) == 1


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nabc"])
def test_a_server_that_stalls_is_given_up(tmp_path, monkeypatch, sent):
    monkeypatch.setattr(urls, "STALLED", 0.5)
    kept, server = [], socket.create_server(("127.0.0.1", 0))

    def answer():
        kept.append(server.accept()[0])
        kept[0].sendall(sent)

    threading.Thread(target=answer, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(ValueError, match="data.path: http.* cannot be fetched .timed out"):
        open_dataset(
            config_for(
                f"http://127.0.0.1:{server.getsockname()[1]}/a.tar", download=str(tmp_path / "f")
            ),
            "train",
            0,
        )
    assert time.monotonic() - start < 5 and not os.listdir(tmp_path / "f")
    server.close()


def test_a_command_that_prints_nothing_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(urls, "SLOW_COMMAND", 0.5)
    with pytest.raises(
        ValueError, match="pipe:sleep 60 cannot be fetched .nothing came for 0.5 seconds"
    ):
        open_dataset(config_for("pipe:sleep 60", download=str(tmp_path / "f")), "train", 0)
    assert not os.listdir(tmp_path / "f")


def test_a_command_that_fails_is_said_by_its_exit_code_alone(tmp_path, capfd):
    with pytest.raises(ValueError) as error:
        open_dataset(
            config_for("pipe:echo why >&2; exit 3", download=str(tmp_path / "f")), "train", 0
        )
    said = "cannot be fetched (its command ends with exit code 3, see above); check it"
    assert str(error.value) == f"data.path: pipe:echo why >&2; exit 3 {said}"
    assert capfd.readouterr().err == "why\n" and not os.listdir(tmp_path / "f")


def test_a_folder_for_fetched_tars_that_cannot_be_is_named(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(ValueError, match="^data.download=.*/f: .*; name a folder of your own"):
        open_dataset(config_for("pipe:true", download=str(tmp_path / "f")), "train", 0)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="where nobody makes a folder")
def test_a_folder_for_generated_pictures_that_cannot_be_is_named():
    with pytest.raises(ValueError, match="^data.path=/proc/x: .*; name a folder of your own"):
        prepare_data(config_for("/proc/x", kind="fill50k"), "train")


def test_a_fetch_that_ends_early_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", members(range(6)))
    data = (tmp_path / "0.tar").read_bytes()
    server = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection = server.accept()[0]
        connection.recv(1000)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(data) + 9) + data
        )
        connection.close()

    threads = [threading.Thread(target=answer, daemon=True) for _ in range(urls.ATTEMPTS)]
    for thread in threads:
        thread.start()
    with pytest.raises(ValueError, match=f"it ends after {len(data)} of {len(data) + 9} bytes"):
        open_dataset(
            config_for(
                f"http://127.0.0.1:{server.getsockname()[1]}/a.tar", download=str(tmp_path / "f")
            ),
            "train",
            0,
        )
    server.close()
    assert not os.listdir(tmp_path / "f")


def test_a_warm_up_longer_than_the_run_is_said(caplog):
    warn_of_warmup(TrainConfig(steps=501))
    assert not caplog.text
    warn_of_warmup(TrainConfig(steps=500))
    assert "optim.warmup=500 is not over when the run ends at steps=500" in caplog.text


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RecursionError(),
        ZeroDivisionError(),
        MemoryError(),
        AttributeError("no"),
        OverflowError(),
    ],
)
def test_whatever_a_decoder_raises_costs_one_sample(tmp_path, monkeypatch, error):
    write_tar(tmp_path / "0.tar", members(range(12)))
    turn = images.ImageOps.exif_transpose
    calls = []

    def odd(image):
        calls.append(image)
        if len(calls) == 3:
            raise error
        return turn(image)

    monkeypatch.setattr(images.ImageOps, "exif_transpose", odd)
    dataset = open_dataset(config_for(tmp_path, shuffle=False), "train", 0)
    bad = [dataset[i]["bad"] for i in range(6)]
    assert [len(entries) for entries in bad] == [
        0,
        0,
        1,
        0,
        0,
        0,
    ] and "0/002: unreadable picture" in bad[2][0]


def test_odd_captions_cost_a_sample_each_and_a_mark_is_no_part_of_one(tmp_path):
    odd = [
        b'"\\ud83d"',
        b'{"caption": "half \\ud83d"}',
        b"[" * 10**5,
        b'{"caption": {"a": 1}}',
        b'{"caption": 1e999}',
        b"\xff",
        b"{}",
    ]
    files = GOOD + [
        ("bom.png", colour("red")),
        ("bom.txt", "\ufeff red \n".encode()),
        ("bj.png", colour("red")),
    ]
    files += [("bj.json", json.dumps({"caption": "\ufeffred"}).encode())]
    for i, data in enumerate(odd):
        files += [(f"odd{i}.png", colour("red")), (f"odd{i}.json", data)]
    files += [("long.png", colour("red")), ("long.txt", b"x" * (1 << 21))]
    write_members(tmp_path / "0.tar", files)
    found = pairs_of(tmp_path)
    assert found["0/bom"] == found["0/bj"] == ("red", "red") and len(found) == 11
    dataset, bad = (
        open_dataset(config_for(tmp_path, shuffle=False, val_path=str(tmp_path)), "train", 0),
        set(),
    )
    for i in range(len(dataset)):
        bad |= set(dataset[i]["bad"])
    assert (
        len(bad) == 8
        and any("half a character" in entry for entry in bad)
        and any("a file of 2097152 bytes" in e for e in bad)
    )


def test_a_control_picture_is_the_same_by_its_path_and_opened(tmp_path):
    exif, base = Image.Exif(), Image.new("RGB", (48, 32), "blue")
    base.paste("red", (0, 0, 24, 32))
    exif[0x112] = 6
    base.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    base.save(tmp_path / "colour.png", transparency=(0, 0, 255))
    base.quantize(4).save(tmp_path / "palette.png", transparency=0)
    Image.new("I;16", (48, 32), 40000).save(tmp_path / "deep.png")
    for name in ("turned.jpg", "colour.png", "palette.png", "deep.png"):
        by_path = read_picture(str(tmp_path / name), 32, 48)
        assert (
            torch.equal(by_path, read_picture(Image.open(tmp_path / name), 32, 48))
            and by_path.std() + 1 > 1
        )
    assert (read_picture(str(tmp_path / "colour.png"), 32, 48)[:, 16, 40] == 1).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_loader_process_is_one_line(tmp_path, workers):
    write_tar(tmp_path / "0.tar", members(range(8)))
    dataset = open_dataset(config_for(tmp_path), "train", 0)
    write_tar(tmp_path / "0.tar", members(range(3, 11)))
    with pytest.raises(ValueError) as raised:
        batches(dataset, workers=workers)
    assert one_line(raised.value) == f"{tmp_path}/0.tar was changed while it is read: start again"


# --- cache ----------------------------------------------------------------------------------------


def read_all(dataset, folder):
    cached = CachedSamples(dataset, folder)
    return [cached[i] for i in range(len(cached))]


def test_a_byte_flipped_anywhere_in_a_cache_is_noticed(tars, tmp_path):  # noqa: F811
    dataset = open_dataset(config_for(tars), "train", 0)
    folder = make_cache(dataset, tmp_path / "cache")
    read_all(dataset, folder)
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        for position in [*range(min(24, len(data))), *range(24, len(data), 997), len(data) - 1]:
            file.write_bytes(
                data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]
            )
            with pytest.raises(
                ValueError, match="remove it|damaged|is not a key|is missing|cache.json"
            ) as raised:
                make_cache(dataset, tmp_path / "cache")
                read_all(dataset, folder)
            assert file.name in str(raised.value) or "the cache in" in str(raised.value)
        file.write_bytes(data)
    read_all(dataset, folder)


def test_a_cache_cut_while_it_is_read_is_an_error_and_no_signal(tars, tmp_path):  # noqa: F811
    dataset = open_dataset(config_for(tars, shuffle=False), "train", 0)
    folder = make_cache(dataset, tmp_path / "cache")
    cached = CachedSamples(dataset, folder)
    cached[0]
    os.truncate(folder / "000000-0000.safetensors", 3000)
    with pytest.raises(
        ValueError, match="000000-0000.safetensors is damaged .it is cut short.: remove it"
    ):
        cached[6]


def test_a_cache_of_an_earlier_version_is_named_with_the_remedy(tars, tmp_path):  # noqa: F811
    from safetensors.torch import load_file, save_file

    dataset = open_dataset(config_for(tars), "train", 0)
    file = make_cache(dataset, tmp_path / "cache") / "000001-0000.safetensors"
    save_file(load_file(file), file, {"bad": "{}"})
    with pytest.raises(
        ValueError,
        match="no checksum, as in files of earlier versions.: remove it, and it is made again",
    ):
        make_cache(dataset, tmp_path / "cache")
    file.unlink()
    read_all(dataset, make_cache(dataset, tmp_path / "cache"))


def write_captions(path, word):
    write_members(
        path / "0.tar",
        [(f"{i}.{e}", d) for i in range(4) for e, d in (("png", colour("red")), ("txt", word))],
    )


@pytest.mark.parametrize("writable", [True, False])
def test_contents_changed_at_the_same_length_make_a_cache_stale_and_a_new_time_does_not(
    tmp_path, monkeypatch, caplog, writable
):
    write_captions(tmp_path / "d", b"red")
    folder = make_cache(open_dataset(config_for(tmp_path / "d"), "train", 0), tmp_path / "cache")
    os.utime(tmp_path / "d" / "0.tar", ns=(5, 5))
    hashed, digest = [], cache_module.file_digest
    monkeypatch.setattr(
        cache_module, "file_digest", lambda shard: hashed.append(shard.path) or digest(shard)
    )
    if not writable:
        monkeypatch.setattr(cache_module, "atomic_file", read_only)
    for _ in range(2):
        with caplog.at_level(logging.INFO, "fluxlite"):
            make_cache(open_dataset(config_for(tmp_path / "d"), "train", 0), tmp_path / "cache")
    assert len(hashed) == (1 if writable else 2) and (folder / "times.json").exists() == writable
    assert ("cannot be written" in caplog.text) != writable
    write_captions(tmp_path / "d", b"tan")
    with pytest.raises(
        ValueError, match="is stale: .*0.tar has other contents than were encoded; remove it"
    ):
        make_cache(open_dataset(config_for(tmp_path / "d"), "train", 0), tmp_path / "cache")


def read_only(path):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def test_a_complete_cache_is_used_without_writing(tars, tmp_path):  # noqa: F811
    dataset = open_dataset(config_for(tars), "train", 0)
    folder = make_cache(dataset, tmp_path / "cache")
    before = {p: p.stat() for p in (folder, folder.parent, *folder.iterdir())}
    read_all(dataset, make_cache(dataset, tmp_path / "cache"))
    assert {p: p.stat().st_ctime_ns for p in before} == {
        p: about.st_ctime_ns for p, about in before.items()
    }


def test_the_digest_of_data_tells_contents_and_what_is_read_of_them(tmp_path):
    write_captions(tmp_path / "d", b"red")
    digests = [open_dataset(config_for(tmp_path / "d"), "train", 0).digest() for _ in range(2)]
    digests.append(
        open_dataset(config_for(tmp_path / "d", caption_field="text"), "train", 0).digest()
    )
    write_captions(tmp_path / "d", b"tan")
    digests.append(open_dataset(config_for(tmp_path / "d"), "train", 0).digest())
    write_captions(tmp_path / "d", b"longer")
    digests.append(open_dataset(config_for(tmp_path / "d"), "train", 0).digest())
    assert (
        digests[0] == digests[1] and len(set(digests)) == 4 and all(len(d) == 16 for d in digests)
    )


def test_servers_are_asked_once_and_the_first_rank_alone_warns(tmp_path, monkeypatch, caplog):
    """Of a whole run: training set, validation set, and whether they overlap."""
    for name in "ab":
        write_tar(tmp_path / "server" / f"{name}.tar", members(range(6)))
    with serving(tmp_path / "server") as address:
        where = dict(path=f"{address}/a.tar::{address}/a.tar", val_path=f"{address}/b.tar")
        config = config_for(**where, download=str(tmp_path / "fetched"))
        open_both(config)
        asked, real = [], urls.urlopen
        monkeypatch.setattr(
            urls, "urlopen", lambda r, **o: asked.append(r.full_url[-5:]) or real(r, **o)
        )
        caplog.clear()
        open_both(config)
        assert sorted(asked) == ["a.tar", "a.tar", "b.tar"]  # a is named twice
        assert [r.getMessage().count("twice") for r in caplog.records] == [2]
        monkeypatch.setenv("RANK", "1")
        caplog.clear()
        open_both(config)
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def open_both(config):
    """Both sets, as a run opens them."""
    settings = SimpleNamespace(data=config, model=SimpleNamespace(t5="a folder"), seed=0)
    return open_data(settings, None)


def test_a_json_of_another_program_may_hold_nan_and_not_be_nested_without_end(tmp_path, caplog):
    """img2dataset writes NaN for what it does not know."""
    good = b'{"caption": "red", "similarity": NaN, "mode": "canny"}'
    texts = {"a": good, "b": b"[" * 100_000, "c": b'{"caption": ', "d": b"\xff{}"}
    files = [(f"{key}.png", colour("red")) for key in texts]
    files += [(f"{key}.json", text) for key, text in texts.items()]
    write_members(tmp_path / "0.tar", sorted(files))
    config = config_for(tmp_path, shuffle=False, max_bad_fraction=1.0, val_path=str(tmp_path))
    dataset = open_dataset(config, "train", 0)
    sample = dataset[0]
    assert sample["captions"] == "red" and sample["bad"] == []
    bad = dataset[1]["bad"]
    assert [entry.split(": ")[0] for entry in bad] == ["0/b", "0/c", "0/d"]
    assert "nested too deeply" in bad[0] and all("unreadable caption" in b for b in bad)


def test_rows_of_nonsense_behind_a_right_checksum_are_a_damaged_file(tmp_path):
    rows = tmp_path / "rows.safetensors"
    write_rows(rows, {"x": torch.zeros(2, 3)}, {})
    whole = rows.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    for text in (b"[" * 100_000 + CHECKSUM_MEMBER, b'{"x": NaN,' + CHECKSUM_MEMBER + b"}", b"{}"):
        write_header(rows, text if text != b"{}" else header.replace(b'"dtype"', b'"d"'))
        with pytest.raises(ValueError, match="rows.safetensors is damaged .no header of ours"):
            RowFile(rows)
    rows.write_bytes((1 << 40).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="rows.safetensors is damaged .no whole header"):
        RowFile(rows)


CHECKSUM_MEMBER = b'"checksum":"00000000"'


def write_header(path, text):
    """A file of rows with this header, its checksum made right, and no rows."""
    text = CHECKSUM.sub(CHECKSUM_MEMBER, text)
    length = len(text).to_bytes(8, "little")
    checksum = f'"checksum":"{zlib.crc32(length + text):08x}"'.encode()
    path.write_bytes(length + text.replace(CHECKSUM_MEMBER, checksum, 1))


# --- writers --------------------------------------------------------------------------------------


@contextmanager
def small_files(limit):
    """Files may not grow beyond `limit` bytes: as on a full disk, a write fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def visible(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("writer", ["cache", "generator", "fetch"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tars, tmp_path, writer):  # noqa: F811
    work = tmp_path / "work"
    work.mkdir()

    def write():
        if writer == "cache":
            make_cache(open_dataset(config_for(tars), "train", 0), work)
        elif writer == "generator":
            prepare_data(fill50k_config(work / "made"), "train")
        else:
            open_dataset(config_for(f"pipe:cat {tars}/0.tar", download=str(work)), "train", 0)

    with small_files(4000), pytest.raises(OSError) as raised:
        write()
    line = one_line(raised.value)
    assert str(work) in line and "File too large" in line and "\n" not in line
    for name in visible(work):  # what is there is whole
        assert name.endswith("cache.json") or RowFile(work / name).row("txt", 0) is not None
    write()
    assert visible(work)


def hold_and_die(path, folder, ready):
    if folder:
        with atomic_folder(path) as aside:
            (aside / "half").write_bytes(b"half")
            ready.set()
            time.sleep(60)
    with atomic_file(path) as file:
        file.write(b"half of a longer text")
        file.flush()
        ready.set()
        time.sleep(60)


@pytest.mark.parametrize("folder", [False, True])
def test_a_killed_writer_leaves_nothing_that_the_next_does_not_remove(tmp_path, folder):
    context, path = multiprocessing.get_context("fork"), tmp_path / "x"
    ready = context.Event()
    process = context.Process(target=hold_and_die, args=(path, folder, ready))
    process.start()
    assert ready.wait(20)
    process.kill()
    process.join()
    assert os.listdir(tmp_path) and not path.exists()
    if folder:
        with atomic_folder(path) as aside:
            assert not os.listdir(aside)
            (aside / "whole").write_bytes(b"whole")
    else:
        with atomic_file(path) as file:
            file.write(b"whole")
    assert (
        os.listdir(tmp_path) == ["x"]
        and (path / "whole" if folder else path).read_bytes() == b"whole"
    )


def test_a_running_generators_folder_is_waited_for_and_the_wait_is_said(tmp_path, caplog):
    data, ready, done = tmp_path / "data", threading.Event(), threading.Event()

    def slow_samples():
        drawn = list(fill50k.generated_samples(40, size=32, seed=0))
        yield from drawn[:20]
        ready.set()
        done.wait(20)
        yield from drawn[20:]

    about = {"count": 40, "size": 32}
    other = threading.Thread(
        target=lambda: fill50k.write_shards(slow_samples(), data / "train", about=about)
    )
    other.start()
    assert ready.wait(20)
    waiting = threading.Thread(target=lambda: prepare_data(fill50k_config(data), "train"))
    waiting.start()
    deadline = time.monotonic() + 20
    while (
        "waiting for another process, which holds" not in caplog.text
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    assert (
        f"{data}/.train.lock" in caplog.text
        and (data / ".train.part").is_dir()
        and waiting.is_alive()
    )
    done.set()
    other.join()
    waiting.join()
    assert len(open_dataset(fill50k_config(data), "train", 0)) == 40 and os.listdir(data) == [
        "train"
    ]


def test_a_lock_lets_one_in_at_a_time_and_goes(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path / ".lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 80 and not os.listdir(tmp_path)


def test_a_link_laid_where_a_file_is_written_is_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / ".x.part").symlink_to("victim")
    with pytest.raises(OSError), atomic_file(tmp_path / "x"):
        pass
    assert (tmp_path / "victim").read_bytes() == b"mine"
    shutil.rmtree(tmp_path)


def test_a_disk_without_locks_is_said_once_and_written_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(atomic, "_unlockable", set())
    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    for name in "abc":
        with atomic_file(tmp_path / name) as file:
            file.write(name.encode())
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["a", "b", "c"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and ".a.part and files beside it cannot be locked: Op" in said[0]
