"""int8 normalization layers: torch.ao's integers, right where those are wrong, and everything around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.calls import Call
from kernels.normalizations import calls, cancelled, in_float64
from nn.norms import (
    BATCH_NORMS,
    FUSED,
    INSTANCE_NORMS,
    NAMES,
    Network,
    build,
    converted,
    float_layer,
    images,
    int8_class,
    prepared,
    some_input,
    trained_network,
    twin_tensor,
)
from torch import Tensor, nn

import eagerq
from eagerq import QTensor
from eagerq.errors import InvalidInputError, NotQuantizedError
from eagerq.nn import quantized
from eagerq.nn.quantized.functional.normalization import group_norm, instance_norm, layer_norm

names = pytest.mark.parametrize("name", NAMES)
# torch itself, of a layer that the mapping of torch.ao makes with as many channels as it is given
pytestmark = pytest.mark.filterwarnings("ignore:input's size at dim=:UserWarning")


# --- numbers ----------------------------------------------------------------------------------------


def calls_for(name: str, integer_type: Any) -> st.SearchStrategy[Call]:
    kernel = {"LayerNorm": "layer_norm", "GroupNorm": "group_norm"}.get(name)
    if kernel is None:
        kernel = "batch_norm" if name in BATCH_NORMS else "group_norm"
    drawn = calls(kernel, st.just(integer_type), whole=True)
    if name == "LayerNorm":
        return drawn
    if name == "GroupNorm":
        return drawn.filter(lambda call: call["x"].dim() > 2)  # torch.ao refuses less

    def shaped(call: Call) -> Call:
        x = call["x"]
        x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        x = x.reshape(*x.shape, *[1] * (int(name[-2]) - 1))
        groups = {} if name in BATCH_NORMS else {"num_groups": x.shape[1]}
        return {**call, "x": x.transpose(2, -1).contiguous(), **groups}

    shaped_calls = drawn.map(shaped)
    if name in BATCH_NORMS:  # torch.ao wants them
        return shaped_calls.filter(lambda call: call["weight"] is not None and call["bias"] is not None)
    return shaped_calls


def torch_rounds_otherwise(name: str, call: Call, exact: Tensor) -> Tensor:
    """Where torch.ao may be a step away: at ties, in what a line leaves over when cut into vector registers.

    There it adds the zero point before it rounds.
    """
    if name != "LayerNorm":
        return torch.zeros_like(exact, dtype=torch.bool)
    length = torch.Size(call["normalized_shape"]).numel()
    tie = (exact - exact.floor() - 0.5).abs() < 1e-4
    left_over = torch.arange(length) >= length // 64 * 64
    return tie & left_over.reshape(call["normalized_shape"])


def assert_twins(ao: Oracle, name: str, call: Call) -> None:
    x = QTensor(call["x"], call["x_scale"], call["x_zero_point"])
    mine = build(int8_class(name), name, call)
    mine.output = mine.output._replace(dtype=call["dtype"], low=call["low"], high=call["high"])
    theirs = build(int8_class(name, ao.quantized, ao.intrinsic_quantized), name, call)
    y = mine(x)
    # with two axes of space torch.ao may take the tensor for one with channels last, see below
    asked = x.flatten(2) if name in ("GroupNorm", "InstanceNorm2d") else x
    wanted = theirs(twin_tensor(asked))
    assert (y.q_scale(), y.q_zero_point(), y.shape) == (call["scale"], call["zero_point"], x.shape)
    assert wanted.q_zero_point() == call["zero_point"]
    same = y.int_repr() == wanted.int_repr().reshape(x.shape)
    if name in BATCH_NORMS:
        assert bool(same.all())
        return
    lost, exact = cancelled(call), in_float64(call)
    assert bool((same | lost | torch_rounds_otherwise(name, call, exact)).all())
    assert bool(((y.int_repr().double() - exact.clamp(call["low"], call["high"])).abs()[lost] <= 0.6).all())


@names
def test_integers_are_torchs(ao: Oracle, name: str) -> None:
    @settings(max_examples=30)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        integer_type = data.draw(st.sampled_from([torch.uint8, torch.int8]))
        assert_twins(ao, name, data.draw(calls_for(name, integer_type)))

    check()


# with these seeds, rounding a product before the sum, a square before the difference, or a root otherwise shows
@pytest.mark.parametrize("seed", [1, 4, 5, 6])
def test_last_bits(ao: Oracle, seed: int) -> None:
    """A million values each, some of which lie closer to a tie than a float32 rounding is wide."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (1000, 1000), dtype=torch.uint8, generator=generator)
    weight, bias, mean = (torch.randn(1000, generator=generator) for _ in range(3))
    var = torch.rand(1000, generator=generator) * 4 + 0.01
    call: Call = {"x": x, "x_scale": 0.03, "x_zero_point": 120, "weight": weight, "bias": bias, "eps": 1e-5}
    call |= {"scale": 0.015, "zero_point": 120}
    images = x.reshape(10, 1000, 10, 10)
    for name, more in (
        ("LayerNorm", {"normalized_shape": [1000]}),
        ("GroupNorm", {"num_groups": 100, "x": x.reshape(1, 1000, 1000)}),
        ("GroupNorm", {"num_groups": 2, "x": x.reshape(1, 1000, 1000)}),  # whose sums are not float32's
        ("InstanceNorm1d", {"x": x.reshape(1, 1000, 1000)}),
        ("BatchNorm2d", {"x": images, "mean": mean, "var": var}),
        ("BNReLU2d", {"x": images, "mean": mean, "var": var}),
    ):
        whole = {**call, **more}
        y = build(int8_class(name), name, whole)(QTensor(whole["x"], 0.03, 120))
        theirs = build(int8_class(name, ao.quantized, ao.intrinsic_quantized), name, whole)
        wanted = theirs(torch._make_per_tensor_quantized_tensor(whole["x"], 0.03, 120))
        assert torch.equal(y.int_repr(), wanted.int_repr()), name


