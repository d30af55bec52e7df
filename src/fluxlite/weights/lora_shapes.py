"""The shape of the transformer that a LoRA file was made for, as far as its factors tell it.

For a file that is read without its base: to be written in another dialect.
"""

import math
import re

from fluxlite.nets.configs import FluxConfig
from fluxlite.weights import lora_keys

# blocks in any layout, dotted or with underscores
BLOCKS = {
    "num_double_blocks": r"(?:^|[._])(?:double_blocks|(?<!single_)transformer_blocks)[._](\d+)[._]",
    "num_single_blocks": r"(?:^|[._])(?:single_blocks|single_transformer_blocks)[._](\d+)[._]",
}
MOST_BLOCKS = 128  # of a file that changes few of them: FLUX.1 has 38
# the linears of ours whose outputs have the hidden width; of all others the inputs do
HIDDEN_OUTPUTS = r"(img_in|txt_in|\w+_in\.linear_(in|out)|.*\.proj|.*\.mlp\.linear_out)\.weight"
# our linears, of how many parts they are in the file's layout, the side, and what its width is
WIDTHS = (
    (r"img_in\.weight", 1, "in", "in_channels"),
    (r"txt_in\.weight", 1, "in", "text_width"),
    (r"pooled_in\.linear_in\.weight", 1, "in", "pooled_width"),
    (r"out\.weight", 1, "out", "out_channels"),
    (r".*\.mlp\.linear_in\.weight", 1, "out", "MLP"),
    (r".*\.mlp\.linear_out\.weight", 1, "in", "MLP"),
    (r"single_blocks\.\d+\.qkv\.q\.weight", 4, "out", "MLP and 3"),
    (r"single_blocks\.\d+\.proj\.weight", 2, "in", "MLP and 1"),
    (r".*_norm\.weight", 1, "out", "head"),
)
# a factor's role: which of its axes is a side of the difference; those of one side are multiplied
SIDES = {
    "down": {"in": 1},
    "up": {"out": 0},
    "hada_w1_a": {"out": 0},
    "hada_w1_b": {"in": 1},
    "diff": {"out": 0, "in": -1},
    "set": {"out": 0, "in": -1},
    "whole": {"out": 0, "in": -1},
}
for _w in ("lokr_w1", "lokr_w2"):
    SIDES |= {_w: {"out": 0, "in": 1}, f"{_w}_a": {"out": 0}, f"{_w}_b": {"in": 1}}


def infer_lora_config(tensors):
    """A `FluxConfig` of the widths and depths that a file's keys and shapes tell.

    What they do not tell is FLUX.1's. Raises `ValueError` where there cannot be as many blocks.
    """
    keys = tensors.keys()
    counts = {name: 1 + _last_number(pattern, keys) for name, pattern in BLOCKS.items()}
    for count in counts.values():
        if count > max(len(keys), MOST_BLOCKS):
            raise ValueError(f"block {count - 1} among {len(keys)} keys: the file is damaged")
    shapes = linear_shapes(tensors, FluxConfig(**counts))
    hidden = next(filter(None, map(hidden_width, shapes)), FluxConfig.hidden_size)
    found = {}
    for name, parts, sides in shapes:
        for pattern, of_parts, side, key in WIDTHS:
            if re.fullmatch(pattern, name) and parts == of_parts and sides.get(side):
                found[key] = sides[side]
    for key, count in (("MLP and 3", 3), ("MLP and 1", 1)):
        if key in found:
            found["MLP"] = found.pop(key) - count * hidden
    ratio = max(1, min(64, found.pop("MLP", 4 * hidden) // hidden))
    head = found.pop("head", 128 if hidden % 128 == 0 else hidden)
    shape = dict(hidden_size=hidden, num_heads=max(1, hidden // head), rope_axes=(0, 0, head))
    return FluxConfig(**counts, **found, **shape, mlp_ratio=ratio)


def _last_number(pattern, keys):
    """The largest number of a block, −1 without any."""
    found = (re.search(pattern, key) for key in keys)
    return max((int(match[1]) for match in found if match), default=-1)


def linear_shapes(tensors, config):
    """[(our first linear, of how many parts, {"in" or "out": width})] for each of a file's
    modules.
    """
    names, found = lora_keys.module_names(config), {}
    for key in tensors.keys():
        meaning, shape = lora_keys.read_key(key, names), tensors.shape(key)
        if not meaning or meaning.module.part != "transformer" or not shape:
            continue
        module = meaning.module
        sides = found.setdefault(module.name, (module.rules["weight"], {}))[1]
        for side, axis in SIDES.get(meaning.role, {}).items():
            if meaning.leaf == "weight" and axis < len(shape):
                sides.setdefault(side, []).append(shape[axis])
    for _, sides in found.values():
        sides |= {side: math.prod(of) for side, of in sides.items()}
    return [(rule.ours[0], len(rule.ours), sides) for rule, sides in found.values()]


def hidden_width(linear):
    """The hidden width that the shape of a linear tells, None where it does not."""
    name, _, sides = linear
    if name.endswith("norm.weight"):
        return None
    return sides.get("out" if re.fullmatch(HIDDEN_OUTPUTS, name) else "in")
