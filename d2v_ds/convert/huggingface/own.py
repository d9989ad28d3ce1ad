"""Our models as the classes of `modeling_data2vec2.py`, the file that every folder of 2.0 weights carries."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from d2v_ds.convert.single import modality_of
from d2v_ds.convert.stored import Stored
from d2v_ds.model.heads import HEAD, HeadConfig

MODULE = "modeling_data2vec2"
MODEL_TYPE = "data2vec2"
PREFIX = "encoder."
"""Before the encoder's names in a model with a head."""
HEADS = {
    "ctc": ("AutoModelForCTC", "Data2Vec2ForCTC"),
    "image_classification": ("AutoModelForImageClassification", "Data2Vec2ForImageClassification"),
    "sentence_classification": ("AutoModelForSequenceClassification", "Data2Vec2ForSequenceClassification"),
}
KINDS = {"audio": "ctc", "image": "image_classification", "text": "sentence_classification"}


def settings(stored: Stored) -> dict[str, Any]:
    """config.json of a single encoder, `d2v_ds` with all that ours needs to read it back included."""
    name, config = modality_of(stored)
    body, tensors = stored.recipe.body, stored.tensors
    context = f"encoders.{name}.context."
    scale, tables = tensors.get(f"{context}alibi_scale"), tensors.get(f"{context}relative_bias")
    auto, with_head = HEADS[KINDS[name]]
    common = {
        "model_type": MODEL_TYPE,
        "architectures": [HEADS[stored.head.kind][1] if stored.head else "Data2Vec2Model"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.Data2Vec2Config",
            "AutoModel": f"{MODULE}.Data2Vec2Model",
            auto: f"{MODULE}.{with_head}",
        },
        "dtype": "float32",
        "modality": name,
        "hidden_size": body.dim,
        "num_hidden_layers": config.prenet_depth + body.depth,
        "num_prenet_layers": config.prenet_depth,
        "num_attention_heads": body.heads,
        "intermediate_size": int(body.dim * body.mlp_ratio),
        "layer_norm_eps": body.norm_eps,
        "norm_first": body.norm_first,
        "final_norm": "norm.weight" in tensors,
        "layer_scale": body.layer_scale is not None,
        "qkv_bias": body.qkv_bias,
        "hidden_dropout": body.encoder_dropout,
        "attention_dropout": body.attention_dropout,
        "activation_dropout": body.activation_dropout,
        "mlp_dropout": body.post_mlp_dropout,
        "input_dropout": config.prenet_dropout,
        "num_extra_tokens": config.extra_tokens,
        "input_norm": f"{context}norm.weight" in tensors,
        "alibi_layers": 0 if scale is None else scale.shape[0],
        "alibi_per_head": scale is not None and scale.shape[1] == body.heads,
        "position_bias_tables": 0 if tables is None else tables.shape[0],
    }
    of_modality = {"audio": audio_settings, "image": image_settings, "text": text_settings}
    kept = {
        "version": 1,
        "weights": stored.weights,
        "step": stored.step,
        "origin": stored.origin,
        "recipe": stored.recipe.model_copy(update={"out": None}).model_dump(mode="json"),
    }
    return common | of_modality[name](stored) | head_settings(stored.head) | {"d2v_ds": kept}


def audio_settings(stored: Stored) -> dict[str, Any]:
    _, config = modality_of(stored)
    dims, kernels, strides = zip(*config.conv_layers, strict=True)
    padding = "zero"
    if stored.recipe.fairseq_compat:
        padding = "zero_once" if config.view == "masked" else "keep"
    return {
        "conv_dim": list(dims),
        "conv_kernel": list(kernels),
        "conv_stride": list(strides),
        "position_layers": config.position_depth,
        "position_kernel": max(3, config.position_width // config.position_depth),
        "position_groups": config.position_groups,
        "position_norm": config.position_pre_norm,
        "position_padding": padding,
    }


def image_settings(stored: Stored) -> dict[str, Any]:
    _, config = modality_of(stored)
    return {"image_size": config.size, "patch_size": config.patch, "num_channels": config.channels}


def text_settings(stored: Stored) -> dict[str, Any]:
    _, config = modality_of(stored)
    positions = stored.tensors["encoders.text.local.positions.weight"]
    return {
        "vocab_size": config.vocabulary,
        "max_position_embeddings": positions.shape[0],
        "embedding_norm": config.embed_norm,
        "embedding_norm_eps": config.embed_norm_eps,
        "embedding_dropout": config.embed_dropout,
    }


def head_settings(head: HeadConfig | None) -> dict[str, Any]:
    if head is None:
        return {}
    if head.kind == "ctc":
        return {"vocab_size": head.outputs, "pad_token_id": 0}  # the blank
    labels = head.labels or tuple(f"LABEL_{i}" for i in range(head.outputs))
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def their_weights(stored: Stored) -> dict[str, Tensor]:
    """Tensors under the names of the modeling file. A mask embedding has no place: the file is for whole samples."""
    name, _ = modality_of(stored)
    return {
        their_name(key, name, stored.head): tensor
        for key, tensor in stored.tensors.items()
        if key != f"encoders.{name}.context.mask_token"
    }


def their_name(name: str, modality: str, head: HeadConfig | None) -> str:
    if name.startswith(HEAD):
        return name
    return (PREFIX if head else "") + name.removeprefix(f"encoders.{modality}.")


def our_weights(tensors: dict[str, Tensor], modality: str, has_head: bool) -> dict[str, Tensor]:
    """The opposite of `their_weights`."""
    ours = {}
    for name, tensor in tensors.items():
        if not has_head or not name.startswith(HEAD):
            name = name.removeprefix(PREFIX) if has_head else name
            name = f"encoders.{modality}.{name}" if name.startswith(("local.", "context.")) else name
        ours[name] = tensor
    return ours
