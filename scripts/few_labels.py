"""Is pre-training worth it where labels are few? Pre-trains, fine-tunes on shares of the labels, compares with the
same network from random weights at equal fine-tuning steps; and joint training of all three with separate ones.

    python scripts/few_labels.py image | audio | text [--seeds 1 2 3] [--shares 0.01 0.1 1] [--out DIR]
    python scripts/few_labels.py joint              one model of three modalities, against three of one

Data is written below DIR/data once, and made shards of by `d2v prepare`: all 1,797 handwritten digits, anywhere in a
32x32 picture (1,297 to train on, 500 to test); spoken digits, three to five in a row, by espeak-ng, voices of the test
heard nowhere else; paragraphs of Python's own documentation, and which module they describe. A run is an ordinary one
of train.py, its commands in DIR/commands.txt; runs that are done are not done again. `--jobs` runs go on at the same
time. Ends with a table, DIR/NAME.json and DIR/NAME.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from d2v_ds.training.log import read_rows
from shards.sample import (
    ACCENTS,
    SAMPLE_RATE,
    VARIANTS,
    WORDS,
    check_espeak,
    compose_digit,
    draw_place,
    encode_audio,
    load_digits,
    read_documents,
    speak,
    split_digits,
)

ROOT = Path(__file__).resolve().parents[1]
PLACES = 4
"""Pictures of each digit in pre-training; fine-tuning sees the first of each."""
UTTERANCES = {"train": 800, "test": 200}
SPOKEN_RATES = range(110, 171, 10)
MODULES = 10
"""Classes of paragraphs: the modules with most of them."""
MODALITIES = ("image", "audio", "text")
METRIC = {"image": "accuracy", "audio": "wer", "text": "accuracy"}
PRETRAIN = {
    "image": ["train.steps=2000", "ema.anneal_steps=1200"],
    "audio": ["train.steps=800"],
    "text": ["train.steps=1200", "ema.anneal_steps=720"],
}
"""On top of image_tiny, audio_tiny and text_tiny: what some minutes of one core buy. A teacher of speech that stays
fast for longer loses what differs between samples (docs/experiments.md)."""
JOINT_STEPS, JOINT_ANNEAL_STEPS = 700, 240
"""A step has one micro-batch of each modality, as the separate runs' steps have of one."""
TUNE_STEPS = {
    "image": {0.01: 200, 0.1: 300, 1.0: 600},
    "audio": {0.01: 200, 0.1: 400, 1.0: 800},
    "text": {0.01: 150, 0.1: 300, 1.0: 600},
}
TUNE = {
    "image": ["--recipe", "finetune_image_tiny"],
    "audio": ["--recipe", "finetune_audio_tiny"],
    "text": ["--recipe", "finetune_text_tiny", f"task.outputs={MODULES}"],
}


# ---- the data ----


def write_images(folder: Path) -> Iterator[dict]:
    images, digits = load_digits()
    train = {int(i) for i in split_digits("train")}
    for i, (image, digit) in enumerate(zip(images, digits, strict=True)):
        split = "train" if i in train else "test"
        for place in range(PLACES if split == "train" else 1):
            random = np.random.RandomState([i, place])
            name = f"{split}-{i:04d}-{place}.png"
            compose_digit(image, **draw_place(random)).save(folder / name)
            yield {"path": name, "label": int(digit), "split": split, "labelled": place == 0}


def write_utterances(folder: Path) -> Iterator[dict]:
    check_espeak()

    def write(split: str, i: int) -> dict:
        random = np.random.RandomState([("train", "test").index(split), i])
        text = " ".join(random.choice(WORDS, random.randint(3, 6)))
        voice = f"{random.choice(ACCENTS)}+{random.choice(VARIANTS['train' if split == 'train' else 'val'])}"
        wave = speak(text, voice, int(random.choice(SPOKEN_RATES)), int(random.randint(20, 81)))
        name = f"{split}-{i:04d}.flac"
        (folder / name).write_bytes(encode_audio(wave, "flac"))
        return {
            "path": name,
            "text": text,
            "split": split,
            "labelled": True,
            "seconds": len(wave) / SAMPLE_RATE,
        }

    with ThreadPoolExecutor() as pool:
        for split, count in UTTERANCES.items():
            yield from pool.map(write, [split] * count, range(count))


