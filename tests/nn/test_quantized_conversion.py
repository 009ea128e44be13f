"""Trained layers turned into int8 ones: torch.ao's numbers by default, those trained with on request."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Oracle
from intrinsic.layers import KINDS, QCONFIGS, WEIGHTS, Kind, Layer, plain_layer
from torch import Tensor, nn

import eagerq
from eagerq import QTensor, intrinsic
from eagerq.errors import InvalidConfigError
from eagerq.quantization_mappings import DEFAULT_STATIC_QUANT_MODULE_MAPPINGS

BACKENDS = [name for name in QCONFIGS if name[-2:] in ("-0", "-1") and not name.startswith("symmetric")]


class Net(nn.Module):
    """One layer between stubs."""

    def __init__(self, library: Any, layer: nn.Module) -> None:
        super().__init__()
        self.quant, self.layer, self.dequant = library.QuantStub(), layer, library.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.layer(self.quant(x)))
        return y


def float_net(library: Any, fused: Any, layer: Layer, qconfig: str) -> Net:
    net = Net(library, layer.float_module(fused, None)).train()
    del net.layer.qconfig  # its parent's is meant
    net.qconfig = QCONFIGS[qconfig](library)
    return net


def trained(layer: Layer, qconfig: str, steps: int = 3) -> Any:
    net = eagerq.prepare_qat(float_net(eagerq, intrinsic, layer, qconfig))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for x in layer.inputs(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return net.eval()


def twin_maps(ao: Oracle) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """torch.ao's maps, with the layers that they lack."""
    qat = ao.quantization.get_default_qat_module_mappings()
    static = ao.quantization.get_default_static_quant_module_mappings()
    qat |= {nn.Conv1d: ao.qat.Conv1d, ao.intrinsic.ConvReLU1d: ao.intrinsic_qat.ConvReLU1d}
    static |= {
        ao.qat.Conv1d: ao.quantized.Conv1d,
        ao.intrinsic_qat.ConvReLU1d: ao.intrinsic_quantized.ConvReLU1d,
    }
    return qat, static


def twin_of(ao: Oracle, net: Any, layer: Layer, qconfig: str) -> Any:
    """torch.ao's prepared model in the same state."""
    theirs = float_net(ao.quantization, ao.intrinsic, layer, qconfig)
    theirs = ao.quantization.prepare_qat(theirs, mapping=twin_maps(ao)[0])
    theirs.load_state_dict(net.state_dict())
    return theirs.eval()


