"""DeepSpeed's JSON: read, checked key by key, every "auto" decided by the recipe and the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from d2v_ds.config import nearest

PRESETS = Path(__file__).resolve().parents[2] / "ds_configs"
DEFAULT_PRESET = "zero3"

TOP_LEVEL = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "aio",
    "activation_checkpointing",
    "seed",
    "use_data_before_expert_parallelism",
    "timers",
}
# keys of the sections that are resolved here; the others are DeepSpeed's to check
SECTIONS = {
    "bf16": {
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    },
    "fp16": {
        "enabled",
        "auto_cast",
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
        "fp16_master_weights_and_grads",
    },
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
    "optimizer": {"type", "params", "legacy_fusion"},
    "optimizer.params": {
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "torch_adam",
        "adam_w_mode",
        "bias_correction",
        "fused",
        "amsgrad",
    },
    "zero_optimization.offload_optimizer": {
        "device",
        "pin_memory",
        "ratio",
        "buffer_count",
        "fast_init",
        "nvme_path",
        "pipeline",
        "pipeline_read",
        "pipeline_write",
    },
    "zero_optimization.offload_param": {
        "device",
        "pin_memory",
        "buffer_count",
        "buffer_size",
        "max_in_cpu",
        "nvme_path",
    },
}
REMOVED = {
    "amp": "set bf16 or fp16",
    "nebula": "our own checkpoints replace it",
    "elasticity": "checkpoints of this project load at any number of ranks",
    "compression_training": "",
    "quantize_training": "",
    "sparse_gradients": "",
    "sparse_attention": "",
    "eigenvalue": "",
    "curriculum_learning": "",
    "progressive_layer_drop": "set body.layerdrop in the recipe",
    "graph_harvesting": "",
}
OURS = {
    "tensorboard": "TensorBoard is always written to the run folder",
    "wandb": "metrics.jsonl holds everything",
    "csv_monitor": "metrics.jsonl holds everything",
    "checkpoint": "checkpoints are this project's own format",
    "data_efficiency": "the recipe owns the data",
}
# zero_optimization keys that would leave the teacher stale or inexact, each with what to do instead
ZERO_REFUSED = {
    "zero_quantized_nontrainable_weights": "it would store the teacher in int8",
    "zero_quantized_weights": "it would quantise the teacher's gathers too",
    "zenflow": "its selective updates are not followed by the EMA",
    "mics_shard_size": "removed from DeepSpeed; use zero_hpz_partition_size",
    "mics_hierarchical_params_gather": "removed from DeepSpeed; use zero_hpz_partition_size",
}


def find_config(name: str | None) -> Path:
    """A path, or the name of a preset in ds_configs/ with or without `.json`; None = the default preset."""
    name = name or DEFAULT_PRESET
    for path in (Path(name), PRESETS / name, PRESETS / f"{name}.json", PRESETS / Path(name).name):
        if path.is_file():
            return path
    presets = [p.stem for p in PRESETS.glob("*.json")]
    raise ValueError(
        f"DeepSpeed config '{name}' is neither a file nor a preset{nearest(Path(name).stem, presets)}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """The parsed file; ValueError for bad JSON, unknown, removed or refused keys."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, must be a JSON object of DeepSpeed settings")
    for key in config:
        if key in REMOVED:
            raise ValueError(
                f"{path}: '{key}' was removed from DeepSpeed; delete it"
                + f" ({REMOVED[key]})" * bool(REMOVED[key])
            )
        if key in OURS:
            raise ValueError(f"{path}: '{key}' has no effect here; delete it ({OURS[key]})")
        if key not in TOP_LEVEL:
            raise ValueError(f"{path}: unknown key '{key}'{nearest(key, TOP_LEVEL)}")
    check_zero(path, config.get("zero_optimization", {}))
    for name in SECTIONS:
        check_section(path, config, name)
    check_offload(path, config.get("zero_optimization", {}))
    return config


def check_section(path: Path, config: dict[str, Any], name: str) -> None:
    """A section is an object, and has only keys that are known."""
    value: Any = config
    for part in name.split("."):
        if part not in value or value[part] is None:
            return
        value = value[part]
    if not isinstance(value, dict):
        example = '{"device": "cpu"}' if "offload" in name else '{"enabled": true}'
        raise ValueError(f"{path}: {name}={value!r} must be an object such as {example}")
    for key in value:
        if key not in SECTIONS[name]:
            raise ValueError(f"{path}: unknown key '{name}.{key}'{nearest(key, SECTIONS[name])}")


