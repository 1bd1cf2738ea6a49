# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What a checkpoint holds besides Lightning's entries, and what a model takes from it or keeps of its own.

Arguments that a model was given are used beside a checkpoint that has others, or refused by name; all else is the
checkpoint's (:func:`anomalib_pedenet.argument_checks.check_changes`).
"""

import inspect
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.pre_processing import PreProcessor
from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_pedenet.argument_checks import Purpose, changes, changes_bank, check_changes, resolve
from anomalib_pedenet.host.earlier_versions import BROUGHT_UP_TO_DATE, bring_up_to_date, check_goes_on
from anomalib_pedenet.host.exportable_resize import resize_as_in_training
from anomalib_pedenet.recipe import PARTS, changed_parts
from anomalib_pedenet.torch_model import PedenetModel

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

# The hyper-parameters in the file from which a checkpoint is being loaded.
_SAVED: ContextVar[dict[str, Any] | None] = ContextVar("pedenet_saved_hyper_parameters", default=None)

SCORER = "pedenet_scorer"
"""Entry of a checkpoint: the scorer whose state it holds."""

TRAINING = "pedenet_training"
"""Entry of a checkpoint: what each process needs to go on exactly."""

ORIGIN = "pedenet_origin"
"""Entry of a checkpoint: what the training's result depends on besides the model's arguments."""

UNSAVED_TRANSFORM = "pedenet_unsaved_transform"
"""Entry of a checkpoint: whether the pre-processor has a transform that anomalib cannot save."""

SHORTENED = "pedenet_shortened_to"
"""Entry of a checkpoint: the length of a training that was shortened."""

_CHOSEN = "model._extra_state"  # the scales' weights and the kind of the images

FITTED = (
    "model.scorers.",
    "model.position_encodings.",
    "model.projections.",
    "model.whitenings.",
    "model.region.",
    _CHOSEN,
    "model.map_",
    "model.typical_score",
    "model.normal_limit",
    "model.image_limit",
)
"""Names, or their first parts, of what is fitted with the memory bank."""


def settle_arguments(
    ours: Mapping[str, Any], saved: Mapping[str, Any], given: Sequence[str], purpose: Purpose
) -> tuple[list[str], dict[str, Any]]:
    """Settle which hyper-parameters a model keeps and which it takes from a checkpoint.

    Args:
        ours (Mapping[str, Any]): The model's, resolved.
        saved (Mapping[str, Any]): The checkpoint's, resolved, by the same names.
        given (Sequence[str]): Names of those that the model was given.
        purpose (Purpose): What the checkpoint is read for. By ``load_from_checkpoint``, all that differs was asked for.

    Returns:
        tuple[list[str], dict[str, Any]]: Names of those that differ and are kept, and those that are taken.

    Raises:
        ValueError: If one was given that the checkpoint cannot be used with.
    """
    other = changes(ours, saved)
    asked = other if purpose == "load" else [name for name in other if name in given]
    check_changes(asked, ours, saved, purpose)
    return asked, {name: saved[name] for name in other if name not in asked}


def saved_arguments(checkpoint: Mapping[str, Any], found: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's hyper-parameters, with a model's in the place of those that it does not have.

    Args:
        checkpoint (Mapping[str, Any]): Loaded checkpoint.
        found (Mapping[str, Any]): Its hyper-parameters as they were saved.
        ours (Mapping[str, Any]): The model's.

    Returns:
        dict[str, Any]: By the names of ``ours``, resolved.
    """
    saved = resolve(dict(ours) | dict(found))
    saved["scorer"] = checkpoint.get(SCORER, saved["scorer"])
    return {name: saved[name] for name in ours}