def test_ties_of_layer_norm(ao: Oracle) -> None:
    """Lines of one value are their bias: half a step, next to an odd zero point. One rule for all elements."""
    bias = torch.full((70,), 0.5)
    x = QTensor(torch.full((1, 70), 7, dtype=torch.uint8), 0.001, 0)
    y = quantized.LayerNorm(70, None, bias, 1.0, 3)(x).int_repr()
    theirs = ao.quantized.LayerNorm(70, None, nn.Parameter(bias), 1.0, 3)(twin_tensor(x)).int_repr()
    assert torch.equal(y, torch.full_like(y, 3))
    assert torch.equal(y[:, :64], theirs[:, :64])
    assert int((y.int() - theirs.int()).abs().max()) <= 1


def assert_close(y: QTensor, real: Tensor) -> None:
    """The nearest integers to real numbers, but for ties."""
    low, high = ((end - y.q_zero_point()) * y.q_scale() for end in (0, 255))
    assert float((y.dequantize() - real.detach().clamp(low, high)).abs().max()) <= 0.51 * y.q_scale()


@pytest.mark.parametrize("name", ["GroupNorm", "InstanceNorm2d"])
def test_channels_last(ao: Oracle, name: str) -> None:
    """torch.ao then multiplies and adds in another order: ties may differ, and nothing else."""

    @settings(max_examples=60)
    @given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(2, 9), st.integers(0, 2**31))
    def check(batch: int, groups: int, each: int, side: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        channels = groups * each
        integers = torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8, generator=generator)
        call: Call = {"x": integers, "x_scale": 0.25, "x_zero_point": 100}
        call["num_groups"] = groups if name == "GroupNorm" else channels
        call["weight"], call["bias"] = (torch.randn(channels, generator=generator) for _ in range(2))
        call |= {"eps": 1e-5, "scale": 2.0**-5, "zero_point": 90}
        x = QTensor(integers.contiguous(memory_format=torch.channels_last), 0.25, 100)
        y = build(int8_class(name), name, call)(x)
        theirs = build(int8_class(name, ao.quantized), name, call)
        wanted = theirs(torch._make_per_tensor_quantized_tensor(x.integers, 0.25, 100))
        apart = y.int_repr().int() - wanted.int_repr().int()
        if bool(apart.any()):
            exact = in_float64(call)
            assert int(apart.abs().max()) == 1
            assert bool(((exact - exact.floor() - 0.5).abs()[apart != 0] < 1e-3).all())
        assert torch.equal(y.int_repr(), build(int8_class(name), name, call)(QTensor(integers, 0.25, 100)).int_repr())

    check()


