"""From configuration to a fresh, initialised model."""

from __future__ import annotations

from d2v_ds.modalities import net
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.layers import Body, bert_init, shrink_residuals


def build_model(
    body: Body, modalities: dict[str, ModalityConfig], fairseq_compat: bool = False, has_teacher: bool = True
) -> Data2Vec:
    """The student, and its teacher as an exact copy, for the given modalities.

    Order of initialisation as in the original: everything BERT-like, then each modality's own resets, then the
    teacher. Random numbers come from torch's default generator: seed it first, equally on all ranks.
    """
    encoders = {
        name: net(name).build_encoder(config, body, fairseq_compat) for name, config in modalities.items()
    }
    decoders = {name: net(name).build_decoder(config, body.dim) for name, config in modalities.items()}
    model = Data2Vec(body, modalities, encoders, decoders, fairseq_compat)
    bert_init(model)
    if body.norm_first:
        shrink_residuals(model.blocks)
    for name in modalities:
        net(name).init_encoder(encoders[name])
        net(name).init_decoder(decoders[name])
    if has_teacher:
        model.build_teacher()
    return model
