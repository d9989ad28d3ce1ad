"""A DeepSpeed config is checked key by key, and nothing in it is left to chance."""

from __future__ import annotations

import json
import timeit
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_ds.engine import ds_config
from d2v_ds.engine.ds_config import (
    PRESETS,
    cpu_multiplies,
    emulated_precision,
    find_config,
    read_config,
    resolve_config,
)

NAMES = sorted(path.stem for path in PRESETS.glob("*.json"))
RECIPE = {"clip": 4.0, "lr": 2e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01, "dim": 96}


def preset(name: str = "zero3", **changes: Any) -> dict[str, Any]:
    return json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8")) | changes


def with_zero(**changes: Any) -> dict[str, Any]:
    config = preset()
    config["zero_optimization"] |= changes
    return config


def resolve(path: Path, content: dict[str, Any] | str, precision: str = "auto") -> dict[str, Any]:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return resolve_config(read_config(path), **RECIPE, precision=precision, path=str(path))


def message(path: Path, content: dict[str, Any] | str, precision: str = "auto") -> str:
    with pytest.raises(ValueError) as caught:
        resolve(path, content, precision)
    text = str(caught.value)
    assert text.startswith(str(path)), "the file is named first"
    assert "\n" not in text
    return text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.json"


def leaves(config: Any) -> list[Any]:
    if isinstance(config, dict):
        return [leaf for value in config.values() for leaf in leaves(value)]
    return [config]


# ---- presets ----


def test_there_is_a_preset_for_each_stage_and_for_offload():
    assert {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_autocast"} <= set(
        NAMES
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "zero3_autocast"])
def test_a_preset_resolves(name, precision, path):
    """No "auto" left, the precision asked for, the recipe's clip, one micro-batch as DeepSpeed counts."""
    config = resolve(path, preset(name), precision)
    assert "auto" not in leaves(config)
    assert config["bf16"]["enabled"] == (precision == "bf16") and config["fp16"]["enabled"] is False
    assert config["gradient_clipping"] == 4.0
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 1)
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("offload")


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_autocast_keeps_weights_in_fp32(precision, path):
    config = resolve(path, preset("zero3_autocast"), precision)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert not config["bf16"]["enabled"] and "auto" not in leaves(config)
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_accepts_a_resolved_preset(name, path, monkeypatch):
    """Its own parser, which refuses unknown and badly typed keys of `zero_optimization`."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig(resolve(path, preset(name)))
    assert parsed.zero_config.stage == int(name[4]) and parsed.gradient_clipping == 4.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelling", ["{name}", "{name}.json", "ds_configs/{name}.json"])
def test_a_preset_is_found_from_anywhere(name, spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_config(spelling.format(name=name))
    assert json.loads(found.read_text()) == preset(name)


def test_a_file_of_ones_own_comes_before_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("zero3").write_text("{}")
    assert find_config("zero3").resolve() == tmp_path / "zero3"


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_name_it_is_zero3(name):
    assert find_config(name) == PRESETS / "zero3.json"


@pytest.mark.parametrize(
    ("hardware", "asked", "chosen"),
    [
        ("bf16", "auto", "bf16"),
        ("fp32", "auto", "fp32"),
        ("bf16", "fp32", "fp32"),
        ("fp32", "bf16", "bf16"),
        ("bf16", "fp16", "fp16"),
    ],
)
@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_an_auto_is_decided_by_the_recipe_then_by_the_hardware(
    name, hardware, asked, chosen, path, monkeypatch
):
    monkeypatch.setattr(ds_config, "hardware_precision", lambda: hardware)
    config = resolve(path, preset(name), asked)
    assert [key for key in ("bf16", "fp16") if config[key]["enabled"]] == (
        [] if chosen == "fp32" else [chosen]
    )


@pytest.mark.parametrize(
    ("autocast", "asked", "emulated"),
    [
        (None, "fp32", None),
        (None, "bf16", "bf16"),
        (None, "fp16", "fp16"),
        ({"enabled": True}, "fp32", "bf16"),
        ({"enabled": True, "dtype": "torch.bfloat16"}, "fp32", "bf16"),
        ({"enabled": True, "dtype": "half"}, "fp32", "fp16"),
        ({"enabled": False, "dtype": "bfloat16"}, "fp32", None),
    ],
)
@pytest.mark.parametrize("has_products", [True, False])
def test_a_precision_that_the_cpu_has_no_products_of_is_named(
    has_products, autocast, asked, emulated, path, monkeypatch
):
    monkeypatch.setattr(ds_config, "cpu_multiplies", lambda precision: has_products or precision == "fp32")
    config = resolve(path, preset("zero0", **({"torch_autocast": autocast} if autocast else {})), asked)
    assert emulated_precision(config) == (None if has_products else emulated)


def test_what_a_cpu_multiplies_is_fast():
    """A product within 20 times that of fp32; without instructions for it, it was 70 to 400 times."""
    assert cpu_multiplies("fp32")
    seconds = {}
    for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        if cpu_multiplies(precision):
            a = torch.ones(512, 512, dtype=dtype)
            seconds[precision] = min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=7))
    assert all(taken < 20 * seconds["fp32"] for taken in seconds.values()), seconds


def test_fp16_is_given_where_the_config_leaves_it_open(path):
    config = resolve(path, preset(fp16={"enabled": "auto"}), "fp16")
    assert config["fp16"]["enabled"] is True and config["bf16"]["enabled"] is False


def test_automatic_sizes_follow_the_model(path):
    """Of 96 dimensions; a value that is written stays."""
    zero = resolve(path, with_zero(reduce_bucket_size=12_345))["zero_optimization"]
    assert zero["reduce_bucket_size"] == 12_345
    assert zero["stage3_param_persistence_threshold"] == 100_000
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 96 * 96)


def test_the_config_given_is_not_changed(path):
    config = preset()
    resolve_config(config, **RECIPE, precision="fp32")
    assert config == preset()


# ---- what other trainers' configs hold ----


def test_an_optimizer_section_of_autos_is_accepted(path):
    """As transformers' documentation has it; our optimizer comes from the recipe, so none is left."""
    section = {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    }
    assert "optimizer" not in resolve(path, preset(optimizer=section))


