"""How fairseq's fine-tuned models hold the pre-trained one: which setting, which prefix, which head."""

from __future__ import annotations

from dataclasses import dataclass

from d2v_ds.convert.names import Names

SENTENCE = "classification_heads.sentence_classification_head"


@dataclass
class Tuned:
    """How a fine-tuned model of fairseq holds the pre-trained one."""

    kind: str
    prefix: str
    """Before the names of the encoder."""
    inner: str
    """The setting that holds the configuration of pre-training."""
    head: Names
    """Names of the head's tensors, ours without `head.`."""


SENTENCE_HEAD = Names([(f"{SENTENCE}.dense.{{w}}", "dense.{w}"), (f"{SENTENCE}.out_proj.{{w}}", "proj.{w}")])
TUNED = {
    "mae_image_classification": Tuned(
        "image_classification",
        "model.",
        "pretrained_model_args",
        Names([("fc_norm.{w}", "norm.{w}"), ("head.{w}", "proj.{w}")]),
    ),
    "wav2vec_ctc": Tuned(
        "ctc", "w2v_encoder.w2v_model.", "w2v_args", Names([("w2v_encoder.proj.{w}", "proj.{w}")])
    ),
    "data2vec_text_classification": Tuned(
        "sentence_classification", "model.", "pretrained_model_args", SENTENCE_HEAD
    ),
}
TUNED_IN_PLACE = Tuned(
    "sentence_classification", "", "", SENTENCE_HEAD
)  # v1 text: the same model, with a head
