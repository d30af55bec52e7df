"""Mutated tars, pictures, captions, descriptions, caches: what is accepted is right."""

import io
import json
import tarfile
import zlib

import pytest
import torch
from fuzzing import BOTH, try_cases
from PIL import Image
from test_data import config_for, make_cache, members, write_tar

from fluxlite.data.cache import CachedSamples
from fluxlite.data.images import BadSample, decode_picture
from fluxlite.data.opening import open_dataset

ENDINGS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}


def colour_of(number):
    return 40 + number * 37 % 200, 40 + number * 71 % 200, 40 + number * 113 % 200


def telling_picture(number, kind="PNG", size=(16, 16), **options):
    """A picture whose colour tells the number."""
    stream = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    Image.new("RGB", size, colour_of(number)).save(stream, kind, **lossless, **options)
    return stream.getvalue()


def telling_caption(number):
    """A caption that tells the number, and whether it is still what was written."""
    return f"{number} {zlib.crc32(b'%d' % number):08x}"


def mutated(random, data, *, most=4):
    """Bytes flipped, cut, doubled, filled or moved."""
    data = bytearray(data)
    for _ in range(random.randint(1, most)):
        if not data:
            break
        at, length = random.randrange(len(data)), random.choice((1, 2, 8, 100, 512))
        kind = random.randrange(6)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at : at + length] = random.randbytes(length)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = bytes(min(length, len(data) - at))
    return bytes(data)


def read_pairs(path, **changes):
    """All samples of an opened set, each checked: an intact caption has its own picture."""
    dataset = open_dataset(
        config_for(path, shuffle=False, val_path=str(path), height=16, width=16, **changes),
        "train",
        0,
    )
    numbers = []
    for i in range(len(dataset)):
        sample = dataset[i]
        number, _, checksum = sample["captions"].partition(" ")
        if not number.isdecimal() or telling_caption(int(number)) != sample["captions"]:
            continue  # a byte of a caption was changed, which nobody can know
        seen = sample["images"].float().mean((1, 2)).tolist()
        right = max(abs(a - b) for a, b in zip(seen, colour_of(int(number)))) < 4
        assert right, f"{sample['keys']}: caption {number}, picture {seen}"
        numbers.append(int(number))
    return numbers


def random_samples(random):
    """[(name, bytes)] of samples in any order and form, and whether all their keys differ."""
    keys, files, before = [], [], None
    for number in range(random.randint(1, 8)):
        key = random.choice(
            (
                "a",
                "b",
                f"s{number}",
                f"d/{number}",
                f"s{number}",
                f"frame.{number:03d}",
                "caf\udce9",
            )
        )
        image, text = random.choice(
            (("png", "txt"), ("webp", "json"), ("jpg", "txt"), ("png", "json"))
        )
        if key.split(".")[0] == before:
            files += [
                ("between.png", telling_picture(9)),
                ("between.txt", telling_caption(9).encode()),
            ]
            keys.append("between")
        caption = telling_caption(number)
        data = caption if text == "txt" else json.dumps({"caption": caption})
        files += [
            (f"{key}.{image}", telling_picture(number, ENDINGS[image])),
            (f"{key}.{text}", data.encode()),
        ]
        before = key.split(".")[0]
        keys.append(before)
    unique = len(keys) == len(set(keys)) and not any("frame." in name for name, _ in files)
    if unique and random.random() < 0.3:
        random.shuffle(files)
    return files, unique


def write_any(random, path, files):
    kind = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("count", BOTH)
def test_no_tar_mixes_samples_hangs_or_breaks(tmp_path, count):
    def case(random):
        path = tmp_path / f"{random.random()}.tar"
        files, unique = random_samples(random)
        write_any(random, path, files)
        if random.random() < 0.6:
            unique = False
            path.write_bytes(mutated(random, path.read_bytes()))
        try:
            found = read_pairs(path)
            assert not unique or len(found) == len(files) // 2, (
                f"{len(found)} of {len(files) // 2} samples"
            )
            return len(found)
        finally:
            path.unlink()

    verdicts = try_cases(count, case)
    assert {kind for kind, _ in verdicts} == {"accepted", "refused"}
    assert sum(kind == "accepted" and bool(found) for kind, found in verdicts) > count / 5


