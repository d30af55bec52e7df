import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import signal
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fluxlite import rng
from fluxlite.data import cache as cache_module
from fluxlite.data import fill50k
from fluxlite.data.cache import CachedSamples, build_cache
from fluxlite.data.config import DataConfig
from fluxlite.data.images import (
    BadSample,
    canny_edges,
    choose_frame,
    decode_alpha,
    decode_picture,
    picture_levels,
    pixels_of,
    resize_crop,
    to_rgb,
)
from fluxlite.data.loading import make_loader
from fluxlite.data.mock import MockPictures, MockSamples
from fluxlite.data.opening import open_dataset, prepare_data
from fluxlite.data.order import SampleOrder


def picture(value, kind="jpeg", size=(32, 32)):
    """An encoded picture that is not uniform, so that cutting it short is noticed."""
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members(numbers):
    return {
        f"{i:03d}.{e}": d
        for i in numbers
        for e, d in (("jpg", picture(i)), ("txt", f"picture {i}".encode()))
    }


@pytest.fixture
def tars(tmp_path):
    """Three tars of 7, 5 and 9 samples."""
    for shard, numbers in enumerate((range(7), range(7, 12), range(12, 21))):
        write_tar(tmp_path / "tars" / f"{shard}.tar", members(numbers))
    return tmp_path / "tars"


def config_for(path, **changes):
    defaults = dict(
        kind="webdataset",
        path=path and str(path),
        height=32,
        width=32,
        val_count=1,
        caption_dropout=0.0,
        workers=0,
    )
    config = DataConfig(**(defaults | dict(max_bad_fraction=1.0, micro_batch=4) | changes))
    config.validate()
    return config


def batches(dataset, *, ranks=1, workers=0, micro_batch=2, global_batch=6, start=0, stop=24):
    """All ranks' batches, rank by rank."""
    return [
        list(
            make_loader(
                dataset,
                global_batch=global_batch,
                micro_batch=micro_batch,
                dp_rank=rank,
                dp_size=ranks,
                start_index=start,
                stop_index=stop,
                workers=workers,
            )
        )
        for rank in range(ranks)
    ]


def by_index(rank_batches):
    return {
        int(index): (batch["keys"][i], batch["captions"][i], batch["images"][i])
        for rank in rank_batches
        for batch in rank
        for i, index in enumerate(batch["indices"])
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[i][:2] == b[i][:2] and torch.equal(a[i][2], b[i][2]) for i in a
    )


# --- order ----------------------------------------------------------------------------------------


def test_each_sample_comes_once_an_epoch_over_ranks_and_workers(tars):
    dataset = open_dataset(config_for(tars, val_count=3), "train", 0)
    orders = []
    for epoch in range(2):
        got = by_index(
            batches(dataset, ranks=3, workers=2, start=18 * epoch, stop=18 * (epoch + 1))
        )
        orders.append([got[i][0] for i in sorted(got)])
    assert (
        len(dataset) == 18
        and len(set(orders[0])) == 18
        and set(orders[0]) == set(orders[1])
        and orders[0] != orders[1]
    )


def test_batches_do_not_depend_on_mesh_or_workers(tars):
    config = config_for(tars, caption_dropout=0.5, crop="random", flip=True, height=16, width=16)
    dataset = open_dataset(config, "train", 0)
    reference = by_index(batches(dataset))
    assert {caption for _, caption, _ in reference.values()} > {""}
    for ranks, workers, micro_batch in ((1, 2, 3), (3, 0, 1), (2, 1, 3)):
        assert same(
            by_index(batches(dataset, ranks=ranks, workers=workers, micro_batch=micro_batch)),
            reference,
        )
    assert not same(by_index(batches(open_dataset(config, "train", 1))), reference)


def test_slices_are_laid_out_as_documented(tars):
    dataset = open_dataset(config_for(tars), "train", 0)
    got = [
        [batch["indices"].tolist() for batch in rank]
        for rank in batches(dataset, ranks=2, micro_batch=2, global_batch=8, stop=16)
    ]
    assert got == [[[0, 1], [4, 5], [8, 9], [12, 13]], [[2, 3], [6, 7], [10, 11], [14, 15]]]
    with pytest.raises(ValueError, match="global_batch=6 must be a multiple of 4"):
        batches(dataset, micro_batch=4)
    with pytest.raises(ValueError, match="start_index=3"):
        batches(dataset, start=3)


def test_resume_equals_uninterrupted_and_reads_nothing_consumed(tars):
    config = config_for(tars, caption_dropout=0.5, crop="random", height=16, width=16)
    whole = by_index(batches(open_dataset(config, "train", 0)))
    dataset, read = open_dataset(config, "train", 0), []
    load = dataset.read
    dataset.read = lambda number, index: read.append(index) or load(number, index)
    assert same({i: v for i, v in whole.items() if i >= 12}, by_index(batches(dataset, start=12)))
    assert read == list(range(12, 24))


