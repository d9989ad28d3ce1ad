"""`d2v plan` says of the data what a run then sees, and what is wrong with its settings."""

from __future__ import annotations

import re
import shutil

import pytest
from ranks import SAMPLE

from d2v_ds.cli import main
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.stored import Stored
from d2v_ds.data import Plan, StepLoader
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import load_recipe

MIX = [
    "modalities.audio.data.corpora={one: multimodal-train-000000.tar, two: 'multimodal-train-00000[12].tar'}",
    "modalities.audio.data.batch_seconds=3",
    "modalities.audio.data.weights={one: 2, two: 1}",
]
SAMPLES = [
    "modalities.text.data.mode=samples",
    "modalities.text.data.shards=multimodal-train-*.tar",
    "modalities.text.data.batch=64",
    "modalities.text.data.batch_tokens=256",
]


def plan(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["plan", *arguments, f"data={SAMPLE}"]) == 0
    return capsys.readouterr().out


def test_it_says_what_each_corpus_comes_to(capsys):
    """Samples, amount, share, epochs, and what is lost."""
    text = plan(capsys, "train.steps=1000", *MIX, *SAMPLES)
    assert "multimodal_tiny: 1,000 steps on 1, 2, 3, 4, 6 or 12 rank(s)" in text
    assert "image: a step is 12 micro-batches, 48 images" in text
    assert re.search(r"^image +450 +450 images +100.00% +4.0 +112 micro-batches +9.4 +106.67", text, re.M)
    one, two = (re.search(rf"^audio/{name} .*$", text, re.M)[0].split() for name in ("one", "two"))
    assert int(one[1]) + int(two[1]) == 450 and (one[4], two[4]) == ("66.67%", "33.33%")
    assert "mixed: of the 1,200 micro-batches of every 100 steps, audio/one 800, audio/two 400" in text
    assert float(re.search(r"^audio/one.* ([\d.]+)% cropped", text, re.M)[1]) < 10
    assert float(re.search(r"^text .* ([\d.]+)% padding +([\d]+)% of 256", text, re.M)[1]) < 10
    assert "text: a step is 12 micro-batches" in text


@pytest.mark.parametrize("recipe", ["audio_tiny", "text_tiny"])
def test_an_epoch_has_the_steps_that_it_says(capsys, recipe):
    """To a tenth: steps an epoch x epochs = steps."""
    text = plan(
        capsys, "--recipe", recipe, "train.steps=5000"
    )  # on a clean checkout, measured lengths come first
    cells = re.split(r" {2,}", re.search(rf"^{recipe.removesuffix('_tiny')} {{2,}}.*$", text, re.M)[0])
    assert float(cells[6]) * float(cells[7].replace(",", "")) == pytest.approx(5000, rel=0.02)


def test_it_lists_the_samples_of_a_step(capsys):
    """Those that the loader brings, on the ranks that run them."""
    overrides = [f"data={SAMPLE}", *MIX]
    text = plan(capsys, "--step", "7", "--ranks", "4", *MIX).partition("step 7:\n")[2]
    recipe = load_recipe("multimodal_tiny", overrides)
    sources = {n: open_source(n, config, recipe.data) for n, config in recipe.modalities.items()}
    order = Plan(recipe.seed, [source.stream for source in sources.values()])
    (step,) = StepLoader(list(sources.values()), order, 0, 1, 7, 8)
    blocks = re.split(r"\n(?=\S)", text.rstrip())
    assert len(blocks) == len(step) == 36
    for block, micro in zip(blocks, step, strict=True):
        head, *samples = block.splitlines()
        assert head.startswith(
            f"{order.corpus(7, micro.modality, micro.index)}, micro-batch {micro.index} on rank "
        )
        assert f"on rank {micro.index % 4}, " in head and len(samples) == len(micro.batch.source)
        corpus = sources[micro.modality].corpus
        if micro.modality != "text":
            keys = [corpus.key(draw.unit) for draw in order.draws(7, micro.modality, micro.index)]
            assert [sample.split()[0] for sample in samples] == keys


