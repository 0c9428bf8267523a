"""Betty: its implicit gradients by differences, a Neumann series, and conjugate gradients."""

from __future__ import annotations

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from serving import Run, serve
from torch_models import Batches, Net, train_loss, val_loss


def configured(case):
    match case:
        case "darts":
            # peer: darts
            return Config(type="darts")
            # end
        case "neumann-10":
            # peer: neumann-10
            return Config(type="neumann", neumann_iterations=9, neumann_alpha=0.1)
            # end
        case "cg-20":
            # peer: cg-20
            return Config(type="cg", cg_iterations=20)
            # end
    raise ValueError(f"no such case: {case}")


class Repeated:
    """Batches for ever, as Betty's loaders are."""

    def __init__(self, of):
        self.of = of

    def __iter__(self):
        return (self.of(i) for i in range(10**9))


def start(model, case, inputs):
    batches = Batches(model, inputs)
    told = {}

    # peer: all
    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lam = torch.nn.Parameter(torch.zeros(len(inputs["train.x"])))

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            loss = val_loss(self.inner.module(batch["x"]), batch)
            told["loss"] = loss.detach()
            return loss

        def grad_callback(self):
            told["g"] = self.module.lam.grad

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            logits = self.module(batch["x"])
            return train_loss(logits, self.module.parameters(), self.outer.module.lam, batch)

    weights, net = Weights(), Net(model, inputs)
    outer = Outer(
        name="outer",
        config=Config(retain_graph=True),
        module=weights,
        optimizer=torch.optim.Adam(weights.parameters(), lr=1e-2),
        train_data_loader=Repeated(lambda i: batches(i)[1]),
    )
    inner = Inner(
        name="inner",
        config=configured(case),
        module=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-3),
        train_data_loader=Repeated(lambda i: batches(i)[0][0]),
    )
    engine = Engine(
        config=EngineConfig(strategy="cpu"),
        problems=[outer, inner],
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    engine.train()
    # end

    def step(i):
        # peer: all
        engine.global_step = i + 1
        engine.train_step()
        # end
        return told["loss"], told["g"]

    return Run(step)


if __name__ == "__main__":
    serve(start)