def write_paragraphs(folder: Path) -> Iterator[dict]:
    """A fifth of the paragraphs is for testing, and left out of pre-training."""
    random = np.random.RandomState(0)
    rows = []
    for source, prose in read_documents():
        kind, name = source.split("/")[:2]
        module = name.split(".")[0] if kind == "stdlib" else ""
        rows += [(module, text, random.rand() < 0.2) for text in prose.splitlines()]
    counts = defaultdict(int)
    for module, _, _ in rows:
        counts[module] += bool(module)
    modules = sorted(sorted(counts, key=lambda name: (-counts[name], name))[:MODULES])
    for module, text, is_test in rows:
        if module in modules:
            split = "test" if is_test else "train"
            yield {"text": text, "label": modules.index(module), "split": split, "labelled": True}
        elif not is_test:
            yield {"text": text, "label": "", "split": "train", "labelled": False}


WRITERS = {"image": write_images, "audio": write_utterances, "text": write_paragraphs}


def make_rows(modality: str, folder: Path) -> list[dict]:
    """Everything there is of a modality, written once; a row is a sample."""
    table = folder / "rows.jsonl"
    if not table.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(WRITERS[modality](folder))
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [json.loads(line) for line in table.read_text("utf-8").splitlines()]


def pick(rows: list[dict], share: float, seed: int) -> list[dict]:
    """`share` of the labelled train rows, as many of each class as there are (of transcripts: any)."""
    labelled = [row for row in rows if row["split"] == "train" and row["labelled"]]
    order = np.random.RandomState(seed).permutation(len(labelled))
    queues = defaultdict(list)
    for index in order:
        queues[labelled[index].get("label")].append(labelled[index])
    ranked = sorted((rank, str(label)) for label, queue in queues.items() for rank in range(len(queue)))
    labels = {str(label): label for label in queues}
    chosen = ranked[: max(len(queues), round(share * len(labelled)))]
    return [queues[labels[label]][rank] for rank, label in chosen]


