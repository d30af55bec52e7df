import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fluxlite import draws
from fluxlite.data import (
    CachedSamples,
    DataConfig,
    MockPictures,
    MockSamples,
    build_cache,
    fill50k,
    make_loader,
    open_dataset,
    prepare,
)
from fluxlite.data.images import BadSample, decode, resize_crop
from fluxlite.data.shards import Order


def picture(value, kind="jpeg", size=(32, 32)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, value // 2)).save(stream, kind)
    return stream.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path):
    """Three tars of 7, 5 and 9 samples with a control each."""
    number = 0
    for shard, count in enumerate((7, 5, 9)):
        members = {}
        for _ in range(count):
            members |= {f"{number:03d}.jpg": picture(number * 10), f"{number:03d}.txt": f"picture {number}".encode()}
            members |= {f"{number:03d}.png": picture(255, "png")}
            number += 1
        write_tar(tmp_path / "tars" / f"{shard}.tar", members)
    return tmp_path / "tars"


def config_for(path, **changes):
    defaults = dict(kind="webdataset", path=str(path), height=32, width=32, val_count=1, caption_dropout=0.0, max_bad_fraction=1.0)
    return DataConfig(**(defaults | changes))


def batches(dataset, *, ranks=1, workers=0, micro_batch=2, global_batch=6, start=0, stop=24):
    """All ranks' batches, rank by rank."""
    return [
        list(
            make_loader(
                dataset,
                global_batch=global_batch,
                micro_batch=micro_batch,
                dp_rank=r,
                dp_size=ranks,
                start_index=start,
                stop_index=stop,
                workers=workers,
            )
        )  # fmt: skip
        for r in range(ranks)
    ]


def by_index(rank_batches):
    return {
        int(i): (b["keys"][k], b["captions"][k], b["images"][k])
        for rank in rank_batches
        for b in rank
        for k, i in enumerate(b["indices"])
    }


def same(a, b):
    return a.keys() == b.keys() and all(a[i][:2] == b[i][:2] and torch.equal(a[i][2], b[i][2]) for i in a)


