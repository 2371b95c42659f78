"""Optimisers: Muon for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW for everything else.

Every step is made of tensor operations without a branch on data, so that it can be captured into a CUDA graph.
"""
import torch


def orthogonalised(g):
    """Newton-Schulz iteration on a stack of matrices [n, rows, columns]; the coefficients are the published ones."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.to(torch.bfloat16)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Matrices of one shape are stacked: a handful of batched products instead of hundreds of small ones."""

    def __init__(self, parameters, momentum=0.95, decay=0.01):
        self.momentum, self.decay, self.groups = momentum, decay, {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape[-2:]), []).append(p)
        device = next(iter(self.groups.values()))[0].device
        self.velocity = {
            shape: torch.zeros(sum(p.numel() for p in group) // (shape[0] * shape[1]), *shape, device=device)
            for shape, group in self.groups.items()
        }

    def step(self, rate):
        for shape, group in self.groups.items():
            gradient = torch.cat([p.grad.reshape(-1, *shape) for p in group])
            velocity = self.velocity[shape]
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalised(gradient.lerp(velocity, self.momentum))
            # The update's RMS as AdamW's usual one (arXiv 2502.16982), so that one rate serves both.
            update = update * (0.2 * max(shape) ** 0.5)
            at = 0
            for p in group:
                count = p.numel() // (shape[0] * shape[1])
                p.data.mul_(1 - rate * self.decay).sub_(rate * update[at : at + count].view_as(p))
                at += count

    def state(self):
        return {str(shape): v for shape, v in self.velocity.items()}

    def load(self, state):
        for shape, v in self.velocity.items():
            v.copy_(state[str(shape)])


class AdamW:
    def __init__(self, parameters, betas=(0.9, 0.98), eps=1e-8):
        self.parameters, self.betas, self.eps = list(parameters), betas, eps
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.count = torch.zeros((), device=self.parameters[0].device)

    def step(self, rate):
        (b1, b2), gradients = self.betas, [p.grad for p in self.parameters]
        self.count += 1
        torch._foreach_lerp_(self.first, gradients, 1 - b1)
        torch._foreach_mul_(self.second, b2)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - b2)
        scale = torch._foreach_sqrt(self.second)
        torch._foreach_mul_(scale, 1 / (1 - b2**self.count).sqrt())
        torch._foreach_add_(scale, self.eps)
        update = torch._foreach_div(self.first, scale)
        torch._foreach_mul_(update, -rate / (1 - b1**self.count))
        torch._foreach_add_([p.data for p in self.parameters], update)

    def state(self):
        return {"first": self.first, "second": self.second, "count": self.count}

    def load(self, state):
        for ours, theirs in zip([*self.first, *self.second], [*state["first"], *state["second"]]):
            ours.copy_(theirs)
        self.count.copy_(state["count"])
