"""The names that users of fairseq know give the recorded features, and load weights under either library's names."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from d2v_ds import D2vModalitiesConfig, Data2VecMultiConfig, Data2VecMultiModel
from d2v_ds.multi import D2vAudioConfig, D2vImageConfig, D2vTextConfig

GOLDEN = Path(__file__).parent / "golden"
MODALITIES = ("image", "audio", "text")
PARTS = {"image": D2vImageConfig, "audio": D2vAudioConfig, "text": D2vTextConfig}
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}


class Modality(Enum):
    """As fairseq's."""

    AUDIO = 1
    IMAGE = 2
    TEXT = 3


def recorded_config(name: str) -> Data2VecMultiConfig:
    """The settings of a recorded case, every one under fairseq's name."""
    settings = json.loads((GOLDEN / f"{name}_cb4.json").read_text())["resolved_config"]
    part = settings.pop("modalities")[name] | ({"vocabulary": 100} if name == "text" else {})
    return Data2VecMultiConfig(**settings, modalities=D2vModalitiesConfig(**{name: PARTS[name](**part)}))


def recorded_state(name: str) -> dict:
    """As fairseq saves it: the teacher in a dict of its own."""
    weights = load_file(GOLDEN / f"{name}_cb4.weights.safetensors")
    teacher = {k.removeprefix("_ema."): t for k, t in weights.items() if k.startswith("_ema.")}
    return {k: t for k, t in weights.items() if not k.startswith("_ema.")} | {"_ema": teacher}


def recorded_model(name: str, **options) -> Data2VecMultiModel:
    model = Data2VecMultiModel(recorded_config(name), modalities=[name], **options)
    model.load_state_dict(recorded_state(name))
    return model.eval()


def build_small(*names: str, **options) -> Data2VecMultiModel:
    return Data2VecMultiModel(Data2VecMultiConfig(**SMALL), modalities=list(names), **options).eval()


