"""The settings of fairseq's data2vec models with the defaults of its configuration classes (not of its recipes).

A checkpoint normally holds every setting; what an old one lacks has its class's default. Names and values: fairseq
at commit 3d262bb2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from d2v_ds.convert.standin import MAX_REFERENCE, shown

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
MAX_NUMBER = 1 << 53
DECODER = {
    "decoder_dim": 384,
    "decoder_groups": 16,
    "decoder_kernel": 5,
    "decoder_layers": 5,
    "input_dropout": 0.1,
    "add_positions_masked": False,
    "add_positions_all": False,
    "decoder_residual": True,
    "projection_layers": 1,
    "projection_ratio": 2.0,
}
MODALITY = {
    "prenet_depth": 4,
    "prenet_layerdrop": 0.0,
    "prenet_dropout": 0.0,
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
    "num_extra_tokens": 0,
    "init_extra_token_zero": True,
    "mask_noise_std": 0.01,
    "mask_prob_min": None,
    "mask_prob": 0.7,
    "inverse_mask": False,
    "mask_prob_adjust": 0.0,
    "keep_masked_pct": 0.0,
    "mask_length": 5,
    "add_masks": False,
    "remove_masks": False,
    "mask_dropout": 0.0,
    "encoder_zero_mask": True,
    "mask_channel_prob": 0.0,
    "mask_channel_length": 64,
    "ema_local_encoder": False,
    "local_grad_mult": 1.0,
    "use_alibi_encoder": False,
    "alibi_scale": 1.0,
    "learned_alibi": False,
    "alibi_max_pos": None,
    "learned_alibi_scale": False,
    "learned_alibi_scale_per_head": False,
    "learned_alibi_scale_per_layer": False,
}
OWN = {
    "image": {
        "type": "IMAGE",
        "input_size": 224,
        "in_chans": 3,
        "patch_size": 16,
        "embed_dim": 768,
        "alibi_dims": 2,
        "alibi_distance": "manhattan",
        "fixed_positions": True,
        "transformer_decoder": False,
        "enc_dec_transformer": False,
    },
    "audio": {
        "type": "AUDIO",
        "extractor_mode": "layer_norm",
        "feature_encoder_spec": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "conv_pos_width": 95,
        "conv_pos_groups": 16,
        "conv_pos_depth": 5,
        "conv_pos_pre_ln": False,
    },
    "text": {
        "type": "TEXT",
        "max_source_positions": 512,
        "learned_pos": True,
        "dropout": 0.1,
        "no_scale_embedding": True,
        "layernorm_embedding": True,
        "no_token_positional_embeddings": False,
    },
}
TARGET = {
    "loss_beta": 0.0,
    "loss_scale": None,
    "average_top_k_layers": 8,
    "layer_norm_target_layer": False,
    "batch_norm_target_layer": False,
    "instance_norm_target_layer": False,
    "instance_norm_targets": False,
    "layer_norm_targets": False,
    "ema_decay": 0.999,
    "ema_end_decay": 0.9999,
}
MULTI = TARGET | {
    "depth": 8,
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
    "num_heads": 12,
    "norm_eps": 1e-6,
    "norm_affine": True,
    "encoder_dropout": 0.1,
    "post_mlp_drop": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "layerdrop": 0.0,
    "embed_dim": 768,
    "mlp_ratio": 4.0,
    "layer_norm_first": False,
    "end_of_block_targets": False,
    "clone_batch": 1,
    "ema_same_dtype": True,
    "log_norms": True,
    "ema_encoder_only": True,
    "shared_decoder": None,
    "min_target_var": 0.1,
    "min_pred_var": 0.01,
    "supported_modality": None,
    "mae_init": False,
    "skip_ema": False,
    "cls_loss": 0.0,
    "recon_loss": 0.0,
    "d2v_loss": 1.0,
    "decoder_group": False,
}
AUDIO_V1 = TARGET | {
    "extractor_mode": "default",
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "dropout_input": 0.0,
    "dropout_features": 0.0,
    "final_dim": 0,
    "layer_norm_first": False,
    "conv_feature_layers": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
    "conv_bias": False,
    "feature_grad_mult": 1.0,
    "mask_length": 10,
    "mask_prob": 0.65,
    "mask_selection": "static",
    "mask_other": 0.0,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "require_same_masks": True,
    "mask_dropout": 0.0,
    "mask_channel_length": 10,
    "mask_channel_prob": 0.0,
    "mask_channel_before": False,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "pos_conv_depth": 1,
    "max_positions": 100000,
    "checkpoint_activations": False,
    "required_seq_len_multiple": 2,
    "crop_seq_to_multiple": 1,
    "pos_enc_type": "abs",
    "group_norm_target_layer": False,
    "ema_transformer_only": True,
    "ema_layers_only": True,
    "min_target_var": 0.1,
    "min_pred_var": 0.01,
}
TEXT_V1 = TARGET | {
    "head_layers": 1,
    "load_checkpoint_heads": False,
    "ema_transformer_layers_only": True,
}
TRANSFORMER_V1 = {
    "activation_fn": "relu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_source_positions": 1024,
    "layernorm_embedding": False,
    "no_scale_embedding": False,
    "no_token_positional_embeddings": False,
}
ENCODER_V1 = {
    "embed_dim": 512,
    "ffn_embed_dim": 2048,
    "layers": 6,
    "attention_heads": 8,
    "normalize_before": False,
    "learned_pos": False,
    "layerdrop": 0.0,
}


# sizes and counts that cannot be 0
POSITIVE = {
    "decoder_dim", "decoder_groups", "decoder_kernel", "projection_layers", "average_top_k_layers", "num_heads",
    "embed_dim", "input_size", "in_chans", "patch_size", "conv_pos_groups", "conv_pos_depth", "conv_pos_width",
    "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "conv_pos", "pos_conv_depth",
    "head_layers", "ffn_embed_dim", "attention_heads", "clone_batch", "mlp_ratio", "depth", "encoder_layers", "layers",
}  # fmt: skip


def complete(name: str, cfg: dict[str, Any], modalities: list[str]) -> dict[str, Any]:
    """The `model` section with every setting that we read; of data2vec_multi the given modalities only.

    Raises ValueError for a value of another kind than its default.
    """
    if name == "data2vec_audio":
        return merged(AUDIO_V1, cfg, "model")
    if name == "data2vec_text":
        flat = (
            {} if "transformer" in cfg else cfg
        )  # settings of a command line, before configurations had parts
        transformer = merged(TRANSFORMER_V1, flat | section(cfg, "transformer", "model"), "model.transformer")
        given = {k: flat[f"encoder_{k}"] for k in ENCODER_V1 if f"encoder_{k}" in flat}
        given |= section(transformer, "encoder", "model.transformer")
        encoder = merged(ENCODER_V1, given, "model.transformer.encoder")
        return merged(TEXT_V1, cfg, "model") | {"transformer": transformer | {"encoder": encoder}}
    parts = {}
    for modality in modalities:
        where = f"model.modalities.{modality}"
        given = section(section(cfg, "modalities", "model"), modality, "model.modalities")
        part = merged(MODALITY | OWN[modality], given, where)
        decoder = merged(DECODER, section(part, "decoder", where), f"{where}.decoder")
        parts[modality] = part | {"decoder": decoder}
    return merged(MULTI, cfg, "model") | {"modalities": parts}


def section(cfg: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = cfg.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"fairseq setting {where}.{key}={shown(value)} must be a group of settings")
    return value or {}


def merged(defaults: dict[str, Any], given: dict[str, Any], where: str) -> dict[str, Any]:
    """The defaults with what is given; numbers as the defaults have them."""
    checked = {
        key: of_kind(value, defaults[key], f"{where}.{key}") if key in defaults else value
        for key, value in given.items()
    }
    return defaults | checked


def of_kind(value: Any, default: Any, where: str) -> Any:
    """The value, if it is of its default's kind; None of a default means a number or nothing, or a group."""
    key = where.rsplit(".", 1)[1]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        kind, fits = "true or false", isinstance(value, bool) or (is_number and value in (0, 1))
    elif isinstance(default, str):
        kind, fits = (
            "a text",
            isinstance(value, str) or key == "type",
        )  # an enum's value is a number in some files
    elif default is None:
        kind, fits = (
            "a number or nothing",
            value is None or is_number or not key.endswith(("scale", "prob_min")),
        )
    else:
        least = 1 if key in POSITIVE and isinstance(default, int) else 0
        kind = f"a {'whole ' * isinstance(default, int)}number of at least {least}"
        fits = is_number and least <= value < MAX_NUMBER
        fits = fits and not (key in POSITIVE and value == 0)
        fits = fits and (isinstance(default, float) or value == int(value))
    if not fits:
        raise ValueError(f"fairseq setting {where}={shown(value)} must be {kind}")
    return type(default)(value) if isinstance(default, (bool, int, float)) else value


