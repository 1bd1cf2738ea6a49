# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""PEDENet for anomalib: training, the memory bank, checkpoints and defaults.

Example:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib.models import Pedenet

    >>> engine = Engine()
    >>> engine.train(model=Pedenet(), datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP
"""

import inspect
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRSchedulerConfig
from torch.nn.modules.batchnorm import _BatchNorm  # of one process, and synchronised over several
from torch.utils.data import DataLoader
from torchmetrics import Metric
from tqdm import tqdm

from anomalib_pedenet.anomaly_map import Combination
from anomalib_pedenet.criterion import draw_test_defects, drawn_defect_auroc
from anomalib_pedenet.export import PedenetExportMixin
from anomalib_pedenet.exportable_resize import resize_as_in_training
from anomalib_pedenet.false_alarms import default_threshold
from anomalib_pedenet.fit_loop import (
    begin_anew,
    can_stop_early,
    is_last_batch,
    is_told_to_stop,
    save_again,
    validate_now,
)
from anomalib_pedenet.held_out import score_held_out
from anomalib_pedenet.hyper_parameters import (
    LearningRateSchedule,
    Purpose,
    TrainingMode,
    TrainPrecision,
    changes,
    changes_bank,
    check_changes,
    check_image_size,
    resolve,
    validate,
)
from anomalib_pedenet.image_pool import ImagePool
from anomalib_pedenet.input_files import InputFiles, check_finite, check_images, naming_files
from anomalib_pedenet.loss import DensityLossType, PedenetLoss, synthetic_weight
from anomalib_pedenet.mixture import CovarianceType
from anomalib_pedenet.normal_images import HeldBack, NormalImages, are_plain, spread
from anomalib_pedenet.patches import PATCH_SIZE, SUB_PATCH_SIZE
from anomalib_pedenet.post_processor import LIMITS, THRESHOLDS, PedenetPostProcessor
from anomalib_pedenet.region import AUTO_ROI, find_roi, image_size_of, read_roi
from anomalib_pedenet.scorers import Coreset
from anomalib_pedenet.step_guard import MAX_SKIPPED_IN_ROW, StepGuard
from anomalib_pedenet.torch_model import MIN_SCALE_WEIGHT, PedenetModel
from anomalib_pedenet.training_state import origin, random_state, seed_generators, set_random_state
from anomalib_pedenet.training_step import TrainingStep

logger = logging.getLogger(__name__)

COLLAPSE_SPREAD = 0.02
"""Embeddings (each dimension in -1..1) whose mean standard deviation falls below this have collapsed."""

# A training needs one image; what varies between good parts can be seen from two, and learned from more.
MIN_TRAINING_IMAGES = 2
RECOMMENDED_TRAINING_IMAGES = 20

# Their statistics are those of the training set to a percent or so, and take a second to read.
_STANDARDIZATION_IMAGES = 64

# Enough to tell aligned parts from unaligned ones, and for principal components: 27,000 patches of 256x256 images.
_CALIBRATION_IMAGES = 32

_MAX_HELD_BACK = 32

# Training images that set the thresholds where there was no validation: enough for 1 false alarm in 100, in a minute.
_THRESHOLD_IMAGES = 400

# Of large images fewer are read together, so that neither they nor what is computed of them fill the memory.
_SAMPLE_BYTES = 2**28

# Entry of a checkpoint: the scorer whose state it holds.
_SCORER = "pedenet_scorer"

# Entries of a checkpoint: what each process needs to go on exactly, and what the training's result depends on.
_TRAINING = "pedenet_training"
_ORIGIN = "pedenet_origin"

# Entry of a checkpoint: whether the pre-processor has a transform that anomalib cannot save.
_UNSAVED_TRANSFORM = "pedenet_unsaved_transform"

# Entry of a checkpoint: the length of a training that was shortened.
_SHORTENED = "pedenet_shortened_to"

# The scales' weights and the scorer that was chosen.
_CHOSEN = "model._extra_state"

# Names, or their first parts, of what is fitted with the memory bank.
_FITTED = (
    "model.scorers.",
    "model.position_encodings.",
    "model.projections.",
    "model.region.",
    _CHOSEN,
    "model.map_",
    "model.typical_score",
    "model.normal_limit",
)

# Fraction of the training over which the one-cycle schedule's rate rises.
_RISE = 0.3

# When it is decided whether location prediction is at chance, as a fraction of `max_steps_at_chance`.
_DECISION = 2 / 3

# Epochs of a training where `steps_per_image` is left to the model: each ends with a validation and a checkpoint.
_EPOCHS = 3

_STEPS_PER_IMAGE = 4  # where the number of training images is unknown

# How often the log says how far the training is.
_NUM_REPORTS = 20

# The hyper-parameters in the file from which a checkpoint is being loaded.
_SAVED: ContextVar[dict[str, Any] | None] = ContextVar("pedenet_saved_hyper_parameters", default=None)

# Arguments that are components instead of hyper-parameters.
_COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")


class Pedenet(MemoryBankMixin, PedenetExportMixin, AnomalibModule):
    """PEDENet: anomaly localisation by patch embedding and density estimation, trained from scratch.

    A patch embedding network learns, from normal images alone, to tell where a patch's neighbour lies (location
    prediction) and to make its embeddings dense under a Gaussian mixture (density estimation). A patch is scored by the
    distance of its embedding to the nearest one of the normal images, kept in a memory bank, where parts are aligned,
    and by its density under a mixture of Gaussians elsewhere; a pixel by the mean over the patches that cover it; an
    image by its highest pixel.

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
            Smaller is slower and finer. May be changed for a trained checkpoint. ``None`` for a loaded checkpoint's,
            else 8. Defaults to ``None``.
        combination (str | None): How the maps of the scales become one: ``"product"`` (geometric mean), ``"mean"``, or
            ``"auto"`` for a soft maximum with the scorer ``"gaussian_mixture"`` and else the product. May be changed
            for a trained checkpoint. ``None`` for a loaded checkpoint's, else ``"auto"``. Defaults to ``None``.
        scorer (str | dict | None): How embeddings are compared with normal ones. ``"auto"`` chooses from the normal
            images: ``"exact"`` where all images show a part in the same place, so that each patch is compared with
            normal ones of its place, and else ``"gaussian_mixture"``. Nearest neighbour: ``"exact"``, ``"local"`` (same
            place of the image only), or with faiss ``"faiss_flat"``, ``"faiss_ivf"``, ``"faiss_hnsw"``,
            ``"faiss_pq"``. Densities: ``"gaussian_mixture"`` (48 Gaussians), ``"density"`` (the DE
            network's mixture), ``"mahalanobis"`` (a Gaussian for each place). One-class models: ``"ocsvm"``,
            ``"svdd"``. With arguments: a ``class_path`` (a name, or the path of a subclass of
            ``anomalib_pedenet.scorers.Scorer``) and ``init_args``. ``None`` for a loaded checkpoint's, else ``"auto"``.
            Defaults to ``None``.
        bank_size (float): Largest number of rows of each scale's memory bank, chosen from the embeddings of all
            training images; below 1, as a fraction of them (0.1: a tenth). Memory, export size and search time grow
            with it. Defaults to ``5_000``.
        coreset (str): How the bank's rows are chosen: ``"uniform"`` (at random), ``"k_center"`` (greedily far apart, as
            PatchCore), ``"k_means"`` (centroids), or ``"auto"`` for k-means up to 5,000 rows and a uniform subset
            beyond. Defaults to ``"auto"``.
        bank_stride (int): Distance in pixels between the patches of the training images that may enter the bank, a
            multiple of 2. Defaults to ``8``.
        bank_seed (int): Seed of the bank and of other scorers. Defaults to ``0``.
        position_weight (float | str): How much a patch's distance from the place of a normal patch counts when the two
            are compared, per length of the image's longer side. ``0`` compares with patches from anywhere (unaligned
            parts, surfaces), ``32`` with those of nearly the same place (aligned parts). ``"auto"`` chooses from the
            normal images. Defaults to ``"auto"``.
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        num_components (int): Number K of Gaussian mixture components. Defaults to ``10``.
        batch_norm (bool): Whether batch normalisation follows the small encoder's convolutions. The paper mentions
            none, but surfaces hardly train without it. Defaults to ``True``.
        max_steps (int): Training length in optimizer steps. A smaller ``Trainer`` limit (``max_steps``, ``max_epochs``)
            stands. Defaults to ``1500``.
        max_steps_at_chance (int | None): Training length where ``max_steps`` is longer, but location prediction has
            learned so little after two thirds of this that its own scale does not count. On such surfaces the
            mid-level embeddings, which are scored instead, get worse with longer training. ``None`` to train for
            ``max_steps`` in any case. Defaults to ``1500``.
        steps_per_image (int | None): Optimizer steps made for every training image in an epoch, so that each image is
            decoded once for several steps. ``None`` makes ``max_steps`` about three epochs, whatever the
            number of images; each epoch ends with a validation. Defaults to ``None``.
        holdout (float): Fraction of the training images, from 0 to 0.5, that are held back from training and memory
            bank. At each validation a defect is drawn on each of them (at most 32, and 256 MiB), and how well those
            are found is logged as ``drawn_pixel_AUROC`` and ``drawn_image_AUROC``: figures to stop, to keep the best
            checkpoint and to compare settings by, from normal images alone. Defaults to ``0`` (all images are trained
            on).
        cache_gib (float): Memory for training images that have been decoded, in GiB, on the training device. Crops are
            drawn from all of them. Defaults to ``2.0``.
        training_mode (str): ``"dense"`` trains on crops whose patches share their computation; ``"patchwise"`` on
            separately cut patches, as the paper does. Defaults to ``"dense"``.
        crops_per_step (int): Crops in a step (dense training); each is seen in two disturbed views,
            and in one with drawn defects. Defaults to ``3``.
        crop_size (int): Side of a crop in pixels (dense training). Defaults to ``128``.
        patches_per_step (int): Patches for the density loss in a step; the paper has 128. Defaults to ``1024``.
        pairs_per_step (int): Pairs of neighbouring patches for location prediction in a step; the paper has 36.
            Defaults to ``1024``.
        color_shift (float): Standard deviation of the random colour shift of each view and channel, in units of the
            normalised images (whose standard deviation is about 1). Defaults to ``0.1``.
        noise (float): Standard deviation of the random noise of each view's pixels, likewise. Defaults to ``0.1``.
        learning_rate (float): Adam's learning rate, the peak of the one-cycle schedule. Defaults to ``1e-3``.
        lr_schedule (str): ``"one_cycle"`` or ``"constant"`` (the paper's). Defaults to ``"one_cycle"``.
        lambda_den (float): Weight lambda_1 of the density loss L_DEN. Too large a weight makes all embeddings equal
            (collapse). Defaults to ``1e-4``.
        lambda_lpn (float): Weight lambda_2 of the location prediction loss L_LPN. Defaults to ``1.0``.
        lambda_reg (float): Weight lambda_3 of the covariance regularisation L_reg. Defaults to ``1e-7``.
        lambda_var (float): Weight of the variance loss L_var, which keeps embeddings from becoming equal while location
            prediction has not learned anything yet; the paper has none (0). Defaults to ``1.0``.
        min_std (float): Standard deviation of the embeddings (in -1..1) below which L_var acts. Defaults to ``0.25``.
        lambda_syn (float): Weight of the synthetic-defect loss L_syn, which asks the embeddings to tell patches with
            drawn defects from those without (dense training only). It counts as far as location prediction fails:
            times ``min(1, L_LPN / log 8)^2``. The paper has none (0). Defaults to ``1.0``.
        lambda_svdd (float): Weight of the compactness loss L_SVDD', which Patch-SVDD has in place of L_DEN: patches a
            pixel or two apart are to have the same embedding. Its authors take ``1e-3``. Defaults to ``0`` (left out).
        density_loss (str): Reading of Eq. 9: ``"dagmm"`` (mean of the logarithms) or ``"paper"`` (logarithm of the
            sum, as printed). Defaults to ``"dagmm"``.
        density_warmup (float): Fraction of the training before L_DEN and L_reg set in; over the same fraction again
            they rise to full weight. Without it they shrink embeddings that have not learned anything yet.
            Defaults to ``0.25``.
        covariance_type (str): Covariances of the mixture, ``"diag"`` or ``"full"``. Defaults to ``"diag"``.
        covariance_jitter (float): Added to the covariances' diagonals. Defaults to ``1e-3``.
        train_precision (str): Arithmetic of the networks in training: ``"float32"``, ``"bfloat16"`` (autocast), or
            ``"auto"`` for bfloat16 where the device is fast at it. Scoring is not affected. Defaults to ``"auto"``.
        cuda_graph (bool): Whether steps on a GPU are recorded and launched as a whole, which takes a fraction of the
            time. Several processes, full covariances and patch-by-patch training do without. Defaults to ``True``.
        seed (int | None): Seed of weights and training, which make the same result then on the same machine and number
            of threads. ``None`` to draw from the program's generators. Defaults to ``None``.
        pre_trained (bool): Must be ``False``: Pedenet is trained from scratch and has no weights to load. Accepted so
            that one benchmark configuration can pass ``pre_trained: false`` to every model. Defaults to ``False``.
        pre_processor (PreProcessor | bool): Pre-processor instance, or whether to use the default one, which resizes to
            ``image_size`` and normalises with ImageNet's statistics. Defaults to ``True``.
        post_processor (PostProcessor | bool): Post-processor instance or flag. Defaults to ``True``.
        evaluator (Evaluator | bool): Evaluator instance or flag. Defaults to ``True``.
        visualizer (Visualizer | bool): Visualizer instance or flag. Defaults to ``True``.

    Raises:
        ValueError: If an argument is outside its range; the message names it, the limit and the value.

    Example:
        >>> model = Pedenet(stride=4, max_steps=1200)
        >>> model.model.stride
        4

    Reference:
        K. Zhang, B. Wang, C.-C. J. Kuo, "PEDENet: Image Anomaly Localization via Patch Embedding and Density
        Estimation", 2021, https://arxiv.org/abs/2110.15525.
    """

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        roi: str | Path | None = None,
        patch_sizes: Sequence[int] = (SUB_PATCH_SIZE, PATCH_SIZE),
        scored_sizes: Sequence[int] | None = None,
        stride: int | None = None,
        combination: Combination | None = None,
        scorer: str | dict[str, Any] | None = None,
        bank_size: float = 5_000,
        coreset: Coreset = "auto",
        bank_stride: int = 8,
        bank_seed: int = 0,
        position_weight: float | Literal["auto"] = "auto",
        embedding_dim: int = 64,
        num_components: int = 10,
        batch_norm: bool = True,
        max_steps: int = 1500,
        max_steps_at_chance: int | None = 1500,
        steps_per_image: int | None = None,
        holdout: float = 0.0,
        cache_gib: float = 2.0,
        training_mode: TrainingMode = "dense",
        crops_per_step: int = 3,
        crop_size: int = 128,
        patches_per_step: int = 1024,
        pairs_per_step: int = 1024,
        color_shift: float = 0.1,
        noise: float = 0.1,
        learning_rate: float = 1e-3,
        lr_schedule: LearningRateSchedule = "one_cycle",
        lambda_den: float = 1e-4,
        lambda_lpn: float = 1.0,
        lambda_reg: float = 1e-7,
        lambda_var: float = 1.0,
        min_std: float = 0.25,
        lambda_syn: float = 1.0,
        lambda_svdd: float = 0.0,
        density_loss: DensityLossType = "dagmm",
        density_warmup: float = 0.25,
        covariance_type: CovarianceType = "diag",
        covariance_jitter: float = 1e-3,
        train_precision: TrainPrecision = "auto",
        cuda_graph: bool = True,
        seed: int | None = None,
        pre_trained: bool = False,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_image_size(image_size)
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
        hparams = resolve(self.hparams)
        validate(hparams)
        self._given = changes(self.hparams, _defaults())
        self.hparams.update(hparams)
        self._build()
        # One batch of images serves several optimizer steps, see `training_step`.
        self.automatic_optimization = False
        self._is_bank_stale = False
        self._asked_of_bank: list[str] = []  # arguments for which a checkpoint's bank has to be built anew
        self._has_warned_of_thresholds = False
        self._forget_training()

    def _build(self) -> None:
        """Make the networks, not trained, and the loss, by the hyper-parameters."""
        hparams = self.hparams
        # The program's own generator is left alone: a checkpoint that is loaded must not seed it.
        with torch.random.fork_rng(devices=[], enabled=hparams.seed is not None):
            if hparams.seed is not None:
                torch.manual_seed(hparams.seed)
            self.model: PedenetModel = PedenetModel(
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
                defect_prediction=hparams.lambda_syn > 0,
            )
        self.loss = PedenetLoss(
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

    def _forget_training(self) -> None:
        """Put all that belongs to one training back to its start."""
        self._planned_steps = self.hparams.max_steps
        self._shortened_to: int | None = None  # steps, where location prediction stayed at chance
        self._pool: ImagePool | None = None
        self._guard: StepGuard | None = None
        self._step: TrainingStep | None = None
        self._skipped_in_row = 0
        self._loaded_training: list[dict[str, Any]] | None = None  # of a checkpoint, until the training goes on
        self._planned_random: dict[str, Any] | None = None  # from the start until the first batch
        self._origin: dict[str, Any] | None = None
        self._held_back: HeldBack | None = None
        self._last_metrics: dict[str, torch.Tensor] = {}  # means over the latest batch's steps
        self._clock = (0, 0.0)  # step and time at which the training started
        self._uses_bfloat16 = False
        self._has_warned_of_collapse = False
        self._validated_step = 0
        self._epochs_between_validations: int | None = None  # the Trainer's, while the last validation is seen to

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
        return [InputFiles(), *super().configure_callbacks()]

    # ------------------------------------------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        """Have checkpoint files checked as they are read, and begin a new training as if there had been none.

        Args:
            stage (str): ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            RuntimeError: If the Trainer's precision makes the networks' weights or the memory bank half precision, or
                its callbacks go on from another training.
        """
        from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO

        from anomalib_pedenet.checkpoint_io import CheckedCheckpointIO  # imports the engine, as models must not

        checkpoint_io = self.trainer.strategy.checkpoint_io
        if type(checkpoint_io) is AnomalibCheckpointIO:  # not one that the user chose
            self.trainer.strategy.checkpoint_io = CheckedCheckpointIO(checkpoint_io.extra_safe_globals)
        if str(self.trainer.precision) in {"16-true", "bf16-true"}:
            msg = (
                f"precision={self.trainer.precision} of the Trainer (or Engine) would round weights, memory bank and "
                "scores: leave it out, and set train_precision='bfloat16' of the model to train faster."
            )
            raise RuntimeError(msg)
        if stage != "fit":
            return
        begin_anew(self.trainer)
        self._forget_training()  # a checkpoint to go on from is read later
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, AnomalibDataModule) and not hasattr(datamodule, "val_data"):
            self.trainer.limit_val_batches = 0  # val_split_mode "none": anomalib's data modules fail when asked for it
        train_data = getattr(datamodule, "train_data", None)
        if train_data is not None and len(train_data) < MIN_TRAINING_IMAGES:
            logger.warning(
                "The training set %s has %d normal image(s): what varies between good parts cannot be learned from it. "
                "Add images to the folder of normal training images (%d or more are recommended).",
                getattr(train_data, "name", ""),
                len(train_data),
                RECOMMENDED_TRAINING_IMAGES,
            )

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """Configure Adam, with a one-cycle schedule over the steps that will be made, or a constant rate.

        Returns:
            torch.optim.Optimizer | OptimizerLRSchedulerConfig: Optimizer, with its schedule if there is one.
        """
        optimizer = torch.optim.Adam(
            [
                *self.model.embedding_network.parameters(),
                *self.model.density_networks.parameters(),
                *self.model.location_networks.parameters(),
                *self.model.defect_networks.parameters(),
            ],
            lr=self.hparams.learning_rate,
            fused=True,  # these alone can be told on the device to skip a step
        )
        if self.hparams.lr_schedule == "constant":
            return optimizer
        schedule = self._make_schedule(optimizer, self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _make_schedule(
        self, optimizer: torch.optim.Optimizer, total_steps: int, last_step: int = -1
    ) -> torch.optim.lr_scheduler.OneCycleLR:
        """Return the one-cycle schedule of a training of some length, from the start or in its midst."""
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.hparams.learning_rate,
            total_steps=total_steps,
            pct_start=_RISE,
            last_epoch=last_step,
        )

    def on_train_start(self) -> None:
        """Measure the training images, choose the arithmetic of the networks, and go on where a checkpoint was.

        Raises:
            ValueError: If the training images are too few to hold some back.
        """
        self._planned_steps = self._total_steps()
        self._uses_bfloat16 = _uses_bfloat16(self.hparams.train_precision, self.device)
        self._hold_back()
        num_images = self._images_per_epoch() if self._held_back is None else len(self._held_back.trained_on)
        self._pool = ImagePool(num_images or 2**31, int(self.hparams.cache_gib * 2**30))
        self._clock = (self.trainer.global_step, time.monotonic())
        if self.trainer.global_step == 0:  # a resumed training goes on with the checkpoint's
            self._forget_thresholds()
            self.model.reset_choices()
            self._set_region()
            images = self._sample_of_normal_images(_STANDARDIZATION_IMAGES)
            self.model.fit_standardization(images)
            if are_plain(self.model.standardize(images)):
                self._end_early_on_plain_images(len(images))
        elif "roi" in self._asked_of_bank:
            self._set_region()
        self._guard = StepGuard(self.optimizers().optimizer, self.model)
        # Several processes are left out: their gradients are exchanged as they come, which a graph would have to hold.
        records = self.hparams.cuda_graph and self.trainer.world_size == 1
        self._step = TrainingStep(self.model, self.loss, self.hparams, self._uses_bfloat16, records)
        self._origin = self._origin or origin(self.trainer)
        self._seed_training()
        self._resume(self._pool)
        logger.info(
            "Training Pedenet for %d steps, networks in %s.",
            self._planned_steps,
            "bfloat16" if self._uses_bfloat16 else "float32",
        )

    def _set_region(self) -> None:
        """Take the region of interest that was asked for.

        Raises:
            ValueError: If it cannot be used; the message names the file.
        """
        region, roi = self.model.region, self.hparams.roi
        region.reset()
        if roi == AUTO_ROI:
            region.set(find_roi(self._sample_of_normal_images(_CALIBRATION_IMAGES)))
        elif roi is not None:
            transform = getattr(self.pre_processor, "transform", None)
            paths = self._training_paths()
            if paths:
                size = image_size_of(paths[0])
            else:  # as the data set delivers its images
                (batch,) = self._normal_images([0]).loader
                size = (batch.image.shape[-2], batch.image.shape[-1])
            region.set(read_roi(roi, size, transform or torch.nn.Identity()).to(self.device))
        if not region.is_everywhere:
            logger.info("The region of interest is %.0f %% of the images.", 100 * region.visible.mean())
        elif roi is not None:
            logger.warning("The region of interest %s is all of the images.", roi)

    def _end_early_on_plain_images(self, num_images: int) -> None:
        """Warn that the training images examined show nothing, and make a single step where those are all there are."""
        is_all = num_images == len(self._trained_on)
        logger.warning(
            "Each of the %d training images that were examined is of one colour, so that there is nothing to learn%s. "
            "Look into the folder of normal training images, and check the transforms.",
            num_images,
            ", and the training ends after its first step" if is_all else "",
        )
        if is_all:
            self._planned_steps = 1

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Make several optimizer steps on a batch of normal images.

        A step needs a few crops only, so one batch serves ``steps_per_image`` steps for each of its images: decoding
        and resizing are then a small part of the training time, whatever the size of the images on disk. The crops come
        from all images decoded so far.

        Args:
            batch (Batch): Batch of pre-processed normal images.
            batch_idx (int): Index of the batch (unused).

        Raises:
            ValueError: If the images are not finite or too small, or the loss or its gradients are not finite in many
                steps in a row.
            RuntimeError: If called outside a training.
        """
        del batch_idx
        check_finite(batch)
        self._planned_random = None
        optimizer = self.optimizers()
        remaining = max(0, self._planned_steps - self.trainer.global_step)
        pool, guard, step = self._pool, self._guard, self._step
        if pool is None or guard is None or step is None:
            msg = "There is no pool of training images: train with anomalib's Engine or a Lightning Trainer."
            raise RuntimeError(msg)
        chosen = range(len(batch.image)) if self._held_back is None else self._held_back.trainable(batch)
        images = batch.image[list(chosen)]
        if len(images):
            paths = getattr(batch, "image_path", None)
            pool.add(self.model.standardize(images), paths and [str(paths[position]) for position in chosen])
        history: list[dict[str, torch.Tensor]] = []
        for _ in range(min(remaining, self._steps_per_image() * len(images))):
            self._is_bank_stale = True
            guard.begin()
            with naming_files(batch):
                loss, metrics = self._joint_loss(step, pool.images)
            optimizer.zero_grad()
            self.manual_backward(loss)
            # Gradients are means over the processes already, so that all of them skip a step or none.
            is_skipped = guard.check(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean"))
            optimizer.step()
            scheduler = self.lr_schedulers()  # each time anew, as it may be replaced
            if scheduler is not None:
                scheduler.step()
            history.append(metrics | {"skipped_steps": is_skipped})
            self._report_progress(metrics)
            if is_told_to_stop(self.trainer):
                logger.info("The training was told to stop after %d steps.", self.trainer.global_step)
                # After a signal there is no time for a validation: Lightning ends at once.
                self.trainer.should_stop = not self.trainer.received_sigterm
                break
        history = self._without_skipped(history)
        if history:
            means = torch.stack([torch.stack([step[name].float() for step in history]).mean() for name in history[0]])
            means = self.trainer.strategy.reduce(means, reduce_op="mean")  # every process goes on with the same
            self._report(dict(zip(history[0], means, strict=True)))
            self._shorten_at_chance()
        if self.trainer.global_step >= self._planned_steps or is_last_batch(self.trainer):
            # Unlike the Trainer's own limit of steps, this lets a last validation run, which sets the thresholds.
            self.trainer.should_stop = True
        if self.trainer.should_stop and can_stop_early(self.trainer):
            self._see_to_last_validation()

    def _see_to_last_validation(self) -> None:
        """Have the epoch that ends with this batch validated, also where not every epoch is."""
        interval = self.trainer.check_val_every_n_epoch
        if interval is not None and self._epochs_between_validations is None:
            self._epochs_between_validations, self.trainer.check_val_every_n_epoch = interval, 1

    def _shorten_at_chance(self) -> None:
        """Shorten a long training where location prediction is still at chance, see ``max_steps_at_chance``.

        What is left of it goes by the schedule of the shorter training, so that the rate falls to 0 as in any other.
        """
        step, length = self.trainer.global_step, self.hparams.max_steps_at_chance
        is_decided = self._shortened_to is not None or length is None or not self.model.projections
        if is_decided or self.hparams.lambda_lpn == 0 or step < _DECISION * length:
            return
        shortened = max(length, math.ceil(step / _DECISION))  # a batch may serve so many steps that the time has passed
        if shortened >= self._planned_steps or self._learned()[min(self.model.patch_sizes)] >= MIN_SCALE_WEIGHT:
            return
        logger.warning(
            "Location prediction is still near chance after %d steps: the training ends after %d instead of %d, since "
            "more would make such a surface's scores worse (max_steps_at_chance).",
            step,
            shortened,
            self._planned_steps,
        )
        self._shortened_to = self._planned_steps = shortened
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler = self._make_schedule(self.optimizers().optimizer, shortened, step - 1)

    def _learned(self) -> dict[int, float]:
        """Return how much location prediction has learned at each trained size, from 0 (chance) to 1."""
        losses = {size: self._last_metrics[f"loss_lpn_{size}"] for size in self.model.patch_sizes}
        return {size: 1 - float(synthetic_weight(loss)) for size, loss in losses.items()}

    def _without_skipped(self, history: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Count the steps of a batch that were skipped, and return the metrics of the others.

        Raises:
            ValueError: If many in a row were skipped.
        """
        flags = torch.stack([step.pop("skipped_steps") for step in history]).tolist() if history else []
        self.log("skipped_steps", float(sum(flags)), on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
        for step, is_skipped in zip(history, flags, strict=True):
            self._skipped_in_row = self._skipped_in_row + 1 if is_skipped else 0
            if self._skipped_in_row == MAX_SKIPPED_IN_ROW:
                terms = ", ".join(f"{name} {value:.3g}" for name, value in step.items())
                msg = (
                    f"The training loss or its gradients are not finite after {self.trainer.global_step} steps, "
                    f"{MAX_SKIPPED_IN_ROW} in a row of which were skipped ({terms}): lower learning_rate or "
                    "lambda_den, or raise covariance_jitter. Earlier checkpoints are untouched."
                )
                raise ValueError(msg)
        if any(flags):
            logger.warning(
                "%d of the last %d steps were skipped, since the loss or its gradients were not finite.",
                sum(flags),
                len(flags),
            )
            schedule = self.lr_schedulers()
            if isinstance(schedule, torch.optim.lr_scheduler.OneCycleLR):
                schedule.last_epoch -= sum(flags) + 1  # only here is it known how many were made
                schedule.step()
        return [step for step, is_skipped in zip(history, flags, strict=True) if not is_skipped]

    def _joint_loss(self, step: TrainingStep, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of one step on standardised images, over all scales, and detached scalars to report."""
        return step(images, self._density_scale())

    def _density_scale(self) -> float:
        """Return the factor on L_DEN and L_reg: 0 during the warm-up, then rising to 1 over the same time again."""
        warmup = self.hparams.density_warmup * self._planned_steps
        return 1.0 if warmup == 0 else min(1.0, max(0.0, self.trainer.global_step / warmup - 1))

    def _total_steps(self) -> int:
        """Return the number of optimizer steps that this training will make, under the model's and Trainer's limits."""
        trainer = self.trainer
        limits = [int(self.hparams.max_steps)]
        if self._shortened_to is not None:
            limits.append(self._shortened_to)
        if trainer.max_steps > 0:
            limits.append(trainer.max_steps)
        num_images = self._images_per_epoch()
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and num_images is not None:
            limits.append(trainer.max_epochs * num_images * self._steps_per_image())
        return max(1, min(limits))

    def _images_per_epoch(self) -> int | None:
        """Return the number of training images in an epoch, or ``None`` if it is not known."""
        num_batches = self.trainer.num_training_batches
        if not math.isfinite(num_batches):
            return None
        loader = self.trainer.train_dataloader
        return min(int(num_batches) * (getattr(loader, "batch_size", None) or 1), len(loader.dataset))

    def _steps_per_image(self) -> int:
        """Return the number of steps made for each image of a batch."""
        if self.hparams.steps_per_image is not None:
            return int(self.hparams.steps_per_image)
        num_images = self._images_per_epoch()
        if num_images is None:
            return _STEPS_PER_IMAGE
        limit = self.trainer.max_epochs
        epochs = min(_EPOCHS, limit) if limit is not None and limit > 0 else _EPOCHS
        return max(1, math.ceil(self.hparams.max_steps / (epochs * num_images)))

    def _report_progress(self, metrics: dict[str, torch.Tensor]) -> None:
        """Say in the log now and then how far the training is: a batch can take minutes."""
        step = self.trainer.global_step
        if step % max(1, self._planned_steps // _NUM_REPORTS) or not self.trainer.is_global_zero:
            return
        first_step, start = self._clock
        rate = (step - first_step) / (time.monotonic() - start)
        logger.info(
            "Step %d of %d, %.1f steps/s, about %.0f s left, loss %.3f.",
            step,
            self._planned_steps,
            rate,
            (self._planned_steps - step) / rate,
            metrics["train_loss"].item(),
        )

    def _report(self, metrics: dict[str, torch.Tensor]) -> None:
        """Log the means over a batch's steps, show their essence on the progress bar, and watch for collapse."""
        self._last_metrics = metrics
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1)
        sizes = self.model.patch_sizes
        for label, prefix in (("den", "loss_den"), ("lpn", "loss_lpn"), ("reg", "loss_reg"), ("syn", "loss_syn")):
            value = torch.stack([metrics[f"{prefix}_{size}"] for size in sizes]).sum()
            self.log(label, value, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        accuracy = torch.stack([metrics[f"lp_accuracy_{size}"] for size in sizes]).mean()
        self.log("lp_acc", accuracy, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        spread = torch.stack([metrics[f"spread_{size}"] for size in sizes]).min()
        self.log("spread", spread, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        self.log("step", float(self.trainer.global_step), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        if spread < COLLAPSE_SPREAD and not self._has_warned_of_collapse:
            self._has_warned_of_collapse = True
            logger.warning(
                "The embeddings have collapsed (spread %.3f after %d steps, below %.2f): patches can hardly be told "
                "apart and the anomaly map will be poor. Lower lambda_den and lambda_reg, or raise density_warmup, "
                "lambda_var or min_std.",
                spread,
                self.trainer.global_step,
                COLLAPSE_SPREAD,
            )

    # ------------------------------------------------------------------------------------------------------ resuming

    def _training_state(self) -> list[dict[str, Any]]:
        """Return what each process needs to go on exactly: its generators and what is in its pool of images."""
        pool = self._pool
        state: dict[str, Any] = {"random": random_state(self.device), "skipped_in_row": self._skipped_in_row}
        positions = self._positions(pool.sources) if pool is not None else []
        if pool is not None and positions is not None:
            names = [Path(str(source)).name for source in pool.sources]
            state["pool"] = pool.state_dict() | {"positions": positions, "names": names}
        states = [state] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        return states

    def _positions(self, paths: Sequence[str | None]) -> list[int] | None:
        """Return where files stand in the training set, or ``None`` if that is not known."""
        known = {path: position for position, path in enumerate(self._training_paths())}
        positions = [known.get(path or "", -1) for path in paths]
        return None if -1 in positions else positions

    def _training_paths(self) -> list[str]:
        """Return the files of the training set in order, as far as it tells them."""
        samples = getattr(self._train_loader().dataset, "samples", None)
        return [] if samples is None else [str(path) for path in samples["image_path"]]

    def _resume(self, pool: ImagePool) -> None:
        """Go on where a checkpoint was: with the images of the pool, and the random generators."""
        states, self._loaded_training = self._loaded_training, None
        if self.trainer.global_step == 0:
            return
        if states is None or len(states) != self.trainer.world_size:
            logger.warning(
                "The checkpoint was saved by an earlier version or by another number of processes: the training goes "
                "on from its weights, but not exactly as it would have."
            )
            return
        state = states[self.trainer.global_rank]
        self._skipped_in_row = state["skipped_in_row"]
        if "pool" in state:
            self._restore_pool(pool, state["pool"])
        self._planned_random = state["random"]
        set_random_state(state["random"], self.device)

    def _seed_training(self) -> None:
        """Seed a new training, each process by another number: else all would draw the same crops."""
        if self.trainer.global_step > 0:
            return
        rank = self.trainer.global_rank
        if self.hparams.seed is not None:
            seed_generators(self.hparams.seed + 1 + rank)  # other numbers than those of the weights
            self._planned_random = random_state(self.device)
        elif self.trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + rank)

    def on_train_epoch_start(self) -> None:
        """Have the first epoch of a seeded or resumed training draw from the generators as they are meant to be."""
        if self._planned_random is None:
            return
        set_random_state(self._planned_random, self.device)
        loop = self.trainer.fit_loop
        if self.trainer.current_epoch == 0 or loop.is_resuming or loop.epoch_loop.restarting:
            # The loop has drawn the order of the images before, and draws it at the start of other epochs only.
            iter(loop._data_fetcher)  # noqa: SLF001 - as the loop itself does

    def _restore_pool(self, pool: ImagePool, state: dict[str, Any]) -> None:
        """Decode the images again that were in the pool, if the training set is the same."""
        paths, positions = self._training_paths(), state["positions"]
        if [Path(paths[position]).name for position in positions if position < len(paths)] != state["names"]:
            logger.warning("The training set is not that of the checkpoint: the training goes on with its images.")
            return
        images = self._normal_images(positions, with_augmentations=True)
        standardized = (self.model.standardize(image) for image in images)
        try:
            pool.load_state_dict(state, standardized, [paths[position] for position in positions])
        except ValueError as error:
            logger.warning("%s The training goes on, but not exactly.", error)

    # --------------------------------------------------------------------------------------------------- memory bank

    def fit(self) -> None:
        """Build the memory bank from all normal training images, without augmentation, with the present weights."""
        bank_stride = self.hparams.bank_stride
        self._average_running_statistics()
        with (
            torch.inference_mode(mode=False),  # inference tensors could not be saved and trained on afterwards
            torch.no_grad(),
            self.trainer.precision_plugin.forward_context(),  # as the images will be scored
        ):
            if "roi" in self._asked_of_bank:
                self._set_region()
            learned = self._learned() if self._last_metrics and self.hparams.lambda_lpn > 0 else None
            sample = self._sample_of_normal_images(_CALIBRATION_IMAGES)
            weights = self.model.calibrate(sample, bank_stride, learned)
            images = self._normal_images(self._trained_on)
            progress = tqdm(images, "Building the memory bank", len(images), disable=not self.trainer.is_global_zero)
            self.model.fit(progress, stride=bank_stride)
            # Images held back are not in the bank, as those that will be scored.
            self.model.fit_normal_limit(sample if self._held_back is None else self._held_back.normal.to(self.device))
        scales = self.model.scale_shares
        logger.info(
            "Scored by %s: patches of %s.",
            self.model.scorer_in_use,
            ", ".join(f"{size} px, weight {scales[size]:.2f}, of the position {weights[size]:g}" for size in weights),
        )
        self._is_fitted = torch.tensor([True], device=self.device)
        self._is_bank_stale = False

    def _average_running_statistics(self) -> None:
        """Make the running averages of batch normalisation those of all processes, so that all build the same bank."""
        if self.trainer.world_size == 1:
            return
        for layer in self.model.modules():
            if isinstance(layer, _BatchNorm):
                for buffer in (layer.running_mean, layer.running_var):
                    buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    @property
    def _trained_on(self) -> Sequence[int]:
        """Positions in the training set of the images that are not held back."""
        if self._held_back is not None:
            return self._held_back.trained_on
        return range(len(self._train_loader().dataset))

    def _train_loader(self) -> DataLoader:
        """Return the loader of the training images, outside a training too.

        Raises:
            RuntimeError: If there is none.
        """
        loader = self.trainer.train_dataloader
        datamodule = getattr(self.trainer, "datamodule", None)
        if loader is None and datamodule is not None and getattr(datamodule, "train_data", None) is not None:
            loader = datamodule.train_dataloader()
        if loader is None:
            names = ", ".join(self._asked_of_bank) or "weights"
            msg = (
                f"The memory bank has to be built, since the checkpoint has another {names}, but there are no training "
                f"images: pass the data module of the training, or keep the checkpoint's {names}."
            )
            raise RuntimeError(msg)
        return loader

    def _normal_images(self, indices: Sequence[int], with_augmentations: bool = False) -> NormalImages:
        """Return pre-processed training images, one by one."""
        return NormalImages(self._train_loader(), self.pre_processor, self.device, indices, with_augmentations)

    def _sample_of_normal_images(self, limit: int) -> torch.Tensor:
        """Return at most ``limit`` pre-processed images ``[N, 3, H, W]`` from all over those that are trained on."""
        indices = self._trained_on
        chosen = spread(len(indices), self._num_together(limit))
        return self._normal_images([indices[position] for position in chosen]).together()

    def _num_together(self, limit: int) -> int:
        """Return how many training images, at most ``limit``, may be in memory together; at least two, or all."""
        (image,) = self._normal_images([0])
        return max(MIN_TRAINING_IMAGES, min(limit, _SAMPLE_BYTES // image.nbytes))

    # ----------------------------------------------------------------------------------------- label-free criterion

    def _hold_back(self) -> None:
        """Choose the images to hold back, evenly spread over the training set, and read them.

        Raises:
            ValueError: If there are too few training images, or their batches do not say which images they hold.
        """
        self._held_back = None
        if self.hparams.holdout == 0:
            return
        num_images = len(self.trainer.train_dataloader.dataset)
        count = min(self._num_together(_MAX_HELD_BACK), max(1, round(self.hparams.holdout * num_images)))
        if num_images - count < MIN_TRAINING_IMAGES:
            msg = (
                f"The training set has {num_images} normal image(s), too few to hold {count} back (holdout "
                f"{self.hparams.holdout:g}) and train on {MIN_TRAINING_IMAGES}: set holdout to 0, or add images."
            )
            raise ValueError(msg)
        indices = torch.linspace(0, num_images - 1, count + 2)[1:-1].round().long().tolist()
        images = self._normal_images(indices)
        normal = images.together()
        if len(images.paths) != count:
            msg = "holdout needs a data module whose batches have image_path, to know the images that are held back."
            raise ValueError(msg)
        self._held_back = HeldBack(
            trained_on=sorted(set(range(num_images)) - set(indices)), paths=frozenset(images.paths), normal=normal
        )

    def on_validation_epoch_end(self) -> None:
        """Log how well drawn defects are found on the images held back, if there are any."""
        super().on_validation_epoch_end()
        if self._held_back is None:
            return
        normal = self._held_back.normal.to(self.device)
        drawn = draw_test_defects(normal, self.model.region.pixels((normal.shape[-2], normal.shape[-1])))
        pixel, image = drawn_defect_auroc(self.model, normal, drawn)
        self.log_dict({"drawn_pixel_AUROC": pixel, "drawn_image_AUROC": image}, prog_bar=True, batch_size=1)
        logger.info(
            "AUROC on defects drawn on %d images held back, after %d steps: pixels %.4f, images %.4f.",
            len(normal),
            self.trainer.global_step,
            pixel,
            image,
        )

    def on_validation_start(self) -> None:
        """Rebuild the memory bank if training went on since it was built, and drop what was measured in part."""
        self._refresh_bank()
        self._reset_metrics()

    def on_validation_end(self) -> None:
        """Note which weights were validated."""
        self._validated_step = self.trainer.global_step

    def on_test_start(self) -> None:
        """Build the memory bank if a checkpoint was loaded that has another one."""
        self._refresh_bank()
        self._reset_metrics()
        self._warn_without_thresholds()

    def on_predict_start(self) -> None:
        """Build the memory bank if a checkpoint was loaded that has another one."""
        self._refresh_bank()
        self._warn_without_thresholds()

    def on_train_epoch_end(self) -> None:
        """Do nothing: the mixin would build the bank here once and never again."""

    def on_train_end(self) -> None:
        """Rebuild the memory bank if training went on since it was built, validate it, and say what was learned."""
        self._refresh_bank()
        trainer = self.trainer
        if trainer.enable_validation and self._validated_step != trainer.global_step:
            validate_now(trainer)
        if self._epochs_between_validations is not None:
            trainer.check_val_every_n_epoch = self._epochs_between_validations
        if self._has_no_thresholds and not trainer.received_sigterm:  # after a signal there is no time for it
            self._set_thresholds()
            save_again(trainer)
        for size in self.model.patch_sizes if self._last_metrics else ():
            location = self._last_metrics[f"loss_lpn_{size}"]
            logger.info(
                "Trained %d-px patches: location prediction is right in %.0f %% of pairs (chance: 12 %%); drawn "
                "defects counted %.2f in the end (at most lambda_syn, %g); spread of the embeddings %.2f.",
                size,
                100 * self._last_metrics[f"lp_accuracy_{size}"],
                self.loss.effective_lambda_syn(location),
                self.hparams.lambda_syn,
                self._last_metrics[f"spread_{size}"],
            )
        self._warn_without_thresholds()
        # The model may be saved, and go on with other data: what this training alone needed must not go with it.
        self._pool = self._step = self._guard = None
        self._last_metrics = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled, in exports to PyTorch's format: no images."""
        return super().__getstate__() | {"_held_back": None}

    def _reset_metrics(self) -> None:
        """Reset all metrics: a validation or test that was interrupted leaves scores behind."""
        for component in (self.post_processor, self.evaluator):
            for metric in component.modules() if component is not None else ():
                if isinstance(metric, Metric):
                    metric.reset()

    def _forget_thresholds(self) -> None:
        """Forget the thresholds of an earlier training, which may have been on other data."""
        if isinstance(self.post_processor, PostProcessor):
            for name in THRESHOLDS:
                getattr(self.post_processor, name).fill_(torch.nan)

    @property
    def _has_no_thresholds(self) -> bool:
        """Whether thresholds are wanted and there are none."""
        processor = self.post_processor
        is_asked = isinstance(processor, PostProcessor) and processor.enable_thresholding
        return is_asked and bool(torch.isnan(processor.image_threshold))

    def _set_thresholds(self) -> None:
        """Set the thresholds by the training images, each scored by what is fitted on others."""
        indices = self._trained_on
        if len(indices) < MIN_TRAINING_IMAGES:
            return
        images = self._normal_images([indices[position] for position in spread(len(indices), _THRESHOLD_IMAGES)])
        with torch.inference_mode(mode=False), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            quiet = not self.trainer.is_global_zero
            found = score_held_out(self.model, images, self.hparams.bank_stride, quiet)
            scores = [float(predictions.pred_score) for _, predictions in found]
        chosen = default_threshold(scores)
        for name in LIMITS:
            getattr(self.post_processor, name).fill_(chosen.threshold)
        logger.info(
            "No validation has set thresholds: they are set by %d training images, each scored by what is fitted on "
            "others. Of other good images like these %.1f %% will be called defective on average (%.1f to %.1f %%).",
            len(scores),
            100 * chosen.rate,
            100 * chosen.low,
            100 * chosen.high,
        )

    def _warn_without_thresholds(self) -> None:
        """Say once that there are no thresholds, if there are none."""
        if self._has_no_thresholds and not self._has_warned_of_thresholds:
            self._has_warned_of_thresholds = True
            logger.warning(
                "No validation has set thresholds: what scores higher than all normal training images that were looked "
                "at is called defective. For thresholds by your own good and defective images, validate: give the data "
                "module validation images (val_split_mode, val_split_ratio), and do not set limit_val_batches to 0."
            )

    def _refresh_bank(self) -> None:
        """Build the memory bank if it is not that of the present weights."""
        if self._is_bank_stale:
            self.fit()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See that the memory bank in a checkpoint is that of the weights beside it.

        Args:
            checkpoint (dict[str, Any]): Checkpoint with the already collected ``state_dict``.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[_SCORER] = self.model.scorer
        config = checkpoint.get("anomalib_pre_processor_config") or {}
        has_transform = getattr(self.pre_processor, "transform", None) is not None
        checkpoint[_UNSAVED_TRANSFORM] = has_transform and config.get("transform") is None
        if self._is_bank_stale:
            self.fit()
            bank = {name: value for name, value in self.state_dict().items() if name.startswith(_FITTED)}
            checkpoint["state_dict"].update(bank, _is_fitted=self._is_fitted)
        checkpoint[_ORIGIN] = self._origin
        checkpoint[_SHORTENED] = self._shortened_to
        if self._pool is not None:
            checkpoint[_TRAINING] = self._training_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model of a checkpoint, before its weights are loaded, and plan its schedule anew.

        Arguments that were not given, or have their default values, are taken from the checkpoint. Those that were
        given are used, or refused by name. For another scorer or memory bank the checkpoint gives its networks only:
        the bank is then built from the training images before anything is scored.

        Args:
            checkpoint (dict[str, Any]): Loaded checkpoint.

        Raises:
            ValueError: If the checkpoint is another model's, or an argument was given that it cannot be used with.
        """
        # It imports the engine, as models must not.
        from anomalib_pedenet.checkpoint_io import NETWORK, bring_up_to_date, engine_frame

        if not any(name.startswith(NETWORK) for name in checkpoint.get("state_dict", {})):
            msg = "The checkpoint holds no Pedenet weights: pass a checkpoint that was trained with --model Pedenet."
            raise ValueError(msg)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.TESTING and engine_frame("train"):
            # `Engine.train` would test the checkpoint from which the training went on, instead of its result.
            checkpoint["state_dict"] = self.state_dict()
            return
        bring_up_to_date(checkpoint)
        self._take_hyper_parameters(checkpoint)
        self._take_components(checkpoint)
        for state in checkpoint.get("lr_schedulers", []):
            # What is planned anew stands: otherwise a longer max_steps could not be resumed to.
            state.pop("total_steps", None)
            state.pop("_schedule_phases", None)
        self._loaded_training = checkpoint.get(_TRAINING)
        self._origin = checkpoint.get(_ORIGIN)
        self._shortened_to = checkpoint.get(_SHORTENED)
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, AnomalibDataModule):
            # It resizes images as the pre-processor does that it finds when it is set up: that was another one.
            datamodule.setup(self.trainer.state.fn)

    def _take_hyper_parameters(self, checkpoint: dict[str, Any]) -> None:
        """Take the hyper-parameters of a checkpoint, but for those that were asked for.

        Raises:
            ValueError: If one was asked for that the checkpoint cannot be used with.
        """
        # Lightning puts what `load_from_checkpoint` was asked for in the place of what was saved.
        found = _SAVED.get() or checkpoint.get("hyper_parameters", {})
        saved = resolve(dict(self.hparams) | found)
        saved["scorer"] = checkpoint.get(_SCORER, saved["scorer"])
        saved = {name: saved[name] for name in self.hparams}
        other = changes(self.hparams, saved)
        purpose: Purpose = "load"  # by `load_from_checkpoint`: all that differs was asked for
        if self._trainer is not None:
            purpose = "resume" if self.trainer.state.fn == TrainerFn.FITTING else "evaluate"
        asked = other if purpose == "load" else [name for name in other if name in self._given]
        check_changes(asked, self.hparams, saved, purpose)
        taken = {name: saved[name] for name in other if name not in asked}
        if taken:
            logger.info("Taken from the checkpoint: %s.", ", ".join(f"{name}={taken[name]}" for name in taken))
            self.hparams.update(taken)
            tiler = self.model.tiler
            self._build()
            self.model.to(self.device)
            self.model.tiler = tiler
        self._asked_of_bank = changes_bank(asked)
        self._is_bank_stale = bool(self._asked_of_bank)
        if self._is_bank_stale:
            state = checkpoint["state_dict"]
            self._replace_state(checkpoint, *_FITTED)
            chosen = state.get(_CHOSEN)
            if chosen is not None and len(chosen) == len(checkpoint["state_dict"][_CHOSEN]):
                checkpoint["state_dict"][_CHOSEN] = chosen  # the weights of the same scales
        used = [name for name in asked if name in {"stride", "combination", *self._asked_of_bank}]
        if used:
            logger.warning(
                "Other than in the checkpoint: %s.%s Thresholds are the checkpoint's until the next validation.",
                ", ".join(f"{name}={self.hparams[name]} (was {saved[name]})" for name in used),
                " The memory bank is built anew from the training images." if self._is_bank_stale else "",
            )

    def _take_components(self, checkpoint: dict[str, Any]) -> None:
        """Take pre- and post-processor of a checkpoint, but for those that were given.

        Raises:
            ValueError: If another pre-processor was given than the training had.
        """
        given = dict(self._given_components)
        enabled = dict(checkpoint.get("anomalib_components_enabled") or {})
        ours, theirs = self.pre_processor, checkpoint.get("anomalib_pre_processor_config")
        if "pre_processor" in given:
            is_same = enabled.get("pre_processor", True) == (ours is not None)
            if isinstance(ours, PreProcessor) and theirs and theirs["transform"] is not None:
                is_same = is_same and ours.checkpoint_config() == theirs
            if not is_same:
                msg = (
                    "The checkpoint was trained with another pre_processor than the one given, and its weights do not "
                    "fit other images: leave pre_processor out, or train a new model with it."
                )
                raise ValueError(msg)
        elif checkpoint.get(_UNSAVED_TRANSFORM):
            msg = (
                "The checkpoint was trained with a pre_processor whose transform could not be saved in it: give the "
                "same pre_processor again."
            )
            raise ValueError(msg)
        # anomalib drops and configures components by the checkpoint, those that were given too.
        kept: dict[str, Any] = {f"anomalib_{name}_config": None for name in given}
        kept["anomalib_components_enabled"] = enabled | dict.fromkeys(given, True)
        if "image_size" in self._asked_of_bank:
            kept["anomalib_pre_processor_config"] = None  # ours resizes to what was asked for
        super().on_load_checkpoint(checkpoint | kept)
        resize_as_in_training(self.pre_processor)  # its transform is the checkpoint's now
        # Thresholds go with the checkpoint; the constants of metrics, such as AUPRO's limit, with who measures.
        found = checkpoint["state_dict"]
        for prefix in ("evaluator.", "pre_processor.", "post_processor."):
            self._replace_state(checkpoint, prefix)
        state = checkpoint["state_dict"]
        state.update({name: found[name] for name in state if name.startswith("post_processor.") and name in found})

    def _replace_state(self, checkpoint: dict[str, Any], *prefixes: str) -> None:
        """Put this model's own state in place of a checkpoint's, where names begin with one of ``prefixes``."""
        ours = {name: value for name, value in self.state_dict().items() if name.startswith(prefixes)}
        kept = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith(prefixes)}
        checkpoint["state_dict"] = kept | ours

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: _MAP_LOCATION_TYPE = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool = True,
        **kwargs: Any,  # noqa: ANN401 - hyper-parameters of any type
    ) -> "Pedenet":
        """Load a model with its memory bank from a checkpoint; see ``AnomalibModule.load_from_checkpoint``.

        Raises:
            ValueError: If the file is not a whole checkpoint, or not one of this model, or is to be used with an
                argument that it cannot be used with.
            TypeError: If an argument is unknown.
        """
        # It imports the engine, as models must not.
        from anomalib_pedenet.checkpoint_io import check_checkpoint_file, saved_hyper_parameters

        unknown = set(kwargs) - set(inspect.signature(cls).parameters) - set(inspect.signature(Pedenet).parameters)
        if unknown:
            msg = f"Pedenet has no argument {', '.join(sorted(unknown))}."
            raise TypeError(msg)
        check_checkpoint_file(checkpoint_path, weights_only, cls.checkpoint_safe_globals())
        saved = saved_hyper_parameters(checkpoint_path, weights_only, cls.checkpoint_safe_globals())
        token = _SAVED.set(saved)
        try:
            return super().load_from_checkpoint(
                checkpoint_path,
                map_location=map_location,
                hparams_file=hparams_file,
                strict=strict,
                weights_only=weights_only,
                **kwargs or _asked_of_export(saved),
            )
        finally:
            _SAVED.reset(token)

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


def _defaults() -> dict[str, Any]:
    """Return the default values of all hyper-parameters."""
    parameters = inspect.signature(Pedenet.__init__).parameters
    return {name: value.default for name, value in parameters.items() if name not in {"self", *_COMPONENTS}}


def _asked_of_export(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model was given for which ``Engine.export`` calls ``load_from_checkpoint``, if it does.

    The engine makes its model anew from the checkpoint and drops the one that it was given, with all its arguments:
    only the engine's frame has them.

    Args:
        saved (Mapping[str, Any]): The checkpoint's hyper-parameters.

    Raises:
        ValueError: If an argument was given that an export cannot have.
    """
    from anomalib_pedenet.checkpoint_io import engine_frame  # imports the engine, as models must not

    frame = engine_frame("export")
    if frame is None:
        return {}
    model = frame.f_locals.get("model")
    if not isinstance(model, Pedenet):
        return {}
    saved = resolve(dict(model.hparams) | dict(saved))
    asked = [name for name in changes(model.hparams, saved) if name in model._given]  # noqa: SLF001 - of the class
    check_changes(asked, model.hparams, saved, "export")
    return {name: model.hparams[name] for name in asked} | model._given_components  # noqa: SLF001


def _uses_bfloat16(train_precision: TrainPrecision, device: torch.device) -> bool:
    """Return whether to train the networks under bfloat16 autocast."""
    if train_precision != "auto":
        return train_precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - there is no public name
