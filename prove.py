"""Measure whether a model has learnt fill50k: circles and backgrounds of the named colours, for
pairs that it never saw together.

    python prove.py  # the shipped tiny pipeline
    python prove.py --checkpoint runs/mine --num 500
    python prove.py --controlnet runs/controlnet_tiny  # is the circle where its control has it?
    python prove.py --lora runs/lora_tiny  # rings, which the shipped pipeline cannot draw
    python prove.py --kind fill --checkpoint runs/fill_tiny  # or control, or kontext

Draws a picture for each of `--num` held-out pairs of colours, measures it
(`fluxlite.data.circles`), and compares with two controls: the same pictures under each other's
prompts, and pairs whose two colours change places under the same seed. Writes proof.json and
grid.png, prints a table and, last, one JSON line.
"""

import json
from functools import partial
from pathlib import Path

from fluxlite.cli.programs import run_program, stopping_at_once

PARTS = "checkpoint", "t5", "clip", "tokenizers", "autoencoder"
DRAWN_WITH = *PARTS, "seed", "steps", "guidance", "true_cfg", "batch"


def usage():
    from fluxlite.cli.command_line import flags_help
    from fluxlite.draw.proof import ProofConfig

    return flags_help(ProofConfig, __doc__)


def body(arguments):
    with stopping_at_once():
        from fluxlite.cli.command_line import naming_flags, parse_flags
        from fluxlite.draw.proof import ProofConfig, format_kind, format_lora, format_table
        from fluxlite.settings import check_output

    config = parse_flags(ProofConfig, arguments)
    config.validate()
    check_output(config.output, "--output ")
    how = {key: getattr(config, key) for key in DRAWN_WITH}
    given = {key: value for key, value in how.items() if value is not None}
    ways = (config.kind, measure_kind, format_kind), (config.lora, measure_lora, format_lora)
    chosen = [(by, form) for asked, by, form in ways if asked]
    measured, formatted = next(iter(chosen), (measure, format_table))
    with naming_flags(ProofConfig):
        report, pictures, results = measured(config, given)
    report |= how | {name: getattr(config, name) for name in ("controlnet", "lora", "kind")}
    folder = Path(config.output)
    write_proof(folder, report, pictures, results)
    print(formatted(report))
    print(f"pictures: {folder / 'grid.png'}, measurements: {folder / 'proof.json'}")
    print(json.dumps(report))


def measure(config, how):
    """Report, pictures and measurements of a model, and of its ControlNet if there is one."""
    from fluxlite.draw.proof import prove

    return prove(
        partial(draw, config.controlnet, how),
        num=config.num,
        num_swaps=config.swaps,
        seed=config.seed,
        control_size=config.control_size if config.controlnet else None,
    )


def measure_lora(config, how):
    """The same of a LoRA."""
    import fluxlite
    from fluxlite.draw.proof import prove_lora

    def draw_adapted(prompts, strength):
        own = {} if strength is None else {"lora": fluxlite.Lora(config.lora, strength)}
        return draw(None, how | own, prompts, None)

    sizes = dict(num=config.num, num_circles=config.circles or 500)
    return prove_lora(draw_adapted, **sizes, seed=config.seed)


def measure_kind(config, how):
    """The same of a model that sees pictures."""
    from fluxlite.draw.proof import prove_kind

    sizes = dict(num=config.num, size=config.control_size, seed=config.seed)
    return prove_kind(partial(draw_cases, how, config.kind), config.kind, **sizes)


def check_proof_kind(pipeline, kind):
    """Raise `ValueError` where the channels of a pipeline's transformer are another kind's.

    A Kontext's are a plain model's. A plain model can fill too, by inpainting: that is said.
    """
    from fluxlite.cli.messages import warn_for_all

    if pipeline.kind not in {"fill": ("fill", "plain"), "kontext": ("plain",)}.get(kind, (kind,)):
        raise ValueError(
            f"--kind={kind}: {pipeline.where} is of kind {pipeline.kind}: name with --checkpoint "
            f"one that was trained with model.kind={kind}"
        )
    if kind == "fill" and pipeline.kind == "plain":
        warn_for_all("%s is no Fill: what is measured is inpainting", pipeline.where)


def draw_cases(how, kind, cases):
    """Pictures of `SeenCase`s; one by one where each has a reference of its own, which serves all
    prompts of a call.
    """
    import fluxlite
    from fluxlite.draw.generation import show_steps
    from fluxlite.draw.pipeline import PARTS_FIELDS

    parts = {name: how[name] for name in how.keys() & set(PARTS_FIELDS)}
    pipeline = fluxlite.load_pipeline(**parts)
    check_proof_kind(pipeline, kind)
    common = {name: value for name, value in how.items() if name not in parts}
    common |= dict(checkpoint=pipeline, on_step=show_steps(leave=False))
    if "reference" in cases[0].given:
        alone = ((c.prompt, c.given, number) for number, c in enumerate(cases))
        drawn = (fluxlite.generate(p, **g, **common, prompt_number=n) for p, g, n in alone)
        return [picture for [picture] in drawn]
    given = {name: [case.given[name] for case in cases] for name in cases[0].given}
    return fluxlite.generate([case.prompt for case in cases], **given, **common)


def draw(controlnet, how, prompts, images):
    """Pictures of prompts, with a ControlNet one for each control picture of `images`."""
    import fluxlite
    from fluxlite.draw.generation import show_steps

    controls = [fluxlite.Control(controlnet, images)] if images else []
    return fluxlite.generate(prompts, controls=controls, **how, on_step=show_steps(leave=False))


def write_proof(folder, report, pictures, results):
    """proof.json and grid.png, each whole or not at all."""
    from fluxlite.draw.contact_sheet import contact_sheet
    from fluxlite.draw.proof import format_verdict
    from fluxlite.weights.tensor_files import atomic_weights

    with atomic_weights(folder / "proof.json", overwrite=True) as path:
        path.write_text(json.dumps({**report, "pictures": results}, indent=1))
    captions = [format_verdict(r) for r in results[:48]]
    with atomic_weights(folder / "grid.png", overwrite=True) as path:
        contact_sheet(pictures[:48], columns=8, captions=captions).save(path, "PNG")


if __name__ == "__main__":
    run_program(body, usage=usage, ranks=False)
