"""v1 models as transformers' own classes, `Data2Vec{Audio,Text,Vision}Model` and those with a head, both ways.

Names and settings were compared with fairseq's (docs/export.md): layer norms, positions and masks agree, a text's
token types have no counterpart and are zero.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_ds.convert.beit import MAX_SIDE
from d2v_ds.convert.names import Names, Place, fuse
from d2v_ds.convert.single import modality_of
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities import config_class
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.heads import HEAD, HeadConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target


class Family(NamedTuple):
    """The classes of one modality in transformers."""

    modality: str
    prefix: str
    """Before the encoder's names in a model with a head."""
    plain: str
    with_head: str
    kind: str
    """Of the head."""
    names: Names


FFN = [("intermediate.dense.{w}", "mlp.fc1.{w}"), ("output.dense.{w}", "mlp.fc2.{w}")]
AUDIO = Names(
    [
        ("masked_spec_embed", "encoders.audio.context.mask_token"),
        ("feature_extractor.conv_layers.{i}.conv.weight", "encoders.audio.local.convs.{i}.weight"),
        ("feature_extractor.conv_layers.{i}.layer_norm.{w}", "encoders.audio.local.norms.{i}.{w}"),
        ("feature_projection.layer_norm.{w}", "encoders.audio.local.norm.{w}"),
        ("feature_projection.projection.{w}", "encoders.audio.local.proj.{w}"),
        (
            "encoder.pos_conv_embed.layers.{i}.conv.{w}",
            "encoders.audio.context.conv_positions.convs.{i}.conv.{w}",
        ),
        ("encoder.layer_norm.{w}", "encoders.audio.context.norm.{w}"),
        ("encoder.layers.{i}.attention.{qkv}_proj.{w}", "blocks.{i}.attn.qkv.{w}"),
        ("encoder.layers.{i}.attention.out_proj.{w}", "blocks.{i}.attn.proj.{w}"),
        ("encoder.layers.{i}.layer_norm.{w}", "blocks.{i}.norm1.{w}"),
        ("encoder.layers.{i}.feed_forward.intermediate_dense.{w}", "blocks.{i}.mlp.fc1.{w}"),
        ("encoder.layers.{i}.feed_forward.output_dense.{w}", "blocks.{i}.mlp.fc2.{w}"),
        ("encoder.layers.{i}.final_layer_norm.{w}", "blocks.{i}.norm2.{w}"),
        ("lm_head.{w}", "head.proj.{w}"),
    ]
)
TEXT = Names(
    [
        ("embeddings.word_embeddings.weight", "encoders.text.local.tokens.weight"),
        ("embeddings.position_embeddings.weight", "encoders.text.local.positions.weight"),
        ("embeddings.LayerNorm.{w}", "encoders.text.local.norm.{w}"),
        ("encoder.layer.{i}.attention.self.{qkv}.{w}", "blocks.{i}.attn.qkv.{w}"),
        ("encoder.layer.{i}.attention.output.dense.{w}", "blocks.{i}.attn.proj.{w}"),
        ("encoder.layer.{i}.attention.output.LayerNorm.{w}", "blocks.{i}.norm1.{w}"),
        *((f"encoder.layer.{{i}}.{theirs}", f"blocks.{{i}}.{ours}") for theirs, ours in FFN),
        ("encoder.layer.{i}.output.LayerNorm.{w}", "blocks.{i}.norm2.{w}"),
        ("classifier.dense.{w}", "head.dense.{w}"),
        ("classifier.out_proj.{w}", "head.proj.{w}"),
    ]
)
VISION = Names(
    [
        ("embeddings.cls_token", "encoders.image.context.extra_tokens"),
        ("embeddings.mask_token", "encoders.image.context.mask_token"),
        ("embeddings.patch_embeddings.projection.{w}", "encoders.image.local.proj.{w}"),
        ("encoder.layer.{i}.lambda_1", "blocks.{i}.scale1"),
        ("encoder.layer.{i}.lambda_2", "blocks.{i}.scale2"),
        ("encoder.layer.{i}.attention.attention.{qkv}.weight", "blocks.{i}.attn.qkv.weight"),
        ("encoder.layer.{i}.attention.attention.q.bias", "blocks.{i}.attn.q_bias"),
        ("encoder.layer.{i}.attention.attention.v.bias", "blocks.{i}.attn.v_bias"),
        ("encoder.layer.{i}.attention.output.dense.{w}", "blocks.{i}.attn.proj.{w}"),
        *((f"encoder.layer.{{i}}.{theirs}", f"blocks.{{i}}.{ours}") for theirs, ours in FFN),
        ("encoder.layer.{i}.layernorm_before.{w}", "blocks.{i}.norm1.{w}"),
        ("encoder.layer.{i}.layernorm_after.{w}", "blocks.{i}.norm2.{w}"),
        ("layernorm.{w}", "norm.{w}"),
        ("pooler.layernorm.{w}", "head.norm.{w}"),
        ("classifier.{w}", "head.proj.{w}"),
    ]
)
FAMILIES = {
    "data2vec-audio": Family(
        "audio", "data2vec_audio.", "Data2VecAudioModel", "Data2VecAudioForCTC", "ctc", AUDIO
    ),
    "data2vec-text": Family(
        "text",
        "data2vec_text.",
        "Data2VecTextModel",
        "Data2VecTextForSequenceClassification",
        "sentence_classification",
        TEXT,
    ),
    "data2vec-vision": Family(
        "image",
        "data2vec_vision.",
        "Data2VecVisionModel",
        "Data2VecVisionForImageClassification",
        "image_classification",
        VISION,
    ),
}
WORDS = {"query": "q", "key": "k", "value": "v"}
SHARED_TABLE = "encoder.relative_position_bias.relative_position_bias_table"
BLOCK_TABLE = "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table"
TABLE = "encoders.image.context.relative_bias"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
# what a class of transformers may hold besides, which no encoder of ours has: an untrained pooler, the head of its
# own masked-token class, and indices that are computed
BESIDES = re.compile(r"pooler\.dense\..*|embeddings\.(position_ids|token_type_ids)|.*relative_position_index")


