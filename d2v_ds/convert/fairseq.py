"""fairseq's names and settings of data2vec 2.0 (`data2vec_multi`), translated to ours."""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import Tensor

from d2v_ds.convert.names import Names
from d2v_ds.convert.standin import shown
from d2v_ds.modalities import config_class
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.encoder import Alibi, ModalityConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target

log = logging.getLogger(__name__)

MAX_SPEC = 1000
# one set of pairs a modality; MOD stands for its name in upper case, mod for ours
SHARED = [
    ("modality_encoders.MOD.extra_tokens", "encoders.mod.context.extra_tokens"),
    ("modality_encoders.MOD.alibi_scale", "encoders.mod.context.alibi_scale"),
    ("modality_encoders.MOD.decoder.blocks.{i}.0.{w}", "decoders.mod.blocks.{i}.conv.{w}"),
    ("modality_encoders.MOD.decoder.proj.{rest}", "decoders.mod.proj.{rest}"),
]
POSITIONS = "encoders.audio.context.conv_positions"
OWN_PAIRS = {
    "image": [("modality_encoders.MOD.local_encoder.proj.{w}", "encoders.mod.local.proj.{w}")],
    "audio": [
        (
            "modality_encoders.MOD.local_encoder.conv_layers.{i}.0.weight",
            "encoders.mod.local.convs.{i}.weight",
        ),
        ("modality_encoders.MOD.local_encoder.conv_layers.{i}.2.1.{w}", "encoders.mod.local.norms.{i}.{w}"),
        ("modality_encoders.MOD.project_features.1.{w}", "encoders.mod.local.norm.{w}"),
        ("modality_encoders.MOD.project_features.2.{w}", "encoders.mod.local.proj.{w}"),
        # the first and last layer of their stack are transposes, so its convolutions count from 1
        (
            "modality_encoders.MOD.relative_positional_encoder.{n}.0.{w}",
            f"{POSITIONS}.convs.{{n}}.conv.{{w}}",
        ),
        ("modality_encoders.MOD.relative_positional_encoder.0.{w}", f"{POSITIONS}.pre_norm.{{w}}"),
        (
            "modality_encoders.MOD.relative_positional_encoder.1.{n}.0.{w}",
            f"{POSITIONS}.convs.{{n}}.conv.{{w}}",
        ),
    ],
    "text": [
        ("modality_encoders.MOD.local_encoder.embed_tokens.weight", "encoders.mod.local.tokens.weight"),
        ("modality_encoders.MOD.local_encoder.embed_positions.weight", "encoders.mod.local.positions.weight"),
        ("modality_encoders.MOD.local_encoder.layernorm_embedding.{w}", "encoders.mod.local.norm.{w}"),
    ],
}
CONTEXT = ("modality_encoders.MOD.context_encoder.{rest}", "encoders.mod.context.{rest}")
NAMES = Names(
    [
        ("blocks.{rest}", "blocks.{rest}"),
        *(
            (theirs.replace("MOD", mod.upper()), ours.replace(".mod.", f".{mod}."))
            for mod, own in OWN_PAIRS.items()
            for theirs, ours in [*SHARED, *own, CONTEXT]  # CONTEXT last: its {rest} would take the others'
        ),
    ]
)
RECOMPUTED = re.compile(r"(_ema\.)?modality_encoders\.\w+\.(fixed_positional_encoder\.positions)")


def our_name(name: str) -> str | None:
    """Our name of a fairseq tensor, teacher (`_ema.`) included; None for what is recomputed.

    Raises ValueError for a name that belongs to no part of a data2vec 2.0 model.
    """
    if RECOMPUTED.fullmatch(name):
        return None
    if name.startswith("_ema."):
        rest = name.removeprefix("_ema.")
        return f"teacher.{our_name(f'blocks.{rest}' if rest[:1].isdigit() else rest)}"
    place = NAMES.ours(name)
    if place is None:
        raise ValueError(
            f"'{name}' is no tensor of a data2vec 2.0 model; is the file of another model or version?"
        )
    return place.name


def their_names(name: str, is_encoder_only: bool = False) -> list[str]:
    """fairseq's name of a tensor of ours; of a teacher that `is_encoder_only`, relative to its blocks."""
    theirs = NAMES.theirs(name.removeprefix("teacher."))
    if not name.startswith("teacher."):
        return theirs
    return [f"_ema.{t.removeprefix('blocks.') if is_encoder_only else t}" for t in theirs]