def source_of(name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name == "text":
        return torch.randint(4, 100, (2, 9), generator=generator)
    return torch.randn(*{"image": (2, 3, 224, 224), "audio": (2, 8000)}[name], generator=generator)


# ---- the calls, word for word ----


def test_the_call_of_the_tutorial_builds_the_released_image_model():
    """ViT-B: 12 blocks of width 768, patches of 16, a class token; weights of it load, under our names here."""
    from d2v_ds import D2vModalitiesConfig, Data2VecMultiConfig, Data2VecMultiModel

    model = Data2VecMultiModel(Data2VecMultiConfig(), modalities=D2vModalitiesConfig.image)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    model.eval()
    teacher = {n: p for n, p in model.named_parameters() if n.startswith("teacher.")}
    assert (len(teacher), sum(p.numel() for p in teacher.values())) == (149, 85_797_888 - 196 * 768)
    with torch.no_grad():
        res = model.extract_features(source_of("image")[:1], mode=None, mask=False)
    assert res["x"].shape == (1, 196, 768) and set(res) == {"x", "padding_mask", "layer_results", "mask"}


@pytest.mark.parametrize(
    "modalities",
    [D2vModalitiesConfig.audio, [Modality.AUDIO], "audio", ["AUDIO"], D2vModalitiesConfig().audio, None],
)
def test_a_modality_may_be_named_in_every_way_that_is_in_use(modalities):
    cfg = Data2VecMultiConfig(**SMALL, supported_modality=Modality.AUDIO)
    model = Data2VecMultiModel(cfg, modalities=modalities, skip_ema=True).eval()
    for mode in (None, Modality.AUDIO, "AUDIO", "audio"):
        assert model.extract_features(source_of("audio"), mode=mode)["x"].shape == (2, 24, 48)


def test_settings_of_a_modality_stand_in_the_configuration_or_in_the_modality():
    """As in fairseq's own and in its followers' code."""
    part = D2vImageConfig(input_size=64, patch_size=8, num_extra_tokens=2, prenet_depth=1)
    cfg = Data2VecMultiConfig(**SMALL, modalities=D2vModalitiesConfig(image=part))
    for model in (
        Data2VecMultiModel(cfg, modalities=[Modality.IMAGE], skip_ema=True),
        Data2VecMultiModel(Data2VecMultiConfig(**SMALL), modalities=part, skip_ema=True),
    ):
        pixels = torch.randn(2, 3, 64, 64)
        assert model.extract_features(pixels)["x"].shape == (2, 64, 48)
        assert model.extract_features(pixels, remove_extra_tokens=False)["x"].shape == (2, 66, 48)
        assert len(model.encoders["image"].context.blocks) == 1 and len(model.blocks) == 2


# ---- numbers ----


def test_modalities_may_be_dicts_as_in_yaml_files():
    """The released section as it stands but for sizes; what it does not say is as released."""
    section = json.loads((GOLDEN / "image_cb4.json").read_text())["released_model_section"]
    section |= SMALL | {"average_top_k_layers": 2, "_name": "data2vec_multi"}
    section["modalities"] = {"_name": None, "image": section["modalities"]["image"] | {"patch_size": 32}}
    model = Data2VecMultiModel(Data2VecMultiConfig(**section))
    assert model.configs["image"].patch == 32 and model.configs["image"].decoder.kernel == 3
    section["modalities"]["image"]["patchsize"] = 8
    with pytest.raises(ValueError, match="did you mean 'patch_size'"):
        Data2VecMultiModel(Data2VecMultiConfig(**section))
    with pytest.raises(ValueError, match="modalities has no 'images'; did you mean 'image'"):
        Data2VecMultiModel(Data2VecMultiConfig(modalities={"images": {}}), "image")


@pytest.mark.parametrize("name", MODALITIES)
@torch.no_grad()
def test_features_are_the_recorded_ones(name):
    """Of fairseq itself, padded batches too (as it pads: fairseq_compat), and every block's MLP output."""
    model = recorded_model(name, fairseq_compat=True)
    recorded = load_file(GOLDEN / f"{name}_cb4.tensors.safetensors")
    batches = sorted({key.split(".")[0] for key in recorded if ".feat.x" in key})
    for b in batches:
        source, padding = recorded[f"{b}.source"], recorded.get(f"{b}.padding_mask")
        source = source.long() if name == "text" else source
        res = model.extract_features(source, padding_mask=None if padding is None else padding.bool())
        real = slice(None) if res["padding_mask"] is None else ~res["padding_mask"]
        torch.testing.assert_close(res["x"][real], recorded[f"{b}.feat.x"][real], rtol=1e-4, atol=5e-5)
        extra = res["layer_results"][0].shape[1] - res["x"].shape[1]
        for i, layer in enumerate(res["layer_results"]):
            theirs = recorded[f"{b}.feat.layer_result.{i}"]
            torch.testing.assert_close(layer[:, extra:][real], theirs[:, extra:][real], rtol=1e-4, atol=5e-5)
        if padding is not None:
            assert torch.equal(res["padding_mask"], recorded[f"{b}.feat.padding_mask"].bool())
    assert batches


@torch.no_grad()
def test_a_padded_sound_is_what_it_is_alone_unless_fairseq_compat_is_asked():
    sounds = source_of("audio")
    padding = torch.arange(8000)[None] >= torch.tensor([8000, 5000])[:, None]
    padded = sounds.masked_fill(padding, 0)
    for compat in (False, True):
        model = recorded_model("audio", fairseq_compat=compat)
        alone = model.extract_features(sounds[1:, :5000])["x"][0]
        together = model.extract_features(padded, padding_mask=padding)
        assert together["padding_mask"].sum(dim=1).tolist() == [0, 24 - len(alone)]
        difference = (together["x"][1, : len(alone)] - alone).abs().max()
        assert difference > 1e-3 if compat else difference < 1e-5


def test_the_forward_call_with_features_only_is_the_same():
    model, source = build_small("text"), source_of("text")
    res = model(source, features_only=True, mask=False, mode="TEXT")
    assert torch.equal(res["x"], model.extract_features(source)["x"])
    assert res["x"].requires_grad  # a head may be trained on it, and what is below
    with pytest.raises(ValueError, match=r"a loss needs masks.*extract_features"):
        model(source)
    with pytest.raises(ValueError, match="mask=True is for training"):
        model(source, features_only=True)


@torch.no_grad()
def test_padded_token_ids_are_seen_without_a_mask():
    model, source = build_small("text"), source_of("text")
    padded = source.clone()
    padded[1, 5:] = 1
    res = model.extract_features(padded)
    assert res["padding_mask"].sum(dim=1).tolist() == [0, 4]
    torch.testing.assert_close(
        res["x"][1, :5], model.extract_features(source[1:, :5])["x"][0], rtol=1e-5, atol=1e-5
    )


# ---- weights ----


@pytest.mark.parametrize("name", MODALITIES)
def test_weights_load_under_fairseqs_names_and_under_ours(name):
    """Nested, flat, inside a whole checkpoint, or as the model gives them: always the same tensors."""
    expected = recorded_model(name).state_dict()
    flat = load_file(GOLDEN / f"{name}_cb4.weights.safetensors")
    whole, wrapped = {"model": recorded_state(name), "cfg": {}}, {f"module.{k}": t for k, t in flat.items()}
    for state in (flat, whole, wrapped, expected):
        model = Data2VecMultiModel(recorded_config(name), modalities=[name])
        missing, unexpected = model.load_state_dict(state)
        assert not missing and not unexpected
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_without_a_teacher_in_the_file_it_is_the_student_and_without_one_in_the_model_it_is_left_out():
    state = recorded_state("image")
    del state["_ema"]
    model = Data2VecMultiModel(recorded_config("image"), modalities=["image"])
    model.load_state_dict(state)
    for name, student, teacher in model.followed():
        assert torch.equal(student, teacher), name
    alone = Data2VecMultiModel(recorded_config("image"), modalities=["image"], skip_ema=True)
    alone.load_state_dict(recorded_state("image"))
    assert alone.teacher is None


def test_weights_that_do_not_fit_are_told():
    state = recorded_state("image")
    state["modality_encoders.IMAGE.sundial.weight"] = state.pop("blocks.0.norm1.bias")
    model = Data2VecMultiModel(recorded_config("image"), modalities=["image"])
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*blocks.0.norm1.bias.*Unexpected key.*sundial"):
        model.load_state_dict(state)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["blocks.0.norm1.bias"] and unexpected == ["modality_encoders.IMAGE.sundial.weight"]


def test_modules_of_pre_training_can_be_dropped():
    """As fairseq's fine-tuning does it; features stay."""
    model = build_small("audio", "text")
    source = source_of("audio")
    expected = model.extract_features(source, mode="AUDIO")["x"]
    model.remove_pretraining_modules(modality="audio")
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoders", "blocks"}
    assert torch.equal(model.extract_features(source)["x"], expected)


# ---- mistakes ----


def test_mistakes_are_told():
    def say(*arguments, **options) -> str:
        with pytest.raises(ValueError) as error:
            Data2VecMultiModel(*arguments, **options)
        return str(error.value)

    assert "no setting 'embed_dimm'; did you mean 'embed_dim'?" in say(
        Data2VecMultiConfig(embed_dimm=3), modalities="image"
    )
    assert "D2vImageConfig has no setting 'patch'" in say(
        Data2VecMultiConfig(), modalities=D2vImageConfig(patch=3)
    )
    assert "layer_norm_first=True is not supported" in say(
        Data2VecMultiConfig(layer_norm_first=True), modalities="image"
    )
    assert "'video' is unknown" in say(Data2VecMultiConfig(), modalities="video")
    assert "modalities=D2vModalitiesConfig.image" in say(Data2VecMultiConfig())
    model = build_small("audio", "text")
    with pytest.raises(ValueError, match="has audio, text; say which: mode='audio'"):
        model.extract_features(source_of("audio"))
