# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""How a training goes about it: what experiments change and users leave alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from anomalib_pedenet.loss import DensityLossType
from anomalib_pedenet.mixture import CovarianceType

TrainingMode = Literal["dense", "patchwise"]
LearningRateSchedule = Literal["one_cycle", "constant"]


@dataclass(frozen=True)
class Recipe:
    """How a training goes about it: crops, losses, and the numbers of the networks.

    The defaults serve all data that was tried. The paper's recipe, its ablations and Patch-SVDD's are in
    ``configs/model``.

    Args:
        training_mode (str): ``"dense"`` trains on crops whose patches share their computation; ``"patchwise"`` on
            separately cut patches, as the paper does. Defaults to ``"dense"``.
        steps_per_image (int | None): Optimizer steps made for every training image in an epoch, so that each image is
            decoded once for several steps. ``None`` makes ``max_steps`` about three epochs, whatever the
            number of images; each epoch ends with a validation. Defaults to ``None``.
        max_steps_at_chance (int | None): Training length where ``max_steps`` is longer, but location prediction has
            learned so little after two thirds of this that its own scale does not count. On such surfaces the
            mid-level embeddings, which are scored instead, get worse with longer training. ``None`` to train for
            ``max_steps`` in any case. Defaults to ``1500``.
        crops_per_step (int): Crops in a step (dense training); each is seen in two disturbed views,
            and in one with drawn defects. Defaults to ``3``.
        crop_size (int): Side of a crop in pixels (dense training). Defaults to ``128``.
        patches_per_step (int): Patches in a step for the losses of single embeddings, the variance and the density
            loss; the paper has 128. Defaults to ``1024``.
        pairs_per_step (int): Pairs of neighbouring patches for location prediction in a step; the paper has 36.
            Defaults to ``1024``.
        color_shift (float): Standard deviation of the random colour shift of each view and channel, in units of the
            normalised images (whose standard deviation is about 1). Defaults to ``0.1``.
        noise (float): Standard deviation of the random noise of each view's pixels, likewise. Defaults to ``0.1``.
        learning_rate (float): Adam's learning rate, the peak of the one-cycle schedule. Defaults to ``1e-3``.
        lr_schedule (str): ``"one_cycle"`` or ``"constant"`` (the paper's). Defaults to ``"one_cycle"``.
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        num_components (int): Number K of Gaussian mixture components of a density loss. Defaults to ``10``.
        batch_norm (bool): Whether batch normalisation follows the small encoder's convolutions. The paper mentions
            none, but surfaces hardly train without it. Defaults to ``True``.
        lambda_den (float): Weight lambda_1 of the density loss L_DEN, for which there is then a density estimation
            network. Large weights such as 1e-2 make all embeddings equal (collapse); the paper's presets have ``1e-4``.
            Defaults to ``0`` (left out), because none that was tried finds more defects.
        lambda_lpn (float): Weight lambda_2 of the location prediction loss L_LPN. Defaults to ``1.0``.
        lambda_reg (float): Weight lambda_3 of the covariance regularisation L_reg, which goes with L_DEN. Defaults to
            ``1e-7``.
        lambda_var (float): Weight of the variance loss L_var, which keeps embeddings from becoming equal while location
            prediction has not learned anything yet; the paper has none (0). Defaults to ``1.0``.
        min_std (float): Standard deviation of the embeddings (in -1..1) below which L_var acts. Defaults to ``0.25``.
        lambda_syn (float): Weight of the synthetic-defect loss L_syn, which asks the embeddings to tell patches with
            drawn defects from those without (dense training only). It counts as far as location prediction fails:
            times ``min(1, L_LPN / log 8)^2``. The paper has none (0). Defaults to ``1.0``.
        lambda_svdd (float): Weight of the compactness loss L_SVDD', which Patch-SVDD has in place of L_DEN: patches a
            pixel or two apart are to have the same embedding. Its authors take ``1e-3``. Defaults to ``0`` (left out).
        density_loss (str): Reading of Eq. 9: ``"dagmm"`` (mean of the logarithms) or ``"paper"`` (logarithm of the sum,
            as printed). Defaults to ``"dagmm"``.
        density_warmup (float): Fraction of the training before L_DEN and L_reg set in; over the same fraction again
            they rise to full weight. Without it they shrink embeddings that have not learned anything yet.
            Defaults to ``0.25``.
        covariance_type (str): Covariances of Eq. 9's mixture, ``"diag"`` or ``"full"``. Defaults to ``"diag"``.
        covariance_jitter (float): Added to the diagonals of Eq. 9's covariances. Defaults to ``1e-3``.
        cuda_graph (bool): Whether steps on a GPU are recorded and launched as a whole, which takes a fraction of the
            time. Several processes, Eq. 9's full covariances and patch-by-patch training do without. Defaults to
            ``True``.

    Examples:
        >>> from anomalib_pedenet import Pedenet
        >>> model = Pedenet(recipe=Recipe(lambda_den=1e-4))
    """

    training_mode: TrainingMode = "dense"
    steps_per_image: int | None = None
    max_steps_at_chance: int | None = 1500
    crops_per_step: int = 3
    crop_size: int = 128
    patches_per_step: int = 1024
    pairs_per_step: int = 1024
    color_shift: float = 0.1
    noise: float = 0.1
    learning_rate: float = 1e-3
    lr_schedule: LearningRateSchedule = "one_cycle"
    embedding_dim: int = 64
    num_components: int = 10
    batch_norm: bool = True
    lambda_den: float = 0.0
    lambda_lpn: float = 1.0
    lambda_reg: float = 1e-7
    lambda_var: float = 1.0
    min_std: float = 0.25
    lambda_syn: float = 1.0
    lambda_svdd: float = 0.0
    density_loss: DensityLossType = "dagmm"
    density_warmup: float = 0.25
    covariance_type: CovarianceType = "diag"
    covariance_jitter: float = 1e-3
    cuda_graph: bool = True


DEFAULT_RECIPE = Recipe()

PARTS = asdict(DEFAULT_RECIPE)
"""The recipe's parts by name, with their defaults."""


def change_recipe(recipe: Recipe | Mapping[str, Any], parts: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some parts changed.

    Args:
        recipe (Recipe | Mapping[str, Any]): Recipe, or what of it is not as by default, as a configuration file has it.
        parts (Mapping[str, Any]): Other values by name, or by ``recipe.<name>``, as anomalib's ``get_model`` takes the
            group of a parsed command line apart.

    Returns:
        Recipe: The changed one.

    Raises:
        TypeError: If there is no part of such a name.
    """
    if isinstance(recipe, Mapping):
        recipe = change_recipe(DEFAULT_RECIPE, recipe)
    parts = {name.removeprefix("recipe."): value for name, value in parts.items()}
    unknown = set(parts) - set(PARTS)
    if unknown:
        msg = f"Pedenet has no argument {', '.join(sorted(unknown))}, and its recipe none either."
        raise TypeError(msg)
    return replace(recipe, **parts)


def changed_parts(recipe: Recipe | Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a recipe is not as by default, by name."""
    return {name: value for name, value in asdict(change_recipe(recipe, {})).items() if value != PARTS[name]}
