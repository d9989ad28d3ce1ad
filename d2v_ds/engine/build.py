"""From a model and a recipe's numbers to a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from d2v_ds.engine.step import clip_gradients, is_plain, loss_scaler
from d2v_ds.model.data2vec import TEACHER, Data2Vec
from d2v_ds.model.decoder import Decoder
from d2v_ds.model.heads import HEAD
from d2v_ds.model.layers import Block


def fetched_whole(model: Data2Vec) -> Iterator[nn.Module]:
    """What ZeRO-3 gathers with one fetch and one hook, instead of one for every layer inside.

    Gradients are safe, since reduction waits for the end of the step (d2v_ds.engine.step). Not for modules
    whose input needs no gradient: DeepSpeed's hook would run before they have theirs.
    """
    for name, module in model.named_modules():
        is_teachers = name.startswith(TEACHER) and name.endswith((".local", ".context"))
        if isinstance(module, (Block, Decoder)) or name.endswith(".conv_positions") or is_teachers:
            yield module


def parameter_groups(model: Data2Vec, weight_decay: float, decay: str) -> list[dict[str, Any]]:
    """Trainable parameters by (followed by the teacher, of a head, decayed, share of the learning rate): so no EMA is
    kept for a decoder.

    With decay="matrices", one-dimensional parameters, biases and ALiBi scales are not decayed.
    """
    followed = {name for name, student, _ in model.followed() if student.requires_grad}
    groups: dict[tuple[bool, bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = decay == "all" or (parameter.ndim > 1 and not name.endswith("alibi_scale"))
            key = name in followed, name.startswith(HEAD), decays, model.lr_scale(name)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": members,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": scale,
            "is_head": is_head,
        }
        for (_, is_head, decays, scale), members in sorted(
            groups.items(), key=lambda item: item[0], reverse=True
        )
    ]


def build_optimizer(
    model: Data2Vec,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay: str,
) -> torch.optim.AdamW:
    groups = parameter_groups(model, weight_decay, decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def build_engine(
    model: Data2Vec, optimizer: torch.optim.Optimizer, config: dict[str, Any], is_compiled: bool = False
) -> Any:
    """The engine over student and frozen teacher; only trainable parameters are in the optimizer.

    `is_compiled`: the transformer blocks run through torch.compile, each by itself, at any ZeRO stage.
    """
    import deepspeed

    if is_compiled:
        compile_blocks(model, config["zero_optimization"])
    if config["zero_optimization"]["stage"] == 3:
        for module in fetched_whole(model):
            deepspeed.utils.set_z3_leaf_module(module, True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.parameter_names = {id(p): name for name, p in engine.module.named_parameters()}
    if is_plain(engine):
        engine.clip_fp32_gradients = partial(clip_gradients, engine)
    undo_dry_step(engine)
    free_loss_scale(engine, config)
    return engine


def compile_blocks(model: nn.Module, zero: dict[str, Any]) -> None:
    """Only what a block computes: ZeRO-3's hooks, which gather its weights, stay outside.

    NOTE: DeepSpeed's own linear function of ZeRO-3 has no gradient where it is compiled: weights get none, silently.
    """
    if zero.get("memory_efficient_linear"):
        raise ValueError(
            "zero_optimization.memory_efficient_linear=true of the ds_config gives compiled layers no gradients; leave "
            "it out, or set train.compile=false"
        )
    zero["memory_efficient_linear"] = False
    torch.nn.functional.linear = (
        torch._C._nn.linear
    )  # where a run before in this process has left DeepSpeed's
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = torch.compile(module.forward)


LOWEST_LOSS_SCALE = 2.0**-20


def free_loss_scale(engine: Any, config: dict[str, Any]) -> None:
    """Lets fp16's loss scale fall below 1, where the ds_config takes whole numbers only, unless it names the lowest;
    and there train.skip_limit decides, not an exception."""
    scaler = loss_scaler(engine)
    for name in ("min_scale", "min_loss_scale"):
        if getattr(scaler, name, None) and "min_loss_scale" not in config.get("fp16", {}):
            setattr(scaler, name, LOWEST_LOSS_SCALE)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


@torch.no_grad()
def undo_dry_step(engine: Any) -> None:
    """At stage 0 with bf16 or fp16, DeepSpeed allocates moments by a step with zero gradients, which decays the
    weights once and leaves Adam's bias correction one step ahead: start again from the weights."""
    wrapper = engine.optimizer
    if type(wrapper).__name__ == "FP16_UnfusedOptimizer":
        wrapper.optimizer.state.clear()
        for masters, group in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, parameter in zip(masters, group, strict=True):
                master.copy_(parameter)