PAIR = "modalities.image.data.corpora={a: multimodal-train-000000.tar, b: multimodal-train-000001.tar}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--ranks", "5"], "not a multiple of 5 ranks; set 15"),
        (["modalities.text.data.batch_tokens=99"], "batch_tokens=99 has no meaning with data.mode=blocks"),
        (
            [*SAMPLES, "modalities.text.data.batch_tokens=63"],
            "batch_tokens=63 holds no text of max_tokens=64; raise",
        ),
        (
            ["modalities.audio.data.batch_seconds=0.5"],
            "batch_seconds=0.5 holds no sound of data.max_seconds=0.7",
        ),
        (["modalities.audio.data.batch_seconds=inf"], "batch_seconds='inf': Input should be a finite number"),
        (
            ["modalities.audio.data.max_seconds=0.04"],
            "max_seconds=0.04 crops sounds to less than two frames, one to hide and one to show; set 0.045",
        ),
        (["modalities.image.data.temperature=2"], "temperature=2.0 has no meaning without data.corpora"),
        (["modalities.image.data.corpora={}"], "corpora is empty; name one"),
        ([PAIR, "modalities.image.data.weights={a: 1}"], "weights are of a, data.corpora of a, b; give each"),
        ([PAIR, "modalities.image.data.weights={a: 1, b: 0}"], "weights.b=0: Input should be greater than 0"),
        ([PAIR, "modalities.image.data.weights={a: 1, b: .inf}"], "weights.b=inf: Input should be a finite"),
        (
            [PAIR, "modalities.image.data.weights={a: 1, b: 1}", "modalities.image.data.temperature=2"],
            "contradict",
        ),
        (
            [PAIR, "modalities.image.data.weights={a: 1, b: 9000}"],
            "corpus image/a has a share of 0.00011, none of the",
        ),
        ([PAIR.replace("000001", "00000[01]")], "is no {name: value}; put patterns in quotes"),
        (
            [
                PAIR.replace("={a: ", ".a=").partition(",")[0],
                "modalities.image.data.corpora.b=multi*0[01].tar",
            ],
            "image/a and image/b both name the shard",
        ),
        ([PAIR.replace("000001", "000007")], "multimodal-train-000007.tar matches nothing"),
        (["modalities.image.data.corporas=x"], "did you mean 'modalities.image.data.corpora'"),
    ],
)
def test_settings_that_cannot_be_are_one_line(capsys, settings, message):
    assert main(["plan", f"data={SAMPLE}", *settings]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1


def test_a_pattern_and_corpora_are_an_error(capsys):
    assert main(["plan", f"data={SAMPLE}/multimodal*.tar", PAIR]) == 2
    assert (
        "is a pattern, but modalities.image.data.corpora names the shards; give their folder"
        in capsys.readouterr().err
    )


def test_a_fine_tuning_recipe_reads_with_the_network_it_starts_from(capsys, tmp_path):
    """Its tokenizer lies beside the weights, not beside the shards."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in (SAMPLE / "multimodal-train-000000.tar", SAMPLE / "multimodal-val-000000.tar"):
        shutil.copyfile(path, shards / path.name)
    recipe = load_recipe("text_tiny")
    model = build_model(recipe.body, recipe.modalities, has_teacher=False)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    stored = Stored(recipe, tensors, "run, step_00000001", files=SAMPLE, step=1, weights="student")
    write_export(stored, tmp_path / "text")
    settings = [
        "plan", "--recipe", "finetune_text_tiny", f"data={shards}", "task.outputs=10",
        "modalities.text.data.shards=*-train-*.tar",
    ]  # fmt: skip
    assert main([*settings, f"init={tmp_path}/text"]) == 0
    assert "text: a step is 1 micro-batches, 16.0 samples" in capsys.readouterr().out
    assert main([*settings, "task.encoder=text_tiny"]) == 2
    assert "set modalities.text.data.tokenizer=PATH" in capsys.readouterr().err
    assert main([*settings, f"modalities.text.data.tokenizer={SAMPLE}/sentencepiece.model"]) == 0
