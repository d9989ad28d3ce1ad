"""fairseq's checkpoints and BEiT-like files are read whole, by their own configuration, or refused with the reason."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import (
    CASES,
    GOLDEN,
    TUNED,
    beit,
    flat,
    nested,
    pretrained,
    recorded,
    roberta,
    text_v1,
    tuned,
    vision_port,
)
from torch import Tensor

import d2v_ds
from d2v_ds.cli import main
from d2v_ds.convert.fairseq_file import from_dict, read_fairseq, write_fairseq
from d2v_ds.convert.stored import Stored
from d2v_ds.model.data2vec import TEACHER

TIGHT = {"rtol": 1e-4, "atol": 5e-5}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/check_golden.py: reads the recorded batches."""
    spec = importlib.util.spec_from_file_location(
        "check_golden", GOLDEN.parents[1] / "scripts" / "check_golden.py"
    )
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["check_golden"] = module
    spec.loader.exec_module(module)
    return module


def save(checkpoint: Any, folder: Path, name: str = "model.pt") -> Path:
    path = folder / name
    torch.save(checkpoint, path)
    return path


def changed(checkpoint: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The checkpoint with other settings of its model."""
    checkpoint["cfg"]["model"] |= settings
    return checkpoint


def same(ours: Stored, theirs: Stored) -> bool:
    return ours.tensors.keys() == theirs.tensors.keys() and all(
        torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items()
    )


# ---- recorded models ----


@pytest.mark.parametrize("case", CASES)
def test_an_imported_checkpoint_gives_the_recorded_features(
    case: str, tmp_path: Path, script: ModuleType
) -> None:
    """Through `d2v import` and `d2v_ds.load`, every layer; fairseq_compat, since padded batches were recorded."""
    path = save(pretrained(case), tmp_path)
    assert main(["import", str(path), "--out", str(tmp_path / "out")]) == 0
    golden = script.read_case(GOLDEN / f"{case}.json")
    golden.build()
    compared = 0
    for source in (path, tmp_path / "out"):
        encoder = d2v_ds.load(source, fairseq_compat=True)
        for name in golden.info["batches"]:
            outputs, ffns = encoder.model.encode(golden.batch(f"{name}."))
            for kind, layers in (("block_out", outputs), ("layer_result", ffns)):
                for i, layer in enumerate(layers):
                    reference = golden.tensors.get(f"{name}.feat.{kind}.{i}")
                    if reference is not None:
                        real = reference.shape[1]
                        torch.testing.assert_close(layer[:, :real], reference, **TIGHT)
                        compared += 1
    assert compared >= 6


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_tensor_arrives_with_its_values(case: str, tmp_path: Path) -> None:
    """Counted and summed: thirds of projections are joined, positions and the teacher's live copies left out."""
    stored = read_fairseq(save(pretrained(case), tmp_path))
    weights = {k: t for k, t in recorded(case)[1].items() if "fixed_positional_encoder" not in k}
    students = {k: t for k, t in weights.items() if not k.startswith("_ema.")}
    ours = {k: t for k, t in stored.tensors.items() if not k.startswith(TEACHER)}
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in students.values())
    expected = sum(t.double().sum() for t in students.values())
    torch.testing.assert_close(sum(t.double().sum() for t in ours.values()), expected)
    teachers = {k: t for k, t in weights.items() if k.startswith("_ema.") and "pos_conv" not in k}
    ours = {k: t for k, t in stored.tensors.items() if k.startswith(TEACHER)}
    if case != "v1_audio":
        teachers = {k: t for k, t in weights.items() if k.startswith("_ema.")}
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in teachers.values())
    assert stored.weights == "both" and stored.step == 1234


def test_the_configuration_inside_the_file_decides() -> None:
    """Not a recipe of the same name: K, tau, masks, schedule and decoder are the file's."""
    checkpoint = changed(pretrained("audio_cb4"), average_top_k_layers=2, ema_decay=0.5, clone_batch=3)
    checkpoint["cfg"]["model"]["modalities"]["audio"]["mask_prob"] = 0.37
    stored = from_dict(checkpoint)
    config, recipe = stored.recipe.modalities["audio"], stored.recipe
    assert (config.target.top_k, config.clones, config.mask.ratio) == (2, 3, 0.37)
    assert (recipe.ema.start, recipe.ema.end, recipe.ema.anneal_steps) == (0.5, 0.99, 1000)
    assert (recipe.optim.lr, recipe.optim.betas, recipe.optim.warmup_steps) == (0.00075, (0.9, 0.98), 8000)
    assert (recipe.optim.clip, recipe.optim.weight_decay, recipe.train.steps) == (4.0, 0.01, 400_000)
    assert stored.origin == "fairseq data2vec_multi" and not recipe.fairseq_compat


def test_a_setting_that_has_no_effect_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """It is of pre-training alone."""
    from_dict(pretrained("audio_cb4"))
    assert not caplog.messages
    checkpoint = pretrained("audio_cb4")
    checkpoint["cfg"]["model"]["modalities"]["audio"] |= {"local_grad_mult": 0.1, "encoder_zero_mask": False}
    from_dict(checkpoint)
    assert [message.split(":")[0] for message in caplog.messages] == [
        "fairseq setting local_grad_mult=0.1 is not used",
        "fairseq setting encoder_zero_mask=False is not used",
    ]


