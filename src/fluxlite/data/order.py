"""In which order samples come: a pure function of (seed, epoch)."""

import bisect

import numpy as np

from fluxlite import rng


class RecentValues:
    """The last `limit` values that were made, by key; in another process it starts empty."""

    def __init__(self, limit):
        self.limit, self.values = limit, {}

    def get(self, key, make):
        """The value of a key, or else what `make()` gives."""
        if key not in self.values:
            while len(self.values) >= self.limit:
                del self.values[next(iter(self.values))]
            self.values[key] = make()
        return self.values[key]

    def __reduce__(self):
        return RecentValues, (self.limit,)


def epoch_generator(seed, epoch, stream):
    """NumPy's generator of what an epoch permutes."""
    return np.random.default_rng(rng.generator(seed, epoch, stream).initial_seed())


class SampleOrder:
    """Which sample a global index is.

    Samples are numbered through the shards, whose sizes are `counts`. An epoch visits each shard
    `repeats` times, 1 if left out; a visit for a fraction takes that part of it, in turn. Each
    epoch permutes the visits, then the samples within windows of `window` visits. Only the windows
    in use are permuted.
    """

    def __init__(self, counts, *, seed, shuffle, window, repeats=None):
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.seed, self.shuffle, self.window = seed, shuffle, window
        self.visits = visit_shards(counts, repeats or [1] * len(counts))
        self.ends = np.cumsum([size for _, size in self.visits])
        self.permuted = RecentValues(6)

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def following(self, index):
        """The numbers of an epoch's samples, from a global index on, the first after the last."""
        epoch, position = divmod(int(index), len(self))
        return (self._number(epoch, (position + i) % len(self)) for i in range(len(self)))

    def _number(self, epoch, position):
        if not self.shuffle:
            visit = int(np.searchsorted(self.ends, position, side="right"))
            place = position - self.ends[visit] + self.visits[visit][1]
            return int(self._visited(epoch, visit, place))
        visits, ends = self.permuted.get(epoch, lambda: self._permuted_visits(epoch))
        i = int(np.searchsorted(ends, position, side="right"))
        numbers = self.permuted.get((epoch, i), lambda: self._permuted_window(epoch, i, visits))
        return int(numbers[position - (ends[i - 1] if i else 0)])

    def _visited(self, epoch, visit, places):
        """The numbers at some places of a visit, which goes on where its last one ended."""
        shard, size = self.visits[visit]
        first, end = self.starts[shard : shard + 2]
        return first + (places + epoch * size) % (end - first)

    def _permuted_visits(self, epoch):
        """The epoch's visits in their order, and the position at which each window of them ends."""
        visits = epoch_generator(self.seed, epoch, "shards").permutation(len(self.visits))
        sizes = np.diff(self.ends, prepend=0)[visits]
        return visits, np.cumsum(np.add.reduceat(sizes, np.arange(0, len(visits), self.window)))

    def _permuted_window(self, epoch, i, visits):
        inside = visits[i * self.window : (i + 1) * self.window]
        places = ((visit, np.arange(self.visits[visit][1])) for visit in inside)
        numbers = np.concatenate([self._visited(epoch, *place) for place in places])
        return epoch_generator(self.seed, epoch, f"window {i}").permutation(numbers)


def visit_shards(counts, repeats):
    """The visits of an epoch to shards: [(shard, samples)]."""
    found = []
    for shard, (count, often) in enumerate(zip(counts, repeats)):
        found += [(shard, int(count))] * int(often)
        if often % 1 and count:
            found.append((shard, max(1, round(often % 1 * count))))
    return found


class GroupedOrder:
    """The order of samples of several shapes: each `size` successive indices are of one.

    `groups` are [(numbers of its samples, their `SampleOrder`)]. Each group goes through its own
    epochs, whose ends lie anywhere in a batch. By the end of any epoch of all samples it has had
    its share of the batches, rounded down. Within an epoch the batches are shuffled.
    """

    def __init__(self, groups, *, size, seed, shuffle):
        self.groups, self.size, self.seed, self.shuffle = groups, size, seed, shuffle
        self.lengths = [len(order) for _, order in groups]
        self.drawn = RecentValues(6)

    def __len__(self):
        return sum(self.lengths)

    def following(self, index):
        """As `SampleOrder.following`, of the index's group."""
        batch, row = divmod(int(index), self.size)
        numbers, order = self.groups[(place := self._place(batch))[0]]
        return (int(numbers[i]) for i in order.following(place[1] * self.size + row))

    def _place(self, batch):
        """The group of a batch, and which of that group's batches it is."""
        most = (batch + 1 + len(self.groups)) * self.size // len(self) + 2
        epoch = bisect.bisect_right(range(most), batch, key=lambda e: sum(self._taken(e))) - 1
        groups, numbers = self.drawn.get(epoch, lambda: self._drawn(epoch))
        place = batch - sum(self._taken(epoch))
        return groups[place], numbers[place]

    def _taken(self, epoch):
        """How many batches each group has had before an epoch."""
        return [epoch * length // self.size for length in self.lengths]

    def _drawn(self, epoch):
        """The group of each of an epoch's batches, and which of the group's batches it is."""
        spans, pairs = zip(self._taken(epoch), self._taken(epoch + 1)), []
        for group, span in enumerate(spans):
            pairs += [(group, number) for number in range(*span)]
        if self.shuffle:
            order = epoch_generator(self.seed, epoch, "groups").permutation(len(pairs))
            pairs = [pairs[i] for i in order]
        return list(zip(*pairs))


def order_samples(config, shards, *, seed, shuffle):
    """The order of the samples of shards, by their repeats and, where they differ, their shapes."""
    counts, repeats = [len(s.keys) for s in shards], [s.options.repeats for s in shards]
    how = dict(seed=seed, shuffle=shuffle)
    if shards[0].shapes is None:
        return SampleOrder(counts, window=config.shuffle_window, repeats=repeats, **how)
    shapes = np.concatenate([shard.shapes for shard in shards])
    owners, groups = np.repeat(np.arange(len(shards)), counts), []
    for shape in np.unique(shapes, axis=0):
        numbers = np.flatnonzero((shapes == shape).all(axis=1))
        of_shard = np.bincount(owners[numbers], minlength=len(shards))
        order = SampleOrder(of_shard, window=config.shuffle_window, repeats=repeats, **how)
        groups.append((numbers, order))
    return GroupedOrder(groups, size=config.global_batch, **how)
