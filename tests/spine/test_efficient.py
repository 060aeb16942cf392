"""What every attention by other means is asked, whatever its method: caches of a fixed size, which have room behind the text."""

from __future__ import annotations

import pytest
import tiny
import torch
import work

from paretune import phases
from paretune.methods.transforms.based import Based
from paretune.methods.transforms.longformer import Longformer

WAYS = [Longformer(window=3), Longformer(window=3, dilation=2, dense_below=0), Longformer(window=30, dense_below=0), Based(window=3, feature_dim=3)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("method", WAYS, ids=repr)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_room_behind_the_text_moves_no_logit(family, method, length, padded):
    model = phases.shrink(work.ready(family, "causal"), method, None).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not name.endswith(("wte.weight", "wpe.weight", "embed_tokens.weight")):
                weight.mul_(8)  # attention that a token more or less moves
    ids = torch.randint(5, tiny.SIZE, (2, length + padded), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, 0], mask[1, 0] = tiny.PAD, 0
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "attention_mask": mask}
    plain = model.generate(ids, **how, use_cache=False)
    for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
        cached = model.generate(ids, **how, **more)
        assert torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-9, atol=1e-9)