@pytest.mark.parametrize(
    ("schedule", "phases"),
    [
        ({"phase_ratio": [0.1, 0.4, 0.5], "final_lr_scale": 0.05}, (0.1, 0.4, 0.5)),
        ({"phase_ratio": "(0.1, 0.4, 0.5)", "final_lr_scale": 0.05}, (0.1, 0.4, 0.5)),
        ({"phase_ratio": None, "warmup_steps": 10, "hold_steps": 0, "decay_steps": 30}, (0.25, 0.0, 0.75)),
        ({"phase_ratio": [1, 2]}, (0.03, 0.9, 0.07)),
        ({"phase_ratio": [0, 0, 0], "init_lr_scale": 0.0}, (0.03, 0.9, 0.07)),
    ],
)
def test_the_released_v1_speech_schedule_is_read(schedule: dict, phases: tuple) -> None:
    """Three stages, as shares, their text, or steps; odd ones are of no use, and no reason to refuse the weights."""
    assert from_dict(pretrained("v1_audio")).recipe.optim.phases == (0.03, 0.9, 0.07)
    checkpoint = pretrained("v1_audio")
    checkpoint["cfg"]["lr_scheduler"] = {"_name": "tri_stage"} | schedule
    optim = from_dict(checkpoint).recipe.optim
    assert (optim.schedule, optim.phases, optim.warmup_steps) == ("tri_stage", phases, 0)
    assert optim.phase_scales == (0.01, schedule.get("final_lr_scale", 0.01))


def test_a_setting_that_is_missing_has_its_classs_default() -> None:
    """Not the released recipe's: for these, a recipe says 0 (image dropout), 0.999 and 0.05."""
    checkpoint = pretrained("audio_cb4")
    for key in ("encoder_dropout", "ema_end_decay", "layerdrop"):
        del checkpoint["cfg"]["model"][key]
    del checkpoint["cfg"]["model"]["modalities"]["audio"]["mask_prob"]
    stored = from_dict(checkpoint)
    assert (stored.recipe.body.encoder_dropout, stored.recipe.body.layerdrop) == (0.1, 0.0)
    assert (stored.recipe.ema.end, stored.recipe.modalities["audio"].mask.ratio) == (0.9999, 0.7)


def test_references_between_settings_are_followed() -> None:
    checkpoint = changed(pretrained("text_cb4"), ema_anneal_end_step="${optimization.max_update}")
    checkpoint["cfg"]["model"]["modalities"]["text"]["dropout"] = "${model.post_mlp_drop}"
    stored = from_dict(checkpoint)
    assert stored.recipe.ema.anneal_steps == 400_000
    assert stored.recipe.modalities["text"].embed_dropout == 0.0


def test_modalities_that_the_configuration_lists_but_the_model_lacks_are_none() -> None:
    """fairseq's configuration always has all three."""
    checkpoint = pretrained("image_cb4")
    modalities = checkpoint["cfg"]["model"]["modalities"]
    modalities["audio"], modalities["text"] = {"type": "???"}, None
    assert list(from_dict(checkpoint).recipe.modalities) == ["image"]


def test_a_model_of_several_modalities_is_read_whole() -> None:
    """Two recorded models under one body: both encoders, decoders and teachers."""
    audio, image = pretrained("audio_cb4"), pretrained("image_cb4")
    for section in (audio, image):
        section["model"] = flat(section["model"])
    own = {k: t for k, t in image["model"].items() if "IMAGE" in k}
    audio["model"] = nested(audio["model"] | own)
    audio["cfg"]["model"]["modalities"] |= image["cfg"]["model"]["modalities"]
    stored = from_dict(audio)
    assert set(stored.recipe.modalities) == {"audio", "image"}
    weights = audio["model"]
    name = "modality_encoders.IMAGE.context_encoder.blocks.1.attn.qkv.weight"
    assert torch.equal(stored.tensors["encoders.image.context.blocks.1.attn.qkv.weight"], weights[name])
    ours = stored.tensors["teacher.encoders.image.context.extra_tokens"]
    assert torch.equal(ours, weights["_ema"]["modality_encoders.IMAGE.extra_tokens"])


def test_vocabulary_and_longest_text_are_rows_of_the_embeddings() -> None:
    """Whatever the configuration says of them: dictionaries lie elsewhere."""
    checkpoint = pretrained("text_cb4")
    checkpoint["cfg"]["model"]["modalities"]["text"]["max_source_positions"] = 512
    config = from_dict(checkpoint).recipe.modalities["text"]
    assert (config.vocabulary, config.max_tokens) == (100, 64)


# ---- how tensors and names may lie in a file ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_other_precisions_become_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    """The teacher's, which is fp32 in the file, stays what it is."""
    checkpoint = pretrained("image_cb4")
    for name, value in checkpoint["model"].items():
        if isinstance(value, Tensor):
            checkpoint["model"][name] = value.to(dtype)
    stored = read_fairseq(save(checkpoint, tmp_path))
    assert {tensor.dtype for tensor in stored.tensors.values()} == {torch.float32}
    expected = checkpoint["model"]["blocks.0.mlp.fc1.weight"].float()
    assert torch.equal(stored.tensors["blocks.0.mlp.fc1.weight"], expected)
    teacher = stored.tensors["teacher.blocks.0.mlp.fc1.weight"]
    assert torch.equal(teacher, checkpoint["model"]["_ema"]["blocks.0.mlp.fc1.weight"])


