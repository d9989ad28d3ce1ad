"""Checkpoints shaped as fairseq and BEiT shape them, made of recorded cases and of random numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {"audio_cb4": "data2vec_multi", "image_cb4": "data2vec_multi", "text_cb4": "data2vec_multi"}
NAMES |= {"v1_audio": "data2vec_audio"}
CASES = tuple(NAMES)


def recorded(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The resolved configuration and the weights under fairseq's names, teacher flat."""
    info = json.loads((GOLDEN / f"{case}.json").read_text())
    return info["resolved_config"], load_file(GOLDEN / f"{case}.weights.safetensors")


def nested(weights: dict[str, Tensor]) -> dict[str, Any]:
    """A state dict as fairseq holds it: the teacher in a dict under `_ema`."""
    state: dict[str, Any] = {}
    for name, tensor in weights.items():
        prefix, is_teacher, rest = name.partition("_ema.")
        if is_teacher:
            state.setdefault(f"{prefix}_ema", {})[rest] = tensor
        else:
            state[name] = tensor
    return state


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


def pretrained(case: str) -> dict[str, Any]:
    """A whole checkpoint of pre-training with what fairseq puts beside the model."""
    cfg, weights = recorded(case)
    task = {"audio": "audio_pretraining", "image": "mae_image_pretraining", "text": "masked_lm"}
    modality = case.removeprefix("v1_").split("_")[0]
    schedule = {"_name": "cosine", "warmup_updates": 8000, "min_lr": 0.0}
    if case == "v1_audio":  # as released
        schedule = {"_name": "tri_stage", "phase_ratio": [0.03, 0.9, 0.07], "init_lr_scale": 0.01}
    return {
        "args": None,
        "cfg": {
            "_name": None,
            "common": {"seed": 1, "fp16": True},
            "task": {"_name": task[modality], "normalize": True, "data": "/somewhere/else"},
            "optimization": {"max_update": 400_000, "lr": [0.00075], "clip_norm": 4.0},
            "optimizer": {
                "_name": "adam",
                "adam_betas": "(0.9, 0.98)",
                "adam_eps": 1e-06,
                "weight_decay": 0.01,
            },
            "lr_scheduler": schedule,
            "model": cfg | {"_name": NAMES[case]},
        },
        "model": nested(weights),
        "criterion": None,
        "optimizer_history": [{"num_updates": 7}, {"optimizer_name": "FairseqAdam", "num_updates": 1234}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 3}, "metrics": {}, "best": 1.0},
        "last_optimizer_state": {"state": {0: {"step": 3, "exp_avg": torch.zeros(5)}}, "param_groups": []},
    }


TUNED = {  # case: model, prefix, where the configuration of pre-training lies, head
    "image_cb4": (
        "mae_image_classification",
        "model.",
        "pretrained_model_args",
        {"fc_norm.weight": (32,), "fc_norm.bias": (32,), "head.weight": (7, 32), "head.bias": (7,)},
    ),
    "audio_cb4": (
        "wav2vec_ctc",
        "w2v_encoder.w2v_model.",
        "w2v_args",
        {"w2v_encoder.proj.weight": (9, 32), "w2v_encoder.proj.bias": (9,)},
    ),
    "v1_audio": (
        "wav2vec_ctc",
        "w2v_encoder.w2v_model.",
        "w2v_args",
        {"w2v_encoder.proj.weight": (9, 32), "w2v_encoder.proj.bias": (9,)},
    ),
    "text_cb4": (
        "data2vec_text_classification",
        "model.",
        "pretrained_model_args",
        {
            "classification_heads.sentence_classification_head.dense.weight": (32, 32),
            "classification_heads.sentence_classification_head.dense.bias": (32,),
            "classification_heads.sentence_classification_head.out_proj.weight": (3, 32),
            "classification_heads.sentence_classification_head.out_proj.bias": (3,),
        },
    ),
}