@pytest.mark.parametrize("count", BOTH)
def test_no_picture_does_more_than_be_skipped(count):
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "x" * 300
    kinds = [
        ("PNG", {}),
        ("JPEG", {"exif": exif}),
        ("WEBP", {"exif": exif}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PNG", {"exif": exif}),
    ]
    pictures = [telling_picture(3, kind, (24, 16), **options) for kind, options in kinds]

    def case(random):
        try:
            image = decode_picture(mutated(random, random.choice(pictures)))
        except BadSample:
            return "skipped"
        assert image.mode == "RGB" and min(image.size) >= 1
        image.tobytes()
        return "read"

    verdicts = try_cases(count, case)
    assert {verdict for _, verdict in verdicts} == {"skipped", "read"} and {
        kind for kind, _ in verdicts
    } == {"accepted"}


def random_json(random, depth=0):
    """Any value of JSON's, odd ones among them."""
    plain = [
        None,
        True,
        -1,
        10**30,
        "",
        "x",
        "\ud83d",
        " \ufeff",
        telling_caption(1),
        float("nan"),
        1e308,
    ]
    if depth > 3 or random.random() < 0.5:
        return random.choice(plain)
    if random.random() < 0.5:
        return [random_json(random, depth + 1) for _ in range(random.randint(0, 3))]
    return {
        random.choice(("caption", "mode", "long", "")): random_json(random, depth + 1)
        for _ in range(random.randint(0, 3))
    }


@pytest.mark.parametrize("count", BOTH)
def test_no_caption_does_more_than_be_skipped(tmp_path, count):
    def case(random):
        content = {
            "good.png": telling_picture(1),
            "good.txt": telling_caption(1).encode(),
            "odd.png": telling_picture(1),
        }
        data = json.dumps(random_json(random)).encode(
            random.choice(("utf-8", "utf-8", "utf-16", "utf-8-sig"))
        )
        data = mutated(random, data) if random.random() < 0.3 else data
        content["odd.json"] = data
        if random.random() < 0.5:
            content["odd.txt"] = random.choice(
                (telling_caption(1).encode(), random.randbytes(30), b"\xff\xfea\x00", b"\n \t")
            )
        write_tar(tmp_path / "0.tar", content)
        changes = (
            dict(control="canny", control_mode=random.choice(("json", "depth")))
            if random.random() < 0.3
            else {}
        )
        dataset = open_dataset(
            config_for(tmp_path, shuffle=False, val_path=str(tmp_path), **changes), "train", 0
        )
        for i in range(2):
            text = dataset[i]["captions"]
            assert text and text == text.strip() and not text.startswith("\ufeff")
            text.encode()
        return len(dataset[1]["bad"])

    verdicts = try_cases(count, case)
    bad = [found for kind, found in verdicts if kind == "accepted"]
    assert 0 in bad and 1 in bad


SPLIT = (
    "exclude: []\nsplit_parts:\n  train:\n  - a.tar\n  - '{b..c}.tar'\n  val: [d.tar]\n  test: []\n"
)
FIELDS = (
    "__module__: megatron.energon\n__class__: CaptioningWebdataset\nfield_map:\n  image: "
    "png\n  caption: json[caption]\n"
)
PIECES = [
    "{",
    "}",
    "[",
    "]",
    "&a ",
    "*a",
    "..",
    "/",
    "!!python/name:os.system ",
    "pipe:exit 9",
    "{0..9999999}",
    ": ",
    "- ",
    "\n",
    "'",
    "null",
    "txt",
    "jpg",
    "json",
    "train",
    "\t",
    "\x00",
    "é",
    "? ",
    "|",
    "2001-02-30",
    "0x",
    "1e9",
    "!!set {a}",
]


@pytest.mark.parametrize("count", BOTH)
def test_no_description_of_a_dataset_does_more_than_be_refused(tmp_path, count):
    for number, name in enumerate("abcd"):
        files = [
            (f"{name}.png", telling_picture(number)),
            (f"{name}.json", json.dumps({"caption": telling_caption(number)}).encode()),
        ]
        write_tar(tmp_path / f"{name}.tar", dict(files) | {f"{name}.txt": b"no"})
    meta = tmp_path / ".nv-meta"
    meta.mkdir()

    def case(random):
        texts = [SPLIT, FIELDS]
        for _ in range(random.randint(0, 3)):
            which = random.randrange(2)
            at, text = random.randrange(len(texts[which])), texts[which]
            cut = at + random.choice((0, 0, 1, 5))
            texts[which] = (
                text[:at] + random.choice(PIECES) * random.choice((1, 1, 1, 2, 3000)) + text[cut:]
            )
        (meta / "split.yaml").write_text(texts[0])
        (meta / "dataset.yaml").write_text(texts[1])
        found = read_pairs(tmp_path)
        assert texts != [SPLIT, FIELDS] or sorted(found) == [0, 1, 2]
        return len(found)

    verdicts = try_cases(count, case)
    assert {kind for kind, _ in verdicts} == {"accepted", "refused"}
    assert all(line for kind, line in verdicts if kind == "refused")


@pytest.mark.parametrize("count", BOTH)
def test_no_cache_is_read_otherwise_than_it_was_written(tmp_path, count):
    write_tar(tmp_path / "tars" / "0.tar", members(range(6)))
    dataset = open_dataset(
        config_for(tmp_path / "tars", shuffle=False, caption_dropout=0.3), "train", 0
    )
    folder = make_cache(dataset, tmp_path / "cache")
    whole = {file: file.read_bytes() for file in folder.iterdir()}

    def read_whole():
        cached = CachedSamples(dataset, make_cache(dataset, tmp_path / "cache"))
        return [cached[i] for i in range(len(cached))]

    right = read_whole()

    def case(random):
        file = random.choice(sorted(whole))
        data = mutated(random, whole[file], most=2)
        file.write_bytes(data)
        try:
            for a, b in zip(read_whole(), right):
                assert (
                    all(torch.equal(a[k], b[k]) for k in ("mean", "logvar", "txt", "pooled"))
                    and a["keys"] == b["keys"]
                )
            assert (
                data == whole[file]
                or file.name == "cache.json"
                and json.loads(data) == json.loads(whole[file])
            )
            return "as it was"
        finally:
            file.write_bytes(whole[file])

    verdicts = try_cases(count, case)
    assert sum(kind == "refused" for kind, _ in verdicts) > count / 2