def our_tensor(name: str, tensor: Tensor) -> Tensor:
    """The tensor in our shape: ALiBi scales are (layers, heads) instead of (layers, 1, heads, 1, 1)."""
    is_scale = name.endswith("alibi_scale") and tensor.ndim > 2 and tensor.numel() > 0
    return tensor.reshape(-1, tensor.shape[-3]) if is_scale else tensor


def our_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fairseq state dict (teacher flat under `_ema.`) under our names."""
    return {
        our: our_tensor(name, tensor) for name, tensor in state.items() if (our := our_name(name)) is not None
    }


def our_config(cfg: dict[str, Any]) -> tuple[Body, dict[str, ModalityConfig]]:
    """Our configuration of the `model` section of a fairseq data2vec_multi config.

    Raises ValueError for settings that no released model uses and that we do not have.
    """
    refuse(cfg, norm_affine=True, shared_decoder=None, recon_loss=0, d2v_loss=1)
    if cfg["layer_norm_first"]:
        raise ValueError(
            "fairseq setting layer_norm_first=True is not supported: its pre-norm block loses the residual, so "
            "its weights are of no use elsewhere"
        )
    body = Body(
        dim=cfg["embed_dim"],
        depth=cfg["depth"],
        heads=cfg["num_heads"],
        mlp_ratio=cfg["mlp_ratio"],
        norm_eps=cfg["norm_eps"],
        encoder_dropout=cfg["encoder_dropout"],
        attention_dropout=cfg["attention_dropout"],
        activation_dropout=cfg["activation_dropout"],
        post_mlp_dropout=cfg["post_mlp_drop"],
        input_dropout=cfg["dropout_input"],
        layerdrop=cfg["layerdrop"],
        drop_path=(cfg["start_drop_path_rate"], cfg["end_drop_path_rate"]),
    )
    configs = {
        name: modality_config(name, cfg, modality) for name, modality in cfg["modalities"].items() if modality
    }
    return body, configs


def refuse(cfg: dict[str, Any], **only: Any) -> None:
    """ValueError for a setting, if it is there, whose value is not the only one that we have."""
    for key, value in only.items():
        if key in cfg and cfg[key] != value:
            raise ValueError(
                f"fairseq setting {key}={shown(cfg[key])} is not supported: no released data2vec model has another "
                f"value than {value!r}"
            )


def tell_unused(cfg: dict[str, Any], **only: Any) -> None:
    """Warns of a setting that changes what further pre-training does, and no features, and that we do not have."""
    for key, value in only.items():
        if key in cfg and cfg[key] != value:
            log.warning(
                "fairseq setting %s=%s is not used: further pre-training goes on with %r; features are the same",
                key,
                shown(cfg[key]),
                value,
            )


def modality_config(name: str, cfg: dict[str, Any], modality: dict[str, Any]) -> ModalityConfig:
    decoder = modality["decoder"]
    refuse(decoder, add_positions_masked=False, add_positions_all=False)
    refuse(modality, **ONLY[name])
    tell_unused(modality, local_grad_mult=1.0, encoder_zero_mask=True)
    if modality.get("embed_dim", cfg["embed_dim"]) != cfg["embed_dim"]:
        raise ValueError(
            f"fairseq setting modalities.image.embed_dim={modality['embed_dim']} differs from embed_dim="
            f"{cfg['embed_dim']}: no released model has a projection between them"
        )
    common = {
        "clones": cfg["clone_batch"],
        "mask": mask_config(modality),
        "target": target_config(cfg, cfg["depth"]),
        "loss": Loss(
            beta=cfg["loss_beta"],
            scale=cfg["loss_scale"],
            cls_weight=cfg["cls_loss"] if modality["num_extra_tokens"] else 0.0,
        ),
        "decoder": DecoderConfig(
            dim=decoder["decoder_dim"],
            kernel=decoder["decoder_kernel"],
            layers=decoder["decoder_layers"],
            groups=decoder["decoder_groups"],
            residual=decoder["decoder_residual"],
            input_dropout=decoder["input_dropout"],
            projection_layers=decoder["projection_layers"],
            projection_ratio=decoder["projection_ratio"],
        ),
        "teacher": (
            "blocks" if cfg["ema_encoder_only"] else "full" if modality["ema_local_encoder"] else "context"
        ),
        "prenet_depth": modality["prenet_depth"],
        "prenet_dropout": modality["prenet_dropout"],
        "prenet_layerdrop": modality["prenet_layerdrop"],
        "prenet_drop_path": (modality["start_drop_path_rate"], modality["end_drop_path_rate"]),
        "extra_tokens": modality["num_extra_tokens"],
        "extra_tokens_init": extra_init(modality),
        "alibi": alibi_config(modality),
    }
    return config_class(name)(**common, **OWN[name](modality))


def extra_init(modality: dict[str, Any]) -> str:
    if not modality["init_extra_token_zero"]:
        return "normal"
    return "first_zero" if modality["num_extra_tokens"] > 1 else "zero"


def mask_config(modality: dict[str, Any]) -> Mask:
    kind = (
        "random" if modality["mask_length"] <= 1 else "inverse_block" if modality["inverse_mask"] else "block"
    )
    return Mask(
        kind=kind,
        adjust=modality["mask_prob_adjust"],
        noise_std=modality["mask_noise_std"],
        **drawn(modality["mask_prob"], modality["mask_length"]),
    )


def drawn(ratio: float, length: int) -> dict[str, Any]:
    """A mask's share and length; one that hides nothing (fine-tuning may ask for it) keeps our default share."""
    return {"length": length} | ({"ratio": ratio} if 0 < ratio < 1 else {})