def test_loading_leaves_the_global_generator_alone(tars):
    before = torch.get_rng_state()
    batches(
        open_dataset(config_for(tars, crop="random", caption_dropout=0.5), "train", 0), workers=1
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, -3])
def test_windows_keep_shards_together(seed):
    order = SampleOrder([4, 0, 4, 4, 4], seed=seed, shuffle=True, window=2)
    numbers = [next(order.following(i)) for i in range(16)]
    assert numbers == list(order.following(0))
    assert sorted(numbers) == list(range(16)) and numbers != list(range(16))
    owners = [number // 4 for number in numbers]
    spread = [
        max(i for i, o in enumerate(owners) if o == shard) - owners.index(shard)
        for shard in range(4)
    ]
    assert max(spread) < 8
    assert list(order.following(14))[:3] == [numbers[14], numbers[15], numbers[0]]
    later = list(order.following(32))
    assert next(order.following(35)) == later[3] and later != numbers


def test_no_shuffle_is_the_order_of_the_tars(tars):
    dataset = open_dataset(config_for(tars, shuffle=False), "train", 0)
    assert [dataset[i]["keys"] for i in (0, 6, 7, 19, 20)] == [
        "0/000",
        "0/006",
        "1/007",
        "2/019",
        "0/000",
    ]


def test_datasets_survive_pickling_with_open_files(tars, tmp_path):
    dataset = open_dataset(config_for(tars), "train", 0)
    item = dataset[3]
    assert pickle.loads(pickle.dumps(dataset))[3]["keys"] == item["keys"]


# --- validation -----------------------------------------------------------------------------------


def test_validation_is_held_out_and_fixed(tars, caplog):
    config = config_for(tars, val_count=4, caption_dropout=1.0, crop="random", flip=True)
    with caplog.at_level(logging.INFO, "fluxlite"):
        training, validation = (open_dataset(config, split, 0) for split in ("train", "val"))
    assert "last 4 of 21" in caplog.text
    assert [validation[i]["keys"] for i in range(5)] == [
        "2/017",
        "2/018",
        "2/019",
        "2/020",
        "2/017",
    ]
    assert {training[i]["keys"] for i in range(len(training))}.isdisjoint(
        {validation[i]["keys"] for i in range(4)}
    )
    assert len(training) == 17 and validation[0]["captions"] == "picture 17"
    with pytest.raises(ValueError, match="data.val_count"):
        open_dataset(config_for(tars, val_count=21), "train", 0)


def test_validation_of_its_own_leaves_training_whole(tars, tmp_path):
    write_tar(tmp_path / "val" / "v.tar", members(range(30, 34)))
    config = config_for(tars, val_path=str(tmp_path / "val"), val_count=3)
    assert len(open_dataset(config, "train", 0)) == 21 and len(open_dataset(config, "val", 0)) == 3
    with pytest.raises(ValueError, match="val_count=4"):
        open_dataset(config_for(tars, val_path=str(tmp_path / "val"), val_count=5), "val", 0)
    with pytest.raises(ValueError, match="data.val_path=.*nowhere"):
        open_dataset(config_for(tars, val_path=str(tmp_path / "nowhere")), "val", 0)


def test_energon_split_is_honoured(tars):
    (tars / ".nv-meta").mkdir()
    split = tars / ".nv-meta" / "split.yaml"
    split.write_text(
        "exclude: [1.tar]\nsplit_parts:\n  train: ['{0..1}.tar']\n  val: [2.tar]\n  test: []\n"
    )
    config = config_for(tars, val_count=8)
    assert len(open_dataset(config, "train", 0)) == 7 and len(open_dataset(config, "val", 0)) == 8
    split.write_text("split_parts:\n  train: ['{0..3}.tar']\n")
    with pytest.raises(ValueError, match="3.tar"):
        open_dataset(config, "train", 0)
    split.write_text("exclude: [0.tar/003]\nsplit_parts:\n  train: [0.tar]\n")
    with pytest.raises(ValueError, match="0.tar/003"):
        open_dataset(config, "train", 0)


# --- bad samples ----------------------------------------------------------------------------------


def test_bad_samples_are_skipped_counted_and_logged(tmp_path, caplog):
    content = members(range(30))
    content["004.jpg"] = content["004.jpg"][:-300]
    content["005.jpg"] = b""
    content["009.txt"], content["010.txt"] = b"  ", b"\xff\xfe\xff"
    del content["012.txt"], content["020.jpg"]
    write_tar(tmp_path / "0.tar", content)
    with caplog.at_level(logging.WARNING, "fluxlite"):
        dataset = open_dataset(config_for(tmp_path, shuffle=False), "train", 0)
        got = by_index(batches(dataset, workers=1))
    keys = [got[i][0] for i in range(24)]
    places = [3, 6, 6, 6, 7, 8, 11, 11]
    assert keys[3:11] == [f"0/{i:03d}" for i in places] and len(dataset) == 27
    reasons = [
        "4: unreadable picture",
        "5: no picture of",
        "9: an empty",
        "10: unreadable caption",
        "12: no caption",
        "20: no picture (",
    ]
    for number, reason in (text.split(":") for text in reasons):
        assert caplog.text.count(f"skipped 0/{int(number):03d}:{reason}") == 1
    assert dataset[4]["bad"][1].startswith("0/005")


def test_too_many_bad_samples_stop_the_run(tmp_path):
    content = members(range(31))
    content["004.jpg"] = b"broken"
    write_tar(tmp_path / "0.tar", content)
    batches(open_dataset(config_for(tmp_path, max_bad_fraction=0.04), "train", 0), stop=120)
    with pytest.raises(ValueError, match="1 of 30 samples.*max_bad_fraction=0.03.*0/004"):
        batches(open_dataset(config_for(tmp_path, max_bad_fraction=0.03), "train", 0), stop=120)
    del content["004.txt"]
    write_tar(tmp_path / "0.tar", content)
    with pytest.raises(ValueError, match="1 of 31 samples.*0/004: no caption"):
        open_dataset(config_for(tmp_path, max_bad_fraction=0.03), "train", 0)
    write_tar(tmp_path / "0.tar", {f"{i}.{e}": b"{}" for i in range(9) for e in ("jpg", "json")})
    with pytest.raises(ValueError, match="8 samples in a row.*no caption in its json"):
        open_dataset(config_for(tmp_path), "train", 0)[0]


# --- pictures -------------------------------------------------------------------------------------

COLOURS = {
    "L": 200,
    "CMYK": (0, 255, 255, 0),
    "RGBA": (255, 0, 0, 0),
    "LA": (9, 255),
    "I;16": 51400,
}
SEEN = {
    "L": (200,) * 3,
    "P": (1, 200, 3),
    "CMYK": (255, 0, 0),
    "RGBA": (255,) * 3,
    "LA": (9,) * 3,
    "I;16": (200,) * 3,
}


@pytest.mark.parametrize("mode", SEEN)
def test_every_kind_of_picture_becomes_rgb(mode):
    image = (
        Image.new("RGB", (8, 8), (1, 200, 3)).quantize(4)
        if mode == "P"
        else Image.new(mode, (8, 8), COLOURS[mode])
    )
    stream = io.BytesIO()
    image.save(stream, "jpeg" if mode == "CMYK" else "png")
    got = decode_picture(stream.getvalue())
    assert got.mode == "RGB" and got.size == (8, 8)
    assert np.abs(np.array(got)[4, 4].astype(int) - SEEN[mode]).max() <= 2


def test_transparent_palettes_lie_on_white():
    image = Image.new("P", (8, 8))
    image.putpalette([10, 20, 30])
    stream = io.BytesIO()
    image.save(stream, "png", transparency=0)
    assert np.array(decode_picture(stream.getvalue())).min() == 255


def test_transparency_of_16_bits_lies_on_white():
    image, stream = Image.new("I;16", (8, 8), 300), io.BytesIO()
    image.putpixel((0, 0), 0)
    image.save(stream, "png", transparency=300)
    levels = np.array(decode_picture(stream.getvalue()))
    assert (levels[0, 0] == 0).all() and (levels[1:] == 255).all()
    assert decode_alpha(stream.getvalue()).getcolors() == [(63, 0), (1, 255)]


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_a_profile_stays_with_the_colours_that_it_is_of(mode):
    image, stream = Image.new(mode, (8, 8)), io.BytesIO()
    image.save(stream, "jpeg", icc_profile=b"profile")
    assert ("icc_profile" in decode_picture(stream.getvalue()).info) == (mode == "RGB")


@pytest.mark.parametrize("flip", [False, True])
def test_a_frame_lies_in_its_picture_whatever_is_rounded(flip):
    """As of a photograph of 4032 x 3024 in a bucket of 1472 x 256: PIL takes no offset below 0."""
    generator = torch.Generator().manual_seed(0)
    for size in ((4032, 3024), (89, 178), (1920, 1080), (427, 640), (1, 1000)):
        for height, width in itertools.product(range(64, 1600, 64), repeat=2):
            crop = dict(crop="random", flip=True, generator=generator) if flip else {}
            left, top, right, bottom = choose_frame(size, height, width, **crop).box
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    framed = choose_frame((4032, 3024), 256, 1472).of(Image.new("L", (4032, 3024)))
    assert framed.size == (1472, 256)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(BadSample, match="without pixels"):
        to_rgb(Image.new("RGB", (0, 4)))


def test_exif_rotation_is_applied():
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(stream, "jpeg", exif=exif)
    assert decode_picture(stream.getvalue()).size == (4, 8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        picture(3)[:-200],
        picture(3)[:100],
        picture(3, "png")[:-200],
        picture(3, "webp")[:-99],
    ],
)
def test_broken_pictures_are_refused(data):
    with pytest.raises(BadSample):
        decode_picture(data)


