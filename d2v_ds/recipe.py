"""A recipe says WHAT is learned: model, masks, targets, batch, optimiser, length. Typed, validated, dumped to YAML.

How a machine runs it stands in a ds_config, on which bytes in a shard index, what is different this time on
the command line.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from d2v_ds.config import Config, dotted_keys, explain, nearest
from d2v_ds.data.remote import Remote
from d2v_ds.modalities import MODALITIES, config_class, known
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.tuned import Task

Variant = Literal["released", "paper"]
"""Whose values a recipe has where the two differ: the configuration files that were released, or the paper."""


class EMA(Config):
    """The teacher's decay tau: linear from `start` to `end` over `anneal_steps`, counted in applied steps."""

    start: float = 0.999
    end: float = 0.99999
    anneal_steps: NonNegativeInt = 75_000


class Optim(Config):
    """AdamW, and how its learning rate goes over the run."""

    lr: float = 7.5e-4
    """The highest."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: not biases, norms, other one-dimensional parameters and ALiBi scales, as every original
    intends; or everything, as fairseq's runs did (its exception never acts)."""
    schedule: Literal["cosine", "tri_stage", "linear"] = "cosine"
    """cosine: linear warm-up from `min_lr`, then half a cosine down to it at the last step. tri_stage: linear
    warm-up, hold, exponential decay. linear: as cosine, but down in a line."""
    warmup_steps: NonNegativeInt = 8_000
    """Of cosine and linear."""
    min_lr: float = 0.0
    """Of cosine and linear."""
    phases: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.03, 0.9, 0.07)
    """Of tri_stage: warm-up, hold and decay, as shares of the steps."""
    phase_scales: tuple[PositiveFloat, PositiveFloat] = (0.01, 0.01)
    """Of tri_stage: the first and the last learning rate, times `lr`."""
    clip: float = 0.0
    """Largest global gradient norm; 0 = no clipping."""

    @model_validator(mode="after")
    def consistent(self) -> Optim:
        if self.schedule == "tri_stage" and abs(sum(self.phases) - 1) > 1e-6:
            raise ValueError(f"optim.phases={list(self.phases)} are shares of the steps and must add up to 1")
        if self.schedule == "tri_stage" and (self.warmup_steps or self.min_lr):
            raise ValueError(
                f"optim.warmup_steps={self.warmup_steps} and optim.min_lr={self.min_lr} have no meaning with "
                "optim.schedule=tri_stage; set both to 0, and optim.phases and optim.phase_scales instead"
            )
        return self


class Train(Config):
    steps: int = 400_000
    log_every: PositiveInt = 50
    save_every: PositiveInt = 5_000
    keep_checkpoints: PositiveInt = 2
    """The last so many stay."""
    keep_every: NonNegativeInt = 0
    """Besides, those at multiples of so many steps stay for good; 0 = none."""
    save: Literal["async", "sync"] = "async"
    """async: training goes on while a copy in host memory is written; sync: it waits."""
    save_failures: PositiveInt = 3
    """Saves in a row that may fail (disk full, quota, read-only folder); at this many the run stops."""
    compile: bool = False
    """Blocks run through torch.compile, which needs a C++ compiler on a CPU; the first steps take a minute longer."""
    workers: NonNegativeInt = 2
    """Data workers of each rank; 0 reads in the training process."""
    skip_limit: PositiveInt = 10
    """Steps in a row that may be skipped for gradients that are not finite."""
    max_bad_share: float = 0.001
    """Share of unreadable samples above which a run stops."""
    timeout_minutes: float = 30.0
    """How long a rank waits for the others."""
    hang_seconds: PositiveFloat = 300.0
    """A step that takes longer, and `hang_factor` times the median, is a hang: stacks are written, the run ends."""
    hang_factor: NonNegativeFloat = 20.0
    """0 = nobody watches."""
    straggler_factor: PositiveFloat = 1.5
    """The slowest rank is named on the console if it takes this many times what the middle one does."""
    stop_seconds: float = 150.0
    """How long a run that was asked to stop may take to the end of its step; after that it leaves unsaved."""

    @model_validator(mode="after")
    def consistent(self) -> Train:
        if self.keep_every % self.save_every:
            raise ValueError(
                f"train.keep_every={self.keep_every} must be a multiple of train.save_every={self.save_every}, or 0: "
                f"set it to {-(-self.keep_every // self.save_every) * self.save_every}"
            )
        return self