def target_config(cfg: dict[str, Any], depth: int) -> Target:
    per_layer = [norm for norm in ("batch", "instance", "layer") if cfg.get(f"{norm}_norm_target_layer")]
    if len(per_layer) > 1:
        raise ValueError(
            f"several norms of one target layer, {per_layer}, are not supported: no released model has them"
        )
    return Target(
        top_k=min(cfg["average_top_k_layers"], depth),
        per_layer=per_layer[0] if per_layer else "none",
        final=tuple(norm for norm in ("layer", "instance") if cfg.get(f"{norm}_norm_targets")),
        source="block" if cfg.get("end_of_block_targets") else "ffn",
    )


def alibi_config(modality: dict[str, Any]) -> Alibi | None:
    if not modality["use_alibi_encoder"]:
        return None
    if "input_size" in modality or modality["learned_alibi"]:
        raise ValueError(
            "ALiBi over a grid (images) or a learned bias matrix is not supported: no released model has it"
        )
    return Alibi(
        scale=modality["alibi_scale"],
        learned=modality["learned_alibi_scale"],
        per_head=modality["learned_alibi_scale_per_head"],
        per_layer=modality["learned_alibi_scale_per_layer"],
    )


def image_keys(modality: dict[str, Any]) -> dict[str, Any]:
    return {"size": modality["input_size"], "patch": modality["patch_size"], "channels": modality["in_chans"]}


def audio_keys(modality: dict[str, Any]) -> dict[str, Any]:
    return {
        "conv_layers": parse_conv_layers(modality["feature_encoder_spec"]),
        "position_width": modality["conv_pos_width"],
        "position_depth": modality["conv_pos_depth"],
        "position_groups": modality["conv_pos_groups"],
        "position_pre_norm": modality["conv_pos_pre_ln"],
    }


def parse_conv_layers(spec: str) -> tuple[tuple[int, int, int], ...]:
    """Reads '[(512, 10, 5)] + [(512, 3, 2)] * 4 + ...' without evaluating it."""
    layers: list[tuple[int, int, int]] = []
    if len(spec) > MAX_SPEC:
        raise ValueError(f"feature_encoder_spec of {len(spec)} characters, must have at most {MAX_SPEC}")
    if re.search(r"\*\s*\d{4}", spec):
        raise ValueError(f"feature_encoder_spec '{spec}' has more layers than any model")
    for group, repeats in re.findall(r"\[(.*?)\]\s*(?:\*\s*(\d+))?", spec):
        numbers = [int(n) for n in re.findall(r"\d+", group)]
        if not numbers or len(numbers) % 3 or min(numbers) < 1:
            raise ValueError(f"feature_encoder_spec '{spec}' is no list of (channels, kernel, stride)")
        layers += [tuple(numbers[i : i + 3]) for i in range(0, len(numbers), 3)] * int(repeats or 1)
    if not layers:
        raise ValueError(f"feature_encoder_spec '{spec}' is no list of (channels, kernel, stride)")
    return tuple(layers)


def text_keys(modality: dict[str, Any]) -> dict[str, Any]:
    keys = {
        "max_tokens": modality["max_source_positions"],
        "embed_dropout": modality["dropout"],
        "embed_norm": modality["layernorm_embedding"],
    }
    return keys | ({"vocabulary": modality["vocabulary"]} if "vocabulary" in modality else {})


ONLY = {
    "image": {"fixed_positions": True, "transformer_decoder": False},
    "audio": {"extractor_mode": "layer_norm"},
    "text": {"learned_pos": True, "no_scale_embedding": True, "no_token_positional_embeddings": False},
}
OWN = {"image": image_keys, "audio": audio_keys, "text": text_keys}