def test_views_and_shared_storages_become_tensors_of_their_own() -> None:
    """A transposed view, and two tensors that are one in the file."""
    checkpoint = pretrained("text_cb4")
    state = checkpoint["model"]
    weight = state["blocks.0.attn.proj.weight"]
    state["blocks.0.attn.proj.weight"] = weight.t().contiguous().t()
    state["blocks.1.attn.proj.bias"] = state["blocks.0.attn.proj.bias"]
    big = torch.cat([weight, weight])
    state["blocks.1.attn.proj.weight"] = big[32:]
    stored = from_dict(checkpoint)
    assert all(tensor.is_contiguous() for tensor in stored.tensors.values())
    assert torch.equal(stored.tensors["blocks.0.attn.proj.weight"], weight)
    ours = stored.tensors["blocks.1.attn.proj.weight"]
    assert torch.equal(ours, weight) and ours.untyped_storage().nbytes() == ours.numel() * 4


@pytest.mark.parametrize("where", ["nested", "flat", "top"])
def test_the_teacher_may_lie_in_three_places(where: str) -> None:
    checkpoint = pretrained("audio_cb4")
    expected = from_dict(pretrained("audio_cb4"))
    if where == "flat":
        checkpoint["model"] = flat(checkpoint["model"])
    elif where == "top":
        checkpoint["_ema"] = checkpoint["model"].pop("_ema")
    assert same(from_dict(checkpoint), expected)


def test_a_file_without_the_teacher_holds_the_student() -> None:
    checkpoint = pretrained("audio_cb4")
    del checkpoint["model"]["_ema"]
    stored = from_dict(checkpoint)
    assert stored.weights == "student" and not any(name.startswith(TEACHER) for name in stored.tensors)


def test_a_file_without_the_decoder_is_an_encoder() -> None:
    """All of the decoder must be gone: half of one is damage."""
    checkpoint = pretrained("audio_cb4")
    decoder = [name for name in checkpoint["model"] if ".decoder." in name]
    del checkpoint["model"][decoder[0]]
    with pytest.raises(ValueError, match=f"1 missing: {decoder[0]};"):
        from_dict(checkpoint)
    for name in decoder[1:]:
        del checkpoint["model"][name]
    assert not any(name.startswith("decoders.") for name in from_dict(checkpoint).tensors)


def test_old_names_of_positions_scale_and_mask_are_known() -> None:
    """Those that the original's own loaders tolerate."""
    image, audio = pretrained("image_cb4"), pretrained("audio_cb4")
    state, prefix = image["model"], "modality_encoders.IMAGE."
    state[f"{prefix}positional_encoder.pos_embed"] = state.pop(f"{prefix}fixed_positional_encoder.positions")
    state[f"{prefix}encoder_mask"] = torch.zeros(1, 1, 32)
    assert same(from_dict(image), from_dict(pretrained("image_cb4")))
    scale = "modality_encoders.AUDIO.alibi_scale"
    audio["model"][scale] = audio["model"][scale][0]
    assert audio["model"][scale].ndim == 4
    assert same(from_dict(audio), from_dict(pretrained("audio_cb4")))


def test_arguments_of_old_files_stand_for_the_configuration() -> None:
    """`args`, an argparse.Namespace, flat, with `arch` as the model's name."""
    checkpoint = pretrained("v1_audio")
    expected = from_dict(pretrained("v1_audio"))
    cfg = checkpoint.pop("cfg")
    flat_settings = cfg["model"] | cfg["optimization"] | {"normalize": True, "arch": cfg["model"]["_name"]}
    del flat_settings["_name"]
    checkpoint["args"] = flat_settings
    stored = from_dict(checkpoint)
    assert same(stored, expected) and stored.recipe.train.steps == 400_000


def test_a_namespace_in_a_file_is_read(tmp_path: Path) -> None:
    """Of argparse, without building one."""
    checkpoint = pretrained("v1_audio")
    checkpoint["args"] = argparse.Namespace(arch="data2vec_audio", **checkpoint.pop("cfg")["model"])
    assert same(read_fairseq(save(checkpoint, tmp_path)), from_dict(pretrained("v1_audio")))


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_does_not_name_its_model_is_known_by_its_settings(case: str) -> None:
    """Pre-trained or fine-tuned, where `_name` is empty or gone."""
    checkpoint, after = pretrained(case), tuned(case)
    checkpoint["cfg"]["model"]["_name"] = None
    assert from_dict(checkpoint).origin == from_dict(pretrained(case)).origin
    inner = TUNED[case][2]
    del after["cfg"]["model"]["_name"], after["cfg"]["model"][inner]["model"]["_name"]
    assert from_dict(after).origin == from_dict(tuned(case)).origin


# ---- fine-tuned models ----