def test_an_optimizer_section_that_says_the_same_is_accepted(path):
    section = {
        "type": "adamw",
        "params": {"lr": 2e-3, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01},
    }
    assert "optimizer" not in resolve(path, preset(optimizer=section))


def test_the_recipes_clip_may_stand_there_too(path):
    assert resolve(path, preset(gradient_clipping=4))["gradient_clipping"] == 4.0


# ---- mistakes ----


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            preset(zero_optimisation={}),
            ("unknown key 'zero_optimisation'", "did you mean 'zero_optimization'?"),
        ),
        (
            preset(gradient_cliping=1.0),
            ("unknown key 'gradient_cliping'", "did you mean 'gradient_clipping'?"),
        ),
        (
            with_zero(overlap_com=True),
            ("unknown key 'zero_optimization.overlap_com'", "did you mean 'overlap_comm'?"),
        ),
        (preset(amp={"enabled": True}), ("'amp' was removed", "set bf16 or fp16")),
        (preset(elasticity={}), ("'elasticity' was removed", "any number of ranks")),
        (preset(curriculum_learning={}), ("'curriculum_learning' was removed", "delete it")),
        (preset(tensorboard={"enabled": True}), ("'tensorboard' has no effect", "delete it")),
        (preset(checkpoint={}), ("'checkpoint' has no effect", "delete it")),
        (
            with_zero(zero_quantized_nontrainable_weights=True),
            ("zero_quantized_nontrainable_weights=True", "delete it"),
        ),
        (with_zero(zero_quantized_weights=True), ("zero_quantized_weights=True", "delete it")),
        (with_zero(offload_param={"device": "nvme"}), ("offload_param.device=nvme", "use cpu")),
        (with_zero(stage=4), ("stage=4 must be 0, 1, 2 or 3",)),
        (with_zero(stage="3"), ("stage='3' must be 0, 1, 2 or 3",)),
        (preset(zero_optimization=3), ("zero_optimization=3 must be an object",)),
        (preset(gradient_clipping=1.0), ("gradient_clipping=1.0 contradicts optim.clip=4.0", 'write "auto"')),
        (
            preset(optimizer={"type": "AdamW", "params": {"lr": 1e-4}}),
            ("optimizer.params.lr=0.0001 contradicts optim.lr=0.002", 'write "auto"'),
        ),
        (
            preset(optimizer={"type": "AdamW", "params": {"betas": [0.9, 0.95]}}),
            ("optimizer.params.betas=(0.9, 0.95) contradicts optim.betas=(0.9, 0.98)",),
        ),
        (preset(optimizer={"type": "Lion"}), ("optimizer.type=Lion contradicts", "delete the section")),
        (
            preset(scheduler={"type": "WarmupLR", "params": {}}),
            ("schedule belongs to the recipe", "delete 'scheduler'"),
        ),
        (preset(train_batch_size=16), ("train_batch_size belongs to the recipe", 'write "auto"')),
        (preset(train_micro_batch_size_per_gpu=4), ("train_micro_batch_size_per_gpu belongs to the recipe",)),
        (preset(gradient_accumulation_steps=2), ("gradient_accumulation_steps belongs to the recipe",)),
        (
            preset(bf16={"enabled": True}, fp16={"enabled": True}),
            ("bf16 and fp16 are both enabled", "choose one"),
        ),
        (
            preset(torch_autocast={"enabled": True}, bf16={"enabled": True}),
            ("torch_autocast keeps weights in fp32",),
        ),
        (preset(steps_per_print="auto"), ('steps_per_print="auto" is not known', "write a value")),
        (
            with_zero(sub_group_size="auto"),
            ('zero_optimization.sub_group_size="auto" is not known', "write a value"),
        ),
        (preset(flops_profiler={"enabled": "auto"}), ('flops_profiler.enabled="auto" is not known',)),
        ("{bad", ("is no valid JSON", "line 1 column 2")),
        ("", ("is no valid JSON",)),
        ("[1, 2]", ("holds list, must be a JSON object",)),
        ('"zero3"', ("holds str, must be a JSON object",)),
    ],
)
def test_a_mistake_is_told_with_its_value_and_what_to_do(config, parts, path):
    text = message(path, config)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("key", ["bf16", "fp16", "torch_autocast", "optimizer"])
