"""A recipe is typed and checked at the door, and equal after a round trip through YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from d2v_ds.config import dotted_keys
from d2v_ds.engine.ema import anneal
from d2v_ds.recipe import FREE, Optim, Recipe, load_recipe, load_yaml, override, recipes, write_yaml
from d2v_ds.training.schedule import learning_rate

SHIPPED = sorted(recipes())
TINY = "multimodal_tiny"


def message(name: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(name, overrides)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000, "one readable line"
    return text


def yaml_file(path: Path, settings: Any) -> str:
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


def changed_yaml(path: Path, key: str, value: Any) -> str:
    """multimodal_tiny as a YAML file, with one key set."""
    settings = load_recipe(TINY).model_dump(mode="json")
    *parents, last = key.split(".")
    target = settings
    for parent in parents:
        target = target[parent]
    target[last] = value
    return yaml_file(path, settings)


# ---- shipped recipes ----


def test_there_is_a_recipe_for_each_modality_and_a_joint_one():
    assert {"image_tiny", "audio_tiny", "text_tiny", TINY} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_survives_yaml(name, tmp_path):
    """Equal, of the same classes, with the same hash."""
    recipe = load_recipe(name)
    write_yaml(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe and again.hash() == recipe.hash()
    assert {k: type(v) for k, v in again.modalities.items()} == {
        k: type(v) for k, v in recipe.modalities.items()
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_says_what_it_is_and_how_it_is_run(name):
    """Its name is the function's, its docstring holds the command."""
    assert load_recipe(name).name == name
    assert "train.py" in recipes()[name].__doc__


def test_a_step_of_the_joint_recipe_divides_among_many_ranks():
    for config in load_recipe(TINY).modalities.values():
        assert config.data.micro_batches == 12


def test_recipes_are_made_anew():
    """A change of one is no change of the next."""
    load_recipe(TINY).modalities["image"].data.batch = 99
    assert load_recipe(TINY).modalities["image"].data.batch != 99


# ---- overrides ----


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=0.5", 0.5),
        ("train.steps=70", 70),
        ("train.steps=1e3", 1000),
        ("fairseq_compat=true", True),
        ("optim.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("out=runs/a", "runs/a"),
        ("data=a{000..003}.tar::b/*.tar", "a{000..003}.tar::b/*.tar"),
        ("data=*.tar", "*.tar"),
        ("out=a=b", "a=b"),
        ("modalities.image.target.final=[layer, instance]", ("layer", "instance")),
        ("modalities.audio.alibi=null", None),
        ("precision=bf16", "bf16"),
    ],
)
def test_an_override_has_the_type_of_its_key(assignment, value):
    key = assignment.partition("=")[0]
    leaf = dotted_keys(load_recipe(TINY, [assignment]))[key]
    assert leaf == value and type(leaf) is type(value)


@pytest.mark.parametrize("key", ["task.test", "task.encoder", "task.labels", "out", "init", "remote.cache"])
def test_null_is_nothing_where_a_key_may_be_absent(key):
    recipe = load_recipe("finetune_image_tiny", ["task.test_every=0", f"{key}=null"])
    assert dotted_keys(recipe)[key] is None


def test_a_test_may_have_parts():
    """A pattern in braces is one."""
    for text, test in (
        ("{a: x-*.tar, b: /y/*.tar}", {"a": "x-*.tar", "b": "/y/*.tar"}),
        ("{a,b}.tar", "{a,b}.tar"),
        ("{000..003}", "{000..003}"),
        ("12", "12"),
    ):
        assert load_recipe("finetune_image_tiny", [f"task.test={text}"]).task.test == test
    assert load_recipe("finetune_text_mnli", ["task.test=x-*.tar"]).task.test == "x-*.tar"


def test_null_is_a_text_where_a_key_may_not_be_absent():
    assert load_recipe(TINY, ["name=null"]).name == "null"


@pytest.mark.parametrize("name", ["2026", "2026-01-31", "1e5", "true", "007"])
def test_a_folder_may_be_named_like_a_number(name):
    """Text keys take the text as it stands."""
    recipe = load_recipe(TINY, [f"out={name}", f"name={name}"])
    assert recipe.out == name and recipe.name == name


def test_the_last_of_two_overrides_counts():
    assert load_recipe(TINY, ["seed=3", "seed=5"]).seed == 5