@pytest.mark.parametrize("case", TUNED)
def test_a_fine_tuned_model_gives_its_logits(case: str) -> None:
    """Of the features of the same encoder, by the formula of the original's head."""
    checkpoint, features = tuned(case), None
    stored = from_dict(checkpoint)
    assert "fine-tuned" in stored.origin and "80 updates" in stored.origin and stored.step is None
    assert not any(name.startswith(("decoders.", TEACHER)) for name in stored.tensors)
    before = from_dict(pretrained(case))
    assert all(
        torch.equal(tensor, before.tensors[name])
        for name, tensor in stored.tensors.items()
        if not name.startswith("head.")
    )
    from d2v_ds.convert.check import outputs

    given = outputs(stored)
    features = next(v for k, v in given.items() if k.endswith("features"))
    torch.testing.assert_close(features, next(iter(outputs(before).values())))
    state, F = checkpoint["model"], torch.nn.functional
    if case == "image_cb4":
        pooled = F.layer_norm(features.mean(1), (32,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
        expected = pooled @ state["head.weight"].T + state["head.bias"]
    elif case == "text_cb4":
        prefix = "classification_heads.sentence_classification_head."
        get = lambda name: state[prefix + name]  # noqa: E731
        hidden = torch.tanh(features[:, 0] @ get("dense.weight").T + get("dense.bias"))
        expected = hidden @ get("out_proj.weight").T + get("out_proj.bias")
    else:
        expected = features @ state["w2v_encoder.proj.weight"].T + state["w2v_encoder.proj.bias"]
    torch.testing.assert_close(given["logits"], expected, rtol=1e-5, atol=1e-5)


def test_ctc_letters_come_from_the_dictionary_beside_the_file(tmp_path: Path) -> None:
    """If it has as many entries as the head; the specials come first."""
    path = save(tuned("audio_cb4"), tmp_path)
    assert read_fairseq(path).head.labels is None
    (tmp_path / "dict.ltr.txt").write_text("| 94802\nE 51860\nT 38431\nA 33152\nO 31495\n")
    assert read_fairseq(path).head.labels == ("<s>", "<pad>", "</s>", "<unk>", "|", "E", "T", "A", "O")
    (tmp_path / "dict.ltr.txt").write_text("| 94802\n")
    assert read_fairseq(path).head.labels is None


@pytest.mark.parametrize(
    ("labels", "again"),
    [
        (("<s>", "<pad>", "</s>", "<unk>", "|", "E", "T", "A", "\u00d6"), None),
        (
            ("<blank>", "<unk>", "<s>", "</s>", "\u2581a", "b", "<0x41>", "c", "d"),
            ("<blank>", "<pad>", "</s>", "<unk>"),
        ),
        (("<s>", "|", *"abcdefg"), ()),
    ],
)
def test_ctc_symbols_are_written_as_a_dictionary(tmp_path: Path, caplog, labels, again) -> None:
    """Letters, and pieces of sentencepiece, whose first four are no text either; others cannot be, which is said."""
    stored = read_fairseq(save(tuned("audio_cb4"), tmp_path))
    stored.head.labels = labels
    read = read_fairseq(write_fairseq(stored, tmp_path / "out")).head.labels
    if again == ():
        assert read is None and "here they are <s>, |, a, b; format safetensors" in caplog.text
    else:
        assert read == (labels if again is None else (*again, *labels[4:])) and not caplog.records


def test_masks_of_fine_tuning_do_not_stand_in_the_way() -> None:
    """A share of 0 is no mask of pre-training; features have none anyway."""
    checkpoint = tuned("audio_cb4")
    checkpoint["cfg"]["model"]["w2v_args"]["model"]["modalities"]["audio"] |= {
        "mask_prob": 0.0,
        "mask_length": 10,
    }
    assert from_dict(checkpoint).recipe.modalities["audio"].mask.length == 10


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        ("image_cb4", {"prediction_mode": "CLS_TOKEN"}, "prediction_mode='CLS_TOKEN' is not supported"),
        ("image_cb4", {"use_fc_norm": False}, "use_fc_norm=False is not supported"),
        ("audio_cb4", {"w2v_args": None}, "cfg.model.w2v_args is empty: the configuration of pre-training"),
    ],
)
def test_a_fine_tuned_model_of_another_kind_is_refused(case: str, change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_dict(changed(tuned(case), **change))


def test_a_fine_tuned_model_without_its_head_is_refused() -> None:
    checkpoint = tuned("audio_cb4")
    del checkpoint["model"]["w2v_encoder.proj.weight"]
    with pytest.raises(ValueError, match="has no tensor of its ctc head"):
        from_dict(checkpoint)


# ---- v1 text ----


def test_v1_text_has_the_teacher_of_its_layers() -> None:
    """What lies beside them in `_ema` are copies of the student's embeddings."""
    checkpoint = text_v1()
    stored = from_dict(checkpoint)
    config = stored.recipe.modalities["text"]
    assert (config.view, config.teacher, config.target.per_layer) == ("masked", "blocks", "layer")
    assert (config.mask.kind, config.mask.ratio, config.mask.length) == ("token_span", 0.35, 4)
    assert (config.vocabulary, config.max_tokens, config.loss.beta) == (61, 32, 4.0)
    state, average = checkpoint["model"], checkpoint["model"]["encoder._ema"]
    for prefix, source in (("", state), ("teacher.", average)):
        theirs = "encoder.sentence_encoder." * (source is state) + "layers.1.self_attn.{}_proj.weight"
        joined = torch.cat([source[theirs.format(letter)] for letter in "qkv"])
        assert torch.equal(stored.tensors[f"{prefix}blocks.1.attn.qkv.weight"], joined)
    assert not any(name.startswith("teacher.encoders") for name in stored.tensors)
    assert stored.step == 99


def test_a_v1_text_head_of_one_layer_is_read() -> None:
    """The default of its class; released models have two."""
    stored = from_dict(text_v1(head_layers=1))
    assert stored.tensors["decoders.text.proj.weight"].shape == (24, 24)


def test_a_v1_text_model_fine_tuned_on_sentences_is_read() -> None:
    """Its model keeps its name and has a head."""
    stored = from_dict(text_v1(head=True))
    assert stored.head.kind == "sentence_classification" and stored.head.outputs == 2
    assert stored.weights == "student" and "head.dense.weight" in stored.tensors


@pytest.mark.parametrize("is_flat", [False, True])
def test_a_v1_text_model_fine_tuned_inside_roberta_is_read(is_flat: bool, tmp_path: Path) -> None:
    """As fairseq's README fine-tunes it on GLUE: the tensors are those of `data2vec_text` with a head, the head of
    masked language, which nothing trained, is left out; settings of a command line may lie flat in `args`."""
    checkpoint = roberta()
    if is_flat:
        model = checkpoint.pop("cfg")["model"]
        checkpoint["args"] = argparse.Namespace(arch=model.pop("_name"), **model)
    stored = read_fairseq(save(checkpoint, tmp_path))
    expected = from_dict(text_v1(head=True))
    assert same(stored, expected) and stored.head == expected.head
    assert "data2vec_text in roberta, fine-tuned (sentence_classification, 99 updates)" in stored.origin
    body, config = stored.recipe.body, stored.recipe.modalities["text"]
    assert (body.heads, body.encoder_dropout, body.post_mlp_dropout) == (4, 0.2, 0.2)
    assert (config.target.top_k, config.target.per_layer, config.loss.beta) == (3, "layer", 4.0)
    assert (config.mask.ratio, config.mask.length, config.max_tokens) == (0.35, 4, 32)
    assert stored.recipe.ema.anneal_steps == 300_000  # of pre-training, not 5336 of fine-tuning


def test_sizes_that_a_roberta_does_not_say_are_its_architectures() -> None:
    """fairseq's command line sets dropouts alone; others than its tensors' are an error."""
    from d2v_ds.convert.fairseq_roberta import pretraining

    base = pretraining({"dropout": 0.1}, "roberta")["model"]["transformer"]["encoder"]
    large = pretraining({}, "roberta_large")["model"]["transformer"]["encoder"]
    assert [base[k] for k in ("layers", "embed_dim", "attention_heads")] == [12, 768, 12]
    assert [large[k] for k in ("layers", "ffn_embed_dim", "attention_heads")] == [24, 4096, 16]
    checkpoint = roberta()
    del checkpoint["cfg"]["model"]["encoder_layers"]
    with pytest.raises(ValueError, match="missing: encoder.sentence_encoder.layers.3.self_attn"):
        from_dict(checkpoint)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pooler_activation_fn": "relu"}, "pooler_activation_fn='relu' is not supported"),
        ({"encoder_layers_to_keep": "0,2"}, "encoder_layers_to_keep='0,2' is not supported"),
        ({"encoder_normalize_before": True}, "normalize_before=True is not supported"),
        ({"_name": "roberta_prenorm"}, "holds a model 'roberta_prenorm', which is no data2vec"),
        ({"encoder_layers": "3"}, "layers='3' must be a whole number"),
    ],
)
def test_a_roberta_that_is_no_data2vec_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_dict(changed(roberta(), **change))
    with pytest.raises(ValueError, match="'roberta' without a head of sentences: RoBERTa, and no data2vec"):
        from_dict(roberta(head=False))


