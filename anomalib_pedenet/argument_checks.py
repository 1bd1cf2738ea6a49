# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What the arguments of ``Pedenet`` may be, and the model and loss that they make."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from anomalib_pedenet.anomaly_map import Combination
from anomalib_pedenet.kinds import AUTO_SCORER
from anomalib_pedenet.loss import DensityLossType, PedenetLoss
from anomalib_pedenet.mixture import CovarianceType
from anomalib_pedenet.networks import ModelSize
from anomalib_pedenet.patches import BASE_STRIDE, MID_LEVEL_SIZES, PATCH_SIZE, SUB_PATCH_SIZE, minimum_training_size
from anomalib_pedenet.recipe import LearningRateSchedule, TrainingMode
from anomalib_pedenet.scales import default_scored_sizes
from anomalib_pedenet.scorers import Coreset
from anomalib_pedenet.scorers.nearest_neighbor import check_bank_size
from anomalib_pedenet.torch_model import PedenetModel

DEFAULT_STRIDE = 8
DEFAULT_COMBINATION: Combination = "auto"
DEFAULT_SCORER = AUTO_SCORER

Purpose = Literal["load", "resume", "evaluate", "export"]
"""What a checkpoint is read for: by ``load_from_checkpoint``, to go on training, to score images, to be exported."""

# What each argument is of; all others are of the training. See `check_changes`.
_FIXED = ("image_size", "patch_sizes", "model_size", "embedding_dim", "num_components", "batch_norm")
# Arguments that only choose between networks: what their values mean to those.
_CHOOSE_NETWORKS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "lambda_syn": lambda hparams: hparams["lambda_syn"] > 0,
    "lambda_den": lambda hparams: hparams["lambda_den"] > 0,
}
_OF_A_WHOLE_TRAINING = ("seed", "learning_rate", "lr_schedule")
_OF_THE_BANK = ("roi", "scored_sizes", "scorer", "bank_size", "coreset", "bank_stride", "bank_seed", "position_weight")
_OF_SCORING = ("stride", "combination")

TrainPrecision = Literal["auto", "float32", "bfloat16"]


def validate(hparams: Mapping[str, Any]) -> None:
    """Check the hyper-parameters.

    Args:
        hparams (Mapping[str, Any]): Arguments of ``Pedenet`` by name, resolved.

    Raises:
        ValueError: If one is outside its range.
    """
    if hparams["pre_trained"]:
        msg = "pre_trained must be False: Pedenet is trained from scratch and has no weights to load."
        raise ValueError(msg)
    _validate_choices_and_limits(hparams)
    if hparams["position_weight"] != "auto" and not 0 <= hparams["position_weight"] < math.inf:
        msg = f"position_weight must be 'auto' or a finite number of at least 0, got {hparams['position_weight']}."
        raise ValueError(msg)
    if not 0 <= hparams["holdout"] <= 0.5:
        msg = f"holdout must be a fraction of the training images from 0 to 0.5, got {hparams['holdout']}."
        raise ValueError(msg)
    if hparams["learning_rate"] <= 0:
        msg = f"learning_rate must be above 0, got {hparams['learning_rate']}."
        raise ValueError(msg)
    if not 0 <= hparams["density_warmup"] <= 1:
        msg = f"density_warmup must be a fraction of the training from 0 to 1, got {hparams['density_warmup']}."
        raise ValueError(msg)
    if hparams["lambda_den"] == hparams["lambda_lpn"] == hparams["lambda_syn"] == 0:
        msg = "lambda_den, lambda_lpn and lambda_syn are all 0, so there is nothing to learn: set one of them above 0."
        raise ValueError(msg)
    if hparams["training_mode"] == "patchwise" and hparams["lambda_syn"] > 0:
        msg = "Defects are drawn in dense training only: set lambda_syn to 0 for training_mode 'patchwise'."
        raise ValueError(msg)
    _validate_optional(hparams)
    check_bank_size(hparams["bank_size"])
    _validate_sizes(hparams)


def _validate_choices_and_limits(hparams: Mapping[str, Any]) -> None:
    """Check the hyper-parameters that are one of some words, or numbers with a lower limit.

    Raises:
        ValueError: If one is outside its range.
    """
    choices = {
        "model_size": get_args(ModelSize),
        "combination": get_args(Combination),
        "coreset": get_args(Coreset),
        "training_mode": get_args(TrainingMode),
        "lr_schedule": get_args(LearningRateSchedule),
        "density_loss": get_args(DensityLossType),
        "covariance_type": get_args(CovarianceType),
        "train_precision": get_args(TrainPrecision),
    }
    for name, allowed in choices.items():
        if hparams[name] not in allowed:
            msg = f"{name} must be one of {', '.join(map(repr, allowed))}, got {hparams[name]!r}."
            raise ValueError(msg)

    at_least_one = (
        "embedding_dim",
        "num_components",
        "crops_per_step",
        "pairs_per_step",
        "max_steps",
    )
    at_least_zero = (
        "color_shift",
        "noise",
        "lambda_den",
        "lambda_lpn",
        "lambda_reg",
        "lambda_var",
        "lambda_syn",
        "lambda_svdd",
        "min_std",
        "covariance_jitter",
        "bank_seed",
    )
    for names, limit in ((at_least_one, 1), (at_least_zero, 0), (("patches_per_step",), 2)):
        for name in names:
            if hparams[name] < limit:
                msg = f"{name} must be at least {limit}, got {hparams[name]}."
                raise ValueError(msg)


