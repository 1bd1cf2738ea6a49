# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from anomalib_pedenet.host.checkpoint import replace_bank, replace_state, settle_arguments

OURS = {"stride": 4, "max_steps": 100, "embedding_dim": 64}
SAVED = {"stride": 8, "max_steps": 900, "embedding_dim": 64}


def test_what_was_given_is_kept_and_the_rest_taken() -> None:
    assert settle_arguments(OURS, SAVED, ["stride"], "evaluate") == (["stride"], {"max_steps": 900})
    assert settle_arguments(OURS, SAVED, [], "resume") == ([], {"stride": 8, "max_steps": 900})


def test_by_load_from_checkpoint_all_that_differs_was_given() -> None:
    assert settle_arguments(OURS, SAVED, [], "load") == (["stride", "max_steps"], {})


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="embedding_dim=64, and embedding_dim=32"):
        settle_arguments(OURS | {"embedding_dim": 32}, SAVED, ["embedding_dim"], "evaluate")


def test_a_bank_is_replaced_but_for_the_weights_of_as_many_scales() -> None:
    own = {"model.scorers.32.bank": torch.zeros(1), "model._extra_state": torch.zeros(3), "model.net": torch.zeros(1)}
    for scales, kept in ((3, 1.0), (4, 0.0)):
        found = {
            "model.scorers.16.bank": torch.ones(9),
            "model._extra_state": torch.ones(scales),
            "model.net": torch.ones(1),
        }
        checkpoint = {"state_dict": found}
        replace_bank(checkpoint, own)
        state = checkpoint["state_dict"]
        assert set(state) == set(own)
        assert state["model.net"] == 1  # the networks are the checkpoint's
        assert state["model.scorers.32.bank"] == 0
        assert state["model._extra_state"].tolist() == [kept, kept, 0.0]  # the last is the kind of the images


def test_state_is_replaced_by_the_first_part_of_names() -> None:
    checkpoint = {"state_dict": {"evaluator.a": 1, "model.a": 1, "evaluator.old": 1}}
    replace_state(checkpoint, {"evaluator.a": 2, "model.a": 2}, "evaluator.")
    assert checkpoint["state_dict"] == {"model.a": 1, "evaluator.a": 2}