def test_a_group_that_is_off_can_be_set_by_one_of_its_keys():
    recipe = load_recipe(TINY, ["modalities.image.alibi.scale=0.5"])
    assert recipe.modalities["image"].alibi.scale == 0.5


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.step", "train.steps"),
        ("modalities.image.patchh", "modalities.image.patch"),
        ("modalities.image.data.bach", "modalities.image.data.batch"),
        ("modalities.imag.patch", "modalities.image.patch"),
        ("sed", "seed"),
        ("optim.learning_rate", "optim."),
        ("steps", "train.steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, hint):
    text = message(TINY, f"{key}=3")
    assert f"unknown key '{key}'" in text and f"did you mean '{hint}" in text


def test_an_override_without_a_value_shows_how():
    assert message(TINY, "train.steps") == "'train.steps' is no key=value; for example train.steps=1000"


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("train.steps=many", ("train.steps='many'", "valid integer")),
        ("train.steps=1.5", ("train.steps=1.5", "valid integer")),
        ("train.steps=0", ("train.steps=0 must be at least 1",)),
        ("body.dim=50", ("body.dim=50 must be a multiple of body.heads=",)),
        ("optim.lr=fast", ("optim.lr='fast'", "valid number")),
        ("optim.lr=nan", ("optim.lr='nan'", "must be a number")),
        ("modalities.image.mask.noise_std=.nan", ("noise_std=nan", "must be a number")),
        ("precision=fp8", ("precision='fp8'", "'bf16'")),
        ("modalities.image.patch=big", ("modalities.image.patch='big'", "valid integer")),
        ("modalities.text.mask.kind=foo", ("modalities.text.mask.kind='foo'", "'random'")),
        ("modalities.image.data.batch=0", ("modalities.image.data.batch=0", "greater than 0")),
        (
            "modalities.audio.data.micro_batches=0",
            ("modalities.audio.data.micro_batches=0", "greater than 0"),
        ),
        ("modalities.image.clones=0", ("modalities.image.clones=0", "greater than 0")),
        ("train.log_every=0", ("train.log_every=0", "greater than 0")),
        ("train.save_every=0", ("train.save_every=0", "greater than 0")),
        ("train.workers=-1", ("train.workers=-1", "greater than or equal to 0")),
    ],
)
def test_a_value_that_does_not_fit_is_one_readable_line(assignment, parts):
    """With the whole key, the value and the rule."""
    text = message(TINY, assignment)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(("name", "hint"), [("multimodal_tin", TINY), ("image_tny", "image_tiny")])
def test_an_unknown_recipe_names_the_nearest(name, hint):
    assert message(name) == f"unknown recipe '{name}'; did you mean '{hint}'?"


# ---- YAML files ----


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("train.step", 3, ("unknown key 'train.step'", "did you mean 'train.steps'?")),
        (
            "modalities.image.patchh",
            3,
            ("unknown key 'modalities.image.patchh'", "'modalities.image.patch'?"),
        ),
        (
            "modalities.text.data.bach",
            3,
            ("unknown key 'modalities.text.data.bach'", "'modalities.text.data.batch'?"),
        ),
        ("modalities.image.patch", "big", ("modalities.image.patch='big'",)),
        ("modalities.vido", {}, ("unknown modality 'vido'",)),
        ("modalities.image", None, ("modalities.image",)),
        ("train.steps", 0, ("train.steps=0 must be at least 1",)),
    ],
)
def test_a_mistake_in_a_yaml_file_is_one_readable_line(key, value, parts, tmp_path):
    """With the file, the whole key and the rule or the nearest key."""
    text = message(changed_yaml(tmp_path / "mine.yaml", key, value))
    assert text.startswith(str(tmp_path / "mine.yaml"))
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("content", ["", "[1, 2]", "just text", "a: [1"])
def test_a_yaml_file_that_is_no_recipe_is_named(content, tmp_path):
    assert str(tmp_path / "mine.yaml") in message(yaml_file(tmp_path / "mine.yaml", content))


def test_a_key_that_comes_twice_is_an_error(tmp_path):
    """Of two corpora of one name the first was lost; merge keys are none."""
    twice = "corpora: {one: a.tar, one: b.tar}"
    assert "the key 'one' comes twice" in message(yaml_file(tmp_path / "mine.yaml", twice))
    text = message("image_tiny", "modalities.image.data.corpora={one: a.tar, one: b.tar}")
    assert "each name once" in text
    assert load_yaml("{a: &a {p: 1}, b: {<<: *a, p: 2}}") == {"a": {"p": 1}, "b": {"p": 2}}


def test_an_absent_yaml_file_is_named_with_what_there_is(tmp_path):
    text = message(str(tmp_path / "absent.yaml"))
    assert "absent.yaml does not exist" in text and "`d2v recipes` lists" in text


def test_overrides_apply_to_a_yaml_file(tmp_path):
    name = changed_yaml(tmp_path / "mine.yaml", "seed", 7)
    assert (load_recipe(name).seed, load_recipe(name, ["seed=11"]).seed) == (7, 11)


# ---- what a resumed run may change ----


def other(value: Any) -> Any:
    """Another valid value of the same type, if that is a plain number or switch."""
    return (
        not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 0.5 + 0.125
    )