def resolve(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters with what ``None`` stands for in a new model.

    Args:
        hparams (Mapping[str, Any]): Arguments of ``Pedenet`` by name.

    Returns:
        dict[str, Any]: The same, with stride, combination and scorer, and the region's file as text.
    """
    defaults = {"stride": DEFAULT_STRIDE, "combination": DEFAULT_COMBINATION, "scorer": DEFAULT_SCORER}
    roi = hparams["roi"]  # a checkpoint holds text, and no paths
    resolved = {name: default for name, default in defaults.items() if hparams[name] is None}
    return dict(hparams) | resolved | {"roi": roi if roi is None else str(roi)}


def make_model(hparams: Any) -> PedenetModel:  # noqa: ANN401 - Lightning's, which have no type of their own
    """Make a model, not trained.

    Args:
        hparams (Any): Hyper-parameters of ``Pedenet`` as attributes, resolved.

    Returns:
        PedenetModel: The model.
    """
    # The program's own generator is left alone: a checkpoint that is loaded must not seed it.
    with torch.random.fork_rng(devices=[], enabled=hparams.seed is not None):
        if hparams.seed is not None:
            torch.manual_seed(hparams.seed)
        return PedenetModel(
            patch_sizes=hparams.patch_sizes,
            scored_sizes=hparams.scored_sizes,
            stride=hparams.stride,
            combination=hparams.combination,
            scorer=hparams.scorer,
            bank_size=hparams.bank_size,
            coreset=hparams.coreset,
            embedding_dim=hparams.embedding_dim,
            num_components=hparams.num_components,
            seed=hparams.bank_seed,
            position_weight=hparams.position_weight,
            batch_norm=hparams.batch_norm,
            model_size=hparams.model_size,
            defect_prediction=_CHOOSE_NETWORKS["lambda_syn"](hparams),
            density_estimation=_CHOOSE_NETWORKS["lambda_den"](hparams),
        )


def make_loss(hparams: Any) -> PedenetLoss:  # noqa: ANN401
    """Make the loss of a training.

    Args:
        hparams (Any): Hyper-parameters of ``Pedenet`` as attributes, resolved.

    Returns:
        PedenetLoss: The loss.
    """
    return PedenetLoss(
        lambda_den=hparams.lambda_den,
        lambda_lpn=hparams.lambda_lpn,
        lambda_reg=hparams.lambda_reg,
        reading=hparams.density_loss,
        covariance_type=hparams.covariance_type,
        covariance_jitter=hparams.covariance_jitter,
        lambda_var=hparams.lambda_var,
        min_std=hparams.min_std,
        lambda_syn=hparams.lambda_syn,
        lambda_svdd=hparams.lambda_svdd,
    )


def changes(ours: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Return the names of the hyper-parameters that a checkpoint has otherwise.

    Args:
        ours (Mapping[str, Any]): A model's hyper-parameters, resolved.
        saved (Mapping[str, Any]): Those of a checkpoint; what it does not have is taken for equal.

    Returns:
        list[str]: Names, in the order of ``ours``.
    """
    # What is left out in both is no change, though its default may depend on what is: the scored sizes on the scorer.
    given = [name for name in ours if name in saved and not (ours[name] is None and saved[name] is None)]
    return [name for name in given if _comparable(ours, name) != _comparable(saved, name)]


def _comparable(hparams: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - as diverse as hyper-parameters
    """Return a hyper-parameter such that equal meanings are equal: lists and tuples, and sizes in any order."""
    value = hparams[name]
    if name == "scored_sizes" and value is None and isinstance(hparams["patch_sizes"], Sequence):
        value = default_scored_sizes(hparams["patch_sizes"], hparams["scorer"])
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return sorted(value) if name in {"patch_sizes", "scored_sizes"} else list(value)


def check_changes(names: Sequence[str], ours: Mapping[str, Any], saved: Mapping[str, Any], purpose: Purpose) -> None:
    """Check that a checkpoint can be used with other hyper-parameters than it was saved with.

    Args:
        names (Sequence[str]): Hyper-parameters that were asked for and differ.
        ours (Mapping[str, Any]): The values that were asked for.
        saved (Mapping[str, Any]): The checkpoint's.
        purpose (Purpose): What the checkpoint is read for.

    Raises:
        ValueError: If one of them cannot be changed; the message names it and the remedy.
    """
    for name in names:
        asked = f"The checkpoint was trained with {name}={saved[name]}, and {name}={ours[name]} was asked for"
        choose = _CHOOSE_NETWORKS.get(name)
        drops_network = choose is not None and choose(ours) != choose(saved)
        has_such_weights = name != "num_components" or _CHOOSE_NETWORKS["lambda_den"](saved)
        is_fixed = name in _FIXED and has_such_weights and not (name == "image_size" and purpose == "load")
        if is_fixed or drops_network:
            msg = f"{asked}, which its weights do not fit: leave {name} out, or train a new model with it."
        elif name in _OF_SCORING or purpose == "load":
            continue
        elif name in _OF_THE_BANK:
            if purpose != "export":
                continue
            msg = (
                f"{asked}, for which the memory bank has to be built anew, and an export has no training images: "
                "validate with it and the data module of the training, save that checkpoint, and export it."
            )
        elif purpose != "resume":
            msg = f"{asked}, which changes nothing here, since it is of the training alone: leave {name} out."
        elif name in _OF_A_WHOLE_TRAINING:
            msg = f"{asked}, which cannot change in the midst of a training: leave {name} out, or begin anew."
        else:
            continue
        raise ValueError(msg)


def changes_bank(names: Sequence[str]) -> list[str]:
    """Return which of some hyper-parameters the memory bank has to be built anew for."""
    return [name for name in names if name in _OF_THE_BANK or name == "image_size"]


def _validate_optional(hparams: Mapping[str, Any]) -> None:
    """Check the hyper-parameters that have no value by default, and the memory of the pool.

    Raises:
        ValueError: If one is outside its range.
    """
    for name, meaning in (("steps_per_image", "to choose it"), ("max_steps_at_chance", "for no such limit")):
        if hparams[name] is not None and hparams[name] < 1:
            msg = f"{name} must be at least 1, or None {meaning}, got {hparams[name]}."
            raise ValueError(msg)
    if hparams["seed"] is not None and not 0 <= hparams["seed"] < 2**32:
        msg = f"seed must be from 0 to 2**32 - 1, or None for another one each time, got {hparams['seed']}."
        raise ValueError(msg)
    if hparams["cache_gib"] <= 0:
        msg = f"cache_gib must be above 0, got {hparams['cache_gib']}."
        raise ValueError(msg)


def check_image_size(image_size: Any) -> None:  # noqa: ANN401 - whatever was given
    """Check that an image size is a height and a width.

    Args:
        image_size (Any): What was given as ``image_size``.

    Raises:
        ValueError: If it is anything else.
    """
    is_pair = isinstance(image_size, Sequence) and not isinstance(image_size, str) and len(image_size) == 2
    if not is_pair or not all(isinstance(side, int) and side > 0 for side in image_size):
        msg = f"image_size must be height and width in pixels, as whole numbers: (256, 640), say. Got {image_size!r}."
        raise ValueError(msg)


def _validate_sizes(hparams: Mapping[str, Any]) -> None:
    """Check the hyper-parameters that are sizes in pixels.

    Raises:
        ValueError: If one is outside its range.
    """
    for name in ("patch_sizes", "scored_sizes"):
        if hparams[name] is not None and not isinstance(hparams[name], Sequence):
            msg = f"{name} must be a list of sizes in pixels, such as [{SUB_PATCH_SIZE}], got {hparams[name]!r}."
            raise ValueError(msg)
    sizes = list(hparams["patch_sizes"] or ())
    if not sizes or len(set(sizes)) < len(sizes) or not set(sizes) <= {SUB_PATCH_SIZE, PATCH_SIZE}:
        msg = f"patch_sizes must be [{SUB_PATCH_SIZE}], [{PATCH_SIZE}] or both, got {sizes}."
        raise ValueError(msg)
    given = hparams["scored_sizes"]
    scored = list(default_scored_sizes(sizes, hparams["scorer"]) if given is None else given)
    if not scored or len(set(scored)) < len(scored) or not set(scored) <= {*sizes, *MID_LEVEL_SIZES}:
        msg = (
            f"scored_sizes must be one or more of patch_sizes ({sizes}) and the mid-level sizes "
            f"{', '.join(map(str, MID_LEVEL_SIZES))}, or None, got {scored}."
        )
        raise ValueError(msg)
    for name in ("stride", "bank_stride"):
        value = hparams[name]
        if not isinstance(value, int) or not BASE_STRIDE <= value <= min(scored) or value % BASE_STRIDE:
            msg = (
                f"{name} must be a multiple of {BASE_STRIDE} px from {BASE_STRIDE} to the smallest scored patch size "
                f"({min(scored)}), got {value!r}."
            )
            raise ValueError(msg)
    smallest = minimum_training_size(max(sizes))
    for name, sides in (("image_size", tuple(hparams["image_size"])), ("crop_size", (hparams["crop_size"],))):
        if min(sides) < smallest:
            remedy = f"patch_sizes=[{SUB_PATCH_SIZE}] needs only {minimum_training_size(SUB_PATCH_SIZE)} px."
            msg = (
                f"{name} must be at least {smallest} px a side, to hold a pair of neighbouring {max(sizes)}-px "
                f"patches, got {hparams[name]}. {remedy if max(sizes) == PATCH_SIZE else 'Choose a larger one.'}"
            )
            raise ValueError(msg)
