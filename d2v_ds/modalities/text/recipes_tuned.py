"""Recipes that fine-tune on texts: GLUE's eight tasks with the released values of data2vec 2.0, and texts of your own.

What the network is comes from `init`; here stands how it learns. `scripts/finetune_glue.sh` runs all of GLUE.
"""

from __future__ import annotations

from d2v_ds.modalities.text.recipes import text_base, text_tiny
from d2v_ds.modalities.text.samples import TextData
from d2v_ds.model.tuned import Task
from d2v_ds.recipe import Optim, Recipe, Train

PAIR = "json.text_b"


def finetune_text_cola() -> Recipe:
    """CoLA: is a sentence grammatical? 16 sentences a step.

    python train.py --deepspeed zero0 --recipe finetune_text_cola init=RUN data=DIR

    Expected: unknown to us for data2vec 2.0, whose average over GLUE is said to be RoBERTa's on the same data.
    """
    return glue("cola", ("unacceptable", "acceptable"), ("matthews",), 16, 5_336, 320, pair=None)


def finetune_text_mnli() -> Recipe:
    """MNLI: does one sentence follow from another, contradict it, or neither? 32 pairs a step.

    python train.py --deepspeed zero0 --recipe finetune_text_mnli init=RUN data=DIR

    Expected: unknown to us for data2vec 2.0, whose average over GLUE is said to be RoBERTa's on the same data.

    Scored by the mean over both development sets.
    """
    classes = ("entailment", "neutral", "contradiction")
    recipe = glue("mnli", classes, ("accuracy",), 32, 123_873, 7_432)
    recipe.task.test = {part: f"*-val-{part}-*.tar" for part in ("matched", "mismatched")}
    return recipe


def finetune_text_mrpc() -> Recipe:
    """MRPC: do two sentences say the same? 16 pairs a step.

    python train.py --deepspeed zero0 --recipe finetune_text_mrpc init=RUN data=DIR

    Expected: unknown to us for data2vec 2.0, whose average over GLUE is said to be RoBERTa's on the same data.
    """
    return glue("mrpc", ("not_equivalent", "equivalent"), ("accuracy", "f1"), 16, 2_296, 137)


def finetune_text_qnli() -> Recipe:
    """QNLI: does a sentence answer a question? 32 pairs a step.

    python train.py --deepspeed zero0 --recipe finetune_text_qnli init=RUN data=DIR

    Expected: unknown to us for data2vec 2.0, whose average over GLUE is said to be RoBERTa's on the same data.
    """
    return glue("qnli", ENTAILED, ("accuracy",), 32, 33_112, 1_986)


def finetune_text_qqp() -> Recipe:
    """QQP: do two questions ask the same? 32 pairs a step.

    python train.py --deepspeed zero0 --recipe finetune_text_qqp init=RUN data=DIR

    Expected: unknown to us for data2vec 2.0, whose average over GLUE is said to be RoBERTa's on the same data.
    """
    return glue("qqp", ("not_duplicate", "duplicate"), ("accuracy", "f1"), 32, 113_272, 28_318)


def finetune_text_rte() -> Recipe:
    """RTE: does one sentence follow from another? 16 pairs a step.

    python train.py --deepspeed zero0 --recipe finetune_text_rte init=RUN data=DIR

    Expected: unknown to us for data2vec 2.0, whose average over GLUE is said to be RoBERTa's on the same data.
    """
    return glue("rte", ENTAILED, ("accuracy",), 16, 2_036, 122)


def finetune_text_sst2() -> Recipe:
    """SST-2: is a sentence of a film review positive? 32 sentences a step.

    python train.py --deepspeed zero0 --recipe finetune_text_sst2 init=RUN data=DIR

    Expected: unknown to us for data2vec 2.0, whose average over GLUE is said to be RoBERTa's on the same data.
    """
    return glue("sst2", ("negative", "positive"), ("accuracy",), 32, 20_935, 1_256, pair=None)


def finetune_text_stsb() -> Recipe:
    """STS-B: how alike are two sentences, from 0 to 5? Regression, 16 pairs a step.

    python train.py --deepspeed zero0 --recipe finetune_text_stsb init=RUN data=DIR

    Expected: unknown to us for data2vec 2.0, whose average over GLUE is said to be RoBERTa's on the same data.
    """
    recipe = glue("stsb", None, ("pearson", "spearman"), 16, 3_598, 214)
    recipe.task.factor = 0.2  # scores go from 0 to 5, what the head learns from 0 to 1
    return recipe


ENTAILED = ("entailment", "not_entailment")


def glue(
    name: str,
    classes: tuple[str, ...] | None,
    metrics: tuple[str, ...],
    batch: int,
    steps: int,
    warmup_steps: int,
    pair: str | None = PAIR,
) -> Recipe:
    """What the released files share: ten epochs, 4,400 tokens at most, weight decay on everything. The learning rate is
    one of 1e-5, 2e-5, 4e-5 and 6e-5, the best on the development set."""
    network = text_base()
    text = network.modalities["text"]
    text.data = TextData(
        shards="*-train-*.tar",
        mode="samples",
        pair=pair,
        batch=batch,
        batch_tokens=4_400,
        micro_batches=1,
        tokenizer=text.data.tokenizer,
    )
    every = -(-steps // 10)
    return Recipe(
        name=f"finetune_text_{name}",
        body=network.body,
        modalities={"text": text},
        task=Task(
            head="sentence_classification",
            outputs=len(classes) if classes else 1,
            labels=classes,
            metrics=metrics,
            encoder=network.name,
            test="*-val-*.tar",
            test_every=every,
        ),
        optim=Optim(
            lr=2e-5,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.1,
            decay="all",
            schedule="linear",
            warmup_steps=warmup_steps,
        ),
        train=Train(steps=steps, log_every=50, save_every=every, keep_checkpoints=1),
        data=f"shards/glue/{name}",
    )


def finetune_text_tiny() -> Recipe:
    """Classes of your own texts, small, on two CPU cores.

    python train.py --deepspeed zero0 --recipe finetune_text_tiny init=RUN data=DIR task.outputs=N

    DIR is what `d2v prepare table` makes; of pairs modalities.text.data.pair=json.text_b; numbers: task.outputs=1.
    """
    network = text_tiny()
    text = network.modalities["text"]
    text.data = TextData(shards="*-train-*.tar", mode="samples", batch=16, micro_batches=1)
    return Recipe(
        name="finetune_text_tiny",
        body=network.body,
        modalities={"text": text},
        task=Task(
            head="sentence_classification",
            outputs=2,
            encoder=network.name,
            test="*-val-*.tar",
            test_every=100,
        ),
        optim=Optim(
            lr=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.1,
            decay="all",
            schedule="linear",
            warmup_steps=20,
        ),
        train=Train(steps=200, log_every=20, save_every=100, workers=1),
        precision="fp32",
    )
