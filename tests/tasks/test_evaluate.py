"""A fine-tuned model's numbers on labelled shards are those of its own predictions; bad labels are errors first."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from ranks import SAMPLE
from scipy.stats import pearsonr, spearmanr

import d2v_ds
from d2v_ds.cli import main
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.load import beside
from d2v_ds.convert.stored import Stored
from d2v_ds.data import Corpus
from d2v_ds.modalities.audio.samples import AudioSamples
from d2v_ds.modalities.build import build_model
from d2v_ds.model.heads import HEAD, HeadConfig, build_head
from d2v_ds.model.tuned import Task
from d2v_ds.recipe import load_recipe
from d2v_ds.tasks.evaluate import answers, evaluate, own_label, read_classes, read_transcripts, score_classes
from d2v_ds.tasks.items import open_items
from d2v_ds.training.examiner import Share, read_truth
from d2v_ds.training.init import with_symbols

VAL = str(SAMPLE / "multimodal-val-000000.tar")
KINDS = {"image": "image_classification", "audio": "ctc"}
LETTERS = ("<s>", *"0123456789", "|")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """An export of a tiny model with a head."""

    def export(modality: str, outputs: int, labels: tuple[str, ...] | None = None) -> str:
        recipe = load_recipe(f"{modality}_tiny")
        head = HeadConfig(kind=KINDS[modality], outputs=outputs, labels=labels)
        torch.manual_seed(0)
        model = build_model(recipe.body, recipe.modalities)
        tensors = {name: p.detach() + 0.1 * torch.randn(p.shape) for name, p in model.named_parameters()}
        parameters = build_head(head, recipe.body.dim).named_parameters()
        tensors |= {HEAD + name: p.detach() + 0.1 * torch.randn(p.shape) for name, p in parameters}
        stored = Stored(
            recipe, tensors, "run, step_00000001", files=SAMPLE, head=head, step=1, weights="both"
        )
        folder = tmp_path_factory.mktemp("tuned")
        write_export(stored, folder)
        return str(folder)

    return export


@pytest.fixture(scope="module")
def val() -> Corpus:
    from pathlib import Path

    fields = {"image": "png", "audio": "ogg", "digit": "json.digit"}
    return Corpus.open([Path(VAL)], fields, progress=None)


def test_accuracy_is_that_of_the_models_own_predictions(make, val, tmp_path, capsys):
    folder = make("image", 10)
    encoder = d2v_ds.load(folder)
    samples = [val.read(i) for i in range(len(val))]
    logits = encoder.logits([sample["image"] for sample in samples])
    truth = torch.tensor([int(sample["digit"]) for sample in samples])
    accuracy = (logits.argmax(1) == truth).double().mean().item()
    top5 = (logits.topk(5).indices == truth[:, None]).any(1).double().mean().item()
    out = tmp_path / "new" / "eval.json"
    command = ["eval", "classify", folder, VAL, "--label", "json.digit", "--batch", "7", "--out", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert found["accuracy"] == pytest.approx(accuracy) and found["top5_accuracy"] == pytest.approx(top5)
    assert found["samples"] == len(val) and found["unreadable"] == []
    assert f"{accuracy:.4f}" in capsys.readouterr().out


def test_a_regression_of_images_is_measured_by_correlation(make, val):
    folder = make("image", 1)
    encoder = d2v_ds.load(folder)
    samples = [val.read(i) for i in range(len(val))]
    said = encoder.predict([sample["image"] for sample in samples])
    truth = [float(sample["digit"]) for sample in samples]
    found = evaluate("classify", folder, VAL, label="json.digit")
    assert found["pearson"] == pytest.approx(pearsonr(said, truth)[0], abs=1e-5)
    assert found["spearman"] == pytest.approx(spearmanr(said, truth)[0], abs=1e-5) and "accuracy" not in found
    with pytest.raises(ValueError, match="label .* is no number, which the head gives"):
        evaluate("classify", folder, VAL, label="txt")


def test_error_rates_are_the_edits_to_the_models_own_transcripts(make, val):
    import torchaudio

    folder = make("audio", len(LETTERS), LETTERS)
    encoder = d2v_ds.load(folder)
    samples = [val.read(i) for i in range(len(val))]
    texts = encoder.predict([sample["audio"] for sample in samples])
    truths = [sample["digit"].decode() for sample in samples]
    edits = sum(map(torchaudio.functional.edit_distance, truths, texts))
    word_edits = sum(
        torchaudio.functional.edit_distance(a.split(), b.split()) for a, b in zip(truths, texts, strict=True)
    )
    found = evaluate("ctc", folder, VAL, label="json.digit", batch=5)
    assert found["cer"] == pytest.approx(edits / sum(map(len, truths)))
    assert found["wer"] == pytest.approx(word_edits / len(truths))


def test_long_sounds_are_scored_in_batches_of_fewer(make, monkeypatch):
    """As they are embedded: 32 of half a minute would take many times what a training step does."""
    encoder = d2v_ds.load(make("audio", len(LETTERS), LETTERS))
    few, sizes, run = Share(open_items(VAL, "audio", encoder.samples, "json.digit"), 0, 40), [], encoder.run
    monkeypatch.setattr(encoder, "run", lambda rows: (sizes.append(len(rows)), run(rows))[1])
    answers(encoder, few, 32, 1, [])
    monkeypatch.setattr("d2v_ds.tasks.groups.BATCH_ATTENTION", 1)
    answers(encoder, few, 32, 1, [])
    assert sizes == [3, 1, 1, 1]


def test_transcripts_are_kept_as_texts(make):
    """Logits of all frames of LibriSpeech's dev-clean and 1,000 pieces would take 4 GB, on each rank."""
    encoder = d2v_ds.load(make("audio", len(LETTERS), LETTERS))
    few = Share(open_items(VAL, "audio", encoder.samples, "json.digit"), 0, 40)
    said, places = answers(encoder, few, 2, 1, [], lambda logits_TC: f"of {logits_TC.shape[1]}")
    assert said == [f"of {len(LETTERS)}"] * 3 and sorted(places) == [0, 1, 2]


