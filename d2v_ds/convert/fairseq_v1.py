"""fairseq's names and settings of data2vec v1 for speech and text (`data2vec_audio`, `data2vec_text`).

v1 in our classes: the student sees all tokens, masked ones as a learned vector, and a decoder without
convolutions predicts. Images of v1 were made elsewhere: d2v_ds.convert.beit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from d2v_ds.convert.fairseq import drawn, parse_conv_layers, refuse, target_config, tell_unused
from d2v_ds.convert.fairseq_defaults import merged
from d2v_ds.convert.names import Names, Place, fuse
from d2v_ds.modalities import config_class
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask

LAYER = [
    ("layers.{i}.self_attn.{qkv}_proj.{w}", "blocks.{i}.attn.qkv.{w}"),
    ("layers.{i}.self_attn.out_proj.{w}", "blocks.{i}.attn.proj.{w}"),
    ("layers.{i}.self_attn_layer_norm.{w}", "blocks.{i}.norm1.{w}"),
    ("layers.{i}.fc1.{w}", "blocks.{i}.mlp.fc1.{w}"),
    ("layers.{i}.fc2.{w}", "blocks.{i}.mlp.fc2.{w}"),
    ("layers.{i}.final_layer_norm.{w}", "blocks.{i}.norm2.{w}"),
]
PAIRS = {
    "audio": [
        *((f"encoder.{theirs}", ours) for theirs, ours in LAYER),
        ("mask_emb", "encoders.audio.context.mask_token"),
        ("feature_extractor.conv_layers.{i}.0.weight", "encoders.audio.local.convs.{i}.weight"),
        ("feature_extractor.conv_layers.{i}.2.1.{w}", "encoders.audio.local.norms.{i}.{w}"),
        ("layer_norm.{w}", "encoders.audio.local.norm.{w}"),
        ("post_extract_proj.{w}", "encoders.audio.local.proj.{w}"),
        ("encoder.pos_conv.{i}.0.{w}", "encoders.audio.context.conv_positions.convs.{i}.conv.{w}"),
        ("encoder.layer_norm.{w}", "encoders.audio.context.norm.{w}"),
        ("final_proj.{w}", "decoders.audio.proj.{w}"),
    ],
    "text": [
        *((f"encoder.sentence_encoder.{theirs}", ours) for theirs, ours in LAYER),
        ("encoder.sentence_encoder.embed_tokens.weight", "encoders.text.local.tokens.weight"),
        ("encoder.sentence_encoder.embed_positions.weight", "encoders.text.local.positions.weight"),
        ("encoder.sentence_encoder.layernorm_embedding.{w}", "encoders.text.local.norm.{w}"),
        ("encoder.regression_head.{i}.{w}", "decoders.text.proj.{i}.{w}"),
        (
            "encoder.regression_head.0.{w}",
            "decoders.text.proj.{w}",
        ),  # a head of one layer; see one_layer_head
    ],
}
NAMES = Names(pair for pairs in PAIRS.values() for pair in pairs)
VERSION = "encoder.sentence_encoder.version"
# the teacher is named relative to what it copies
TEACHERS = {"_ema.": "encoder.", "encoder._ema.": "encoder.sentence_encoder."}
# what the teacher owns by its scope; the file also holds copies of the student's live parts
OWNED = {
    "blocks": ("blocks.",),
    "norm": ("blocks.", "encoders.audio.context.norm."),
    "context": ("blocks.", "encoders.audio.context."),
    "full": ("blocks.", "encoders."),
}


def our_name(name: str) -> Place | None:
    """Our place of a fairseq tensor, teacher included; None for a tensor that carries nothing (`version`).

    Raises ValueError for a name that belongs to no part of a data2vec v1 model of speech or text.
    """
    for prefix, owner in TEACHERS.items():
        if name.startswith(prefix):
            place = our_name(owner + name.removeprefix(prefix))
            return place and Place(f"teacher.{place.name}", place.third)
    if name == VERSION:
        return None
    place = NAMES.ours(name)
    if place is None:
        raise ValueError(f"'{name}' is no tensor of a data2vec v1 model of speech or text")
    return place


def their_names(name: str, modality: str) -> list[str]:
    """fairseq's name of a tensor of ours, or the three of a projection."""
    theirs = Names(PAIRS[modality]).theirs(name.removeprefix("teacher."))
    if not name.startswith("teacher."):
        return theirs
    prefix, encoder = list(TEACHERS.items())[modality == "text"]
    return [prefix + t.removeprefix(encoder) for t in theirs]


def our_weights(state: dict[str, Tensor], scope: str) -> dict[str, Tensor]:
    """A fairseq state dict (teacher flat under `_ema.` or `encoder._ema.`) under our names.

    `scope` is the modality's `teacher`: copies of what the teacher does not own are left out.
    """
    parts = {
        place: tensor
        for name, tensor in state.items()
        if (place := our_name(name)) is not None and is_owned(place.name, scope)
    }
    modality = "text" if VERSION.removesuffix(".version") in " ".join(state) else "audio"
    return one_layer_head(fuse(parts, lambda name: their_names(name, modality)))


