"""The names under which users of fairseq know data2vec 2.0, on our own classes.

    model = Data2VecMultiModel(Data2VecMultiConfig(), modalities=D2vModalitiesConfig.image)
    model.load_state_dict(torch.load(file)["model"])
    features = model.extract_features(pixels)["x"]

Settings have fairseq's names, and what is not set is as in the released base model of the modality (fairseq's own
defaults are of no released model). Weights have our names, and load under fairseq's too.
B samples, T tokens, E extra tokens, D dim.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from d2v_ds.config import nearest
from d2v_ds.convert import fairseq
from d2v_ds.convert.fairseq_file import flat_state, new_names
from d2v_ds.convert.fairseq_settings import settings_v2
from d2v_ds.convert.fit import is_live_copy
from d2v_ds.modalities import MODALITIES
from d2v_ds.modalities.audio.samples import num_frames
from d2v_ds.modalities.build import build_parts, init_model
from d2v_ds.modalities.text.samples import PAD
from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import TEACHER, Data2Vec, Output
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.layers import Body
from d2v_ds.recipe import Recipe, recipes

log = logging.getLogger(__name__)


class Settings(SimpleNamespace):
    """Settings under fairseq's names; those that are not given are as released."""


class D2vImageConfig(Settings):
    name = "image"


class D2vAudioConfig(Settings):
    name = "audio"


class D2vTextConfig(Settings):
    name = "text"


class D2vModalitiesConfig:
    """The settings of each modality; `D2vModalitiesConfig.image` is images as released."""

    image, audio, text = D2vImageConfig(), D2vAudioConfig(), D2vTextConfig()

    def __init__(
        self,
        image: D2vImageConfig | None = None,
        audio: D2vAudioConfig | None = None,
        text: D2vTextConfig | None = None,
    ):
        given = {"image": image, "audio": audio, "text": text}
        for name, settings in given.items():
            if settings is not None:
                setattr(self, name, settings)


class Data2VecMultiConfig(Settings):
    """`modalities`: a D2vModalitiesConfig, or a dict of dicts as in yaml files. `supported_modality`: whose the model
    is, where the model is not told."""

    modalities = D2vModalitiesConfig
    supported_modality = None