def test_a_picture_that_fits_is_not_resampled():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(resize_crop(Image.fromarray(pixels), 16, 20), expected)
    assert torch.equal(resize_crop(Image.fromarray(pixels), 16, 16), expected[:, :, 2:18])


@pytest.mark.parametrize(
    "size,scale", [((128, 32), 2), ((32, 64), 2), ((16, 8), 0.5), ((17, 400), 17 / 16)]
)
def test_resizing_covers_and_keeps_proportions(size, scale):
    x = np.broadcast_to(np.arange(size[0]) / size[0] * 255, size[::-1])
    image = Image.fromarray(np.repeat(x[..., None], 3, axis=2).astype(np.uint8))
    got = resize_crop(image, 16, 16)
    middle = ((np.arange(16) + 0.5 - 8) * scale + size[0] / 2) / size[0] * 2 - 1
    assert got.shape == (3, 16, 16) and np.abs(got[0, 8].numpy() - middle)[2:-2].max() < 0.08


def test_random_crops_and_flips_are_keyed():
    x = np.broadcast_to(np.arange(64)[None, :, None] * 4, (16, 64, 3)).astype(np.uint8)
    crops = [
        resize_crop(
            Image.fromarray(x),
            16,
            16,
            crop="random",
            flip=True,
            generator=rng.generator(0, i, "crop"),
        )
        for i in range(64)
    ]
    starts = {int(round((crop.min().item() + 1) * 127.5 / 4)) for crop in crops}
    assert min(starts) < 8 and max(starts) > 40 and starts <= set(range(49))
    assert 10 < sum(bool(crop[0, 0, 0] > crop[0, 0, 1]) for crop in crops) < 54
    again = resize_crop(
        Image.fromarray(x), 16, 16, crop="random", flip=True, generator=rng.generator(0, 5, "crop")
    )
    assert torch.equal(again, crops[5])


# --- places ---------------------------------------------------------------------------------------


def test_captions_come_from_json_before_txt(tmp_path):
    content = {}
    for i in range(3):
        content |= {
            f"a/{i}.webp": picture(i, "webp"),
            f"a/{i}.json": json.dumps({"text": f"t{i}"}).encode(),
        }
    content |= {
        "a/1.txt": b"not this",
        "a/3.PNG": picture(3, "png"),
        "a/3.json": b"[]",
        "a/3.txt": b"txt",
    }
    write_tar(tmp_path / "0.tar", content)
    dataset = open_dataset(
        config_for(tmp_path, caption_field="text", val_path=str(tmp_path)), "train", 0
    )
    assert {dataset[i]["keys"]: dataset[i]["captions"] for i in range(4)} == {
        "0/a/0": "t0",
        "0/a/1": "t1",
        "0/a/2": "t2",
        "0/a/3": "txt",
    }


def test_the_control_is_not_the_picture_and_hidden_files_are_none(tmp_path):
    content = {
        "./.hidden.jpg": b"",
        "./._0.jpg": b"",
        "./0.png": picture(1, "png"),
        "./0.jpg": picture(2),
        "./0.txt": b"a",
        "README": b"",
    }
    write_tar(tmp_path / "0.tar", content)
    dataset = open_dataset(config_for(tmp_path, val_path=str(tmp_path)), "train", 0)
    assert (
        torch.equal(
            pixels_of(dataset[0]["images"]), resize_crop(decode_picture(picture(2)), 32, 32)
        )
        and len(dataset) == 1
    )


