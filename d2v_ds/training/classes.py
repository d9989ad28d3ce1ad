"""What are the outputs of a fine-tuned head called? As `classes.json` beside the shards says (`d2v prepare`)."""

from __future__ import annotations

from d2v_ds.recipe import Recipe
from d2v_ds.tasks.evaluate import class_names, classes_file


def with_classes(recipe: Recipe, saved: Recipe | None) -> Recipe:
    """The recipe with names of its classes: those of its own run, `saved`, else of the data, if they are named there.

    Raises ValueError where the data has other classes, or another number of them, than the recipe says.
    """
    task = recipe.task
    if task.outputs == 1 or task.head == "ctc":
        return recipe
    if saved is not None:
        return named(recipe, saved.task.labels) if task.labels is None else recipe
    classes, path = class_names(recipe.data, task.label), classes_file(recipe.data)
    if classes is None:
        return recipe
    if len(classes) != task.outputs:
        raise ValueError(
            f"{path} names {len(classes)} classes ({shown(classes)}), task.outputs={task.outputs}; "
            f"set task.outputs={len(classes)}" + " task.labels=null" * (task.labels is not None)
        )
    if task.labels is not None and task.labels != classes:
        raise ValueError(
            f"{path} names the classes {shown(classes)}, task.labels {shown(task.labels)}: is it the data of another "
            "task? To take the names of the data set task.labels=null"
        )
    return named(recipe, classes)


def named(recipe: Recipe, classes: tuple[str, ...] | None) -> Recipe:
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"labels": classes})})


def shown(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
