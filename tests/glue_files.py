"""Small files in the layout of GLUE's original archives, quirks included."""

import json
from pathlib import Path

QUOTE = 'He said "no, and left'
HEADERS = {
    "mnli": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
        "sentence1 sentence2 label1 gold_label"
    ),
    "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "qnli": "index question sentence label",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "rte": "index sentence1 sentence2 label",
    "sst2": "sentence label",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
}
NAMES = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
FOLDERS = {
    "cola": "CoLA", "mnli": "MNLI", "mrpc": "MRPC", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE", "sst2": "SST-2",
    "stsb": "STS-B",
}  # fmt: skip
TEXTS = {
    "mrpc": ("#1 String", "#2 String"),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
}


def samples(task: str, split: str, rows: int) -> list[dict]:
    """What the shards must hold."""
    found = []
    for i in range(rows):
        label = i % (3 if task == "mnli" else 2)
        sample = {"text": f"{task} {split} {i} {QUOTE}\u2028 \u0085end"}
        if task not in ("cola", "sst2"):
            sample["text_b"] = f"second {i} \"\" 'x'"
        found.append(sample | {"label": i / 2 if task == "stsb" else label})
    return found


def write_task(root: Path, task: str, rows: int = 6) -> Path:
    """root/CoLA/train.tsv, dev.tsv, test.tsv, ..."""
    folder = root / FOLDERS[task]
    folder.mkdir(parents=True)
    splits = {"train": "train", "val": "dev"}
    if task == "mnli":
        splits = {"train": "train", "val-matched": "dev_matched", "val-mismatched": "dev_mismatched"}
    for split, file in splits.items():
        write_tsv(folder / f"{file}.tsv", task, samples(task, split, rows))
    (folder / "test.tsv").write_text("index\tsentence\n0\tno label here\n", encoding="utf-8")
    return root


def write_tsv(path: Path, task: str, some: list[dict], order: list[int] | None = None) -> None:
    """`order`: of the columns, of header and rows alike."""
    lines = []
    if task == "cola":
        table = [["gj04", str(s["label"]), "" if s["label"] else "*", s["text"]] for s in some]
    else:
        header = HEADERS[task].split("|" if task == "mrpc" else " ")
        first, second = TEXTS.get(task, ("sentence1", "sentence2") if task != "sst2" else ("sentence", ""))
        table = [header]
        for i, s in enumerate(some):
            label = NAMES[task][s["label"]] if task in NAMES else str(s["label"])
            values = {header[-1] if task != "mrpc" else "Quality": label, first: s["text"]}
            values |= {second: s["text_b"]} if second else {}
            table.append([values.get(name, f"{i}") for name in header])
    for fields in table:
        lines.append("\t".join(fields if order is None else [fields[i] for i in order]) + "\n")
    text = "".join(lines)
    path.write_bytes((b"\xef\xbb\xbf" if task == "mrpc" else b"") + text.encode())


def contents(read: dict[str, dict[str, bytes]]) -> list[dict]:
    """Samples in the order of their keys."""
    return [json.loads(read[key]["json"]) for key in sorted(read)]
