"""The index lists of a mask, and what moves with a batch."""

from __future__ import annotations

import pickle

import pytest
import torch

from d2v_ds.model.batch import Batch, make_views


def test_the_lists_of_a_mask_split_the_positions_and_undo_the_split() -> None:
    """Kept and masked positions ascend, and cat([kept, masked]) read at `restore` is 0 .. T - 1."""
    mask = torch.stack(
        [torch.randperm(13, generator=torch.Generator().manual_seed(i)) < 5 for i in range(20)]
    )
    views = make_views(mask)
    assert views["keep_NK"].shape == (20, 8) and views["masked_NJ"].shape == (20, 5)
    assert not mask.gather(1, views["keep_NK"]).any() and mask.gather(1, views["masked_NJ"]).all()
    for part in ("keep_NK", "masked_NJ"):
        assert (views[part].diff(dim=1) > 0).all()
    order = torch.cat([views["keep_NK"], views["masked_NJ"]], dim=1)
    assert (order.gather(1, views["restore_NT"]) == torch.arange(13)).all()


def test_rows_with_unequal_counts_are_an_error() -> None:
    """The message has the counts and what to do."""
    with pytest.raises(ValueError, match=r"\[1, 2\] masked tokens.*equalise"):
        make_views(torch.tensor([[True, True, False], [False, True, False]]))


def test_only_sound_and_pictures_take_the_dtype() -> None:
    """Token ids, masks and lists stay what they are."""
    views = make_views(torch.tensor([[True, False, False]] * 2))
    device = torch.device("cpu")
    sound = Batch("audio", torch.zeros(1, 9), **views, layerdrop_seed=3).to(device, torch.bfloat16)
    text = Batch("text", torch.zeros(1, 3, dtype=torch.long), **views).to(device, torch.bfloat16)
    assert sound.source.dtype == torch.bfloat16 and text.source.dtype == torch.long
    assert sound.mask_NT.dtype == torch.bool and sound.keep_NK.dtype == torch.long
    assert (sound.clones, sound.layerdrop_seed, sound.padding_BT) == (2, 3, None)


def test_a_batch_goes_to_another_process_as_one_tensor() -> None:
    mask_NT = torch.tensor([[True, False, True], [False, True, True]])
    batch = Batch(
        "audio",
        torch.randn(2, 5),
        padding_BT=torch.tensor([[False, False, True]] * 2),
        labels=torch.empty(2, 0, dtype=torch.int64),
        layerdrop_seed=7,
        **make_views(mask_NT),
    )
    copied = pickle.loads(pickle.dumps(batch))
    assert copied.tensors().keys() == batch.tensors().keys()
    for name, tensor in batch.tensors().items():
        assert copied.tensors()[name].dtype == tensor.dtype and torch.equal(copied.tensors()[name], tensor)
    assert (copied.modality, copied.layerdrop_seed, copied.keep_NK.is_contiguous()) == ("audio", 7, True)
    storages = {tensor.untyped_storage().data_ptr() for tensor in copied.tensors().values() if tensor.numel()}
    assert len(storages) == 1
