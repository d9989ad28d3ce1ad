"""Our configuration as the `model` and `task` sections of fairseq's."""

from __future__ import annotations

from typing import Any

from d2v_ds.convert.fairseq_defaults import (
    AUDIO_V1,
    DECODER,
    ENCODER_V1,
    MODALITY,
    MULTI,
    OWN,
    TEXT_V1,
    TRANSFORMER_V1,
)
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.recipe import Recipe

NAME_V2 = "data2vec_multi"
NAME_V1 = {"audio": "data2vec_audio", "text": "data2vec_text"}


def settings_v2(recipe: Recipe, has_teacher: bool) -> dict[str, Any]:
    """Of data2vec_multi. Raises ValueError for what its configuration cannot say."""
    body, configs = recipe.body, recipe.modalities
    refuse(
        body.norm_first or body.layer_scale is not None or body.qkv_bias != "all",
        "norms first, layer scale or keys without bias: fairseq's 2.0 block has none of these",
    )
    is_blocks = {config.teacher == "blocks" for config in configs.values()}
    cls = {config.loss.cls_weight for config in configs.values() if config.extra_tokens} or {0.0}
    return (
        MULTI
        | target_settings(recipe)
        | {
            "_name": NAME_V2,
            "depth": body.depth,
            "start_drop_path_rate": body.drop_path[0],
            "end_drop_path_rate": body.drop_path[1],
            "num_heads": body.heads,
            "norm_eps": body.norm_eps,
            "encoder_dropout": body.encoder_dropout,
            "post_mlp_drop": body.post_mlp_dropout,
            "attention_dropout": body.attention_dropout,
            "activation_dropout": body.activation_dropout,
            "dropout_input": body.input_dropout,
            "layerdrop": body.layerdrop,
            "embed_dim": body.dim,
            "mlp_ratio": body.mlp_ratio,
            "clone_batch": shared("clones", {config.clones for config in configs.values()}),
            "cls_loss": shared("loss.cls_weight", cls),
            "ema_encoder_only": shared("teacher, 'blocks' or not,", is_blocks),
            "supported_modality": next(iter(configs)).upper() if len(configs) == 1 else None,
            "seed": recipe.seed,
            "skip_ema": not has_teacher,
            "modalities": {name: modality_settings(name, config, recipe) for name, config in configs.items()},
        }
    )


def shared(what: str, values: set[Any]) -> Any:
    """The one value; fairseq has these settings once for all modalities."""
    refuse(len(values) > 1, f"{what} differs between modalities ({', '.join(map(str, values))})")
    return next(iter(values))


def refuse_eps(key: str, eps: float, only: float) -> None:
    refuse(eps != only, f"{key}={eps:g}, and the original's norms have {only:g}, which is no setting there")


def refuse(is_impossible: bool, why: str) -> None:
    if is_impossible:
        raise ValueError(f"fairseq's configuration cannot hold this model: {why}; export to safetensors")


def target_settings(recipe: Recipe) -> dict[str, Any]:
    """Targets, loss and EMA, named alike in v1 and 2.0."""
    configs = recipe.modalities.values()
    refuse(
        len({str(c.target) for c in configs}) > 1,
        "the targets (modalities.*.target) differ between modalities",
    )
    refuse(len({(c.loss.beta, c.loss.scale) for c in configs}) > 1, "the losses differ between modalities")
    config = next(iter(configs))
    target, loss = config.target, config.loss
    refuse(target.final == ("instance", "layer"), "final norms in the order instance, layer")
    return {
        "loss_beta": loss.beta,
        "loss_scale": loss.scale,
        "average_top_k_layers": target.top_k,
        **{f"{norm}_norm_target_layer": target.per_layer == norm for norm in ("batch", "instance", "layer")},
        **{f"{norm}_norm_targets": norm in target.final for norm in ("instance", "layer")},
        "end_of_block_targets": target.source == "block",
        "ema_decay": recipe.ema.start,
        "ema_end_decay": recipe.ema.end,
        "ema_anneal_end_step": recipe.ema.anneal_steps,
        "max_update": recipe.train.steps,
    }


