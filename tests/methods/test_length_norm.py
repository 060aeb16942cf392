"""The loss against the paper's equation, with its gradients, stands in test_unlikelihood.py beside the other T-Few loss."""

from __future__ import annotations

import torch

from paretune.methods.modifiers.length_norm import _Ranking
from paretune.readouts.ranking import Scores


def test_it_is_the_cross_entropy_of_mean_log_probabilities():
    log_p = torch.tensor([[[-1.0, -2.0, -3.0], [-1.5, 0.0, 0.0]], [[-0.5, 0.0, 0.0], [-4.0, -2.0, 0.0]]], requires_grad=True)
    scores = Scores(log_probs=log_p, lengths=torch.tensor([[3, 1], [1, 2]]))
    labels = torch.tensor([0, 1])
    loss = _Ranking(1.0).loss(None, {"labels": labels}, outputs=scores, loss=torch.zeros(()))
    beta = torch.tensor([[-2.0, -1.5], [-0.5, -3.0]])
    torch.testing.assert_close(loss.detach(), -beta.log_softmax(-1)[[0, 1], labels].sum())
    loss.backward()
    share = beta.softmax(-1) - torch.eye(2)[labels]  # ∂L/∂β = softmax(β) − one-hot
    torch.testing.assert_close(log_p.grad[..., 0], share / torch.tensor([[3, 1], [1, 2]]))