@pytest.mark.parametrize("value", [True, "auto", []])
def test_a_section_that_is_no_object_is_told(key, value, path):
    """`"bf16": true` is what one writes at first."""
    text = message(path, preset(**{key: value}))
    assert key in text and "object" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bf16", {"enabledd": True}),
        ("fp16", {"enabled": False, "foo": 1}),
        ("torch_autocast", {"enable": True}),
        ("optimizer", {"typ": "AdamW"}),
        ("optimizer", {"type": "AdamW", "params": {"lrr": 1}}),
    ],
)
def test_an_unknown_key_inside_a_section_is_told(key, value, path):
    text = message(path, preset(**{key: value}))
    assert f"unknown key '{key}." in text


def test_an_empty_section_is_off(path):
    assert resolve(path, preset(bf16={}, fp16={}))["bf16"]["enabled"] is False


@pytest.mark.parametrize("value", ["cpu", {"device": "gpu"}, {"devicee": "cpu"}])
def test_an_offload_that_deepspeed_would_not_read_is_told(value, path):
    assert "zero_optimization.offload_optimizer" in message(path, with_zero(offload_optimizer=value))


def test_fp32_against_bf16_is_a_contradiction(path):
    text = message(path, preset(bf16={"enabled": True}), "fp32")
    assert "says bf16, precision=fp32 contradicts it" in text and "drop precision=" in text


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_against_low_precision_is_a_contradiction(precision, path):
    assert f"precision={precision} contradicts it" in message(path, preset("zero3_autocast"), precision)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("zero33", "did you mean 'zero3'?"),
        ("ds_configs/zero3_ofload.json", "did you mean 'zero3_offload'?"),
        ("nothing/like/it.json", "known: zero0, zero1"),
        ("ds_configs", "known: zero0, zero1"),
    ],
)
def test_an_absent_config_names_the_nearest_preset(name, hint):
    with pytest.raises(ValueError) as caught:
        find_config(name)
    assert f"'{name}' is neither a file nor a preset" in str(caught.value) and hint in str(caught.value)


def test_bytes_that_are_no_text_are_told(path):
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="mine.json is no valid JSON"):
        read_config(path)
