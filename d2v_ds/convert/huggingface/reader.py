"""`read_huggingface(folder)`: transformers' v1 classes of data2vec, and the 2.0 folders that we write.

Only files are read: transformers need not be installed, and no code of the folder is run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2v_ds.config import explain
from d2v_ds.convert.fit import fit
from d2v_ds.convert.huggingface import native, own
from d2v_ds.convert.stored import Stored
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.heads import HeadConfig
from d2v_ds.recipe import Recipe, validated

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
# what a class of transformers takes where config.json is silent
DEFAULTS: dict[str, dict[str, Any]] = {
    "data2vec-audio": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout": 0.1,
        "activation_dropout": 0.1,
        "attention_dropout": 0.1,
        "layerdrop": 0.1,
        "layer_norm_eps": 1e-5,
        "conv_dim": [512] * 7,
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "num_conv_pos_embedding_groups": 16,
        "conv_pos_kernel_size": 19,
        "num_conv_pos_embeddings": 5,
        "pad_token_id": 0,
    },
    "data2vec-text": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 1,
    },
    "data2vec-vision": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": 0.1,
        "drop_path_rate": 0.1,
    },
}
MAX_SIZE = 10_000_000
COUNTS = {"depth", "layers", "projection_layers", "prenet_depth", "position_depth", "extra_tokens"}
MAX_COUNT = 1_000
# what torch and numpy raise for a model of impossible sizes
ODD_SIZES = (TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError, MemoryError)
HALF = [0.5, 0.5, 0.5]  # mean and spread of BeitImageProcessor where its file is silent


def read_huggingface(folder: str | Path) -> Stored:
    """The model in a folder of transformers: a v1 class of its own, with or without head, or a 2.0 folder of ours.

    Raises ValueError if the folder holds another model, is damaged, or does not fit its own configuration.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind == own.MODEL_TYPE:
        reader = read_own
    elif kind in native.FAMILIES:
        reader = read_native
    else:
        raise ValueError(
            f"{folder}/config.json has model_type {config.get('model_type')!r}; folders of transformers are read with "
            f"{', '.join((*native.FAMILIES, own.MODEL_TYPE))}, and those of `d2v export` have format 'd2v_ds'"
        )
    try:
        return reader(folder, config)
    except ValidationError as error:
        raise explain(error, [], f"{folder}/config.json") from error
    except KeyError as error:
        raise ValueError(f"{folder}/config.json has no {error}") from error
    except ValueError as error:
        raise error if str(error).startswith(str(folder)) else ValueError(f"{folder}: {error}") from error
    except ODD_SIZES as error:
        raise ValueError(f"{folder}/config.json describes no model that can be built: {error}") from error


def read_own(folder: Path, config: dict[str, Any]) -> Stored:
    kept = config["d2v_ds"]
    if not isinstance(kept, dict) or not isinstance(kept.get("recipe"), dict):
        raise ValueError(
            f"{folder}/config.json: d2v_ds must hold the recipe of the model, as d2v export writes it"
        )
    check_counts(kept["recipe"])
    recipe = validated(kept["recipe"], f"{folder}/config.json")
    if len(recipe.modalities) != 1:
        raise ValueError(f"{folder}/config.json has {len(recipe.modalities)} modalities, must have one")
    (name,) = recipe.modalities
    tensors = read_tensors(folder)
    check_depth(recipe.body.depth, tensors, r"(?:encoder\.)?blocks\.(\d+)\.")
    check_depth(recipe.modalities[name].prenet_depth, tensors, r"(?:encoder\.)?context\.blocks\.(\d+)\.")
    kinds = {with_head: kind for kind, (_, with_head) in own.HEADS.items()}
    kind = kinds.get(class_of(config))
    ours = own.our_weights(tensors, name, kind is not None)
    head = None
    if kind is not None:
        outputs = ours["head.proj.weight"].shape[0]
        labels = letters(folder, outputs) if kind == "ctc" else native.labels_of(config, outputs)
        head = HeadConfig(kind=kind, outputs=outputs, labels=labels)
    return Stored(
        recipe,
        fit(
            recipe,
            ours,
            head,
            optional=optional(recipe),
            theirs=lambda ours: [own.their_name(ours, name, head)],
        ),
        kept["origin"],
        files=folder,
        head=head,
        step=kept["step"],
        weights=kept["weights"],
    )


