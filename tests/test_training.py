"""Training: the loop's arithmetic, what it writes, what it survives, and several processes."""

import functools
import json
import logging
import math
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader

from detcore.checkpoint import (
    CheckpointError,
    load_checkpoint,
    model_weights,
    random_state,
    save_checkpoint,
    set_random_state,
)
from detcore.data.loader import CachedDataset, CachedLoader
from detcore.structures import pad_targets
from detcore.training import (
    History,
    NonFiniteLossError,
    TrainConfig,
    best_precision,
    learning_rate,
    train,
    worst_box,
)
from detcore.training.parts import Average, LossModule, make_optimizer
from tests.training_worker import MODELS, SCENES, Toy, config, loader

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLAIN = {"device": "cpu", "precision": "fp32", "warmup_steps": 0, "schedule": "constant"}


class Scalar(nn.Module):
    """One weight w, whose gradient is whatever the test's function of (w, images) says."""

    def __init__(self, function, start=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start]))
        self.function = function

    def loss(self, images, targets):
        return {"only": self.function(self.w, images).sum()}


def batch_of(*values):
    """Images full of one value each, in torchvision's form, with ids 100, 101..."""
    targets = [
        {"boxes": torch.tensor([[0.0, 0, 4, 4]]), "labels": torch.tensor([0]), "image_id": 100 + i}
        for i in range(len(values))
    ]
    return [torch.full((3, 4, 4), float(value)) for value in values], targets


def mean_of(images):
    return torch.stack(images).mean()


