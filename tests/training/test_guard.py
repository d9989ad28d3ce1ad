"""A run that fails is called so, and ends or goes back as its recipe says; healthy ones are left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import SAMPLE
from runs import TINY, python, read_rows, start, torchrun, without_timings

from d2v_ds.data import Fault, FaultLog
from d2v_ds.recipe import Health, load_recipe
from d2v_ds.training.examiner import Examiner, write_best
from d2v_ds.training.guard import Collapsed, check_variances, places_to_go_back_to, roll_back
from d2v_ds.training.verdict import Watch

HEALTHY = {
    "content": 0.5, "encoder_content": 0.5, "rank": 30.0, "encoder_rank": 30.0, "token_spread": 0.5,
    "encoder_token_spread": 0.5, "explained": 0.1, "target_var": 0.5, "pred_var": 0.5,
}  # fmt: skip


def numbers(**changed: float) -> dict[str, float]:
    return {f"audio/{key}": value for key, value in (HEALTHY | changed).items()}


# ---- when a verdict counts ----


def test_a_verdict_counts_when_it_lasts_and_is_told_once() -> None:
    watch = Watch(patience=2)
    looks = [0.5, 0.01, 0.5, 0.01, 0.01, 0.01, 0.5, 0.5]
    told = [[f.verdict for f in watch.look(numbers(content=content)).values()] for content in looks]
    assert told == [[], [], [], [], ["position-only"], [], [], ["healthy"]]
    assert watch.sick() == {}


def test_verdicts_that_alternate_count_too() -> None:
    watch = Watch(patience=3)
    for sick in ({"content": 0.0}, {"token_spread": 0.0}):
        watch.look(numbers(**sick))
    assert watch.sick() == {}
    watch.look(numbers(content=0.0))
    assert watch.sick()["audio"].verdict == "position-only"


def test_a_place_to_go_back_to_has_twice_what_it_takes() -> None:
    watch = Watch(patience=1)
    firm = []
    for content in (0.5, 0.04, 0.01):
        watch.look(numbers(content=content))
        firm.append((watch.verdicts()["audio"], watch.is_firm))
    assert firm == [("healthy", True), ("healthy", False), ("position-only", False)]


@pytest.mark.parametrize(("explained", "verdict"), [(-15.3, "healthy"), (-60.0, "diverging")])
def test_what_a_fresh_network_predicts_is_no_divergence(explained: float, verdict: str) -> None:
    """-15.3 is audio_large's, whose targets average 16 layers."""
    watch = Watch(patience=1)
    watch.look(numbers(explained=explained))
    assert watch.verdicts() == {"audio": verdict}


def test_targets_of_position_alone_are_named_beside_a_student_that_is_constant() -> None:
    """Speech whose student gave up when its targets had: content .008 and spread 1e-4, as seen at step 80."""
    watch = Watch(patience=1)
    watch.look(numbers(content=0.008, encoder_token_spread=1e-4, encoder_content=0.0))
    assert watch.verdicts() == {"audio": "position-only"}
    watch.look(numbers(encoder_token_spread=1e-4, encoder_content=0.0))
    assert watch.verdicts() == {"audio": "constant"}


# ---- what stays to go back to ----


@pytest.mark.parametrize("is_there", [True, False])
def test_what_is_best_after_going_back_is_what_was_then_if_it_is_there(
    is_there: bool, tmp_path: Path
) -> None:
    examiner = Examiner(load_recipe("finetune_image_tiny"), None)
    examiner.best = {"step": 12, "score": 0.9}
    write_best(tmp_path, examiner.best)
    if is_there:
        (tmp_path / "step_00000004").mkdir()
    examiner.go_on(SimpleNamespace(folder=tmp_path, rank=0), {"best": {"step": 4, "score": 0.5}})
    assert examiner.best == ({"step": 4, "score": 0.5} if is_there else None)
    said = tmp_path / "best.json"
    assert json.loads(said.read_text()) == examiner.best if is_there else not said.exists()


