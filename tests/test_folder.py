import io
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import last_of_each
from test_data import batches, picture, write_tar
from test_trainer import ROOT, SMALL, configure, train

from fluxlite import parallel
from fluxlite.data.buckets import nearest_shapes
from fluxlite.data.cache import CachedSamples, build_cache
from fluxlite.data.config import DataConfig, bucket_shapes
from fluxlite.data.folders import split_file
from fluxlite.data.opening import open_dataset
from fluxlite.data.order import GroupedOrder, SampleOrder
from fluxlite.data.shards import Samples
from fluxlite.nets.latents import pack_latents
from fluxlite.settings import TrainConfig
from fluxlite.train import setup, training_step
from fluxlite.train.draws import draw_step

# pictures of three proportions: width and height
SIZES = ((32, 32), (64, 32), (32, 64))
LENIENT = dict(max_bad_fraction=0.5)


def write_folder(folder, numbers, *, captions=True, sizes=((32, 32),)):
    """Pictures whose captions tell their number, in two folders; {name: bytes} of all files."""
    files = {}
    for i in numbers:
        name = f"{'a/b' if i % 2 else 'a'}/{i:02d}"
        files[f"{name}.jpg"] = picture(i, size=sizes[i % len(sizes)])
        files |= {f"{name}.txt": f"picture {i}".encode()} if captions else {}
    write_files(folder, files)
    return files


