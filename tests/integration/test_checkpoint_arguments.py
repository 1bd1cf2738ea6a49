# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The command line crossed with a checkpoint: every argument is used, or refused by its name."""

import inspect
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.cli import AnomalibCLI

from anomalib_pedenet import Pedenet, Recipe
from anomalib_pedenet.aftercare.edits import edit_checkpoint
from anomalib_pedenet.argument_checks import changes, check_changes
from tests.integration.conftest import model_options, write_dataset

TRAINED: dict[str, Any] = {
    "image_size": [112, 128],
    "max_steps": 4,
    "steps_per_image": 1,
    "crops_per_step": 1,
    "patches_per_step": 64,
    "pairs_per_step": 64,
    "scorer": "exact",
    "bank_size": 60,
    "bank_stride": 16,
    "train_precision": "float32",
    "seed": 1,
}

# Another value of each argument than that of the checkpoint and the default.
OTHER: dict[str, Any] = {
    "image_size": [128, 128],
    "roi": "auto",
    "patch_sizes": [32],
    "scored_sizes": [24, 32],
    "stride": 16,
    "combination": "mean",
    "scorer": "svdd",
    "bank_size": 40,
    "coreset": "uniform",
    "bank_stride": 4,
    "bank_seed": 3,
    "position_weight": 2.0,
    "model_size": "medium",
    "embedding_dim": 32,
    "num_components": 5,
    "batch_norm": False,
    "max_steps": 6,
    "max_steps_at_chance": 700,
    "steps_per_image": 2,
    "holdout": 0.25,
    "cache_gib": 1.0,
    "training_mode": "patchwise",
    "crops_per_step": 2,
    "crop_size": 112,
    "patches_per_step": 32,
    "pairs_per_step": 32,
    "color_shift": 0.2,
    "noise": 0.2,
    "learning_rate": 1e-4,
    "lr_schedule": "constant",
    "lambda_den": 1e-3,
    "lambda_lpn": 0.5,
    "lambda_reg": 1e-6,
    "lambda_var": 0.5,
    "min_std": 0.2,
    "lambda_syn": 0.5,
    "lambda_svdd": 1e-3,
    "density_loss": "paper",
    "density_warmup": 0.5,
    "covariance_type": "full",
    "covariance_jitter": 1e-2,
    "train_precision": "bfloat16",
    "cuda_graph": False,
    "seed": 2,
    "pre_trained": True,
    # Components, by their configuration.
    "pre_processor": False,
    "post_processor": {
        "class_path": "anomalib_pedenet.post_processor.PedenetPostProcessor",
        "init_args": {"image_sensitivity": 0.7},
    },
    "evaluator": False,
    "visualizer": False,
}

# Whether there is a density loss decides whether there is a density estimation network.
OF_THE_WEIGHTS = {
    "image_size",
    "patch_sizes",
    "model_size",
    "embedding_dim",
    "batch_norm",
    "lambda_den",
}
OF_THE_BANK = {"roi", "scored_sizes", "scorer", "bank_size", "coreset", "bank_stride", "bank_seed", "position_weight"}
ALWAYS_USED = {"stride", "combination", "post_processor", "evaluator", "visualizer"}
NEVER_USED = OF_THE_WEIGHTS | {"pre_trained", "pre_processor"}
# Not in a training that goes on; `training_mode` needs a lambda_syn of 0, which would drop a network.
OF_A_WHOLE_TRAINING = {"seed", "learning_rate", "lr_schedule", "training_mode"}

COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")

COMMANDS = ("test", "predict", "export", "train")

# One of each kind; the others take minutes, and are among the slow tests.
SAMPLE = {
    "image_size",
    "roi",
    "scored_sizes",
    "stride",
    "scorer",
    "bank_size",
    "max_steps",
    "learning_rate",
    "post_processor",
}


def is_used(name: str, command: str) -> bool:
    if name in ALWAYS_USED:
        return True
    if name in NEVER_USED or (command == "train" and name in OF_A_WHOLE_TRAINING):
        return False
    return command == "train" or (command == "test" and name in OF_THE_BANK)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=4, size=(112, 128))


def run(command: str, data: Path, checkpoint: Path | None, asked: dict[str, Any]) -> Pedenet:
    """Run a command of anomalib, and return the model that it used."""
    options = ["--model", "Pedenet", *model_options(asked), "--trainer.enable_progress_bar", "false"]
    options += ["--trainer.accelerator", "cpu"]
    if checkpoint is not None:
        options += ["--ckpt_path", str(checkpoint)]
    if command in {"test", "train"}:
        options += ["--data", "MVTecAD", "--data.root", str(data), "--data.category", "stripes"]
        options += ["--data.train_batch_size", "2", "--data.num_workers", "0"]
    elif command == "predict":
        options += ["--data", str(data / "stripes/test/good")]
    else:
        options += ["--export_type", "torch", "--export_root", "export"]
    cli = AnomalibCLI([command, *options])
    if command != "export":
        return cli.engine.trainer.lightning_module
    (path,) = Path("export").rglob("*.pt")
    return torch.load(path, weights_only=False)["model"]


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run("train", data, None, TRAINED)
    (path,) = root.rglob("latest/weights/lightning/model.ckpt")
    return Path(shutil.copy(path, root / "model.ckpt"))