def check_zero(path: Path, zero: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if not isinstance(zero, dict):
        raise ValueError(f'{path}: zero_optimization={zero!r} must be an object such as {{"stage": 3}}')
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {f.alias for f in fields.values() if f.alias}
    for key, value in zero.items():
        if key in ZERO_REFUSED and value:
            raise ValueError(
                f"{path}: zero_optimization.{key}={value!r} is not supported: {ZERO_REFUSED[key]}; delete it"
            )
        if key not in known and key not in ZERO_REFUSED:
            raise ValueError(f"{path}: unknown key 'zero_optimization.{key}'{nearest(key, known)}")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage={zero['stage']!r} must be 0, 1, 2 or 3")


def check_offload(path: Path, zero: dict[str, Any]) -> None:
    for key in ("offload_param", "offload_optimizer"):
        device = (zero.get(key) or {}).get("device", "none")
        if device == "nvme":
            raise ValueError(
                f"{path}: zero_optimization.{key}.device=nvme is not supported: the EMA needs its "
                "values in memory; use cpu"
            )
        if device not in ("cpu", "none"):
            raise ValueError(f"{path}: zero_optimization.{key}.device={device!r} must be cpu or none")


def resolve_config(
    config: dict[str, Any],
    *,
    clip: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    precision: str,
    dim: int,
    path: str = "the DeepSpeed config",
) -> dict[str, Any]:
    """The config that DeepSpeed gets: no "auto" left, nothing that contradicts the recipe.

    A step is one reduction over micro-batches of several modalities, so DeepSpeed itself counts one
    micro-batch a step; sample counts are the recipe's.
    """
    config = json.loads(json.dumps(config))
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.pop(key, "auto") != "auto":
            raise ValueError(
                f'{path}: {key} belongs to the recipe; write "auto" and set '
                "modalities.NAME.data.batch and .micro_batches"
            )
    drop_optimizer(config, path, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if config.pop("scheduler", None) is not None:
        raise ValueError(
            f"{path}: the learning-rate schedule belongs to the recipe; delete 'scheduler' and set optim.*"
        )
    written = config.pop("gradient_clipping", "auto")
    if written not in ("auto", clip):
        raise ValueError(
            f'{path}: gradient_clipping={written} contradicts optim.clip={clip} of the recipe; write "auto"'
        )
    resolve_precision(config, precision, path)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    # NOTE: under autocast DeepSpeed rounds what it gathers in a forward pass to bf16, but not the parameters that it
    # keeps after a step: a resumed run would differ. So it keeps none.
    keeps_small = not config.get("torch_autocast", {}).get("enabled")
    autos = {
        "reduce_bucket_size": max(dim * dim, 1_000_000),
        "stage3_prefetch_bucket_size": int(0.9 * dim * dim),
        "stage3_param_persistence_threshold": max(10 * dim, 100_000) if keeps_small else 0,
        "overlap_comm": torch.cuda.is_available(),
    }
    for key, value in zero.items():
        if value == "auto":
            if key not in autos:
                raise ValueError(
                    f'{path}: zero_optimization.{key}="auto" is not known here; write a value or delete it'
                )
            zero[key] = autos[key]
    check_leftovers(config, path)
    config.update(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        gradient_clipping=float(clip),
        zero_force_ds_cpu_optimizer=False,
    )
    config.setdefault("steps_per_print", 2**31)
    return config


def drop_optimizer(config: dict[str, Any], path: str, **recipe: Any) -> None:
    """An `optimizer` section may stand there, as other trainers want it, if it says the recipe's or "auto"."""
    section = config.pop("optimizer", None)
    if section is None:
        return
    if section.get("type", "AdamW").lower() not in ("adam", "adamw"):
        raise ValueError(
            f"{path}: optimizer.type={section['type']} contradicts the recipe's AdamW; delete the section"
        )
    for key, value in section.get("params", {}).items():
        expected = recipe.get(key)
        value = tuple(value) if isinstance(value, list) else value
        if value != "auto" and key in recipe and value != expected:
            raise ValueError(
                f"{path}: optimizer.params.{key}={value} contradicts optim.{key}={expected} of the recipe; "
                'write "auto"'
            )


def resolve_precision(config: dict[str, Any], precision: str, path: str) -> None:
    bf16, fp16 = (config.setdefault(name, {}) for name in ("bf16", "fp16"))
    for section in (bf16, fp16):
        section.setdefault("enabled", False)
    if "auto" in (bf16.get("enabled"), fp16.get("enabled")):
        chosen = hardware_precision() if precision == "auto" else precision
        for section, name in ((bf16, "bf16"), (fp16, "fp16")):
            section["enabled"] = chosen == name if section["enabled"] == "auto" else section["enabled"]
        if chosen == "fp16" and not bf16["enabled"]:
            fp16["enabled"] = True  # presets say "auto" for bf16 alone
    elif precision not in ("auto", config_precision(config)):
        raise ValueError(
            f"{path} says {config_precision(config)}, precision={precision} contradicts it; "
            'write "bf16": {"enabled": "auto"} there or drop precision='
        )
    if bf16["enabled"] and fp16["enabled"]:
        raise ValueError(f"{path}: bf16 and fp16 are both enabled; choose one")
    autocast = config.get("torch_autocast", {}).get("enabled", False)
    if autocast and (bf16["enabled"] or fp16["enabled"]):
        raise ValueError(
            f"{path}: torch_autocast keeps weights in fp32, so bf16 and fp16 must not be enabled with it"
        )


def config_precision(config: dict[str, Any]) -> str:
    return "bf16" if config["bf16"]["enabled"] else "fp16" if config["fp16"]["enabled"] else "fp32"


def hardware_precision() -> str:
    """bf16 where the hardware has it."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def emulated_precision(config: dict[str, Any]) -> str | None:
    """Of a resolved config: the name of its precision if this CPU has no matrix products of it; None if it has.

    They are then emulated number by number: a product of 2,048 x 2,048 took 300 times as long in bf16 as in fp32
    on an AMD EPYC without AVX-512.
    """
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled"):
        precision = "bf16" if "bf" in autocast.get("dtype", "bf16") else "fp16"
    else:
        precision = config_precision(config)
    return None if cpu_multiplies(precision) else precision


def cpu_multiplies(precision: str) -> bool:
    """Whether this CPU has fast matrix products in "fp32", "bf16" or "fp16"."""
    if precision == "fp32":
        return True
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")
    return torch.backends.mkldnn.is_available() and supported()


def check_leftovers(config: Any, path: str, key: str = "") -> None:
    if isinstance(config, dict):
        for name, value in config.items():
            check_leftovers(value, path, f"{key}.{name}".strip("."))
    elif config == "auto":
        raise ValueError(f'{path}: {key}="auto" is not known here; write a value or delete it')