def write_files(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def settings(path, **changes):
    path = path and str(path)
    defaults = dict(kind="folder", path=path, height=32, width=32, val_count=1, workers=0)
    config = DataConfig(**(defaults | dict(caption_dropout=0.0, global_batch=4) | changes))
    config.validate()
    return config


def opened(path, split="train", **changes):
    return open_dataset(settings(path, **changes), split, 0)


def captions_of(dataset, count=None):
    return [dataset[i]["captions"] for i in range(count or len(dataset))]


def grey_levels(array):
    """A picture of one channel as the bytes of a PNG."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,expected",
    [
        ("a.jpg", ("a", "jpg")),
        ("b/v1.5.JPG", ("b/v1.5", "jpg")),
        ("b/v1.5.mask.png", ("b/v1.5", "mask.png")),
        ("v1.5.ref.webp", ("v1.5", "ref.webp")),
        ("a.control.png", ("a", "control.png")),
        ("a.depth.png", ("a.depth", "png")),
        (".hidden.jpg", None),
        ("a/.cache/b.jpg", None),
        ("README", None),
    ],
)
def test_a_files_name_is_a_key_up_to_its_last_dot_and_an_ending(name, expected):
    assert split_file(name) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_gives_the_samples_of_a_tar_of_it_in_the_same_order(tmp_path, workers):
    files = write_folder(tmp_path / "photos", range(9))
    write_tar(tmp_path / "photos.tar", dict(sorted(files.items())))
    both = []
    for kind, path in (("folder", "photos"), ("webdataset", "photos.tar")):
        dataset = opened(tmp_path / path, kind=kind)
        assert len(dataset) == 8
        both.append(batches(dataset, ranks=2, workers=workers, global_batch=4, stop=24))
    for a, b in zip(*(sum(ranks, []) for ranks in both)):
        assert a["captions"] == b["captions"] and a["indices"].tolist() == b["indices"].tolist()
        assert torch.equal(a["images"], b["images"])


def test_captions_come_from_txt_caption_and_metadata_and_pictures_are_of_any_kind(tmp_path):
    lines = [{"file_name": "c.bmp", "text": "c"}, {"file_name": "sub/d.tif", "caption": "d"}]
    lines += [{"file_name": "b.WEBP", "mode": 1}]  # whose caption lies beside it
    files = {
        "a.png": picture(0, "png"),
        "a.txt": b"a",
        "a.caption": b"not read beside a txt",
        "b.WEBP": picture(1, "webp"),
        "b.caption": b"b\n",
        "c.bmp": picture(2, "bmp"),
        "sub/d.tif": picture(3, "tiff"),
        "metadata.jsonl": "\n".join(map(json.dumps, lines)).encode(),
    }
    write_files(tmp_path, files | {".DS_Store": b"?", ".thumbs/x.jpg": b"?"})
    dataset = opened(tmp_path, shuffle=False)
    assert captions_of(dataset) == ["a", "b", "c"]
    assert captions_of(opened(tmp_path, "val"), 1) == ["d"]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_a_picture_is_turned_as_its_camera_says_before_its_bucket_is_chosen(tmp_path, ending):
    image, exif = Image.new("RGB", (64, 32), "red"), Image.Exif()
    exif[274] = 6
    for i in range(2):
        image.save(tmp_path / f"{i}.{ending}", exif=exif)
        (tmp_path / f"{i}.txt").write_text("red")
    dataset = opened(tmp_path, height=48, width=48, buckets=True, bucket_step=16)
    assert dataset[0]["images"].shape == (3, 64, 32)


def test_what_a_folder_holds_beside_samples_is_told(tmp_path, caplog):
    write_folder(tmp_path, range(3))
    write_files(tmp_path, {"a/00.mask.png": picture(9, "png"), "IMG.HEIC": b"?", "notes.txt": b"n"})
    assert len(opened(tmp_path)) == 2
    assert "1 captions have no picture" in caplog.text and "notes first" in caplog.text
    assert "3 files are not read" in caplog.text and "IMG.HEIC first" in caplog.text


@pytest.mark.parametrize("name", ["x.jpg", "x.txt", "x.mask.png"])
@pytest.mark.parametrize("made", [os.mkfifo, partial(os.symlink, "nowhere")])
def test_what_is_no_file_costs_its_sample_and_is_not_waited_for(tmp_path, caplog, name, made):
    mask = grey_levels(np.eye(32) * 255)
    write_folder(tmp_path, range(3))
    write_files(tmp_path, {"x.jpg": picture(1), "x.txt": b"x", "x.mask.png": mask})
    write_files(tmp_path, {"a/00.mask.png": mask})
    (tmp_path / name).unlink()
    made(tmp_path / name)
    dataset = opened(tmp_path, mask=None if "mask" not in name else "mask.png", **LENIENT)
    assert len(dataset) == 2 and not dataset[0]["bad"]
    assert re.search(r"skipped .*/x: .*x\S+( is not a file|: No such file)", caplog.text)


def test_what_is_not_read_changes_no_digest_and_what_is_does(tmp_path):
    write_folder(tmp_path, range(3))
    digests = lambda: (opened(tmp_path).digest(), opened(tmp_path).layout_digest())  # noqa: E731
    before = digests()
    write_files(tmp_path, {".DS_Store": b"?", "a/Thumbs.db": b"?", "a/b/00.md": b"?"})
    assert digests() == before and len(captions_of(opened(tmp_path))) == 2
    write_files(tmp_path, {"a/000.jpg": picture(9), "a/000.txt": b"new"})
    assert not set(digests()) & set(before)


def test_of_two_links_to_a_folder_the_first_by_name_is_followed(tmp_path, monkeypatch):
    def other_way(*where, **options):
        for folder, below, files in walk(*where, **options):
            below.sort(reverse=bool(found))  # as another disk has them
            yield folder, below, files

    write_folder(tmp_path / "sub", range(3))
    walk, found = os.walk, []
    for name in ("link", "zlink"):
        os.symlink("sub", tmp_path / name)
    monkeypatch.setattr(os, "walk", other_way)
    for _ in range(2):
        found.append(opened(tmp_path)[0]["keys"])
    assert found[0] == found[1] and "/link/" in found[0]


@pytest.mark.parametrize(
    "data,said",
    [
        ("a fóx".encode("utf-16"), None),
        ("a fox".encode("utf-16-be"), "zero bytes, as UTF-16 .*save it as UTF-8"),
        ("a fóx".encode("latin-1"), "unreadable caption .*save it as UTF-8"),
        (b" \r\n", "an empty caption"),
        (b"x" * (1 << 21), "a file of 2097152 bytes"),
    ],
)
def test_captions_are_read_before_a_run_begins(tmp_path, caplog, data, said):
    write_folder(tmp_path, range(3))
    write_files(tmp_path, {"a/00.txt": data})
    if said:
        with pytest.raises(ValueError, match=f"1 of 3 samples .*a/00: .*{said}"):
            opened(tmp_path)
    else:
        assert "a fóx" in captions_of(opened(tmp_path))


def test_a_line_without_a_picture_is_told_whether_it_has_a_caption_or_not(tmp_path, caplog):
    write_folder(tmp_path, range(3))
    lines = b'{"file_name": "gone.jpg"}\n{"file_name": "lost.jpg", "text": "x"}\n'
    write_files(tmp_path, {"metadata.jsonl": lines})
    opened(tmp_path)
    assert "2 captions have no picture: that of" in caplog.text and "gone first" in caplog.text


@pytest.mark.parametrize(
    "files,said",
    [
        ({"1.heic": b"", "1.txt": b"x", "2.HEIC": b""}, "2 of .heic, 1 of .txt: convert them"),
        ({"1.tar": b""}, "1 of .tar: set data=webdataset"),
        ({"LICENSE": b""}, "1 of no ending: convert"),
    ],
)
def test_a_folder_without_pictures_says_what_it_holds(tmp_path, files, said):
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=rf"holds no picture \(jpg, .*\), but {said}"):
        opened(tmp_path)


def test_pictures_smaller_than_they_are_trained_are_told(tmp_path, caplog):
    write_folder(tmp_path, range(4), sizes=((32, 32), (64, 32), (8, 40)))
    opened(tmp_path)
    assert "1 of 3 samples are smaller" in caplog.text and "a/02 most: 4.0 times" in caplog.text


@pytest.mark.parametrize("key", ["output", "data.cache"])
def test_nothing_is_written_among_the_pictures(tmp_path, key):
    write_folder(tmp_path, range(3))
    with pytest.raises(ValueError, match=f"{key}=.*/runs lies in data.path="):
        configure(*RUN, "data=folder", f"data.path={tmp_path}", f"{key}={tmp_path}/runs")


def test_a_bare_png_beside_a_jpg_is_the_control_where_one_is_asked_for(tmp_path):
    write_folder(tmp_path, range(2))
    for name in ("a/00", "a/b/01"):
        write_files(tmp_path, {f"{name}.png": grey_levels(np.full((32, 32), 7))})
    assert "controls" not in opened(tmp_path)[0]
    assert (opened(tmp_path, control="png")[0]["controls"] == 7).all()


def test_a_file_that_changes_while_it_is_read_stops_the_run_and_a_touched_one_does_not(tmp_path):
    write_folder(tmp_path, range(3))
    dataset = opened(tmp_path)
    (tmp_path / "a" / "00.jpg").touch()
    assert sorted(captions_of(dataset)) == ["picture 0", "picture 2"]
    (tmp_path / "a" / "00.txt").write_text("another caption")
    again = Samples(dataset.config, dataset.shards, seed=0, training=True)
    with pytest.raises(ValueError, match="00.txt was changed while it is read"):
        captions_of(again)


def misuse(tmp_path, name):
    """A folder with a fault, and settings."""
    folder = tmp_path / "photos"
    write_folder(folder, range(4))
    more = {
        "mask without picture": {"x.mask.png": picture(1, "png")},
        "mask of another size": {"a/00.mask.png": picture(1, "png", (32, 20))},
        "unreadable": {"a/00.jpg": b"no picture"},
        "pointer": {"a/00.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:1"},
        "heic": {"a/00.jpg": b"\0\0\0\x18ftypheic"},
        "far lines": {"metadata.jsonl": b'\n{"file_name": "../y.jpg", "text": "a"}\n'},
        "lines twice": {"metadata.jsonl": b'{"file_name": "a/00.jpg", "text": "a"}\n' * 2},
        "hidden lines": {"metadata.jsonl": b'{"file_name": ".y.jpg", "text": "a"}\n'},
        "no caption": {"x.jpg": picture(1)},
        "two of a name": {"a/00.jpeg": picture(1)},
        "bad lines": {"metadata.jsonl": b'{"text": "a"}\n'},
        "lines without a caption": {
            "x.jpg": picture(1),
            "metadata.jsonl": b'{"file_name": "x.jpg", "text": ""}\n',
        },
    }
    write_files(folder, more.get(name, {}))
    return folder


@pytest.mark.parametrize(
    "name,changes,said",
    [
        ("mask without picture", dict(mask="mask.png"), "x: no picture"),
        ("mask of another size", dict(mask="mask.png"), "a/00: its mask: .*32x20.*32x32"),
        ("unreadable", {}, "a/00: no picture of a known format, but a text file"),
        ("pointer", {}, "a/00: no picture of a known format, but a Git LFS pointer"),
        ("heic", {}, "a/00: no picture of a known format, but HEIC"),
        ("far lines", {}, "metadata.jsonl line 2: '../y.jpg' is no picture in its folder"),
        ("lines twice", {}, "metadata.jsonl line 2: 'a/00.jpg' has a line already"),
        ("hidden lines", {}, "metadata.jsonl line 1: '.y.jpg' is no picture in its folder"),
        ("no caption", {}, "x: no caption"),
        ("lines without a caption", {}, "x: no caption"),
        ("two of a name", {}, "a/00: several pictures"),
        ("bad lines", {}, 'metadata.jsonl line 1 must be an object with a "file_name"'),
        ("", dict(path="{}/nothing"), "nothing does not exist: name a folder of pictures"),
        ("", dict(path="{}/a/00.jpg"), "00.jpg is a file: name a folder of pictures"),
        ("", dict(val_count=4), "holds 4 samples: set data.val_count below that"),
        ("", dict(mask="alpha"), "data.mask=alpha: no picture has transparency"),
        ("", dict(repeats=[1.0, 2.0]), "data.repeats= is given 2 times, and data.path= names 1"),
        ("", dict(template=["sks {caption}"]), "data.template=sks {caption}: write a caption"),
        ("", dict(template=["[]"]), r"data.template=\[\]: write a caption"),
        ("", dict(mask="white"), "data.mask=white: choose an ending"),
        ("", dict(mask="png", control="png"), "data.mask=png is data.control= too"),
        ("", dict(buckets=True), "data.bucket_step=64 is wider than a picture"),
        ("", dict(resolutions=[32, 32]), "names one twice"),
        ("", dict(path=None), "data=folder needs data.path="),
        ("", dict(loss_weight=[0.0]), "data.loss_weight=0.0 must be above 0"),
    ],
)
def test_a_misuse_is_one_line_that_names_the_fault(tmp_path, name, changes, said):
    folder = misuse(tmp_path, name)
    path = changes.get("path", "{}")
    with pytest.raises(ValueError, match=said) as error:
        opened(path and path.format(folder), **{k: v for k, v in changes.items() if k != "path"})
    assert "\n" not in str(error.value)


def test_a_single_picture_is_shown_the_way_that_there_is(tmp_path):
    write_folder(tmp_path, range(1))
    with pytest.raises(ValueError, match="holds 1 samples: none is left .*: set data.val_path="):
        opened(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="0 of 0 samples in 1 folders cannot be used.*empty"):
        opened(tmp_path)


# --- sources --------------------------------------------------------------------------------------


def test_repeats_say_how_often_an_epoch_has_a_sample(tmp_path):
    write_folder(tmp_path / "own", range(4))
    write_folder(tmp_path / "prior", range(10, 16))
    path = f"{tmp_path}/own::{tmp_path}/prior"
    dataset = opened(path, repeats=[3.0, 0.5])
    assert len(dataset) == 3 * 3 + 3  # one of the first place is validation's
    epochs = [Counter(captions_of(dataset)), Counter()]
    epochs[1].update(dataset[i]["captions"] for i in range(12, 24))
    own = [f"picture {i}" for i in (0, 2, 1)]
    for epoch in epochs:
        assert all(epoch[name] == 3 for name in own) and epoch["picture 3"] == 0
    assert set(epochs[0] | epochs[1]) == {*own, *(f"picture {i}" for i in range(10, 16))}
    assert captions_of(opened(path, "val"), 1) == ["picture 3"]


@pytest.mark.parametrize("shuffle", [True, False])
def test_without_repeats_an_epoch_has_each_number_once_and_fractions_take_turns(shuffle):
    order = SampleOrder([4, 6], seed=0, shuffle=shuffle, window=1, repeats=[1, 1 / 3])
    epochs = [list(order.following(8 * 0 + 6 * e)) for e in range(3)]
    assert all(sorted(epoch)[:4] == [0, 1, 2, 3] for epoch in epochs)
    assert sorted(n for epoch in epochs for n in epoch if n > 3) == [*range(4, 10)]


def test_templates_hold_the_caption_or_are_it(tmp_path):
    write_folder(tmp_path / "own", range(2))
    write_folder(tmp_path / "prior", range(2, 4), captions=False)
    path = f"{tmp_path}/own::{tmp_path}/prior"
    dataset = opened(path, template=["sks, {}", "a photo"], shuffle=False)
    assert captions_of(dataset) == ["sks, picture 0", "a photo", "a photo"]


def test_tars_take_sources_too(tmp_path):
    for name, numbers in (("own", range(3)), ("prior", range(5, 8))):
        files = {f"{i}.{e}": d for i in numbers for e, d in (("jpg", picture(i)), ("txt", b"x"))}
        write_tar(tmp_path / f"{name}.tar", files)
    path = f"{tmp_path}/own.tar::{tmp_path}/prior.tar"
    more = dict(repeats=[2.0, 1.0], template=["sks {}", "{}"], loss_weight=[1.0, 0.25])
    dataset = opened(path, kind="webdataset", **more)
    samples = [dataset[i] for i in range(7)]
    found = Counter((s["captions"], s["weights"].item()) for s in samples)
    assert found == {("sks x", 1.0): 4, ("x", 0.25): 3}


def test_a_folder_within_another_is_told(tmp_path, caplog):
    write_folder(tmp_path, range(5))
    opened(f"{tmp_path}::{tmp_path}/a/b")
    assert "a/b twice: its samples come twice an epoch" in caplog.text


def test_a_folder_named_as_kohyas_is_told_to_give_its_repeats(tmp_path, caplog):
    write_folder(tmp_path / "10_dog", range(3))
    opened(tmp_path)
    assert "10_dog: its name's repeats are not read" in caplog.text


# --- resolutions and buckets ----------------------------------------------------------------------


def test_buckets_have_no_more_pixels_than_asked_for_and_are_nearest_in_proportion():
    shapes = bucket_shapes(512 * 512, 64)
    assert (512, 512) in shapes and (768, 320) in shapes and (320, 768) in shapes
    assert all(h * w <= 512 * 512 and h % 64 == w % 64 == 0 for h, w in shapes)
    assert max(max(h / w, w / h) for h, w in shapes) < 3.3
    sizes = np.array([(1000, 1000), (4000, 3000), (100, 300), (100, 10_000)])
    shard = SimpleNamespace(sizes=sizes, keys=sizes)
    assert nearest_shapes(shard, shapes).tolist() == [
        [512, 512],
        [448, 576],
        [832, 256],
        [832, 256],
    ]


def grouped(lengths, size, shuffle=True):
    groups, first = [], 0
    for length in lengths:
        order = SampleOrder([length], seed=1, shuffle=shuffle, window=1)
        groups.append((np.arange(first, first + length), order))
        first += length
    return GroupedOrder(groups, size=size, seed=1, shuffle=shuffle)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("lengths,size", [([7, 3, 1], 4), ([5], 2), ([2, 1], 8), ([40, 24], 1)])
def test_every_batch_is_of_one_group_and_each_has_its_share(lengths, size, shuffle):
    order, total = grouped(lengths, size, shuffle), sum(lengths)
    ends = np.cumsum(lengths)
    numbers = [next(order.following(i)) for i in range(size * total * 2)]
    for start in range(0, len(numbers), size):
        assert len({np.searchsorted(ends, n, "right") for n in numbers[start : start + size]}) == 1
    # size epochs have whole batches of every group: each sample came as often as any other
    counts = Counter(numbers[: size * total])
    assert set(counts.values()) == {size}
    assert [next(order.following(i)) for i in range(9)] == numbers[:9]


def test_one_group_is_in_the_order_that_it_has_without_groups():
    order, plain = grouped([7], 4), SampleOrder([7], seed=1, shuffle=True, window=1)
    for index in range(20):
        assert list(order.following(index)) == list(plain.following(index))


BUCKETS = dict(height=48, width=48, buckets=True, bucket_step=16, micro_batch=2)


def test_batches_of_two_ranks_are_of_one_shape_and_of_the_same_samples_as_one_ranks(tmp_path):
    write_folder(tmp_path, range(11), sizes=SIZES)
    dataset = opened(tmp_path, **BUCKETS)
    how = dict(micro_batch=2, global_batch=4, stop=40)
    ranks = batches(dataset, ranks=2, **how)
    assert len(ranks[0]) == len(ranks[1]) == 10
    shapes = [batch["images"].shape for batch in ranks[0]]
    assert shapes == [batch["images"].shape for batch in ranks[1]] and len(set(shapes)) == 3
    (alone,) = batches(dataset, ranks=1, **how)
    dealt = [keys for pair in zip(*ranks) for batch in pair for keys in batch["keys"]]
    assert dealt == [key for batch in alone for key in batch["keys"]]
    (later,) = batches(dataset, ranks=1, start=20, workers=2, **how)
    assert [b["keys"] for b in later] == [b["keys"] for b in alone[10:]]


def test_each_sample_is_trained_at_each_resolution(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_folder(tmp_path, range(4), sizes=SIZES)
    dataset = opened(tmp_path, resolutions=[32, 48], global_batch=1)
    assert len(dataset) == 6
    found = Counter((dataset[i]["captions"], dataset[i]["images"].shape[1]) for i in range(6))
    assert found == {(f"picture {i}", side): 1 for i in (0, 2, 1) for side in (32, 48)}
    assert "bucket 32 x 32: 3 samples" in caplog.text and "bucket 48 x 48: 3" in caplog.text
    assert opened(tmp_path, "val", resolutions=[48])[0]["images"].shape == (3, 32, 32)


def test_a_step_shifts_t_by_its_own_shapes_tokens():
    config = TrainConfig()
    shapes = [torch.zeros(3, side, side, dtype=torch.uint8) for side in (256, 1024)]
    small, large = (draw_step(config, {"indices": 3, "images": shape}) for shape in shapes)
    assert (len(small["noise"]), len(large["noise"])) == (256, 4096)
    odds = [s["t"] / (1 - s["t"]) for s in (small, large)]
    assert torch.allclose(odds[1] / odds[0], torch.tensor(0.65).exp(), rtol=1e-4)


# --- masks ----------------------------------------------------------------------------------------


def masked_folder(folder, count=4):
    """Pictures with a mask of which the left half is white; the last has none."""
    write_folder(folder, range(count))
    mask = np.zeros((32, 32))
    mask[:, :16] = 255
    for i in range(count - 1):
        write_files(folder, {f"{'a/b' if i % 2 else 'a'}/{i:02d}.mask.png": grey_levels(mask)})
    return mask


def test_masks_are_of_files_or_of_the_pictures_alpha(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mask = masked_folder(tmp_path / "files")
    dataset = opened(tmp_path / "files", mask="mask.png", val_count=1)
    for sample in (dataset[i] for i in range(3)):
        assert torch.equal(sample["masks"], torch.tensor(mask, dtype=torch.uint8)[None])
    assert (opened(tmp_path / "files", "val", mask="mask.png")[0]["masks"] == 255).all()
    rgba = Image.new("RGBA", (32, 32), "red")
    rgba.putalpha(Image.fromarray(mask.astype(np.uint8)))
    (tmp_path / "alpha").mkdir()
    for i in range(2):
        rgba.save(tmp_path / "alpha" / f"{i}.png")
        (tmp_path / "alpha" / f"{i}.txt").write_text("red")
    sample = opened(tmp_path / "alpha", mask="alpha")[0]
    assert torch.equal(sample["masks"], torch.tensor(mask, dtype=torch.uint8)[None])
    assert sample["images"][:, 0, 0].tolist() == [255, 0, 0]
    assert "0 of 3 samples have no mask" in caplog.text


def test_masks_follow_the_crop_and_the_flip_of_their_picture(tmp_path):
    mask = np.zeros((40, 60))
    mask[10:30, 5:25] = 255
    for i in range(3):
        both = {f"{i}.png": grey_levels(mask), f"{i}.mask.png": grey_levels(mask), f"{i}.txt": b"x"}
        write_files(tmp_path, both)
    dataset = opened(tmp_path, mask="mask.png", crop="random", flip=True)
    for sample in (dataset[i] for i in range(8)):
        white, bright = sample["masks"][0] > 127, sample["images"][0] > 127
        assert (white != bright).float().mean() < 0.02 < white.float().mean() < 0.98


def test_a_black_mask_is_a_bad_sample(tmp_path):
    write_folder(tmp_path, range(3))
    write_files(tmp_path, {"a/00.mask.png": grey_levels(np.zeros((32, 32)))})
    dataset = opened(tmp_path, mask="mask.png", max_bad_fraction=1.0)
    assert "black where its picture is seen" in str([dataset[i]["bad"] for i in range(2)])


def test_a_transparent_mask_is_a_bad_sample(tmp_path):
    """A figure in white on nothing would count whole: nothing is white to a picture."""
    mask = Image.new("RGBA", (32, 32), "#ffffff00")
    mask.paste("white", (8, 8, 24, 24))
    write_folder(tmp_path, range(3))
    mask.save(tmp_path / "a/00.mask.png")
    dataset = opened(tmp_path, mask="mask.png", max_bad_fraction=1.0)
    assert "transparent, which is neither" in str([dataset[i]["bad"] for i in range(2)])


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_mask_that_is_black_where_its_picture_is_cropped_is_a_bad_sample(tmp_path, crop):
    mask = np.zeros((32, 96))
    mask[:, :8] = 255
    write_folder(tmp_path, range(3), sizes=((96, 32), (32, 32)))
    write_files(tmp_path, {"a/00.mask.png": grey_levels(mask)})
    dataset = opened(tmp_path, mask="mask.png", crop=crop, max_bad_fraction=1.0)
    bad = str([dataset[i]["bad"] for i in range(8)])
    assert ("black where its picture is seen" in bad) == (crop == "center")


def test_alpha_counts_whole_where_a_picture_has_none(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_folder(tmp_path, range(3))
    Image.new("RGBA", (32, 32), "#ff000080").save(tmp_path / "a/0.png")
    (tmp_path / "a/0.txt").write_text("red")
    dataset = opened(tmp_path, mask="alpha", shuffle=False)
    assert [float(dataset[i]["masks"].float().mean()) for i in range(3)] == [128, 255, 255]
    assert "2 of 3 samples have no mask" in caplog.text


def test_the_loss_is_the_mean_of_errors_times_masks_and_weights():
    run = SimpleNamespace(
        config=TrainConfig(), latent_shape=(2, 2, 4), rope=None, dtype=torch.float32
    )
    run.flux = SimpleNamespace(config=SimpleNamespace(guidance_embed=False))
    generator = torch.Generator().manual_seed(0)
    velocity, x0, noise = torch.randn(3, 2, 2, 8, generator=generator)
    run.velocity = lambda *inputs, **conditions: velocity
    masks = torch.zeros(2, 1, 16, 32, dtype=torch.uint8)
    masks[0, 0, :8, :8] = 255  # the first cell, and half of the second
    masks[0, 0, :4, 8:16] = 255
    masks[1] = 51
    batch = {"masks": masks, "weights": torch.tensor([1.0, 0.5])}
    weights = training_step.value_weights(run, batch)
    t = torch.tensor([0.3, 0.6])
    shared = dict(noise=noise, t=t, guidance=None)
    losses = training_step.flow_loss(
        run, x0, torch.zeros(2, 1, 1), torch.zeros(2, 1), weights=weights, **shared
    )
    cells = torch.zeros(2, 2, 2, 4)
    cells[0, :, 0, 0], cells[0, :, 0, 1], cells[1] = 1, 0.5, 0.2 * 0.5
    errors = (velocity - (noise - x0)).square()
    by_hand = (errors * pack_latents(cells)).sum((1, 2)) / 16
    assert torch.allclose(losses, by_hand)
    assert training_step.value_weights(run, {}) is None


# --- the cache ------------------------------------------------------------------------------------


def encode_images(levels):
    """A posterior that tells the picture and its shape."""
    cells = levels[..., ::8, ::8].float()
    return cells, cells - 1


def encode_texts(texts):
    rows = torch.stack([torch.tensor([hash_of(text)] * 4) for text in texts])
    return rows[:, None], rows


def hash_of(text):
    return float(sum((i + 1) * byte for i, byte in enumerate(text.encode())))


def test_the_cache_holds_shapes_masks_weights_and_templates(tmp_path):
    write_folder(tmp_path / "own", range(7), sizes=SIZES)
    write_files(tmp_path / "own", {"a/00.mask.png": grey_levels(np.eye(32) * 255)})
    write_folder(tmp_path / "prior", range(10, 14))
    path = f"{tmp_path}/own::{tmp_path}/prior"
    more = dict(template=["sks {}", "{}"], loss_weight=[1.0, 0.5], mask="mask.png")
    more |= BUCKETS | dict(resolutions=[32, 48], caption_dropout=0.3)
    dataset = opened(path, **more)
    how = dict(encode_images=encode_images, encode_texts=encode_texts, digest="d")
    cached = CachedSamples(dataset, build_cache(dataset, tmp_path / "cache", **how))
    assert len(dataset.order.groups) == 6 and len(cached) == 20
    for index in range(24):
        plain, row = dataset[index], cached[index]
        assert (plain["keys"], plain["weights"]) == (row["keys"], row["weights"])
        assert torch.equal(encode_images(plain["images"])[0], row["mean"])
        assert torch.equal(plain["masks"], row["masks"])
        assert row["pooled"][0] == hash_of(plain["captions"])
    assert {tuple(cached[i]["mean"].shape) for i in range(96)} == {
        (3, h // 8, w // 8) for h, w in ((32, 32), (16, 48), (48, 16), (48, 48), (32, 64), (64, 32))
    }


def test_a_changed_picture_mask_or_bucket_makes_a_cache_stale(tmp_path):
    folder, how = tmp_path / "photos", dict(encode_images=encode_images, encode_texts=encode_texts)
    masked_folder(folder)
    make = lambda **changes: build_cache(  # noqa: E731
        opened(folder, **(dict(mask="mask.png") | changes)), tmp_path / "cache", digest="d", **how
    )
    make()
    make()
    with pytest.raises(ValueError, match="stale: other data .*data.mask: mask.png there, None now"):
        make(mask=None)
    with pytest.raises(ValueError, match="stale: other data .*data.buckets: False there"):
        make(**BUCKETS | dict(height=32, width=32))
    data = bytearray((folder / "a/00.jpg").read_bytes())
    data[-3] ^= 1
    (folder / "a/00.jpg").write_bytes(data)
    with pytest.raises(ValueError, match="stale: .*has other contents"):
        make()


# --- training -------------------------------------------------------------------------------------

RUN = [*SMALL, "model.max_sequence_length=16", "sample.every=0", "validate_every=0"]


def losses_of(*arguments, steps=4):
    """The losses of the first steps of a run."""
    config = configure(*RUN, *arguments)
    state_of = partial(setup.state_per_rank, config)
    try:
        run = setup.set_up(config, *parallel.start_ranks(config.parallel, "cpu", state_of))
        training, _ = setup.open_data(config, run)
        how = dict(global_batch=config.data.global_batch, start_index=0)
        with closing(run.loader(training, workers=config.data.workers, **how)) as batches:
            return [
                training_step.train_step(run, [next(batches)], step)[0].item()
                for step in range(steps)
            ]
    finally:
        parallel.stop_ranks()


def test_a_folder_and_a_cached_tar_of_it_give_the_same_losses(tmp_path):
    files = write_folder(tmp_path / "photos", range(8), sizes=SIZES)
    files["a/00.mask.png"] = grey_levels(np.eye(32) * 255)
    write_files(tmp_path / "photos", files)
    write_tar(tmp_path / "photos.tar", dict(sorted(files.items())))
    shape = ["data.height=48", "data.width=48", "data.buckets=true", "data.bucket_step=16"]
    options = [*shape, "data.mask=mask.png", "data.loss_weight=0.5", "data.global_batch=2"]
    tar = [f"data.path={tmp_path}/photos.tar", f"data.cache={tmp_path}/cache", *options]
    cached = losses_of("data=webdataset", *tar, "dtype=float32")
    folder = ["data=folder", f"data.path={tmp_path}/photos", *options]
    read = losses_of(*folder, "dtype=float32", "data.workers=1")
    assert len(read) == 4 and read == pytest.approx(cached, rel=1e-6)
    doubled = losses_of(*folder, "dtype=float32", "data.loss_weight=1", steps=1)
    assert doubled == pytest.approx([2 * read[0]])


@pytest.mark.slow
def test_buckets_masks_and_weights_train_on_two_ranks_as_on_one_and_resume_in_an_epoch(tmp_path):
    masked_folder(tmp_path / "own", 6)
    write_folder(tmp_path / "prior", range(10, 16), sizes=SIZES)
    data = ["data=folder", f"data.path={tmp_path}/own::{tmp_path}/prior", "data.mask=mask.png"]
    places = ["data.loss_weight=1", "data.loss_weight=0.5", "data.repeats=2", "data.repeats=1"]
    data += ["data.resolutions=[32,48]", "data.buckets=true", "data.bucket_step=16", "steps=8"]
    data += ["data.global_batch=2", "dtype=float32", "optim.schedule=constant"]

    def losses(name, *more, ranks):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "train.py"]
        given = last_of_each([*RUN, *data, f"output={tmp_path / name}", *more])
        command = [sys.executable, *launcher, *given, *places]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    one = losses("one", ranks=1)
    losses("two", "steps=3", "data.micro_batch=1", ranks=2)
    two = losses("two", "data.micro_batch=1", "resume=auto", "data.workers=1", ranks=2)
    assert len(one) == 8 and two == pytest.approx(one, rel=1e-4)


def test_preview_writes_what_is_trained_on_and_stops(tmp_path, caplog):
    folder = tmp_path / "photos"
    masked_folder(folder)
    write_files(folder, {"a/00.txt": b"red circle with blue background and " * 9})
    options = ["data=folder", f"data.path={folder}", "data.mask=mask.png", "preview=true"]
    options += ["data.caption_dropout=0.4", "data.template=sks {}", "data.global_batch=2"]
    caplog.set_level(logging.INFO)
    run = train(*RUN, *options, "data.val_count=1", f"output={tmp_path}/run")
    names = sorted(path.name for path in (run / "preview").iterdir())
    assert names == [*(f"batch-{i}.png" for i in range(4)), "samples.jsonl"]
    assert not (run / "checkpoints").exists() and not (run / "metrics.jsonl").exists()
    rows = list(map(json.loads, (run / "preview/samples.jsonl").read_text().splitlines()))
    assert len(rows) == 8 and {row["mask"] for row in rows} == {0.5}
    kept = [row for row in rows if row["captions"]]
    assert 0 < len(kept) < 8 and all(row["captions"].startswith("sks ") for row in kept)
    cut = [row for row in kept if "t5_reads" in row]
    assert cut and all(row["t5_tokens"] > 16 for row in cut)
    assert all(len(row["t5_reads"]) < len(row["captions"]) for row in cut)
    assert re.search(r"photos/a/00: t5 reads 16 of \d+ tokens", caplog.text)
    sheet = Image.open(run / "preview/batch-0.png")
    assert sheet.width > sheet.height / 2 and len(sheet.getcolors(1 << 20)) > 100


def test_preview_needs_pictures():
    with pytest.raises(ValueError, match="preview=true shows pictures"):
        configure(
            *RUN,
            "data=mock",
            "model.t5=null",
            "model.clip=null",
            "model.autoencoder=null",
            "preview=true",
        )


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["data.resolutions=[40]"], r"data.resolutions=\[40\] must be multiples of 16"),
        (["data.buckets=true", "data.bucket_step=24"], "bucket_step=24 must be a multiple of 16"),
        (["data.buckets=true", "data.bucket_step=16", "parallel.cp=2"], "image tokens"),
    ],
)
def test_shapes_that_do_not_divide_are_refused_at_once(monkeypatch, arguments, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sides = ["data.height=64", "data.width=64"]
    with pytest.raises(ValueError, match=said):
        configure(*RUN, "data=folder", "data.path=photos", *sides, *arguments)
