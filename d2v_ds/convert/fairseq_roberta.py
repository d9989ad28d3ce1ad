"""data2vec v1 text as fairseq fine-tunes it on GLUE: inside its model `roberta`, as its README asks for.

That model takes data2vec's encoder under data2vec's names, drops regression head and teacher, and adds a head of
masked language that nothing ever trains. Its file says how large the encoder is and how it was fine-tuned; what it
does not say of pre-training is as the released v1 model had it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

NAMES = {"roberta": "base", "roberta_base": "base", "roberta_large": "large"}
SIZES = {  # of its architectures, where the file says none
    "base": {"layers": 12, "embed_dim": 768, "ffn_embed_dim": 3072, "attention_heads": 12},
    "large": {"layers": 24, "embed_dim": 1024, "ffn_embed_dim": 4096, "attention_heads": 16},
}
ENCODER = {"normalize_before": False, "learned_pos": True, "layerdrop": 0.0}
TRANSFORMER = {
    "activation_fn": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "layernorm_embedding": True,
    "no_scale_embedding": True,
    "no_token_positional_embeddings": False,
    "adaptive_input": False,
}
UNTRAINED = "encoder.lm_head."


def is_tuned(name: str | None, state: dict[str, Tensor]) -> bool:
    """Whether these are a fine-tuned `roberta`'s tensors; one without a head of sentences is no data2vec."""
    return name in NAMES and any(key.startswith("classification_heads.") for key in state)


def without_language_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(UNTRAINED)}


def pretraining(model: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration that data2vec_text would have had before: sizes of the file, the rest as released."""
    sizes = ENCODER | SIZES[NAMES[name]]
    encoder = {key: model.get(f"encoder_{key}", value) for key, value in sizes.items()}
    transformer = {key: model.get(key, value) for key, value in TRANSFORMER.items()}
    return {
        "model": {
            "_name": "data2vec_text",
            "head_layers": 2,
            "average_top_k_layers": 10,
            "layer_norm_target_layer": True,
            "loss_beta": 4.0,
            "loss_scale": 1.0,
            "ema_decay": 0.999,
            "ema_end_decay": 0.9999,
            "ema_anneal_end_step": 300_000,
            "ema_transformer_layers_only": True,
            "transformer": transformer | {"encoder": encoder},
        },
        "task": {"_name": "masked_lm", "mask_prob": 0.35, "mask_multiple_length": 4},
        "optimization": {"max_update": 1_000_000, "lr": [2e-4], "clip_norm": 5.0},
        "optimizer": {"_name": "adam", "adam_betas": "(0.9,0.98)", "adam_eps": 1e-6, "weight_decay": 0.01},
        "lr_scheduler": {"_name": "cosine", "warmup_updates": 10_000, "min_lr": 0.0},
    }
