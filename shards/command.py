"""`d2v prepare NAME`: the command line of every preparer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

from shards import folder, glue, imagenet, librispeech, openwebtext, table
from shards.prepare import SHARD_MIB, prepare

MOST_MIB = 1 << 30

PREPARERS: dict[str, tuple[ModuleType, str]] = {
    "folder": (folder, "a tree of images, sounds or texts, or a CSV, TSV or JSONL table of them"),
    "librispeech": (
        librispeech,
        "1,000 hours of English read aloud, with transcripts (60 GB), or its mini parts",
    ),
    "imagenet": (imagenet, "ImageNet-1k, from its tars, folders of classes or parquet files"),
    "openwebtext": (openwebtext, "8 million documents of the web (13 GB, 46 GB as shards)"),
    "glue": (glue, "one of GLUE's eight tasks, from its TSV or parquet files"),
    "table": (table, "your own labelled texts or pairs of texts: TSV, CSV, JSONL or parquet"),
}


def main(argv: list[str] | None = None, prog: str = "d2v prepare") -> int:
    parser = build_parser(prog)
    arguments = parser.parse_args(argv)
    try:
        job = arguments.make_job(arguments)
        job.name = arguments.name or job.name
        job.seed = arguments.seed
        job.workers = job.workers if arguments.workers is None else arguments.workers
        if not 0 < arguments.shard_mib < MOST_MIB:
            raise ValueError(
                f"--shard-mib {arguments.shard_mib} must be above 0 and below {MOST_MIB}; {SHARD_MIB} is usual"
            )
        job.shard_bytes = round(arguments.shard_mib * (1 << 20))
        job.say = print
        prepare(job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Data as tar shards, ready to train on. See docs/data.md.", allow_abbrev=False
    )
    names = parser.add_subparsers(required=True, metavar="NAME")
    for name, (module, words) in PREPARERS.items():
        one = names.add_parser(
            name,
            help=words,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(one)
        add_common(one)
        one.set_defaults(make_job=module.make_job)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; the same command goes on in it"
    )
    parser.add_argument("--name", help="begins the names of the shards (default: the data set's name)")
    parser.add_argument("--seed", type=int, default=0, help="the order follows from it (default: 0)")
    parser.add_argument(
        "--shard-mib", type=float, default=SHARD_MIB, help=f"size of a shard (default: {SHARD_MIB})"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one for each core)")


if __name__ == "__main__":
    sys.exit(main())