class Data2VecMultiModel(Data2Vec):
    """data2vec 2.0 of one modality or several.

    `modalities`: one of them or a list: D2vModalitiesConfig.image, "image", or what has such a `name`. `skip_ema`:
    no teacher. Raises ValueError for a setting that is unknown or that we do not have.
    """

    def __init__(
        self,
        cfg: Data2VecMultiConfig,
        modalities: Any = None,
        skip_ema: bool = False,
        task: Any = None,
        fairseq_compat: bool = False,
    ):
        modalities = cfg.supported_modality if modalities is None else modalities
        if modalities is None:
            raise ValueError("say which modalities the model has: modalities=D2vModalitiesConfig.image")
        names = names_of(modalities)
        own = {m.name: m for m in as_list(modalities) if isinstance(m, Settings)}
        body, configs = translate(cfg, names, own)
        super().__init__(body, configs, *build_parts(body, configs, fairseq_compat), fairseq_compat)
        init_model(self, body)
        if not skip_ema:
            self.build_teacher()
        self.cfg = cfg

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights under our names or fairseq's, a teacher nested in `_ema` included; `model` of a whole
        checkpoint is found. Where there is no teacher, it starts as a copy of the student."""
        state = our_names(flat_state(state_dict if "model" in state_dict else {"model": state_dict}))
        own = set(self.state_dict())
        teacher = {name for name in own if name.startswith(TEACHER)}
        if not teacher:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(TEACHER)}
        elif not any(name.startswith(TEACHER) for name in state):
            log.info("these weights have no teacher: it is a copy of the student")
            state |= {name: state[s] for name in teacher if (s := name.removeprefix(TEACHER)) in state}
        else:
            state = {name: tensor for name, tensor in state.items() if not is_live_copy(name, own)}
        return super().load_state_dict(state, strict=strict, assign=assign)

    def forward(
        self, source: Any, *args: Any, features_only: bool = False, **kwargs: Any
    ) -> Output | dict[str, Any]:
        """Features with `features_only`, or the loss of one of our batches."""
        if isinstance(source, Batch):
            return super().forward(source, *args, **kwargs)
        if not features_only:
            raise ValueError(
                "a loss needs masks, which come with a batch of ours; for features, model.extract_features(source); "
                "to train, d2v_ds.train(recipe=...)"
            )
        kwargs = {"mask": True} | kwargs
        return self.extract_features(source, *args, **kwargs)

    def extract_features(
        self,
        source: Tensor,
        mode: Any = None,
        padding_mask: Tensor | None = None,
        mask: bool = False,
        remove_extra_tokens: bool = True,
    ) -> dict[str, Any]:
        """{x: (B, T, D), padding_mask: (B, T) or None, layer_results: each block's feed-forward output
        (B, E + T, D), mask: None} of input that is prepared: normalised pixels (B, 3, H, W), a normalised
        waveform (B, S) or token ids (B, T).

        `padding_mask`: True = padding, (B, S) or (B, T). Gradients flow, and dropout is as `model.eval()` says.
        """
        if mask:
            raise ValueError("mask=True is for training; features are of whole samples: mask=False")
        modality = self.only_modality() if mode is None else names_of(mode)[0]
        batch = Batch(modality, source, self.padding_of(modality, source, padding_mask))
        outputs, ffns = self.encode(batch)
        x, extra, padding = self.norm(outputs[-1]), self.configs[modality].extra_tokens, batch.padding_BT
        if remove_extra_tokens:
            x = x[:, extra:]
        elif padding is not None:
            padding = nn.functional.pad(padding, (extra, 0), value=False)
        return {"x": x, "padding_mask": padding, "layer_results": ffns, "mask": None}

    def only_modality(self) -> str:
        if len(self.configs) > 1:
            raise ValueError(
                f"this model has {', '.join(self.configs)}; say which: mode={next(iter(self.configs))!r}"
            )
        return next(iter(self.configs))

    def padding_of(self, modality: str, source: Tensor, padding: Tensor | None) -> Tensor | None:
        """Which tokens are padding; None if none is."""
        if modality == "text" and padding is None:
            padding = source == PAD
        if padding is None or not bool(padding.any()):
            return None
        padding = padding.bool()
        if modality != "audio":
            return padding
        layers = self.configs[modality].conv_layers
        frames = torch.tensor(
            [num_frames(int(n), layers) for n in (~padding).sum(dim=1)], device=padding.device
        )
        padding_BT = (
            torch.arange(num_frames(source.shape[1], layers), device=padding.device)[None] >= frames[:, None]
        )
        return padding_BT if bool(padding_BT.any()) else None

    def remove_pretraining_modules(self, modality: Any = None, keep_decoder: bool = False) -> None:
        """Drops the teacher, the decoders and, where one is named, the other modalities."""
        self.teacher = None
        if not keep_decoder:
            self.decoders = nn.ModuleDict()
        for name in set(self.configs) - set(self.configs if modality is None else names_of(modality)):
            del self.encoders[name], self.configs[name]
            if name in self.decoders:
                del self.decoders[name]


def as_list(modalities: Any) -> list[Any]:
    if isinstance(modalities, D2vModalitiesConfig) or modalities is D2vModalitiesConfig:
        return [modalities.image, modalities.audio, modalities.text]
    return list(modalities) if isinstance(modalities, (list, tuple)) else [modalities]


def names_of(modalities: Any) -> list[str]:
    """image, audio, text, of whatever says so."""
    names = []
    for modality in as_list(modalities):
        name = str(getattr(modality, "name", modality)).lower()
        if name not in MODALITIES:
            raise ValueError(
                f"modality {modality!r} is unknown{nearest(name, MODALITIES)}: D2vModalitiesConfig.image"
            )
        names.append(name)
    return names


def translate(
    cfg: Data2VecMultiConfig, names: list[str], own: dict[str, Settings]
) -> tuple[Body, dict[str, ModalityConfig]]:
    """Our configuration: the released base model's, with what was set in its place."""
    body, configs = None, {}
    for name in names:
        recipe = released(name, is_alone=len(names) == 1)
        settings = settings_v2(recipe, has_teacher=True)
        part = settings["modalities"][name]
        if name == "text":  # fairseq has it from the dictionary
            part["vocabulary"] = recipe.modalities[name].vocabulary
        shared = {k: v for k, v in vars(cfg).items() if k not in ("modalities", "supported_modality")}
        settings = merge(settings, shared, "Data2VecMultiConfig")
        if "embed_dim" in part:  # images say it twice
            part["embed_dim"] = settings["embed_dim"]
        for given in (settings_of(cfg.modalities, name), settings_of(own, name)):
            part = merge(part, given, f"D2v{name.capitalize()}Config")
        settings["modalities"][name] = part
        body, config = fairseq.our_config(settings)
        configs |= config
    return body, configs


def settings_of(modalities: Any, name: str) -> dict[str, Any]:
    """What is set for a modality, by name in a mapping (as yaml files are read) or as an attribute."""
    if isinstance(modalities, Mapping):
        for key in modalities:
            if key not in (*MODALITIES, "_name"):
                raise ValueError(f"modalities has no '{key}'{nearest(str(key), MODALITIES)}")
        given = modalities.get(name)
    else:
        given = getattr(modalities, name, None)
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else vars(given)


def released(name: str, is_alone: bool) -> Recipe:
    recipe = recipes()[f"{name}_base" if is_alone else "multimodal_base"]()
    recipe.modalities = {name: recipe.modalities[name]}
    return recipe


def merge(settings: dict[str, Any], given: dict[str, Any], what: str) -> dict[str, Any]:
    for key in given:
        if key not in settings and key != "_name":  # which fairseq has in every group
            raise ValueError(f"{what} has no setting '{key}'{nearest(key, settings)}")
    merged = copy.deepcopy(settings)
    for key, value in given.items():
        if key == "_name":
            continue
        nested = vars(value) if isinstance(value, SimpleNamespace) else value
        nested = dict(nested) if isinstance(nested, Mapping) else nested
        is_group = isinstance(nested, dict) and isinstance(merged[key], dict)
        merged[key] = merge(merged[key], nested, f"{what}.{key}") if is_group else nested
    return merged


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fairseq's names as ours; others, ours among them, as they are."""
    named = {}
    for name, tensor in new_names(state).items():
        try:
            ours = fairseq.our_name(name)
        except ValueError:
            named[name] = tensor
            continue
        if ours is not None:
            named[ours] = fairseq.our_tensor(name, tensor)
    return named
