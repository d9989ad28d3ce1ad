"""Settings and metrics that foreign classes wrote are read without those classes, and become plain."""

from __future__ import annotations

import argparse
import pickle
import sys
from collections import OrderedDict, defaultdict
from enum import Enum, auto
from pathlib import Path, PurePosixPath
from typing import Any, Optional

import pytest
import torch
from torch_files import FORMATS, modules, save, write_zip

from d2v_ds.convert.unpickle import Name, StandIn, plain, read_torch_file

# ---- omegaconf: classes of our own under its names, with the attributes that its files hold ----


class Metadata:
    def __init__(self, key: Any) -> None:
        self.ref_type, self.object_type, self.optional, self.key = Any, dict, True, key
        self.resolver_cache = defaultdict(dict)


class Node:
    """Pickled by `__getstate__`, set up again by `__setstate__`, as omegaconf's are."""

    def __init__(self, parent: Node | None, key: Any):
        self._parent, self._metadata = parent, Metadata(key)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise AssertionError("it was really unpickled")


class DictConfig(Node):
    pass


class ListConfig(Node):
    pass


class AnyNode(Node):
    pass


class EnumNode(Node):
    pass


class Modality(Enum):
    AUDIO = auto()
    IMAGE = auto()


class EMAMode(Enum):
    FULL = "full"


def omegaconf_node(value: Any, parent: Node | None = None, key: Any = None) -> Node:
    """Its tree for a value: nodes with their parents, contents in `_content` or `_val`."""
    if isinstance(value, dict):
        node = DictConfig(parent, key)
        node._content = {k: omegaconf_node(v, node, k) for k, v in value.items()}
    elif isinstance(value, list):
        node = ListConfig(parent, key)
        node._content = [omegaconf_node(v, node, i) for i, v in enumerate(value)]
    else:
        node = (EnumNode if isinstance(value, Enum) else AnyNode)(parent, key)
        node._val = value
    return node


