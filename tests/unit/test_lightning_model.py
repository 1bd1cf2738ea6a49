# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Arguments of the Lightning module: defaults, limits and messages."""

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from anomalib.models import get_model
from anomalib.pre_processing import PreProcessor
from jsonargparse import Namespace
from torchvision.transforms.v2 import Resize

from anomalib_pedenet import Pedenet, Recipe

DEFAULTS = Path(__file__).parents[2] / "configs" / "model" / "pedenet.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination": "max"}, "combination must be one of 'auto', 'product', 'mean', got 'max'"),
        ({"training_mode": "sparse"}, "training_mode must be one of 'dense', 'patchwise'"),
        ({"density_loss": "vae"}, "density_loss must be one of 'dagmm', 'paper'"),
        ({"patch_sizes": [48]}, r"patch_sizes must be \[32\], \[64\] or both, got \[48\]"),
        ({"patch_sizes": []}, r"patch_sizes must be"),
        ({"patch_sizes": [64, 64]}, r"patch_sizes must be"),
        (
            {"patch_sizes": [64], "scored_sizes": [32]},
            r"one or more of patch_sizes \(\[64\]\) and the mid-level sizes 12, .* 28, or None, got \[32\]",
        ),
        ({"scored_sizes": []}, r"scored_sizes must be one or more"),
        ({"patch_sizes": 32}, r"patch_sizes must be a list of sizes in pixels, such as \[32\], got 32"),
        ({"scored_sizes": 32}, r"scored_sizes must be a list of sizes"),
        ({"image_size": 256}, r"image_size must be height and width in pixels, as whole numbers.*Got 256"),
        ({"image_size": (256,)}, r"image_size must be height and width.*Got \(256,\)"),
        ({"image_size": (256.5, 256)}, r"image_size must be height and width.*Got \(256.5, 256\)"),
        ({"image_size": (-256, 256)}, r"image_size must be height and width.*Got \(-256, 256\)"),
        ({"stride": 8.0}, "stride must be a multiple of 2 px from 2 .*got 8.0"),
        ({"stride": "8"}, "stride must be a multiple of 2 px from 2 .*got '8'"),
        ({"bank_stride": 0}, "bank_stride must be a multiple of 2 px from 2 .*got 0"),
        ({"stride": 14, "scored_sizes": [12]}, "from 2 to the smallest scored patch size .12., got 14"),
        ({"stride": 3}, "stride must be a multiple of 2 px from 2 to the smallest scored patch size .16., got 3"),
        ({"bank_stride": 64}, "bank_stride must be a multiple of 2"),
        ({"bank_size": 0}, "bank_size must be a number of rows, at least 1, or a fraction.*got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"patches_per_step": 1}, "patches_per_step must be at least 2"),
        ({"lambda_var": -1.0}, "lambda_var must be at least 0, got -1.0"),
        ({"pre_trained": True}, "pre_trained must be False: .* has no weights to load"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
        ({"holdout": 0.6}, "holdout must be a fraction of the training images from 0 to 0.5, got 0.6"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"density_warmup": 1.5}, "density_warmup must be a fraction"),
        ({"lambda_den": 0.0, "lambda_lpn": 0.0, "lambda_syn": 0.0}, "all 0, so there is nothing to learn"),
        ({"training_mode": "patchwise"}, "dense training only: set lambda_syn to 0"),
        ({"lambda_syn": -1.0}, "lambda_syn must be at least 0"),
        ({"lambda_svdd": -1.0}, "lambda_svdd must be at least 0"),
        ({"steps_per_image": 0}, "steps_per_image must be at least 1, or None to choose it, got 0"),
        ({"max_steps_at_chance": 0}, "max_steps_at_chance must be at least 1, or None for no such limit, got 0"),
        ({"seed": -1}, r"seed must be from 0 to 2\*\*32 - 1, or None .*, got -1"),
        ({"cache_gib": 0.0}, "cache_gib must be above 0"),
        (
            {"image_size": (100, 256)},
            r"image_size must be at least 112 px.*got \(100, 256\).*patch_sizes=\[32\] needs only 56 px",
        ),
        (
            {"image_size": (48, 256), "patch_sizes": [32]},
            r"image_size must be at least 56 px.*got \(48, 256\). Choose a larger one",
        ),
        ({"crop_size": 32, "patch_sizes": [32]}, "crop_size must be at least 56 px"),
    ],
)
def test_values_outside_their_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pedenet(**arguments)


