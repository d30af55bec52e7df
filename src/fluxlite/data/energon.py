"""What an Energon dataset's `.nv-meta` says: the tars of each split, and which files are used.

`split.yaml` (or `split.json`) has `split_parts` and `exclude`; `dataset.yaml` may have a
`field_map`, as that of `CaptioningSample`: {image: jpg, caption: json[long]}. Nothing of it is ever
run. Source: megatron-energon 7.4, flavors/webdataset/metadata.py and field_access.py.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from fluxlite.cli.descriptions import inside_folder, read_json, read_yaml
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import typed_description
from fluxlite.data.braces import expand_braces
from fluxlite.data.parts import JSON, TEXT

FIELD = re.compile(r"([^\[\],\s]+)((?:\[[^\[\]]+\])*)")
CODE = ("sample_loader", "part_filter")


@dataclass
class SplitDescription:
    """`split.yaml`."""

    split_parts: dict = field(default_factory=dict)  # {split: [brace patterns of tars]}
    exclude: list[str] = field(default_factory=list)


def energon_split(folder, split, setting):
    """The tars of one part of an Energon dataset; None where the folder describes no split.

    Raises `ValueError` for tars that are missing or lie elsewhere, and for excluded samples.
    """
    meta = Path(folder) / ".nv-meta"
    file = next((f for f in (meta / "split.yaml", meta / "split.json") if f.exists()), None)
    if file is None:
        return None
    values = read_yaml(file) if file.suffix == ".yaml" else read_json(file)
    about = typed_description(
        file, SplitDescription, {k: v for k, v in values.items() if v is not None}
    )
    patterns = about.split_parts.get(split) or []
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{file}: split_parts.{split} must be a list of names of tars")
    single = [name for name in about.exclude if not name.endswith(".tar")]
    if single:
        raise ValueError(
            f"{setting}: {file} excludes single samples ({single[0]}), but only whole tars can be: "
            "remove them from it"
        )
    excluded = set(expand_braces(about.exclude, f"{file}: exclude"))
    names = [
        n for n in expand_braces(patterns, f"{file}: split_parts.{split}") if n not in excluded
    ]
    missing = [name for name in names if not inside_folder(folder, name, file).is_file()]
    if missing:
        raise ValueError(
            f"{setting}={folder}: {file} lists {len(missing)} tars that are not there, "
            f"{missing[0]} among them"
        )
    return [str(Path(folder) / name) for name in names]


def energon_parts(folder, parts):
    """`parts` as the `field_map` of a folder's `.nv-meta/dataset.yaml` has them, if there is one.

    Raises `ValueError` for what cannot be followed.
    """
    file = Path(folder) / ".nv-meta" / "dataset.yaml"
    if not file.exists():
        return parts
    values = read_yaml(file)
    code = [key for key in CODE if values.get(key) is not None]
    if code:
        raise ValueError(f"{file}: {code[0]} is code, which is not run: give a field_map instead")
    if (fields := values.get("field_map")) is None:
        return parts
    if not isinstance(fields, dict) or not {"image", "caption"} <= fields.keys():
        raise ValueError(
            f"{file}: field_map must name image and caption, as in image: jpg, caption: txt"
        )
    others = sorted(str(key) for key in fields if key not in ("image", "caption"))
    if others:
        warn_for_all("%s: field_map's %s is not used", file, ", ".join(others))
    images = _field_options(file, "image", fields["image"])
    captions = _field_options(file, "caption", fields["caption"])
    if any(keys for _, keys in images) or parts.control in [ending for ending, _ in images]:
        raise ValueError(
            f"{file}: field_map.image={fields['image']} must be an ending that is not "
            "data.control's"
        )
    return _mapped(file, parts, tuple(ending for ending, _ in images), captions)


def _mapped(file, parts, images, captions):
    texts = {ending for ending, keys in captions if not keys}
    jsons = {ending for ending, keys in captions if keys}
    if len(texts) > 1 or len(jsons) > 1 or any(e.split(".")[-1] != "json" for e in jsons):
        raise ValueError(
            f"{file}: field_map.caption may name one text and one json with its keys, as in "
            "json[long]"
        )
    if texts & {"json"}:
        raise ValueError(
            f"{file}: field_map.caption=json is no text: name a key of it, as in json[caption]"
        )
    stated = parts.captions[0][1:]
    if stated != ("caption",) and (JSON, *stated) not in [(JSON, *keys) for _, keys in captions]:
        raise ValueError(
            f"{file} has a field_map, which says where captions are: leave data.caption_field= out"
        )
    options = tuple((JSON, *keys) if keys else (TEXT,) for _, keys in captions)
    text, described = next(iter(texts), None), next(iter(jsons), parts.json)
    return replace(parts, images=images, text=text, json=described, captions=options)


def _field_options(file, name, value):
    """`json[a][b],txt` as [("json", ("a", "b")), ("txt", ())]."""
    options = []
    for option in value.split(",") if isinstance(value, str) else [""]:
        found = FIELD.fullmatch(option.strip())
        if found is None:
            raise ValueError(
                f"{file}: field_map.{name}={value!r:.80} is no ending, as jpg, or json[key]"
            )
        options.append((found[1].lower(), tuple(re.findall(r"\[([^\[\]]+)\]", found[2]))))
    return options
