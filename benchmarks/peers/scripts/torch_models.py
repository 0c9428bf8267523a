"""The models and the two losses in PyTorch, the same for every peer that is written in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

DECAY = 0.3


class Net(nn.Module):
    """A model whose weights have the names of the file."""

    def __init__(self, model, inputs):
        super().__init__()
        prefix = f"{model}/"
        for name, array in inputs.items():
            if name.startswith(prefix):
                weight = torch.tensor(array)
                if name.startswith("cnn/conv"):
                    weight = weight.permute(3, 2, 0, 1).contiguous()
                self.register_parameter(name.removeprefix(prefix), nn.Parameter(weight))
        self.predict = getattr(self, model)

    def forward(self, x):
        return self.predict(x)

    def mlp(self, x):
        x = torch.relu(torch.addmm(self.b0, x, self.w0))
        x = torch.relu(torch.addmm(self.b1, x, self.w1))
        return torch.addmm(self.b2, x, self.w2)

    def cnn(self, x):
        x = x.reshape(-1, 1, 8, 8)
        x = torch.relu(F.conv2d(x, self.conv0, padding=1))
        x = torch.relu(F.conv2d(x, self.conv1, stride=2, padding=1))
        return x.mean((2, 3)) @ self.out

    def transformer(self, x):
        x = x.reshape(-1, 8, 8) @ self.embed + self.position
        n, t, d = x.shape
        for i in range(2):
            qkv, out, up, down = (getattr(self, f"{name}{i}") for name in WEIGHTS)
            q, k, v = (normalized(x) @ qkv).reshape(n, t, 3, 4, 16).permute(2, 0, 3, 1, 4)
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
            x = x + mixed.transpose(1, 2).reshape(n, t, d) @ out
            x = x + F.gelu(normalized(x) @ up, approximate="tanh") @ down
        return normalized(x).mean(1) @ self.head


WEIGHTS = ("qkv", "out", "up", "down")


def normalized(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def train_loss(logits, weights, lam, batch):
    """Return the weighted training loss; `weights` are the net's."""
    each = F.cross_entropy(logits, batch["y"], reduction="none")
    decay = DECAY / 2 * sum((w**2).sum() for w in weights)
    return (torch.sigmoid(lam[batch["index"]]) * each).mean() + decay


def val_loss(logits, batch):
    return F.cross_entropy(logits, batch["y"])


class Batches:
    """Batches of each step."""

    def __init__(self, model, inputs):
        self._inputs, self._model, self._kept = inputs, model, {}

    def __call__(self, i, unroll=1):
        """Return a list of training batches and the validation batch of step `i`."""
        i %= len(self._inputs[f"{self._model}.index"])
        if i not in self._kept:
            index = self._inputs[f"{self._model}.index"][i, :unroll]
            val = self._inputs[f"{self._model}.val_index"][i]
            self._kept[i] = [self._rows("train", rows) for rows in index], self._rows("val", val)
        return self._kept[i]

    def _rows(self, part, index):
        x, y = self._inputs[f"{part}.x"][index], self._inputs[f"{part}.y"][index]
        tensors = {"x": x, "y": y.astype("int64"), "index": index.astype("int64")}
        return {name: torch.from_numpy(array) for name, array in tensors.items()}