def test_globs_braces_lists_and_urls(tars, tmp_path):
    for path, count in (
        (f"{tars}/*.tar", 20),
        (f"{tars}/{{0,2}}.tar", 15),
        (f"{tars}/0.tar::{tars}/1.tar", 11),
        (f"file:{tars}/0.tar", 6),
    ):
        assert len(open_dataset(config_for(path), "train", 0)) == count
    config = config_for(f"pipe:cat {tars}/{{0..1}}.tar", download=str(tmp_path / "fetched"))
    assert len(open_dataset(config, "train", 0)) == 11
    (tars / "0.tar").rename(tars / "gone")
    assert len(open_dataset(config, "train", 0)) == 11  # fetched once
    for command in ("cat /nowhere", "head -c 3000"):
        with pytest.raises(ValueError, match="data.path.*cannot be fetched"):
            open_dataset(
                config_for(f"pipe:{command} {tars}/1.tar", download=str(tmp_path / "fetched")),
                "train",
                0,
            )
    assert len(list((tmp_path / "fetched").glob("[!.]*"))) == 2 and not list(
        (tmp_path / "fetched").glob(".fetching*")
    )


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "empty",
        "void.tar",
        "cut.tar",
        "damaged.tar",
        "text.tar",
        "packed.tar",
        "*.nothing",
        "{a",
    ],
)
def test_what_is_no_data_is_named(tmp_path, tars, name):
    whole = (tars / "0.tar").read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "void.tar").write_bytes(b"")
    (tmp_path / "cut.tar").write_bytes(whole[:5000])
    with tarfile.open(tars / "0.tar") as tar:
        header = tar.getmembers()[4].offset
    (tmp_path / "damaged.tar").write_bytes(whole[:header] + b"?" * 512 + whole[header + 512 :])
    (tmp_path / "text.tar").write_bytes(b"not a tar at all" * 100)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tars / "0.tar")
    with pytest.raises(ValueError) as raised:
        open_dataset(config_for(tmp_path / name), "train", 0)
    assert name in str(raised.value) and (name.endswith("tar") or "data.path=" in str(raised.value))


