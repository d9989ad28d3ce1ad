"""fairseq's checkpoints of data2vec, v1 and 2.0, pre-trained and fine-tuned, in and out; no fairseq is needed.

A file tells its own configuration, which is used instead of any published recipe: the two differ for released models.
BEiT-like files of v1 images tell none; d2v_ds.convert.beit reads their sizes off the tensors.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from d2v_ds.config import explain
from d2v_ds.convert import beit, fairseq, fairseq_roberta, fairseq_v1, fairseq_vision
from d2v_ds.convert.fairseq_defaults import complete, resolve
from d2v_ds.convert.fairseq_training import our_training
from d2v_ds.convert.fairseq_tuned import TUNED, TUNED_IN_PLACE, Tuned
from d2v_ds.convert.fairseq_write import DICTIONARY, is_encoder_only, write_fairseq
from d2v_ds.convert.fit import check_sizes, fit, listed
from d2v_ds.convert.names import Place, fuse
from d2v_ds.convert.standin import shown
from d2v_ds.convert.stored import Stored
from d2v_ds.convert.unpickle import plain, read_torch_file
from d2v_ds.modalities import MODALITIES
from d2v_ds.modalities.audio.vocabulary import BLANK, SPECIAL, WORD
from d2v_ds.modalities.image.net import sincos_positions
from d2v_ds.modalities.text.samples import PAD
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.heads import HEAD, HeadConfig
from d2v_ds.model.layers import Body
from d2v_ds.recipe import EMA, Recipe

__all__ = ["read_fairseq", "write_fairseq"]
MAX_TENSORS = 20_000
PRETRAINED = ("data2vec_multi", "data2vec_audio", "data2vec_text")
READ = (*PRETRAINED, fairseq_vision.NAME, *TUNED, *fairseq_roberta.NAMES)


def read_fairseq(path: str | Path) -> Stored:
    """The model in a fairseq checkpoint, or in a BEiT-like file of v1 images.

    Raises ValueError if the file is damaged, asks for more than tensors and containers, is of another model, or
    does not fit its own configuration.
    """
    path = Path(path)
    checkpoint = plain(read_torch_file(path))
    try:
        stored = from_dict(checkpoint)
    except ValidationError as error:
        raise explain(error, [], str(path)) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (path.parent / "sentencepiece.model").is_file():
        stored.files = path.parent
    if stored.head is not None and stored.head.kind == "ctc":
        stored.head.labels = letters(path.parent / DICTIONARY, stored.head.outputs)
    return stored


def letters(path: Path, outputs: int) -> tuple[str, ...] | None:
    """What CTC outputs mean, if the dictionary lies beside the model and has as many entries."""
    if not path.is_file():
        return None
    words = tuple(line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    first, *others = SPECIAL
    if any(WORD in word for word in words):  # pieces, as a run of ours has them
        first = BLANK
    labels = (first, *others, *words)
    return labels if len(labels) == outputs else None


def from_dict(checkpoint: Any) -> Stored:
    """The model in a checkpoint that was read: containers, numbers, texts and tensors only."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"holds a {type(checkpoint).__name__}, must hold a checkpoint: a dict with `model`")
    root, state = settings_of(checkpoint), flat_state(checkpoint)
    if beit.is_beit(state):
        return from_beit(checkpoint, state)
    model, name = model_section(root, state)
    if name == fairseq_vision.NAME:
        return from_vision(root, state, num_updates(checkpoint))
    kept_in = ""
    if name in TUNED:
        tuned, root = TUNED[name], inner_settings(model, TUNED[name])
        model, name = model_section(root, state)
    elif fairseq_roberta.is_tuned(name, state):
        fairseq.refuse(model, pooler_activation_fn="tanh", encoder_layers_to_keep=None)
        tuned, root = TUNED_IN_PLACE, fairseq_roberta.pretraining(model, name)
        state, name, kept_in = fairseq_roberta.without_language_head(state), PRETRAINED[2], f" in {name}"
    elif name == "data2vec_text" and any(key.startswith("classification_heads.") for key in state):
        tuned = TUNED_IN_PLACE
    else:
        tuned = None
    if name not in PRETRAINED:
        raise ValueError(f"{what_else(name, state)}; fairseq's {', '.join(READ)} can be read")
    return from_fairseq(name, root, state, tuned, num_updates(checkpoint), kept_in)


def model_section(root: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], str | None]:
    """The settings of the model and its name."""
    model = root.get("model")
    model = model if isinstance(model, dict) else {}
    name = model.get("_name") or model.get("arch") or nameless(model, state)
    return model, name if isinstance(name, str) else shown(name) if name else None


