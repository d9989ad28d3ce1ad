"""A 2.0 model in transformers is the model in d2v_ds: from raw input through the folder's own processor to features."""

from __future__ import annotations

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from ranks import ROOT, SAMPLE
from runs import python, start
from safetensors.torch import load_file, save_file
from stores import MODALITIES, store, store_joint
from torch import Tensor

import d2v_ds
from d2v_ds.cli import main
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.huggingface import read_huggingface, write_huggingface
from d2v_ds.convert.huggingface.writer import TOLERANCE, check, quiet
from d2v_ds.convert.load import Encoder, build_encoder
from d2v_ds.convert.single import single
from d2v_ds.convert.stored import Stored

transformers = pytest.importorskip("transformers")

PROCESSORS = {"image": "AutoImageProcessor", "audio": "AutoFeatureExtractor", "text": "AutoTokenizer"}
FOR_TASK = {
    "image": "AutoModelForImageClassification",
    "audio": "AutoModelForCTC",
    "text": "AutoModelForSequenceClassification",
}
MODELING = ROOT / "d2v_ds" / "convert" / "huggingface" / "modeling_data2vec2.py"


def noise(seconds: float, seed: int, scale: float = 1.0) -> Tensor:
    wave = np.random.default_rng(seed).standard_normal(round(16_000 * seconds)) * scale + 0.01
    return torch.from_numpy(wave.astype(np.float32))


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (37, 41), dtype=np.uint16))
    return Image.fromarray(rng.integers(0, 256, (37, 41, 3), dtype=np.uint8)).convert(mode)


SPECIAL = {"<s>", "<pad>", "</s>", "<unk>"}
INPUTS = {
    "image": [picture(1), picture(2, "L"), picture(3, "RGBA"), picture(4, "I;16")],
    "audio": [noise(0.5, 1), noise(1.13, 2, 1e-3), noise(0.71, 3, 5.0)],
    "text": ["one", "the digit seven,  and a longer line after it", " na\u00efve \uff21 tab\t\u4e16\u754c"],
}


@pytest.fixture(scope="module")
def stores() -> dict[str, Stored]:
    return {name: store(name) for name in MODALITIES}


@pytest.fixture(scope="module")
def folders(stores, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("folders")
    return {name: write_huggingface(stored, out / f"of_{name}") for name, stored in stores.items()}


@pytest.fixture(scope="module")
def encoders(stores) -> dict[str, Encoder]:
    """Ours, of what is stored."""
    return {name: build_encoder(single(stored), name, Path("memory")) for name, stored in stores.items()}


def open_auto(folder: Path, auto: str = "AutoModel", **settings):
    with quiet():
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **settings)
    return model.eval() if hasattr(model, "eval") else model


def process(folder: Path, name: str, items: list, **options: str) -> dict[str, Tensor]:
    processor = open_auto(folder, PROCESSORS[name], **options)
    if name == "audio":
        return processor([w.numpy() for w in items], sampling_rate=16_000, padding=True, return_tensors="pt")
    if name == "image":
        return processor(items, return_tensors="pt")
    return processor(items, padding=True, truncation=True, return_tensors="pt")


# ---- the same features ----


@pytest.mark.parametrize("name", MODALITIES)
def test_raw_input_gives_the_features_of_extract(name, folders, encoders):
    """Through the folder's processor and AutoModel: every shared layer, the output and the pooled features; and
    through d2v_ds.load of the folder."""
    model = open_auto(folders[name])
    with torch.no_grad():
        output = model(**process(folders[name], name, INPUTS[name]), output_hidden_states=True)
    ours = encoders[name].extract(INPUTS[name], all=True)
    extra, real = int(name == "image"), ~ours.mask
    depth = len(ours.layers)
    assert (
        len(output.hidden_states) == model.config.num_hidden_layers + 1 == depth + 2
    )  # with one prenet block
    for layer, state in zip(ours.layers, output.hidden_states[-depth:], strict=True):
        assert (layer[real] - state[:, extra:][real]).abs().max() < 1e-5
    assert (ours.x[real] - output.last_hidden_state[:, extra:][real]).abs().max() < 1e-5
    assert (ours.pooled - output.pooler_output).abs().max() < 1e-5
    again = d2v_ds.load(folders[name]).extract(INPUTS[name])
    assert torch.equal(again, ours.x)