def assert_same_weights(model, other):
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def rows(out, kind="step"):
    """Lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()]
    timed = {"images_per_second", "seconds"}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] == kind]


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


# --- the configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1; got 0"),
        ({"lr": 0.0}, "lr must be > 0; got 0.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -1e-4}, "weight_decay must be >= 0"),
        ({"warmup_factor": 0.0}, r"warmup_factor must be in \(0, 1\]"),
        ({"milestones": (11, 8)}, r"milestones must be epochs > 0, rising; got \(11, 8\)"),
        ({"gamma": 2.0}, "gamma must be in"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0 or None"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"log_every": 0}, "log_every must be >= 1"),
        ({"checkpoint_every_steps": 5}, "output_dir must be a folder"),
        ({"resume": "auto"}, "output_dir must be a folder"),
    ],
)
def test_config_rejects_impossible_values(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_learning_rate_cosine_starts_after_warmup_and_ends_at_zero():
    settings = TrainConfig(epochs=3, lr=2.0, warmup_steps=4, warmup_factor=0.5, schedule="cosine")
    # warm-up 2 * (0.5 + 0.5 * 2/4); then 12 - 4 = 8 steps of cosine: whole, half and no way down
    rates = [learning_rate(settings, step, 4) for step in (0, 2, 4, 8, 12)]
    torch.testing.assert_close(rates, [1.0, 1.5, 2.0, 1.0, 0.0])


def test_learning_rate_drops_at_the_start_of_the_milestone_epochs():
    settings = TrainConfig(lr=1.0, warmup_steps=0, milestones=(2, 3), gamma=0.5)
    rates = [learning_rate(settings, step, 10) for step in (0, 19, 20, 29, 30, 99)]
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_best_precision_is_bf16_on_cpus_with_amx_only(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert best_precision("cpu") == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    assert best_precision("cpu") == "fp32"


# --- the arithmetic of a step


def test_train_takes_the_steps_of_sgd_with_momentum():
    # Loss = w * mean(x): gradients 2 then 4. Buffers 2 and 0.5*2 + 4 = 5; w = 1 - 0.1*2 - 0.1*5.
    model = Scalar(lambda w, images: w * mean_of(images))
    settings = TrainConfig(epochs=1, lr=0.1, momentum=0.5, weight_decay=0.0, **PLAIN)
    train(model, [batch_of(2.0), batch_of(4.0)], settings)
    torch.testing.assert_close(model.w.item(), 0.3)


def test_train_clips_the_gradient_to_its_norm():
    model = Scalar(lambda w, images: w * mean_of(images))
    seen = []
    settings = TrainConfig(epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.25, **PLAIN)
    train(model, [batch_of(8.0)], settings, on_step=seen.append)
    torch.testing.assert_close(model.w.item(), 0.75)
    torch.testing.assert_close(seen[0].grad_norm, 8.0)  # as it was before clipping


def test_train_sums_all_terms_and_reports_each():
    class Two(Scalar):
        def loss(self, images, targets):
            return {"a": (3 * self.w).sum(), "b": (4 * self.w).sum()}

    model, seen = Two(None), []
    settings = TrainConfig(epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0, **PLAIN)
    train(model, [batch_of(0.0, 0.0)], settings, on_step=seen.append)
    torch.testing.assert_close(model.w.item(), 1 - 0.1 * 7)
    assert seen[0].losses == {"a": 3.0, "b": 4.0}
    assert (seen[0].step, seen[0].epoch, seen[0].lr, seen[0].image_ids) == (1, 0, 0.1, (100, 101))


def test_optimizer_spares_norms_and_biases_only_if_asked():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2, bias=False))
    [every] = make_optimizer(model, TrainConfig(weight_decay=0.5), is_fused=True).param_groups
    assert (len(every["params"]), every["weight_decay"]) == (5, 0.5)
    pulled, spared = make_optimizer(model, TrainConfig(decay_norm_and_bias=False), is_fused=True).param_groups
    assert {id(p) for p in pulled["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert (len(spared["params"]), spared["weight_decay"]) == (3, 0.0)


def test_train_leaves_frozen_weights_alone_and_wants_some_that_are_not():
    model = Toy()
    model.body.requires_grad_(False)
    before = {name: value.clone() for name, value in model.body.state_dict().items()}
    train(model, loader(), TrainConfig(epochs=1, **PLAIN))
    assert all(torch.equal(value, before[name]) for name, value in model.body.state_dict().items())
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        train(model.requires_grad_(False), loader(), TrainConfig(epochs=1, **PLAIN))


def test_average_follows_the_weights_slowly_and_buffers_at_once():
    model = nn.BatchNorm1d(1)
    average = Average(model, decay=0.3)
    expected = 1.0
    for updates, weight in enumerate([2.0, 4.0, 8.0, 16.0, 32.0]):
        nn.init.constant_(model.weight, weight)
        model.running_mean.fill_(weight)
        average.update(model)
        decay = min(0.3, (1 + updates) / (10 + updates))  # 0.1, 0.18, 0.25, then 0.3
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.module.weight.item(), expected)
    assert average.module.running_mean.item() == 32.0


def test_train_judges_the_average_in_eval_mode():
    seen = []
    model = Toy()

    def judge(module, epoch):
        seen.append((module, module.training, torch.is_grad_enabled(), epoch))
        return {}

    history = train(model, loader(), TrainConfig(epochs=2, ema_decay=0.9, **PLAIN), validate=judge)
    assert [entry[1:] for entry in seen] == [(False, False, 0), (False, False, 1)]
    assert seen[0][0] is history.model
    assert history.model is not model
    assert model.training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_train_lowers_the_loss(optimizer):
    lr = {"sgd": 0.05, "adamw": 0.003}[optimizer]
    history = train(Toy(), loader(), config(None, epochs=8, lr=lr, optimizer=optimizer, checkpoint_every_steps=None))
    _, losses = history.curve("loss")
    assert losses[-1] < 0.8 * losses[0]


def test_train_in_bf16_is_near_fp32():
    def losses(precision):
        plain = {**PLAIN, "precision": precision, "log_every": 1}
        return torch.tensor(train(Toy(), loader(), TrainConfig(epochs=1, **plain)).curve("loss")[1])

    coarse, fine = losses("bf16"), losses("fp32")
    torch.testing.assert_close(coarse, fine, rtol=0.03, atol=0.0)
    assert not torch.equal(coarse, fine)


def test_train_refuses_fp16_on_a_cpu():
    with pytest.raises(ValueError, match="precision must be fp32 or bf16 on a CPU; got fp16"):
        train(Toy(), loader(), TrainConfig(**{**PLAIN, "precision": "fp16"}))


def test_train_is_repeatable_whatever_was_drawn_before():
    runs = []
    for _ in range(2):
        torch.rand(7), random.random()
        model = Toy()
        train(model, loader(), TrainConfig(epochs=1, seed=5, **PLAIN))
        runs.append(model)
    assert_same_weights(*runs)
    other = Toy()
    train(other, loader(), TrainConfig(epochs=1, seed=6, **PLAIN))  # another dropout
    assert not torch.equal(other.head.weight, runs[0].head.weight)


def test_train_takes_torchvisions_detectors_as_they_are():
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 16, 1), nn.ReLU())
    body.out_channels = 8
    sizes = torchvision.models.detection.anchor_utils.AnchorGenerator(((32,),), ((1.0,),))
    model = torchvision.models.detection.RetinaNet(body, 2, min_size=64, max_size=64, anchor_generator=sizes)
    before = model.backbone[0].weight.detach().clone()
    history = train(model, [batch_of(0.2, 0.7)], TrainConfig(epochs=1, lr=0.01, log_every=1, **PLAIN))
    assert set(history.steps[0]["losses"]) == {"classification", "bbox_regression"}
    assert not torch.equal(before, model.backbone[0].weight)


def test_train_takes_batches_made_of_a_cache():
    batches = CachedLoader(CachedDataset(SCENES, progress=False), batch_size=8, shuffle=True, flip=0.5)
    history = train(Toy(), batches, TrainConfig(epochs=1, log_every=1, **PLAIN))
    assert len(history.steps) == 2


# --- the door


def test_train_rejects_loaders_it_cannot_use():
    settings = TrainConfig(**PLAIN)
    with pytest.raises(ValueError, match="must hold a batch; got none"):
        train(Toy(), [], settings)
    with pytest.raises(ValueError, match="must have a length"):
        train(Toy(), iter([batch_of(1.0)]), settings)
    with pytest.raises(ValueError, match="shared out over all 1 processes; got one made for 2"):
        train(Toy(), loader(2, rank=0, world_size=2), settings)


def test_train_does_not_overwrite_another_run(tmp_path):
    train(Toy(), loader(), config(tmp_path, epochs=1))
    with pytest.raises(FileExistsError, match='Go on from it with resume="auto"'):
        train(Toy(), loader(), config(tmp_path, epochs=1))


# --- what it writes


def test_metrics_hold_the_means_since_the_last_line(tmp_path):
    model = Scalar(lambda w, images: 0 * w + mean_of(images))
    settings = config(tmp_path, epochs=2, log_every=2, schedule="constant", warmup_steps=0, ema_decay=None)
    history = train(
        model, [batch_of(1.0), batch_of(2.0), batch_of(6.0)], settings, validate=lambda m, e: {"AP": 0.5 - e}
    )
    # six steps: 1 2 | 6 1 | 2 6
    assert [row["losses"]["only"] for row in rows(tmp_path)] == [1.5, 3.5, 4.0]
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6]
    assert [row["metrics"]["AP"] for row in rows(tmp_path, "epoch")] == [0.5, -0.5]
    assert history.curve("AP") == ([3, 6], [0.5, -0.5])
    [header] = rows(tmp_path, "run")
    assert header["precision"] == "fp32"
    assert header["config"]["log_every"] == 2
    assert {row["kind"] for row in history.steps} == {"step"}
    assert all(row["images_per_second"] > 0 for row in history.steps)


def test_metrics_replace_what_json_cannot_say(tmp_path):
    found = {"AP": torch.tensor(0.25), "AR": float("nan"), "per_class": {"cat": np.float64(0.5)}}
    train(Toy(), loader(), config(tmp_path, epochs=1), validate=lambda m, e: found)
    [row] = rows(tmp_path, "epoch")
    assert row["metrics"] == {"AP": 0.25, "AR": None, "per_class": {"cat": 0.5}}


def test_history_curve_names_what_there_is():
    with pytest.raises(KeyError, match=r"name must be one of .*'loss'.*; got 'los'"):
        History(steps=[{"kind": "step", "step": 1, "loss": 2.0}]).curve("los")


def test_train_writes_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Toy(), loader(), config(tmp_path), validate=lambda m, e: {"AP": 0.25})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/box")] == [3, 6]
    assert [event.value for event in events.Scalars("validate/AP")] == [0.25, 0.25]


def test_best_checkpoint_is_that_of_the_highest_ap(tmp_path):
    scores = [0.1, 0.4, 0.2]
    train(Toy(), loader(), config(tmp_path, epochs=3), validate=lambda m, e: {"AP": scores[e]})
    assert load_checkpoint(tmp_path / "best.pt")["position"]["epoch"] == 2  # two epochs were done
    assert load_checkpoint(tmp_path / "last.pt")["position"] == {"step": 12, "epoch": 3, "batch": 0, "best": 0.4}


def test_checkpoint_tells_how_to_build_the_model(tmp_path):
    model = MODELS["real"]()
    history = train(model, loader(), config(tmp_path, epochs=1))
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved["spec"] == {"name": "iou_aware_retinanet", "num_classes": 6, "backbone": "tiny"}
    assert saved["classes"] == list(SCENES.classes)
    assert saved["config"]["ema_decay"] == 0.9
    assert saved["detcore_version"]
    again = MODELS["real"]()
    again.load_state_dict(model_weights(saved))
    assert_same_weights(again, history.model)
    again.load_state_dict(saved["model"])
    assert_same_weights(again, model)


def test_checkpoint_says_when_it_cannot_tell_how_to_build_the_model(tmp_path, caplog):
    model = Toy()
    model.spec = {"name": "mine", "activation": torch.relu}
    with caplog.at_level(logging.WARNING, "detcore"):
        train(model, loader(), config(tmp_path, epochs=1))
    assert load_checkpoint(tmp_path / "last.pt")["spec"] is None
    assert 'spec["activation"], a builtin_function_or_method' in caplog.text


@pytest.mark.parametrize(
    ("progress", "static", "is_shown"), [(True, "1", True), (None, "1", False), (False, "", False)]
)
def test_progress_bar_is_shown_where_it_is_wanted(progress, static, is_shown, capsys, monkeypatch):
    monkeypatch.setenv("DETCORE_STATIC", static)
    train(Toy(), loader(), TrainConfig(epochs=1, progress=progress, **PLAIN))
    shown = capsys.readouterr().err
    assert ("4/4" in shown) == is_shown
    assert (shown == "") != is_shown


# --- checkpoint files


def test_load_checkpoint_explains_files_it_cannot_use(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        load_checkpoint(path)
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(part)
        with pytest.raises(CheckpointError, match=f"{len(part):,} bytes.*truncated, damaged or of another kind"):
            load_checkpoint(path)
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"a dict with the keys \['conv.weight'\].*model.load_state_dict"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(path)
    save_checkpoint(path, {"format_version": 99})
    with pytest.raises(CheckpointError, match=r"format version <= 1; got 99.*Update detcore"):
        load_checkpoint(path)


def test_load_checkpoint_runs_no_code_of_the_file(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "sprung",))

    torch.save({"format": "detcore-checkpoint", "format_version": 1, "trap": Trap()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "sprung").exists()


def test_save_checkpoint_refuses_what_would_not_load_again(tmp_path):
    with pytest.raises(TypeError, match=r'got checkpoint\["config"\]\[1\], a PosixPath|a WindowsPath'):
        save_checkpoint(tmp_path / "last.pt", {"config": ["fine", tmp_path]})
    assert list(tmp_path.iterdir()) == []


def test_save_checkpoint_keeps_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})

    def full_disk(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    save_checkpoint(path, {"step": 3})  # over what the failure left behind
    assert load_checkpoint(path)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_random_state_survives_a_file(tmp_path):
    def draw():  # normals come in pairs, and the second of a pair is state as well
        return random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()  # noqa: NPY002

    draw()
    save_checkpoint(tmp_path / "r.pt", {"random": random_state()})
    drawn = draw()
    set_random_state(load_checkpoint(tmp_path / "r.pt")["random"])
    assert draw() == drawn


# --- resuming


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder, model and history of the runs that were never stopped."""
    runs = {}
    for name, make in MODELS.items():
        out = tmp_path_factory.mktemp(f"unbroken_{name}")
        model = make()
        runs[name] = out, model, train(model, loader(), config(out), validate=lambda m, e: {"AP": 0.5})
    return runs