@names
@pytest.mark.parametrize("affine", [True, False])
def test_within_a_step_of_the_float_layer(name: str, affine: bool) -> None:
    layer, x = float_layer(name, affine), some_input(name)
    int8 = eagerq.convert(prepared(layer, name))[0]
    y = int8(x)
    assert_close(y, layer(x.dequantize()))
    assert y.q_scale() < 0.1  # so that this says something


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "InstanceNorm1d"])
def test_functions(ao: Oracle, name: str) -> None:
    x, theirs = some_input(name), torch.ops.quantized
    weight, bias = torch.randn(6), torch.randn(6)
    last = (weight, bias, 1e-5, 0.02, 120)
    if name == "LayerNorm":
        last = (torch.randn(6, 5), None, 1e-5, 0.02, 120)
        y, wanted = layer_norm(x, [6, 5], *last), theirs.layer_norm(twin_tensor(x), [6, 5], *last)
    elif name == "GroupNorm":
        y, wanted = group_norm(x, 3, *last), theirs.group_norm(twin_tensor(x), 3, *last)
    else:
        y, wanted = instance_norm(x, *last), theirs.instance_norm(twin_tensor(x), *last)
    assert torch.equal(y.int_repr(), wanted.int_repr())
    assert (y.q_scale(), y.q_zero_point()) == (0.02, 120)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, *rest: layer_norm(x, [5], None, None, *rest),
        lambda x, *rest: group_norm(x, 3, None, None, *rest),
        lambda x, *rest: instance_norm(x, None, None, *rest),
    ],
)
def test_functions_refuse_real_numbers(call: Any) -> None:
    with pytest.raises(NotQuantizedError, match=r"norm' must be quantized.*QuantStub"):
        call(torch.randn(2, 6, 5), 1e-5, 1.0, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, *rest: layer_norm(x, [4], None, None, *rest),
        lambda x, *rest: layer_norm(x, [5], torch.ones(4), None, *rest),
        lambda x, *rest: group_norm(x, 4, None, None, *rest),
        lambda x, *rest: group_norm(x, 3, None, torch.ones(3), *rest),
        lambda x, *rest: instance_norm(x, torch.ones(3), None, *rest),
        lambda x, *rest: instance_norm(x[0, 0], None, None, *rest),
    ],
)
def test_functions_refuse_other_shapes(call: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"quantized\..*_norm.*got"):
        call(some_input("InstanceNorm1d"), 1e-5, 1.0, 0)


# --- what torch.ao gets wrong, or cannot do ----------------------------------------------------------


@pytest.mark.parametrize("name", INSTANCE_NORMS)
def test_running_statistics_of_instance_norm(name: str) -> None:
    """In eval mode the float layer normalises by them; torch.ao forgets them."""
    layer = float_layer(name)
    tracking = getattr(nn, name)(6, affine=True, track_running_stats=True).eval()
    tracking.running_mean, tracking.running_var = torch.arange(6.0) / 4, torch.arange(6.0) + 0.5
    tracking.weight, tracking.bias = layer.weight, layer.bias
    x = some_input(name)
    model = prepared(tracking, name)
    int8 = eagerq.convert(model)[0]
    assert_close(int8(x), tracking(x.dequantize()))
    assert set(int8.state_dict()) == {*tracking.state_dict(), "scale", "zero_point"}