def test_each_sample_comes_once_an_epoch_over_ranks_and_workers(tars):
    dataset = open_dataset(config_for(tars, val_count=3), "train", 0)
    assert len(dataset) == 18
    for epoch in range(2):
        got = by_index(batches(dataset, ranks=3, workers=2, start=18 * epoch, stop=18 * (epoch + 1)))
        assert len(got) == 18 and len({key for key, *_ in got.values()}) == 18
    orders = [[dataset.order(i) for i in range(18 * e, 18 * e + 18)] for e in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_batches_do_not_depend_on_mesh_or_workers(tars):
    config = config_for(tars, caption_dropout=0.5, crop="random", flip=True, height=16, width=16)
    dataset = open_dataset(config, "train", 0)
    reference = by_index(batches(dataset))
    assert {c for _, c, _ in reference.values()} > {""}
    for ranks, workers, micro_batch in ((1, 2, 3), (3, 0, 1), (2, 1, 3)):
        assert same(by_index(batches(dataset, ranks=ranks, workers=workers, micro_batch=micro_batch)), reference)
    assert not same(by_index(batches(open_dataset(config, "train", 1))), reference)


def test_resume_goes_on_with_the_very_next_sample(tars):
    dataset = open_dataset(config_for(tars), "train", 0)
    whole, rest = by_index(batches(dataset)), by_index(batches(dataset, start=12))
    assert same({i: v for i, v in whole.items() if i >= 12}, rest)


def test_windows_keep_shards_together():
    order = Order(np.array([4, 4, 4, 4]), seed=0, shuffle=True, window=2)
    first = {order(i) // 4 for i in range(8)}
    assert len(first) == 2 and sorted(order(i) for i in range(16)) == list(range(16))


def test_validation_is_held_out_and_fixed(tars, caplog):
    config = config_for(tars, val_count=4, caption_dropout=1.0, crop="random", flip=True)
    with caplog.at_level(logging.INFO, "fluxlite"):
        training, validation = open_dataset(config, "train", 0), open_dataset(config, "val", 0)
    assert "last 4 of 21" in caplog.text
    keys = {validation[i]["keys"] for i in range(4)}
    assert keys.isdisjoint({training[i]["keys"] for i in range(len(training))}) and len(training) == 17
    assert [validation[i]["captions"] for i in range(2)] == ["picture 17", "picture 18"]


def test_bad_samples_are_skipped_counted_and_logged(tmp_path, caplog):
    members = {}
    for i in range(30):
        members |= {f"{i:03d}.jpg": picture(i), f"{i:03d}.txt": f"picture {i}".encode()}
    members["004.jpg"] = members["004.jpg"][:200]
    members["009.txt"] = b"  "
    del members["012.txt"], members["020.jpg"]
    write_tar(tmp_path / "0.tar", members)
    with caplog.at_level(logging.WARNING, "fluxlite"):
        dataset = open_dataset(config_for(tmp_path), "train", 0)
        got = by_index(batches(dataset, workers=1, stop=24))
    assert len(dataset) == 27 and len(got) == 24
    assert "2 samples have no picture or no caption" in caplog.text and "012" in caplog.text
    seen = [key for key, *_ in got.values()]
    assert not {"0.tar/004", "0.tar/009"} & set(seen)
    for key in ("0.tar/004", "0.tar/009"):
        assert (f"skipped {key}" in caplog.text) == any(dataset.shards.key(dataset.order(i)) == key for i in range(24))
    with pytest.raises(ValueError, match="max_bad_fraction"):
        batches(open_dataset(config_for(tmp_path, max_bad_fraction=0.01), "train", 0), stop=120)


@pytest.mark.parametrize(
    "mode,color", [("L", 200), ("P", None), ("CMYK", (0, 255, 255, 0)), ("RGBA", (255, 0, 0, 0)), ("LA", (9, 255)), ("I;16", 51400)]
)
def test_every_kind_of_picture_becomes_rgb(mode, color):
    image = Image.new("RGB", (8, 8), (1, 200, 3)).convert("P") if mode == "P" else Image.new(mode, (8, 8), color)
    stream = io.BytesIO()
    image.save(stream, "jpeg" if mode == "CMYK" else "png")
    got = decode(stream.getvalue())
    assert got.mode == "RGB" and got.size == (8, 8)
    expected = {"L": (200,) * 3, "P": (1, 200, 3), "CMYK": (255, 0, 0), "RGBA": (255,) * 3, "LA": (9,) * 3, "I;16": (200,) * 3}[
        mode
    ]
    assert np.abs(np.array(got)[4, 4].astype(int) - expected).max() <= (30 if mode == "P" else 3)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "jpeg", exif=exif)
    assert decode(stream.getvalue()).size == (4, 8)


@pytest.mark.parametrize("data", [b"", b"no picture", picture(3)[:-200], picture(3, "png")[:40]])
def test_broken_pictures_are_refused(data):
    with pytest.raises(BadSample):
        decode(data)


def test_resize_crop_covers_and_keeps():
    exact = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    assert torch.allclose(resize_crop(exact, 16, 16), torch.from_numpy(np.array(exact)).permute(2, 0, 1) / 127.5 - 1)
    wide = Image.new("RGB", (64, 16))
    wide.paste((255, 255, 255), (24, 0, 40, 16))
    assert resize_crop(wide, 16, 16).eq(1).all()
    crops = {float(resize_crop(wide, 16, 16, crop="random", generator=draws.generator(0, i, "crop")).mean()) for i in range(20)}
    assert len(crops) > 5


def test_json_captions_globs_braces_and_urls(tmp_path, tars):
    members = {f"{i}.webp": picture(9, "webp") for i in range(3)} | {
        f"{i}.json": json.dumps({"text": f"t{i}"}).encode() for i in range(3)
    }
    write_tar(tmp_path / "json" / "0.tar", members)
    dataset = open_dataset(config_for(tmp_path / "json", caption_field="text"), "train", 0)
    assert sorted(dataset[i]["captions"] for i in range(2)) == ["t0", "t1"]
    for path, count in ((f"{tars}/*.tar", 20), (f"{tars}/{{0,2}}.tar", 15), (f"{tars}/0.tar::{tars}/1.tar", 11)):
        assert len(open_dataset(config_for(path), "train", 0)) == count
    for url in (f"file:{tars}/0.tar", f"pipe:cat {tars}/0.tar"):
        assert len(open_dataset(config_for(url, download=str(tmp_path / "fetched")), "train", 0)) == 6


def test_energon_split_is_honoured(tars):
    (tars / ".nv-meta").mkdir()
    (tars / ".nv-meta" / "split.yaml").write_text("split_parts:\n  train: ['{0..1}.tar']\n  val: [2.tar]\n  test: []\n")
    config = config_for(tars, val_count=9)
    assert len(open_dataset(config, "train", 0)) == 12 and len(open_dataset(config, "val", 0)) == 9


@pytest.mark.parametrize("name", ["nothing", "empty", "cut.tar", "text.tar"])
def test_what_is_no_data_is_named(tmp_path, tars, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.tar").write_bytes((tars / "0.tar").read_bytes()[:5000])
    (tmp_path / "text.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(ValueError, match=name):
        open_dataset(config_for(tmp_path / name), "train", 0)


# --- cache ----------------------------------------------------------------------------------------------------------------------


def encode_images(images):
    mean = torch.nn.functional.avg_pool2d(images, 8)
    return mean, mean - 3


def encode_texts(texts):
    rows = torch.stack([torch.randn(4, 6, generator=draws.generator(0, t, "test")) for t in texts])
    return rows, rows.mean(1)


def make_cache(dataset, directory, digest="d", **options):
    return build_cache(dataset, directory, encode_images=encode_images, encode_texts=encode_texts, digest=digest, **options)


def test_cache_equals_no_cache(tars, tmp_path):
    write_tar(tars / "1.tar", {"a.jpg": picture(1)[:100], "a.txt": b"broken", "b.jpg": picture(2), "b.txt": b"picture 0"})
    dataset = open_dataset(config_for(tars, caption_dropout=0.4), "train", 0)
    for rank in range(2):
        make_cache(dataset, tmp_path / "cache", rank=rank, world_size=2)
    plain, cached = (batches(d, stop=60)[0] for d in (dataset, CachedSamples(dataset, tmp_path / "cache")))
    dropped = 0
    for a, b in zip(plain, cached, strict=True):
        assert a["indices"].tolist() == b["indices"].tolist() and a["keys"] == b["keys"]
        mean, logvar = encode_images(a["images"])
        txt, pooled = encode_texts(a["captions"])
        dropped += a["captions"].count("")
        assert all(torch.equal(b[k], v) for k, v in dict(mean=mean, logvar=logvar, txt=txt, pooled=pooled).items())
    assert 0 < dropped < 60


def test_a_stale_cache_is_refused_and_a_finished_one_reused(tars, tmp_path):
    dataset = open_dataset(config_for(tars), "train", 0)
    make_cache(dataset, tmp_path / "cache")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
    make_cache(dataset, tmp_path / "cache")
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()}
    with pytest.raises(ValueError, match="stale: its encoders"):
        make_cache(dataset, tmp_path / "cache", digest="other")
    with pytest.raises(ValueError, match="stale: its data, size"):
        make_cache(open_dataset(config_for(tars / "0.tar", height=16, width=16), "train", 0), tmp_path / "cache")


# --- fill50k --------------------------------------------------------------------------------------------------------------------


def test_generated_samples_are_deterministic_and_hold_pairs_out(tmp_path):
    config = DataConfig(path=str(tmp_path / "data"), count=60, generate_size=32, height=32, width=32, val_count=10)
    for split in ("train", "val"):
        prepare(config, split)
    captions = {s: {open_dataset(config, s, 0)[i]["captions"] for i in range(n)} - {""} for s, n in (("train", 60), ("val", 10))}
    for split, held_out in (("train", False), ("val", True)):
        for text in captions[split]:
            assert fill50k.is_held_out(*text.removesuffix(" background").split(" circle with ")) == held_out
    first = (tmp_path / "data" / "train" / "000000.tar").read_bytes()
    fill50k.write_shards(fill50k.generated_samples(60, size=32, seed=0), tmp_path / "again")
    assert (tmp_path / "again" / "000000.tar").read_bytes() == first
    with tarfile.open(tmp_path / "again" / "000000.tar") as tar:
        assert sorted(tar.getnames())[:3] == ["000000.jpg", "000000.png", "000000.txt"]
    with pytest.raises(ValueError, match="generated with"):
        prepare(DataConfig(path=str(tmp_path / "data"), count=61, generate_size=32), "train")


def test_both_orders_of_a_held_out_pair_are_held_out():
    held = fill50k.pairs(held_out=True)
    assert {(b, a) for a, b in held} == set(held)
    assert 0.03 < len(held) / (len(held) + len(fill50k.pairs(held_out=False))) < 0.07
    assert len(fill50k.COLOURS) == len({tuple(fill50k.rgb(c)) for c in fill50k.COLOURS}) > 130


def _prepare_slowly(path, count):
    prepare(DataConfig(path=str(path), count=count, generate_size=32), "train")


def test_racing_and_killed_generators_leave_whole_shards(tmp_path):
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=_prepare_slowly, args=(tmp_path / "data", 100_000))
    killed.start()
    while not list((tmp_path / "data").glob(".train-*/*.tar")):
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not (tmp_path / "data" / "train").exists()
    racers = [context.Process(target=_prepare_slowly, args=(tmp_path / "data", 200)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    config = DataConfig(path=str(tmp_path / "data"), count=200, generate_size=32, height=32, width=32)
    assert len(open_dataset(config, "train", 0)) == 200


def test_the_original_layout_is_imported(tmp_path):
    source = tmp_path / "fill50k"
    held_out = fill50k.caption(*fill50k.pairs(held_out=True)[0])
    lines = []
    for i, text in enumerate(["red circle with blue background", held_out, "a caption of another kind"]):
        for folder in ("source", "target"):
            (source / folder).mkdir(parents=True, exist_ok=True)
            (source / folder / f"{i}.png").write_bytes(picture(i * 9, "png"))
        lines.append(json.dumps({"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": text}))
    (source / "prompt.json").write_text("\n".join(lines))
    fill50k.write_shards(fill50k.imported_samples(source), tmp_path / "tars")
    dataset = open_dataset(config_for(tmp_path / "tars"), "train", 0)
    assert dataset[0]["captions"] == "red circle with blue background" and len(dataset) == 1
    with pytest.raises(ValueError, match="prompt.json"):
        list(fill50k.imported_samples(tmp_path))


# --- mock -----------------------------------------------------------------------------------------------------------------------


def test_mock_is_seeded_by_index():
    config = DataConfig(kind="mock", count=10, height=32, width=32)
    shapes = dict(latent_shape=(4, 4, 4), text_shape=(3, 5), pooled_width=7)
    a, b = (MockSamples(config, split="train", seed=s, **shapes) for s in (0, 1))
    assert torch.equal(a[3]["txt"], a[13]["txt"]) and not torch.equal(a[3]["txt"], b[3]["txt"])
    assert {k: tuple(v.shape) for k, v in a[0].items() if isinstance(v, torch.Tensor)} == {
        "mean": (4, 4, 4), "logvar": (4, 4, 4), "txt": (3, 5), "pooled": (7,)}  # fmt: skip
    pictures = MockPictures(config, split="train", seed=0)
    assert pictures[2]["images"].shape == (3, 32, 32) and len(pictures[2]["captions"].split()) == 8
