"""`d2v`: what can be done from a shell. Each command is a thin layer over the function of the same name."""

from __future__ import annotations

import argparse
import functools
import io
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from d2v_ds import __version__


def main(argv: list[str] | None = None) -> int:
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def run(argv: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in shards may be no UTF-8
    if argv[:1] == ["train"]:  # its own parser: DeepSpeed's spellings and key=value overrides
        from d2v_ds.training.signals import listen

        listen()  # before the imports below, which take seconds
        from d2v_ds.engine.launch import end_process
        from d2v_ds.training.run import main as train_main

        end_process(train_main(argv[1:], prog="d2v train"))
    if argv[:1] == ["plan"]:  # a recipe and key=value overrides too
        from d2v_ds.training.plan import main as plan_main

        return plan_main(argv[1:])
    if argv[:1] == ["prepare"]:  # a command line for each data set
        from shards.command import main as prepare_main

        return prepare_main(argv[1:])
    if argv[:1] == ["tokenizer"]:
        from shards.tokenizer import main as tokenizer_main

        return tokenizer_main(argv[1:])
    arguments = build_parser().parse_args(argv)
    try:
        with reading_remote(arguments):
            return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2v", description="Train and use data2vec models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="pre-train or fine-tune a model (d2v train --help)", add_help=False)
    commands.add_parser("plan", help="which data a run would see (d2v plan --help)", add_help=False)
    commands.add_parser("prepare", help="data as shards (d2v prepare --help)", add_help=False)
    commands.add_parser("tokenizer", help="train or import one (d2v tokenizer --help)", add_help=False)

    export = commands.add_parser("export", help="weights in a format of ours or of another library")
    export.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="run folder, step_* folder, export, .pt file or Hugging Face folder",
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
    export.add_argument("--modality", default=None, help="which of a joint model (hf, onnx)")
    export.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of safetensors (default: fp32)"
    )
    export.set_defaults(run=run_export)

    imported = commands.add_parser("import", help="a fairseq or Hugging Face model as an export of ours")
    imported.add_argument(
        "path", type=Path, metavar="FILE", help=".pt or .pth file, or a Hugging Face folder"
    )
    imported.add_argument("--out", type=Path, required=True, help="folder to write")
    imported.set_defaults(run=run_import)

    index = commands.add_parser("index", help="build the index of tar shards, and measure what is in them")
    add_shards(index)
    index.add_argument(
        "--tokenizer",
        type=Path,
        default=None,
        metavar="FILE",
        help="count the tokens of texts, too, with this one",
    )
    index.add_argument(
        "--text", default=None, metavar="FIELDS", help="members that hold text (default: txt;json.text)"
    )
    index.add_argument(
        "--no-lengths", action="store_true", help="do not measure sounds: training does it when it needs them"
    )
    index.set_defaults(run=run_index)

    verify = commands.add_parser("verify", help="read every byte of shards and compare with their index")
    add_shards(verify)
    verify.add_argument("--json", action="store_true", help="print a report of each shard as JSON")
    verify.set_defaults(run=run_verify)

    preview = commands.add_parser("preview", help="what shards hold: members, counts, lengths, a picture")
    add_shards(preview)
    preview.add_argument(
        "--out", type=Path, default=Path("preview.png"), help="contact sheet to write (default: preview.png)"
    )
    preview.add_argument("--samples", type=int, default=12, help="samples on it (default: 12)")
    preview.add_argument(
        "--measured", type=int, default=1000, help="samples whose length is looked at (default: 1000)"
    )
    preview.add_argument("--json", action="store_true", help="print what was found as JSON")
    preview.set_defaults(run=run_preview)

    recipes = commands.add_parser("recipes", help="list the shipped recipes")
    recipes.set_defaults(run=run_recipes)

    embed = commands.add_parser("embed", help="embeddings of shards or of a folder of files, in one file")
    embed.add_argument("model", help="run folder, export, fairseq file or Hugging Face folder")
    embed.add_argument(
        "data", help="folder of files or of tar shards, a pattern of either, or URLs of shards"
    )
    embed.add_argument("--out", type=Path, required=True, help="a .parquet or .npy file")
    embed.add_argument("--modality", default=None, help="which, if the model has several")
    embed.add_argument(
        "--layer", default="last", help="last (default), all, or a block's number from 0, or -1, -2"
    )
    embed.add_argument(
        "--pool",
        default="mean",
        help="mean (default), cls (class token, or <s> of a text) or none: every token",
    )
    embed.add_argument("--batch", type=int, default=32, help="items at once (default: 32)")
    embed.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    embed.add_argument("--weights", default=None, help="student or teacher, where the model has both")
    embed.add_argument("--label", default="cls;json.label", help="member or json key with the label, if any")
    embed.add_argument(
        "--workers", type=int, default=None, help="threads that decode (default: cores, at most 8)"
    )
    add_remote(embed)
    embed.set_defaults(run=run_embed)

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
    add_remote(probe)
    probe.set_defaults(run=run_probe)

    evaluation = commands.add_parser(
        "eval", help="how good features or a fine-tuned model are on labelled shards"
    )
    kinds = evaluation.add_subparsers(required=True, metavar="KIND")
    for kind, words in FROZEN.items():
        add_frozen(kinds.add_parser(kind, help=words, description=words, allow_abbrev=False), kind)
    for kind, words in TUNED.items():
        add_tuned(kinds.add_parser(kind, help=words, description=words, allow_abbrev=False), kind)
    return parser