@pytest.mark.parametrize("name", INSTANCE_NORMS)
def test_instance_norm_without_a_batch(name: str) -> None:
    int8, x = converted(name), some_input(name)
    for affine in (True, False):
        int8 = converted(name, affine=affine)
        assert torch.equal(int8(x[1]).int_repr(), int8(x).int_repr()[1])


def test_group_norm_of_vectors() -> None:
    layer, x = float_layer("GroupNorm"), some_input("GroupNorm")[:, :, 0, 0]
    int8 = quantized.GroupNorm(3, 6, layer.weight, layer.bias, 0.02, 100, layer.eps)
    assert_close(int8(x), layer(x.dequantize()))


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_empty_batch_has_the_results_parameters(name: str) -> None:
    y = converted(name)(some_input(name, 0))
    assert y.shape[0] == 0
    assert y.q_scale() == converted(name).scale != 0.05


@names
def test_empty_batches(name: str) -> None:
    y = converted(name)(some_input(name, 0))
    assert y.shape == some_input(name, 0).shape


# --- whole networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("qat", [False, True])
def test_whole_flow_is_torchs(ao: Oracle, qat: bool) -> None:
    """The same prepared state, and from it the same integers."""
    net = trained_network(qat=qat)
    tq = ao.quantization
    twin = Network(tq).train()
    twin = tq.fuse_modules_qat(twin, FUSED)
    twin.qconfig = (tq.get_default_qat_qconfig if qat else tq.get_default_qconfig)("onednn")
    twin = (tq.prepare_qat if qat else tq.prepare)(twin)
    wanted = twin.state_dict()
    assert [(key, value.dtype) for key, value in net.state_dict().items() if "eps" not in key] == [
        (key, value.dtype) for key, value in wanted.items() if "eps" not in key
    ]
    twin.load_state_dict(net.state_dict(), strict=True)
    int8, twin = eagerq.convert(net), tq.convert(twin.eval())
    pairs = [(one, other) for one, other in zip(int8.modules(), twin.modules(), strict=True)]
    assert [one._get_name() for one, _ in pairs] == [other._get_name() for _, other in pairs]
    y, theirs = int8(images()), twin(images())
    assert torch.equal(y, theirs)
    assert len(y.unique()) > 50


@torch.no_grad()
def test_as_trained_is_within_a_step_of_training() -> None:
    """Also with a reduced range, at whose end training clamps."""
    net = trained_network("x86", qat=True).apply(eagerq.disable_observer)
    int8 = eagerq.convert(net, as_trained=True)
    apart = int8(images()) - net(images())
    # every layer may move a value by a step, and the next ones stretch it
    assert float(apart.abs().mean()) < int8.layer.scale
    assert int8.layer.output.high == 127
    for path in ("bn", "bn_relu", "group", "instance", "lines", "bn3d", "bn_relu3d", "solid", "layer"):
        mine, theirs = int8.get_submodule(path), net.get_submodule(path)
        output = mine.output
        assert output.scale == float(theirs.activation_post_process.scale)
        x = QTensor(torch.randint(0, 128, (2, 6, 4, 2, 8), dtype=torch.uint8), 0.06, 60)
        x = x if "3d" in path or path in ("solid", "layer") else x.flatten(2) if path == "lines" else x.flatten(2, 3)
        assert float((mine(x).dequantize() - theirs(x.dequantize())).abs().max()) <= output.scale * 1.01, path


def test_compiles_and_exports() -> None:
    int8 = eagerq.convert(trained_network())
    wanted = int8(images())
    compiled = torch.compile(int8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images()), wanted)
    for strict in (False, True):
        exported = torch.export.export(int8, (images(),), strict=strict)
        assert torch.equal(exported.module()(images()), wanted)
