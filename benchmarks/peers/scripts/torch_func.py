"""PyTorch's own `torch.func`, in the manner of `higher`: differentiate through a loop by hand."""

from __future__ import annotations

import torch
from serving import Run, serve
from torch.func import functional_call, grad, grad_and_value
from torch_models import Batches, Net, train_loss, val_loss


def start(model, case, inputs):
    net, batches = Net(model, inputs), Batches(model, inputs)
    lam = torch.zeros(len(inputs["train.x"]))
    unroll = 1 if case == "one-step" else int(case.split("-")[1])

    # peer: all
    def inner_loss(params, lam, batch):
        logits = functional_call(net, params, batch["x"])
        return train_loss(logits, params.values(), lam, batch)

    def adam(params, gradients, mean, square, t):
        mean = {n: 0.9 * mean[n] + 0.1 * g for n, g in gradients.items()}
        square = {n: 0.999 * square[n] + 0.001 * g * g for n, g in gradients.items()}
        c1, c2 = 1 - 0.9**t, 1 - 0.999**t
        params = {
            n: w - 1e-3 * (mean[n] / c1) / ((square[n] / c2 + 1e-16).sqrt() + 1e-3)
            for n, w in params.items()
        }
        return params, mean, square

    def objective(lam, params, mean, square, t, trains, val):
        for batch in trains:
            t += 1
            gradients = grad(inner_loss)(params, lam, batch)
            params, mean, square = adam(params, gradients, mean, square, t)
        loss = val_loss(functional_call(net, params, val["x"]), val)
        return loss, (params, mean, square)

    params = {name: w.detach() for name, w in net.named_parameters()}
    zeros = {name: torch.zeros_like(w) for name, w in params.items()}
    carry = (params, zeros, zeros)
    outer = torch.optim.Adam([lam], lr=1e-2)

    def step(i):
        nonlocal carry
        trains, val = batches(i, unroll)
        arguments = (lam, *carry, i * unroll, trains, val)
        g, (loss, carry) = grad_and_value(objective, has_aux=True)(*arguments)
        lam.grad = g
        outer.step()
        return loss, g

    # end
    return Run(step)


if __name__ == "__main__":
    serve(start)
