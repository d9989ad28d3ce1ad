"""`d2v tokenizer`: trained on shards or made of a released vocabulary, it gives the ids that a model expects."""

import json
import pickle
import random

import pytest
import sentencepiece
from corpora import text_files
from layouts import write_tar
from trees import prepare, write_tree

from d2v_ds.modalities.text.tokenizer import UNK, load_tokenizer
from shards.tokenizer import cut_line, import_vocabulary, main

TEXTS = [
    "Hello world, it's a cafe: caf\u00e9!",
    "  two  spaces,\ttabs\nand lines\r\n\n end ",
    "\u4eca\u65e5\u306f \u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f469\u200d\U0001f680",
    "I'll we've 12345 1,000.50 <b> #x_y \u00a0\u3000",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small byte-level BPE as GPT-2's is given, and a dictionary of it as fairseq writes them, in another order."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("released")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS * 20, vocab_size=380, min_frequency=2, special_tokens=["<|endoftext|>"])
    trained.save_model(str(folder))
    pieces = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8")
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    numbers = list(pieces.values())
    random.Random(3).shuffle(numbers)
    words = [f"{number} {1000 - place}" for place, number in enumerate(numbers)]
    words[20:20] = ["madeupword0000 0"]
    files = {
        "encoder.json": json.dumps(pieces),
        "vocab.bpe": merges if merges.startswith("#version") else "#version: 0.2\n" + merges,
        "dict.txt": "\n".join(words) + "\n",
    }
    return write_tree(folder, files)


def make(folder, tmp_path):
    assert main(["import", str(folder), "--out", str(tmp_path / "tokenizer.json")]) == 0
    path = tmp_path / "tokenizer.json"
    return load_tokenizer(path.read_bytes(), 1 << 20, path)


def fairseq_ids(folder) -> dict[str, int]:
    """piece -> id, by the definition: the place in dict.txt after four special ones."""
    names = {number: piece for piece, number in json.loads((folder / "encoder.json").read_text()).items()}
    lines = (folder / "dict.txt").read_text().splitlines()
    words = [line.split()[0] for line in lines]
    named = [names[int(word)] if word.isdigit() else word for word in words]
    return {piece: place for place, piece in enumerate([*SPECIAL, *named, "<mask>"])}


def random_texts(count: int = 200) -> list[str]:
    drawn = random.Random(5)
    alphabet = "abc the \u00e9\u4eca\U0001f600 .,'\n\t12_<>/s"
    return ["".join(drawn.choices(alphabet, k=drawn.randint(1, 60))) for _ in range(count)]


def test_ids_are_those_of_transformers_roberta_tokenizer_on_the_same_vocabulary(released, tmp_path):
    from transformers import RobertaTokenizer

    vocabulary = fairseq_ids(released)
    merges = [tuple(line.split(" ")) for line in (released / "vocab.bpe").read_text().splitlines()[1:]]
    theirs = RobertaTokenizer(vocab=vocabulary, merges=merges)
    ours = make(released, tmp_path)
    assert ours.num_pieces == len(vocabulary) - 1
    for text in [*TEXTS, *random_texts()]:
        if "<s>" in text or "</s>" in text:
            continue
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert len({i for text in TEXTS for i in ours.encode(text)}) > 60


def test_ids_are_those_of_gpt2s_pieces_in_the_order_of_the_dictionary(released, tmp_path):
    """By the definition, without transformers: first GPT-2's number, then the line of the dictionary."""
    from tokenizers import ByteLevelBPETokenizer

    (tmp_path / "v.json").write_bytes((released / "encoder.json").read_bytes())
    (tmp_path / "m.txt").write_bytes((released / "vocab.bpe").read_bytes())
    gpt2 = ByteLevelBPETokenizer(str(tmp_path / "v.json"), str(tmp_path / "m.txt"))
    ids = fairseq_ids(released)
    ours = make(released, tmp_path)
    for text in [*TEXTS, *random_texts()]:
        assert ours.encode(text) == [ids[piece] for piece in gpt2.encode(text).tokens]


def test_special_tokens_written_in_a_text_are_text(released, tmp_path):
    """Else a page of the web could end a document or hold a mask."""
    ours = make(released, tmp_path)
    ids = ours.encode("a <s> b </s> <mask> <pad>")
    assert min(ids) > UNK and max(ids) < ours.num_pieces
    assert ours.tokenizer.decode(ids) == "a <s> b </s> <mask> <pad>"


def test_pieces_that_the_dictionary_lacks_are_unknown(released, tmp_path):
    """As fairseq reads them."""
    ids = make(released, tmp_path).encode("The dog")
    words = (released / "dict.txt").read_text().splitlines()
    lost = ids[-1]
    files = {name: (released / name).read_bytes() for name in ("encoder.json", "vocab.bpe")}
    files["dict.txt"] = "\n".join(words[: lost - 4] + words[lost - 3 :])
    folder = write_tree(tmp_path / "less", files)
    less = make(folder, tmp_path)
    assert less.encode("The dog") == [i - (i > lost) if i != lost else UNK for i in ids]
    assert less.num_pieces == len(words) + 4 - 1


def test_a_mask_before_the_pieces_is_refused_and_nothing_written(released, tmp_path, capsys):
    """As tutorials of tokenizers number it, or of a dictionary that is cut: every piece was read as <unk>."""
    pieces = ["<mask>", *json.loads((released / "encoder.json").read_text())]
    ids = {piece: number for number, piece in enumerate([*SPECIAL, *pieces])}
    merges = (released / "vocab.bpe").read_text()
    early = write_tree(tmp_path / "early", {"vocab.json": json.dumps(ids), "merges.txt": merges})
    files = {name: (released / name).read_bytes() for name in ("encoder.json", "vocab.bpe", "dict.txt")}
    files["dict.txt"] = files["dict.txt"][:200].rpartition(b"\n")[0]
    for folder in (early, write_tree(tmp_path / "cut", files)):
        assert main(["import", str(folder), "--out", str(tmp_path / "out/tokenizer.json")]) == 2
        assert "<mask> must be the last" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_json_and_vocab_json_with_merges_are_taken(released, tmp_path):
    """As Hugging Face's folders of RoBERTa have them; the same ids."""
    ours = make(released, tmp_path)
    again = write_tree(tmp_path / "again", {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()})
    old = {
        "vocab.json": json.dumps(fairseq_ids(released)),
        "merges.txt": (released / "vocab.bpe").read_text(),
    }
    for folder in (again, write_tree(tmp_path / "old", old)):
        (tmp_path / "out").mkdir(exist_ok=True)
        other = make(folder, tmp_path / "out")
        assert [other.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_it_goes_to_workers(released, tmp_path):
    ours = make(released, tmp_path)
    copy = pickle.loads(pickle.dumps(ours))
    assert [copy.encode(f"<s> {text}") for text in TEXTS] == [ours.encode(f"<s> {text}") for text in TEXTS]


def test_a_text_model_reads_shards_with_it_and_its_run_finds_it_again(released, tmp_path):
    """TextSamples take it by its path; what an export needs is that file."""
    from d2v_ds.data import expand_shards
    from d2v_ds.modalities.source import open_source
    from d2v_ds.recipe import load_recipe

    write_tree(tmp_path / "src", text_files(0))
    assert prepare("folder", tmp_path / "src", "--out", tmp_path / "out")[0] == 0
    ours = make(released, tmp_path)
    config = load_recipe("text_tiny").modalities["text"]
    config.vocabulary, config.max_tokens = ours.num_pieces + 1, 16
    config.data.shards, config.data.tokenizer = "*.tar", str(tmp_path / "tokenizer.json")
    source = open_source("text", config, str(tmp_path / "out"))
    assert source.samples.files == (tmp_path / "tokenizer.json",)
    assert len(expand_shards(str(tmp_path / "out"))) == 1 and len(source.corpus) == 8
    texts = [source.corpus.read(i)["text"] for i in range(8)]
    assert source.corpus.lengths.all().tolist() == [len(ours.encode(text.decode())) + 1 for text in texts]
    config.vocabulary = ours.num_pieces - 1
    with pytest.raises(
        ValueError, match=f"has {ours.num_pieces} pieces, more than modalities.text.vocabulary"
    ):
        open_source("text", config, str(tmp_path / "out"))


def test_a_run_and_a_folder_for_transformers_have_it_too(released, tmp_path):
    """`load` takes it from beside the weights; AutoTokenizer opens what `d2v export --format hf` writes of it."""
    from transformers import AutoTokenizer

    from d2v_ds.convert.huggingface.processors import write_tokenizer
    from d2v_ds.convert.load import build_samples
    from d2v_ds.recipe import load_recipe

    ours = make(released, tmp_path)
    run = write_tree(tmp_path / "run", {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()})
    config = load_recipe("text_tiny").modalities["text"]
    samples = build_samples("text", config, run)
    assert [samples.encode(text)[:-1] for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    (tmp_path / "hf").mkdir()
    assert write_tokenizer(tmp_path / "hf", run, config) == ""
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert [theirs(text)["input_ids"] for text in TEXTS] == [[0, *ours.encode(text), 2] for text in TEXTS]
    assert theirs.mask_token_id == ours.num_pieces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dict.txt": None}, "needed are encoder.json, vocab.bpe and dict.txt"),
        ({"vocab.bpe": "#version: 0.2\nno such\n"}, "line 2, 'no such', is no pair of pieces"),
        ({"vocab.bpe": "#version: 0.2\n"}, "vocab.bpe has no rule that makes .* it is cut"),
        ({"vocab.bpe": b"\xff \xfe\n"}, "vocab.bpe is not UTF-8"),
        ({"dict.txt": b"\xff 1\n"}, "dict.txt is not UTF-8"),
        ({"dict.txt": "99999 1\n"}, "line 1 is piece 99999, which encoder.json lacks"),
        ({"dict.txt": "7 1\n7 1\n"}, "line 2 comes a second time"),
        ({"encoder.json": "[1]"}, "must be an object of pieces"),
        ({"encoder.json": '{"a": 1, "b": 1}'}, "'a' has the number 1; each piece must have one of its own"),
        ({"encoder.json": '{"a": -1}'}, "'a' has the number -1"),
        ({"encoder.json": '{"a": true}'}, "must be an object of pieces"),
        ({"encoder.json": "{"}, "is no JSON"),
        ({"tokenizer.json": "{}"}, "is no tokenizer.json"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(released, tmp_path, change, message):
    files = {
        name: (released / name).read_bytes() for name in ("encoder.json", "vocab.bpe", "dict.txt")
    } | change
    folder = write_tree(
        tmp_path / "bad", {name: content for name, content in files.items() if content is not None}
    )
    with pytest.raises(ValueError, match=message):
        import_vocabulary(folder)


def test_words_that_were_added_are_told(released, tmp_path, capsys):
    """No rule makes them, though the file is whole."""
    folder = write_tree(tmp_path / "x", {p.name: p.read_bytes() for p in released.iterdir() if p.is_file()})
    pieces = json.loads((folder / "encoder.json").read_text())
    pieces |= {"@user": len(pieces), "HTTPURL": len(pieces) + 1}
    (folder / "encoder.json").write_text(json.dumps(pieces))
    with (folder / "dict.txt").open("a") as file:
        file.write("".join(f"{pieces[word]} 1\n" for word in ("@user", "HTTPURL")))
    import_vocabulary(folder)
    assert "makes 2 pieces of the vocabulary, such as @user, HTTPURL: no text" in capsys.readouterr().out


def test_a_tokenizer_json_with_other_special_ids_is_refused(tmp_path):
    """GPT-2's own, for example."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    folder = write_tree(tmp_path, {"tokenizer.json": Tokenizer(BPE({"a": 0, "<s>": 1}, [])).to_str()})
    with pytest.raises(ValueError, match="ids of <s>, <pad>, </s>, <unk> are \\(1, None, None, None\\)"):
        import_vocabulary(folder)
    assert main(["import", str(folder), "--out", str(tmp_path / "gpt2.json")]) == 2
    assert main(["import", str(tmp_path / "no"), "--out", str(tmp_path / "x/tokenizer.json")]) == 2


# ---- train ----


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    files = {f"{n}/{name}": content for n in range(3) for name, content in text_files(n, 20).items()}
    write_tree(folder / "src", files | {"bad.txt": b"\xff\xfe\x00 no text"})
    assert prepare("folder", folder / "src", "--out", folder / "out")[0] == 0
    return folder / "out"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_is_trained_on_shards_with_the_ids_that_text_models_need(shards, tmp_path, kind, capsys):
    """Twice the same bytes, any text and back, and no byte of it unknown."""
    for name in ("a", "b"):
        command = ["train", str(shards), "--out", str(tmp_path / name), "--kind", kind, "--vocabulary", "286"]
        assert main(command) == 0
    assert "left out, being unreadable: 1; one of them: " in capsys.readouterr().out
    model = (tmp_path / "a").read_bytes()
    assert model == (tmp_path / "b").read_bytes()
    tokenizer = load_tokenizer(model, 286, tmp_path / "a")
    assert isinstance(tokenizer, sentencepiece.SentencePieceProcessor) and tokenizer.get_piece_size() == 286
    assert tokenizer.decode(tokenizer.encode("Line 7, caf\u00e9 \u6f22!")) == "Line 7, caf\u00e9 \u6f22!"
    assert UNK not in tokenizer.encode("\u6f22\U0001f600")


def test_how_much_is_read_is_limited(shards, tmp_path, capsys):
    """The seed says of what."""
    command = ["train", str(shards), "--vocabulary", "290", "--lines", "20", "--out"]
    assert main([*command, str(tmp_path / "a")]) == main([*command, str(tmp_path / "b"), "--seed", "1"]) == 0
    assert "learned from 20 lines of 8 documents, of 61" in capsys.readouterr().out
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_a_json_without_text_is_left_out_and_named(tmp_path, capsys):
    texts = {f"{i:02d}.json": json.dumps({"text": f"line {i}, the dog" * 3}) for i in range(20)}
    write_tar(
        tmp_path / "shards/a.tar", texts | {"null.json": '{"text": null}', "half.json": '{"text": "\\ud800"}'}
    )
    assert main(["train", str(tmp_path / "shards"), "--out", str(tmp_path / "a"), "--vocabulary", "290"]) == 0
    assert "being unreadable: 2; one of them: a.tar:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lines", "0"), "--lines 0 must be from 1"),
        (("--threads", "0"), "--threads 0 must be from 1"),
        (("--vocabulary", "-3"), "--vocabulary -3 must be from 1"),
        (("--seed", "-1"), "--seed -1 must be from 0"),
        (("--out", "{tmp_path}"), "is a folder; give the file to write"),
        (("--out", "{tmp_path}/a.tar"), "is called as a shard; give the file of the model"),
    ],
)
def test_what_cannot_be_trained_or_written_is_refused_before_anything_is_read(
    tmp_path, capsys, more, message
):
    more = [part.format(tmp_path=tmp_path) for part in more]
    assert main(["train", str(tmp_path / "absent.tar"), "--out", str(tmp_path / "a"), *more]) == 2
    assert message in capsys.readouterr().err


def test_shards_without_a_line_are_said(tmp_path, capsys):
    """And not to be mended by --vocabulary."""
    write_tar(tmp_path / "a.tar", {"0.txt": " \n", "1.txt": b"\xff"})
    assert main(["train", str(tmp_path / "a.tar"), "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert "a.tar holds no line of text in 2 documents; 1 are unreadable, one of them: a.tar:1: " in error


def test_too_large_a_vocabulary_is_said_in_one_line(shards, tmp_path, capsys):
    assert main(["train", str(shards), "--out", str(tmp_path / "a"), "--vocabulary", "90000"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: sentencepiece cannot train 90000 pieces") and not (tmp_path / "a").exists()
    )


@pytest.mark.parametrize("line", ["", "short", "w\u00f6rd " * 900, "\u6f22" * 3000, "a" * 9001])
def test_long_lines_are_cut_and_nothing_of_them_is_lost(line):
    pieces = list(cut_line(line))
    assert all(0 < len(piece.encode()) <= 4000 for piece in pieces)
    assert "".join(pieces).replace(" ", "") == line.replace(" ", "")
    if " " in line:
        assert {word for piece in pieces for word in piece.split()} == {"w\u00f6rd"}


def test_a_line_of_any_length_is_cut_in_a_time_that_grows_with_it():
    assert sum(len(piece) for piece in cut_line("word " * 4_000_000)) > 15_000_000


def test_a_json_tokenizer_is_told_from_a_sentencepiece_model(tmp_path):
    with pytest.raises(ValueError, match="is no sentencepiece model"):
        load_tokenizer(b"neither", 100, tmp_path / "x")
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        load_tokenizer(b" {", 100, tmp_path / "x")
