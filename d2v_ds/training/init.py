"""What a new run starts from: `init=FILE`, any weights that can be read, and what the file does not have.

Student, teacher (fp32, never a rounded copy) and the count of updates come from the file; data, learning rate and
Adam's moments begin anew, as continued pre-training on other data wants it. A run that has a checkpoint of its own
goes on from that and never reads the file again.

The update count is what the teacher's decay tau is a function of. A teacher that has averaged 100,000 updates would
lose them within a thousand at the first tau of a schedule, so by default (`init_updates=tau`) tau goes on where the
file stopped, while steps count from 0: warm-up, learning rate and data are the new run's own. `steps` goes on
with all of them, as if the run had not stopped (but for Adam's moments); train.steps then counts from the file's
beginning. `none` starts tau anew as well, for a teacher that shall leave the file's behind, or at once where the
file's schedule has come to tau = 1, at which the teacher stands still.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_ds.config import dotted_keys
from d2v_ds.convert.consolidate import tokenizers
from d2v_ds.convert.fit import listed, shapes
from d2v_ds.convert.load import read
from d2v_ds.convert.stored import Stored
from d2v_ds.engine.ema import anneal
from d2v_ds.modalities.audio.vocabulary import open_vocabulary
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.model.heads import HEAD
from d2v_ds.model.tuned import Task
from d2v_ds.recipe import Recipe, load_recipe, override

# How a model is trained, which may differ from the file's; everything else of a modality says what its weights mean.
TRAINING = {
    "clones", "mask", "target", "loss", "teacher", "data", "prenet_dropout", "prenet_layerdrop", "prenet_drop_path",
    "extra_tokens_init", "embed_dropout", "input_dropout",
}  # fmt: skip
BODY = ("dim", "depth", "heads", "mlp_ratio", "norm_eps", "norm_first", "layer_scale", "qkv_bias")
TUNING = {
    "data", "prenet_dropout", "prenet_layerdrop", "prenet_drop_path", "embed_dropout", "input_dropout",
}  # fmt: skip
"""What a fine-tuning recipe says of a modality; the rest is its network's."""
READING = ("mean", "std", "tokenizer", "normalize")
"""Of its data what the network was trained with."""
DECISIVE = ("heads", "norm_first", "conv_layers", "position_width")
"""Weights of equal shapes mean something else if these differ."""
CONVOLUTIONS = {"kernel", "groups", "residual"}
"""Of a decoder; no setting of one without convolutions, as those of v1 are."""
MEANT_FOR = {"image_classification": "image", "sentence_classification": "text", "ctc": "audio"}
"""Heads that read what one modality gives alone."""
OF_SPEECH = ("mask", "channel_mask", "frozen_extractor")
OF_CLASSES = ("mixup", "cutmix")
OF_CTC = ("wer", "cer")


@dataclass
class Start:
    """Weights under our names, fp32, of what the file has; the rest stays as it was drawn."""

    student: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    """Under the student's names; the student's own where the file has no teacher."""
    step: int = 0
    """Where the run begins: in the data, the learning rate, and towards train.steps."""
    updates_before: int = 0
    """Updates of the file besides `step`, which tau counts."""
    notes: list[str] = field(default_factory=list)
    """For people: what was taken, what was not found, what is not used."""

    def fingerprint(self) -> int:
        """Equal on ranks that read equal weights."""
        crc = 0
        for kind in (self.student, self.teacher):
            for name in sorted(kind):
                crc = zlib.crc32(kind[name].numpy(), zlib.crc32(name.encode(), crc))
        return crc


