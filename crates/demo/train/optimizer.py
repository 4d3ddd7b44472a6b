"""Muon for the matrices inside the layers, AdamW for everything else.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that every direction learns
at the same speed. Stacked experts are many small matrices and are orthogonalised together, one
batched product for all matrices of one shape, shared among the workers.
Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
"""

import torch
from torch import Tensor, nn

from workers import shared_map

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steep at zero; lands in 0.7..1.2, which is enough
NEWTON_SCHULZ_STEPS = 4


def orthogonalise(x: Tensor) -> Tensor:
    """Pushes the singular values of each matrix in `[matrices, rows, columns]` towards one."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Each parameter is a matrix, or a stack of matrices; gate and up are taken as two."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        group = self.param_groups[0]
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(average, group["momentum"])
            target = matrices(parameter)
            by_shape.setdefault(target.shape[-2:], []).append((target, matrices(update)))
        for (rows, columns), pairs in by_shape.items():
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            updates = torch.cat([update for _, update in pairs])
            # Signs and directions are all that is needed: bf16 halves the time of this step.
            direction = shared_map(orthogonalise, updates.bfloat16()).float()
            for (target, _), part in zip(
                pairs, direction.split([len(target) for target, _ in pairs]), strict=True
            ):
                target.sub_(part, alpha=scale)


def matrices(x: Tensor) -> Tensor:
    """A view as `[matrices, rows, columns]`; `[experts, gate and up, hidden]` counts twice."""
    if x.dim() == 3 and x.shape[1] > 2 * x.shape[2]:
        return x.view(2 * x.shape[0], -1, x.shape[2])
    return x.view(-1, *x.shape[-2:])


def make_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Splits the parameters: matrices of attention and experts, and the rest."""
    inside, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = "_proj" in name
        (inside if is_matrix else rest).append(parameter)
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(inside, muon_lr), adam]
