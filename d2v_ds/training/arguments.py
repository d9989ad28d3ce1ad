"""The command line of training: DeepSpeed's spellings, a recipe, and key=value overrides."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from d2v_ds.training.codes import describe_codes

DESCRIPTION = """\
Pre-train or fine-tune a data2vec model.

  deepspeed train.py --deepspeed ds_configs/zero3.json --recipe multimodal_tiny data=DIR out=DIR
  torchrun --nproc_per_node 2 train.py --deepspeed zero2 --recipe image_tiny train.steps=1000
  python train.py --recipe audio_tiny

A run that stopped goes on with the same command; a finished one says so. SIGTERM, SIGUSR1 or SIGINT once finishes
the step and saves, a second one ends it at once."""

EPILOG = """\
overrides: any key of the recipe, for example
  out=DIR  data=DIR|'a{000..009}.tar'  seed=N  precision=auto|fp32|bf16|fp16  train.steps=N
  optim.lr=1e-3  modalities.image.data.batch=32  modalities.text.data.tokenizer=FILE
`--print-recipe` shows all keys with their values. An unknown key is an error that names the nearest one.

exit codes:
"""


@dataclass
class Arguments:
    recipe: str
    deepspeed: str | None
    overrides: list[str]
    print_recipe: bool


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EPILOG + describe_codes(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        default="multimodal_tiny",
        metavar="NAME|FILE.yaml",
        help="what is learned: a shipped recipe (`d2v recipes`; `variant=paper` beside it takes the paper's values "
        "where it says others than the released files) or a YAML file (default: %(default)s)",
    )
    parser.add_argument(
        "--deepspeed",
        nargs="?",
        const="",
        default=None,
        metavar="PATH|PRESET",
        help="how this machine runs it: a DeepSpeed JSON or a preset of ds_configs/ (bare or absent: zero3)",
    )
    parser.add_argument(
        "--deepspeed_config", default=None, metavar="PATH", help="the same, in DeepSpeed's older spelling"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=None, help="set by launchers; not needed"
    )
    parser.add_argument(
        "--print-recipe", action="store_true", help="print the resolved recipe as YAML and exit"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what is different this time")
    return parser


def parse_arguments(argv: list[str] | None = None, prog: str | None = None) -> Arguments:
    """Exits with a message, as argparse does, for contradicting or malformed arguments."""
    parser = build_parser(prog)
    values, positional = parser.parse_known_args(argv)
    for text in positional:
        if text.startswith("-"):
            parser.error(f"unknown option {text}; see --help")
    path = values.deepspeed
    overrides = list(values.overrides) + positional
    if path and "=" in path and not path.endswith(".json"):  # bare --deepspeed before an override
        overrides.insert(0, path)
        path = ""
    if path and values.deepspeed_config and path != values.deepspeed_config:
        parser.error(
            f"--deepspeed {path} and --deepspeed_config {values.deepspeed_config} contradict each other; "
            "give one"
        )
    return Arguments(values.recipe, path or values.deepspeed_config, overrides, values.print_recipe)