def read_start(recipe: Recipe, hashes: dict[str, str] | None = None) -> Start:
    """What `recipe.init` gives to a run of the recipe; nothing if it is not set.

    `hashes`: by modality the sha256 of the tokenizer that the run reads with; another than the file's is noted.

    Raises ValueError for a file that cannot be read, that shares no modality with the recipe, or whose weights do
    not fit: with the list of them and the keys to set.
    """
    if not recipe.init:
        return Start()
    stored = read(recipe.init)
    source = f"init={recipe.init} ({stored.origin})"
    modalities = [name for name in recipe.modalities if name in stored.recipe.modalities]
    if not modalities:
        raise ValueError(
            f"{source} holds {', '.join(stored.recipe.modalities)}, the recipe trains "
            f"{', '.join(recipe.modalities)}: nothing but the shared body could be taken; take another file or recipe"
        )
    check_settings(recipe, stored, modalities, source)
    expected = shapes(recipe)
    if recipe.task:  # no teacher, decoder or mask
        unwanted = (TEACHER, "decoders.")
        expected = {
            n: s
            for n, s in expected.items()
            if not n.startswith(unwanted) and (recipe.task.mask is not None or not n.endswith(".mask_token"))
        }
    student, unused = choose_student(expected, stored, modalities)
    teacher, copied = choose_teacher(expected, stored, student)
    check_shapes(expected, student, teacher, recipe, stored, source, modalities)
    start = Start(student, teacher)
    count_updates(start, recipe, stored, source)
    start.notes = [
        f"starting from {recipe.init}: {stored.origin}; {', '.join(modalities)} of "
        f"{', '.join(stored.recipe.modalities)}, for a run of {', '.join(recipe.modalities)}",
        *describe(expected, start, stored, copied, unused),
        *other_settings(recipe, stored, modalities),
        *other_tokenizer(stored, (hashes or {}).get("text")),
        *([] if recipe.task else [describe_updates(start, recipe, stored)]),
    ]
    return start


def with_network(recipe: Recipe, saved: Recipe | None, given: Sequence[str] = ()) -> Recipe:
    """A fine-tuning recipe whose network is that of `saved`, its own run, or of `init`, or of the recipe that
    `task.encoder` names; how it is trained stays the recipe's.

    `given`: the `key=value` of the command, which stand over what the network's recipe says of body and modality. What
    does not fit the weights then is an error when they are read.

    Raises ValueError if none says what the network is, or it is of another modality; or for a task that has no meaning
    for the modality.
    """
    (name,) = recipe.modalities
    if saved is None:
        check_task(recipe.task, name, recipe.modalities[name].data)
    if saved is None and not recipe.init:
        if recipe.task.encoder is None:
            raise ValueError(
                "a task starts from weights: set init=FILE, or task.encoder=RECIPE for random ones"
            )
        saved = load_recipe(recipe.task.encoder)
        source = f"task.encoder={recipe.task.encoder}"
    elif saved is None:
        saved, source = network_of(recipe), f"init={recipe.init}"
    else:
        saved, source = with_tokenizer(saved, recipe.folder), f"the run {recipe.folder}"
        recipe = with_own_vocabulary(recipe)
    if name not in saved.modalities:
        raise ValueError(
            f"{source} holds {', '.join(saved.modalities)}, the recipe {recipe.name} fine-tunes {name}; give an "
            f"encoder of {name}, or another recipe"
        )
    body = recipe.body.model_copy(update={key: getattr(saved.body, key) for key in BODY})
    ours, theirs = recipe.modalities[name], saved.modalities[name]
    network = {key: getattr(theirs, key) for key in type(theirs).model_fields if key not in TUNING}
    reading = {key: getattr(theirs.data, key) for key in READING if hasattr(theirs.data, key)}
    network["data"] = ours.data.model_copy(update=reading)
    recipe = with_symbols(recipe)
    modality = ours.model_copy(update=network)
    if recipe.task.drop_path:
        prenet, last = drop_paths(recipe.task.drop_path, modality.prenet_depth, body.depth)
        body.drop_path, modality.prenet_drop_path = last, prenet
    recipe = recipe.model_copy(update={"body": body, "modalities": {name: modality}})
    return override(recipe, [text for text in given if text.startswith(("body.", "modalities."))])


