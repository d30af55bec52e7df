"""Samples of tars and folders, read by position, in an order that is a pure function of (seed,
epoch).

The sample of a global index is the same on any mesh and with any workers, and a resumed run reads
nothing that was consumed.
"""

import hashlib
from functools import partial

import numpy as np
import torch
from PIL import Image

from fluxlite import rng
from fluxlite.cli.descriptions import foreign_json
from fluxlite.cli.options import shortened
from fluxlite.data.captions import read_caption
from fluxlite.data.config import PlaceOptions
from fluxlite.data.images import (
    BadSample,
    canny_edges,
    choose_frame,
    decode_alpha,
    decode_mask,
    decode_picture,
    picture_levels,
)
from fluxlite.data.indexed import read_part
from fluxlite.data.order import RecentValues, order_samples
from fluxlite.data.parts import CONTROL, IMAGE, JSON, MASK, config_parts, printable_name
from fluxlite.data.urls import fetched_description
from fluxlite.nets.configs import MODES, mode_number

MAX_IN_A_ROW = 100  # bad samples, before a wrong setting is a likelier reason than bad luck


def stated_mode(data):
    """What a sample's json, bytes or None, says of its kind of control; None for nothing."""
    try:
        fields = foreign_json(data or b"{}")
    except ValueError:  # then there is no caption either, which is reported
        return None
    return fields.get("mode") if isinstance(fields, dict) else None


# --- samples --------------------------------------------------------------------------------------


def first_good_sample(samples, index, load):
    """The sample of a global index, or else the next good one of its epoch.

    Returns its number, what `load(number)` gives, and the bad before, as "shard/key: reason".
    `load` raises `BadSample`. Raises `ValueError` where too many in a row are bad.
    """
    bad = []
    for number in samples.order.following(index):
        try:
            return number, load(number), bad
        except BadSample as error:
            bad.append(f"{samples.key(number)}: {error}")
        if len(bad) == MAX_IN_A_ROW:
            break
    raise ValueError(f"{len(bad)} samples in a row cannot be used, first {bad[0]}")