# ---- fairseq's port of v1 images ----


@pytest.mark.parametrize("is_whole", [False, True])
def test_fairseqs_port_of_v1_images_has_beits_tensors_and_settings_of_its_own(is_whole: bool) -> None:
    """eps 1e-5, targets and masks of the file; a teacher that is the encoder alone has the student's patches."""
    stored = from_dict(vision_port(is_whole))
    expected = from_dict({"model": beit(), "model_ema": {k: t + 1 for k, t in beit().items()}})
    live = ("teacher.encoders.image.local.", "teacher.encoders.image.context.extra_tokens")
    assert stored.tensors.keys() == expected.tensors.keys()
    for name, tensor in stored.tensors.items():
        is_live = name.startswith(live) and not is_whole
        assert torch.equal(tensor, expected.tensors[name.removeprefix(TEACHER) if is_live else name]), name
    body, image = stored.recipe.body, stored.recipe.modalities["image"]
    assert (body.norm_eps, body.heads, body.drop_path) == (1e-5, 4, (0.0, 0.1))
    assert (image.target.top_k, image.target.per_layer, image.target.final) == (2, "none", ("layer",))
    assert (image.target.source, image.loss.beta, image.mask.ratio) == ("block", 2.0, 0.5)
    assert (stored.recipe.ema.end, stored.recipe.ema.anneal_steps) == (0.9998, 375_300)
    assert (stored.origin, stored.step, stored.weights) == ("fairseq data2vec_vision", 12, "both")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_heads": 3}, "model.num_heads=3, but the tensors are of 4"),
        ({"image_size": 224}, "model.image_size=224, but the tensors are of 32"),
        ({"_name": "data2vec_image_classification"}, "whose head leaves out the first patch"),
    ],
)
def test_a_port_whose_settings_and_tensors_differ_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_dict(changed(vision_port(), **change))


def test_what_a_port_lacks_is_named_as_in_the_file() -> None:
    checkpoint = vision_port()
    for name in ("encoder.blocks.1.mlp.2.bias", "mask_emb"):
        del checkpoint["model"][name]
    del checkpoint["model"]["_ema"]["blocks.0.norm1.bias"]
    with pytest.raises(
        ValueError, match="3 missing: .*mask_emb.*encoder.blocks.1.mlp.2.bias.*_ema.encoder.blocks.0"
    ):
        from_dict(checkpoint)


# ---- BEiT-like files ----


