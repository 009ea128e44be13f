"""Quantization-aware training that looks at the modules it trains."""

import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.nn.functional as F
from torch import ao, nn
from torch.ao.nn.quantized.modules.linear import Linear as Int8Linear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = ao.quantization.QuantStub(), ao.quantization.DeQuantStub()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.skip = ao.nn.quantized.FloatFunctional()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.layers(self.quant(x))
        x = self.skip.add(x, x)
        return self.dequant(self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def loss_of_steps(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        if step == 3:
            model.apply(ao.quantization.disable_observer)
        if step == 4:
            model.apply(torch.ao.nn.intrinsic.qat.freeze_bn_stats)
        x = torch.randn(6, 1, 5, 5, generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    torch.manual_seed(0)
    model = Net().train()
    ao.quantization.fuse_modules_qat(model, [f"layers.{number}" for number in range(3)], inplace=True)
    assert type(model.layers[0]) is nni.ConvBnReLU2d
    model.qconfig = ao.quantization.QConfig(
        activation=ao.quantization.FusedMovingAvgObsFakeQuantize.with_args(
            observer=ao.quantization.observer.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
        ),
        weight=ao.quantization.default_per_channel_weight_fake_quant,
    )
    ao.quantization.prepare_qat(model, inplace=True)
    assert type(model.layers[0]) is nniqat.ConvBnReLU2d
    assert type(model.fc) is nnqat.Linear
    losses = loss_of_steps(model, 6)
    model.eval()
    keys = list(model.state_dict())
    int8 = ao.quantization.convert(model)
    assert isinstance(int8.fc, Int8Linear)
    x = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(2))
    return {"losses": losses, "keys": keys, "out": (int8(x) / int8.fc.scale).round().int().flatten().tolist()}