@pytest.mark.parametrize("name", ["audio", "text"])
def test_a_padded_batch_gives_what_each_sample_alone_gives(name, folders):
    """To 1e-5, every hidden state."""
    model = open_auto(folders[name])
    with torch.no_grad():
        together = model(**process(folders[name], name, INPUTS[name]), output_hidden_states=True)
        for row, item in enumerate(INPUTS[name]):
            alone = model(**process(folders[name], name, [item]), output_hidden_states=True)
            for state, single_state in zip(together.hidden_states, alone.hidden_states, strict=True):
                tokens = single_state.shape[1]
                assert (state[row, :tokens] - single_state[0]).abs().max() < 1e-5
            assert (together.pooler_output[row] - alone.pooler_output[0]).abs().max() < 1e-5


VARIANTS = [
    ("audio", "@.alibi.per_layer=true"),
    ("audio", "@.alibi.per_head=false"),
    ("audio", "@.alibi=null"),
    ("audio", "@.position_pre_norm=true"),
    ("audio", "@.position_width=8", "@.position_depth=2"),  # an even kernel
    ("audio", "@.extra_tokens=2"),
    ("audio", "fairseq_compat=true"),
    ("audio", "@.prenet_depth=0", "body.heads=3"),
    ("image", "@.prenet_depth=0"),
    ("image", "@.extra_tokens=3"),
    ("image", "@.extra_tokens=0", "@.loss.cls_weight=0"),
    ("image", "body.norm_first=true", "@.prenet_depth=0", "@.positions=relative"),
    ("image", "body.layer_scale=0.3", "body.qkv_bias=qv", "@.positions=relative_per_block", "@.prenet_depth=0"),
    ("text", "@.prenet_depth=0"),
    ("text", "@.embed_norm=false"),
    ("text", "@.extra_tokens=1"),
    ("text", "body.heads=1", "@.embed_norm_eps=1e-3"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_every_variant_is_written_and_read_back_to_the_bit(overrides, tmp_path):
    """Writing compares outputs by itself; what is read back is what was stored."""
    stored = store(*overrides)
    again = read_huggingface(write_huggingface(stored, tmp_path / "out"))
    assert again.recipe == stored.recipe and again.weights == "student" and again.step == 120
    kept = {
        name for name in stored.tensors if name.split(".")[0] not in ("teacher", "decoders")
    }  # what an encoder has
    assert again.tensors.keys() == kept
    assert all(torch.equal(again.tensors[name], stored.tensors[name]) for name in kept)


@pytest.mark.parametrize(
    ("name", "override"),
    [("audio", "@.alibi.per_layer=true"), ("image", "@.prenet_depth=0")],
)
def test_a_v1_variant_that_transformers_cannot_hold_gets_the_modeling_file(name, override, tmp_path):
    """And its card says why."""
    extra = ["@.alibi.scale=1.0", override] if name == "audio" else ["body.norm_first=false"]
    stored = store(f"{name}_v1_tiny", *extra)
    out = write_huggingface(stored, tmp_path / "out")
    assert (out / MODELING.name).is_file()
    assert "cannot hold this variant: it" in (out / "README.md").read_text()
    again = read_huggingface(out)
    assert all(torch.equal(again.tensors[key], stored.tensors[key]) for key in again.tensors)


@pytest.mark.parametrize("name", MODALITIES)
def test_v1_recipes_become_transformers_own_classes(name, tmp_path):
    """No code in the folder; its features are those of extract, one sample at a time."""
    stored = store(f"{name}_v1_tiny")
    out = write_huggingface(stored, tmp_path / "out")
    assert not list(out.glob("*.py"))
    model = open_auto(out)
    assert type(model).__module__.startswith("transformers.models.data2vec")
    encoder = build_encoder(single(stored), name, Path("memory"))
    exact = {
        "audio": [INPUTS["audio"][0], INPUTS["audio"][2]],
        "image": INPUTS["image"][:3],
        "text": INPUTS["text"],
    }
    exactly = {"backend": "pil"} if name == "image" else {}  # where torchvision is, that resizes otherwise
    for item in exact[
        name
    ]:  # transformers' own processors: 1e-7 for 1e-5 in quiet sounds, no 16-bit pictures
        with torch.no_grad():
            theirs = model(**process(out, name, [item], **exactly)).last_hidden_state[
                :, int(name == "image") :
            ]
        ours = encoder.extract(item)
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5 * ours.abs().max().clamp(
            min=1
        )


def test_loading_a_folder_here_runs_no_code_of_it(folders, tmp_path):
    """Not even for its tokenizer: the sentencepiece model gone, transformers reads tokenizer.json."""
    folder = shutil.copytree(folders["text"], tmp_path / "copy")
    (folder / "sentencepiece.model").unlink()
    (folder / MODELING.name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    given = d2v_ds.load(folder).extract("the digit seven")
    assert torch.equal(given, d2v_ds.load(folders["text"]).extract("the digit seven"))
    assert not (tmp_path / "ran").exists()


# ---- whose weights ----


def test_the_teachers_weights_are_written_when_asked_for(stores, tmp_path):
    """The student's, unsaid."""
    encoder = {
        weights: build_encoder(single(stores["image"], weights=weights), "image", Path("memory"))
        for weights in ("student", "teacher")
    }
    for weights, given in (("student", None), ("teacher", "teacher")):
        out = write_huggingface(stores["image"], tmp_path / weights, weights=given)
        assert f"Weights: the {weights}'s" in (out / "README.md").read_text()
        assert read_huggingface(out).weights == weights
        x = d2v_ds.load(out).extract(INPUTS["image"])
        assert torch.equal(x, encoder[weights].extract(INPUTS["image"]))
    students, teachers = (e.extract(INPUTS["image"]) for e in encoder.values())
    assert (students - teachers).abs().max() > 0.1


def test_a_joint_model_is_written_one_modality_a_folder(tmp_path):
    stored = store_joint()
    with pytest.raises(ValueError, match="the model has image, audio, text, .* say which, modality='image'"):
        write_huggingface(stored, tmp_path / "out")
    with pytest.raises(ValueError, match="the model has image, audio, text, not 'video'"):
        write_huggingface(stored, tmp_path / "out", modality="video")
    assert not (tmp_path / "out").exists()
    for name in MODALITIES:
        out = write_huggingface(stored, tmp_path / name, modality=name)
        encoder = build_encoder(single(stored, name), name, Path("memory"))
        assert torch.equal(d2v_ds.load(out).extract(INPUTS[name]), encoder.extract(INPUTS[name]))


def test_weights_that_are_not_there_cannot_be_written(stores, tmp_path):
    alone = replace(single(stores["text"]), weights="student")
    with pytest.raises(ValueError, match="holds the student's weights, not the teacher's"):
        write_huggingface(alone, tmp_path / "out", weights="teacher")
    with pytest.raises(ValueError, match="weights='both' must be student or teacher"):
        write_huggingface(stores["text"], tmp_path / "out", weights="both")


# ---- heads ----


@pytest.mark.parametrize("name", MODALITIES)
def test_a_fine_tuned_head_is_there_too(name, tmp_path):
    """Logits of raw input are those of Encoder.logits, and the head is read back to the bit, with its labels."""
    stored = store(name, head=6)
    stored.head.labels = ("<s>", "<pad>", "</s>", "<unk>", "|", "A")
    out = write_huggingface(stored, tmp_path / "out")
    model = open_auto(out, FOR_TASK[name])
    with torch.no_grad():
        theirs = model(**process(out, name, INPUTS[name])).logits
    encoder = build_encoder(single(stored), name, Path("memory"))
    ours = encoder.logits(INPUTS[name])
    where = ~encoder.extract(INPUTS[name], all=True).mask if name == "audio" else ...
    assert (ours[where] - theirs[where]).abs().max() < 1e-5
    again = read_huggingface(out)
    assert again.head == stored.head
    assert all(
        torch.equal(again.tensors[key], t) for key, t in stored.tensors.items() if key in again.tensors
    )
    if name != "audio":
        assert model.config.id2label[5] == "A"
        return
    tokenizer = open_auto(out, "AutoTokenizer")
    ids = torch.tensor([[0, 5, 5, 0, 5, 4, 4, 0, 5, 0]])
    assert tokenizer.batch_decode(ids) == ["AA A"]


@pytest.mark.parametrize("name", MODALITIES)
def test_a_pipeline_answers_as_ours(name, tmp_path):
    """transformers' pipelines find processor, tokenizer and head by themselves."""
    stored = store(name, head=6)
    stored.head.labels = ("<s>", "A", "B", "C", "|", "D")
    out = write_huggingface(stored, tmp_path / "out")
    task = {
        "image": "image-classification",
        "audio": "automatic-speech-recognition",
        "text": "text-classification",
    }
    with quiet():
        pipe = transformers.pipeline(task[name], model=str(out), trust_remote_code=True)
        (answer,) = pipe([INPUTS[name][0] if name != "audio" else INPUTS[name][0].numpy()])
    expected = build_encoder(single(stored), name, Path("memory")).predict(INPUTS[name][0])
    if name == "audio":
        assert answer["text"].replace(" ", "") == expected[0].replace(" ", "")
    else:
        best = max(answer, key=lambda a: a["score"]) if isinstance(answer, list) else answer
        assert best["label"] == expected[0]


@pytest.mark.parametrize("name", MODALITIES)
def test_a_pretrained_folder_can_be_fine_tuned_in_transformers(name, folders, tmp_path):
    """The class of the modality's task takes the encoder's weights, starts a fresh head, learns, is saved as
    transformers saves, and comes back here with all it learned."""
    settings = {"vocab_size": 7, "pad_token_id": 0} if name == "audio" else {"num_labels": 3}
    torch.manual_seed(0)
    model = open_auto(folders[name], FOR_TASK[name], **settings)
    plain = open_auto(folders[name]).state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in model.encoder.state_dict().items())
    assert 0.005 < model.head.proj.weight.std() < 0.05 and not model.head.proj.bias.any()
    inputs = process(folders[name], name, INPUTS[name][:2])
    labels = torch.tensor([[1, 2, -100], [3, 4, 5]]) if name == "audio" else torch.tensor([0, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train().gradient_checkpointing_enable()
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.head.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with quiet():
        model.eval().save_pretrained(tmp_path)
        if name == "text":
            open_auto(folders[name], "AutoTokenizer").save_pretrained(tmp_path)
    back = d2v_ds.load(tmp_path)
    with torch.no_grad():
        theirs = model(**inputs).logits
    ours = back.logits(INPUTS[name][:2])
    where = ~back.extract(INPUTS[name][:2], all=True).mask if name == "audio" else ...
    assert back.head is not None and (ours[where] - theirs[where]).abs().max() < 1e-5


# ---- the class, as users of transformers expect it ----


def test_gradient_checkpointing_and_attentions_change_no_output(folders):
    model = open_auto(folders["audio"])
    inputs = process(folders["audio"], "audio", INPUTS["audio"])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        output = model(**inputs, output_attentions=True)
        as_tuple = model(**inputs, return_dict=False)
    assert (output.last_hidden_state - expected).abs().max() < 1e-5
    assert torch.equal(as_tuple[0], expected)
    assert len(output.attentions) == model.config.num_hidden_layers
    for weights in output.attentions:
        assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-5)
        assert not weights[0, :, :, -1].any()  # the first sound is the shortest
    gradients = []
    for is_checkpointed in (False, True):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).pooler_output.square().sum().backward()
        gradients.append(model.local.proj.weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("name", MODALITIES)
def test_half_precision_stays_near(name, folders):
    """bf16 weights; positions and biases are made in fp32."""
    model, half = open_auto(folders[name]), open_auto(folders[name], dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    inputs = process(folders[name], name, INPUTS[name])
    cast = {key: t.to(torch.bfloat16) if t.is_floating_point() else t for key, t in inputs.items()}
    with torch.no_grad():
        expected, given = model(**inputs).pooler_output, half(**cast).pooler_output
    assert given.dtype == torch.bfloat16
    assert (given.float() - expected).norm() < 0.05 * expected.norm()


def test_a_wrong_input_is_an_error_that_says_which_is_wanted(folders):
    with pytest.raises(ValueError, match="this model reads audio: give input_values="):
        open_auto(folders["audio"])(input_ids=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"pixel_values of shape \(1, 3, 64, 64\) must be \(B, C, 32, 32\)"):
        open_auto(folders["image"])(pixel_values=torch.zeros(1, 3, 64, 64))


def test_images_may_be_arrays(folders):
    """(H, W, 3) of 8 bits, as transformers' own processors take them; one or several."""
    processor = open_auto(folders["image"], "AutoImageProcessor")
    pixels = np.asarray(picture(1))
    expected = processor(picture(1), return_tensors="pt")["pixel_values"]
    for given in (pixels, [pixels], pixels[None]):
        assert torch.equal(processor(given, return_tensors="pt")["pixel_values"], expected)


def test_the_modeling_file_imports_torch_and_transformers_alone(folders):
    """Beside Python's own; and it is the same file in every folder."""
    imported = set()
    for node in ast.walk(ast.parse(MODELING.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported == {"__future__", "math", "typing", "torch", "transformers"}
    assert all((path / MODELING.name).read_bytes() == MODELING.read_bytes() for path in folders.values())


def test_a_folder_works_without_d2v_ds(folders, encoders, tmp_path):
    """In a process that cannot import it."""
    torch.save(INPUTS["audio"], tmp_path / "x.pt")
    code = (
        "import sys; sys.modules['d2v_ds'] = None; import torch; "
        "from transformers import AutoFeatureExtractor, AutoModel; "
        f"f, x = {str(folders['audio'])!r}, torch.load({str(tmp_path / 'x.pt')!r}); "
        "p = AutoFeatureExtractor.from_pretrained(f, trust_remote_code=True); "
        "m = AutoModel.from_pretrained(f, trust_remote_code=True).eval(); "
        "i = p([w.numpy() for w in x], sampling_rate=16000, padding=True, return_tensors='pt'); "
        f"torch.save(m(**i).last_hidden_state.detach(), {str(tmp_path / 'y.pt')!r})"
    )
    start(python("-c", code))
    ours = encoders["audio"].extract(INPUTS["audio"], all=True)
    theirs = torch.load(tmp_path / "y.pt")
    assert (ours.x[~ours.mask] - theirs[~ours.mask]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("d2v_ds", None, "d2v_ds must hold the recipe"),
        ("d2v_ds.recipe.body.depth", 10**12, r"recipe.body.depth=1000000000000 is more than any model has"),
        ("d2v_ds.recipe.body.depth", 4, "says 4 layers, the weights have 3"),
        (
            "d2v_ds.recipe.modalities.text.vocabulary",
            999,
            r"local.tokens.weight \(1000, 48\) instead of \(999, 48\)",
        ),
        ("d2v_ds.recipe.modalities.text.max_tokens", 10**12, r"positions.weight \(66, 48\) instead of"),
        ("d2v_ds.recipe.body.heads", "x", "body.heads"),
    ],
)
def test_a_damaged_configuration_is_an_error_that_names_the_setting(path, value, message, folders, tmp_path):
    folder = shutil.copytree(folders["text"], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    *parents, last = path.split(".")
    target = config
    for parent in parents:
        target = target[parent]
    target[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_huggingface(folder)


# ---- tokenizers ----


def test_the_tokenizer_gives_sentencepieces_ids(folders, encoders):
    """With <s> and </s>; texts too long end in </s>."""
    tokenizer = open_auto(folders["text"], "AutoTokenizer")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(SAMPLE / "sentencepiece.model"))
    lines = (ROOT / "README.md").read_text().splitlines()
    for text in [
        *INPUTS["text"],
        *(line for line in lines if line.strip() and not SPECIAL & set(re.findall("<.*?>", line))),
    ]:
        assert tokenizer(text)["input_ids"] == [0, *pieces.encode(text), 2]
    long = tokenizer(" ".join(lines), truncation=True)["input_ids"]
    assert len(long) == 64 and long[0] == 0 and long[-1] == 2
    assert (
        tokenizer.decode(tokenizer("the digit seven")["input_ids"], skip_special_tokens=True)
        == "the digit seven"
    )
    assert (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ) == (1, 0, 2, 3)


def test_weights_without_a_tokenizer_say_so(stores, tmp_path):
    """As imported fairseq text models are; a kind of sentencepiece model that tokenizers lack is kept as it is."""
    out = write_huggingface(
        replace(stores["text"], files=None, origin="fairseq data2vec_multi"), tmp_path / "a"
    )
    card = (out / "README.md").read_text()
    assert "No tokenizer: the file that these weights were read from holds none" in card
    assert "## Licence of the weights\n\nThese weights were imported" in card
    assert not (out / "tokenizer.json").exists()
    words = tmp_path / "words"
    words.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from"] * 9), model_prefix=str(words / "m"), model_type="char",
        vocab_size=20, bos_id=0, pad_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, minloglevel=3,
    )  # fmt: skip
    out = write_huggingface(replace(stores["text"], files=words), tmp_path / "b")
    assert "No AutoTokenizer: `m.model` is neither" in (out / "README.md").read_text()
    assert (out / "m.model").is_file() and not (out / "tokenizer.json").exists()


# ---- what is written is checked ----


@pytest.mark.parametrize("name", MODALITIES)
def test_a_folder_that_gives_other_outputs_is_no_export(name, stores, folders, tmp_path):
    """One number moved by a thousandth, or a setting changed, is found when the folder is loaded back."""
    stored = single(stores[name])
    folder = shutil.copytree(folders[name], tmp_path / "changed")
    check(stored, folder, TOLERANCE)
    tensors = load_file(folder / "model.safetensors")
    moved = tensors["blocks.0.attn.proj.bias"].clone()
    moved[0] += 1e-3
    save_file(
        tensors | {"blocks.0.attn.proj.bias": moved},
        folder / "model.safetensors",
    )
    with pytest.raises(RuntimeError, match="gives other outputs than ours: .* differs by"):
        check(stored, folder, TOLERANCE)
    del tensors["blocks.1.norm1.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="found no weights for blocks.1.norm1.bias"):
        check(stored, folder, TOLERANCE)


def test_nothing_is_left_of_an_export_that_failed(stores, tmp_path):
    """NaN in a weight: outputs cannot agree."""
    tensors = stores["text"].tensors
    broken = replace(
        stores["text"], tensors=tensors | {"blocks.0.norm1.bias": tensors["blocks.0.norm1.bias"] * torch.nan}
    )
    with pytest.raises(RuntimeError, match="differs by inf"):
        write_huggingface(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize("head", [0, 3])
def test_the_cards_lines_run(name, head, tmp_path):
    """And give the features, or the logits, of ours."""
    stored = store(name, head=head)
    out = write_huggingface(stored, tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    x = {"image": picture(1), "audio": noise(0.5, 1).numpy(), "text": "a text"}[name]
    names = {"image": x, "waveform": x}
    with quiet():
        exec(code.replace("THIS_FOLDER", str(out)), names)
    encoder = build_encoder(single(stored), name, Path("memory"))
    if head:
        given, ours = names["logits"], encoder.logits(x)
    else:
        given, ours = names["last_hidden_state"][:, int(name == "image") :], encoder.extract(x)
    assert (given - ours).abs().max() < 1e-5


def test_the_guides_lines_run(folders, encoders):
    """docs/export.md, for speech."""
    text = (ROOT / "docs" / "export.md").read_text()
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "AutoModel" in block
    )
    names = {"waveform": noise(0.5, 1).numpy()}
    with quiet():
        exec(code.replace("FOLDER", str(folders["audio"])), names)
    assert (names["features"] - encoders["audio"].extract(names["waveform"])).abs().max() < 1e-5


def test_a_run_that_started_from_other_weights_names_them(stores, tmp_path):
    """Their licence holds too."""
    recipe = stores["text"].recipe.model_copy(update={"init": "/somewhere/base_libri.pt"})
    card = (
        write_huggingface(replace(stores["text"], recipe=recipe), tmp_path / "out") / "README.md"
    ).read_text()
    assert "started from the weights `base_libri.pt`" in card and "/somewhere" not in card
    assert "That of the weights which training started from, `base_libri.pt`, holds." in card


def test_the_command_writes_it_of_any_export(tmp_path):
    """Of a joint model with --modality; an error names the choices."""
    path = write_export(store_joint(), tmp_path / "ours")
    out = tmp_path / "theirs"
    command = ["export", str(path), "--format", "hf", "--out", str(out)]
    assert main(command) == 2
    assert main([*command, "--modality", "image", "--weights", "both"]) == 2
    assert not out.exists()
    assert main([*command, "--modality", "image", "--weights", "teacher"]) == 0
    expected = d2v_ds.load(path, modality="image", weights="teacher").extract(INPUTS["image"])
    assert torch.equal(d2v_ds.load(out).extract(INPUTS["image"]), expected)


@pytest.mark.parametrize("name", ["audio", "image", "text"])
def test_no_line_of_the_card_asks_whether_code_may_run(name, folders):
    """transformers asks at a terminal wherever the folder has code and it is not said, for a tokenizer too."""
    lines = (folders[name] / "README.md").read_text().splitlines()
    opened = [line for line in lines if "from_pretrained(" in line and "THIS_FOLDER" in line]
    assert len(opened) == 2 and all("trust_remote_code=True" in line for line in opened)


def test_the_card_says_what_the_folder_holds(folders):
    card = (folders["audio"] / "README.md").read_text()
    for said in (
        "library_name: transformers",
        "Weights: the student's",
        "Data: `shards/sample`; modality audio",
        "Steps: 120",
        "Read from: run, step_00000120",
        "Licence of the weights",
        'AutoModel.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
        "agrees with d2v_ds to 1e-05",
    ):
        assert said in card
    config = json.loads((folders["audio"] / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_data2vec2.Data2Vec2Model"
    assert config["d2v_ds"]["recipe"]["out"] is None