@pytest.mark.parametrize("key", ["model", "module", "state_dict"])
def test_a_beit_like_file_is_read_by_the_shapes_of_its_tensors(key: str, tmp_path: Path) -> None:
    state = beit(side=4)
    path = save(
        {key: state, "optimizer": {"state": {}}, "epoch": 799}, tmp_path, "mp_rank_00_model_states.pt"
    )
    stored = read_fairseq(path)
    body, config = stored.recipe.body, stored.recipe.modalities["image"]
    assert (body.dim, body.depth, body.heads, body.mlp_ratio) == (24, 3, 4, 4.0)
    assert (body.norm_first, body.qkv_bias, body.norm_eps) == (True, "qv", 1e-6)
    assert (config.size, config.patch, config.channels, config.positions) == (32, 8, 3, "relative")
    assert stored.tensors["encoders.image.context.relative_bias"].shape == (1, 52, 4)
    assert torch.equal(stored.tensors["blocks.2.scale1"], state["blocks.2.gamma_1"])
    assert torch.equal(stored.tensors["decoders.image.proj.weight"], state["lm_head.weight"])
    assert config.data.mean == (0.485, 0.456, 0.406)


def test_a_fine_tuned_beit_like_file_has_a_table_for_each_block() -> None:
    """Without mask token and last norm; the head reads the block's output."""
    from d2v_ds.convert.check import outputs

    state = beit(is_tuned=True, per_block=True)
    stored = from_dict({"module": state})
    table = stored.tensors["encoders.image.context.relative_bias"]
    assert stored.recipe.modalities["image"].positions == "relative_per_block"
    assert torch.equal(table[2], state["blocks.2.attn.relative_position_bias_table"])
    assert stored.head.outputs == 5 and "norm.weight" not in stored.tensors
    given = outputs(stored)
    features = given["image features"]
    norm = torch.nn.functional.layer_norm(
        features.mean(1), (24,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6
    )
    torch.testing.assert_close(given["logits"], norm @ state["head.weight"].T + state["head.bias"])
    assert stored.recipe.modalities["image"].data.mean == (0.5, 0.5, 0.5)


def test_a_copy_of_the_average_in_a_beit_like_file_is_the_teacher() -> None:
    average = {name: tensor + 1 for name, tensor in beit().items()}
    stored = from_dict({"model": beit(), "model_ema": average})
    assert stored.weights == "both"
    assert torch.equal(stored.tensors["teacher.blocks.0.mlp.fc1.bias"], average["blocks.0.mlp.fc1.bias"])


def test_relative_positions_in_the_file_are_compared_with_ours() -> None:
    """Rows of the index are read as BEiT orders them, or not at all."""
    state = beit(side=3)
    side, last = 3, 5 * 5
    index = torch.zeros(10, 10, dtype=torch.long)
    for a in range(9):
        for b in range(9):
            down, right = a // side - b // side + side - 1, a % side - b % side + side - 1
            index[1 + a, 1 + b] = down * (2 * side - 1) + right
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    state["rel_pos_bias.relative_position_index"] = index
    from_dict({"model": state})
    index[1, 2], index[1, 3] = index[1, 3].item(), index[1, 2].item()
    with pytest.raises(ValueError, match="relative_position_index orders relative positions in another way"):
        from_dict({"model": state})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rel_pos_bias.relative_position_bias_table": None}, "number of heads, image size or width cannot"),
        ({"rel_pos_bias.relative_position_bias_table": torch.zeros(50, 4)}, "of no square grid"),
        ({"rel_pos_bias.relative_position_bias_table": torch.zeros(52, 5)}, "heads must divide the width"),
        ({"pos_embed": torch.zeros(1, 17, 24)}, "absolute positions is no data2vec v1 model"),
        ({"blocks.1.gamma_1": None}, "1 missing: blocks.1.gamma_1"),
        ({"blocks.1.attn.extra": torch.zeros(3)}, "1 unexpected: blocks.1.attn.extra"),
        ({"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}, "has a head but no fc_norm"),
    ],
)
def test_a_beit_like_file_whose_sizes_cannot_be_told_is_refused(change: dict, reason: str) -> None:
    state = {name: tensor for name, tensor in (beit() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=reason):
        from_dict({"model": state})


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_norm_first": True}, "loses the residual"),
        ({"shared_decoder": {"decoder_dim": 384}}, "shared_decoder"),
        ({"norm_affine": False}, "norm_affine=False is not supported"),
        ({"recon_loss": 0.1}, "recon_loss=0.1 is not supported"),
        ({"d2v_loss": 0.5}, "d2v_loss=0.5 is not supported"),
        ({"embed_dim": 33}, "multiple of body.heads"),
        ({"depth": 5}, "missing: blocks.4.attn.qkv.weight"),
        ({"depth": 3, "average_top_k_layers": 2}, "24 unexpected: _ema.blocks.3.attn.proj.bias"),
        ({"mlp_ratio": 2.0}, r"of another shape: blocks.0.mlp.fc1.weight \(128, 32\) instead of \(64, 32\)"),
        ({"depth": "many"}, "depth"),
        ({"_name": "wav2vec2"}, "holds a model 'wav2vec2', which is no data2vec"),
        ({"_name": "roberta_base"}, "holds a model 'roberta_base' without a head of sentences"),
        ({"_name": "wav2vec2"}, "holds a model 'wav2vec2', which is no data2vec"),
    ],
)
def test_a_configuration_that_we_do_not_have_is_refused_with_the_setting(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_dict(changed(pretrained("audio_cb4"), **change))


@pytest.mark.parametrize(
    ("case", "setting", "value"),
    [
        ("image_cb4", "fixed_positions", False),
        ("image_cb4", "transformer_decoder", True),
        ("image_cb4", "embed_dim", 48),
        ("image_cb4", "use_alibi_encoder", True),
        ("audio_cb4", "extractor_mode", "default"),
        ("audio_cb4", "learned_alibi", True),
        ("text_cb4", "learned_pos", False),
        ("text_cb4", "no_scale_embedding", False),
    ],
)
def test_a_modalitys_setting_that_changes_features_is_refused(case: str, setting: str, value: Any) -> None:
    checkpoint = pretrained(case)
    checkpoint["cfg"]["model"]["modalities"][case.split("_")[0]][setting] = value
    with pytest.raises(ValueError, match="released|supported"):
        from_dict(checkpoint)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("layer_norm_first", True),
        ("extractor_mode", "default"),
        ("pos_conv_depth", 1),
        ("conv_bias", True),
        ("activation_fn", "relu"),
        ("ema_transformer_only", False),
    ],
)
def test_a_setting_of_v1_that_we_do_not_have_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=setting):
        from_dict(changed(pretrained("v1_audio"), **{setting: value}))