def family_of(modality: str) -> tuple[str, Family]:
    return next((model_type, f) for model_type, f in FAMILIES.items() if f.modality == modality)


# ---- out ----


def misfit(stored: Stored) -> str | None:
    """Why transformers' class of this modality cannot hold the encoder; None if it can."""
    name, config = modality_of(stored)
    body = stored.recipe.body
    if config.view != "masked":
        return "it is data2vec 2.0, which transformers does not have"
    if config.prenet_depth or config.alibi:
        return "it has no prenet blocks and no ALiBi"
    if name == "image":
        has_norm = "norm.weight" in stored.tensors
        wanted = [
            (body.norm_first, "its norms stand first"),
            (body.qkv_bias == "qv", "its keys have no bias"),
            (config.positions != "sincos", "its positions are relative"),
            (config.extra_tokens == 1, "it has one class token"),
            (not (stored.head and has_norm), "a classifier has no norm after the last block"),
        ]
    else:
        wanted = [
            (not body.norm_first, "its norms stand last"),
            (body.layer_scale is None, "its branches have no factors"),
            (body.qkv_bias == "all", "queries, keys and values have a bias"),
            (config.extra_tokens == 0, "it has no extra tokens"),
        ]
    if name == "audio":
        wanted += [
            (not config.position_pre_norm, "no norm stands before the positional convolutions"),
            (body.norm_eps == 1e-5, "the eps of its norms is 1e-5"),
        ]
    if name == "text":
        wanted += [
            (config.embed_norm, "its embeddings have a norm"),
            (config.embed_norm_eps == body.norm_eps, "all its norms have one eps"),
        ]
    return next((why for fits, why in wanted if not fits), None)


def settings(stored: Stored) -> dict[str, Any]:
    """config.json of transformers' class."""
    name, config = modality_of(stored)
    body, (model_type, family) = stored.recipe.body, family_of(name)
    common = {
        "model_type": model_type,
        "architectures": [family.with_head if stored.head else family.plain],
        "dtype": "float32",
        "hidden_act": "gelu",
        "hidden_size": body.dim,
        "num_hidden_layers": body.depth,
        "num_attention_heads": body.heads,
        "intermediate_size": int(body.dim * body.mlp_ratio),
        "layer_norm_eps": body.norm_eps,
    }
    of_modality = {"audio": audio_settings, "image": vision_settings, "text": text_settings}
    return common | of_modality[name](stored) | head_settings(stored.head)


