"""What is taken from a checkpoint: all of it where its labels are the task's, all but the head where they are others."""

import pytest
import torch
import work

from paretune import backbones, surgery


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
@pytest.mark.parametrize("same", [True, False])
def test_the_head_is_the_checkpoints_only_for_its_own_labels(family, same, tmp_path):
    task, saved = work.text_task(), work.ready(family)
    names = task.kind.config(task)["id2label"]
    saved.config.id2label = names if same else {i: f"not {name}" for i, name in names.items()}
    saved.save_pretrained(tmp_path)
    surgery.state(saved).processor.save_pretrained(tmp_path)
    one, again = (backbones.load(backbones.find(str(tmp_path)), task, seed=seed) for seed in (0, 0))
    for name, before in saved.state_dict().items():
        now, head = one.state_dict()[name], not name.startswith(saved.base_model_prefix + ".")
        assert torch.equal(now, again.state_dict()[name]), "the seed decides"
        if before.dim() > 1:
            assert torch.equal(now, before) == (same or not head), name