def settings(section: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in section.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from settings(value, (*path, key))


@pytest.mark.parametrize("make", [lambda: pretrained("image_cb4"), text_v1])
@pytest.mark.parametrize("value", [None, "x", -1, [1, 2], 10**9])
def test_a_damaged_setting_is_an_error_or_of_no_use(make: Callable, value: Any) -> None:
    """Each setting in turn of another kind or size: never another exception, a hang or memory without end."""
    checkpoint, refused = make(), 0
    for path in list(settings(checkpoint["cfg"])):
        damaged = checkpoint | {"cfg": copy.deepcopy(checkpoint["cfg"])}
        section = damaged["cfg"]
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        try:
            from_dict(damaged)
        except ValueError as error:
            refused += 1
            assert str(error)
    assert refused > 5


def break_missing(state: dict[str, Any]) -> None:
    del state["blocks.2.norm1.weight"], state["blocks.0.attn.proj.bias"]


def break_unexpected(state: dict[str, Any]) -> None:
    state["quantizer.vars"] = torch.zeros(3)
    state["modality_encoders.AUDIO.alibi_bias"] = torch.zeros(3)


def break_teacher(state: dict[str, Any]) -> None:
    del state["_ema"]["blocks.1.mlp.fc1.weight"]


def break_kind(state: dict[str, Any]) -> None:
    state["blocks.0.attn.proj.bias"] = state["blocks.0.attn.proj.bias"].long()


def break_value(state: dict[str, Any]) -> None:
    state["blocks.0.attn.proj.bias"] = 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (break_missing, "2 missing: blocks.0.attn.proj.bias, blocks.2.norm1.weight"),
        (break_unexpected, "2 unexpected: quantizer.vars, modality_encoders.AUDIO.alibi_bias"),
        (break_teacher, "1 missing: _ema.blocks.1.mlp.fc1.weight"),
        (break_kind, "blocks.0.attn.proj.bias holds torch.int64"),
        (break_value, "values that are no tensors: blocks.0.attn.proj.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change: Callable, reason: str, tmp_path: Path) -> None:
    """With the file's name."""
    checkpoint = pretrained("audio_cb4")
    change(checkpoint["model"])
    path = save(checkpoint, tmp_path)
    with pytest.raises(ValueError, match=reason) as error:
        read_fairseq(path)
    assert str(path) in str(error.value)


def test_what_is_missing_is_named_as_in_the_file() -> None:
    """With the prefix of fine-tuning, relative to the teacher, one of three projections."""
    audio, text, v1 = tuned("audio_cb4"), pretrained("text_cb4"), pretrained("v1_audio")
    head = text_v1(head=True)
    for checkpoint, name in (
        (audio, "w2v_encoder.w2v_model.modality_encoders.AUDIO.relative_positional_encoder.5.0.bias"),
        (audio, "w2v_encoder.proj.bias"),
        (text, "_ema.2.norm1.bias"),
        (v1, "encoder.layers.1.self_attn.k_proj.weight"),
        (v1, "_ema.layers.0.fc1.bias"),
        (text_v1(), "encoder._ema.layers.2.self_attn.q_proj.bias"),
        (head, "classification_heads.sentence_classification_head.dense.bias"),
    ):
        state, key = checkpoint["model"], name
        for part in ("_ema", "encoder._ema"):
            if name.startswith(f"{part}."):
                state, key = state[part], name.removeprefix(f"{part}.")
        kept = state.pop(key)
        with pytest.raises(ValueError, match=f"1 missing: {name};"):
            from_dict(checkpoint)
        state[key] = kept


def test_positions_other_than_ours_are_refused() -> None:
    """One row moved, in the student or in the teacher; half precision is no move."""
    name = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    checkpoint = pretrained("image_cb4")
    checkpoint["model"][name] = checkpoint["model"][name].half()
    from_dict(checkpoint)
    for state in (checkpoint["model"], checkpoint["model"]["_ema"]):
        kept = state[name]
        state[name] = kept.roll(1, dims=1)
        with pytest.raises(ValueError, match="holds other positions than 2-d sines of 8 x 8"):
            from_dict(checkpoint)
        state[name] = kept


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "holds no model: .* this has epoch"),
        ({"model": {}}, "holds no model"),
        ({"model": {"feature_extractor.x": torch.zeros(2)}}, "holds no configuration .* feature_extractor.x"),
        ({"encoder.weight": torch.zeros(2)}, "holds no configuration"),
        (
            {"cfg": {"model": {"_name": "data2vec_multi"}}, "model": {"a": torch.zeros(1)}},
            "no modality_encoders",
        ),
        (
            {"cfg": {"model": {"_name": "data2vec_text"}}, "model": {"a": torch.zeros(1)}},
            "embed_tokens.weight",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(content: Any, reason: str, tmp_path: Path, capsys: Any) -> None:
    """By the command in one line, and nothing is written."""
    path = save(content, tmp_path)
    with pytest.raises(ValueError, match=reason):
        read_fairseq(path)
    assert main(["import", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def shared(levels: int) -> list:
    """A list of twice the same list of twice ...: 2**levels parts to whoever walks it."""
    tree: list = [1]
    for _ in range(levels):
        tree = [tree, tree]
    return tree


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"more": shared(60)}, None),
        ({f"a{i}": [f"${{model.a{i + 1}}}"] * 2 for i in range(60)}, None),
        ({f"a{i}": f"${{model.a{i + 1}}}" for i in range(5000)}, "refer to each other more often"),
        ({"more": "${model}", "again": "${model.again}"}, None),
        ({"embed_dim": shared(60)}, "embed_dim=.{,99} must be a whole number"),
        ({"shared_decoder": shared(60)}, "shared_decoder=.{,99} is not supported"),
        ({"_name": shared(60)}, "holds a model .{,99}, which is no data2vec"),
        ({"embed_dim": 10**400}, "embed_dim=.{,99} must be a whole number"),
        ({"ema_decay": torch.zeros(3)}, "ema_decay=.*tensor.* must be a number"),
        ({"layer_norm_first": torch.zeros(3)}, "layer_norm_first=.* must be true or false"),
    ],
)
def test_settings_of_a_malicious_file_take_no_time(change: dict, reason: str | None, tmp_path: Path) -> None:
    path = save(changed(pretrained("audio_cb4"), **change), tmp_path)
    started = time.process_time()
    if reason is None:
        assert same(read_fairseq(path), from_dict(pretrained("audio_cb4")))
    else:
        with pytest.raises(ValueError, match=reason):
            read_fairseq(path)
    assert time.process_time() - started < 3


