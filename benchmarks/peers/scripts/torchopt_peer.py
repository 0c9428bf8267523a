"""TorchOpt: unrolled through its differentiable Adam, and implicit by its linear solvers."""

from __future__ import annotations

import torch
import torchopt
from serving import Run, serve
from torch_models import Batches, Net, train_loss, val_loss


def unrolled(net, lam, batches, unroll):
    # peer: one-step unrolled-5 unrolled-20
    outer = torch.optim.Adam([lam], lr=1e-2)
    inner = torchopt.MetaAdam(net, lr=1e-3, eps=1e-3, eps_root=1e-16)

    def step(i):
        trains, val = batches(i, unroll)
        for batch in trains:
            inner.step(train_loss(net(batch["x"]), net.parameters(), lam, batch))
        loss = val_loss(net(val["x"]), val)
        outer.zero_grad()
        loss.backward(inputs=[lam])
        outer.step()
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(inner)
        return loss.detach(), lam.grad

    # end
    return Run(step)


def implicit(net, lam, batches, solve):
    # peer: neumann-10 cg-20
    names = [name for name, _ in net.named_parameters()]
    inner = torchopt.adam(lr=1e-3, eps=1e-3)
    outer = torch.optim.Adam([lam], lr=1e-2)
    weights = tuple(w.detach() for w in net.parameters())
    state = inner.init(weights)

    def objective(weights, lam, batch):
        logits = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), batch["x"])
        return train_loss(logits, weights, lam, batch)

    gradient = torch.func.grad(objective)

    @torchopt.diff.implicit.custom_root(gradient, argnums=1, has_aux=True, solve=solve)
    def inner_step(weights, lam, batch):
        updates, new = inner.update(gradient(weights, lam, batch), state, inplace=False)
        return torchopt.apply_updates(weights, updates, inplace=False), new

    def step(i):
        nonlocal weights, state
        (train,), val = batches(i)
        weights, state = inner_step(weights, lam, train)
        logits = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), val["x"])
        loss = val_loss(logits, val)
        outer.zero_grad()
        loss.backward(inputs=[lam])
        outer.step()
        weights = tuple(w.detach() for w in weights)
        return loss.detach(), lam.grad

    # end
    return Run(step)


def start(model, case, inputs):
    net, batches = Net(model, inputs), Batches(model, inputs)
    lam = torch.zeros(len(inputs["train.x"]), requires_grad=True)
    if case == "neumann-10":
        # peer: neumann-10
        solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=9, alpha=0.1)
        # end
        return implicit(net, lam, batches, solve)
    if case == "cg-20":
        # peer: cg-20
        solve = torchopt.linear_solve.solve_cg(maxiter=20, rtol=0.0)
        # end
        return implicit(net, lam, batches, solve)
    return unrolled(net, lam, batches, 1 if case == "one-step" else int(case.split("-")[1]))


if __name__ == "__main__":
    serve(start)
