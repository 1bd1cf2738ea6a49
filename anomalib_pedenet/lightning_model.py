# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""PEDENet for anomalib: its arguments and their defaults, and how images are scored.

Examples:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib.models import Pedenet

    >>> engine = Engine()
    >>> engine.train(model=Pedenet(), datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP
"""

import inspect
import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT

from anomalib_pedenet.anomaly_map import Combination
from anomalib_pedenet.argument_checks import (
    TrainPrecision,
    changes,
    check_image_size,
    make_loss,
    make_model,
    resolve,
    validate,
)
from anomalib_pedenet.data.input_files import InputFiles, check_finite, check_images, naming_files
from anomalib_pedenet.host.checkpoint import PedenetCheckpointMixin, without_foreign_arguments
from anomalib_pedenet.host.export import PedenetExportMixin
from anomalib_pedenet.host.exportable_resize import resize_as_in_training
from anomalib_pedenet.networks import ModelSize
from anomalib_pedenet.post_processor import PedenetPostProcessor
from anomalib_pedenet.recipe import DEFAULT_RECIPE, PARTS, Recipe, change_recipe
from anomalib_pedenet.scorers import Coreset
from anomalib_pedenet.torch_model import PedenetModel
from anomalib_pedenet.training.hooks import PedenetTrainingMixin

logger = logging.getLogger(__name__)

_RECOMMENDED_TRAINING_IMAGES = 20

# Arguments that are components instead of hyper-parameters.
_COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")


class Pedenet(PedenetTrainingMixin, PedenetExportMixin, PedenetCheckpointMixin, AnomalibModule):
    """PEDENet: anomaly localisation by patch embedding and density estimation, trained from scratch.

    A patch embedding network learns, from normal images alone, to tell where a patch's neighbour lies (location
    prediction), and which patches have a drawn defect. A patch is scored by how far its embedding is from those of the
    normal images: from those of its place where parts are aligned, from the nearest one in a memory bank where parts
    lie loosely, and by its density under a mixture of Gaussians on surfaces. A pixel is scored
    by the mean over the patches whose middle covers it, an image by its highest pixel and the mean of all.

    Args:
        image_size (tuple[int, int]): Height and width in pixels to which images are resized. Keep the aspect ratio of
            your images, e.g. ``(256, 640)``. Ignored if ``pre_processor`` is an instance. Defaults to ``(256, 256)``.
        roi (str | Path | None): Region of interest, the same for all images: an image file, white where they are looked
            at, black where they are not. What is there changes nothing: not in training, not in scores, not in exports.
            ``"auto"`` leaves out a background of one colour, if there is one. ``None`` for a loaded checkpoint's, else
            for all of the image. Defaults to ``None``.
        patch_sizes (Sequence[int]): Sizes of the patches to train on, in pixels: ``[32]``; ``[64]``, the paper's; or
            both. Defaults to ``(32, 64)``.
        scored_sizes (Sequence[int] | None): Sizes of the patches to score, whose maps are combined: those of
            ``patch_sizes``, and 12, 16, 20, 24 or 28, which the network embeds on its way to 32 and which see finer
            defects. ``None`` to choose among 16, 24, 32 and 64 from the normal images, or for 64 where that alone is
            trained. Defaults to ``None``.
        stride (int | None): Distance S between neighbouring patches of a scored image in pixels, a multiple of 2.
            Smaller is slower and finer. May be changed for a trained checkpoint, but not of aligned parts, whose places
            are known at one stride. ``None`` for a loaded checkpoint's, else 8. Defaults to ``None``.
        combination (str | None): How the maps of the scales become one: ``"product"`` (geometric mean), ``"mean"``, or
            ``"auto"`` for a soft maximum on loose parts and surfaces, and with the scorer ``"gaussian_mixture"``, and
            else the product. May be changed for a trained checkpoint. ``None`` for a loaded checkpoint's, else
            ``"auto"``. Defaults to ``None``.
        scorer (str | dict | None): How embeddings are compared with normal ones. ``"auto"`` chooses from the normal
            images: ``"ppca"`` where all images show a part in the same place, so that each patch is compared with
            normal ones of its place; ``"exact"`` with the place where parts move by some pixels, and for loose
            parts, with whitened embeddings; and ``"gaussian_mixture"`` for surfaces, less the means of the image and of
            each place. Nearest neighbour:
            ``"exact"``, ``"local"`` (same place of the image only), or with faiss ``"faiss_flat"``, ``"faiss_ivf"``,
            ``"faiss_hnsw"``, ``"faiss_pq"``. Densities: ``"gaussian_mixture"`` (48 Gaussians), ``"density"`` (the
            density estimation network's mixture, or one Gaussian if there is none), ``"mahalanobis"`` (a Gaussian for
            each place), ``"ppca"`` (likewise, of four directions). One-class models: ``"ocsvm"``, ``"svdd"``. With
            arguments: a ``class_path`` (a name, or the path of a subclass of ``anomalib_pedenet.scorers.Scorer``) and
            ``init_args``. ``None`` for a loaded checkpoint's, else ``"auto"``. Defaults to ``None``.
        bank_size (float): Largest number of rows of each scale's memory bank, chosen from the embeddings of all
            training images; below 1, as a fraction of them (0.1: a tenth). Memory, export size and search time grow
            with it. Defaults to ``5_000``.
        coreset (str): How the bank's rows are chosen: ``"uniform"`` (at random), ``"k_center"`` (greedily far apart, as
            PatchCore), ``"k_means"`` (centroids), or ``"auto"`` for k-center up to 5,000 rows and a uniform subset
            beyond. Defaults to ``"auto"``.
        bank_stride (int): Distance in pixels between the patches of the training images that may enter the bank, a
            multiple of 2. Defaults to ``8``.
        bank_seed (int): Seed of the bank and of other scorers. Defaults to ``0``.
        position_weight (float | str): How much a patch's distance from the place of a normal patch counts when the two
            are compared, per length of the image's longer side. ``0`` compares with patches from anywhere (unaligned
            parts, surfaces), ``32`` with those of nearly the same place (aligned parts). With ``scorer="auto"`` 32
            says that parts are aligned, less that they move a little, and 0 that they do not stay. ``"auto"`` chooses
            from the normal images. Defaults to ``"auto"``.
        model_size (str): Width of the small encoder: ``"small"``, or ``"medium"``, as in Patch-SVDD, which takes three
            times as long. Defaults to ``"small"``.
        max_steps (int): Training length in optimizer steps. A smaller ``Trainer`` limit (``max_steps``, ``max_epochs``)
            stands. Defaults to ``1500``.
        holdout (float): Fraction of the training images, from 0 to 0.5, that are held back from training and memory
            bank. At each validation a defect is drawn on each of them (at most 32, and 256 MiB), and how well those
            are found is logged as ``drawn_pixel_AUROC`` and ``drawn_image_AUROC``: figures to stop, to keep the best
            checkpoint and to compare settings by, from normal images alone. Defaults to ``0`` (all images are trained
            on).
        cache_gib (float): Memory for training images that have been decoded, in GiB, on the training device. Crops are
            drawn from all of them. Defaults to ``2.0``.
        train_precision (str): Arithmetic of the networks in training: ``"float32"``, ``"bfloat16"`` (autocast), or
            ``"auto"`` for the faster of the two: on a CPU found by timing the first steps. Scoring is not affected.
            Defaults to ``"auto"``.
        seed (int | None): Seed of weights and training, which make the same result then on the same machine and number
            of threads. ``None`` to draw from the program's generators. Defaults to ``None``.
        recipe (Recipe): How a training goes about it: crops, losses, and the numbers of the networks, which experiments
            change and users leave alone; see :class:`anomalib_pedenet.Recipe`.
        pre_trained (bool): Must be ``False``: Pedenet is trained from scratch and has no weights to load. Accepted so
            that one benchmark configuration can pass ``pre_trained: false`` to every model. Defaults to ``False``.
        pre_processor (PreProcessor | bool): Pre-processor instance, or whether to use the default one, which resizes to
            ``image_size`` and normalises with ImageNet's statistics. Defaults to ``True``.
        post_processor (PostProcessor | bool): Post-processor instance or flag. Defaults to ``True``.
        evaluator (Evaluator | bool): Evaluator instance or flag. Defaults to ``True``.
        visualizer (Visualizer | bool): Visualizer instance or flag. Defaults to ``True``.
        **of_recipe: Parts of the recipe by their own names: ``Pedenet(noise=0.3)`` is
            ``Pedenet(recipe=Recipe(noise=0.3))``. Not on the command line.

    Raises:
        ValueError: If an argument is outside its range; the message names it, the limit and the value.
        TypeError: If an argument is unknown.

    Examples:
        >>> model = Pedenet(stride=4, max_steps=1200, recipe=Recipe(noise=0.3))
        >>> model.model.stride, model.hparams.noise
        (4, 0.3)

    Reference:
        K. Zhang, B. Wang, C.-C. J. Kuo, "PEDENet: Image Anomaly Localization via Patch Embedding and Density
        Estimation", 2021, https://arxiv.org/abs/2110.15525.
    """

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        roi: str | Path | None = None,
        patch_sizes: Sequence[int] = (32, 64),
        scored_sizes: Sequence[int] | None = None,
        stride: int | None = None,
        combination: Combination | None = None,
        scorer: str | dict[str, Any] | None = None,
        bank_size: float = 5_000,
        coreset: Coreset = "auto",
        bank_stride: int = 8,
        bank_seed: int = 0,
        position_weight: float | Literal["auto"] = "auto",
        model_size: ModelSize = "small",
        max_steps: int = 1500,
        holdout: float = 0.0,
        cache_gib: float = 2.0,
        train_precision: TrainPrecision = "auto",
        seed: int | None = None,
        recipe: Recipe = DEFAULT_RECIPE,
        pre_trained: bool = False,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        **of_recipe: Any,  # noqa: ANN401 - as diverse as the recipe
    ) -> None:
        check_image_size(image_size)
        recipe = change_recipe(recipe, without_foreign_arguments(of_recipe))
        components = dict(zip(_COMPONENTS, (pre_processor, post_processor, evaluator, visualizer), strict=True))
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(tuple(image_size))
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        resize_as_in_training(self.pre_processor)
        self._given_components = {name: part for name, part in components.items() if part is not True}
        self._settle(recipe)
        self._build()
        # One batch of images serves several optimizer steps, see `training_step`.
        self.automatic_optimization = False
        self._is_bank_stale = False
        self._asked_of_bank: list[str] = []  # arguments for which a checkpoint's bank has to be built anew
        self._forget_training()

    def _settle(self, recipe: Recipe) -> None:
        """Check the hyper-parameters, and note which of them were given."""
        # They are kept side by side, as a checkpoint holds them and loggers can write them, and not as objects.
        for name in [name for name in self.hparams if name.partition(".")[0] == "recipe"]:
            self.hparams.pop(name)
        self.hparams.update(asdict(recipe))
        self._hparams_initial = deepcopy(self._hparams)
        hparams = resolve(self.hparams)
        validate(hparams)
        self._given = changes(self.hparams, hyper_parameter_defaults())
        self.hparams.update(hparams)

    def _build(self) -> None:
        """Make the networks, not trained, and the loss, by the hyper-parameters."""
        self.model: PedenetModel = make_model(self.hparams)
        self.loss = make_loss(self.hparams)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments that the model cannot do without (they override the user's).

        Returns:
            dict[str, Any]: ``num_sanity_val_steps: 0``, since there is no memory bank before training; and
                ``use_distributed_sampler: False``, since every process draws its own crops from all images, and a
                sampler that fills up its shards would score some images twice.
        """
        return {"num_sanity_val_steps": 0, "use_distributed_sampler": False}

    @property
    def learning_type(self) -> LearningType:
        """Learning type: one-class, from normal images only."""
        return LearningType.ONE_CLASS

    def configure_post_processor(self) -> PostProcessor:
        """Return the default post-processor, anomalib's but for keeping the order of scores."""
        return PedenetPostProcessor()

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Return anomalib's callbacks, and before them the one that names files that cannot be used."""
        theirs = super().configure_callbacks()
        return [InputFiles(), *(theirs if isinstance(theirs, Sequence) else [theirs])]

    # ------------------------------------------------------------------------------------------------------- scoring

    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:  # noqa: ANN401 - of the one it overrides
        """Score images, from pre-processing to thresholds; the graph that is exported.

        Args:
            batch (torch.Tensor): RGB images ``[B, 3, H, W]``, floating point, from 0 to 1.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            InferenceBatch: Scores, maps, labels and masks.

        Raises:
            ValueError: If these are no such images (not in an exported graph).
        """
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            check_images(batch)
        return super().forward(batch, *args, **kwargs)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Score a batch of images.

        Args:
            batch (Batch): Batch of pre-processed images.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: The batch with its predictions.

        Raises:
            ValueError: If an image is not finite.
        """
        del args, kwargs
        return self._score(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Score a batch of images; see :meth:`validation_step`."""
        del batch_idx, args, kwargs
        return self._score(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch of images; see :meth:`validation_step`."""
        del batch_idx, dataloader_idx
        return self._score(batch)

    def _score(self, batch: Batch) -> STEP_OUTPUT:
        check_finite(batch)
        with naming_files(batch):
            predictions = self.model(batch.image)
        return batch.update(**predictions._asdict())


def hyper_parameter_defaults() -> dict[str, Any]:
    """Return the default values of all hyper-parameters, the recipe's among them."""
    parameters = inspect.signature(Pedenet.__init__).parameters.values()
    left_out = {"self", "recipe", *_COMPONENTS}
    given = {one.name: one.default for one in parameters if one.name not in left_out and one.kind != one.VAR_KEYWORD}
    return given | PARTS