def nameless(model: dict[str, Any], state: dict[str, Tensor]) -> str | None:
    """Which model has these settings, where a file names none (fairseq drops `_name` in some)."""
    if "w2v_args" in model:
        return "wav2vec_ctc"
    if "pretrained_model_args" in model:
        return "mae_image_classification" if "head.weight" in state else "data2vec_text_classification"
    if "average_top_k_layers" not in model:
        return None
    keys = {"modalities": PRETRAINED[0], "conv_feature_layers": PRETRAINED[1], "transformer": PRETRAINED[2]}
    return next((name for key, name in keys.items() if key in model), None)


def what_else(name: str | None, state: dict[str, Tensor]) -> str:
    if name in fairseq_roberta.NAMES:
        return (
            f"holds a model {name!r} without a head of sentences: RoBERTa, and no data2vec fine-tuned in it"
        )
    if name == fairseq_vision.TUNED_NAME:
        return f"holds a model {name!r}, whose head leaves out the first patch, which none of ours does"
    if name:
        return f"holds a model {shown(name)}, which is no data2vec, or not a task of it that we have"
    return (
        "holds no configuration (`cfg`, or `args` with `arch`), so sizes cannot be known, and is no BEiT-like "
        f"model of images; its tensors begin with {listed(list(state)[:3])}"
    )


def settings_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The file's configuration, without references."""
    found = (checkpoint.get(key) for key in ("cfg", "args"))
    return in_parts(next((settings for settings in found if isinstance(settings, dict) and settings), {}))