class Samples:
    """The data set of tars or folders: pictures and captions, read by position.

    Controls and masks are in the same frame as their images. A bad sample's place is taken by the
    epoch's next good one of its shape. In training the crop, the flip and the dropping of the
    caption are keyed by (seed, index); otherwise the crop is the centre's and captions stay.
    """

    def __init__(self, config, shards, *, seed, training):
        self.config, self.shards, self.seed, self.training = config, shards, seed, training
        self.starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        self.order = order_samples(config, shards, seed=seed, shuffle=training and config.shuffle)
        self.files = RecentValues(256)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        number, sample, bad = first_good_sample(
            self, index, lambda number: self.read(number, index)
        )
        if self.drops_caption(index):
            sample["captions"] = ""
        return sample | self.named(number, index) | {"bad": bad}

    def named(self, number, index):
        """What sample `number` is called at a global index, and what its loss counts."""
        about = {"indices": index, "keys": self.key(number)}
        if not (self.training and self.config.loss_weight):
            return about
        shard, _ = self.place(number)
        return about | {"weights": torch.tensor(self.shards[shard].options.loss_weight)}

    def file_names(self):
        """The names of the tars or folders."""
        return [shard.name for shard in self.shards]

    def layout_digest(self):
        """Sixteen hexadecimal digits for tars' names and sizes, and for what is read of them."""
        config = self.config
        control = f"/{config.control}/{config.control_mode}" if config.control else ""
        mask = f"/mask {config.mask}" if config.mask else ""
        mask += "/pictures" * config.cache_pictures
        digest = hashlib.blake2b(f"{config.caption_field}{control}{mask}".encode(), digest_size=8)
        columns = MASK + 1 if config.mask else CONTROL + bool(config.control_ending)
        for shard in self.shards:
            digest.update(f"{shard.name}/{shard.size}/{len(shard.keys)}/".encode())
            digest.update(b"/".join(shard.keys.tolist()))
            digest.update(shard.spans[:, :columns].tobytes())
            if shard.parts != config_parts(config):
                digest.update(repr(shard.parts).encode())
            if shard.options.template != PlaceOptions.template:
                digest.update(shard.options.template.encode())
            if shard.shapes is not None:
                digest.update(shard.shapes.tobytes())
        return digest.hexdigest()

    def digest(self):
        """Sixteen hexadecimal digits for all that the samples depend on.

        That is `layout_digest` and the tars' contents. These are told by what a server said of a
        tar, else by its time of change, as `make` and `rsync` do.
        """
        digest = hashlib.blake2b(self.layout_digest().encode(), digest_size=8)
        for shard in self.shards:
            fetched = fetched_description(shard.path)
            known = fetched and (fetched.etag or fetched.modified)
            digest.update(f"/{known or shard.modified}".encode())
        return digest.hexdigest()

    def place(self, number):
        """The shard of a sample, by its position among the shards, and the row in it."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, int(number - self.starts[shard])

    def key(self, number):
        """The name of a sample's tar and its own, as a log can show it."""
        shard, row = self.place(number)
        return f"{self.shards[shard].name}/{printable_name(self.shards[shard].keys[row])}"

    def read(self, number, index):
        """Sample `number` as a global index has it; raises `BadSample`."""
        caption, image = self._caption(number), decode_picture(self._bytes(number, IMAGE))
        framed = self._frame(image.size, number, index)
        target = framed.of(image)
        sample = {"images": picture_levels(target), "captions": caption}
        if self.config.mask:
            sample["masks"] = picture_levels(self._mask(number, framed))
        if self.config.control:
            of_file = self.config.control_ending
            sample["controls"] = picture_levels(
                self._control(number, framed) if of_file else canny_edges(target)
            )
        if self.config.control_mode is not None:
            sample["modes"] = torch.tensor(self._mode(number))
        return sample

    def drops_caption(self, index):
        """Whether the sample of a global index is trained with the empty caption."""
        drawn = rng.uniform(seed=self.seed, indices=[index], stream="dropout")
        return self.training and bool(drawn < self.config.caption_dropout)

    def shape(self, number):
        """Height and width that sample `number` is framed to."""
        shard, row = self.place(number)
        shapes = self.shards[shard].shapes
        return (self.config.height, self.config.width) if shapes is None else shapes[row].tolist()

    def _frame(self, size, number, index):
        """The part of a picture of `size` that a global index shows."""
        config, shape = self.config, self.shape(number)
        if not self.training or (config.crop == "center" and not config.flip):
            return choose_frame(size, *shape)
        generator = rng.generator(self.seed, index, "crop")
        drawn = dict(crop=config.crop, flip=config.flip, generator=generator)
        return choose_frame(size, *shape, **drawn)

    def _mask(self, number, framed):
        """A sample's mask, an image of one channel; white where it has none."""
        decode = decode_alpha if self.config.mask == "alpha" else decode_mask
        data = self._bytes(number, MASK)
        try:
            whole = data and decode(data)
            mask = framed.of(whole or Image.new("L", framed.size, "white"), Image.Resampling.BOX)
            seen = whole if self.config.crop == "random" else mask  # another crop may see more
            if whole and not seen.getbbox():
                raise BadSample("black where its picture is seen: nothing of it would count")
        except BadSample as error:
            raise BadSample(f"its mask ({self.config.mask}): {error}") from None
        return mask

    def _control(self, number, framed):
        try:
            return framed.of(decode_picture(self._bytes(number, CONTROL)))
        except BadSample as error:
            raise BadSample(f"its control ({self.config.control}): {error}") from None

    def _mode(self, number):
        """The number of a sample's kind of control: its json's, else `data.control_mode`."""
        stated = stated_mode(self._bytes(number, JSON))
        mode = self.config.control_mode if stated is None else stated
        if mode == "json":
            raise BadSample(
                "no mode in its json: name one with data.control_mode= for those without"
            )
        if mode_number(mode) is None:
            raise BadSample(
                f"mode {shortened(mode)} in its json is neither a number nor one of "
                f"{', '.join(MODES)}"
            )
        return mode_number(mode)

    def _bytes(self, number, column):
        """The bytes of a sample's picture, txt, json or control; None where it has none."""
        shard, row = self.place(number)
        shard = self.shards[shard]
        offset, size = shard.spans[row, column].tolist()
        if size < 0:
            return None
        return read_part(self._opened(shard, shard.places[row, column]), column, offset, size)

    def _opened(self, shard, number):
        """A file of a shard, the one that was indexed: in another one the pairs would be wrong."""
        path = shard.files[number][0]
        file, identity = self.files.get(path, lambda: shard.open_unchanged(number))
        if shard.identity_of(file) != identity:
            del self.files.values[path]
            return self._opened(shard, number)
        return file

    def _caption(self, number):
        """A sample's caption in its template."""
        shard = self.shards[self.place(number)[0]]
        template = shard.options.template
        if not shard.parts.captions:
            return template
        return template.replace("{}", read_caption(shard.parts, partial(self._bytes, number)))