def test_how_a_run_is_saved_is_outside_the_hash():
    recipe = load_recipe(TINY)
    every = recipe.train.save_every * 3
    assert override(recipe, ["train.save=sync", f"train.keep_every={every}"]).hash() == recipe.hash()


@pytest.mark.parametrize(
    "key", sorted(FREE - {"precision", "health.on_collapse", "train.save", "train.keep_every", "probe.every"})
)
def test_where_and_how_long_are_outside_the_hash(key):
    recipe = load_recipe("finetune_image_tiny" if key.startswith("task.") else TINY)
    value = dotted_keys(recipe)[key]
    changed = override(
        recipe, [f"{key}=elsewhere" if value is None or isinstance(value, str) else f"{key}={other(value)}"]
    )
    assert changed != recipe and changed.hash() == recipe.hash()


def test_the_names_of_the_shards_and_the_tokenizer_are_outside_the_hash():
    """The fingerprint of what lies in them is compared instead."""
    recipe = load_recipe(TINY)
    for change in ("shards=b-*.tar", "tokenizer=b.model"):
        assert override(recipe, [f"modalities.text.data.{change}"]).hash() == recipe.hash()


def test_every_other_number_is_inside_the_hash():
    """Each on its own, of every modality; those that another rule binds are changed with care below."""
    recipe = load_recipe(TINY)
    bound = {"body.dim", "body.heads"}
    kept = {
        key: value
        for key, value in dotted_keys(recipe).items()
        if key not in FREE | bound and isinstance(value, (bool, int, float))
    }
    assert len(kept) > 80
    same = [
        key
        for key, value in kept.items()
        if override(recipe, [f"{key}={other(value)}"]).hash() == recipe.hash()
    ]
    assert same == []


@pytest.mark.parametrize(
    "assignment",
    [
        "body.dim=192",
        "body.heads=8",
        "optim.betas=[0.9, 0.95]",
        "modalities.image.mask.kind=random",
        "modalities.image.target.final=[]",
        "modalities.audio.alibi=null",
        "modalities.text.data.mode=samples",
        "modalities.audio.data.fields=wav",
        "modalities.audio.teacher=context",
    ],
)
def test_what_is_no_number_is_inside_the_hash_too(assignment):
    recipe = load_recipe(TINY)
    assert override(recipe, [assignment]).hash() != recipe.hash()


def test_a_modality_less_is_another_hash():
    recipe = load_recipe(TINY)
    fewer = Recipe(**recipe.model_dump() | {"modalities": {"image": recipe.modalities["image"]}})
    assert fewer.hash() != recipe.hash()


def test_a_recipe_needs_a_modality():
    with pytest.raises(ValueError, match="modalities is empty; name at least one of image, audio, text"):
        Recipe(name="none", modalities={})


# ---- schedules ----


def test_the_learning_rate_rises_and_falls():
    """0 at the first step, the peak after the warm-up, half between, the lowest at the end and after it."""
    optim = Optim(lr=2.0, min_lr=0.5, warmup_steps=10)
    rates = [learning_rate(optim, done, 30) for done in (0, 5, 10, 20, 30, 31)]
    assert rates == pytest.approx([0.5, 1.25, 2.0, 1.25, 0.5, 0.5], abs=1e-12)


def test_a_linear_schedule_falls_in_a_line_as_fast_as_it_must():
    optim = Optim(lr=2.0, min_lr=0.5, warmup_steps=10, schedule="linear")
    rates = [learning_rate(optim, done, 30) for done in (0, 5, 10, 15, 20, 30, 31)]
    assert rates == pytest.approx([0.5, 1.25, 2.0, 1.625, 1.25, 0.5, 0.5], abs=1e-12)


def test_the_learning_rate_without_warmup_begins_at_its_peak():
    assert learning_rate(Optim(lr=2.0, warmup_steps=0), 0, 10) == 2.0


def test_tau_goes_in_a_line_and_stays():
    values = [anneal(0.9, 0.99, 100, applied) for applied in (0, 50, 100, 101, 10_000)]
    assert values == pytest.approx([0.9, 0.945, 0.99, 0.99, 0.99], abs=1e-12)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_schedule_ends_within_its_run(name):
    """Warm-up is over long before the last step, and tau has reached its end by then, or is constant."""
    recipe = load_recipe(name)
    assert recipe.optim.warmup_steps < 0.5 * recipe.train.steps
    if recipe.task:  # no teacher
        return
    assert recipe.ema.anneal_steps <= recipe.train.steps
    assert 0.9 < recipe.ema.start <= recipe.ema.end <= 1
    assert (recipe.ema.start == recipe.ema.end) == (recipe.ema.anneal_steps == 0)
