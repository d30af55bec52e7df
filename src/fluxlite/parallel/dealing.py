"""Sharded tensors dealt out: each is whole on one of the ranks that share it, and comes back.

All is sent at once, so a rank sends and receives its own part of every tensor, twice, and no more.
"""

import torch
import torch.distributed as dist

from fluxlite.parallel.weights import local_part


def parts_of_ranks(tensor, mesh):
    """The `local_part` of a DTensor that each rank of `mesh.shards` has, in their order."""
    names, mine = tensor.device_mesh.mesh_dim_names, tensor.device_mesh.get_coordinate()
    found = []
    for number in range(mesh.shards.size()):
        there = dict(zip(names, mine)) | dict(zip(("fsdp", "tp"), divmod(number, mesh.tp.size())))
        found.append(local_part(tensor, [there[name] for name in names]))
    return found


def deal_tensors(parts, tensors, mesh):
    """The i-th of some DTensors, whole, on the i-th rank of `mesh.shards`; None on ranks beyond
    their number. Collective.

    `parts` are this rank's parts of values that lie as `tensors` do, all of one type.
    """
    number, sent = mesh.shards.get_local_rank(), torch.cat([part.flatten() for part in parts])
    whole = sent.new_empty(tensors[number].shape) if number < len(tensors) else None
    views = views_of_ranks(whole, tensors, mesh)
    received = exchange_flat(sent, part_sizes(parts, mesh), part_sizes(views, mesh), mesh)
    for view, values in zip(views, received):
        view.copy_(values.view_as(view))
    return whole


def collect_parts(whole, parts, tensors, mesh):
    """This rank's parts of all tensors, of each of which one rank has the `whole`, as
    `deal_tensors` gave it; they are like `parts`. Collective.
    """
    views = views_of_ranks(whole, tensors, mesh)
    sent = torch.cat([view.flatten() for view in views]) if views else parts[0].new_empty(0)
    received = exchange_flat(sent, part_sizes(views, mesh), part_sizes(parts, mesh), mesh)
    return [values.view_as(part) for values, part in zip(received, parts)]


def views_of_ranks(whole, tensors, mesh):
    """Each rank's part of this rank's tensor; none where it has no tensor."""
    if whole is None:
        return []
    return [whole[part] for part in parts_of_ranks(tensors[mesh.shards.get_local_rank()], mesh)]


def part_sizes(parts, mesh):
    """How many values each rank of `mesh.shards` is sent, or sends: those of its part, if any."""
    sizes = [part.numel() for part in parts]
    return sizes + [0] * (mesh.shards.size() - len(sizes))


def exchange_flat(sent, counts, sizes, mesh):
    """Send counts[i] values to the i-th rank of `mesh.shards`; sizes[i] that it sends, for each."""
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, counts, group=mesh.shards.get_group())
    return received.split(sizes)