def modality_settings(name: str, config: ModalityConfig, recipe: Recipe) -> dict[str, Any]:
    mask, decoder, alibi = config.mask, config.decoder, config.alibi
    kinds = ("inverse_block", "block", "random")
    refuse(mask.kind not in kinds, f"modalities.{name}.mask.kind={mask.kind} is of v1")
    refuse(config.teacher == "norm", f"modalities.{name}.teacher=norm is of v1")
    settings = MODALITY | OWN[name]
    settings |= {
        "prenet_depth": config.prenet_depth,
        "prenet_layerdrop": config.prenet_layerdrop,
        "prenet_dropout": config.prenet_dropout,
        "start_drop_path_rate": config.prenet_drop_path[0],
        "end_drop_path_rate": config.prenet_drop_path[1],
        "num_extra_tokens": config.extra_tokens,
        "init_extra_token_zero": config.extra_tokens_init in ("zero", "first_zero"),
        "mask_noise_std": mask.noise_std,
        "mask_prob": mask.ratio,
        "mask_prob_adjust": mask.adjust,
        "mask_length": 1 if mask.kind == "random" else mask.length,
        "inverse_mask": mask.kind == "inverse_block",
        "ema_local_encoder": config.teacher == "full",
        "use_alibi_encoder": alibi is not None,
        "num_alibi_heads": recipe.body.heads,
        "model_depth": recipe.body.depth,
        "decoder": DECODER
        | {
            "decoder_dim": decoder.dim,
            "decoder_groups": decoder.groups,
            "decoder_kernel": decoder.kernel,
            "decoder_layers": decoder.layers,
            "input_dropout": decoder.input_dropout,
            "decoder_residual": decoder.residual,
            "projection_layers": decoder.projection_layers,
            "projection_ratio": decoder.projection_ratio,
        },
    }
    if alibi is not None:
        settings |= {
            "alibi_scale": alibi.scale,
            "learned_alibi_scale": alibi.learned,
            "learned_alibi_scale_per_head": alibi.per_head,
            "learned_alibi_scale_per_layer": alibi.per_layer,
        }
    return settings | OWN_SETTINGS[name](config, recipe)


def image_settings(config: Any, recipe: Recipe) -> dict[str, Any]:
    refuse(config.positions != "sincos", "relative positions of images are of v1")
    refuse(config.alibi is not None, "ALiBi of images runs over a grid in fairseq")
    return {
        "input_size": config.size,
        "patch_size": config.patch,
        "in_chans": config.channels,
        "embed_dim": recipe.body.dim,
    }


def audio_settings(config: Any, recipe: Recipe) -> dict[str, Any]:
    return {
        "feature_encoder_spec": conv_spec(config),
        "conv_pos_width": config.position_width,
        "conv_pos_groups": config.position_groups,
        "conv_pos_depth": config.position_depth,
        "conv_pos_pre_ln": config.position_pre_norm,
    }


def conv_spec(config: Any) -> str:
    return str([tuple(layer) for layer in config.conv_layers])


def text_settings(config: Any, recipe: Recipe) -> dict[str, Any]:
    refuse_eps("modalities.text.embed_norm_eps", config.embed_norm_eps, 1e-5)
    return {
        "max_source_positions": config.max_tokens,
        "dropout": config.embed_dropout,
        "layernorm_embedding": config.embed_norm,
    }


OWN_SETTINGS = {"image": image_settings, "audio": audio_settings, "text": text_settings}