class Health(Config):
    """What a run does when its targets or features stop carrying anything (docs/health.md)."""

    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """warn: say it and go on. stop: end with an error (exit code 3). rollback: go on from the last checkpoint that was
    healthy, with `rollback_lr` times the learning rate."""
    patience: PositiveInt = 2
    """Logged steps in a row that must say the same before it counts."""
    max_rollbacks: PositiveInt = 3
    """After so many a run stops."""
    rollback_lr: float = Field(0.5, gt=0, le=1)
    """Factor on the learning rate at each rollback."""
    min_target_var: NonNegativeFloat = 0.1
    """As in the original: after 5,000 updates a run ends when the targets' standard deviation is below; 0 = never."""
    min_pred_var: NonNegativeFloat = 0.01
    """The same of predictions."""


class Probe(Config):
    """Closed-form probes of the features while a run goes on; they change nothing of it (docs/health.md)."""

    every: NonNegativeInt = 0
    """Steps between them; 0 = none."""
    train: str | None = None
    """Labelled shards to fit on: a pattern, inside the data folder or a path of its own."""
    test: str | None = None
    """Labelled shards to test on."""
    label: str = "cls;json.label"
    """Member, or key of a json member, that holds the class, an integer from 0."""
    samples: PositiveInt = 2_000
    """At most so many of each part, always the same."""
    batch: PositiveInt = 32

    @model_validator(mode="after")
    def consistent(self) -> Probe:
        for key in ("train", "test"):
            if self.every and not getattr(self, key):
                raise ValueError(
                    f"probe.every={self.every} needs labelled shards: set probe.{key} to a pattern, or probe.every=0"
                )
        return self