class Study:
    """A folder of runs, and what was run in it."""

    def __init__(self, arguments: argparse.Namespace):
        self.out, self.seeds, self.shares = arguments.out.resolve(), arguments.seeds, arguments.shares
        self.jobs = arguments.jobs
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self, *command: str) -> None:
        with (self.out / "commands.txt").open("a", encoding="utf-8") as file:
            file.write(shlex.join(command).replace(str(self.out), "OUT") + "\n")
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-3000:]}")

    def prepare(self, modality: str, name: str, train: list[dict], rows: list[dict]) -> Path:
        """Shards of the rows `train` and of the whole test."""
        folder = self.out / "data" / modality
        shards = folder / "shards" / name
        if (shards / "done").exists():
            return shards
        test = [row for row in rows if row["split"] == "test"]
        common = ["--out", str(shards), "--name", modality, "--workers", "1"]
        if modality == "text":
            files = [write_table(folder / f"{name}-{s}.csv", part) for s, part in (("a", train), ("b", test))]
            classes = ["--classes", *map(str, range(MODULES))]
            self.run(
                "-m", "d2v_ds.cli", "prepare", "table", files[0], "--val-file", files[1], *classes, *common
            )
        else:
            table = write_table(folder / f"{name}.csv", [*train, *test])
            self.run("-m", "d2v_ds.cli", "prepare", "folder", table, *common)
        (shards / "done").touch()
        return shards

    def pretraining_shards(self, modality: str) -> Path:
        rows = make_rows(modality, self.out / "data" / modality)
        train = [row for row in rows if row["split"] == "train"]
        if modality != "text":
            return self.prepare(modality, "all", train, rows)
        folder = self.out / "data" / "text" / "prose"
        if not (folder / "sentencepiece.model").exists():
            documents = folder / "documents"
            documents.mkdir(parents=True, exist_ok=True)
            for start in range(0, len(train), 20):
                text = "\n".join(row["text"] for row in train[start : start + 20])
                (documents / f"{start:06d}.txt").write_text(text + "\n", encoding="utf-8")
            common = ["--out", str(folder), "--name", "text", "--workers", "1"]
            self.run("-m", "d2v_ds.cli", "prepare", "folder", str(documents), *common)
            model = str(folder / "sentencepiece.model")
            self.run(
                "-m",
                "d2v_ds.cli",
                "tokenizer",
                "train",
                f"{folder}/text-*.tar",
                "--out",
                model,
                "--vocabulary",
                "1000",
            )
        return folder

    def pretrain(self, modality: str, seed: int) -> Path:
        """The run of one modality."""
        out = self.out / "pretrained" / f"{modality}-{seed}"
        self.train(
            out, "--recipe", f"{modality}_tiny", f"seed={seed}", *self.reads(modality), *PRETRAIN[modality]
        )
        return out

    def reads(self, modality: str) -> list[str]:
        folder = self.pretraining_shards(modality)
        keys = [f"modalities.{modality}.data.shards={folder}/*{'' if modality == 'text' else '-train'}-*.tar"]
        if modality == "text":
            keys.append(f"modalities.text.data.tokenizer={folder}/sentencepiece.model")
        return keys

    def train(self, out: Path, *arguments: str) -> None:
        if not (out / "finished").exists():
            self.run("train.py", "--deepspeed", "zero0", *arguments, f"out={out}")
            (out / "finished").touch()

    def labelled(self, modality: str, share: float, seed: int) -> tuple[Path, int]:
        """Shards of a share of the labelled samples and of the test, and how many they are to train on."""
        rows = make_rows(modality, self.out / "data" / modality)
        train = pick(rows, share, seed)
        return self.prepare(modality, f"share{share:g}-seed{seed}", train, rows), len(train)

    def prepare_all(self, modality: str) -> None:
        """What runs at the same time would write twice."""
        self.pretraining_shards(modality)
        for share in self.shares:
            for seed in self.seeds:
                self.labelled(modality, share, seed)

    def tune(self, modality: str, share: float, seed: int, init: Path | None, name: str) -> float:
        """Fine-tunes, and returns the score after the last step: accuracy, or word error rate."""
        shards, count = self.labelled(modality, share, seed)
        out = self.out / "tuned" / f"{modality}-{name}-{share:g}-{seed}"
        steps = TUNE_STEPS[modality][share]
        arguments = [
            *TUNE[modality],
            f"seed={seed}",
            f"modalities.{modality}.data.shards={shards}/*-train-*.tar",
            f"modalities.{modality}.data.batch={min(count, 32 if modality == 'image' else 16)}",
            f"task.test={shards}/*-{'val' if modality == 'text' else 'test'}-*.tar",
            f"task.test_every={steps}",
            f"train.steps={steps}",
            f"train.save_every={steps}",
        ]
        if modality != "audio":
            arguments.append(f"optim.warmup_steps={steps // 10}")
        if init:
            arguments.append(f"init={init}")
        else:
            arguments.append("task.layer_decay=1.0")  # random blocks have nothing to keep
            if modality == "text":
                arguments += self.reads("text")[1:]
        self.train(out, *arguments)
        return read_rows(out / "scores.jsonl")[-1][METRIC[modality]]


def write_table(path: Path, rows: list[dict]) -> str:
    keys = [key for key in ("path", "text", "label", "split") if key in rows[0]]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, keys, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return str(path)


# ---- the two studies ----


def compare_labels(study: Study, modality: str) -> list[dict]:
    """Pre-trained against random weights."""
    study.prepare_all(modality)
    with ThreadPoolExecutor(study.jobs) as pool:
        runs = dict(
            zip(study.seeds, pool.map(lambda seed: study.pretrain(modality, seed), study.seeds), strict=True)
        )
        cases = [
            (share, seed, name, runs[seed] if name == "pre-trained" else None)
            for share in study.shares
            for seed in study.seeds
            for name in ("pre-trained", "random")
        ]
        return list(pool.map(lambda case: score(study, modality, *case), cases))