def value_in_use(model: Pedenet, name: str) -> Any:  # noqa: ANN401
    """Return the value of an argument, from where it takes effect as far as that is one place."""
    places = {
        "image_size": lambda: model.input_size,
        "stride": lambda: model.model.stride,
        "combination": lambda: model.model.combination,
        "scorer": lambda: model.model.scorer,
        "bank_size": lambda: model.model.bank_size,
        "coreset": lambda: model.model.coreset,
        "bank_seed": lambda: model.model.seed,
        "position_weight": lambda: float(model.model.position_encodings["32"].weight),
        "lambda_syn": lambda: model.loss.lambda_syn,
        "lambda_svdd": lambda: model.loss.lambda_svdd,
        "density_loss": lambda: model.loss.reading,
        "covariance_type": lambda: model.loss.covariance_type,
        "post_processor": lambda: {"image_sensitivity": model.post_processor.image_sensitivity},
        "evaluator": lambda: model.evaluator is not None,
        "visualizer": lambda: model.visualizer is not None,
    }
    return places[name]() if name in places else model.hparams[name]


def test_all_arguments_are_here() -> None:
    parameters = set(inspect.signature(Pedenet).parameters) - {"recipe", "of_recipe"}
    assert set(OTHER) == parameters | set(asdict(Recipe()))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.slow]) for name in OTHER]
)
def test_an_argument_is_used_or_refused_by_name(
    name: str, command: str, data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = {name: OTHER[name]}
    if not is_used(name, command):
        with pytest.raises((ValueError, SystemExit, RuntimeError), match=rf"{name}|2"):
            run(command, data, checkpoint, asked)
        return
    model = run(command, data, checkpoint, asked)
    expected = OTHER[name]["init_args"] if isinstance(OTHER[name], dict) else OTHER[name]
    assert value_in_use(model, name) == expected
    assert model.model.is_fitted
    if name in {"bank_size", "bank_stride"}:
        assert len(model.model.scorers["24"].bank) == min(model.hparams.bank_size, 4 * 12 * 14)


@pytest.mark.parametrize("name", [name for name in OTHER if name not in {"pre_trained", *COMPONENTS}])
def test_every_argument_has_its_rule(name: str) -> None:
    """The same as on the command line, by the rule alone, for all arguments."""
    saved = dict(Pedenet().hparams)
    ours = saved | {name: OTHER[name]}
    assert changes(ours, saved) == [name]
    purposes = {"test": "evaluate", "predict": "evaluate", "export": "export", "train": "resume"}
    for command, purpose in purposes.items():
        # A bank that cannot be built for want of training images is refused when it is to be built.
        is_left_to_the_bank = command == "predict" and name in OF_THE_BANK
        is_left_to_the_range = command == "train" and name == "training_mode"
        if is_used(name, command) or is_left_to_the_bank or is_left_to_the_range:
            check_changes([name], ours, saved, purpose)  # type: ignore[arg-type]
        else:
            with pytest.raises(ValueError, match=f"trained with {name}=.*leave {name} out|memory bank has to be built"):
                check_changes([name], ours, saved, purpose)  # type: ignore[arg-type]


def test_a_resumed_training_is_tested_with_its_own_result(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Engine.train`` tests the checkpoint that it is given, from which the training went on."""
    monkeypatch.chdir(tmp_path)
    model = run("train", data, checkpoint, {"max_steps": 8})
    old = torch.load(checkpoint, weights_only=True)["state_dict"]
    (path,) = tmp_path.rglob("latest/weights/lightning/model.ckpt")
    new = torch.load(path, weights_only=True)["state_dict"]
    name = "model.embedding_network.small_encoder.0.weight"
    assert not old[name].equal(new[name])
    assert model.state_dict()[name].equal(new[name])


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_left_out_is_the_checkpoints(
    command: str, data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = run(command, data, checkpoint, {})
    saved = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    for name in OTHER:
        if name in saved:
            value = model.hparams[name]
            assert (list(value) if isinstance(value, tuple) else value) == (
                list(saved[name]) if isinstance(saved[name], tuple) else saved[name]
            ), name
    assert model.input_size == (112, 128)
    if command in {"test", "train"}:  # the data module was set up before the checkpoint was read
        datamodule = model.trainer.datamodule
        for images in (datamodule.train_data, datamodule.val_data, datamodule.test_data):
            assert tuple(images.augmentations.size) == (112, 128)
    assert len(model.model.scorers["24"].bank) == 60


@pytest.mark.parametrize("recipe", [Recipe(noise=0.3), {"noise": 0.3}])
def test_a_recipe_beside_a_checkpoint_counts_where_it_is_not_as_by_default(recipe: Any, checkpoint: Path) -> None:  # noqa: ANN401
    model = Pedenet.load_from_checkpoint(checkpoint, recipe=recipe)
    assert model.hparams.noise == 0.3
    assert model.hparams.crops_per_step == TRAINED["crops_per_step"] != Recipe().crops_per_step


@pytest.mark.parametrize("command", [*COMMANDS, "load"])
def test_a_checkpoint_of_earlier_defaults_keeps_its_networks(
    command: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    then = {"model_size": "medium", "lambda_den": 1e-4, "max_steps": 1}
    run("train", data, None, TRAINED | then)
    (path,) = tmp_path.rglob("latest/weights/lightning/model.ckpt")
    old = torch.load(path, weights_only=True)
    assert old["hyper_parameters"].pop("model_size") == "medium"
    torch.save(old, tmp_path / "old.ckpt")
    if command == "load":
        model = Pedenet.load_from_checkpoint(tmp_path / "old.ckpt")
    else:
        model = run(command, data, tmp_path / "old.ckpt", {"max_steps": 3} if command == "train" else {})
    assert (model.hparams.model_size, model.hparams.lambda_den) == ("medium", 1e-4)
    if command != "train":
        for name in ("model.embedding_network.small_encoder.0.weight", "model.density_networks.32.0.weight"):
            assert model.state_dict()[name].equal(old["state_dict"][name])


@pytest.mark.parametrize(("name", "value"), [("num_components", 5), ("lambda_den", 0.0)])
def test_a_density_estimation_network_is_kept_as_it_is(name: str, value: float) -> None:
    saved = dict(Pedenet(lambda_den=1e-4).hparams)
    for purpose in ("load", "resume", "evaluate", "export"):
        with pytest.raises(ValueError, match=f"trained with {name}=.* which its weights do not fit: leave {name} out"):
            check_changes([name], saved | {name: value}, saved, purpose)  # type: ignore[arg-type]


def test_the_weight_of_a_density_loss_may_change_in_a_training() -> None:
    saved = dict(Pedenet(lambda_den=1e-4).hparams)
    ours = saved | {"lambda_den": 1e-3}
    check_changes(["lambda_den"], ours, saved, "resume")
    with pytest.raises(ValueError, match="changes nothing here, since it is of the training alone"):
        check_changes(["lambda_den"], ours, saved, "evaluate")


EARLIER_LOSSES = [{"lambda_den": 1e-2, "density_loss": "whitened"}, {"lambda_den": 0.0, "density_loss": "dagmm"}]
"""Losses of earlier versions with density estimation networks that there are not any more."""


def with_density_networks(path: Path, target: Path, losses: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint as an earlier version did with some losses, and return what is in it."""
    old = torch.load(path, weights_only=True)
    old["hyper_parameters"] |= losses
    for size in (32, 64):
        old["state_dict"][f"model.density_networks.{size}.projection.weight"] = torch.zeros(8, 64)
    torch.save(old, target)
    return old


@pytest.mark.parametrize("losses", EARLIER_LOSSES, ids=["whitened", "none"])
@pytest.mark.parametrize("command", ["test", "predict", "export", "load"])
def test_a_checkpoint_with_networks_that_are_no_more_scores_as_it_did(
    command: str,
    losses: dict[str, Any],
    data: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    old = with_density_networks(checkpoint, tmp_path / "old.ckpt", losses)["state_dict"]
    if command == "load":
        model = Pedenet.load_from_checkpoint(tmp_path / "old.ckpt")
    else:
        model = run(command, data, tmp_path / "old.ckpt", {})
    assert (model.hparams.lambda_den, model.hparams.density_loss) == (0.0, "dagmm")
    assert not model.model.density_networks
    for name, value in model.model.state_dict().items():
        torch.testing.assert_close(value, old[f"model.{name}"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("is_edited", [False, True])
def test_its_training_does_not_go_on(
    is_edited: bool, data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "old.ckpt"
    with_density_networks(checkpoint, path, EARLIER_LOSSES[0])
    if is_edited:  # whose networks are gone already
        edit_checkpoint(path, None, "nothing", {}, {})
    with pytest.raises(ValueError, match=r"cannot go on: .* by an earlier version .* Begin anew"):
        run("train", data, path, {"max_steps": 8})


def test_a_training_does_not_go_on_without_its_optimizer(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights_only = torch.load(checkpoint, weights_only=True)
    del weights_only["optimizer_states"], weights_only["lr_schedulers"]  # as `save_weights_only` does
    torch.save(weights_only, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="cannot go on: it was saved without its optimizer"):
        run("train", data, tmp_path / "weights.ckpt", {"max_steps": 8})
    run("test", data, tmp_path / "weights.ckpt", {})


def test_density_networks_whose_weight_was_not_saved_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    trained = Pedenet(**TRAINED | {"lambda_den": 1e-4})
    old = torch.load(checkpoint, weights_only=True)
    networks = {f"model.{k}": v for k, v in trained.model.state_dict().items() if k.startswith("density_networks.")}
    old["state_dict"] |= networks
    del old["hyper_parameters"]["lambda_den"], old["hyper_parameters"]["density_loss"]
    torch.save(old, tmp_path / "old.ckpt")
    model = Pedenet.load_from_checkpoint(tmp_path / "old.ckpt")
    assert model.hparams.lambda_den == 1e-4
    assert all(model.state_dict()[name].equal(value) for name, value in networks.items())
