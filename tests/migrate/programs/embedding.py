"""A recommender: embeddings by the bag and a dynamic layer, from the oldest spellings."""

import torch
from torch import nn, qint8
from torch.nn import intrinsic, quantized as nnq
from torch.nn.qat import EmbeddingBag as TrainedBag
from torch.quantization.qconfig import float_qparams_weight_only_qconfig as table_qconfig


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.EmbeddingBag(20, 8, mode="sum", include_last_offset=True)
        self.fc1, self.relu, self.fc2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)

    def forward(self, indices, offsets):
        return self.fc2(self.relu(self.fc1(self.emb(indices, offsets))))


def main():
    torch.manual_seed(0)
    model = Recommender().eval()
    indices, offsets = torch.arange(20).flip(0), torch.tensor([0, 5, 9, 20])
    model.emb.qconfig = table_qconfig
    mapping = {nn.EmbeddingBag: nnq.EmbeddingBag}
    torch.quantization.prepare(model, inplace=True)
    torch.quantization.convert(model, mapping, inplace=True)
    bags = model.emb(indices, offsets)
    dynamic = torch.quantization.quantize_dynamic(model, {nn.Linear}, dtype=qint8)
    assert isinstance(dynamic.fc1, torch.nn.quantized.dynamic.Linear)
    assert not isinstance(dynamic.fc1, (TrainedBag, intrinsic.ConvReLU2d))
    return {"bags": bags.flatten().tolist(), "out": dynamic(indices, offsets).flatten().tolist()}