def tuned(case: str) -> dict[str, Any]:
    """A fine-tuned checkpoint: no teacher, no decoder, a prefix, a head."""
    name, prefix, inner, head = TUNED[case]
    before, _ = pretrained(case)["cfg"], None
    weights = {
        prefix + key: tensor
        for key, tensor in recorded(case)[1].items()
        if not key.startswith("_ema.") and ".decoder." not in key and not key.startswith("final_proj")
    }
    cfg = {"model": {"_name": name, inner: before, "drop_path_rate": 0.1}, "task": {"_name": "tuning"}}
    state = weights | random_tensors(head, seed=3)
    return {"args": None, "cfg": cfg, "model": state, "optimizer_history": [{"num_updates": 80}]}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


TEXT_V1 = {  # as the released recipe has it, but small
    "_name": "data2vec_text",
    "max_positions": 512,
    "head_layers": 2,
    "loss_beta": 4.0,
    "loss_scale": 1.0,
    "average_top_k_layers": 2,
    "layer_norm_target_layer": True,
    "instance_norm_target_layer": False,
    "ema_decay": 0.999,
    "ema_end_decay": 0.9999,
    "ema_anneal_end_step": 300_000,
    "ema_transformer_layers_only": True,
    "transformer": {
        "activation_fn": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "layernorm_embedding": True,
        "no_scale_embedding": True,
        "max_source_positions": 512,
        "encoder": {
            "embed_dim": 24,
            "ffn_embed_dim": 48,
            "layers": 3,
            "attention_heads": 4,
            "learned_pos": True,
        },
    },
}


def text_v1(head: bool = False, head_layers: int = 2, seed: int = 5) -> dict[str, Any]:
    """A checkpoint of v1 text with random weights; with a head, one of GLUE, with the same model's name."""
    encoder: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (61, 24),
        "embed_positions.weight": (34, 24),
        "layernorm_embedding.weight": (24,),
        "layernorm_embedding.bias": (24,),
    }
    for i in range(3):
        for part, rows, columns in (
            *((f"self_attn.{p}_proj", 24, 24) for p in ("q", "k", "v", "out")),
            ("fc1", 48, 24),
            ("fc2", 24, 48),
        ):
            encoder |= {f"layers.{i}.{part}.weight": (rows, columns), f"layers.{i}.{part}.bias": (rows,)}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            encoder |= {f"layers.{i}.{norm}.weight": (24,), f"layers.{i}.{norm}.bias": (24,)}
    student = {f"encoder.sentence_encoder.{k}": v for k, v in random_tensors(encoder, seed).items()}
    student["encoder.sentence_encoder.version"] = torch.tensor([3.0])
    cfg = TEXT_V1 | {"head_layers": head_layers}
    if head:
        prefix = "classification_heads.sentence_classification_head."
        shapes = {"dense.weight": (24, 24), "dense.bias": (24,), "out_proj.weight": (2, 24)}
        student |= random_tensors({prefix + k: v for k, v in shapes.items()}, 6)
        student[f"{prefix}out_proj.bias"] = torch.zeros(2)
    else:
        shapes = {"0.weight": (48, 24), "0.bias": (48,), "2.weight": (24, 48), "2.bias": (24,)}
        if head_layers == 1:
            shapes = {"0.weight": (24, 24), "0.bias": (24,)}
        student |= random_tensors({f"encoder.regression_head.{k}": v for k, v in shapes.items()}, 7)
        average = random_tensors(encoder, seed + 1)
        live = {k: student[f"encoder.sentence_encoder.{k}"] for k in encoder if not k.startswith("layers.")}
        student["encoder._ema"] = average | live | {"version": torch.tensor([3.0])}
    task = {"_name": "masked_lm", "mask_prob": 0.35, "mask_multiple_length": 4}
    return {
        "args": None,
        "cfg": {"model": cfg, "task": task, "optimization": {"max_update": 1_000_000}},
        "model": student,
        "optimizer_history": [{"num_updates": 99}],
    }