class Recipe(Config):
    name: str
    modalities: dict[str, SerializeAsAny[ModalityConfig]]
    body: Body = Body()
    task: Task | None = None
    """What is learned with labels (fine-tuning); None = pre-training. Network and weights then come from `init`."""
    ema: EMA = EMA()
    optim: Optim = Optim()
    train: Train = Train()
    health: Health = Health()
    probe: Probe = Probe()
    data: str = "shards/sample"
    """Folder of shards, or a pattern: a{000..123}.tar, *.tar, several joined by `::`; or URLs (https, s3, gs, hf)."""
    remote: Remote = Remote()
    out: str | None = None
    """Run folder; None = checkpoints/<name>."""
    init: str | None = None
    """Weights that a new run starts from: a run folder, an export, a fairseq file or a Hugging Face folder. A run
    that has a checkpoint goes on from that, so this stands outside the recipe's hash."""
    init_updates: Literal["tau", "steps", "none"] = "tau"
    """What goes on from the update count of `init`: the teacher's decay; also the steps, and with them learning
    rate and data; or nothing."""
    seed: int = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Decides a ds_config's "auto"; auto = bf16 where the hardware has it, else fp32."""
    fairseq_compat: bool = False
    """Does as fairseq does where that differs from the paper (docs/decisions.md lists all)."""

    @field_validator("modalities", mode="before")
    @classmethod
    def typed_modalities(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name: settings if isinstance(settings, ModalityConfig) else config_class(known(name))(**settings)
            for name, settings in value.items()
        }

    @model_validator(mode="after")
    def consistent(self) -> Recipe:
        if not self.modalities:
            raise ValueError(f"modalities is empty; name at least one of {', '.join(MODALITIES)}")
        if self.train.steps < 1:
            raise ValueError(f"train.steps={self.train.steps} must be at least 1")
        if self.body.dim % self.body.heads:
            raise ValueError(f"body.dim={self.body.dim} must be a multiple of body.heads={self.body.heads}")
        if self.task is None:
            return self
        if len(self.modalities) > 1:
            raise ValueError(
                f"a task has one modality, the recipe {', '.join(self.modalities)}; fine-tune each by itself"
            )
        if self.probe.every:
            raise ValueError(
                f"probe.every={self.probe.every} is for pre-training; a task is scored by task.test and task.test_every"
            )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.out or f"checkpoints/{self.name}")

    def hash(self) -> str:
        """Of what must not change when a run is resumed: all but how long, where, and how it is watched."""
        kept = {key: value for key, value in dotted_keys(self).items() if not is_free(key)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


FREE = {
    "name",
    "out",
    "init",
    "data",
    "precision",
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.save",
    "train.save_failures",
    "train.compile",
    "train.workers",
    "train.skip_limit",
    "train.max_bad_share",
    "train.timeout_minutes",
    "train.stop_seconds",
    "health.on_collapse",
    "health.patience",
    "health.max_rollbacks",
    "health.min_target_var",
    "health.min_pred_var",
    *(f"remote.{key}" for key in Remote.model_fields),
    "train.hang_seconds",
    "train.hang_factor",
    "train.straggler_factor",
    "task.vocabulary",
    "task.test",
    "task.test_every",
    "probe.every",
    "probe.train",
    "probe.test",
    "probe.label",
    "probe.samples",
    "probe.batch",
}


def is_free(key: str) -> bool:
    """Where shards, a tokenizer and a vocabulary lie is free too: a run knows their content by fingerprint."""
    return key in FREE or key.endswith((".data.shards", ".data.corpora", ".data.tokenizer"))


def recipes() -> dict[str, Any]:
    """Every shipped recipe by name: the functions that return a Recipe, of each modality and of the joint ones."""
    modules = [
        import_module(f"d2v_ds.modalities.{name}.{file}")
        for name in MODALITIES
        for file in ("recipes", "recipes_v1", "recipes_tuned")
        if find_spec(f"d2v_ds.modalities.{name}.{file}")
    ]
    modules.append(import_module("d2v_ds.modalities.multimodal"))
    return {
        name: function
        for module in modules
        for name, function in vars(module).items()
        if getattr(function, "__module__", "") == module.__name__
        and function.__annotations__.get("return") == "Recipe"
        and all(p.default is not p.empty for p in inspect.signature(function).parameters.values())
    }


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A shipped recipe by name, or a YAML file, with `key=value` overrides applied; `variant=paper` is one of them.

    Raises ValueError for an unknown recipe, variant or key (naming the nearest) and for a value that does not fit.
    """
    if name.endswith((".yaml", ".yml")):
        return override(read_yaml(Path(name)), overrides)
    variants = [a.removeprefix("variant=") for a in overrides if a.startswith("variant=")]
    others = [a for a in overrides if not a.startswith("variant=")]
    return override(shipped(name, variants[-1] if variants else None), others)


def shipped(name: str, variant: str | None = None) -> Recipe:
    """A shipped recipe, in one of its variants or in its own."""
    known_recipes = recipes()
    if name not in known_recipes:
        raise ValueError(f"unknown recipe '{name}'{nearest(name, known_recipes)}")
    build = known_recipes[name]
    if variant is None:
        return build()
    if "variant" not in inspect.signature(build).parameters:
        raise ValueError(f"recipe {name} has no variants; leave variant={variant} out")
    return build(variant)


def check_variant(name: str, variant: str, *known_variants: str) -> None:
    """Raises ValueError for a variant that a recipe does not have."""
    if variant not in known_variants:
        raise ValueError(f"recipe {name} has no variant '{variant}'{nearest(variant, known_variants)}")


def read_yaml(path: Path) -> Recipe:
    if not path.is_file():
        raise ValueError(
            f"recipe file {path} does not exist; give a YAML file or a shipped recipe, which `d2v recipes` lists"
        )
    try:
        settings = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} holds {type(settings).__name__}, must be the settings of a recipe, key: value; "
            "`--print-recipe` prints an example"
        )
    return validated(settings, str(path))


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} comes twice", problem_mark=key.start_mark
                )
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """As `yaml.safe_load`, which of two corpora of one name would keep the last in silence."""
    return yaml.load(text, _UniqueKeys)


def write_yaml(recipe: Recipe, path: Path) -> None:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def override(recipe: Recipe, assignments: list[str] | tuple[str, ...]) -> Recipe:
    """The recipe with `dotted.key=value` applied; a value is read as YAML (1e-3, true, [0.9, 0.95], text)."""
    settings = recipe.model_dump()
    leaves = dotted_keys(recipe)
    for assignment in assignments:
        key, sep, text = assignment.partition("=")
        if not sep:
            raise ValueError(f"'{assignment}' is no key=value; for example train.steps=1000")
        if key == "variant":
            raise ValueError(
                f"{assignment} goes with the name of a shipped recipe, {recipe.name} is a file or object"
            )
        if not is_known(key, text, leaves):
            raise ValueError(f"unknown key '{key}'{nearest(key, leaves)}")
        *parents, last = key.split(".")
        if parents == ["modalities"] and parse_value(text) is None:
            del settings["modalities"][last]  # modalities.audio=null: a joint recipe without it
            leaves = {leaf: value for leaf, value in leaves.items() if not leaf.startswith(f"{key}.")}
            continue
        target = settings
        for parent in parents:
            if target.get(parent) is None:
                target[parent] = {}
            target = target[parent]
        is_text = isinstance(leaves.get(key), str) or key in ("out", "init", "remote.cache")
        is_text &= not (text == "null" and is_optional(recipe, key))
        is_text &= not (key == "task.test" and is_group(text))
        target[last] = text if is_text else parse_value(text)
    return validated(settings, "recipe")


def is_known(key: str, text: str, leaves: dict[str, Any]) -> bool:
    """A setting; one of a group that is absent by default (modalities.image.alibi); or a group, to be made absent."""
    parent = key.rsplit(".", 1)[0]
    is_group = any(leaf.startswith(f"{key}.") for leaf in leaves)
    return (
        key in leaves
        or (parent in leaves and leaves[parent] is None)
        or (is_group and parse_value(text) is None)
    )


def is_group(text: str) -> bool:
    """Whether it is {name: text}, and no pattern such as {000..003}."""
    value = parse_value(text)
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def is_optional(recipe: Recipe, key: str) -> bool:
    """Whether a key may be absent, so that `null` is none and no text."""
    *parents, last = key.split(".")
    group: Any = recipe
    for parent in parents:
        group = group[parent] if isinstance(group, dict) else getattr(group, parent)
    field = getattr(type(group), "model_fields", {}).get(last)
    return field is not None and type(None) in get_args(field.annotation)


def parse_value(text: str) -> Any:
    """YAML, where 1e-3 is a number too and an empty text stays one."""
    try:
        return float(text) if "e" in text.lower() else load_yaml(text) if text else ""
    except (ValueError, yaml.YAMLError):
        try:
            return load_yaml(text)
        except (ValueError, yaml.YAMLError):
            return text


def validated(settings: dict[str, Any], source: str) -> Recipe:
    """The recipe of these settings; a ValueError names key, value and rule in one line."""
    settings = dict(settings)
    if isinstance(settings.get("modalities"), dict):
        settings["modalities"] = {
            name: validated_modality(name, values, source) for name, values in settings["modalities"].items()
        }
    try:
        return Recipe(**settings)
    except ValidationError as error:
        raise explain(error, all_keys(Recipe), source) from error


def validated_modality(name: str, values: Any, source: str) -> ModalityConfig:
    prefix = f"modalities.{name}"
    try:
        config = config_class(known(name))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: {prefix}={values!r} must hold the settings of {name}, key: value")
    try:
        return config(**values)
    except ValidationError as error:
        raise explain(error, [f"{prefix}.{key}" for key in all_keys(config)], source, f"{prefix}.") from error


def all_keys(config: type[Config]) -> list[str]:
    keys = []
    for name, field in config.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            keys += [f"{name}.{k}" for k in all_keys(field.annotation)]
    return keys
