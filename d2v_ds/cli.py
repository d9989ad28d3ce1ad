"""`d2v`: what can be done from a shell. Each command is a thin layer over the function of the same name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from d2v_ds import __version__


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:  # its own parser: DeepSpeed's spellings and key=value overrides
        from d2v_ds.training.run import main as train_main

        return train_main(argv[1:], prog="d2v train")
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2v", description="Train and use data2vec models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="pre-train a model (d2v train --help)", add_help=False)

    export = commands.add_parser("export", help="weights in a format of ours or of another library")
    export.add_argument(
        "path", type=Path, metavar="PATH", help="run folder, step_* folder, export or .pt file"
    )
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument(
        "--weights",
        choices=("student", "teacher", "both"),
        default=None,
        help="whose weights (default: student, or what is there; fairseq: both)",
    )
    export.add_argument(
        "--format", default="safetensors", help="safetensors (ours, the default), hf, fairseq or onnx"
    )
    export.set_defaults(run=run_export)

    imported = commands.add_parser("import", help="a fairseq or Hugging Face model as an export of ours")
    imported.add_argument(
        "path", type=Path, metavar="FILE", help=".pt or .pth file, or a Hugging Face folder"
    )
    imported.add_argument("--out", type=Path, required=True, help="folder to write")
    imported.set_defaults(run=run_import)

    index = commands.add_parser("index", help="build the index of tar shards")
    index.add_argument("shards", nargs="+", help="folder, pattern a{000..123}.tar or *.tar, joined by ::")
    index.set_defaults(run=run_index)

    recipes = commands.add_parser("recipes", help="list the shipped recipes")
    recipes.set_defaults(run=run_recipes)

    probe = commands.add_parser("probe", help="ridge probes on frozen features of labelled shards")
    probe.add_argument("model", type=Path, help="run folder or export")
    probe.add_argument("--train", required=True, help="labelled shards to fit on")
    probe.add_argument("--test", required=True, help="labelled shards to test on")
    probe.add_argument("--modality", default=None, help="which, if the model has several")
    probe.add_argument("--label", default="cls;json.label", help="member or json key with the label")
    probe.add_argument(
        "--lowest-penalty",
        type=float,
        default=0.1,
        help="smallest ridge penalty to choose from (default: 0.1; 1e-6 reads what 16-bit features lose)",
    )
    probe.set_defaults(run=run_probe)
    return parser


def run_export(arguments: argparse.Namespace) -> int:
    from d2v_ds.convert.consolidate import export

    print(f"wrote {export(arguments.path, arguments.out, arguments.weights, arguments.format)}")
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    from d2v_ds.convert.consolidate import write_export
    from d2v_ds.convert.load import read

    stored = read(arguments.path)
    print(f"read {arguments.path}: {stored.origin}; weights: {stored.weights}, {len(stored.tensors)} tensors")
    print(f"wrote {write_export(stored, arguments.out)}")
    return 0


def run_index(arguments: argparse.Namespace) -> int:
    from d2v_ds.data import ensure_index, expand_shards

    indexes = ensure_index(expand_shards(arguments.shards))
    print(f"{sum(index.num_samples for index in indexes)} samples in {len(indexes)} shards")
    return 0


def run_recipes(arguments: argparse.Namespace) -> int:
    from d2v_ds.recipe import recipes

    for name, function in sorted(recipes().items()):
        print(f"{name:20} {(function.__doc__ or '').splitlines()[0]}")
    return 0


def run_probe(arguments: argparse.Namespace) -> int:
    from d2v_ds.tasks.probe import format_rows, probe

    rows = probe(
        arguments.model,
        arguments.train,
        arguments.test,
        modality=arguments.modality,
        label=arguments.label,
        lowest_penalty=arguments.lowest_penalty,
    )
    print(format_rows(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