def audio_settings(stored: Stored) -> dict[str, Any]:
    _, config = modality_of(stored)
    body = stored.recipe.body
    dims, kernels, strides = zip(*config.conv_layers, strict=True)
    has_mask = "encoders.audio.context.mask_token" in stored.tensors
    return {
        "conv_dim": list(dims),
        "conv_kernel": list(kernels),
        "conv_stride": list(strides),
        "conv_bias": False,
        "feat_extract_activation": "gelu",
        "num_conv_pos_embeddings": config.position_depth,
        "conv_pos_kernel_size": max(3, config.position_width // config.position_depth),
        "num_conv_pos_embedding_groups": config.position_groups,
        "hidden_dropout": body.encoder_dropout,
        "attention_dropout": body.attention_dropout,
        "activation_dropout": body.activation_dropout,
        "layerdrop": body.layerdrop,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "mask_time_prob": 0.05 if has_mask else 0.0,  # transformers makes a mask embedding only if it masks
        "mask_feature_prob": 0.0,
        "pad_token_id": 0,  # the blank of CTC
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def text_settings(stored: Stored) -> dict[str, Any]:
    _, config = modality_of(stored)
    body = stored.recipe.body
    return {
        "vocab_size": config.vocabulary,
        "max_position_embeddings": stored.tensors["encoders.text.local.positions.weight"].shape[0],
        "type_vocab_size": 1,
        "hidden_dropout_prob": body.encoder_dropout,
        "attention_probs_dropout_prob": body.attention_dropout,
        "classifier_dropout": 0.0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


def vision_settings(stored: Stored) -> dict[str, Any]:
    _, config = modality_of(stored)
    body = stored.recipe.body
    return {
        "image_size": config.size,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "use_mask_token": "encoders.image.context.mask_token" in stored.tensors,
        "use_absolute_position_embeddings": False,
        "use_shared_relative_position_bias": config.positions == "relative",
        "use_relative_position_bias": config.positions == "relative_per_block",
        "layer_scale_init_value": body.layer_scale or 0.0,
        "use_mean_pooling": "norm.weight" not in stored.tensors,  # its norm then stands behind the mean
        "hidden_dropout_prob": body.encoder_dropout,
        "attention_probs_dropout_prob": body.attention_dropout,
        "drop_path_rate": body.drop_path[1],
    }


def head_settings(head: HeadConfig | None) -> dict[str, Any]:
    if head is None:
        return {}
    if head.kind == "ctc":
        return {"vocab_size": head.outputs}
    labels = head.labels or tuple(f"LABEL_{i}" for i in range(head.outputs))
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def their_weights(stored: Stored) -> dict[str, Tensor]:
    """Tensors of a single encoder, and of its head, under transformers' names."""
    name, _ = modality_of(stored)
    _, family = family_of(name)
    theirs: dict[str, Tensor] = {}
    for key, tensor in stored.tensors.items():
        if key == TABLE:
            layers = tensor.shape[0]
            names = [SHARED_TABLE] if layers == 1 else [BLOCK_TABLE.format(i) for i in range(layers)]
            theirs |= {n: table.clone() for n, table in zip(names, tensor, strict=True)}
            continue
        names = their_names(key, family)
        parts = tensor.chunk(3) if len(names) == 3 else [tensor]
        theirs |= {n: part.clone() for n, part in zip(names, parts, strict=True)}
    if name == "text":
        theirs[TOKEN_TYPES] = torch.zeros(1, stored.recipe.body.dim)
    if name == "image" and "embeddings.mask_token" in theirs:
        theirs["embeddings.mask_token"] = theirs["embeddings.mask_token"].reshape(1, 1, -1)
    prefix = family.prefix if stored.head else ""
    return {key if is_of_head(key) else prefix + key: tensor for key, tensor in theirs.items()}


def their_names(name: str, family: Family) -> list[str]:
    """What transformers calls a tensor of ours, or the three that it is split into."""
    return [long(theirs) for theirs in family.names.theirs(name)] or [name]


def is_of_head(name: str) -> bool:
    return name.startswith(("lm_head.", "classifier."))


def long(name: str) -> str:
    """`query`, `key`, `value` in full, where transformers writes them so."""
    words = {letter: word for word, letter in WORDS.items()}
    return re.sub(r"(attention\.(?:self|attention))\.([qkv])\.", lambda m: f"{m[1]}.{words[m[2]]}.", name)


def short(name: str) -> str:
    return re.sub(
        r"(attention\.(?:self|attention))\.(query|key|value)\.", lambda m: f"{m[1]}.{WORDS[m[2]]}.", name
    )


# ---- in ----


def refuse(config: dict[str, Any], **expected: Any) -> None:
    """ValueError for a setting that ours has only in the one way."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json: {key}={config[key]!r} is not supported, only {value!r}")


def our_config(config: dict[str, Any]) -> tuple[Body, str, ModalityConfig]:
    """Body, modality and its configuration; `config`: transformers', complete (with its class's defaults).

    What only pre-training needs (masks, targets, loss) is as the released v1 models had it.
    """
    name = FAMILIES[config["model_type"]].modality
    refuse(config, hidden_act="gelu")
    dim = config["hidden_size"]
    of_modality = {"audio": audio_config, "image": vision_config, "text": text_config}
    body, settings = of_modality[name](config)
    body = Body(
        dim=dim,
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_ratio=config["intermediate_size"] / dim,
        norm_eps=config["layer_norm_eps"],
        **body,
    )
    settings["target"].top_k = min(settings["target"].top_k, body.depth)
    layers = 2 if name == "text" else 1
    decoder = DecoderConfig(dim=dim, layers=0, groups=1, projection_layers=layers)
    return body, name, config_class(name)(view="masked", clones=1, decoder=decoder, **settings)


def audio_config(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse(config, conv_bias=False, add_adapter=False, feat_extract_activation="gelu", layer_norm_eps=1e-5)
    depth = config["num_conv_pos_embeddings"]
    dropout = config["hidden_dropout"]
    body = {
        "encoder_dropout": dropout,
        "post_mlp_dropout": dropout,
        "attention_dropout": config["attention_dropout"],
        "activation_dropout": config["activation_dropout"],
        "layerdrop": config["layerdrop"],
    }
    return body, {
        "conv_layers": tuple(
            zip(config["conv_dim"], config["conv_kernel"], config["conv_stride"], strict=True)
        ),
        "position_width": config["conv_pos_kernel_size"] * depth,
        "position_depth": depth,
        "position_groups": config["num_conv_pos_embedding_groups"],
        "prenet_dropout": dropout,
        "mask": Mask(kind="span", ratio=0.65, length=10),
        "target": Target(top_k=8, per_layer="instance"),
        "loss": Loss(),
        "teacher": "norm",
    }


def text_config(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse(config, pad_token_id=1, is_decoder=False, add_cross_attention=False)
    dropout = config["hidden_dropout_prob"]
    body = {
        "encoder_dropout": dropout,
        "post_mlp_dropout": dropout,
        "attention_dropout": config["attention_probs_dropout_prob"],
    }
    return body, {
        "vocabulary": config["vocab_size"],
        "max_tokens": config["max_position_embeddings"] - 2,
        "embed_dropout": dropout,
        "embed_norm_eps": config["layer_norm_eps"],
        "mask": Mask(kind="token_span", ratio=0.35, length=4),
        "target": Target(top_k=10, per_layer="layer"),
        "loss": Loss(beta=4.0, scale=1.0),
        "teacher": "blocks",
    }


def vision_config(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse(config, use_absolute_position_embeddings=False)
    size, patch = (
        v[0] if isinstance(v, list) and len(set(v)) == 1 else v
        for v in (config["image_size"], config["patch_size"])
    )
    per_block, shared = config["use_relative_position_bias"], config["use_shared_relative_position_bias"]
    if isinstance(size, list) or isinstance(patch, list) or not (per_block or shared):
        raise ValueError(
            f"config.json: image_size={size}, patch_size={patch}, use_relative_position_bias={per_block}, "
            f"use_shared_relative_position_bias={shared} are not supported: images and patches must be square, and "
            "positions relative"
        )
    if size // patch > MAX_SIDE:
        raise ValueError(
            f"config.json: image_size={size} has more than {MAX_SIDE} patches of {patch} in a row"
        )
    body = {
        "norm_first": True,
        "qkv_bias": "qv",
        "layer_scale": config["layer_scale_init_value"] or None,
        "encoder_dropout": config["hidden_dropout_prob"],
        "post_mlp_dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
        "drop_path": (0.0, config["drop_path_rate"]),
    }
    return body, {
        "size": size,
        "patch": patch,
        "channels": config["num_channels"],
        "positions": "relative_per_block" if per_block else "relative",
        "extra_tokens": 1,
        "extra_tokens_init": "small",
        "mask": Mask(kind="rectangle", ratio=120 / 196, length=16),
        "target": Target(top_k=6, per_layer="layer", final=("layer",), source="block"),
        "loss": Loss(beta=2.0, scale=1 / config["hidden_size"]),
        "teacher": "full",
    }


def our_weights(tensors: dict[str, Tensor], family: Family) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names that belong to no part of the model."""
    tensors = {name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()}
    if family.modality == "text":
        tensors = without_token_types(tensors)
    tables = {
        name: tensors.pop(name) for name in list(tensors) if name.endswith("relative_position_bias_table")
    }
    parts: dict[Place, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        place = family.names.ours(short(name))
        if place is not None:
            parts[place] = tensor.reshape(-1) if place.name.endswith("mask_token") else tensor
        elif not BESIDES.fullmatch(name):
            unknown.append(name)
    ours = fuse(parts, lambda name: their_names(name, family))
    if tables:
        ours[TABLE] = whole_table(tables)
    return ours, unknown


def whole_table(tables: dict[str, Tensor]) -> Tensor:
    """One table (1, rows, H), or one for each block (L, rows, H); where there are both, their sum."""
    shared = tables.pop(SHARED_TABLE, None)
    if not tables:
        return shared[None]
    missing = [name for i in range(len(tables)) if (name := BLOCK_TABLE.format(i)) not in tables]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}: every layer must have a table, or all share one")
    stacked = torch.stack([tables[BLOCK_TABLE.format(i)] for i in range(len(tables))])
    return stacked if shared is None else stacked + shared


def without_token_types(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embedding of token type 0, which every token has, goes into the positions' (exact where it is zero)."""
    types = tensors.get(TOKEN_TYPES)
    positions = "embeddings.position_embeddings.weight"
    tensors = {name: tensor for name, tensor in tensors.items() if name != TOKEN_TYPES}
    if types is not None and bool(types[0].any()) and positions in tensors:
        tensors[positions] = tensors[positions].float() + types[0].float()
    return tensors


def our_head(config: dict[str, Any], tensors: dict[str, Tensor], family: Family) -> HeadConfig | None:
    """The head of the class that the folder names; None of a plain encoder."""
    if f"{HEAD}proj.weight" not in tensors:
        return None
    outputs = tensors[f"{HEAD}proj.weight"].shape[0]
    norm_eps = {"norm_eps": config["layer_norm_eps"]} if f"{HEAD}norm.weight" in tensors else {}
    return HeadConfig(kind=family.kind, outputs=outputs, labels=labels_of(config, outputs), **norm_eps)


def labels_of(config: dict[str, Any], outputs: int) -> tuple[str, ...] | None:
    """What `id2label` says, if it says anything."""
    given = config.get("id2label")
    given = given if isinstance(given, dict) else {}
    labels = tuple(str(given.get(str(i), given.get(i))) for i in range(outputs))
    is_named = len(given) == outputs and any(label != f"LABEL_{i}" for i, label in enumerate(labels))
    return labels if is_named else None


def blank_first(tensors: dict[str, Tensor], blank: int) -> dict[str, Tensor]:
    """The head's rows with the blank's first, where ours has it."""
    if not blank:
        return tensors
    moved = {}
    for name in (f"{HEAD}proj.weight", f"{HEAD}proj.bias"):
        rows = tensors[name]
        moved[name] = torch.cat([rows[blank : blank + 1], rows[:blank], rows[blank + 1 :]])
    return tensors | moved
