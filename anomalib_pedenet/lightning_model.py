# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""PEDENet for anomalib: its arguments, and what is done at each step of a training, a test and an export.

Example:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib.models import Pedenet

    >>> engine = Engine()
    >>> engine.train(model=Pedenet(), datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP
"""

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
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
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRSchedulerConfig
from torch.nn.modules.batchnorm import _BatchNorm  # of one process, and synchronised over several

from anomalib_pedenet.anomaly_map import Combination
from anomalib_pedenet.data.image_pool import ImagePool
from anomalib_pedenet.data.input_files import InputFiles, check_finite, check_images, naming_files
from anomalib_pedenet.data.normal_images import MIN_TRAINING_IMAGES, TrainingSet
from anomalib_pedenet.host.checkpoint import ORIGIN, SHORTENED, TRAINING, PedenetCheckpointMixin
from anomalib_pedenet.host.export import PedenetExportMixin
from anomalib_pedenet.host.exportable_resize import resize_as_in_training
from anomalib_pedenet.host.fit_loop import (
    begin_anew,
    can_stop_early,
    is_last_batch,
    is_told_to_stop,
    save_again,
    validate_now,
)
from anomalib_pedenet.hyper_parameters import (
    LearningRateSchedule,
    TrainingMode,
    TrainPrecision,
    changes,
    check_image_size,
    make_loss,
    make_model,
    resolve,
    validate,
)
from anomalib_pedenet.loss import DensityLossType, synthetic_weight
from anomalib_pedenet.mixture import CovarianceType
from anomalib_pedenet.patches import PATCH_SIZE, SUB_PATCH_SIZE
from anomalib_pedenet.post_processor import PedenetPostProcessor, lacks_thresholds, reset_metrics, set_thresholds
from anomalib_pedenet.scorers import Coreset
from anomalib_pedenet.torch_model import PedenetModel
from anomalib_pedenet.training.held_back import HeldBack, hold_back
from anomalib_pedenet.training.memory_bank import build_memory_bank, threshold_of_training
from anomalib_pedenet.training.preparation import measure, set_region
from anomalib_pedenet.training.progress import Progress
from anomalib_pedenet.training.resuming import Resuming
from anomalib_pedenet.training.schedule import Schedule, take_back
from anomalib_pedenet.training.state import origin
from anomalib_pedenet.training.step import TrainingStep
from anomalib_pedenet.training.step_guard import StepGuard

logger = logging.getLogger(__name__)

_RECOMMENDED_TRAINING_IMAGES = 20

# Arguments that are components instead of hyper-parameters.
_COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")


class Pedenet(MemoryBankMixin, PedenetExportMixin, PedenetCheckpointMixin, AnomalibModule):
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
        self.model: PedenetModel = make_model(self.hparams)
        self.loss = make_loss(self.hparams)

    def _forget_training(self) -> None:
        """Put all that belongs to one training back to its start."""
        self._schedule = Schedule(self.hparams, None)
        self._progress = Progress(0)
        self._resuming = Resuming()
        self._pool: ImagePool | None = None
        self._guard: StepGuard | None = None
        self._step: TrainingStep | None = None
        self._origin: dict[str, Any] | None = None
        self._held_back: HeldBack | None = None
        self._last_metrics: dict[str, torch.Tensor] = {}  # means over the latest batch's steps
        self._uses_bfloat16 = False
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
        from anomalib_pedenet.host.checkpoint_io import read_checked  # imports the engine, as models must not

        read_checked(self.trainer)
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
                _RECOMMENDED_TRAINING_IMAGES,
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
        rates = self._make_schedule().learning_rate(optimizer)
        return (
            optimizer
            if rates is None
            else {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}
        )

    def _make_schedule(self) -> Schedule:
        """Plan the training, under the model's and the Trainer's limits."""
        trainer, num_images = self.trainer, self._images_per_epoch()
        return Schedule(self.hparams, num_images, trainer.max_steps, trainer.max_epochs, self._schedule.shortened_to)

    def _images_per_epoch(self) -> int | None:
        """Return the number of training images in an epoch, or ``None`` if it is not known."""
        num_batches = self.trainer.num_training_batches
        if not math.isfinite(num_batches):
            return None
        loader = self.trainer.train_dataloader
        return min(int(num_batches) * (getattr(loader, "batch_size", None) or 1), len(loader.dataset))

    def on_train_start(self) -> None:
        """Measure the training images, choose the arithmetic of the networks, and go on where a checkpoint was.

        Raises:
            ValueError: If the training images are too few to hold some back.
        """
        trainer, hparams = self.trainer, self.hparams
        self._schedule = self._make_schedule()
        self._uses_bfloat16 = _uses_bfloat16(hparams.train_precision, self.device)
        images = self._training_set()
        self._held_back = hold_back(images, hparams.holdout)
        num_images = self._images_per_epoch() if self._held_back is None else len(self._held_back.trained_on)
        self._pool = ImagePool(num_images or 2**31, int(hparams.cache_gib * 2**30))
        self._progress = Progress(trainer.global_step)
        if trainer.global_step == 0:  # a resumed training goes on with the checkpoint's
            set_thresholds(self.post_processor, math.nan)
            self.model.reset_choices()
            self._set_region(images)
            if not measure(self.model, images, self._trained_on(images)):
                self._schedule.total_steps = 1
        elif "roi" in self._asked_of_bank:
            self._set_region(images)
        self._guard = StepGuard(self.optimizers().optimizer, self.model)
        # Several processes are left out: their gradients are exchanged as they come, which a graph would have to hold.
        records = hparams.cuda_graph and trainer.world_size == 1
        self._step = TrainingStep(self.model, self.loss, hparams, self._uses_bfloat16, records)
        self._origin = self._origin or origin(trainer)
        if trainer.global_step == 0:
            self._resuming.seed(trainer, self.device, hparams.seed)
        else:
            skipped = self._resuming.go_on(trainer, self.device, self._pool, images, self.model.standardize)
            self._progress.skipped_in_row = skipped
        logger.info(
            "Training Pedenet for %d steps, networks in %s.",
            self._schedule.total_steps,
            "bfloat16" if self._uses_bfloat16 else "float32",
        )

    def _training_set(self) -> TrainingSet:
        """Return the training images, in a training and outside of it."""
        return TrainingSet(self.trainer, self.pre_processor, self.device, self._asked_of_bank)

    def _trained_on(self, images: TrainingSet) -> Sequence[int]:
        """Return the positions of the training images that are not held back."""
        return range(len(images)) if self._held_back is None else self._held_back.trained_on

    def _set_region(self, images: TrainingSet) -> None:
        """Take the region of interest that was asked for."""
        transform = getattr(self.pre_processor, "transform", None)
        set_region(self.model.region, self.hparams.roi, images, self._trained_on(images), transform)

    def on_train_epoch_start(self) -> None:
        """Have the first epoch of a seeded or resumed training draw from the generators as they are meant to be."""
        self._resuming.begin_epoch(self.trainer, self.device)

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
        self._resuming.begin_batch()
        trainer, schedule, pool = self.trainer, self._schedule, self._pool
        if pool is None:
            msg = "There is no pool of training images: train with anomalib's Engine or a Lightning Trainer."
            raise RuntimeError(msg)
        chosen = range(len(batch.image)) if self._held_back is None else self._held_back.trainable(batch)
        images = batch.image[list(chosen)]
        if len(images):
            paths = getattr(batch, "image_path", None)
            pool.add(self.model.standardize(images), paths and [str(paths[position]) for position in chosen])
        remaining = max(0, schedule.total_steps - trainer.global_step)
        history: list[dict[str, torch.Tensor]] = []
        for _ in range(min(remaining, schedule.steps_per_image * len(images))):
            history.append(self._make_step(batch, pool))
            if is_told_to_stop(trainer):
                logger.info("The training was told to stop after %d steps.", trainer.global_step)
                # After a signal there is no time for a validation: Lightning ends at once.
                trainer.should_stop = not trainer.received_sigterm
                break
        self._look_back(history)
        if trainer.global_step >= schedule.total_steps or is_last_batch(trainer):
            # Unlike the Trainer's own limit of steps, this lets a last validation run, which sets the thresholds.
            trainer.should_stop = True
        if trainer.should_stop and can_stop_early(trainer):
            self._see_to_last_validation()

    def _make_step(self, batch: Batch, pool: ImagePool) -> dict[str, torch.Tensor]:
        """Make an optimizer step, and return what there is to report of it, and whether it was skipped."""
        guard, step, optimizer = self._guard, self._step, self.optimizers()
        assert guard is not None and step is not None  # noqa: PT018 - made with the pool
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
        if self.trainer.is_global_zero:
            self._progress.report(self.trainer.global_step, self._schedule.total_steps, metrics["train_loss"])
        return metrics | {"skipped_steps": is_skipped}

    def _joint_loss(self, step: TrainingStep, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of one step on standardised images, over all scales, and detached scalars to report."""
        return step(images, self._schedule.density_scale(self.trainer.global_step))

    def _look_back(self, history: list[dict[str, torch.Tensor]]) -> None:
        """Report a batch's steps, count those that were skipped, and shorten a training that learns nothing.

        Raises:
            ValueError: If many in a row were skipped.
        """
        trainer = self.trainer
        are_skipped = torch.stack([step.pop("skipped_steps") for step in history]).tolist() if history else []
        skipped = float(sum(are_skipped))
        self.log("skipped_steps", skipped, on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
        self._progress.watch_skipped(trainer.global_step, are_skipped, history)
        take_back(self.lr_schedulers(), sum(are_skipped))
        history = [step for step, is_skipped in zip(history, are_skipped, strict=True) if not is_skipped]
        if not history:
            return
        means = torch.stack([torch.stack([step[name].float() for step in history]).mean() for name in history[0]])
        means = trainer.strategy.reduce(means, reduce_op="mean")  # every process goes on with the same
        self._report(dict(zip(history[0], means, strict=True)))
        if not self.model.projections:
            return
        step, smallest = trainer.global_step, min(self.model.patch_sizes)
        if self._schedule.shorten_at_chance(step, self._learned()[smallest]):
            for config in trainer.lr_scheduler_configs:
                config.scheduler = self._schedule.learning_rate(self.optimizers().optimizer, step - 1)

    def _report(self, metrics: dict[str, torch.Tensor]) -> None:
        """Log the means over a batch's steps, show their essence on the progress bar, and watch for collapse."""
        self._last_metrics = metrics
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1)
        sizes = self.model.patch_sizes
        shown = {
            label: torch.stack([metrics[f"loss_{label}_{size}"] for size in sizes]).sum()
            for label in ("den", "lpn", "reg", "syn")
        }
        shown["lp_acc"] = torch.stack([metrics[f"lp_accuracy_{size}"] for size in sizes]).mean()
        shown["spread"] = torch.stack([metrics[f"spread_{size}"] for size in sizes]).min()
        step = self.trainer.global_step
        for label, value in (shown | {"step": float(step)}).items():
            self.log(label, value, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        self._progress.watch_spread(step, shown["spread"])

    def _learned(self) -> dict[int, float]:
        """Return how much location prediction has learned at each trained size, from 0 (chance) to 1."""
        losses = {size: self._last_metrics[f"loss_lpn_{size}"] for size in self.model.patch_sizes}
        return {size: 1 - float(synthetic_weight(loss)) for size, loss in losses.items()}

    def _see_to_last_validation(self) -> None:
        """Have the epoch that ends with this batch validated, also where not every epoch is."""
        interval = self.trainer.check_val_every_n_epoch
        if interval is not None and self._epochs_between_validations is None:
            self._epochs_between_validations, self.trainer.check_val_every_n_epoch = interval, 1

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
        if lacks_thresholds(self.post_processor) and not trainer.received_sigterm:  # a signal leaves no time for it
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

    # ------------------------------------------------------------------------------------ memory bank and thresholds

    def fit(self) -> None:
        """Build the memory bank from all normal training images, without augmentation, with the present weights."""
        self._average_running_statistics()
        with self._as_scored():
            images = self._training_set()
            if "roi" in self._asked_of_bank:
                self._set_region(images)
            build_memory_bank(
                self.model,
                images,
                self._trained_on(images),
                self.hparams.bank_stride,
                self._learned() if self._last_metrics and self.hparams.lambda_lpn > 0 else None,
                unseen=None if self._held_back is None else self._held_back.normal,
                quiet=not self.trainer.is_global_zero,
            )
        self._is_fitted = torch.tensor([True], device=self.device)
        self._is_bank_stale = False

    @contextlib.contextmanager
    def _as_scored(self) -> Iterator[None]:
        """Compute as images will be scored, and have results that can be saved and trained on afterwards."""
        with (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            self.trainer.precision_plugin.forward_context(),
        ):
            yield

    def _average_running_statistics(self) -> None:
        """Make the running averages of batch normalisation those of all processes, so that all build the same bank."""
        if self.trainer.world_size == 1:
            return
        for layer in self.model.modules():
            if isinstance(layer, _BatchNorm):
                for buffer in (layer.running_mean, layer.running_var):
                    buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    def _refresh_bank(self) -> None:
        """Build the memory bank if it is not that of the present weights."""
        if self._is_bank_stale:
            self.fit()

    def _set_thresholds(self) -> None:
        """Set the thresholds by the training images, each scored by what is fitted on others."""
        images, quiet = self._training_set(), not self.trainer.is_global_zero
        with self._as_scored():
            found = threshold_of_training(self.model, images, self._trained_on(images), self.hparams.bank_stride, quiet)
        if found is not None:
            set_thresholds(self.post_processor, found.threshold)

    def _warn_without_thresholds(self) -> None:
        """Say once that there are no thresholds, if there are none."""
        if lacks_thresholds(self.post_processor) and not self._has_warned_of_thresholds:
            self._has_warned_of_thresholds = True
            logger.warning(
                "No validation has set thresholds: what scores higher than all normal training images that were looked "
                "at is called defective. For thresholds by your own good and defective images, validate: give the data "
                "module validation images (val_split_mode, val_split_ratio), and do not set limit_val_batches to 0."
            )

    def on_validation_start(self) -> None:
        """Rebuild the memory bank if training went on since it was built, and drop what was measured in part."""
        self._refresh_bank()
        reset_metrics(self.post_processor, self.evaluator)

    def on_validation_epoch_end(self) -> None:
        """Log how well drawn defects are found on the images held back, if there are any."""
        super().on_validation_epoch_end()
        if self._held_back is not None:
            figures = self._held_back.measure(self.model, self.trainer.global_step)
            self.log_dict(figures, prog_bar=True, batch_size=1)

    def on_validation_end(self) -> None:
        """Note which weights were validated."""
        self._validated_step = self.trainer.global_step

    def on_test_start(self) -> None:
        """Build the memory bank if a checkpoint was loaded that has another one."""
        self._refresh_bank()
        reset_metrics(self.post_processor, self.evaluator)
        self._warn_without_thresholds()

    def on_predict_start(self) -> None:
        """Build the memory bank if a checkpoint was loaded that has another one."""
        self._refresh_bank()
        self._warn_without_thresholds()

    def _training_entries(self) -> dict[str, Any]:
        """Return a checkpoint's entries of the training at hand."""
        entries: dict[str, Any] = {ORIGIN: self._origin, SHORTENED: self._schedule.shortened_to}
        if self._pool is not None:
            entries[TRAINING] = Resuming.state(
                self.trainer, self.device, self._pool, self._training_set(), self._progress.skipped_in_row
            )
        return entries

    def _take_training_entries(self, checkpoint: Mapping[str, Any]) -> None:
        """Take what :meth:`_training_entries` gave to a checkpoint."""
        self._resuming.loaded = checkpoint.get(TRAINING)
        self._origin = checkpoint.get(ORIGIN)
        self._schedule.shortened_to = checkpoint.get(SHORTENED)

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


def _uses_bfloat16(train_precision: TrainPrecision, device: torch.device) -> bool:
    """Return whether to train the networks under bfloat16 autocast."""
    if train_precision != "auto":
        return train_precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - there is no public name