def is_owned(name: str, scope: str) -> bool:
    return not name.startswith("teacher.") or name.removeprefix("teacher.").startswith(OWNED[scope])


def one_layer_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A head of one layer is a sequence of one in fairseq and the layer itself in ours."""
    if "decoders.text.proj.2.weight" in weights:
        return weights
    return {name.replace("decoders.text.proj.0.", "decoders.text.proj."): t for name, t in weights.items()}


def our_config(
    cfg: dict[str, Any], task: dict[str, Any] | None = None
) -> tuple[Body, dict[str, ModalityConfig]]:
    """Our configuration of the `model` section of a fairseq config; `task` holds the masks of text.

    Raises ValueError for settings that no released model uses and that we do not have.
    """
    return text_config(cfg, task or {}) if "transformer" in cfg else audio_config(cfg)


def audio_config(cfg: dict[str, Any]) -> tuple[Body, dict[str, ModalityConfig]]:
    refuse(
        cfg,
        layer_norm_first=False,
        extractor_mode="layer_norm",
        conv_bias=False,
        activation_fn="gelu",
        layer_type="transformer",
        pos_enc_type="abs",
        ema_transformer_only=True,
        group_norm_target_layer=False,
    )
    tell_unused(cfg, feature_grad_mult=1.0)
    if cfg["pos_conv_depth"] < 2:
        raise ValueError(
            f"pos_conv_depth={cfg['pos_conv_depth']} is one weight-normed convolution as in wav2vec 2.0; "
            "a data2vec model has several (5 in the released ones)"
        )
    dim = cfg["encoder_embed_dim"]
    body = Body(
        dim=dim,
        depth=cfg["encoder_layers"],
        heads=cfg["encoder_attention_heads"],
        mlp_ratio=cfg["encoder_ffn_embed_dim"] / dim,
        norm_eps=1e-5,
        encoder_dropout=cfg["dropout"],
        attention_dropout=cfg["attention_dropout"],
        activation_dropout=cfg["activation_dropout"],
        post_mlp_dropout=cfg["dropout"],
        layerdrop=cfg["encoder_layerdrop"],
    )
    config = config_class("audio")(
        **common(cfg, Mask(kind="span", **drawn(cfg["mask_prob"], cfg["mask_length"])), layers=1, body=body),
        teacher="norm" if cfg["ema_layers_only"] else "context",
        prenet_dropout=cfg["dropout"],
        conv_layers=parse_conv_layers(cfg["conv_feature_layers"]),
        position_width=cfg["conv_pos"],
        position_depth=cfg["pos_conv_depth"],
        position_groups=cfg["conv_pos_groups"],
    )
    return body, {"audio": config}


def text_config(cfg: dict[str, Any], task: dict[str, Any]) -> tuple[Body, dict[str, ModalityConfig]]:
    transformer = cfg["transformer"]
    encoder = transformer["encoder"]
    refuse(
        transformer,
        activation_fn="gelu",
        no_scale_embedding=True,
        no_token_positional_embeddings=False,
        use_factorized_embedding=False,
        adaptive_input=False,
    )
    refuse(encoder, normalize_before=False, learned_pos=True)
    dim = encoder["embed_dim"]
    body = Body(
        dim=dim,
        depth=encoder["layers"],
        heads=encoder["attention_heads"],
        mlp_ratio=encoder["ffn_embed_dim"] / dim,
        norm_eps=1e-5,
        encoder_dropout=transformer["dropout"],
        attention_dropout=transformer["attention_dropout"],
        activation_dropout=transformer["activation_dropout"],
        post_mlp_dropout=transformer["dropout"],
        layerdrop=encoder["layerdrop"],
    )
    masks = merged({"mask_prob": 0.15, "mask_multiple_length": 1}, task, "task")
    mask = Mask(kind="token_span", **drawn(masks["mask_prob"], masks["mask_multiple_length"]))
    vocabulary = {"vocabulary": cfg["vocabulary"]} if "vocabulary" in cfg else {}
    config = config_class("text")(
        **common(cfg, mask, layers=cfg["head_layers"], body=body),
        teacher="blocks" if cfg["ema_transformer_layers_only"] else "full",
        max_tokens=transformer["max_source_positions"],
        embed_dropout=transformer["dropout"],
        embed_norm=transformer["layernorm_embedding"],
        **vocabulary,
    )
    return body, {"text": config}


def common(cfg: dict[str, Any], mask: Mask, layers: int, body: Body) -> dict[str, Any]:
    scale = cfg["loss_scale"] if (cfg["loss_scale"] or 0) > 0 else None  # -1 stands for 1 / sqrt(D) as well
    return {
        "view": "masked",
        "clones": 1,
        "mask": mask,
        "target": target_config(cfg, body.depth),
        "loss": Loss(beta=cfg["loss_beta"], scale=scale),
        "decoder": DecoderConfig(dim=body.dim, layers=0, groups=1, projection_layers=layers),
    }