@pytest.mark.parametrize("letters", ["ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"])
@pytest.mark.parametrize("is_pieces", [False, True])
def test_transcripts_are_written_as_the_head_writes(make, letters, is_pieces):
    """In its case, whichever the shards have; pieces are checked by their characters."""
    symbols = ("<blank>", "<unk>", *(f"\u2581{c}" for c in letters), *letters)
    folder = make("audio", len(symbols), symbols) if is_pieces else make("audio", 28, ("<s>", "|", *letters))
    encoder = d2v_ds.load(folder)
    items = open_items(VAL, "audio", encoder.samples, "txt;json.text")
    texts = read_transcripts(items, encoder, "txt;json.text")
    assert len(texts) == len(items) and set("".join(texts)) <= set(letters) | {" "}
    assert texts[0] == (items.read(0)[1].upper() if letters.isupper() else items.read(0)[1].lower())
    lacking = tuple("#" if symbol.strip("\u2581") in "eE" else symbol for symbol in symbols)
    if is_pieces:
        encoder.head_config = encoder.head_config.model_copy(update={"labels": lacking})
        with pytest.raises(ValueError, match="has '[eE]', which the model cannot write"):
            read_transcripts(items, encoder, "txt;json.text")
        encoder.head_config = encoder.head_config.model_copy(update={"labels": (*lacking, "<0x41>")})
        assert len(read_transcripts(items, encoder, "txt;json.text")) == len(items)


def test_classes_of_other_data_are_counted_as_the_head_counts_them(make, tmp_path):
    """By their names, where shards have them: in another order, fewer of them, or more."""
    (tmp_path / "val.tar").symlink_to(VAL)
    folder = make("image", 10, tuple("abcdefghij"))
    encoder = d2v_ds.load(folder)
    items = open_items(VAL, "image", encoder.samples, "json.label")

    def read(names: str, label: str = "cls;json.label") -> list[int]:
        (tmp_path / "classes.json").write_text(json.dumps(list(names)))
        return read_classes(items, encoder, label, tmp_path / "*.tar")

    digits = read("abcdefghij")
    assert digits == [int(items.read(i)[1]) for i in range(len(items))] == read("klmnopqrst")
    assert read("jihgfedcba") == [9 - digit for digit in digits]
    assert read("jihgfedcba", "json.digit") == digits, "names are those of another label"
    with pytest.raises(ValueError, match=r"label '1 \(x\)' of .* is no class of the model"):
        read("axcdefghij")


@pytest.mark.parametrize(
    ("names", "texts"),
    [(("01", "00"), ("00", "01", "1")), (("2", "1"), ("2", "1", "0")), (("a", "b"), ("b", "01"))],
)
def test_labels_are_the_classes_that_training_takes_them_for(names, texts, monkeypatch):
    """A whole number that the head has is that number, whatever the names."""
    head = Task(head="image_classification", outputs=2, labels=names)
    encoder = SimpleNamespace(head_config=head.head_config)
    monkeypatch.setattr("d2v_ds.tasks.evaluate.read_labels", lambda items, label: texts)
    assert read_classes(None, encoder, "cls", "nowhere") == [head.parse(text) for text in texts]


