"""transformers' own classes of data2vec v1: the same weights give the same hidden states there and here, and folders
of them are read and written without a bit changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import d2v_ds
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.huggingface import read_huggingface, write_huggingface
from d2v_ds.convert.load import Encoder, read
from d2v_ds.model.batch import Batch, make_masked
from d2v_ds.model.data2vec import Data2Vec

transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-6
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
CONVS = {
    "conv_dim": [12] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 5,
    "conv_pos_kernel_size": 19,
}
KEYS = {"audio": "input_values", "image": "pixel_values", "text": "input_ids"}


def config_of(modality: str, **changes):
    if modality == "audio":
        return transformers.Data2VecAudioConfig(**(SIZES | CONVS | {"vocab_size": 7} | changes))
    if modality == "text":
        sizes = SIZES | {"vocab_size": 80, "max_position_embeddings": 50, "layer_norm_eps": 1e-5}
        return transformers.Data2VecTextConfig(**(sizes | changes))
    sizes = SIZES | {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "use_mask_token": True}
    positions = {"use_shared_relative_position_bias": True, "use_mean_pooling": False}
    return transformers.Data2VecVisionConfig(**(sizes | positions | changes))


PLAIN = {"audio": "Data2VecAudioModel", "text": "Data2VecTextModel", "image": "Data2VecVisionModel"}
WITH_HEAD = {
    "audio": "Data2VecAudioForCTC",
    "text": "Data2VecTextForSequenceClassification",
    "image": "Data2VecVisionForImageClassification",
}


def build(name: str, modality: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A class of transformers with random weights, biases and norms moved too; without token types, as data2vec is."""
    torch.manual_seed(seed)
    extra = {"add_pooling_layer": False} if name == "Data2VecTextModel" else {}
    model = getattr(transformers, name)(config_of(modality, **changes), **extra).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
            if "token_type" in key:
                parameter.zero_()
    return model


def source(modality: str, samples: int = 2, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if modality == "audio":
        return torch.randn(samples, 9000, generator=g)
    if modality == "image":
        return torch.randn(samples, 3, 32, 32, generator=g)
    return torch.randint(4, 79, (samples, 20), generator=g)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """What save_pretrained writes, of each plain class and of each with a head."""
    made = {}
    for modality in PLAIN:
        for name in (PLAIN[modality], WITH_HEAD[modality]):
            made[name] = tmp_path_factory.mktemp(name)
            changes = {"num_labels": 5} if "Classification" in name else {}
            if name == WITH_HEAD["image"]:
                changes |= {"use_mean_pooling": True}
            build(name, modality, **changes).save_pretrained(made[name])
    return made


@torch.no_grad()
def our_states(model: Data2Vec, batch: Batch) -> list[torch.Tensor]:
    """The first block's input and every block's output, extra tokens included."""
    encoder = model.encoders[batch.modality]
    first, _, _ = encoder.context(encoder.local(batch.source), batch, False)
    outputs, _ = model.eval().encode(batch)
    return [first, *outputs]


def assert_equal_states(ours: list[torch.Tensor], theirs: tuple[torch.Tensor, ...], real=...) -> None:
    assert len(ours) == len(theirs) == 4
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert (x[real] - y[real]).abs().max() < TOLERANCE, f"hidden state {i}"


# ---- the same weights, the same numbers ----


@pytest.mark.parametrize("modality", PLAIN)
def test_all_hidden_states_are_those_of_transformers(modality, folders):
    model = getattr(transformers, PLAIN[modality]).from_pretrained(folders[PLAIN[modality]]).eval()
    encoder = d2v_ds.load(folders[PLAIN[modality]])
    x = source(modality)
    with torch.no_grad():
        theirs = model(**{KEYS[modality]: x}, output_hidden_states=True)
    assert_equal_states(our_states(encoder.model, Batch(modality, x)), theirs.hidden_states)
    last = encoder.model.norm(our_states(encoder.model, Batch(modality, x))[-1])
    assert (last - theirs.last_hidden_state).abs().max() < TOLERANCE


def test_hidden_states_of_padded_sound_are_those_of_transformers_in_fairseqs_way(folders):
    """Real frames; transformers zeroes padding once, before the positional convolutions, as fairseq does."""
    model = transformers.Data2VecAudioModel.from_pretrained(folders["Data2VecAudioModel"]).eval()
    encoder = d2v_ds.load(folders["Data2VecAudioModel"], fairseq_compat=True)
    rows = [row[:length] for row, length in zip(source("audio", 3), (9000, 7000, 5300), strict=True)]
    batch = encoder.samples.pad(rows)
    mask = torch.arange(9000)[None] < torch.tensor([[9000], [7000], [5300]])
    with torch.no_grad():
        theirs = model(batch.source, attention_mask=mask.long(), output_hidden_states=True)
    assert_equal_states(our_states(encoder.model, batch), theirs.hidden_states, ~batch.padding_BT)


def test_hidden_states_of_padded_text_are_those_of_transformers(folders):
    """Real tokens."""
    model = transformers.Data2VecTextModel.from_pretrained(
        folders["Data2VecTextModel"], add_pooling_layer=False
    )
    encoder = d2v_ds.load(folders["Data2VecTextModel"])
    batch = encoder.samples.pad([row[:n] for row, n in zip(source("text", 3), (20, 13, 7), strict=True)])
    with torch.no_grad():
        theirs = model.eval()(
            batch.source, attention_mask=(~batch.padding_BT).long(), output_hidden_states=True
        )
    assert_equal_states(our_states(encoder.model, batch), theirs.hidden_states, ~batch.padding_BT)


@pytest.mark.parametrize("modality", ["audio", "image"])
def test_the_masked_student_is_that_of_transformers(modality, folders):
    """Mask embeddings in place, in training's way."""
    model = getattr(transformers, PLAIN[modality]).from_pretrained(folders[PLAIN[modality]]).eval()
    stored = read_huggingface(folders[PLAIN[modality]])
    ours = from_stored(stored)
    x = source(modality)
    tokens = {"audio": 27, "image": 16}[modality]
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(3)) < 0.4
    batch = Batch(modality, x, **make_masked(mask))
    with torch.no_grad():
        given = {"mask_time_indices": mask} if modality == "audio" else {"bool_masked_pos": mask}
        theirs = model(**{KEYS[modality]: x}, **given).last_hidden_state
        hidden = ours.see_views(batch, ours.encoders[modality].local(x))
        plain = model(**{KEYS[modality]: x}).last_hidden_state
    assert (
        hidden - theirs
    ).abs().max() < 2 * TOLERANCE  # equal mask embeddings side by side lose digits in norms
    assert (plain - theirs).abs().max() > 1e-2


