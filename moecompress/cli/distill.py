"""moecompress distill: train a smaller checkpoint towards the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, Model, Overrides, RecipeFile, Text, Trust, print_json, without_tensors

MINUTES = 30.0


def command(
    model: Model,
    teacher: Annotated[str, typer.Option("--teacher", help="The model to follow: a folder or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder; must not exist or be empty.")],
    train: Annotated[
        str,
        typer.Option("--train", help="experts, router, experts+router, or all (everything but the embeddings and the head)."),
    ] = "all",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="How many steps to train.")] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0, help=f"How long to train; {MINUTES:g} if --steps is not given either.")
    ] = None,
    top_logits: Annotated[
        int, typer.Option("--top-logits", min=0, help="Tokens of the teacher that are told apart; 0: all.")
    ] = 64,
    cross_entropy: Annotated[
        float, typer.Option("--cross-entropy", min=0, help="Weight of the text's own next tokens beside the teacher.")
    ] = 0.0,
    kd_share: Annotated[
        float, typer.Option("--kd-share", min=0, max=1, help="Share of the run after which the teacher is left out.")
    ] = 1.0,
    qat: Annotated[
        str | None, typer.Option("--qat", help="Train the experts as what quantizing makes of them: ternary, sign, 2, 3, 4 or e.g. b3g128s.")
    ] = None,
    qat_share: Annotated[
        float | None, typer.Option("--qat-share", min=0, max=1, help="With --qat ternary: share of the codes that a step may change (PV), e.g. 0.01.")
    ] = None,
    balance: Annotated[float, typer.Option("--balance", min=0, help="Weight of a loss that keeps all experts in use.")] = 0.0,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Highest learning rate.")] = 1e-4,
    warmup: Annotated[float, typer.Option("--warmup", min=0, max=0.9, help="Share of the run in which it rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0, help="AdamW's weight decay.")] = 0.0,
    clip: Annotated[float, typer.Option("--clip", min=0, help="Longest gradient, longer ones are shortened; 0: no limit.")] = 1.0,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Sequences at once (the recipe's compute.micro_batch).")
    ] = None,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Batches of a step.")] = 2,
    sequences: Annotated[
        int | None, typer.Option("--sequences", min=2, help="Sequences of the text, held-out ones included.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Tokens of a sequence.")] = None,
    check_every: Annotated[
        int, typer.Option("--check-every", min=1, help="Steps between measurements and saved states.")
    ] = 25,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the order of the text.")] = None,
    text: Text = None,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from the last saved step of a killed run (default), or start over.")
    ] = True,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Give a pruned, merged or slimmed checkpoint quality back: train it to predict what the original predicts.

    MODEL is the student. Every --check-every steps it is compared with the teacher on text it is never trained on; the best
    weights are written, in files like the student's, and measured again. If none were better, the student comes out unchanged.
    With --qat the experts are written as rounded values: `quantize` with a candidate of that kind finds them exactly (ternary,
    sign) or but for the rounding of the checkpoint's numbers (integers). With --kd-share 0 the teacher is only measured against,
    and the best weights are those of least perplexity.

    More text is better: --text should be like the model's use, --sequences as many as it has. Both models must fit into memory.

    Examples:

        moecompress distill half --teacher ./model -o recovered --text corpus.jsonl --sequences 1000 --minutes 30

        moecompress distill half --teacher ./model -o repaired --train router --steps 200 --json

        moecompress distill ./model --teacher ./model -o ternary --train experts --qat ternary --minutes 60
    """
    from moecompress.cli.common import recipe_of
    from moecompress.distill.folder import distill
    from moecompress.distill.train import Settings

    given = {"calibration.sequences": sequences, "calibration.length": length, "compute.micro_batch": batch, "compute.seed": seed}
    changes = [f"{key}={value}" for key, value in given.items() if value is not None]
    made = recipe_of(recipe, text=text, overrides=[*(overrides or []), *changes])
    if steps is None and minutes is None:
        minutes = MINUTES
    settings = Settings(steps, minutes, top_logits, cross_entropy, kd_share, rate, warmup, weight_decay, clip,
                        made.compute.micro_batch, accumulate, check_every, made.compute.seed, qat, qat_share, balance)  # fmt: skip
    record = distill(model, teacher, output, made, settings, train, fresh=not resume, trust_remote_code=trust_remote_code)
    shown = without_tensors(record, output)
    if json_:
        print_json(shown)
    else:
        _print(shown)


def _print(record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("on held-out text", "before", "after", title=f"{record['steps']} steps, {record['seconds']:.0f} s; best at step {record['best_step']}")
    before, after = record["before"], record["heldout"]
    for key, label, form in (("kl_mean", "KL(teacher ‖ student), nats", ".5f"), ("top1_agreement", "top-1 agreement", ".2%"),
                             ("perplexity", f"perplexity (teacher {after['reference_perplexity']:.3f})", ".3f")):  # fmt: skip
        table.add_row(label, format(before[key], form), format(after[key], form))
    console.print(table)
    console.print(record["output"])
