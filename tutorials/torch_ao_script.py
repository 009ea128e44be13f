"""A program of the years before: quantization-aware training with torch.ao, in the spellings that people used.

It trains a small network on scikit-learn's digits, first in float, then with fake quantization, converts it to
int8, and saves both models' state_dicts and a few figures. migrate_from_torch_ao.py takes it to eagerq.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.ao.nn.quantized as nnq
import torch.nn as nn
from sklearn.datasets import load_digits
from torch.ao.quantization import (
    DeQuantStub,  # out of int8
    QuantStub,  # into int8
    get_default_qat_qconfig,
)
from torch.nn.functional import cross_entropy
from torch.quantization import convert as to_int8


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.add = nn.quantized.FloatFunctional()  # the old place of nnq.FloatFunctional

    def forward(self, x):
        return self.add.add_relu(x, self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant = QuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.block1 = Residual(16)
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(16, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        self.block2 = Residual(32)
        self.fc1, self.relu3 = nn.Linear(32 * 3 * 3, 64), nn.ReLU()
        self.fc2 = nn.Linear(64, 10)
        self.dequant = DeQuantStub()

    def forward(self, x):
        x = self.block1(self.relu1(self.bn1(self.conv1(self.quant(x)))))
        x = self.block2(self.relu2(self.bn2(self.conv2(x))))
        return self.dequant(self.fc2(self.relu3(self.fc1(x.flatten(1)))))


def prepare(model):
    names = [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"], ["fc1", "relu3"]]
    names += [[f"block{number}.conv", f"block{number}.bn"] for number in (1, 2)]
    torch.ao.quantization.fuse_modules_qat(model.train(), names, inplace=True)
    model.qconfig = get_default_qat_qconfig("onednn")
    return torch.ao.quantization.prepare_qat(model, inplace=True)


def convert(model):
    return to_int8(model.eval())


def digits():
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    return images[:1280], labels[:1280], images[1280:], labels[1280:]


def train(model, images, labels, epochs, rate):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=rate, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("."))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = digits()

    model = Net()
    losses = train(model, images, labels, options.epochs, rate=0.02)
    prepare(model)
    losses += train(model, images, labels, options.epochs, rate=0.005)
    torch.save(model.state_dict(), options.folder / "qat.pt")

    int8 = convert(model)
    assert isinstance(int8.block1.add, nnq.QFunctional)
    weight = int8.conv1.weight()
    assert weight.dtype == torch.qint8
    torch.save(int8.state_dict(), options.folder / "int8.pt")
    with torch.no_grad():
        predictions = int8(test_images).argmax(1)
    figures = {
        "losses": losses,
        "predictions": predictions.tolist(),
        "accuracy": (predictions == test_labels).float().mean().item(),
    }
    (options.folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