def check_task(task: Task, name: str, data: Any) -> None:
    """Raises ValueError for a head or a setting that the modality, or the kind of label, has no use for."""
    if MEANT_FOR.get(task.head, name) != name:
        fitting = [head for head, modality in MEANT_FOR.items() if modality == name]
        raise ValueError(
            f"task.head={task.head} is of {MEANT_FOR[task.head]}, the recipe fine-tunes {name}; set it to one of "
            f"{', '.join([*fitting, 'attentive_classification', 'utterance_classification'])}"
        )
    for key in OF_SPEECH:
        if name != "audio" and getattr(task, key):
            raise ValueError(f"task.{key} is of audio, the recipe fine-tunes {name}; leave it out")
    if task.vocabulary and task.head != "ctc":
        raise ValueError(
            f"task.vocabulary={task.vocabulary} is of CTC, not of task.head={task.head}; leave it out"
        )
    if task.smoothing and (task.outputs == 1 or task.head == "ctc"):
        what = "transcripts" if task.head == "ctc" else "the numbers of task.outputs=1"
        raise ValueError(f"task.smoothing={task.smoothing:g} is of classes, not of {what}; set it to 0")
    if not task.factor > 0:
        raise ValueError(f"task.factor={task.factor:g} must be above 0: labels are multiplied by it")
    for key in OF_CLASSES:
        if task.outputs == 1 and getattr(data, key, 0):
            raise ValueError(
                f"modalities.{name}.data.{key}={getattr(data, key):g} mixes classes, not the numbers of "
                "task.outputs=1; set it to 0"
            )
    if task.head == "ctc" and task.metrics not in (OF_CTC, Task.model_fields["metrics"].default):
        raise ValueError(
            f"task.metrics={','.join(task.metrics)}: transcripts are scored by wer and cer, and the lowest wer is the "
            "best; leave it out"
        )