def test_a_run_is_measured_by_what_it_learned(make):
    """Label, metrics and, of pieces in both cases, the case of transcripts are those of the run's task."""
    folder = make("image", 10)
    encoder = d2v_ds.load(folder)
    task = load_recipe("finetune_image_tiny", ["task.label=json.digit", "task.metrics=[macro_f1]"]).task
    said = [(torch.eye(10)[i % 9], i % 10) for i in range(30)]
    assert own_label(encoder, "cls") == "cls" and score_classes(said).keys() == {"accuracy", "top5_accuracy"}
    encoder.recipe = encoder.recipe.model_copy(update={"task": task})
    assert own_label(encoder, "cls") == "json.digit"
    assert score_classes(said, task).keys() == {"accuracy", "top5_accuracy", "macro_f1"}
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    speech = d2v_ds.load(make("audio", 54, ("<blank>", "<unk>", *letters)))
    items = open_items(VAL, "audio", speech.samples, "txt")
    assert read_transcripts(items, speech, "txt")[0] == items.read(0)[1]
    task = load_recipe("finetune_audio_tiny").task
    speech.recipe = speech.recipe.model_copy(update={"task": task})
    assert read_transcripts(items, speech, "txt")[0] == items.read(0)[1].upper()


@pytest.mark.parametrize("rule", ["nmt_nfkc_cf", "identity"])
def test_transcripts_of_pieces_are_normalised_as_in_the_loop(tmp_path, rule):
    """By the rule of the model that the run learned with: of a copy beside the weights, since the file may be gone."""
    from sentencepiece import SentencePieceTrainer

    (tmp_path / "text").write_text("\ufb01ve \u2167 two\nTwo three\n" * 9, encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "own"), vocab_size=40, hard_vocab_limit=False,
        normalization_rule_name=rule, minloglevel=2,
    )  # fmt: skip
    recipe = load_recipe(
        "finetune_audio_tiny", [f"task.vocabulary={tmp_path / 'own.model'}", "task.case=keep"]
    )
    recipe = with_symbols(recipe)
    parse = AudioSamples(recipe.modalities["audio"], tmp_path).parser(recipe.task)
    gone = recipe.task.model_copy(update={"vocabulary": "elsewhere/own.model"})
    encoder = SimpleNamespace(
        head_config=recipe.task.head_config, recipe=beside(recipe.model_copy(update={"task": gone}), tmp_path)
    )
    texts = ["\ufb01ve\u2000\u2167", "Two  three"]
    items = Transcribed(texts)
    loop = [read_truth(items, i, parse, {}) for i in range(len(texts))]
    assert read_transcripts(items, encoder, "txt") == loop
    assert loop[0] == ("\ufb01ve \u2167" if rule == "identity" else "five viii")
    items.texts[1] = "#"
    with pytest.raises(ValueError, match="u1: a transcript has '#', which the vocabulary of .* lacks"):
        read_transcripts(items, encoder, "txt")


class Transcribed:
    """Items that are transcripts alone."""

    has_labels = True

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def name(self, i: int) -> SimpleNamespace:
        return SimpleNamespace(full=f"u{i}")

    def read(self, i: int) -> tuple[bytes, str]:
        return b"", self.texts[i]


def test_outputs_that_are_not_finite_are_no_score(make):
    encoder = d2v_ds.load(make("image", 10))
    items = open_items(VAL, "image", encoder.samples, "json.digit")
    assert len(answers(encoder, items, 32, 1, [])[0]) == len(items)
    torch.nn.init.constant_(encoder.head.proj.bias, float("nan"))
    with pytest.raises(
        ValueError, match=r"are not finite, as for multimodal-val-000000.tar:\S+; take weights of"
    ):
        answers(encoder, items, 32, 1, [])


def test_what_cannot_be_evaluated_is_an_error_that_says_why(make):
    image, speech = make("image", 5), make("audio", 4, ("<s>", "A", "B", "|"))
    with pytest.raises(ValueError, match="is no class of the model, whose classes are 0 to 4"):
        evaluate("classify", image, VAL, label="json.digit")
    with pytest.raises(ValueError, match="has no label: 'json.nothing' is not in it"):
        evaluate("classify", image, VAL, label="json.nothing")
    with pytest.raises(ValueError, match=r"multimodal-val-000000.tar:\S+: the label .* is no UTF-8"):
        evaluate("ctc", speech, VAL, label="png")
    with pytest.raises(ValueError, match="use `d2v eval classify`"):
        evaluate("ctc", image, VAL)
    with pytest.raises(ValueError, match="which the model cannot write; it knows AB"):
        evaluate("ctc", speech, VAL, label="json.digit")