def in_parts(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration by parts; the flat arguments of old files stand for each of the parts that we read."""
    if not isinstance(settings.get("model"), dict):
        settings = {part: settings for part in ("model", "task", "optimization", "optimizer", "lr_scheduler")}
    resolved = resolve(settings, settings)
    return {key: part for key, part in resolved.items() if isinstance(part, dict)}


def inner_settings(model: dict[str, Any], tuned: Tuned) -> dict[str, Any]:
    """The configuration of pre-training that a fine-tuned model holds."""
    inner = model.get(tuned.inner)
    if not isinstance(inner, dict) or not inner:
        raise ValueError(
            f"cfg.model.{tuned.inner} is empty: the configuration of pre-training is not in this file, so depth "
            "and heads are unknown; give a file that fairseq saved during fine-tuning"
        )
    if model.get("prediction_mode") not in (None, "MEAN_POOLING", 1):  # 1: the value of its enum
        fairseq.refuse(model, prediction_mode="MEAN_POOLING")
    fairseq.refuse(model, use_fc_norm=True, pooler_activation_fn="tanh")
    return in_parts(inner)


def flat_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the model by name, the teacher flat under `_ema.`.

    Raises ValueError if there is no model, or something in it is no tensor.
    """
    state = next((checkpoint[key] for key in ("model", "module", "state_dict") if key in checkpoint), None)
    if state is None and checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        state = checkpoint
    if not isinstance(state, dict) or not state:
        keys = listed([str(key) for key in checkpoint])
        raise ValueError(
            f"holds no model: a checkpoint has `model`, `module` or `state_dict`, this has {keys}"
        )
    if isinstance(checkpoint.get("_ema"), dict):
        state = state | {"_ema": checkpoint["_ema"]}
    flat: dict[str, Any] = {}
    for name, value in state.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    if len(flat) > MAX_TENSORS:
        raise ValueError(f"holds a model of {len(flat)} tensors, more than any has ({MAX_TENSORS})")
    flat = {name: value for name, value in flat.items() if value is not None}
    others = [str(name) for name, value in flat.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"model holds values that are no tensors: {listed(others)}")
    odd = [str(name) for name, tensor in flat.items() if not isinstance(name, str) or tensor.ndim == 0]
    if odd:
        raise ValueError(
            f"model holds what no model does, tensors without a name or a dimension: {listed(odd)}"
        )
    if all(name.startswith("module.") for name in flat):  # of a model that was wrapped for several GPUs
        flat = {name.removeprefix("module."): tensor for name, tensor in flat.items()}
    return flat


def num_updates(checkpoint: dict[str, Any]) -> int | None:
    history = checkpoint.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates") if isinstance(last, dict) else None
    return updates if type(updates) is int and 0 <= updates < 1 << 60 else None


def from_fairseq(
    name: str,
    root: dict[str, Any],
    state: dict[str, Tensor],
    tuned: Tuned | None,
    updates: int | None,
    kept_in: str = "",
) -> Stored:
    """`root`: the configuration of pre-training, also where fine-tuning followed (`tuned`); `kept_in`: the model
    that it is a part of, in words."""
    head, heads = None, {}
    if tuned is not None:
        state, heads = split_head(state, tuned)
        head = HeadConfig(kind=tuned.kind, outputs=heads["head.proj.weight"].shape[0], updates=updates)
    version = read_v2 if name == "data2vec_multi" else read_v1
    body, configs, tensors, unknown = version(name, root, state)
    training = our_training(root, complete(name, root["model"], list(configs)))
    recipe = Recipe(name=f"{name}_{'_'.join(configs)}", body=body, modalities=configs, **training)
    tensors = fit(recipe, tensors | heads, head, tuple(unknown), theirs=partial(names_in_file, recipe, tuned))
    origin = f"fairseq {name}{kept_in}"
    if tuned is not None:
        origin += f", fine-tuned ({tuned.kind}{f', {updates} updates' if updates else ''})"
    if "audio" in configs and (root.get("task") or {}).get("normalize") is False:
        origin += ", trained on sound that was not normalised (ours always is)"
    return Stored(
        recipe,
        tensors,
        origin,
        head=head,
        step=None if tuned else updates,
        weights="both" if any(key.startswith(TEACHER) for key in tensors) else "student",
    )


def names_in_file(recipe: Recipe, tuned: Tuned | None, name: str) -> list[str]:
    """What a tensor of ours is called in the file; ours if it has no place there."""
    if name.startswith(HEAD):
        return tuned.head.theirs(name.removeprefix(HEAD))
    ((modality, config), *_) = recipe.modalities.items()
    if config.view == "masked":
        theirs = fairseq_v1.their_names(name, modality)
    else:
        theirs = fairseq.their_names(name, is_encoder_only(recipe))
    return [(tuned.prefix if tuned else "") + t for t in theirs] or [name]


def split_head(state: dict[str, Tensor], tuned: Tuned) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's tensors under the names of pre-training, and the head's under ours."""
    encoder, head = {}, {}
    for name, tensor in state.items():
        place = tuned.head.ours(
            re.sub(r"(?<=^classification_heads\.)\w+", "sentence_classification_head", name)
        )
        if place is not None:
            if HEAD + place.name in head:
                raise ValueError(f"holds several heads, {name} belongs to another one; only one can be read")
            head[HEAD + place.name] = tensor
        else:
            encoder[name.removeprefix(tuned.prefix)] = tensor
    if HEAD + "proj.weight" not in head:
        raise ValueError(f"has no tensor of its {tuned.kind} head; is the file complete?")
    return encoder, head


Read = tuple[Body, dict[str, ModalityConfig], dict[str, Tensor], list[str]]


def read_v2(name: str, root: dict[str, Any], state: dict[str, Tensor]) -> Read:
    """Configuration, our tensors and unknown names of data2vec_multi; only modalities that have tensors count,
    since the configuration lists all."""
    state = new_names(state)
    found = dict.fromkeys(m[1] for key in state if (m := re.match(r"modality_encoders\.(\w+)\.", key)))
    modalities = [modality.lower() for modality in found if modality.lower() in MODALITIES]
    if not modalities:
        raise ValueError("has no modality_encoders.AUDIO, .IMAGE or .TEXT; is the file complete?")
    cfg = complete(name, root["model"], modalities)
    if "text" in modalities:
        cfg["modalities"]["text"] |= text_sizes(state, "modality_encoders.TEXT.local_encoder")
    body, configs = fairseq.our_config(cfg)
    check_sizes(body, configs)
    if "image" in configs:
        check_positions(state, body.dim, configs["image"].size // configs["image"].patch)
    parts, unknown = {}, []
    for key, tensor in state.items():
        try:
            ours = fairseq.our_name(key)
        except ValueError:
            unknown.append(key)
            continue
        if ours is not None:
            parts[ours] = fairseq.our_tensor(key, tensor)
    return body, configs, parts, unknown


def new_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the first, internal files as they were when the models were released."""
    return {
        re.sub(
            r"\.positional_encoder\.(pos_embed|positions)$", ".fixed_positional_encoder.positions", name
        ): t
        for name, t in state.items()
        if not name.endswith(".encoder_mask")
    }


def text_sizes(state: dict[str, Tensor], prefix: str) -> dict[str, int]:
    """Vocabulary and longest text, which are rows of the embeddings: dictionaries lie outside the file."""
    try:
        tokens, positions = (state[f"{prefix}.{name}.weight"] for name in ("embed_tokens", "embed_positions"))
    except KeyError as error:
        raise ValueError(f"has no {error.args[0]}; is the file complete?") from error
    return {"vocabulary": tokens.shape[0], "max_source_positions": positions.shape[0] - PAD - 1}


def check_positions(state: dict[str, Tensor], dim: int, side: int) -> None:
    """ValueError if the file's fixed positions are others than those that we compute."""
    ours = sincos_positions(dim, side)
    for name, tensor in state.items():
        if fairseq.RECOMPUTED.fullmatch(name):
            theirs = tensor.float().reshape(-1, tensor.shape[-1])
            tolerance = 2 * torch.finfo(tensor.dtype).eps  # entries are at most 1
            if theirs.shape != ours.shape or not bool(((theirs - ours).abs() <= tolerance + 1e-6).all()):
                raise ValueError(
                    f"{name} of shape {tuple(tensor.shape)} holds other positions than 2-d sines of {side} x {side} "
                    "patches, which every released model has"
                )


def read_v1(name: str, root: dict[str, Any], state: dict[str, Tensor]) -> Read:
    """As `read_v2`, of data2vec_audio or data2vec_text."""
    modality = name.removeprefix("data2vec_")
    cfg = complete(name, root["model"], [modality])
    if modality == "text":
        sizes = text_sizes(state, "encoder.sentence_encoder")
        cfg |= {"vocabulary": sizes["vocabulary"]}
        cfg["transformer"] |= {"max_source_positions": sizes["max_source_positions"]}
    body, configs = fairseq_v1.our_config(cfg, root.get("task"))
    check_sizes(body, configs)
    parts: dict[Place, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        try:
            place = fairseq_v1.our_name(key)
        except ValueError:
            unknown.append(key)
            continue
        if place is not None:
            parts[place] = tensor
    return (
        body,
        configs,
        fairseq_v1.one_layer_head(fuse(parts, lambda ours: fairseq_v1.their_names(ours, modality))),
        unknown,
    )


def from_vision(root: dict[str, Any], state: dict[str, Tensor], updates: int | None) -> Stored:
    """fairseq's port of v1 images, pre-trained."""
    student, average = fairseq_vision.student_and_teacher(state)
    if not beit.is_beit(student):
        raise ValueError("has no cls_emb or patch_embed.conv.weight; is the file complete?")
    body, configs, cfg = fairseq_vision.our_config(root["model"], student)
    tensors, unknown = beit.our_weights(student)
    if average:
        teacher, more = beit.our_weights(average)
        unknown += [fairseq_vision.AVERAGE + name for name in more]
        tensors |= {TEACHER + name: tensor for name, tensor in teacher.items()}
    recipe = Recipe(
        name=f"{fairseq_vision.NAME}_image", body=body, modalities=configs, **our_training(root, cfg)
    )
    tensors = fit(recipe, tensors, unknown=tuple(unknown), theirs=fairseq_vision.their_names)
    return Stored(
        recipe,
        tensors,
        f"fairseq {fairseq_vision.NAME}",
        step=updates,
        weights="both" if average else "student",
    )


def from_beit(checkpoint: dict[str, Any], state: dict[str, Tensor]) -> Stored:
    """A BEiT-like file: v1 images, pre-trained or fine-tuned on classes."""
    body, configs = beit.our_config(state)
    tensors, unknown = beit.our_weights(state)
    head = None
    if "head.proj.weight" in tensors:
        if "head.norm.weight" not in tensors:
            raise ValueError("has a head but no fc_norm: only heads on the mean of the patches can be read")
        head = HeadConfig(kind="image_classification", outputs=tensors["head.proj.weight"].shape[0])
    average = checkpoint.get("model_ema")
    if isinstance(average, dict) and head is None:
        teacher, more = beit.our_weights(average)
        unknown += more
        tensors |= {TEACHER + key: t for key, t in teacher.items()}
    if head is not None and not uses_imagenet_colours(checkpoint):
        configs["image"].data.mean = configs["image"].data.std = (0.5, 0.5, 0.5)
    ema = EMA(start=0.9998, end=0.9998, anneal_steps=0)
    recipe = Recipe(name="data2vec_vision_image", body=body, modalities=configs, ema=ema)
    tensors = fit(recipe, tensors, head, tuple(unknown), theirs=beit.their_names)
    return Stored(
        recipe,
        tensors,
        "BEiT-like data2vec_vision" + (", fine-tuned (image_classification)" if head else ""),
        head=head,
        weights="both" if any(key.startswith(TEACHER) for key in tensors) else "student",
    )


def uses_imagenet_colours(checkpoint: dict[str, Any]) -> bool:
    """Pixels were normalised by ImageNet's mean: pre-training was told to, fine-tuning was not unless it says so."""
    arguments = checkpoint.get("args")
    said = arguments.get("imagenet_default_mean_and_std") if isinstance(arguments, dict) else None
    return isinstance(said, (bool, int)) and bool(said)