def assert_same_run(out, model, history, unbroken_run):
    other_out, other_model, other_history = unbroken_run
    assert_same_weights(model, other_model)
    assert_same_weights(history.model, other_history.model)
    assert rows(out) == rows(other_out)
    assert [row["step"] for row in rows(out)] == [3, 6]
    assert [row["step"] for row in history.steps] == [3, 6]
    ours, theirs = load_checkpoint(out / "last.pt"), load_checkpoint(other_out / "last.pt")
    assert str(ours["optimizer"]) == str(theirs["optimizer"])
    # beartype, which checks the types here, draws from python's generator
    for generator in ("torch", "numpy"):
        assert str(ours["random"][0]["now"][generator]) == str(theirs["random"][0]["now"][generator])
    assert (ours["position"]["step"], ours["loader"]) == (8, theirs["loader"])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_resume_after_kill_in_mid_epoch_gives_the_same_bits(name, tmp_path, unbroken):
    killed = start("-m", "tests.training_worker", "killed", tmp_path, name)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    position = load_checkpoint(tmp_path / "last.pt")["position"]
    assert (position["step"], position["epoch"], position["batch"]) == (6, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 7, "los')  # as far as it came
    model = MODELS[name]()
    history = train(model, loader(), config(tmp_path, resume="auto"), validate=lambda m, e: {"AP": 0.5})
    assert_same_run(tmp_path, model, history, unbroken[name])
    assert [row["epoch"] for row in rows(tmp_path, "epoch")] == [0, 1]


def test_resume_of_a_longer_run_equals_it_from_the_start(tmp_path):
    settings = {"schedule": "step", "milestones": (1, 3), "checkpoint_every_steps": None}
    whole, halves = Toy(), Toy()
    train(whole, loader(), config(tmp_path / "whole", epochs=4, **settings))
    train(halves, loader(), config(tmp_path / "halves", epochs=2, **settings))
    again = Toy()
    train(again, loader(), config(tmp_path / "halves", epochs=4, resume=tmp_path / "halves" / "last.pt", **settings))
    assert_same_weights(again, whole)
    assert not torch.equal(halves.head.weight, whole.head.weight)
    assert rows(tmp_path / "whole") == rows(tmp_path / "halves")


@pytest.fixture
def ctrl_c():
    # A job that a shell put into the background starts with SIGINT ignored, and its Python keeps that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_interrupt_saves_the_step_it_came_in(tmp_path, unbroken):
    def press(step):
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(Toy(), loader(), config(tmp_path, checkpoint_every_steps=None), on_step=press)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert load_checkpoint(tmp_path / "last.pt")["position"]["step"] == 5
    model = Toy()
    settings = config(tmp_path, checkpoint_every_steps=None, resume="auto")
    history = train(model, loader(), settings, validate=lambda m, e: {"AP": 0.5})
    assert_same_run(tmp_path, model, history, unbroken["toy"])


def test_interrupt_in_validation_repeats_only_the_validation(tmp_path, unbroken):
    def press(module, epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Toy(), loader(), config(tmp_path), validate=press)
    assert load_checkpoint(tmp_path / "last.pt")["position"]["batch"] == 4
    model = Toy()
    history = train(model, loader(), config(tmp_path, resume="auto"), validate=lambda m, e: {"AP": 0.5})
    assert_same_run(tmp_path, model, history, unbroken["toy"])


@pytest.mark.usefixtures("ctrl_c")
def test_second_interrupt_stops_at_once_and_leaves_the_last_checkpoint(tmp_path):
    class Stubborn(Toy):
        def loss(self, images, targets):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().loss(images, targets)

    with pytest.raises(KeyboardInterrupt):
        train(Stubborn(), loader(), config(tmp_path))
    assert not (tmp_path / "last.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_follows_a_plain_data_loader(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return torch.rand(3, 4, 4) + i, {"boxes": torch.zeros(0, 4), "image_id": i}

    def batches():  # order and noise come from torch's global generator
        return DataLoader(
            Noisy(), batch_size=2, shuffle=True, collate_fn=lambda samples: tuple(zip(*samples, strict=True))
        )

    def model():
        return Scalar(lambda w, images: (w - mean_of(images)).square() * torch.rand(1))

    def press(step):
        if step.step == 5:
            raise KeyboardInterrupt

    settings = {"ema_decay": None, "checkpoint_every_steps": None}
    whole, broken, again = model(), model(), model()
    train(whole, batches(), config(tmp_path / "whole", **settings))
    with pytest.raises(KeyboardInterrupt):
        train(broken, batches(), config(tmp_path / "broken", **settings), on_step=press)
    torch.rand(5)
    train(again, batches(), config(tmp_path / "broken", resume="auto", **settings))
    assert_same_weights(again, whole)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_resume_can_change_the_memory_format(tmp_path):
    for channels_last, resume in ((False, None), (True, "auto")):
        model = Toy(dropout=0.0)
        epochs = 2 if resume else 1
        settings = {"epochs": epochs, "channels_last": channels_last, "resume": resume, "schedule": "constant"}
        train(model, loader(), config(tmp_path, **settings))
    unchanged = Toy(dropout=0.0)
    train(unchanged, loader(), config(None, schedule="constant", checkpoint_every_steps=None, channels_last=False))
    torch.testing.assert_close(model.state_dict(), unchanged.state_dict())


def test_resume_wants_the_same_data_and_a_run(tmp_path):
    train(Toy(), loader(), config(tmp_path, epochs=1))
    with pytest.raises(ValueError, match="batch_size must be 4, as in the interrupted run; got 8"):
        train(Toy(), loader(8), config(tmp_path, resume="auto"))
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", {**checkpoint, "random": checkpoint["random"] * 2})
    with pytest.raises(ValueError, match=r"by as many processes as wrote it; got 1 for .*, written by 2"):
        train(Toy(), loader(), config(tmp_path, resume="auto"))


def test_resume_auto_starts_where_there_is_nothing(tmp_path):
    history = train(Toy(), loader(), config(tmp_path, epochs=1, resume="auto"))
    assert len(history.epochs) == 1


# --- numbers that are none


def test_non_finite_loss_names_step_images_term_and_box(tmp_path):
    class Fails(Toy):
        def loss(self, images, targets):
            losses = super().loss(images, targets)
            self.seen = getattr(self, "seen", 0) + 1
            return {**losses, "iou": losses["box"] * (float("nan") if self.seen == 6 else 1.0)}

    weights, ids = [], []

    def remember(step):
        weights[:] = [model.head.weight.detach().clone(), model.body[0].weight.detach().clone()]
        ids.append(step.image_ids)

    model = Fails()
    with pytest.raises(NonFiniteLossError) as caught:
        train(model, loader(), config(tmp_path), on_step=remember)
    message = str(caught.value)
    assert "got a non-finite iou at step 6 (epoch 1, lr 0.00" in message
    assert "iou = nan" in message
    replay = load_checkpoint(next(tmp_path.glob("nonfinite_step6_*.pt")))
    assert f"Images: {replay['image_ids'].tolist()}" in message
    assert "Worst box: [" in message
    assert len(ids) == 5
    # neither the weights nor what is on the disk is spoiled
    assert torch.equal(model.head.weight, weights[0])
    assert torch.equal(model.body[0].weight, weights[1])
    assert load_checkpoint(tmp_path / "last.pt")["position"]["step"] == 4
    # and the batch in the file is the one that failed
    again = Toy()
    again.load_state_dict(replay["model"])
    assert replay["images"].shape == (4, 3, 64, 64)
    assert set(replay["targets"]) == {"boxes", "labels", "valid", "sizes"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_non_finite_gradient_of_a_finite_loss_is_caught(optimizer):
    # d sqrt(z) / dz is infinite at 0, and 0 * infinity is not a number: the loss is 0
    model = Scalar(lambda w, images: ((w - w) * mean_of(images)).sqrt(), start=3.0)
    with pytest.raises(NonFiniteLossError, match=r"non-finite gradient at step 1.*only = 0, gradient norm = nan"):
        train(model, [batch_of(1.0)], TrainConfig(epochs=1, optimizer=optimizer, **PLAIN))
    assert model.w.item() == 3.0


def test_worst_box_prefers_broken_then_thin_then_tiny():
    boxes = [[0.0, 0, 50, 50], [0, 0, 3, 3], [0, 0, 100, 2]]  # badness 1/50, 1/3, 100/4
    targets = pad_targets(
        [
            {"boxes": torch.tensor(boxes[:1]), "labels": torch.tensor([0])},
            {"boxes": torch.tensor(boxes[1:]), "labels": torch.tensor([0, 0])},
        ]
    )
    assert worst_box(targets, [7, 8]) == "[0, 0, 100, 2] (100 x 2 px) in image 8"
    broken = [{"boxes": torch.tensor(boxes)}, {"boxes": torch.tensor([[1.0, 2, float("inf"), 4]])}]
    assert worst_box(broken, [7, 8]) == "[1, 2, inf, 4] (inf x 2 px) in image 8"
    assert worst_box([{"boxes": torch.zeros(0, 4)}], [7]) == "none, there are no objects"


# --- several processes, compilation, GPU


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_doubled_batch(tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    ran = start(*command, "tests/training_worker.py", "shared", tmp_path)
    assert ran.returncode == 0, ran.stderr
    for name, make in MODELS.items():
        model = make() if name == "real" else make(dropout=0.0)
        history = train(model, loader(), config(None, log_every=1, checkpoint_every_steps=None))
        both = rows(tmp_path / name)
        assert [row["step"] for row in both] == list(range(1, 9))
        for ours, theirs in zip(history.steps, both, strict=True):
            torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-5, atol=1e-5)
            assert math.isclose(ours["grad_norm"], theirs["grad_norm"], rel_tol=1e-4)
        saved = load_checkpoint(tmp_path / name / "best.pt")
        torch.testing.assert_close(dict(model.state_dict()), dict(saved["model"]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dict(history.model.state_dict()), model_weights(saved), rtol=1e-4, atol=1e-5)
        assert len(saved["random"]) == 2


def test_cuda_graphs_are_asked_of_the_compiler(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    for is_graphed in (False, True):
        LossModule(Toy(), is_compiled=True, is_graphed=is_graphed)
    assert asked == [{"mode": None}, {"mode": "reduce-overhead"}]
    with pytest.raises(ValueError, match="cuda_graphs must be False without a GPU; got True on cpu"):
        train(Toy(), loader(), TrainConfig(**{**PLAIN, "compile": True, "cuda_graphs": True}))


@pytest.mark.gpu
@pytest.mark.compile
def test_training_by_cuda_graphs_is_the_eager_one(gpu):
    settings = {"epochs": 2, "log_every": 1, "checkpoint_every_steps": None, "device": "auto", "precision": "fp32"}
    eager = train(Toy(dropout=0.0), loader(), config(None, **settings))
    graphed = train(Toy(dropout=0.0), loader(), config(None, compile=True, cuda_graphs=True, **settings))
    torch.testing.assert_close(graphed.curve("loss"), eager.curve("loss"), rtol=1e-4, atol=1e-4)


@pytest.mark.compile
def test_compiled_training_is_the_eager_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no C++ compiler
    settings = {"epochs": 1, "log_every": 1, "checkpoint_every_steps": None}
    eager = train(Toy(dropout=0.0), loader(), config(None, **settings))
    compiled = train(Toy(dropout=0.0), loader(), config(None, compile=True, **settings))
    torch.testing.assert_close(compiled.curve("loss"), eager.curve("loss"), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_non_finite_loss_spoils_no_weight_on_a_gpu(gpu, precision):
    model = Scalar(lambda w, images: (w * mean_of(images)).sum(), start=2.0)
    settings = TrainConfig(
        epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0, **{**PLAIN, "device": "auto", "precision": precision}
    )
    batches = [batch_of(1.0), batch_of(float("nan")), batch_of(0.0)]
    with pytest.raises(NonFiniteLossError, match="non-finite only at step 2"):
        train(model, batches, settings)
    torch.testing.assert_close(model.w.item(), 1.9)