FROZEN = {
    "knn": "k nearest neighbours (10, 20, 100, 200; T = 0.07) on frozen features",
    "ridge": "closed-form ridge on frozen features, as during training",
    "linear": "a linear layer trained on frozen features",
    "attentive": "attention pooling and a linear layer trained on frozen tokens",
}
TUNED = {
    "classify": "accuracy of a fine-tuned model",
    "ctc": "its word and character error rate",
    "glue": "GLUE's metrics of a model fine-tuned on one of its tasks, or on texts of your own",
}


def add_evaluation(parser: argparse.ArgumentParser, kind: str) -> None:
    """What every `d2v eval` takes."""
    parser.add_argument("--out", type=Path, default=None, help="a JSON file with the numbers")
    parser.add_argument("--modality", default=None, help="which, if the model has several")
    parser.add_argument("--batch", type=int, default=32, help="items at once (default: 32)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add_remote(parser)
    parser.set_defaults(kind=kind)


def add_frozen(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("model", help="run folder, export, fairseq file or Hugging Face folder")
    parser.add_argument("data", help="a folder of labelled shards, or a pattern (or URLs) of those to fit on")
    parser.add_argument("--train", default=None, help="shards to fit on (default: *train*.tar in the folder)")
    parser.add_argument(
        "--test", default=None, help="shards to test on (default: *val*.tar, *dev*.tar or *test*.tar)"
    )
    parser.add_argument(
        "--label", default=None, help="member or json key with the class (default: cls;json.label)"
    )
    parser.add_argument("--weights", default=None, help="student or teacher, where the model has both")
    parser.add_argument(
        "--samples",
        type=int,
        default=None,
        help="at most so many of each part, always the same (default: all)",
    )
    parser.add_argument(
        "--baselines", action="store_true", help="measure the random initialisation and the raw input too"
    )
    if kind in ("linear", "attentive"):
        parser.add_argument(
            "--epochs", type=int, default=None, help="of the readout (default: 50, and 300 steps or more)"
        )
        parser.add_argument("--seed", type=int, default=0, help="of the readout (default: 0)")
    add_evaluation(parser, kind)
    parser.set_defaults(run=run_frozen)


def add_tuned(parser: argparse.ArgumentParser, kind: str) -> None:
    default = {"ctc": "txt;json.text"}.get(kind, "cls;json.label")
    parser.add_argument("model", help="fine-tuned: run, export, fairseq file or Hugging Face folder")
    parser.add_argument("data", help="labelled shards: a folder, a pattern or URLs")
    if kind == "glue":
        parser.add_argument(
            "--task", default=None, help="cola, mnli, ... (default: what the folder was made for)"
        )
        parser.add_argument("--metrics", nargs="+", default=None, help="others than the task's")
    parser.add_argument(
        "--label", default=None, help=f"member or json key (default: a run's task.label, else {default})"
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="threads that decode (default: cores, at most 8)"
    )
    if kind == "ctc":
        add_search(parser)
    add_evaluation(parser, kind)
    parser.set_defaults(run=run_glue if kind == "glue" else run_eval)


def add_search(parser: argparse.ArgumentParser) -> None:
    """How transcripts are found."""
    parser.add_argument(
        "--decoder", choices=("greedy", "beam"), default="greedy", help="the best path (default), or a search"
    )
    parser.add_argument("--lm", default=None, help="of a beam: n-gram model of words, ARPA or KenLM binary")
    parser.add_argument(
        "--lexicon", default=None, help="lines 'word symbol symbol ...' (default: the words of an ARPA file)"
    )
    parser.add_argument("--beam", type=int, default=None, help="hypotheses kept (default: 50; papers: 1500)")
    parser.add_argument(
        "--threshold", type=float, default=None, help="worse than the best by more: dropped (default: 50)"
    )
    parser.add_argument("--lm-weight", type=float, default=None, help="of the language model (default: 2)")
    parser.add_argument("--word-score", type=float, default=None, help="for each word (default: -1)")
    parser.add_argument("--silence", type=float, default=None, help="for each space (default: 0)")


def add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards",
        nargs="+",
        help="folder, pattern a{000..123}.tar or *.tar, joined by ::; or URLs of them (https, s3, gs, hf)",
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one for each core)")
    add_remote(parser)


def add_remote(parser: argparse.ArgumentParser) -> None:
    """How URLs of shards are read."""
    parser.add_argument("--cache", default=None, help="folder for remote shards (default: $D2V_CACHE_DIR)")
    parser.add_argument("--cache-gib", type=float, default=100.0, help="the most they take (default: 100)")
    parser.add_argument(
        "--retry-minutes", type=float, default=10.0, help="patience with servers (default: 10)"
    )
    parser.add_argument("--pipe", action="store_true", help="allow pipe:COMMAND, which runs commands")


def reading_remote(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Takes what `add_remote` added from the arguments: URLs that are opened meanwhile are read so."""
    if not hasattr(arguments, "cache_gib"):
        return nullcontext()
    from d2v_ds.data.remote import reading, remote_of

    names = ("cache", "cache_gib", "retry_minutes", "pipe")
    return reading(remote_of(**{name: vars(arguments).pop(name) for name in names}))


def find_shards(arguments: argparse.Namespace) -> list[Any]:
    """The shards of a command line; a number that does not fit is a ValueError."""
    from d2v_ds.data import expand_shards
    from d2v_ds.data.energon import all_patterns

    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers} must be 1 or more")
    return expand_shards([pattern for data in arguments.shards for pattern in all_patterns(data)])


def run_export(arguments: argparse.Namespace) -> int:
    from d2v_ds.convert.consolidate import export

    chosen = arguments.weights, arguments.format, arguments.modality, arguments.dtype
    print(f"wrote {export(arguments.path, arguments.out, *chosen)}")
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    from d2v_ds.convert.consolidate import write_export
    from d2v_ds.convert.load import read

    stored = read(arguments.path)
    print(f"read {arguments.path}: {stored.origin}; weights: {stored.weights}, {len(stored.tensors)} tensors")
    print(f"wrote {write_export(stored, arguments.out)}")
    return 0


def run_index(arguments: argparse.Namespace) -> int:
    """Lengths as recipes have them by default; of other fields `d2v plan` measures them. Broken shards come last."""
    from d2v_ds.data import BrokenShards, ensure_index

    if arguments.text and not arguments.tokenizer:
        raise ValueError(f"--text {arguments.text} has no meaning without --tokenizer FILE")
    if arguments.tokenizer and not arguments.tokenizer.is_file():
        raise ValueError(f"--tokenizer {arguments.tokenizer} is not there; `d2v tokenizer` makes one")
    paths = find_shards(arguments)
    broken = None
    try:
        indexes = ensure_index(paths, arguments.workers)
    except BrokenShards as error:
        indexes, broken = error.indexes, error
    print(f"{sum(index.num_samples for index in indexes)} samples in {len(indexes)} shards")
    for name, config in measured_configs(arguments).items():
        from d2v_ds.modalities.source import measure_ahead

        if not measure_ahead(name, config, indexes, arguments.workers) and name == "text":
            print(f"none of them has a member for {name} ({config.data.fields})")
    if broken:
        raise broken
    return 0


def measured_configs(arguments: argparse.Namespace) -> dict[str, Any]:
    """The modalities whose lengths `d2v index` is asked for."""
    from d2v_ds.modalities import config_class

    configs = {} if arguments.no_lengths else {"audio": config_class("audio")()}
    if arguments.tokenizer:
        data = {
            "tokenizer": str(arguments.tokenizer.absolute()),
            **({"fields": arguments.text} if arguments.text else {}),
        }
        configs["text"] = config_class("text")(
            vocabulary=2**31, data=data
        )  # any: columns depend on the file alone
    return configs


def run_verify(arguments: argparse.Namespace) -> int:
    """Exit code 1 if anything is wrong with any shard."""
    import json

    from d2v_ds.data.verify import summary, verify_shards

    paths = find_shards(arguments)
    say = None if arguments.json else print
    parts = [part for text in arguments.shards for part in text.split("::")]
    is_whole = any(not Path(part).is_file() for part in parts)
    folders = {part.rstrip("/") if "://" in part else str(Path(part).absolute()) for part in parts}
    found = summary(reports := verify_shards(paths, arguments.workers, say, is_whole, folders))
    wrong = {
        "shards are not in order": found["bad_shards"],
        "shards are missing": found["missing_shards"],
        "files beside them are broken": found["broken_files"],
    }
    code = 1 if any(wrong.values()) else 0
    if arguments.json:
        print(json.dumps(found, indent=1))
        return code
    for report in reports:
        for problem in report.problems:
            print(f"{report.shard}: {problem}")
        for note in report.notes:
            print(f"{report.shard}: note: {note}")
    print(
        f"{found['samples']} samples in {found['shards']} shards, {found['bytes'] / 1e6:.1f} MB: "
        + (", ".join(f"{n} {what}" for what, n in wrong.items() if n) or "all in order")
    )
    return code


def run_preview(arguments: argparse.Namespace) -> int:
    import json

    from d2v_ds.tasks.preview import describe, preview

    paths = find_shards(arguments)
    say = None if arguments.json else print
    found = preview(paths, arguments.out, arguments.samples, arguments.measured, arguments.workers, say)
    print(json.dumps(found, indent=1) if arguments.json else describe(found))
    return 0


def run_recipes(arguments: argparse.Namespace) -> int:
    from d2v_ds.recipe import recipes

    for name, function in sorted(recipes().items()):
        print(f"{name:30} {(function.__doc__ or '').splitlines()[0]}")
    return 0


def run_embed(arguments: argparse.Namespace) -> int:
    from d2v_ds.tasks.embed import embed

    options = {k: v for k, v in vars(arguments).items() if k not in ("run", "model", "data", "out")}
    try:
        print(embed(arguments.model, arguments.data, arguments.out, **options, say=print))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
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


def run_eval(arguments: argparse.Namespace) -> int:
    from d2v_ds.tasks.evaluate import evaluate, format_result

    options = {k: v for k, v in vars(arguments).items() if k not in ("run", "kind", "model", "data")}
    if arguments.kind == "ctc":
        options["search"] = read_search(options)
    print(format_result(evaluate(arguments.kind, arguments.model, arguments.data, **options)))
    return 0


def read_search(options: dict[str, Any]) -> Any:
    """Takes the settings of a beam out of the options; None = the best path."""
    from pydantic import ValidationError

    from d2v_ds.config import explain
    from d2v_ds.tasks.beam import Beam

    given = {key: value for key in Beam.model_fields if (value := options.pop(key)) is not None}
    if options.pop("decoder") == "beam":
        try:
            return Beam(**given)
        except ValidationError as error:
            raise explain(error, Beam.model_fields, "d2v eval ctc") from error
    if given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} is for a beam: add --decoder beam")
    return None


def run_glue(arguments: argparse.Namespace) -> int:
    from d2v_ds.tasks.evaluate import format_result
    from d2v_ds.tasks.glue import evaluate_glue

    options = {
        k: v for k, v in vars(arguments).items() if k not in ("run", "kind", "model", "data", "modality")
    }
    if arguments.modality not in (None, "text"):
        raise ValueError(f"--modality {arguments.modality}: glue is about text; leave it out")
    print(format_result(evaluate_glue(arguments.model, arguments.data, **options)))
    return 0


def run_frozen(arguments: argparse.Namespace) -> int:
    from d2v_ds.tasks.frozen import evaluate_frozen, format_frozen

    options = {k: v for k, v in vars(arguments).items() if k not in ("run", "kind", "model", "data")}
    say = functools.partial(print, file=sys.stderr)
    print(format_frozen(evaluate_frozen(arguments.kind, arguments.model, arguments.data, **options, say=say)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