def drop_paths(rate: float, prenet: int, depth: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Rates of the first and last block of the prenet, and of the body: of `depth` rates in a line from 0 to `rate` the
    prenet has the first ones; the body goes in a line from the next to `rate` (as released)."""
    rates = [rate * i / max(1, depth - 1) for i in range(depth)]
    return (0.0, rates[prenet - 1] if prenet > 1 else 0.0), (rates[min(prenet, depth - 1)], rate)


def with_own_vocabulary(recipe: Recipe) -> Recipe:
    """The recipe with the copy of `task.vocabulary` that its run has, if the file is gone."""
    given = recipe.task.vocabulary
    if (
        given is None
        or Path(given).expanduser().is_file()
        or not (own := recipe.folder / Path(given).name).is_file()
    ):
        return recipe
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"vocabulary": str(own)})})


def with_symbols(recipe: Recipe) -> Recipe:
    """The symbols of `task.vocabulary` as the labels of CTC."""
    task = recipe.task
    if task.head != "ctc" or task.vocabulary is None:
        return recipe
    symbols = open_vocabulary(task.vocabulary).symbols
    update = {"labels": symbols, "outputs": len(symbols)}
    return recipe.model_copy(update={"task": task.model_copy(update=update)})


def network_of(recipe: Recipe) -> Recipe:
    """The recipe of what lies at `init`. A text's tokenizer is the one beside the weights, else that of `recipe`."""
    stored = read(recipe.init)
    network = stored.recipe
    if "text" in network.modalities and "text" in recipe.modalities:
        network.modalities["text"].data.tokenizer = recipe.modalities["text"].data.tokenizer
    return with_tokenizer(network, stored.files) if stored.files else network


def with_tokenizer(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the tokenizer that lies in the folder, if one does."""
    found = tokenizer_in(folder)
    if found and "text" in recipe.modalities:
        recipe.modalities["text"].data.tokenizer = str(found)
    return recipe


def tokenizer_in(folder: Path) -> Path | None:
    return next(iter([*tokenizers(folder), *folder.glob("tokenizer.json")]), None)


# ---- which tensors ---------------------------------------------------------------------------------------------


def choose_student(
    expected: dict[str, tuple[int, ...]], stored: Stored, modalities: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors of the recipe's student, and the names of those that the recipe has no place for.

    A modality's decoder is taken as a whole or not at all.
    """
    given = {name: t for name, t in stored.tensors.items() if not name.startswith((TEACHER, HEAD))}
    unused = [n for n in stored.tensors if n.startswith((TEACHER, HEAD)) and n not in expected]
    for name in stored.recipe.modalities:
        decoder = f"decoders.{name}."
        is_other = {n for n in given if n.startswith(decoder)} != {
            n for n in expected if n.startswith(decoder)
        }
        for part in (decoder, f"encoders.{name}."):
            if name not in modalities or (part == decoder and is_other):
                unused += [n for n in given if n.startswith(part)]
                given = {n: t for n, t in given.items() if not n.startswith(part)}
    unused += [n for n in given if n not in expected and n.endswith(".mask_token")]
    return {n: t for n, t in given.items() if n not in unused}, unused


def choose_teacher(
    expected: dict[str, tuple[int, ...]], stored: Stored, student: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The teacher's tensors under the student's names, and which of them are copies of the student's."""
    teacher, copied = {}, []
    for name in (n.removeprefix(TEACHER) for n in expected if n.startswith(TEACHER)):
        if TEACHER + name in stored.tensors and name in student:
            teacher[name] = stored.tensors[TEACHER + name]
        elif name in student:
            teacher[name] = student[name]
            if stored.weights != "teacher":
                copied.append(name)
    return teacher, copied


# ---- do they fit -----------------------------------------------------------------------------------------------


def check_settings(recipe: Recipe, stored: Stored, modalities: list[str], source: str) -> None:
    decisive = [
        (key, ours, theirs)
        for key, ours, theirs in differences(recipe, stored.recipe, modalities)
        if key.rsplit(".", 1)[-1] in DECISIVE
    ]
    if decisive:
        raise ValueError(
            f"{source} was trained with other settings: "
            + "; ".join(f"{key}={theirs}, the recipe has {ours}" for key, ours, theirs in decisive)
            + "; its weights mean something else here, so give the file's settings to start from it"
        )


def check_shapes(
    expected: dict[str, tuple[int, ...]],
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    recipe: Recipe,
    stored: Stored,
    source: str,
    modalities: list[str],
) -> None:
    given = student | {
        TEACHER + name: tensor for name, tensor in teacher.items() if tensor is not student[name]
    }
    odd = [
        f"{name} {tuple(tensor.shape)} instead of {expected[name]}"
        for name, tensor in given.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    homeless = [name for name in student if name not in expected]
    if not odd and not homeless:
        return
    said = [f"{len(odd)} of another shape: {listed(odd)}"] if odd else []
    said += [f"{len(homeless)} that the recipe has no place for: {listed(homeless)}"] if homeless else []
    keys = [f"{key}={theirs}" for key, _, theirs in differences(recipe, stored.recipe, modalities)]
    remedy = f"set {' '.join(keys)}, as the file has," if keys else "take the recipe it was made with"
    raise ValueError(
        f"{source} has tensors that do not fit the recipe: {'; '.join(said)}. A model starts from one of its own "
        f"sizes: {remedy} or another file"
    )


def differences(recipe: Recipe, other: Recipe, modalities: list[str]) -> list[tuple[str, Any, Any]]:
    """(key, ours, theirs) of settings that say what weights mean and how many there are."""
    found = []
    ours, theirs = dotted_keys(recipe), dotted_keys(other)
    projections = {
        name
        for name in modalities
        if recipe.modalities[name].decoder.layers == other.modalities[name].decoder.layers == 0
    }
    for key in sorted(ours.keys() | theirs.keys()):
        group, _, rest = key.partition(".")
        name, _, setting = rest.partition(".")
        is_meant = group == "body" and rest in BODY
        is_meant |= group == "modalities" and name in modalities and not TRAINING & set(setting.split("."))
        part, _, last = setting.partition(".")
        is_meant &= not (name in projections and part == "decoder" and last in CONVOLUTIONS)
        is_group = any(other.startswith(f"{key}.") for other in ours.keys() | theirs.keys())  # absent in one
        if is_meant and not is_group and ours.get(key) != theirs.get(key):
            found.append((key, ours.get(key), theirs.get(key)))
    return found


# ---- updates ---------------------------------------------------------------------------------------------------


def count_updates(start: Start, recipe: Recipe, stored: Stored, source: str) -> None:
    if recipe.init_updates == "steps":
        if stored.step is None:
            raise ValueError(
                f"{source} does not say its updates, so init_updates=steps cannot be; leave it out"
            )
        if stored.step >= recipe.train.steps:
            raise ValueError(
                f"{source} has {stored.step} updates and train.steps={recipe.train.steps}: with init_updates=steps "
                "they count, so set train.steps higher; or init_updates=tau, to train train.steps more"
            )
        start.step = stored.step
    elif recipe.init_updates == "tau":
        start.updates_before = stored.step or 0


def describe_updates(start: Start, recipe: Recipe, stored: Stored) -> str:
    done = start.step + start.updates_before
    tau = anneal(recipe.ema.start, recipe.ema.end, recipe.ema.anneal_steps, done + 1)
    found = f"{stored.step} updates" if stored.step is not None else "updates not said by the file"
    use = f"the teacher's decay goes on at {done}" if done else "the teacher's decay begins anew"
    text = f"  {found}, {use}: tau {tau:g}; steps begin at {start.step}"
    if tau >= 1:
        text += "\n  warning: at tau 1 the teacher stays as it is; "
        text += "for it to move, set init_updates=none or ema.end lower"
    return text


# ---- words -----------------------------------------------------------------------------------------------------


def describe(
    expected: dict[str, tuple[int, ...]], start: Start, stored: Stored, copied: list[str], unused: list[str]
) -> list[str]:
    students = [name for name in expected if not name.startswith(TEACHER)]
    lines = [f"  {len(start.student)} of {len(students)} tensors of the student found"]
    if stored.weights == "teacher":
        lines[0] += "; the file holds the teacher's weights alone, the student starts as their copy"
    elif start.teacher and len(copied) == len(start.teacher):
        lines.append("  not found: the teacher; it starts as a copy of the student")
    else:
        lines[0] += f", {len(start.teacher) - len(copied)} of the teacher's" if start.teacher else ""
        lines += (
            [f"  not found in the teacher, so the student's: {grouped(copied, expected)}"] if copied else []
        )
    missing = [name for name in students if name not in start.student]
    lines += [f"  not found, so fresh: {grouped(missing, students)}"] if missing else []
    lines += [f"  not used: {grouped(unused, unused)}"] if unused else []
    return lines


def grouped(names: list[str], all_names: Any) -> str:
    """A list of names, in which a part of the model that is there whole is one entry."""
    parts, wholes = Counter(map(part_of, names)), Counter(map(part_of, all_names))
    entries: dict[str, None] = {}
    for name in names:
        part = part_of(name)
        is_whole = parts[part] == wholes[part] > 1
        entries[f"{part} ({parts[part]} tensors)" if is_whole else name] = None
    return ", ".join(entries)


def part_of(name: str) -> str:
    """`decoders.image`, `encoders.text`, `blocks.3`, `head`."""
    first, *rest = name.split(".")
    return first if first in ("head", "norm") else ".".join([first, *rest[:1]])


def other_settings(recipe: Recipe, stored: Stored, modalities: list[str]) -> list[str]:
    different = differences(recipe, stored.recipe, modalities)
    return [f"  {key}={ours} here, {theirs} in the file" for key, ours, theirs in different]


def other_tokenizer(stored: Stored, ours: str | None) -> list[str]:
    theirs = tokenizer_in(stored.files) if stored.files and "text" in stored.recipe.modalities else None
    if ours is None or theirs is None or hashlib.sha256(theirs.read_bytes()).hexdigest() == ours:
        return []
    return [
        "  warning: text is not read with the tokenizer of these weights, whose embeddings mean other pieces; for that "
        f"set modalities.text.data.tokenizer={theirs}"
    ]
