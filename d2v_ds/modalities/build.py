"""From configuration to a fresh, initialised model."""

from __future__ import annotations

from d2v_ds.modalities import net
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.decoder import Decoder
from d2v_ds.model.encoder import ModalityConfig, ModalityEncoder
from d2v_ds.model.layers import Body, bert_init, shrink_residuals
from d2v_ds.model.tuned import Task, Tuned


def build_model(
    body: Body, modalities: dict[str, ModalityConfig], fairseq_compat: bool = False, has_teacher: bool = True
) -> Data2Vec:
    """The student, and its teacher as an exact copy, for the given modalities.

    Order of initialisation as in the original: everything BERT-like, then each modality's own resets, then the
    teacher. Random numbers come from torch's default generator: seed it first, equally on all ranks.
    """
    model = Data2Vec(body, modalities, *build_parts(body, modalities, fairseq_compat), fairseq_compat)
    init_model(model, body)
    if has_teacher:
        model.build_teacher()
    return model


def build_tuned(
    body: Body, modalities: dict[str, ModalityConfig], task: Task, fairseq_compat: bool = False
) -> Tuned:
    """Encoder and head of a fine-tuned model, as `build_model` makes its own."""
    encoders = {
        name: net(name).build_encoder(config, body, fairseq_compat) for name, config in modalities.items()
    }
    model = Tuned(body, modalities, encoders, task, fairseq_compat)
    init_model(model, body)
    model.finish_init()
    return model


def build_parts(
    body: Body, modalities: dict[str, ModalityConfig], fairseq_compat: bool = False
) -> tuple[dict[str, ModalityEncoder], dict[str, Decoder]]:
    """Encoders and decoders by modality."""
    encoders = {
        name: net(name).build_encoder(config, body, fairseq_compat) for name, config in modalities.items()
    }
    return encoders, {name: net(name).build_decoder(config, body.dim) for name, config in modalities.items()}


def init_model(model: Data2Vec, body: Body) -> None:
    """Fresh values for the student; `build_teacher` comes after it."""
    bert_init(model)
    if body.norm_first:
        shrink_residuals(model.blocks)
    for name, encoder in model.encoders.items():
        net(name).init_encoder(encoder)
        if name in model.decoders:
            net(name).init_decoder(model.decoders[name])