OMEGACONF = {
    "omegaconf__dictconfig": [DictConfig],
    "omegaconf__listconfig": [ListConfig],
    "omegaconf__nodes": [AnyNode, EnumNode],
    "omegaconf__base": [Metadata, Node],
    "fairseq__data__dictionary": [Modality, EMAMode],
}
CFG = {
    "common": {"seed": 7, "path": None, "fp16": True},
    "model": {
        "_name": "data2vec_multi",
        "seed": "${common.seed}",
        "modalities": {"image": {"type": Modality.IMAGE, "lr": "${...lr}", "near": "${.type}"}},
        "lr": 1e-3,
        "betas": [0.9, "${model.lr}"],
        "ema": EMAMode.FULL,
        "third": "${model.betas.0}",
        "lost": "${nowhere.to.be}",
        "resolver": "${oc.env:HOME}",
        "missing": "???",
    },
}
PLAIN = {
    "common": {"seed": 7, "path": None, "fp16": True},
    "model": {
        "_name": "data2vec_multi",
        "seed": 7,
        "modalities": {"image": {"type": 2, "lr": 1e-3, "near": 2}},
        "lr": 1e-3,
        "betas": [0.9, 1e-3],
        "ema": "full",
        "third": 0.9,
        "lost": "${nowhere.to.be}",
        "resolver": "${oc.env:HOME}",
        "missing": "???",
    },
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_an_omegaconf_cfg_becomes_a_dict(format, protocol, tmp_path):
    """Without omegaconf, references followed to where they lead: from the root, or up by dots."""
    with modules(**OMEGACONF):
        cfg = omegaconf_node(CFG)
        value = {"cfg": cfg, "model": {"w": torch.ones(2)}, "part": cfg._content["model"]}
        path = save(tmp_path / "a.pt", value, format, protocol)
    assert not {"omegaconf", "fairseq"} & set(sys.modules)
    ours = read_torch_file(path)
    assert not {"omegaconf", "fairseq"} & set(sys.modules)
    assert isinstance(ours["cfg"], StandIn) and ours["cfg"].module == "omegaconf.dictconfig"
    assert plain(ours["cfg"]) == PLAIN
    assert plain(ours["part"]) == PLAIN["model"]
    assert torch.equal(ours["model"]["w"], torch.ones(2))


def test_the_real_omegaconf_gives_the_same(tmp_path):
    """Where it is installed, which is nowhere needed."""
    omegaconf = pytest.importorskip("omegaconf")
    settings = {**CFG, "model": {k: v for k, v in CFG["model"].items() if k not in ("modalities", "ema")}}
    path = save(tmp_path / "a.pt", {"cfg": omegaconf.OmegaConf.create(settings)})
    expected = {**PLAIN, "model": {k: v for k, v in PLAIN["model"].items() if k not in ("modalities", "ema")}}
    assert plain(read_torch_file(path)["cfg"]) == expected


def test_a_reference_to_itself_leads_nowhere(tmp_path):
    """And ends: the inner one is the name of its class."""
    with modules(**OMEGACONF):
        content = pickle.dumps(omegaconf_node({"a": "${b}", "b": "${a}"}), 2)
    made = plain(read_torch_file(write_zip(tmp_path / "a.pt", content)))
    assert set(made.values()) == {"omegaconf.nodes.AnyNode"}


# ---- fairseq's own classes ----


class StopwatchMeter:
    def __init__(self) -> None:
        self.start, self.sum, self.round = None, torch.tensor(2.5), 1


class MetersDict(OrderedDict):
    def __init__(self) -> None:
        super().__init__()
        self.priorities = []


class Choice(str, Enum):  # noqa: UP042  (as fairseq's are)
    SUM = "sum"


class Task:
    __slots__ = ("size",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("format", FORMATS)
def test_enums_and_meters_of_fairseq_are_stood_in_for(format, protocol, tmp_path):
    """By what the file says of them: class, arguments, state, and the tensors inside."""
    with modules(
        fairseq__logging__meters=[StopwatchMeter, MetersDict], fairseq__dataclass=[Choice], tasks=[Task]
    ):
        meters = MetersDict()
        meters["wall"] = StopwatchMeter()
        meters.priorities.append((1, "wall"))
        task = Task()
        task.size = 3
        value = {"metrics": {"train": meters}, "choice": Choice.SUM, "class": StopwatchMeter, "task": task}
        path = save(tmp_path / "a.pt", value, format, protocol)
    assert "fairseq" not in sys.modules
    ours = read_torch_file(path)
    train = ours["metrics"]["train"]
    assert (train.module, train.name) == ("fairseq.logging.meters", "MetersDict")
    assert list(train.entries) == ["wall"] and train.state == {"priorities": [(1, "wall")]}
    assert train.entries["wall"].state == {"start": None, "sum": torch.tensor(2.5), "round": 1}
    assert ours["choice"].args == ("sum",) and plain(ours["choice"]) == "sum"
    assert ours["class"] == Name("fairseq.logging.meters", "StopwatchMeter")
    assert plain(ours["class"]) == "fairseq.logging.meters.StopwatchMeter"
    assert plain(ours["metrics"]) == {
        "train": {"wall": {"start": None, "sum": torch.tensor(2.5), "round": 1}}
    }
    assert ours["task"].state == (None, {"size": 3})


# ---- plain ----


def test_a_namespace_becomes_a_dict(tmp_path):
    """The settings of old files, with what is nested in them."""
    inner = argparse.Namespace(path=PurePosixPath("/data/x"), kinds={"a", "b"})
    path = save(tmp_path / "a.pt", {"args": argparse.Namespace(arch="data2vec", lr=[1e-4], inner=inner)})
    made = plain(read_torch_file(path)["args"])
    assert sorted(made["inner"].pop("kinds")) == ["a", "b"]
    assert made == {"arch": "data2vec", "lr": [1e-4], "inner": {"path": "/data/x"}}


def test_plain_values_stay(tmp_path):
    value = {"a": [1, (2.0, "x", None)], 3: {"b": torch.float16}}
    assert plain(value) == value and plain(value) is not value


def test_typing_and_foreign_dates_are_no_obstacle(tmp_path):
    """As structured settings hold them."""
    import datetime

    maybe = Optional[str]  # noqa: UP045  (a union of the new kind is pickled otherwise)
    value = {"kinds": list[int], "maybe": maybe, "day": datetime.date(2022, 12, 13)}
    value |= {"any": Any, "path": Path("a/b")}
    ours = plain(read_torch_file(save(tmp_path / "a.pt", value)))
    assert ours["any"] == "typing.Any" and ours["path"] == "a/b"


def test_objects_that_know_each_other_become_plain(tmp_path):
    """A task and its trainer, say, which are in nobody's way."""

    class Task:
        pass

    with modules(fairseq__tasks=[Task]):
        task, trainer = Task(), Task()
        task.trainer, trainer.task, trainer.step = trainer, task, 3
        content = pickle.dumps({"task": task}, 2)
    made = plain(read_torch_file(write_zip(tmp_path / "a.pt", content)))
    assert made == {"task": {"trainer": {"task": "fairseq.tasks.Task", "step": 3}}}


def test_what_holds_itself_or_nests_too_deep_has_no_plain_form():
    looped: list[Any] = []
    looped.append(looped)
    with pytest.raises(ValueError, match="holds itself"):
        plain(looped)
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    with pytest.raises(ValueError, match="nest deeper than 200"):
        plain(deep)