def tell_changes(asked: Sequence[str], ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Say in the log which of a checkpoint's arguments are not used to score."""
    of_bank = changes_bank(asked)
    used = [name for name in asked if name in {"stride", "combination", *of_bank}]
    if used:
        logger.warning(
            "Other than in the checkpoint: %s.%s Thresholds are the checkpoint's until the next validation.",
            ", ".join(f"{name}={ours[name]} (was {saved[name]})" for name in used),
            " The memory bank is built anew from the training images." if of_bank else "",
        )


def replace_state(checkpoint: dict[str, Any], own: Mapping[str, Any], *prefixes: str) -> None:
    """Put a model's own state in place of a checkpoint's, where names begin with one of some prefixes.

    Args:
        checkpoint (dict[str, Any]): Loaded checkpoint, whose ``state_dict`` is replaced.
        own (Mapping[str, Any]): The model's ``state_dict``.
        *prefixes (str): First parts of names.
    """
    ours = {name: value for name, value in own.items() if name.startswith(prefixes)}
    kept = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith(prefixes)}
    checkpoint["state_dict"] = kept | ours


def replace_bank(checkpoint: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Drop a checkpoint's memory bank and kind of images, found anew with the bank, but for the same scales' weights.

    Args:
        checkpoint (dict[str, Any]): Loaded checkpoint, whose ``state_dict`` is replaced.
        own (Mapping[str, Any]): The model's ``state_dict``.
    """
    chosen = checkpoint["state_dict"].get(_CHOSEN)
    replace_state(checkpoint, own, *FITTED)
    state = checkpoint["state_dict"]
    if chosen is not None and len(chosen) == len(state[_CHOSEN]):
        state[_CHOSEN] = torch.cat([chosen[:-1], state[_CHOSEN][-1:]])


def keep_components(checkpoint: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Keep a model's evaluator and processors, but for the checkpoint's thresholds.

    Constants of metrics, such as AUPRO's limit, go with who measures.

    Args:
        checkpoint (dict[str, Any]): Loaded checkpoint, whose ``state_dict`` is replaced.
        own (Mapping[str, Any]): The model's ``state_dict``, with the components that it will have.
    """
    found = checkpoint["state_dict"]
    replace_state(checkpoint, own, "evaluator.", "pre_processor.", "post_processor.")
    state = checkpoint["state_dict"]
    state.update({name: found[name] for name in state if name.startswith("post_processor.") and name in found})


def check_pre_processor(checkpoint: Mapping[str, Any], ours: torch.nn.Module | None, is_given: bool) -> None:
    """Check that a model and a checkpoint have the same pre-processor.

    Args:
        checkpoint (Mapping[str, Any]): Loaded checkpoint.
        ours (torch.nn.Module | None): The model's.
        is_given (bool): Whether the model was given it, or told to have none.

    Raises:
        ValueError: If another one was given than the training had, or none and the training's could not be saved.
    """
    theirs = checkpoint.get("anomalib_pre_processor_config")
    if is_given:
        enabled = dict(checkpoint.get("anomalib_components_enabled") or {})
        is_same = enabled.get("pre_processor", True) == (ours is not None)
        if isinstance(ours, PreProcessor) and theirs and theirs["transform"] is not None:
            is_same = is_same and ours.checkpoint_config() == theirs
        if not is_same:
            msg = (
                "The checkpoint was trained with another pre_processor than the one given, and its weights do not "
                "fit other images: leave pre_processor out, or train a new model with it."
            )
            raise ValueError(msg)
    elif checkpoint.get(UNSAVED_TRANSFORM):
        msg = (
            "The checkpoint was trained with a pre_processor whose transform could not be saved in it: give the "
            "same pre_processor again."
        )
        raise ValueError(msg)


def forget_plan(checkpoint: Mapping[str, Any]) -> None:
    """Drop a checkpoint's plan of the learning rate: what is planned anew stands, of a longer training too."""
    for state in checkpoint.get("lr_schedulers", []):
        state.pop("total_steps", None)
        state.pop("_schedule_phases", None)


class PedenetCheckpointMixin(LightningModule):
    """How ``Pedenet`` is saved in a checkpoint, and becomes the model of one.

    Attributes:
        model (PedenetModel): The torch model.
    """

    model: PedenetModel
    _is_fitted: torch.Tensor
    _is_bank_stale: bool
    _asked_of_bank: list[str]
    _given: list[str]
    _given_components: dict[str, Any]

    @abstractmethod
    def fit(self) -> None:
        """Build the memory bank."""

    @abstractmethod
    def _build(self) -> None:
        """Make the networks, not trained, and the loss, by the hyper-parameters."""

    @abstractmethod
    def _training_entries(self) -> dict[str, Any]:
        """Return a checkpoint's entries of the training at hand."""

    @abstractmethod
    def _take_training_entries(self, checkpoint: Mapping[str, Any]) -> None:
        """Take what :meth:`_training_entries` gave to a checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See that the memory bank in a checkpoint is that of the weights beside it.

        Args:
            checkpoint (dict[str, Any]): Checkpoint with the already collected ``state_dict``.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[SCORER] = self.model.scorer
        config = checkpoint.get("anomalib_pre_processor_config") or {}
        has_transform = getattr(self.pre_processor, "transform", None) is not None
        checkpoint[UNSAVED_TRANSFORM] = has_transform and config.get("transform") is None
        if self._is_bank_stale:
            self.fit()
            bank = {name: value for name, value in self.state_dict().items() if name.startswith(FITTED)}
            checkpoint["state_dict"].update(bank, _is_fitted=self._is_fitted)
        checkpoint.update(self._training_entries())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model of a checkpoint, before its weights are loaded, and plan its schedule anew.

        Arguments that were not given, or have their default values, are taken from the checkpoint. Those that were
        given are used, or refused by name. For another scorer or memory bank the checkpoint gives its networks only:
        the bank is then built from the training images before anything is scored.

        Args:
            checkpoint (dict[str, Any]): Loaded checkpoint.

        Raises:
            ValueError: If the checkpoint is another model's, or cannot go on, or not with an argument that was given.
        """
        from anomalib_pedenet.host.checkpoint_io import NETWORK, engine_frame  # imports the engine, as models must not

        if not any(name.startswith(NETWORK) for name in checkpoint.get("state_dict", {})):
            msg = "The checkpoint holds no Pedenet weights: pass a checkpoint that was trained with --model Pedenet."
            raise ValueError(msg)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.TESTING and engine_frame("train"):
            # `Engine.train` would test the checkpoint from which the training went on, instead of its result.
            checkpoint["state_dict"] = self.state_dict()
            return
        bring_up_to_date(checkpoint)
        purpose: Purpose = "load" if self._trainer is None else "evaluate"
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            purpose = "resume"
            check_goes_on(checkpoint)
        self._take_hyper_parameters(checkpoint, purpose)
        self._take_components(checkpoint)
        forget_plan(checkpoint)
        self._take_training_entries(checkpoint)
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, AnomalibDataModule):
            # It resizes images as the pre-processor does that it finds when it is set up: that was another one.
            datamodule.setup(self.trainer.state.fn)

    def _take_hyper_parameters(self, checkpoint: dict[str, Any], purpose: Purpose) -> None:
        """Take the hyper-parameters of a checkpoint, but for those that were asked for.

        Raises:
            ValueError: If one was asked for that the checkpoint cannot be used with.
        """
        # Lightning puts what `load_from_checkpoint` was asked for in the place of what was saved.
        found = _SAVED.get() or checkpoint.get("hyper_parameters", {})
        saved = saved_arguments(checkpoint, found, self.hparams)
        asked, taken = settle_arguments(self.hparams, saved, self._given, purpose)
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
            replace_bank(checkpoint, self.state_dict())
        tell_changes(asked, self.hparams, saved)

    def _take_components(self, checkpoint: dict[str, Any]) -> None:
        """Take pre- and post-processor of a checkpoint, but for those that were given.

        Raises:
            ValueError: If another pre-processor was given than the training had.
        """
        given = self._given_components
        check_pre_processor(checkpoint, self.pre_processor, "pre_processor" in given)
        # anomalib drops and configures components by the checkpoint, those that were given too.
        kept: dict[str, Any] = {f"anomalib_{name}_config": None for name in given}
        enabled = dict(checkpoint.get("anomalib_components_enabled") or {})
        kept["anomalib_components_enabled"] = enabled | dict.fromkeys(given, True)
        if "image_size" in self._asked_of_bank:
            kept["anomalib_pre_processor_config"] = None  # ours resizes to what was asked for
        super().on_load_checkpoint(checkpoint | kept)
        resize_as_in_training(self.pre_processor)  # its transform is the checkpoint's now
        keep_components(checkpoint, self.state_dict())

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,  # type: ignore[override] # anomalib's, which takes no open file
        map_location: _MAP_LOCATION_TYPE = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool = True,  # type: ignore[override] # the same
        **kwargs: Any,  # noqa: ANN401 - hyper-parameters of any type
    ) -> "Self":
        """Load a model with its memory bank from a checkpoint; see ``AnomalibModule.load_from_checkpoint``.

        Raises:
            ValueError: If the file is not a whole checkpoint, or not one of this model, or is to be used with an
                argument that it cannot be used with.
            TypeError: If an argument is unknown.
        """
        # It imports the engine, as models must not.
        from anomalib_pedenet.host.checkpoint_io import check_checkpoint_file, saved_hyper_parameters

        classes = cls.__mro__[: cls.__mro__.index(PedenetCheckpointMixin)]  # a subclass may hand arguments on
        known = {name for one in classes for name in inspect.signature(one).parameters} | set(PARTS)
        kwargs |= changed_parts(kwargs.pop("recipe", {}))  # a checkpoint holds them side by side
        unknown = set(kwargs) - known
        if unknown:
            msg = f"Pedenet has no argument {', '.join(sorted(unknown))}."
            raise TypeError(msg)
        check_checkpoint_file(checkpoint_path, weights_only, cls.checkpoint_safe_globals())
        saved = saved_hyper_parameters(checkpoint_path, weights_only, cls.checkpoint_safe_globals())
        # Lightning reads the file's arguments itself, as an earlier version saved them.
        updated = {name: saved[name] for name in BROUGHT_UP_TO_DATE if name in saved}
        token = _SAVED.set(saved)
        try:
            return super().load_from_checkpoint(
                checkpoint_path,
                map_location=map_location,
                hparams_file=hparams_file,
                strict=strict,
                weights_only=weights_only,
                **updated | (kwargs or _asked_of_export(saved)),
            )
        finally:
            _SAVED.reset(token)


def without_foreign_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a loaded checkpoint's arguments what ``Pedenet`` does not have: those of a subclass, say."""
    foreign = set(_SAVED.get() or ()) - set(PARTS)
    return {name: value for name, value in arguments.items() if name not in foreign}


def _asked_of_export(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model was given for which ``Engine.export`` calls ``load_from_checkpoint``, if it does.

    The engine makes its model anew from the checkpoint and drops the one that it was given, with all its arguments:
    only the engine's frame has them.

    Args:
        saved (Mapping[str, Any]): The checkpoint's hyper-parameters.

    Raises:
        ValueError: If an argument was given that an export cannot have.
    """
    from anomalib_pedenet.host.checkpoint_io import engine_frame  # imports the engine, as models must not

    frame = engine_frame("export")
    if frame is None:
        return {}
    model = frame.f_locals.get("model")
    if not isinstance(model, PedenetCheckpointMixin):
        return {}
    saved = resolve(dict(model.hparams) | dict(saved))
    asked = [name for name in changes(model.hparams, saved) if name in model._given]  # noqa: SLF001 - of the class
    check_changes(asked, model.hparams, saved, "export")
    return {name: model.hparams[name] for name in asked} | model._given_components  # noqa: SLF001