def write_healthy(run: Path, monkeypatch: pytest.MonkeyPatch, **looks: int) -> None:
    """Checkpoints of these steps, each called healthy by the look at a step."""
    monkeypatch.setattr("d2v_ds.engine.checkpoint.damage", lambda path: None)
    for step, looked in looks.items():
        folder = run / f"step_{int(step[1:]):08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
        loop = {"step": int(step[1:]), "is_healthy": True, "applied_steps": 1, "looked": looked}
        (folder / "loop.json").write_text(json.dumps(loop))


def test_a_checkpoint_that_a_later_look_saw_stays_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 11 to 13 may all hold an update that exploded: the look at step 10 was before them."""
    write_healthy(tmp_path, monkeypatch, s8=5, s9=5, s11=10, s12=10, s13=10)
    found = places_to_go_back_to(tmp_path, before=14)
    assert [path.name for path in found] == ["step_00000013", "step_00000009"]
    assert places_to_go_back_to(tmp_path, before=8) == []


def healthy_run(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> SimpleNamespace:
    """What roll_back needs of a run, without network and data."""
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda found: None)
    monkeypatch.setattr("d2v_ds.engine.checkpoint.load", lambda *arguments: None)
    monkeypatch.setattr(
        "d2v_ds.engine.checkpoint.Checkpoint",
        lambda path: SimpleNamespace(loop=json.loads((path / "loop.json").read_text())),
    )
    monkeypatch.setattr("d2v_ds.training.guard.StepLoader", lambda *arguments: None)
    nothing = SimpleNamespace(
        finish=lambda: True,
        wait_patiently=lambda what: None,
        zero_grad=lambda: None,
        go_on=lambda run, loop: None,
    )
    faults = FaultLog(folder / "quarantine.jsonl")
    return SimpleNamespace(
        recipe=load_recipe("audio_tiny", ["health.on_collapse=rollback"]), folder=folder, rank=0, world=1, step=step,
        watch=Watch(2), watchdog=nothing, saver=nothing, engine=nothing, examiner=nothing, ema=None, log=None,
        rollbacks=[], lr_scale=1.0, faults=faults, say=lambda text: None, save=lambda: None, sources=[], plan=None,
    )  # fmt: skip


def test_a_run_goes_further_back_unless_it_was_healthy_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_healthy(tmp_path, monkeypatch, s8=5, s9=5, s11=10, s12=10)
    run = healthy_run(tmp_path, monkeypatch, step=20)
    for expected, held in ((12, True), (12, False), (9, False)):
        roll_back(run, "It is sick")
        run.rollbacks[-1]["held"] = held
        assert run.step == expected
        run.step = 20
    run.recipe = load_recipe("audio_tiny", ["health.max_rollbacks=9"])
    with pytest.raises(
        Collapsed, match="went back to step 9 and was not healthy from there on, and no checkpoint"
    ):
        roll_back(run, "It is sick")
    run.recipe = load_recipe("audio_tiny")
    with pytest.raises(Collapsed, match=r"It went back 3 times \(health.max_rollbacks=3\)"):
        roll_back(run, "It is sick")


def test_samples_that_cannot_be_read_count_once_after_going_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_healthy(tmp_path, monkeypatch, s9=9)
    run = healthy_run(tmp_path, monkeypatch, step=20)
    faults = [Fault("audio", f"a.tar:{i}", "damaged", 15) for i in range(15)]
    run.faults.add(faults, samples_seen=10_000)
    roll_back(run, "It is sick")
    run.faults.add(faults, samples_seen=10_000)
    assert run.faults.counts.total() == 15


# ---- the original's thresholds ----


@pytest.mark.parametrize(
    ("values", "updates", "key"),
    [
        ({"target_var": 0.09}, 5_001, "health.min_target_var=0.1"),
        ({"pred_var": 0.009}, 5_001, "health.min_pred_var=0.01"),
        ({"target_var": 0.09, "pred_var": 0.009}, 5_000, None),
        ({"target_var": 0.11, "pred_var": 0.011}, 5_001, None),
    ],
)
def test_the_variance_thresholds_end_a_run_after_5000_updates(
    values: dict[str, float], updates: int, key: str | None
) -> None:
    if key is None:
        check_variances(numbers(**values), Health(), updates)
        return
    with pytest.raises(Collapsed, match=key):
        check_variances(numbers(**values), Health(), updates)
    check_variances(numbers(**values), Health(min_target_var=0, min_pred_var=0), updates)


def test_released_image_recipes_have_no_variance_threshold() -> None:
    """As in the original; those of sound and text have 0.1 and 0.01."""
    assert [load_recipe(name).health.min_target_var for name in ("image_large", "image_v1_base", "audio_base")] == [
        0.0, 0.0, 0.1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    ["health.on_collapse=panic", "health.patience=0", "health.rollback_lr=1.5", "health.on_colapse=stop"],
)
def test_wrong_settings_are_errors(wrong: str) -> None:
    with pytest.raises(ValueError, match="health.on_collapse" if "cola" in wrong else wrong.split("=")[0]):
        load_recipe("audio_tiny", [wrong])


# ---- real runs ----

LIVE = [
    "train.py", "--deepspeed", "zero0", "--recipe", "audio_tiny", f"data={SAMPLE}", "modalities.audio.teacher=context",
    "modalities.audio.target.top_k=3", "modalities.audio.data.max_seconds=0.65", "modalities.audio.data.batch=8",
    "modalities.audio.clones=2", "body.depth=3", "optim.lr=5e-3", "optim.warmup_steps=25", "ema.start=0.98",
    "ema.end=0.999", "ema.anneal_steps=150", "train.steps=60", "train.log_every=5", "train.save_every=5",
    "train.workers=0", "train.keep_checkpoints=1",
]  # fmt: skip
"""Speech whose teacher reads the student's extractor and is fast: targets become functions of position."""