@pytest.mark.parametrize("qconfig", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_converted_like_torchs(ao: Oracle, kind: Kind, qconfig: str) -> None:
    layer = plain_layer(kind)
    net = trained(layer, qconfig)
    ours = eagerq.convert(net)
    theirs = ao.quantization.convert(twin_of(ao, net, layer, qconfig), mapping=twin_maps(ao)[1])
    assert type(ours.layer).__name__ == type(theirs.layer).__name__
    assert (ours.quant.scale, ours.quant.zero_point) == (theirs.quant.scale.item(), theirs.quant.zero_point.item())
    assert (ours.layer.scale, ours.layer.zero_point) == (theirs.layer.scale, theirs.layer.zero_point)
    weight, wanted = ours.layer.weight(), theirs.layer.weight()
    assert torch.equal(weight.int_repr(), wanted.int_repr())
    if weight.axis is None:
        assert (weight.q_scale(), weight.q_zero_point()) == (wanted.q_scale(), wanted.q_zero_point())
    else:
        assert torch.equal(weight.q_per_channel_scales(), wanted.q_per_channel_scales().float())
        assert torch.equal(weight.q_per_channel_zero_points().long(), wanted.q_per_channel_zero_points())
    bias, twin = ours.layer.bias(), theirs.layer.bias()
    assert (bias is None) == (twin is None)
    assert bias is None or torch.equal(bias, twin)
    for x in layer.inputs(2):
        assert torch.equal(ours(x), theirs(x))


# --- as trained -------------------------------------------------------------------------------------


def compare(net: Any, layer: Layer, as_trained: bool) -> Tensor:
    """Fake-quantized minus int8 output, in steps, for random integers of the range that was trained with."""
    converted: Any = eagerq.convert(net, as_trained=as_trained)
    before, after = net.quant.activation_post_process, net.layer.activation_post_process
    given = converted.quant.output
    generator = torch.Generator().manual_seed(layer.seed)
    integers = torch.randint(before.quant_min, before.quant_max + 1, (16, *layer.input_shape[1:]), generator=generator)
    net.apply(eagerq.disable_observer)
    with torch.no_grad():
        trained_output = net.layer((integers - given.zero_point).float() * given.scale)
    output = converted.layer(QTensor(integers.to(given.dtype), given.scale, given.zero_point))
    if as_trained:
        wanted = converted.layer.output
        assert (wanted.scale, wanted.zero_point) == (after.scale.item(), after.zero_point.item())
        assert (wanted.low, wanted.high) == (after.quant_min, after.quant_max)
        reached = output.int_repr()
        assert after.quant_min <= int(reached.min())
        assert int(reached.max()) <= after.quant_max
    return (trained_output - output.dequantize()) / after.scale


# Reduced ranges (x86, fbgemm), one scale for all (qnnpack, symmetric), signed activations (symmetric);
# weights of one sign, which training gives zero points of their own, of zeros, and of great differences.
TRAINED = [
    ("x86-1", "ordinary"),
    ("x86-1", "mixed"),
    ("fbgemm-0", "ties"),
    ("onednn-1", "negative"),
    ("onednn-1", "spread"),
    ("onednn-0", "mixed"),
    ("qnnpack-1", "positive"),
    ("symmetric-1", "mixed"),
    ("symmetric-channels-1", "positive"),
    ("symmetric-channels-1", "tiny"),
    ("onednn-1", "zero"),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_int8_is_what_was_trained(kind: Kind) -> None:
    apart = []
    for qconfig, weights in TRAINED:
        layer = plain_layer(kind, weights=weights)
        steps = compare(trained(layer, qconfig, 2), layer, as_trained=True)
        assert steps.abs().max() <= 1.001, (qconfig, weights)
        apart.append((steps.abs() > 0.5).float().mean().item())
    assert sum(apart) / len(apart) < 0.002  # and a step is the exception


@pytest.mark.parametrize("weights", ["positive", "negative", "mixed"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "ConvBnReLU1d"])
def test_zero_points_of_one_signed_channels(kind: str, weights: str) -> None:
    """Trained with zero points, weights mean what they were rounded to, whatever integers say so."""
    net = trained(plain_layer(kind, weights=weights), "onednn-1", 1)
    converted: Any = eagerq.convert(net, as_trained=True)
    fake, weight = net.layer.weight_fake_quant, converted.layer.weight()
    assert fake.zero_point.any()
    assert torch.equal(weight.q_per_channel_scales(), fake.scale)
    fake.disable_observer()
    assert torch.equal(weight.dequantize(), fake(net.layer.folded(as_trained=True)[0]))
    by_default: Any = eagerq.convert(net)
    assert not by_default.layer.weight().q_per_channel_zero_points().any()


@pytest.mark.parametrize("qconfig", ["onednn-0", "onednn-1", "qnnpack-1", "symmetric-channels-1"])
def test_default_conversion_is_near_over_full_ranges(qconfig: str) -> None:
    """Scales computed anew are up to 0.4% apart from those trained with; in version 0 only by the last look."""
    bound = 3.001 if qconfig.endswith("-0") else 0.03 * 255
    most = 0.0
    for kind in KINDS:
        layer = plain_layer(kind)
        steps = compare(trained(layer, qconfig, 2), layer, as_trained=False)
        most = max(most, steps.abs().max().item())
        assert most <= bound, kind
    assert most > 1.5


def test_default_conversion_leaves_reduced_ranges() -> None:
    """Training cuts at 127; torch.ao's int8 layers, and so ours unless told, go on to 255."""
    layer = plain_layer("Conv2d")
    net = trained(layer, "x86-1")
    with torch.no_grad():  # outputs that leave what was observed
        net.layer.bias.add_(3.0)
    assert compare(net, layer, as_trained=False).abs().max() > 20
    assert compare(net, layer, as_trained=True).abs().max() <= 1.001


def test_reduced_range_is_in_the_state() -> None:
    net = trained(plain_layer("LinearReLU"), "x86-1")
    state = eagerq.convert(net, as_trained=True).state_dict()
    assert state["layer.quant_range"].tolist() == [0, 127]
    assert state["quant.quant_range"].tolist() == [0, 127]
    assert not [name for name in eagerq.convert(net).state_dict() if name.endswith("quant_range")]
    full = trained(plain_layer("LinearReLU"), "onednn-1")
    assert not [name for name in eagerq.convert(full, as_trained=True).state_dict() if name.endswith("quant_range")]


@pytest.mark.parametrize("as_trained", [False, True])
@pytest.mark.parametrize("kind", ["Conv2d", "ConvBnReLU2d", "LinearReLU", "LinearBn1d"])
def test_conversion_leaves_the_prepared_model(kind: str, as_trained: bool) -> None:
    net = trained(plain_layer(kind), "onednn-1")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = eagerq.convert(net, as_trained=as_trained).state_dict()
    again = eagerq.convert(net, as_trained=as_trained).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    # converting must not tie the int8 model to the prepared one
    converted = eagerq.convert(net, as_trained=as_trained)
    with torch.no_grad():
        for value in net.parameters():
            value.zero_()
        for value in net.buffers():
            value.zero_()
    assert all(torch.equal(value, first[name]) for name, value in converted.state_dict().items())


def test_from_float_leaves_the_weight_observer() -> None:
    net = trained(plain_layer("Linear"), "onednn-1")
    with torch.no_grad():
        net.layer.weight.mul_(10)  # a look at it now would widen the range
    before = {name: value.clone() for name, value in net.layer.weight_fake_quant.state_dict().items()}
    eagerq.nn.quantized.Linear.from_float(net.layer)
    after = net.layer.weight_fake_quant.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_precomputed_fake_quant_takes_no_other_look(ao: Oracle) -> None:
    layer = plain_layer("Linear")
    net = trained(layer, "onednn-1")
    with torch.no_grad():
        net.layer.weight.mul_(3)
    theirs = twin_of(ao, net, layer, "onednn-1")
    kept = eagerq.convert(net, use_precomputed_fake_quant=True)
    wanted = ao.quantization.convert(copy.deepcopy(theirs), use_precomputed_fake_quant=True)
    renewed = eagerq.convert(net)
    assert torch.equal(kept.layer.weight().int_repr(), wanted.layer.weight().int_repr())
    assert not torch.equal(kept.layer._weight, renewed.layer._weight)


def test_observed_float_layers_like_torchs(ao: Oracle) -> None:
    """Post-training: prepare, calibrate, convert."""
    for kind in KINDS:
        if kind.bn:
            continue  # folded by fuse_modules before
        layer = plain_layer(kind)
        models = []
        for library, fused in ((eagerq, intrinsic), (ao.quantization, ao.intrinsic)):
            net = Net(library, layer.float_module(fused, None))
            del net.layer.qconfig
            net.qconfig = library.QConfig(
                activation=library.MinMaxObserver.with_args(dtype=torch.quint8),
                weight=library.default_per_channel_weight_observer,
            )
            net = library.prepare(net.eval())
            for x in layer.inputs(2):
                net(x)
            maps = {} if library is eagerq else {"mapping": twin_maps(ao)[1]}
            models.append(library.convert(net, **maps))
        ours, theirs = models
        assert torch.equal(ours.layer._weight, theirs.layer.weight().int_repr())
        for x in layer.inputs(2):
            assert torch.equal(ours(x), theirs(x)), kind


# --- what is there ----------------------------------------------------------------------------------


def test_every_kind_has_an_int8_class() -> None:
    """The layers compared here are all that the default map converts, but for embeddings."""
    converted = {kind for kind in DEFAULT_STATIC_QUANT_MODULE_MAPPINGS if ".qat" in kind.__module__}
    assert {kind.qat for kind in KINDS} == {
        kind for kind in converted if not issubclass(kind, nn.Embedding | nn.EmbeddingBag)
    }


def test_weights_of_the_wrong_dtype_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2)).train()
    net.qconfig = eagerq.QConfig(
        activation=eagerq.default_fused_act_fake_quant, weight=eagerq.default_fused_act_fake_quant
    )
    prepared_net = eagerq.prepare_qat(net)
    prepared_net(torch.randn(3, 2))
    with pytest.raises(InvalidConfigError, match=r"'0' .*Weight observer must have dtype torch.int8, got torch.uint8"):
        eagerq.convert(prepared_net)


def test_kinds_of_weights_exist() -> None:
    assert {weights for _, weights in TRAINED} <= set(WEIGHTS)
    assert {qconfig for qconfig, _ in TRAINED} <= set(QCONFIGS)
