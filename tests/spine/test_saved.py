"""What a training step keeps for its backward pass: by autograd's own hooks, storage by storage and number by number."""

from __future__ import annotations

import dataclasses

import pytest
import steps
import tiny
import torch
from torch import Tensor

from paretune import anatomy, surgery
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.step import probe, short_attention

ROWS, TOKENS = 8, 16
QKV = LoRA(r=2, targets="query key value")
BF16 = probe.Pace("bf16", short_attention.NAME)


@dataclasses.dataclass
class Kept:
    """A forward pass in training: what it saves, each storage once and without the model's own, and what entered each linear map."""

    saved: dict[int, Tensor]  # by storage, the largest view
    entered: dict[str, Tensor]  # by path

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.saved.values())

    def copies(self, x: Tensor) -> int:
        """How many saved storages hold the numbers of x, in any shape."""
        return sum(t.numel() == x.numel() and torch.equal(t.flatten().float(), x.flatten().float()) for t in self.saved.values())


def kept(method, pace=BF16):
    model, found = steps.model("bert"), Kept({}, {})
    surgery.attach(model, [method])
    with probe.paced(model, pace):
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def keep(tensor):
            at = tensor.untyped_storage().data_ptr()
            if at not in own and tensor.numel() > (found.saved[at].numel() if at in found.saved else 0):
                found.saved[at] = tensor.detach()  # held, so that no other takes its place
            return tensor

        for path, module in model.named_modules():
            if anatomy.is_linear(module) and "encoder" in path:
                module.register_forward_pre_hook(lambda m, args, path=path: found.entered.update({path: args[0].detach()}))
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), probe.autocast(pace):
            assert model.train()(**tiny.inputs("bert", batch=ROWS, length=TOKENS)).logits.requires_grad
    return found


@pytest.mark.parametrize("method", [QKV, LoRA(r=2), Full()], ids=str)
def test_the_input_of_query_key_and_value_is_kept_once(method):
    found = kept(method)
    for layer in range(2):
        three = [found.entered[f"bert.encoder.layer.{layer}.attention.self.{name}"] for name in ("query", "key", "value")]
        assert len({x.untyped_storage().data_ptr() for x in three}) == 1 and found.copies(three[0]) == 1


def test_what_enters_a_frozen_map_without_an_adapter_is_not_kept():
    mine, whole = kept(QKV), kept(Full())
    frozen = [path for path in mine.entered if not path.endswith(("query", "key", "value"))]
    assert len(frozen) == 2 * 3
    assert not any(mine.copies(mine.entered[path]) for path in frozen) and all(whole.copies(whole.entered[path]) for path in frozen)


def test_lora_keeps_less_than_full_fine_tuning_by_the_inputs_of_frozen_maps():
    """By hand: of a layer's three frozen maps the inputs (D, D and I features a token, bf16); beside, LoRA's own h = A x of r features, at three maps."""
    mine, whole = kept(QKV), kept(Full())
    inputs = 2 * 2 * ROWS * TOKENS * (16 + 16 + 32)
    own = 2 * 2 * ROWS * TOKENS * 3 * QKV.r
    assert whole.nbytes - mine.nbytes > 0.9 * (inputs - own)
    assert mine.nbytes < 0.75 * whole.nbytes


def test_kept_activations_are_in_the_fast_format_and_masks_in_a_byte():
    """So a step's saved activations are in low precision: what is left in fp32 is one number or two for each token, a norm's mean and deviation."""
    narrow, wide = kept(QKV), kept(QKV, probe.Pace("fp32", short_attention.NAME))
    assert max(t.numel() for t in narrow.saved.values() if t.dtype == torch.float32) <= ROWS * TOKENS
    assert {t.dtype for t in narrow.saved.values() if t.numel() >= ROWS * TOKENS * 16} == {torch.bfloat16, torch.int8}
    assert narrow.nbytes < 0.65 * wide.nbytes