@pytest.mark.slow
def test_speech_that_collapses_is_stopped_with_its_name(tmp_path: Path) -> None:
    """Within 60 steps, while loss falls and the targets' variance stays healthy; no crash, no traceback."""
    done = start(python(*LIVE, f"out={tmp_path / 'run'}", "health.on_collapse=stop"), code=3)
    assert "audio is position-only (content 0.0" in done.stderr and "teacher=full" in done.stderr
    assert "Traceback" not in done.stderr
    rows, losses = read_rows(tmp_path / "run", "health.jsonl"), read_rows(tmp_path / "run")
    assert [row["audio/verdict"] for row in rows[-2:]] == ["position-only"] * 2
    assert {row["audio/verdict"] for row in rows[:-2]} == {"healthy"}
    assert rows[-1]["audio/target_var"] > 0.3 and losses[-1]["audio/loss"] < 0.5 * losses[0]["audio/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_goes_back_and_on_more_slowly(stage: int, tmp_path: Path) -> None:
    """And is to the bit the run that starts from the checkpoint it went back to; from stage 1 on with two ranks."""
    out = tmp_path / "run"
    settings = [*LIVE, "health.on_collapse=rollback", "health.max_rollbacks=1", "health.rollback_lr=0.1"]
    settings += ["train.keep_checkpoints=20"]
    settings[2] = f"zero{stage}"
    if stage:
        settings += ["modalities.audio.data.batch=4", "modalities.audio.data.micro_batches=2"]
    else:
        settings += [
            "probe.every=5",
            "probe.train=multimodal-train-000000.tar",
            "probe.test=multimodal-val-*.tar",
        ]
        settings += ["probe.samples=10"]
    command = torchrun if stage else python
    done = start(command(*settings, f"out={out}"))
    loop = json.loads((out / "step_00000060" / "loop.json").read_text())
    back = loop["rollbacks"][0]
    assert back["to"] < back["from"] <= 60 and loop["lr_scale"] == 0.1
    assert f"going back from step {back['from']} to {back['to']}" in done.stdout
    assert [row["step"] for row in read_rows(out)] == [1, *range(5, 61, 5)]
    shutil.copytree(out, tmp_path / "again")
    for path in (tmp_path / "again").glob("step_*"):
        if int(path.name[5:]) > back["to"]:
            shutil.rmtree(path)
    start(command(*settings, f"out={tmp_path / 'again'}"))
    assert without_timings(read_rows(tmp_path / "again")) == without_timings(read_rows(out))
    if not stage:  # probes too are once a step
        rows = [row["step"] for row in read_rows(out, "probes.jsonl") if row["weights"] == "student"]
        assert rows == sorted(4 * [*range(5, 61, 5)])
    events = [row for row in read_rows(out, "verdicts.jsonl") if "rollback" in row]
    assert len(events) == 1 and events[0]["step"] == back["from"]


@pytest.mark.slow
def test_a_step_goes_back_once_and_ends_what_was_skipped_in_a_row(tmp_path: Path) -> None:
    """The second look that is not finite is also the second step that is skipped. The checkpoint of step 1, healthy by
    a look before its update, holds the explosion: there is none to go further back to."""
    out = tmp_path / "run"
    settings = ["modalities.audio=null", "modalities.text=null", "optim.lr=1e30", "optim.warmup_steps=0"]
    settings += ["train.save_every=1", "train.skip_limit=2", "health.on_collapse=rollback", f"out={out}"]
    done = start(
        python("train.py", "--deepspeed", "zero0", *TINY, *settings, "health.max_rollbacks=2"), code=3
    )
    assert "It went back to step 1 and was not healthy from there on" in done.stderr
    assert "ends at step 3" in done.stderr and "Traceback" not in done.stderr
    events = [row["step"] for row in read_rows(out, "verdicts.jsonl") if "rollback" in row]
    assert events == [3]


EXPLODES = """
import d2v_ds.training.loop as loop
from d2v_ds.training.run import main
usual, exploded = loop.learning_rate, []
def learning_rate(optim, step, steps):
    if step == 3 and not exploded:
        exploded.append(step)
        return 1e30
    return usual(optim, step, steps)
loop.learning_rate = learning_rate
raise SystemExit(main())
"""
"""The fourth update does, the first time."""


@pytest.mark.slow
def test_a_checkpoint_that_holds_an_explosion_is_gone_back_to_once(tmp_path: Path) -> None:
    """That of step 4 is healthy by the look before its update; the one before it stays, for all that
    keep_checkpoints says."""
    out = tmp_path / "run"
    settings = [
        "modalities.audio=null",
        "modalities.text=null",
        "train.save_every=1",
        "train.keep_checkpoints=1",
    ]
    settings += ["health.on_collapse=rollback", "health.max_rollbacks=2", f"out={out}"]
    start(python("-c", EXPLODES, "--deepspeed", "zero0", *TINY, *settings))
    loop = json.loads((out / "step_00000006" / "loop.json").read_text())
    assert [(row["from"], row["to"]) for row in loop["rollbacks"]] == [(6, 4), (6, 3)]
    assert {row["image/verdict"] for row in read_rows(out, "health.jsonl")} == {"healthy"}


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_learning_rate_far_too_high_is_caught(modality: str, tmp_path: Path) -> None:
    """Before step 200; fifty times and more what the recipe has."""
    rate = {"image": 0.2, "audio": 0.1}[modality]
    settings = [
        f"data={SAMPLE}", f"modalities.{modality}.data.shards=multimodal-train-*.tar", "train.steps=150",
        "train.log_every=10", "train.save_every=1000", "train.workers=0", "health.on_collapse=stop",
        f"modalities.{modality}.data.batch=8", f"modalities.{modality}.clones=2", "optim.warmup_steps=20",
    ]  # fmt: skip
    command = ["train.py", "--deepspeed", "zero0", "--recipe", f"{modality}_tiny", f"out={tmp_path / 'run'}"]
    done = start(python(*command, *settings, f"optim.lr={rate}"), code=3)
    assert f"{modality} is " in done.stderr and "Lower optim.lr" in done.stderr