def test_every_argument_is_documented() -> None:
    documented = inspect.getdoc(Pedenet)
    assert documented is not None
    for name in set(inspect.signature(Pedenet).parameters) - {"of_recipe"}:
        assert f"\n    {name} (" in documented, name
    assert "\n    **of_recipe: " in documented
    for name in asdict(Recipe()):
        assert f"\n    {name} (" in (inspect.getdoc(Recipe) or ""), name


def test_the_default_configuration_lists_every_default() -> None:
    init_args = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["init_args"]
    defaults = {name: parameter.default for name, parameter in inspect.signature(Pedenet).parameters.items()}
    parts = {"pre_processor", "post_processor", "evaluator", "visualizer", "of_recipe"}
    defaults["recipe"] = asdict(defaults["recipe"])
    expected = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in defaults.items()
        if name not in parts
    }
    assert init_args == expected
    assert list(init_args) == list(expected)
    assert list(init_args["recipe"]) == list(expected["recipe"])


def test_the_recipe_can_be_given_whole_or_in_parts() -> None:
    for model in (
        Pedenet(recipe=Recipe(noise=0.3, num_components=4)),
        Pedenet(noise=0.3, num_components=4),
        Pedenet(recipe=Recipe(noise=0.3), num_components=4),
        Pedenet(recipe=Recipe(noise=0.2, num_components=4), noise=0.3),
        get_model({"class_path": "Pedenet", "init_args": {"recipe": {"noise": 0.3, "num_components": 4}}}),
        get_model(Namespace(class_path="Pedenet", init_args=Namespace(recipe=Namespace(noise=0.3, num_components=4)))),
    ):
        assert dict(model.hparams) == dict(Pedenet().hparams) | {"noise": 0.3, "num_components": 4}
    assert "recipe" not in Pedenet().hparams


def test_unknown_arguments_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Pedenet has no argument depth, and its recipe none either"):
        Pedenet(depth=3)
    with pytest.raises(TypeError, match=r"Pedenet has no argument depth"):
        Pedenet(recipe={"depth": 3})


def test_image_size_goes_to_the_pre_processor_unless_one_is_given() -> None:
    assert Pedenet(image_size=(128, 320)).input_size == (128, 320)
    given = PreProcessor(transform=Resize((160, 160)))
    assert Pedenet(image_size=(128, 320), pre_processor=given).pre_processor is given
    assert Pedenet(pre_processor=False).pre_processor is None


def test_exports_need_a_memory_bank(tmp_path: Path) -> None:
    for export in (Pedenet().to_torch, Pedenet().to_onnx, Pedenet().to_openvino):
        with pytest.raises(RuntimeError, match="neither score images nor be exported: train it first"):
            export(tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_the_overriding_trainer_arguments_are_those_without_which_it_cannot_train() -> None:
    assert Pedenet().trainer_arguments == {"num_sanity_val_steps": 0, "use_distributed_sampler": False}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not a checkpoint"], ids=["empty", "cut", "foreign"])
def test_broken_checkpoints_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.ckpt .* is cut short or not a checkpoint: copy it again"):
        Pedenet.load_from_checkpoint(path)


def test_checkpoints_of_other_networks_are_refused() -> None:
    saved = Pedenet(patch_sizes=[64])
    checkpoint: dict[str, Any] = {"state_dict": saved.state_dict(), "hyper_parameters": dict(saved.hparams)}
    with pytest.raises(ValueError, match=r"trained with patch_sizes=\[64\], and patch_sizes=\(32, 64\) was asked for"):
        Pedenet().on_load_checkpoint(checkpoint)
    saved = Pedenet(lambda_syn=0.0)
    checkpoint = {"state_dict": saved.state_dict(), "hyper_parameters": dict(saved.hparams)}
    Pedenet(lambda_syn=0.0).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"trained with lambda_syn=0.0, and lambda_syn=1.0 .* leave lambda_syn out"):
        Pedenet().on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="holds no Pedenet weights"):
        Pedenet().on_load_checkpoint({"state_dict": {"model.weight": torch.zeros(1)}, "hyper_parameters": {}})