def from_stored(stored) -> Data2Vec:
    """The whole model, decoders untrained."""
    from d2v_ds.modalities.build import build_model

    model = build_model(stored.recipe.body, stored.recipe.modalities, has_teacher=False)
    missing, unexpected = model.load_state_dict(stored.tensors, strict=False)
    assert not unexpected and all(name.startswith("decoders.") for name in missing)
    return model.eval()


@pytest.mark.parametrize("modality", PLAIN)
def test_a_heads_logits_are_those_of_transformers(modality, folders):
    name = WITH_HEAD[modality]
    model = getattr(transformers, name).from_pretrained(folders[name]).eval()
    encoder = d2v_ds.load(folders[name])
    x = source(modality, 1)
    with torch.no_grad():
        theirs = model(**{KEYS[modality]: x}).logits
        outputs, _ = encoder.model.encode(Batch(modality, x))
        extra = int(modality == "image")
        ours = encoder.head.eval()(encoder.model.norm(outputs[-1])[:, extra:])
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < TOLERANCE


def test_a_text_of_transformers_own_defaults_is_read_right(tmp_path):
    """eps 1e-12 in the embeddings too, and token types that are not zero: they go into the positions."""
    model = build("Data2VecTextModel", "text", layer_norm_eps=1e-12)
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight.normal_()
        for parameter in model.embeddings.word_embeddings.parameters():
            parameter *= 1e-3  # so that eps is seen
    model.save_pretrained(tmp_path)
    encoder = d2v_ds.load(tmp_path)
    assert encoder.recipe.modalities["text"].embed_norm_eps == 1e-12
    x = source("text")
    with torch.no_grad():
        theirs = model(x, output_hidden_states=True)
    assert_equal_states(our_states(encoder.model, Batch("text", x)), theirs.hidden_states)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_shared_relative_position_bias": False, "use_relative_position_bias": True},
        {"use_relative_position_bias": True},
        {"use_mean_pooling": True, "use_mask_token": False},
        {"layer_scale_init_value": 0.0},
    ],
    ids=["a table a layer", "both kinds of tables", "no last norm, no mask token", "no layer scale"],
)
def test_variants_of_vision_models_are_read_right(changes, tmp_path):
    model = build("Data2VecVisionModel", "image", **changes)
    model.save_pretrained(tmp_path)
    encoder = d2v_ds.load(tmp_path)
    x = source("image")
    with torch.no_grad():
        theirs = model(x, output_hidden_states=True)
    states = our_states(encoder.model, Batch("image", x))
    assert_equal_states(states, theirs.hidden_states)
    assert (encoder.model.norm(states[-1]) - theirs.last_hidden_state).abs().max() < TOLERANCE