def read_native(folder: Path, config: dict[str, Any]) -> Stored:
    kind = config["model_type"]
    family, config = native.FAMILIES[kind], complete(DEFAULTS[kind], config)
    written = class_of(config) or family.plain
    if written not in (family.plain, family.with_head):
        raise ValueError(
            f"holds a {written}; of this kind {family.plain} and {family.with_head} can be read: save its encoder, "
            f"model.{family.prefix}save_pretrained(folder)"
        )
    theirs = read_tensors(folder)
    check_depth(config["num_hidden_layers"], theirs, r"(?:\w+\.)?encoder\.layers?\.(\d+)\.")
    tensors, unknown = native.our_weights(theirs, family)
    body, name, modality = native.our_config(config)
    head = native.our_head(config, tensors, family) if written == family.with_head else None
    if head is not None and head.kind == "ctc":
        blank = config["pad_token_id"]
        tensors, head.labels = native.blank_first(tensors, blank), letters(folder, head.outputs, blank)
    if name == "image":
        modality = with_statistics(modality, folder)
    recipe = Recipe(name=kind, body=body, modalities={name: modality})
    return Stored(
        recipe,
        fit(
            recipe,
            tensors,
            head,
            tuple(unknown),
            optional=optional(recipe),
            theirs=lambda name: native.their_names(name, family),
        ),
        f"Hugging Face folder, {written}",
        files=folder,
        head=head,
    )


def check_counts(settings: dict[str, Any], where: str = "recipe") -> None:
    """ValueError for more parts of one kind than any model has: before as many are built."""
    for key, value in settings.items():
        if isinstance(value, dict):
            check_counts(value, f"{where}.{key}")
        elif key in COUNTS and isinstance(value, (int, float)) and value > MAX_COUNT:
            raise ValueError(f"config.json: {where}.{key}={value} is more than any model has ({MAX_COUNT})")


def class_of(config: dict[str, Any]) -> str | None:
    """The class that wrote the folder, if it says."""
    written = config.get("architectures")
    return str(written[0]) if isinstance(written, list) and written else None


def complete(defaults: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The class's settings with those of the file; ValueError for one of another kind than its default."""
    for key, default in defaults.items():
        value = config.get(key, default)
        if not is_of_kind(value, default, key):
            raise ValueError(f"config.json: {key}={value!r} is odd; it is usually {default!r}")
    return defaults | config


def is_of_kind(value: Any, default: Any, key: str) -> bool:
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    if isinstance(default, list) or (key in ("image_size", "patch_size") and isinstance(value, list)):
        return isinstance(value, list) and bool(value) and all(is_size(v) for v in value)
    if isinstance(default, int):
        return is_size(value) or (key.endswith("_id") and value == 0)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_SIZE


def check_depth(depth: int, tensors: dict[str, Tensor], pattern: str) -> None:
    """ValueError if the weights have not as many layers as the configuration says: before as many are built."""
    found = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    if len(found) != depth:
        raise ValueError(
            f"config.json says {depth} layers, the weights have {len(found)}: {sorted(found)[:50]}"
        )


def optional(recipe: Recipe) -> tuple[str, ...]:
    """What such a folder may lack: mask embeddings, and the norm behind the last block of v1 images."""
    return ("norm.", *(f"encoders.{name}.context.mask_token" for name in recipe.modalities))


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder that save_pretrained or d2v export wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, must hold settings by name")
    return content


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's weights, one file or several; safetensors where there are both kinds."""
    for name in (SAFE, PICKLED):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read_file(folder / name)
        if index.is_file():
            parts = read_json(index).get("weight_map")
            if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
                raise ValueError(f"{index} has no weight_map of names to files")
            tensors: dict[str, Tensor] = {}
            for part in sorted(set(parts.values())):
                if Path(part).name != part or not (folder / part).is_file():
                    raise ValueError(f"{index} names {part!r}, which is no file in the folder")
                tensors |= read_file(folder / part)
            lost = [key for key in parts if key not in tensors]
            if lost:
                raise ValueError(f"{index} lists tensors that its files lack: {', '.join(lost[:20])}")
            return tensors
    raise ValueError(f"{folder} has neither {SAFE} nor {PICKLED} (nor an index of their parts)")


def read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    from d2v_ds.convert.unpickle import read_torch_file

    tensors = read_torch_file(path)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} must hold tensors by name, and nothing else")
    return dict(tensors)


def letters(folder: Path, outputs: int, blank: int = 0) -> tuple[str, ...] | None:
    """What CTC outputs mean by the folder's vocab.json, the blank first; None if it says nothing or something else."""
    if not (folder / "vocab.json").is_file():
        return None
    vocabulary = read_json(folder / "vocab.json")
    by_id = {i: label for label, i in vocabulary.items()}
    if set(by_id) != set(range(outputs)):
        return None
    order = [blank, *(i for i in range(outputs) if i != blank)]
    return tuple(by_id[i] for i in order)


def with_statistics(modality: ModalityConfig, folder: Path) -> ModalityConfig:
    """The mean and spread of pixels that the folder's processor subtracts and divides by."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return modality
    processor = read_json(path)
    mean, std = processor.get("image_mean", HALF), processor.get("image_std", HALF)
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    data = modality.data.model_copy(update={"mean": tuple(mean), "std": tuple(std)})
    return modality.model_copy(update={"data": data})
