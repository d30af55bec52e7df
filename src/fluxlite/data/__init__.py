"""Data: pictures and captions to batches that are a pure function of (config, seed, global index).

    prepare_data(config, "train")  # on every rank; generates fill50k where it is missing
    dataset = open_dataset(config, "train", seed)
    for batch in make_loader(dataset, global_batch=8, micro_batch=2, dp_rank=0, dp_size=2,
                             start_index=0, workers=2): …

A data set is any object with these; tars and folders, their cache and made-up data are:

    dataset.config           its `DataConfig`
    len(dataset)             samples of an epoch
    dataset[index]           the sample of a global index, from 0 on, epoch after epoch: a dict
    dataset.digest()         names all that its samples depend on; empty where they are made up
    dataset.file_names()     the files they lie in

A sample has `indices`, its global index; `keys`, its name in a log; `bad`, a list of "name: reason"
for what was passed over in its place; and pictures or what encoders make of them:

    images (3, H, W) uint8                       mean, logvar (C, h, w) float32: the posterior
    captions: a string                           txt (L, D), pooled (P,): the text encoders' output
    controls (3, H, W), with `data.control`      control_mean, control_logvar (C, h, w)
    masks (1, H, W) uint8, with `data.mask`      weights: float32 scalar, the loss's,
    modes: int64 scalar, with `data.control_mode`    with `data.loss_weight`

Shapes: H, W pixels; C, h, w channels and cells of latents; L tokens, D and P widths of T5 and CLIP.
H and W may differ from step to step, and are the same for all samples of one: the global indices
from a multiple of `data.global_batch` to the next.
"""