# ---- files ----


@pytest.mark.parametrize("modality", PLAIN)
@pytest.mark.parametrize("has_head", [False, True], ids=["plain", "with head"])
def test_a_folder_read_and_written_again_has_equal_tensors(modality, has_head, folders, tmp_path):
    """To the bit, and transformers opens it as the same class."""
    name = (WITH_HEAD if has_head else PLAIN)[modality]
    stored = read_huggingface(folders[name])
    out = write_huggingface(stored, tmp_path / "again")
    before = load_file(folders[name] / "model.safetensors")
    after = load_file(out / "model.safetensors")
    types = "token_type_embeddings"  # of two kinds there, of one here: both zero
    before = {key: tensor for key, tensor in before.items() if types not in key}
    after = {key: tensor for key, tensor in after.items() if types not in key}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [name] and "auto_map" not in config
    again = read_huggingface(out)
    assert again.recipe.body == stored.recipe.body and again.head == stored.head
    assert all(torch.equal(again.tensors[key], stored.tensors[key]) for key in stored.tensors)


@pytest.mark.parametrize("form", ["pickle", "pickles", "parts"])
def test_weights_of_other_forms_are_read(form, folders, tmp_path):
    """pytorch_model.bin, in one or several, and safetensors in several; without a pickle being run."""
    source_folder = folders["Data2VecTextModel"]
    (tmp_path / "config.json").write_text((source_folder / "config.json").read_text())
    tensors = load_file(source_folder / "model.safetensors")
    name = "model.safetensors" if form == "parts" else "pytorch_model.bin"
    if form == "pickle":
        torch.save(tensors, tmp_path / name)
    else:
        stem, suffix = name.rsplit(".", 1)
        keys = sorted(tensors)
        halves = {f"{stem}-1.{suffix}": keys[::2], f"{stem}-2.{suffix}": keys[1::2]}
        for file, names in halves.items():
            part = {key: tensors[key] for key in names}
            torch.save(part, tmp_path / file) if form == "pickles" else save_file(part, tmp_path / file)
        index = {"weight_map": {key: file for file, names in halves.items() for key in names}}
        (tmp_path / f"{name}.index.json").write_text(json.dumps(index))
    expected, given = read_huggingface(source_folder).tensors, read_huggingface(tmp_path).tensors
    assert expected.keys() == given.keys()
    assert all(torch.equal(expected[key], given[key]) for key in expected)


def test_reading_needs_no_transformers_and_runs_no_code(folders, tmp_path):
    from runs import python, start

    folder = str(folders["Data2VecAudioForCTC"])
    code = (
        "import sys; sys.modules['transformers'] = None; import d2v_ds, torch; "
        f"e = d2v_ds.load({folder!r}); assert e.logits(torch.randn(16000)).shape == (1, 49, 7)"
    )
    start(python("-c", code))