@pytest.mark.parametrize(
    "name,data,said",
    [
        ("a.tar.gz", b"\x1f\x8b\x08\0" + bytes(600), "a compressed archive, and only plain tars"),
        ("README.md", b"# Notes\n", "a text file, not a tar: name tars"),
        ("a.safetensors", b"\x40\0\0\0\0\0\0\0{}".ljust(600), "a safetensors file, not a tar"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(600), "a picture, not a tar"),
        ("noise.tar", b"\xfa\0\1" * 400, "no whole, uncompressed tar"),
    ],
)
def test_a_file_that_is_no_tar_is_told_for_what_it_is(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^data.path={tmp_path}/{name}: {tmp_path}.* is {said}"):
        open_dataset(config_for(tmp_path / name), "train", 0)


@pytest.mark.parametrize("inside", ["a.JPG", "10_cats/a.webp"])
def test_a_folder_of_pictures_is_shown_the_data_set_of_folders(tmp_path, inside):
    (tmp_path / inside).parent.mkdir(exist_ok=True)
    (tmp_path / inside).touch()
    with pytest.raises(ValueError, match="holds pictures and no .tar: set data=folder"):
        open_dataset(config_for(tmp_path), "train", 0)


@pytest.mark.parametrize(
    "changes,named",
    [
        (dict(kind="folders"), "data.kind"),
        (dict(crop="left"), "data.crop"),
        (dict(path=None), "data.path"),
        (dict(val_count=0), "data.val_count"),
        (dict(workers=-1), "data.workers"),
        (dict(caption_dropout=1.5), "data.caption_dropout"),
        (dict(cache="c", crop="random"), "data.cache"),
        (dict(cache="c", flip=True), "data.cache"),
        (dict(cache="c", kind="mock"), "data.cache"),
        (dict(kind="fill50k", path="s3://bucket"), "webdataset"),
        (dict(control="sketch"), "data.control=sketch: choose jpg, jpeg, webp, png.*canny"),
        (dict(control=""), "data.control="),
        (
            dict(control="png", control_mode="colour"),
            "data.control_mode=colour: choose json, one of canny, tile",
        ),
        (dict(control_mode="canny"), "set data.control="),
    ],
)
def test_nonsense_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        config_for(**({"path": "x"} | changes))


# --- cache ----------------------------------------------------------------------------------------


def encode_images(images):
    mean = torch.nn.functional.avg_pool2d(pixels_of(images), 8)
    return mean, mean - 3


def encode_texts(texts):
    rows = torch.stack(
        [torch.randn(4, 6, generator=rng.generator(0, text, "test")) for text in texts]
    )
    return rows, rows.mean(1)


def make_cache(dataset, directory, digest="d", **options):
    return build_cache(
        dataset,
        directory,
        encode_images=encode_images,
        encode_texts=encode_texts,
        digest=digest,
        **options,
    )


@pytest.mark.parametrize("split,workers", [("train", 2), ("val", 0)])
def test_cache_equals_no_cache(tars, tmp_path, monkeypatch, split, workers):
    monkeypatch.setattr(cache_module, "FILE_ROWS", 4)  # several files for a tar
    bad = {
        "a.jpg": picture(1)[:100],
        "a.txt": b"broken",
        "b.jpg": picture(2),
        "b.txt": b"picture 0",
        "c.jpg": b"",
        "c.txt": b"c",
    }
    write_tar(tars / "1.tar", bad)
    write_tar(tars / "3.tar", {"d.jpg": b"", "d.txt": b"all of it broken"})
    write_tar(tars / "4.tar", members(range(40, 52)) | {"042.txt": b"picture 40", "043.jpg": b""})
    dataset = open_dataset(
        config_for(tars, caption_dropout=0.4, workers=workers, val_count=13), split, 0
    )
    folders = {
        make_cache(dataset, tmp_path / "cache", rank=rank, world_size=2) for rank in range(2)
    }
    (plain,), (cached,) = (
        batches(d, stop=72, workers=workers) for d in (dataset, CachedSamples(dataset, *folders))
    )
    dropped, passed_over = 0, 0
    for a, b in zip(plain, cached, strict=True):
        assert a["indices"].tolist() == b["indices"].tolist() and a["keys"] == b["keys"]
        mean, logvar = encode_images(a["images"])
        txt, pooled = encode_texts(a["captions"])
        dropped += a["captions"].count("")
        assert all(
            torch.equal(b[k], v)
            for k, v in dict(mean=mean, logvar=logvar, txt=txt, pooled=pooled).items()
        )
    for i in range(len(dataset)):
        assert dataset[i]["bad"] == CachedSamples(dataset, *folders)[i]["bad"]
        passed_over += len(dataset[i]["bad"])
    assert passed_over > 0 and (0 < dropped < 72 if split == "train" else dropped == 0)


def test_a_stale_cache_is_refused_and_a_finished_one_reused(tars, tmp_path):
    dataset = open_dataset(config_for(tars), "train", 0)
    folder = make_cache(dataset, tmp_path / "cache")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 4
    files[1].unlink()
    before = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    with pytest.raises(ValueError, match="lacks 1 files"):
        CachedSamples(dataset, folder)
    assert make_cache(dataset, tmp_path / "cache") == folder and files[1].exists()
    assert before == {file: file.stat().st_mtime_ns for file in before}
    with pytest.raises(
        ValueError, match=r"stale: other encoders \(d there, other now\); remove it"
    ):
        make_cache(dataset, tmp_path / "cache", digest="other")
    with pytest.raises(
        ValueError, match=r"stale: other data .*size \(data.height: 32 there, 16 now"
    ):
        make_cache(
            open_dataset(config_for(tars / "0.tar", height=16, width=16), "train", 0),
            tmp_path / "cache",
        )
    with pytest.raises(ValueError, match="stale: other data"):
        make_cache(
            open_dataset(config_for(tars, caption_field="text"), "train", 0), tmp_path / "cache"
        )


def test_a_stale_cache_says_which_settings_have_changed(tars, tmp_path):
    there = {"model.t5": "flux-tiny", "dtype": "float32"}
    now = there | {"dtype": "bfloat16"}
    dataset = open_dataset(config_for(tars), "train", 0)
    folder = make_cache(dataset, tmp_path / "cache", settings=there)
    told = r"other encoders \(dtype: float32 there, bfloat16 now\); remove it"
    with pytest.raises(ValueError, match=told):
        make_cache(dataset, tmp_path / "cache", digest="other", settings=now)
    changed = open_dataset(config_for(tars, caption_field="text", height=16), "train", 0)
    told = (
        r"data \(data.caption_field: caption there, text now\), size \(data.height: 32 .*16 now\)"
    )
    with pytest.raises(ValueError, match=told):
        make_cache(changed, tmp_path / "cache", settings=there)
    with pytest.raises(ValueError, match=r"other encoders \(d there, e now\)"):  # other weights
        make_cache(dataset, tmp_path / "cache", digest="e", settings=there)
    with pytest.raises(
        ValueError, match="^data.cache=.*Not a directory; name a folder of your own"
    ):
        make_cache(dataset, tars / "0.tar" / "cache", settings=there)

    about = json.loads((folder / "cache.json").read_text())
    for key in ("settings", "checksum"):  # as before they were kept
        about.pop(key)
    (folder / "cache.json").write_text(json.dumps(about))
    assert make_cache(dataset, tmp_path / "cache", settings=now) == folder
    with pytest.raises(ValueError, match=r"other encoders \(d there, e now\)"):
        make_cache(dataset, tmp_path / "cache", digest="e", settings=now)


def test_a_cache_of_too_many_bad_samples_is_refused(tars, tmp_path):
    write_tar(tars / "1.tar", {"a.jpg": picture(1)[:100], "a.txt": b"broken"})
    for _ in range(2):  # the second time from the finished files
        with pytest.raises(ValueError, match="1 of 16 samples.*1/a: unreadable picture"):
            make_cache(
                open_dataset(config_for(tars, max_bad_fraction=0.05), "train", 0),
                tmp_path / "cache",
            )


def test_a_cache_is_read_fast(tmp_path):
    write_tar(tmp_path / "0.tar", members(range(65)))
    dataset = open_dataset(config_for(tmp_path, val_count=1), "train", 0)
    cached = CachedSamples(dataset, make_cache(dataset, tmp_path / "cache"))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        [cached[i] for i in range(64)]
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


# --- fill50k --------------------------------------------------------------------------------------


def fill50k_config(path, **changes):
    return DataConfig(
        **(
            dict(path=str(path), count=40, generate_size=32, height=32, width=32, val_count=10)
            | changes
        )
    )


def test_generated_samples_are_deterministic_and_hold_pairs_out(tmp_path):
    config = fill50k_config(tmp_path / "data")
    for split, count in (("train", 40), ("val", 10)):
        prepare_data(config, split)
        prepare_data(config, split)
        dataset = open_dataset(config, split, 0)
        for text in {dataset[i]["captions"] for i in range(count)} - {""}:
            assert fill50k.is_held_out(
                *text.removesuffix(" background").split(" circle with ")
            ) == (split == "val")
    first = (tmp_path / "data" / "train" / "000000.tar").read_bytes()
    for workers in (0, 2):
        fill50k.write_shards(
            fill50k.generated_samples(40, size=32, seed=0, workers=workers),
            tmp_path / f"again{workers}",
        )
        assert (tmp_path / f"again{workers}" / "000000.tar").read_bytes() == first
    with tarfile.open(tmp_path / "again0" / "000000.tar") as tar:
        assert sorted(tar.getnames())[:3] == ["000000.jpg", "000000.png", "000000.txt"]


def test_other_generated_shards_are_refused(tmp_path):
    for split in ("train", "val"):
        prepare_data(fill50k_config(tmp_path / "data"), split)
    for split, changes, named in (
        ("train", dict(count=41), "40 pictures of 32 pixels, but data.count=41"),
        ("train", dict(generate_size=64), "data.generate_size=64"),
        ("val", dict(val_count=11), "data.val_count=11"),
    ):
        with pytest.raises(ValueError, match=named):
            prepare_data(fill50k_config(tmp_path / "data", **changes), split)
    smaller = fill50k_config(tmp_path / "data", val_count=3)
    prepare_data(smaller, "val")
    assert len(open_dataset(smaller, "val", 0)) == 3


def test_the_generators_own_tars_in_the_path_itself_are_the_training_set(tmp_path):
    fill50k.write_shards(
        fill50k.generated_samples(5, size=32, seed=0),
        tmp_path / "made",
        about={"count": 5, "size": 32},
    )
    config = fill50k_config(tmp_path / "made", count=5)
    for split in ("train", "val"):
        prepare_data(config, split)
    assert len(open_dataset(config, "train", 0)) == 5 and len(open_dataset(config, "val", 0)) == 10
    assert not (tmp_path / "made" / "train").exists()


@pytest.mark.parametrize(
    "names", [("0.tar",), ("holiday.jpg",), ("train/0.tar",), ("a/b/0.tar", "c.txt")]
)
def test_nothing_is_written_into_a_folder_of_the_users(tmp_path, names):
    for name in names:
        write_tar(tmp_path / "mine" / name, members(range(5)))
    before = sorted(tmp_path.rglob("*"))
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="data.path=.*mine holds .*set data=webdataset"):
            prepare_data(fill50k_config(tmp_path / "mine"), split)
    assert sorted(tmp_path.rglob("*")) == before


