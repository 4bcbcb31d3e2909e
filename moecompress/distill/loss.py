"""What a student is trained on: the teacher's most likely next tokens, and the text itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

#: Stands for −∞, which padding of the vocabulary may have: 0 · (−∞) would be NaN.
RULED_OUT = -1e4


def targets(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of a teacher's logits [..., V]: (log-probabilities [..., k + 1], token numbers int32 [..., k]).

    k: the ``top`` most likely tokens; the last column is all other tokens together. With ``top`` 0 or at least V, every
    token is kept and there are no others: both are [..., V].
    """
    logits = logits.float()
    size = logits.shape[-1]
    index = logits.topk(top, dim=-1).indices if 0 < top < size else torch.arange(size, device=logits.device).expand(logits.shape)
    return log_probs(logits, index), index.to(torch.int32)


def log_probs(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Log-probabilities under logits [..., V] of the tokens ``index`` [..., k] and of all others together: [..., k + 1]
    (without the last column if there are no others)."""
    logits, index = logits.float(), index.long()
    if index.shape[-1] == logits.shape[-1]:
        return logits.log_softmax(-1).gather(-1, index)
    return LogProbs.apply(logits, index)


class LogProbs(torch.autograd.Function):
    """`log_probs` in few passes over the vocabulary, of which the gradient needs but one and no copy of its own for each: a small
    model spends much of its time here."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        highest = logits.amax(-1, keepdim=True)
        shares = (logits - highest).exp_()  # of each token, not divided by their sum yet
        own = shares.gather(-1, index)
        # Summed without the tokens of ``index``: what is left of 1 without them would be lost in rounding.
        rest = shares.scatter_(-1, index, 0.0).sum(-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).tiny)
        norm = rest + own.sum(-1, keepdim=True)
        ctx.save_for_backward(shares, own, rest, norm, index)
        return torch.cat([logits.gather(-1, index) - highest, rest.log()], dim=-1) - norm.log()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """With g_j for a token of ``index`` and r for the others: g_j − G p_j, and (r / P_rest − G) p_i; G the sum of all."""
        (grad,) = grads
        shares, own, rest, norm, index = ctx.saved_tensors
        total = grad.sum(-1, keepdim=True) / norm
        result = shares * (grad[..., -1:] / rest - total)
        return result.scatter_(-1, index, grad[..., :-1] - total * own), None


def divergence(logits: torch.Tensor, known: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) in nats [...], of a student's logits [..., V] and a teacher's `targets`.

    Over k tokens and "another one", so it is a lower bound of the KL over all tokens, and zero only if the student also gives
    the others together what the teacher gives them. (SlimMoE, arXiv:2506.18349, renormalises over the k tokens alone, which
    leaves that open.)
    """
    own = log_probs(logits, index).clamp_min(RULED_OUT)
    known = known.clamp_min(RULED_OUT)
    return (known.exp() * (known - own)).sum(-1)


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each next token: logits [B, L, V], ids [B, L]."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