def settings_v1(recipe: Recipe) -> dict[str, Any]:
    """Of data2vec_audio or data2vec_text. Raises ValueError for what their configurations cannot say."""
    ((name, config),) = recipe.modalities.items()
    refuse(config.decoder.layers > 0, f"modalities.{name}.decoder.layers={config.decoder.layers} is of 2.0")
    refuse(config.clones > 1, f"modalities.{name}.clones={config.clones} is of 2.0")
    refuse(
        bool(config.prenet_depth or config.extra_tokens or config.alibi or recipe.body.norm_first),
        "prenet blocks, extra tokens, ALiBi or norms first: fairseq's v1 models of speech and text have none",
    )
    scopes = {"audio": ("norm", "context"), "text": ("blocks", "full")}[name]
    refuse(
        config.teacher not in scopes, f"modalities.{name}.teacher={config.teacher} must be one of {scopes}"
    )
    refuse_eps("body.norm_eps", recipe.body.norm_eps, 1e-5)
    settings = target_settings(recipe)
    refuse(settings.pop("end_of_block_targets"), "targets of block outputs are of v1 images")
    return {"_name": NAME_V1[name]} | (audio_v1 if name == "audio" else text_v1)(config, recipe) | settings


def audio_v1(config: Any, recipe: Recipe) -> dict[str, Any]:
    body = recipe.body
    refuse(config.mask.kind != "span", f"modalities.audio.mask.kind={config.mask.kind} must be span")
    refuse(config.position_pre_norm or config.position_depth < 2, "positions of another kind than v1's")
    return AUDIO_V1 | {
        "extractor_mode": "layer_norm",
        "encoder_layers": body.depth,
        "encoder_embed_dim": body.dim,
        "encoder_ffn_embed_dim": int(body.dim * body.mlp_ratio),
        "encoder_attention_heads": body.heads,
        "dropout": body.encoder_dropout,
        "attention_dropout": body.attention_dropout,
        "activation_dropout": body.activation_dropout,
        "encoder_layerdrop": body.layerdrop,
        "conv_feature_layers": conv_spec(config),
        "conv_pos": config.position_width,
        "conv_pos_groups": config.position_groups,
        "pos_conv_depth": config.position_depth,
        "mask_prob": config.mask.ratio,
        "mask_length": config.mask.length,
        "ema_layers_only": config.teacher == "norm",
    }


def text_v1(config: Any, recipe: Recipe) -> dict[str, Any]:
    body = recipe.body
    refuse(
        config.mask.kind != "token_span", f"modalities.text.mask.kind={config.mask.kind} must be token_span"
    )
    encoder = ENCODER_V1 | {
        "embed_dim": body.dim,
        "ffn_embed_dim": int(body.dim * body.mlp_ratio),
        "layers": body.depth,
        "attention_heads": body.heads,
        "learned_pos": True,
        "layerdrop": body.layerdrop,
    }
    transformer = TRANSFORMER_V1 | {
        "activation_fn": "gelu",
        "dropout": body.encoder_dropout,
        "attention_dropout": body.attention_dropout,
        "activation_dropout": body.activation_dropout,
        "max_source_positions": config.max_tokens,
        "layernorm_embedding": config.embed_norm,
        "no_scale_embedding": True,
        "encoder": encoder,
    }
    return TEXT_V1 | {
        "max_positions": config.max_tokens,
        "head_layers": config.decoder.projection_layers,
        "ema_transformer_layers_only": config.teacher == "blocks",
        "transformer": transformer,
    }


def task_settings(recipe: Recipe) -> dict[str, Any]:
    """fairseq's task, as far as the recipe says what it was."""
    if len(recipe.modalities) > 1:
        return {"_name": "multimodal_pretraining", "data": recipe.data}
    ((name, config),) = recipe.modalities.items()
    tasks = {
        "image": {"_name": "mae_image_pretraining"},
        "audio": {"_name": "audio_pretraining", "normalize": True, "sample_rate": 16_000},
        "text": {"_name": "masked_lm"},
    }
    task = tasks[name] | {"data": recipe.data}
    if name == "text":
        task |= {"tokens_per_sample": config.max_tokens}
        task |= {"mask_prob": config.mask.ratio, "mask_multiple_length": config.mask.length}
    return task