def test_letters_and_the_blank_come_first(tmp_path):
    """A blank that is not output 0 there is so here, with its label."""
    model = build("Data2VecAudioForCTC", "audio", pad_token_id=3)
    model.save_pretrained(tmp_path)
    words = ["a", "b", "c", "<pad>", "d", "|", "e"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    encoder = d2v_ds.load(tmp_path)
    assert encoder.head_config.labels == ("<pad>", "a", "b", "c", "d", "|", "e")
    x = source("audio", 1)
    with torch.no_grad():
        theirs = model(x).logits
        outputs, _ = encoder.model.encode(Batch("audio", x))
        ours = encoder.head.eval()(outputs[-1])
    assert (ours - theirs[:, :, [3, 0, 1, 2, 4, 5, 6]]).abs().max() < TOLERANCE


def test_pixels_are_normalised_as_the_folder_says(folders, tmp_path):
    """By its processor; transformers' own 0.5 where it has the file but not the key."""
    stored = read_huggingface(folders["Data2VecVisionModel"])
    assert stored.recipe.modalities["image"].data.mean == (0.485, 0.456, 0.406)
    out = write_huggingface(stored, tmp_path / "again")
    path = out / "preprocessor_config.json"
    processor = json.loads(path.read_text())
    path.write_text(json.dumps(processor | {"image_mean": [0.1, 0.2, 0.3]}))
    assert read_huggingface(out).recipe.modalities["image"].data.mean == (0.1, 0.2, 0.3)
    del processor["image_std"]
    path.write_text(json.dumps(processor))
    assert read_huggingface(out).recipe.modalities["image"].data.std == (0.5, 0.5, 0.5)


def test_the_tokenizer_of_a_folder_goes_along(folders, tmp_path):
    """One of transformers is copied, and texts are read with it."""
    folder = change(folders["Data2VecTextModel"], tmp_path)
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "ab"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    out = write_huggingface(read_huggingface(folder), tmp_path / "again")
    assert {"vocab.json", "merges.txt"} <= {path.name for path in out.iterdir()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("ab")["input_ids"] == [0, 6, 2]
    assert torch.equal(d2v_ds.load(out).extract("ab"), d2v_ds.load(folder).extract([0, 6, 2]))


# ---- what cannot be read ----


def change(folder: Path, tmp_path: Path, **changes) -> Path:
    """The folder with other settings."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Data2VecAudioModel", {"model_type": "wav2vec2"}, "model_type 'wav2vec2'.*read with data2vec-audio"),
        ("Data2VecAudioModel", {"conv_bias": True}, "conv_bias=True is not supported, only False"),
        ("Data2VecAudioModel", {"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'gelu'"),
        ("Data2VecAudioModel", {"num_hidden_layers": 4}, "says 4 layers, the weights have 3"),
        ("Data2VecAudioModel", {"num_conv_pos_embeddings": 6}, r"missing: encoder\.pos_conv_embed\.layers\.5\."),
        ("Data2VecTextModel", {"vocab_size": 90}, r"word_embeddings.weight \(80, 32\) instead of \(90, 32\)"),
        ("Data2VecTextModel", {"architectures": ["Data2VecTextForMaskedLM"]}, "holds a Data2VecTextForMaskedLM"),
        ("Data2VecVisionModel", {"use_shared_relative_position_bias": False}, "positions relative"),
        ("Data2VecVisionModel", {"num_attention_heads": 5}, "heads"),
    ],
)  # fmt: skip
def test_another_model_is_an_error_that_names_it(name, changes, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_huggingface(change(folders[name], tmp_path, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Data2VecAudioForCTC", "Data2VecTextModel", "Data2VecVisionForImageClassification"]
)
def test_any_odd_setting_is_an_error_or_changes_nothing(name, folders, tmp_path):
    """Never another exception, endless memory, or other weights."""
    folder = change(folders[name], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    expected = read_huggingface(folder).tensors
    refused = 0
    for key in config:
        for value in (None, "x", -1, 10**12, []):
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                given = read_huggingface(folder).tensors
            except ValueError:
                refused += 1
                continue
            same = {k for k in given if k in expected and torch.equal(given[k], expected[k])}
            assert same == given.keys() or key == "pad_token_id", f"{key}={value!r}"
    assert refused > 40


def test_damaged_and_absent_weights_are_errors(folders, tmp_path):
    folder = change(folders["Data2VecTextModel"], tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        read_huggingface(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has neither model.safetensors nor pytorch_model.bin"):
        read_huggingface(folder)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names '../elsewhere.safetensors', which is no file in the folder"):
        read_huggingface(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, must hold settings by name"):
        read_huggingface(folder)


def test_a_malicious_pickle_is_refused_with_the_name_of_what_it_wanted(folders, tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.system, ("echo > " + str(tmp_path / "owned"),)

    (tmp_path / "config.json").write_text((folders["Data2VecTextModel"] / "config.json").read_text())
    torch.save({"embeddings.LayerNorm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="system"):
        read_huggingface(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_the_encoder_says_what_it_was_loaded_from(folders):
    encoder = d2v_ds.load(folders["Data2VecAudioModel"])
    assert isinstance(encoder, Encoder)
    assert "Hugging Face folder, Data2VecAudioModel" in repr(encoder)


@torch.no_grad()
def test_the_norm_of_a_classifier_has_the_folders_eps(tmp_path):
    """Far from the head's own, so that it is seen; and it stays in an export of ours."""
    model = build("Data2VecVisionForImageClassification", "image", num_labels=5, use_mean_pooling=True,
                  layer_norm_eps=0.1)  # fmt: skip
    model.save_pretrained(tmp_path / "theirs")
    x = source("image")
    for folder in (tmp_path / "theirs", write_export(read(tmp_path / "theirs"), tmp_path / "ours")):
        assert torch.allclose(d2v_ds.load(folder).logits(x), model(x).logits, atol=1e-5)