def compare_joint(study: Study) -> list[dict]:
    """One model of three modalities against three models of one: the same steps, batches and schedules."""
    for modality in MODALITIES:
        study.prepare_all(modality)
    reads = {modality: [*study.reads(modality), *one_batch(modality)] for modality in MODALITIES}
    schedule = [
        f"train.steps={JOINT_STEPS}",
        f"ema.anneal_steps={JOINT_ANNEAL_STEPS}",
        "optim.warmup_steps=100",
    ]

    def pretrain(case: tuple[str, int]) -> Path:
        name, seed = case
        kept = MODALITIES if name == "joint" else (name,)
        out = study.out / "pretrained" / f"multimodal-{name}-{seed}"
        keys = [key for modality in kept for key in reads[modality]]
        keys += [f"modalities.{modality}=null" for modality in MODALITIES if modality not in kept]
        study.train(out, "--recipe", "multimodal_tiny", f"seed={seed}", *keys, *schedule)
        return out

    pretrainings = [(name, seed) for seed in study.seeds for name in ("joint", *MODALITIES)]
    with ThreadPoolExecutor(study.jobs) as pool:
        runs = dict(zip(pretrainings, pool.map(pretrain, pretrainings), strict=True))
        cases = [
            (
                modality,
                share,
                seed,
                name,
                runs[(modality if name == "separate" else name, seed)] if init else None,
            )
            for modality in MODALITIES
            for share in study.shares
            for seed in study.seeds
            for name, init in (("joint", True), ("separate", True), ("random", False))
        ]
        return list(pool.map(lambda case: score(study, *case), cases))


def one_batch(modality: str) -> list[str]:
    batch = 32 if modality == "image" else 16
    return [f"modalities.{modality}.data.batch={batch}", f"modalities.{modality}.data.micro_batches=1"]


def score(study: Study, modality: str, share: float, seed: int, name: str, init: Path | None) -> dict:
    value = study.tune(modality, share, seed, init, name)
    print(
        f"{modality}  {share:6.0%} of the labels  seed {seed}  {name:12} {METRIC[modality]} {value:.3f}",
        flush=True,
    )
    return {"modality": modality, "share": share, "seed": seed, "from": name, "value": value}


def group(results: list[dict]) -> dict[tuple[str, str], dict[float, list[float]]]:
    """(modality, from) -> share -> values of the seeds."""
    groups: dict = defaultdict(lambda: defaultdict(list))
    for row in results:
        groups[row["modality"], row["from"]][row["share"]].append(row["value"])
    return groups


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summarise(results: list[dict], shares: list[float]) -> str:
    lines = ["| | from | " + " | ".join(f"{share:.0%} of the labels" for share in shares) + " |"]
    lines.append("|---|---|" + "---|" * len(shares))
    for (modality, name), values in group(results).items():
        cells = [f"{statistics.mean(values[share]):.3f} +- {spread(values[share]):.3f}" for share in shares]
        lines.append(f"| {modality}, {METRIC[modality]} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = group(results)
    modalities = list(dict.fromkeys(modality for modality, _ in groups))
    figure, axes = plt.subplots(1, len(modalities), figsize=(4.5 * len(modalities), 3.5), squeeze=False)
    for axis, modality in zip(axes[0], modalities, strict=True):
        for (of, name), values in groups.items():
            if of == modality:
                shares = sorted(values)
                mean = [statistics.mean(values[share]) for share in shares]
                spreads = [spread(values[share]) for share in shares]
                places = shares if len(shares) > 1 else [name]
                axis.errorbar(places, mean, spreads, marker="o", capsize=3, label=name)
        axis.set(ylabel=METRIC[modality], title=modality)
        if len(shares) > 1:
            axis.set(xscale="log", xlabel="share of the labels")
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=(*MODALITIES, "joint"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shares", type=float, nargs="+", choices=(0.01, 0.1, 1.0), default=[0.01, 0.1, 1.0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/few_labels"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs} must be 1 or more")
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out {arguments.out} is a file; give a folder")
    study = Study(arguments)
    results = compare_joint(study) if arguments.study == "joint" else compare_labels(study, arguments.study)
    (study.out / f"{arguments.study}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, study.out / f"{arguments.study}.png")
    print(summarise(results, arguments.shares))


if __name__ == "__main__":
    main()