@pytest.mark.parametrize("shape", [(), (0,), (2, 2), (1, 1, 1, 1, 1)])
def test_a_tensor_of_any_other_shape_is_an_error(shape: tuple[int, ...]) -> None:
    """Also of those that sizes are read off, and of thirds of a projection: not one crash."""
    text = "encoder.sentence_encoder."
    for make, names in (
        (lambda: {"model": beit()}, ("cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")),
        (lambda: {"model": beit()}, ("rel_pos_bias.relative_position_bias_table",)),
        (vision_port, ("cls_emb", "encoder.blocks.0.mlp.0.weight")),
        (roberta, (f"{text}embed_tokens.weight", f"{text}embed_positions.weight")),
        (roberta, (f"{text}layers.0.self_attn.q_proj.weight",)),
        (roberta, ("classification_heads.sentence_classification_head.out_proj.weight",)),
        (lambda: tuned("image_cb4"), ("head.weight", "model.blocks.0.attn.qkv.weight")),
        (lambda: pretrained("v1_audio"), ("mask_emb", "post_extract_proj.weight")),
    ):
        for name in names:
            checkpoint = make()
            checkpoint["model"][name] = torch.zeros(shape)
            with pytest.raises(ValueError):
                from_dict(checkpoint)


def test_a_name_that_is_no_text_is_an_error() -> None:
    checkpoint = pretrained("text_cb4")
    checkpoint["model"][5] = torch.zeros(1)
    with pytest.raises(ValueError, match="tensors without a name or a dimension: 5"):
        from_dict(checkpoint)


def test_names_and_counts_of_a_malicious_file_take_no_time() -> None:
    one = torch.zeros(1)
    checkpoint = pretrained("audio_cb4")
    checkpoint["cfg"]["model"]["modalities"]["audio"]["feature_encoder_spec"] = "[" * 1_000_000
    started = time.process_time()
    with pytest.raises(ValueError, match="feature_encoder_spec of 1000000 characters"):
        from_dict(checkpoint)
    for per_block in (False, True):
        state = beit(per_block=per_block) | {"blocks.99999999999.gamma_1": one}
        with pytest.raises(ValueError, match="has 4 blocks, and none of number 3"):
            from_dict({"model": state})
    with pytest.raises(ValueError, match="a model of 30000 tensors, more than any has"):
        from_dict({"model": {f"blocks.{i}.norm1.weight": one for i in range(30_000)}})
    checkpoint = pretrained("audio_cb4")
    checkpoint["model"]["modality_encoders.AUDIO.alibi_scale"] = one
    with pytest.raises(ValueError, match="1 of another shape: modality_encoders.AUDIO.alibi_scale"):
        from_dict(checkpoint)
    assert time.process_time() - started < 3


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(pretrained("text_cb4"), tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read"):
        read_fairseq(path)


def test_sound_that_was_not_normalised_is_said() -> None:
    checkpoint = pretrained("v1_audio")
    checkpoint["cfg"]["task"]["normalize"] = False
    assert "not normalised" in from_dict(checkpoint).origin