def resolve(value: Any, root: dict[str, Any]) -> Any:
    """The settings with references such as ${optimization.max_update} replaced by what they name in `root`;
    None for one that leads nowhere."""
    try:
        return Resolver(root).of(value)
    except RecursionError as error:
        raise ValueError("its settings refer to each other more often than any configuration") from error


class Resolver:
    """One call of `resolve`: what was done already is not done twice, so a file that refers to the same parts again
    and again takes no longer."""

    def __init__(self, root: dict[str, Any]):
        self.root = root
        self.done: dict[Any, Any] = {}
        self.open: set[Any] = set()

    def of(self, value: Any) -> Any:
        if isinstance(value, str):
            match = REFERENCE.fullmatch(value) if len(value) <= MAX_REFERENCE else None
            return self.once(match[1], self.find, match[1]) if match else value
        if isinstance(value, (dict, list, tuple)):
            return self.once(id(value), self.inside, value)
        return value if value is None or isinstance(value, (bool, int, float)) else shown(value)

    def once(self, key: Any, make: Callable[[Any], Any], value: Any) -> Any:
        """None for what leads back to itself."""
        if key in self.open:
            return None
        if key not in self.done:
            self.open.add(key)
            self.done[key] = make(value)
            self.open.remove(key)
        return self.done[key]

    def inside(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        return type(value)([self.of(item) for item in value])

    def find(self, path: str) -> Any:
        found = self.root
        for key in path.split("."):
            if not isinstance(found, dict) or key not in found:
                return None
            found = found[key]
        return self.of(found)
