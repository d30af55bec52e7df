"""Buckets: which shape each picture is trained in. A step's samples are of one (`GroupedOrder`)."""

import logging
import os
import re
from dataclasses import replace
from itertools import chain

import numpy as np

from fluxlite.cli.messages import warn_for_all
from fluxlite.data.order import GroupedOrder
from fluxlite.data.parts import MASK

log = logging.getLogger("fluxlite")


def shape_shards(config, shards):
    """The shards once for each resolution, with the shape of each sample where these differ."""
    resolutions = config.shapes()
    if resolutions == [[(config.height, config.width)]]:
        return shards
    found = []
    for shapes in resolutions:
        found += [replace(shard, shapes=nearest_shapes(shard, shapes)) for shard in shards]
    return found


def nearest_shapes(shard, shapes):
    """The shape (height, width) of the nearest proportions for each picture: (n, 2)."""
    shapes = np.array(shapes, np.int32)
    if len(shapes) == 1:
        return np.broadcast_to(shapes[0], (len(shard.keys), 2))
    wanted = np.log(shard.sizes[:, 1] / shard.sizes[:, 0])
    given = np.log(shapes[:, 0] / shapes[:, 1])
    return shapes[np.abs(wanted[:, None] - given).argmin(axis=1)]


def log_samples(samples):
    """Log what an epoch has: of which place, in which shapes, and with which masks."""
    config, order = samples.config, samples.order
    if len(config.places()) > 1 or config.repeats:
        for shard in samples.shards:
            how = ", ".join(f"{name}={value}" for name, value in vars(shard.options).items())
            log.info("%s: %d samples, %s", shard.path, len(shard.keys), how)
    if isinstance(order, GroupedOrder):
        for numbers, of_shape in order.groups:
            shape = samples.shape(numbers[0])
            log.info("bucket %d x %d: %d samples an epoch", *shape, len(of_shape))
    if config.mask:
        lacking, count = count_maskless(samples), samples.starts[-1]
        log.info("%d of %d samples have no mask and count whole", lacking, count)
    warn_of_named_repeats(samples)
    warn_of_small(samples)


def count_maskless(samples):
    """How many samples have no mask beside their picture."""
    return sum(int((shard.spans[:, MASK, 1] < 0).sum()) for shard in samples.shards)


def check_masks(samples):
    """Raise `ValueError` where masks are asked for and no picture has one."""
    mask = samples.config.mask
    if mask and count_maskless(samples) == samples.starts[-1]:
        why = "no picture has one beside it: name its ending"
        if mask == "alpha":
            why = "no picture has transparency: name the ending of a file beside it"
        raise ValueError(f"data.mask={mask}: {why}")


def warn_of_small(samples):
    """Say so where pictures are smaller than they are trained, as thumbnails are."""
    found = []
    for first, shard in zip(samples.starts.tolist(), samples.shards):
        if shard.sizes is not None:
            shapes = (samples.config.height, samples.config.width)
            shapes = shapes if shard.shapes is None else shard.shapes
            factors = (shapes / shard.sizes[:, ::-1]).max(axis=1)
            found += [(factors[i], first + int(i)) for i in np.flatnonzero(factors > 1)]
    if found:
        most, number = max(found)
        text = (
            "%d of %d samples are smaller than they are trained and enlarged, %s most: %.1f times"
        )
        warn_for_all(text, len(found), samples.starts[-1], samples.key(number), most)


def warn_of_named_repeats(samples):
    """Say so where a folder is named as kohya's are, `10_dog`, and its repeats are not given."""
    names = {shard.path for shard in samples.shards if os.path.isdir(shard.path)}
    below = [*chain.from_iterable(map(os.scandir, names))]
    names |= {entry.path for entry in below if entry.is_dir()}
    named = sorted(name for name in names if re.match(r"\d+_", os.path.basename(name)))
    if named and not samples.config.repeats:
        text = "%s: its name's repeats are not read: name it in data.path= and give data.repeats="
        warn_for_all(text, named[0])