def beit(
    side: int = 4, is_tuned: bool = False, per_block: bool = False, dim: int = 24, depth: int = 3
) -> dict[str, Tensor]:
    """A state dict of a v1 vision model with random weights: 4 heads, patches of 8 pixels."""
    table = ((2 * side - 1) ** 2 + 3, 4)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "patch_embed.proj.weight": (dim, 3, 8, 8),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        b = f"blocks.{i}."
        shapes |= {f"{b}{k}": (dim,) for k in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")}
        shapes |= {f"{b}norm{n}.{w}": (dim,) for n in (1, 2) for w in ("weight", "bias")}
        shapes |= {f"{b}attn.qkv.weight": (3 * dim, dim), f"{b}attn.proj.weight": (dim, dim)}
        shapes |= {f"{b}attn.proj.bias": (dim,), f"{b}mlp.fc1.weight": (4 * dim, dim)}
        shapes |= {f"{b}mlp.fc1.bias": (4 * dim,), f"{b}mlp.fc2.weight": (dim, 4 * dim)}
        shapes |= {f"{b}mlp.fc2.bias": (dim,)}
        if per_block:
            shapes[f"{b}attn.relative_position_bias_table"] = table
    if not per_block:
        shapes["rel_pos_bias.relative_position_bias_table"] = table
    if is_tuned:
        shapes |= {
            "fc_norm.weight": (dim,),
            "fc_norm.bias": (dim,),
            "head.weight": (5, dim),
            "head.bias": (5,),
        }
    else:
        shapes |= {"mask_token": (1, 1, dim), "norm.weight": (dim,), "norm.bias": (dim,)}
        shapes |= {"lm_head.weight": (dim, dim), "lm_head.bias": (dim,)}
    return random_tensors(shapes, 9)


def roberta(head: bool = True) -> dict[str, Any]:
    """A checkpoint of v1 text fine-tuned on GLUE as fairseq's README says: the model is named `roberta` and has an
    untrained head of masked language."""
    checkpoint = text_v1(head=True)
    shapes = {"weight": (61, 24), "bias": (61,), "dense.weight": (24, 24), "dense.bias": (24,)}
    shapes |= {"layer_norm.weight": (24,), "layer_norm.bias": (24,)}
    checkpoint["model"] |= random_tensors({f"encoder.lm_head.{k}": v for k, v in shapes.items()}, 8)
    if not head:
        checkpoint["model"] = {k: t for k, t in checkpoint["model"].items() if "classification" not in k}
    sizes = {"layers": 3, "embed_dim": 24, "ffn_embed_dim": 48, "attention_heads": 4}
    model = {"_name": "roberta", "dropout": 0.2, "max_positions": 512}
    checkpoint["cfg"] = {
        "model": model | {f"encoder_{key}": size for key, size in sizes.items()},
        "task": {"_name": "sentence_prediction", "num_classes": 2},
        "optimization": {"max_update": 5336, "lr": [1e-5]},
    }
    return checkpoint


PORT = {"cls_token": "cls_emb", "mask_token": "mask_emb"}
"""BEiT's names as fairseq's port of v1 images has them; others keep their ends."""


def vision_port(is_whole: bool = False) -> dict[str, Any]:
    """A checkpoint of fairseq's `data2vec_vision` with random weights; the teacher is the encoder or the whole."""

    def named(name: str) -> str:
        for ours, theirs in (("patch_embed.proj", "patch_embed.conv"), ("lm_head", "final_proj")):
            name = name.replace(ours, theirs)
        name = name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
        inside = name.startswith(("blocks.", "rel_pos_bias.", "norm."))
        return PORT.get(name, f"encoder.{name}" if inside else name)

    student = {named(name): tensor for name, tensor in beit().items()}
    average = {name: tensor + 1 for name, tensor in student.items()}
    if not is_whole:
        average = {k.removeprefix("encoder."): t for k, t in average.items() if k.startswith("encoder.")}
    settings = {"_name": "data2vec_vision", "image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3}
    settings |= {"num_heads": 4, "num_mask_patches": 8, "average_top_k_layers": 2, "loss_beta": 2.0}
    settings |= {"layer_norm_targets": True, "ema_end_decay": 0.9998, "ema_transformer_only": not is_whole}
    return {
        "cfg": {"model": settings, "optimization": {"max_update": 375_300, "lr": [0.0005]}},
        "model": student | {"_ema": average},
        "optimizer_history": [{"num_updates": 12}],
    }