def test_both_orders_of_a_held_out_pair_are_held_out():
    held = fill50k.colour_pairs(held_out=True)
    assert {(b, a) for a, b in held} == set(held)
    assert 0.03 < len(held) / (len(held) + len(fill50k.colour_pairs(held_out=False))) < 0.07
    assert len(fill50k.COLOURS) == len({tuple(fill50k.rgb(c)) for c in fill50k.COLOURS}) > 130


def _prepare(path, count):
    torch.set_num_threads(1)
    prepare_data(fill50k_config(path, count=count), "train")


def test_racing_and_killed_generators_leave_whole_shards(tmp_path):
    context, data = multiprocessing.get_context("spawn"), tmp_path / "data"
    killed = context.Process(target=_prepare, args=(data, 400_000))
    killed.start()
    deadline = time.time() + 60
    while not list(data.glob(".train.part/*.tar")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert list(data.glob(".train.part")) and not (data / "train").exists()
    racers = [context.Process(target=_prepare, args=(data, 200)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0] and os.listdir(data) == ["train"]
    assert len(open_dataset(fill50k_config(data, count=200), "train", 0)) == 200


def test_the_original_layout_is_imported(tmp_path):
    source = tmp_path / "fill50k"
    circle, background = next(
        pair for pair in fill50k.colour_pairs(held_out=True) if pair[0] == "cyan"
    )
    held_out = (
        fill50k.circle_caption(circle, background),
        fill50k.circle_caption("aqua", background),
    )
    lines = []
    for i, text in enumerate(
        ["red circle with blue background", *held_out, "a caption of another kind"]
    ):
        for folder in ("source", "target"):
            (source / folder).mkdir(parents=True, exist_ok=True)
            (source / folder / f"{i}.png").write_bytes(picture(i * 9, "png"))
        lines.append(
            json.dumps({"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": text})
        )
    (source / "prompt.json").write_text("\n".join(lines))
    fill50k.write_shards(fill50k.imported_samples(source), tmp_path / "tars")
    dataset = open_dataset(config_for(tmp_path / "tars"), "train", 0)
    assert dataset[0]["captions"] == "red circle with blue background" and len(dataset) == 1
    with pytest.raises(ValueError, match="prompt.json"):
        list(fill50k.imported_samples(tmp_path))


# --- control --------------------------------------------------------------------------------------


def encoded(image, kind="png"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def smooth(number, size):
    """A picture that survives being made smaller: a few large, soft patches, different for each
    number.
    """
    patches = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def controlled(numbers, **fields):
    """Samples of a webp target and the same picture as a png control; `fields` for the json, by
    number.
    """
    found = {}
    for i in numbers:
        found |= {
            f"{i:03d}.webp": picture(i, "webp", (48, 40)),
            f"{i:03d}.txt": f"picture {i}".encode(),
        }
        found[f"{i:03d}.png"] = encoded(decode_picture(found[f"{i:03d}.webp"]))
        if f"_{i}" in fields:
            found[f"{i:03d}.json"] = json.dumps(fields[f"_{i}"]).encode()
    return found


def differing_controls(path, **changes):
    write_tar(
        path / "0.tar",
        members(range(9)) | {f"{i:03d}.png": picture(i + 50, "png") for i in range(9)},
    )
    return config_for(path, control="png", shuffle=False, **changes)


def test_the_control_is_cropped_and_flipped_as_its_target(tmp_path):
    write_tar(tmp_path / "0.tar", controlled(range(9)))
    for size in ((32, 32), (40, 32), (64, 64)):  # resampled, cropped alone, enlarged
        options = dict(height=size[0], width=size[1], crop="random", flip=True)
        dataset = open_dataset(config_for(tmp_path, control="png", **options), "train", 0)
        plain = open_dataset(config_for(tmp_path, **options), "train", 0)
        flat = open_dataset(
            config_for(tmp_path, control="png", height=size[0], width=size[1]), "train", 0
        )
        moved = 0
        for i in range(24):
            assert (
                torch.equal(dataset[i]["controls"], dataset[i]["images"])
                and dataset[i]["controls"].dtype == torch.uint8
            )
            assert torch.equal(dataset[i]["images"], plain[i]["images"])  # a control draws nothing
            moved += not torch.equal(dataset[i]["controls"], flat[i]["controls"])
        assert moved > 8


@pytest.mark.parametrize("scale", [2, 0.5, 1 / 3])
def test_a_control_of_another_size_shows_the_same_part(tmp_path, scale):
    content = {}
    for i in range(8):
        small, large = (200, 150), (round(200 * scale), round(150 * scale))
        content |= {
            f"{i}.jpg": encoded(smooth(i, small), "png"),
            f"{i}.png": encoded(smooth(i, large)),
            f"{i}.txt": b"a",
        }
    write_tar(tmp_path / "0.tar", content)
    for side in (48, 150):
        config = config_for(
            tmp_path, control="png", crop="random", flip=True, height=side, width=side
        )
        dataset = open_dataset(config, "train", 0)
        for i in range(12):
            target, control = (pixels_of(dataset[i][name]) for name in ("images", "controls"))
            assert (target - control).abs().mean() < 0.03
            assert (target - control.flip(2)).abs().mean() > 0.1


def test_a_box_of_whole_pixels_is_copied_from_a_control_of_half_the_size():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    target = Image.fromarray(pixels).resize((48, 32), Image.Resampling.NEAREST)
    got = choose_frame(target.size, 16, 16).of(Image.fromarray(pixels))
    assert np.array_equal(np.array(got), pixels[:, 4:20])


def test_missing_and_unfitting_controls_are_counted_with_the_reason(tmp_path, caplog):
    content = controlled(range(12))
    del content["003.png"], content["004.webp"]
    content["005.png"] = picture(5, "png", (48, 48))
    content["006.png"] = content["006.png"][:-200]
    content["007.png"] = picture(7, "png", (24, 20))
    write_tar(tmp_path / "0.tar", content)
    config = config_for(tmp_path, control="png", shuffle=False)
    with caplog.at_level(logging.WARNING, "fluxlite"):
        dataset = open_dataset(config, "train", 0)
    assert len(dataset) == 9 and [dataset[i]["keys"] for i in (2, 3, 4, 5)] == [
        "0/002",
        "0/007",
        "0/007",
        "0/007",
    ]
    assert (
        "skipped 0/003: no control (png)" in caplog.text
        and "skipped 0/004: no picture (jpg, jpeg, webp)" in caplog.text
    )
    wrong_shape, broken = dataset[3]["bad"]
    assert (
        "its control (png)" in wrong_shape
        and "48x48 pixels beside 48x40" in wrong_shape
        and "unreadable" in broken
    )
    with pytest.raises(ValueError, match="2 of 12 samples.*0/003: no control .png."):
        open_dataset(config_for(tmp_path, control="png", max_bad_fraction=0.1), "train", 0)
    assert (
        len(open_dataset(config_for(tmp_path), "train", 0)) == 11
    )  # as it was; the index of one is not the other's


def test_controls_with_endings_of_their_own_leave_other_pngs_alone(tmp_path):
    content = {}
    for i in range(2):
        content |= {
            f"{i}.png": picture(i, "png"),
            f"{i}.txt": b"a",
            f"{i}.depth.png": picture(i + 5, "png"),
        }
    write_tar(tmp_path / "0.tar", content)
    sample = open_dataset(config_for(tmp_path, control="depth.png", shuffle=False), "train", 0)[0]
    for name, number in (("images", 0), ("controls", 5)):
        expected = resize_crop(decode_picture(picture(number, "png")), 32, 32)
        assert torch.equal(pixels_of(sample[name]), expected)


def test_canny_draws_the_outline_of_a_square(tmp_path):
    square = np.zeros((64, 64, 3), np.uint8)
    square[16:48, 20:44] = (255, 0, 0)
    content = {
        f"{i}.{e}": d
        for i in range(4)
        for e, d in (("png", encoded(Image.fromarray(square))), ("txt", b"a square"))
    }
    write_tar(tmp_path / "0.tar", content)
    options = dict(control="canny", height=64, width=64, val_path=str(tmp_path))
    sample = open_dataset(config_for(tmp_path, **options), "train", 0)[0]
    controls = pixels_of(sample["controls"])
    assert controls.shape == (3, 64, 64) and set(controls.unique().tolist()) == {-1.0, 1.0}
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[18:46, 22:42] = True
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[14:50, 18:46] = False
    assert (controls[:, inside | outside] == -1).all() and 90 < (controls[0] == 1).sum() < 130
    flipped = open_dataset(
        config_for(tmp_path, **(options | dict(height=32, width=16, crop="random", flip=True))),
        "train",
        0,
    )
    for i in range(8):
        assert torch.equal(
            flipped[i]["controls"], picture_levels(canny_edges(to_picture(flipped[i]["images"])))
        )
    assert same(by_index(batches(flipped, workers=2)), by_index(batches(flipped)))


def test_canny_sees_edges_by_two_thresholds():
    def outlined(
        *steps,
        # columns in which an edge is seen between black and these steps below it: a gradient of 4 ·
        # step
    ):
        image = np.zeros((32, 16 * len(steps), 3), np.uint8)
        for i, step in enumerate(steps):
            image[16:, 16 * i : 16 * i + 16] = step
        return (picture_levels(canny_edges(Image.fromarray(image)))[0] > 0).any(dim=0)[2:-2]

    assert not outlined(45).any() and outlined(55).all()
    assert outlined(45, 55).all()  # a weak edge that continues a strong one
    assert not outlined(20, 55)[:12].any()


def to_picture(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_canny_without_opencv_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        config_for("x", control="canny")


def test_validation_has_controls_of_the_centre(tmp_path):
    config = differing_controls(
        tmp_path, val_count=3, crop="random", flip=True, height=16, width=24
    )
    dataset = open_dataset(config, "val", 0)
    for i in range(3):
        expected = resize_crop(decode_picture(picture(56 + i, "png")), 16, 24)
        assert torch.equal(pixels_of(dataset[i]["controls"]), expected)


def test_modes_are_given_by_name_by_number_and_by_default(tmp_path):
    content = controlled(
        range(6),
        _0={"mode": "depth"},
        _1={"mode": 4},
        _2={"mode": "5"},
        _3={"mode": "colour"},
        _4={"a": 1},
    )
    write_tar(tmp_path / "0.tar", content)
    options = dict(control="png", shuffle=False, val_path=str(tmp_path))
    (rank,) = batches(
        open_dataset(config_for(tmp_path, control_mode="canny", **options), "train", 0), stop=6
    )
    assert [batch["modes"].tolist() for batch in rank] == [[2, 4], [5, 0], [0, 0]] and rank[0][
        "modes"
    ].dtype == torch.int64
    dataset = open_dataset(config_for(tmp_path, control_mode="9", **options), "train", 0)
    assert dataset[4]["modes"] == 9 and "mode 'colour'" in dataset[3]["bad"][0]
    dataset = open_dataset(config_for(tmp_path, control_mode="json", **options), "train", 0)
    assert dataset[3]["modes"] == 2 and [
        "no mode in its json" in why for why in dataset[3]["bad"]
    ] == [False, True, True]
    assert "modes" not in open_dataset(config_for(tmp_path, **options), "train", 0)[0]


def test_a_set_without_modes_has_none(tmp_path):
    write_tar(tmp_path / "0.tar", controlled(range(3), _0={"a": 1}, _1=[], _2={"mode": None}))
    assert set(open_dataset(config_for(tmp_path, control="png"), "train", 0)[0]) == {
        "images",
        "captions",
        "controls",
        "indices",
        "keys",
        "bad",
    }


@pytest.mark.parametrize("control", ["png", "canny"])
def test_cached_controls_equal_uncached_ones(tmp_path, control):
    content = controlled(range(11), **{f"_{i}": {"mode": i % 7} for i in range(11) if i != 5})
    content |= {f"{i:03d}.png": picture(i + 50, "png", (48, 40)) for i in range(11)} | {
        "003.png": b"",
        "004.webp": b"",
    }
    write_tar(tmp_path / "tars" / "0.tar", content)
    dataset = open_dataset(
        config_for(tmp_path / "tars", control=control, control_mode="json", caption_dropout=0.4),
        "train",
        0,
    )
    cached = CachedSamples(dataset, make_cache(dataset, tmp_path / "cache"))
    skipped = set()
    for i in range(20):
        a, b = dataset[i], cached[i]
        for name, posterior in (
            ("images", ("mean", "logvar")),
            ("controls", ("control_mean", "control_logvar")),
        ):
            assert all(
                torch.equal(b[k], v[0]) for k, v in zip(posterior, encode_images(a[name][None]))
            )
        assert (
            torch.equal(a["modes"], b["modes"]) and a["keys"] == b["keys"] and a["bad"] == b["bad"]
        )
        assert torch.equal(b["txt"], encode_texts([a["captions"]])[0][0])
        skipped |= {entry[:5] for entry in a["bad"]}
    assert skipped == ({"0/003", "0/004", "0/005"} if control == "png" else {"0/004", "0/005"})
    assert collated_shapes(cached)["modes"] == (2,)


def collated_shapes(dataset):
    (rank,) = batches(dataset, stop=6)
    return {
        name: tuple(value.shape)
        for name, value in rank[0].items()
        if isinstance(value, torch.Tensor)
    }


def test_caches_of_other_controls_are_stale(tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", controlled(range(5)))
    settings = (
        {},
        dict(control="png"),
        dict(control="png", control_mode="canny"),
        dict(control="png", control_mode="1"),
    )
    for changes in (*settings, dict(control="canny")):
        dataset = open_dataset(config_for(tmp_path / "tars", **changes), "train", 0)
        make_cache(dataset, tmp_path / "-".join(map(str, changes.values())))
        for other in (*settings, dict(control="canny")):
            if other != changes:
                with pytest.raises(ValueError, match="stale: other data"):
                    dataset = open_dataset(config_for(tmp_path / "tars", **other), "train", 0)
                    make_cache(dataset, tmp_path / "-".join(map(str, changes.values())))


def test_generated_circles_have_their_outlines_as_controls(tmp_path):
    config = fill50k_config(tmp_path / "data", control="png", caption_dropout=0.0)
    config.validate()
    for split, seed in (("train", 0), ("val", 1)):
        prepare_data(config, split)
        sample = open_dataset(config, split, 0)[0]
        number = int(sample["keys"].split("/")[1])
        _, outline, text = fill50k.draw_sample(number, size=32, seed=seed, held_out=split == "val")
        assert sample["captions"] == text and torch.equal(
            sample["controls"], picture_levels(Image.fromarray(outline))
        )


def test_mock_controls_are_seeded_and_leave_the_rest_as_it_is():
    config = DataConfig(kind="mock", count=10, height=32, width=32)
    steered = replace(config, control="png", control_mode="depth")
    shapes = dict(latent_shape=(4, 4, 4), text_shape=(3, 5), pooled_width=7)
    plain, a, b = (
        MockSamples(c, split="train", seed=seed, **shapes)
        for c, seed in ((config, 0), (steered, 0), (steered, 1))
    )
    assert torch.equal(a[3]["control_mean"], a[13]["control_mean"]) and a[3][
        "control_logvar"
    ].shape == (4, 4, 4)
    others = (a[4]["control_mean"], b[3]["control_mean"], a[3]["mean"])
    assert not any(torch.equal(a[3]["control_mean"], other) for other in others)
    assert set(a[3]) - set(plain[3]) == {
        "control_mean",
        "control_logvar",
        "modes",
    } and collated_shapes(a)["modes"] == (2,)
    assert (
        torch.equal(a[3]["mean"], plain[3]["mean"])
        and torch.equal(a[3]["txt"], plain[3]["txt"])
        and a[3]["modes"] == 2
    )
    pictures, without = (open_dataset(c, "train", 0) for c in (steered, config))
    assert set(pictures[2]) - set(without[2]) == {"controls", "modes"} and pictures[2][
        "controls"
    ].shape == (3, 32, 32)
    assert (
        torch.equal(pictures[2]["images"], without[2]["images"])
        and pictures[2]["captions"] == without[2]["captions"]
    )


# --- mock -----------------------------------------------------------------------------------------


def test_mock_is_seeded_by_index():
    config = DataConfig(kind="mock", count=10, height=32, width=32)
    shapes = dict(latent_shape=(4, 4, 4), text_shape=(3, 5), pooled_width=7)
    a, b = (MockSamples(config, split="train", seed=seed, **shapes) for seed in (0, 1))
    assert torch.equal(a[3]["mean"], a[13]["mean"]) and not torch.equal(a[3]["mean"], b[3]["mean"])
    assert not torch.equal(a[3]["mean"], a[4]["mean"]) and not torch.equal(a[3]["txt"], a[4]["txt"])
    (rank,) = batches(a, stop=6)
    assert {k: tuple(v.shape) for k, v in rank[0].items() if isinstance(v, torch.Tensor)} == {
        "mean": (2, 4, 4, 4),
        "logvar": (2, 4, 4, 4),
        "txt": (2, 3, 5),
        "pooled": (2, 7),
        "indices": (2,),
    }
    pictures = open_dataset(config, "train", 0)
    assert isinstance(pictures, MockPictures) and same(
        by_index(batches(pictures)), by_index(batches(pictures, ranks=3, workers=1))
    )
    assert pictures[2]["images"].shape == (3, 32, 32) and len(pictures[2]["captions"].split()) == 8
