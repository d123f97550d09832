"""Sparse convolutions against dense ones, rule books against plain loops, and spconv's CPU wheel."""

import copy
import gc
import importlib
import itertools
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse
from sparse import RuleBook, SparseConv3d, SparseTensor, SubMConv3d, strided_rules, submanifold_rules
from voxelize import Grid, voxelize

SHAPE, BATCH = (5, 8, 11), 3  # D, H, W: odd and even, no two alike
STRIDED = [  # kernel, stride, padding
    (3, 2, 1),
    (3, 2, (0, 1, 1)),
    ((3, 1, 1), (2, 1, 1), 0),
    (2, 2, 0),
    (1, 1, 0),
    (1, 2, 0),
    (3, 1, 1),
    ((1, 2, 5), (1, 3, 2), (0, 2, 3)),  # padding beyond half a kernel: outputs that see only the border
]
LAYERS = [("submanifold", k) for k in (3, 1, (3, 1, 5), (1, 3, 3))] + [("strided", k) for k in STRIDED]


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: more only cost for arrays so small, and spconv's CPU wheel is correct on one only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_layer(layer, in_channels=3, out_channels=4, bias=True) -> SparseConv3d:
    kind, how = layer
    if kind == "submanifold":
        return SubMConv3d(in_channels, out_channels, how, bias=bias)
    return SparseConv3d(in_channels, out_channels, *how, bias=bias)


def make_sites(name: str) -> torch.Tensor:
    """(V, 4) sorted coords in SHAPE; scan 1 of 3 is always empty."""
    occupied = torch.zeros(BATCH, *SHAPE, dtype=torch.bool)
    depth, height, width = SHAPE
    if name == "random":
        occupied = torch.rand(occupied.shape, generator=torch.Generator().manual_seed(3)) < 0.25
    elif name == "full":
        occupied[:] = True
    elif name == "one":
        occupied[2, 1, 3, 4] = True
    elif name == "corners":
        occupied[:, :: depth - 1, :: height - 1, :: width - 1] = True
    elif name == "shell":  # every cell on a border: the end of a row is not beside the next row's start
        occupied[:] = True
        occupied[:, 1:-1, 1:-1, 1:-1] = False
    elif name == "isolated":  # no two sites touch
        occupied[:, ::2, ::2, ::2] = True
    else:
        assert name == "none"
    occupied[1] = False
    return occupied.nonzero()


def dense_twin(layer: SparseConv3d, features: torch.Tensor, coords: torch.Tensor):
    """The same convolution by conv3d on the dense grid: output sites and their features, in sorted order."""
    grid = features.new_zeros(BATCH, *SHAPE, features.shape[1]).index_put(tuple(coords.T), features)
    occupied = features.new_zeros(BATCH, 1, *SHAPE)
    occupied[coords[:, 0], 0, coords[:, 1], coords[:, 2], coords[:, 3]] = 1
    weight = layer.weight.permute(0, 4, 1, 2, 3)
    out = F.conv3d(grid.permute(0, 4, 1, 2, 3), weight, None, layer.stride, layer.padding)
    if not isinstance(layer, SubMConv3d):
        ones = occupied.new_ones(1, 1, *layer.kernel_size)
        occupied = (F.conv3d(occupied, ones, None, layer.stride, layer.padding) > 0.5).to(occupied)
    sites = occupied[:, 0].nonzero()
    out = out.permute(0, 2, 3, 4, 1)[tuple(sites.T)]
    return sites, out if layer.bias is None else out + layer.bias


@pytest.mark.parametrize("sites", ["random", "full", "one", "corners", "shell", "isolated", "none"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_equals_a_dense_convolution(layer, sites):
    """Sites, values, and the gradients of input, weight and bias, in float64."""
    torch.manual_seed(0)
    coords = make_sites(sites)
    conv = make_layer(layer).double()
    features = torch.randn(len(coords), 3, dtype=torch.float64, requires_grad=True)
    out = conv(SparseTensor(features, coords, SHAPE, BATCH))
    out_sites, expected = dense_twin(conv, features, coords)
    assert torch.equal(out.coords, out_sites)  # sorted, too
    torch.testing.assert_close(out.features, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(expected)
    inputs = [features, conv.weight, conv.bias]
    ours = torch.autograd.grad(out.features, inputs, grad)
    theirs = torch.autograd.grad(expected, inputs, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_out_shape_is_conv3ds():
    for kernel, stride, padding in STRIDED:
        conv = SparseConv3d(1, 1, kernel, stride, padding)
        out = conv(SparseTensor(torch.ones(1, 1), torch.tensor([[0, 1, 1, 1]]), SHAPE, 1))
        ones = torch.ones(1, 1, *conv.kernel_size)
        expected = F.conv3d(torch.ones(1, 1, *SHAPE), ones, None, conv.stride, conv.padding)
        assert out.shape == expected.shape[2:]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_gradcheck(layer):
    torch.manual_seed(0)
    coords = make_sites("random")[::4]
    conv = make_layer(layer, 2, 2).double()
    features = torch.randn(len(coords), 2, dtype=torch.float64, requires_grad=True)

    def function(features, weight, bias):
        x = SparseTensor(features, coords, SHAPE, BATCH)
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, x).features

    assert torch.autograd.gradcheck(function, (features, conv.weight, conv.bias), fast_mode=True)


def test_gradients_only_where_asked():
    """Inputs that need no gradient, or a frozen layer, leave the other gradients what they are."""
    torch.manual_seed(0)
    coords = make_sites("random")
    features = torch.randn(len(coords), 3, requires_grad=True)
    for layer in LAYERS:
        conv = make_layer(layer)
        x = SparseTensor(features, coords, SHAPE, BATCH)
        both = torch.autograd.grad(conv(x).features.sum(), [features, conv.weight])
        for_weight = torch.autograd.grad(conv(x.replace(features.detach())).features.sum(), conv.weight)
        assert torch.equal(for_weight[0], both[1])
        conv.requires_grad_(False)
        for_features = torch.autograd.grad(conv(x).features.sum(), features)
        assert torch.equal(for_features[0], both[0])


# ------------------------------------------------------------------------------------------ rule books


def loop_pairs(coords, shape, kernel, stride, padding, submanifold):
    """The triples (tap, input site, output site), by trying every tap of every site."""
    sites = {tuple(c) for c in coords.tolist()}
    out_shape = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, kernel, stride, padding, strict=True)]
    triples = set()
    for site in sites:
        for tap, k in enumerate(itertools.product(*map(range, kernel))):
            scaled = [z + p - t for z, p, t in zip(site[1:], padding, k, strict=True)]
            out = tuple(z // s for z, s in zip(scaled, stride, strict=True))
            if any(z % s for z, s in zip(scaled, stride, strict=True)):
                continue
            if all(0 <= o < n for o, n in zip(out, out_shape, strict=True)):
                if not submanifold or (site[0], *out) in sites:
                    triples.add((tap, site, (site[0], *out)))
    return triples


def book_pairs(book: RuleBook, coords) -> list:
    taps = np.repeat(book.taps, book.counts).astype(int).tolist()
    pairs = zip(taps, book.src.tolist(), book.dst.tolist(), strict=True)
    where, to = [tuple(c) for c in coords.tolist()], [tuple(c) for c in book.coords.tolist()]
    triples = [(tap, where[src], to[dst]) for tap, src, dst in pairs]
    return triples + ([] if book.centre is None else [(book.centre, site, site) for site in where])


def check_listing(listing, row, n_rows):
    """`order` lists all pairs, row after row, and `begin` says where each row's begin."""
    order, begin = listing
    assert sorted(order.tolist()) == list(range(len(row))) and len(begin) == n_rows
    assert begin.tolist() == [int((row < i).sum()) for i in range(n_rows)]
    assert (row[order].diff() >= 0).all()


sizes = st.integers(1, 5)


def sites_of(shape):
    site = st.tuples(st.integers(0, 1), *(st.integers(0, n - 1) for n in shape))
    return st.tuples(st.just(shape), st.sets(site, max_size=25))


sites_of_a_grid = st.tuples(sizes, sizes, sizes).flatmap(sites_of)


@settings(max_examples=150, deadline=None)
@given(sites_of_a_grid, st.tuples(*[st.sampled_from([1, 3, 5])] * 3))
def test_submanifold_rules_equal_a_loop(grid, kernel):
    shape, sites = grid
    coords = torch.tensor(sorted(sites), dtype=torch.int64).reshape(-1, 4)
    book = submanifold_rules(coords, shape, kernel)
    pairs = book_pairs(book, coords)
    assert len(pairs) == len(set(pairs))
    padding = [k // 2 for k in kernel]
    assert set(pairs) == loop_pairs(coords, shape, kernel, (1, 1, 1), padding, submanifold=True)
    assert 0 not in book.counts
    check_listing(book.into_src, book.src, len(coords))
    check_listing(book.into_dst, book.dst, len(coords))


@settings(max_examples=150, deadline=None)
@given(sites_of_a_grid, st.tuples(*[st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))] * 3))
def test_strided_rules_equal_a_loop(grid, how):
    shape, sites = grid
    kernel, stride, padding = zip(*how, strict=True)
    coords = torch.tensor(sorted(sites), dtype=torch.int64).reshape(-1, 4)
    if any(n + 2 * p < k for n, k, p in zip(shape, kernel, padding, strict=True)):
        with pytest.raises(ValueError, match="smaller than the kernel"):
            strided_rules(coords, shape, kernel, stride, padding)
        return
    book = strided_rules(coords, shape, kernel, stride, padding)
    pairs = book_pairs(book, coords)
    expected = loop_pairs(coords, shape, kernel, stride, padding, submanifold=False)
    assert len(pairs) == len(set(pairs)) and set(pairs) == expected
    assert [tuple(c) for c in book.coords.tolist()] == sorted({out for _, _, out in expected})
    assert 0 not in book.counts
    check_listing(book.into_src, book.src, len(coords))
    check_listing(book.into_dst, book.dst, len(book.coords))


def test_the_example_of_the_header():
    """The one-dimensional drawing in sparse.py, pair by pair."""
    coords = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 5]])
    a, b, c = [(0, 0, 0, x) for x in (1, 2, 5)]
    submanifold = submanifold_rules(coords, (1, 1, 7), (1, 1, 3))
    expected = [(0, a, b), (1, a, a), (1, b, b), (1, c, c), (2, b, a)]
    assert sorted(book_pairs(submanifold, coords)) == expected
    strided = strided_rules(coords, (1, 1, 7), (1, 1, 3), (1, 1, 2), (0, 0, 1))
    e, f, g, h = [(0, 0, 0, x) for x in range(4)]
    assert strided.shape == (1, 1, 4)
    assert sorted(book_pairs(strided, coords)) == [(0, a, f), (0, c, h), (1, b, f), (2, a, e), (2, c, g)]


def test_keys_beyond_32_bits():
    """A city-sized grid whose cell numbers pass 2^31: sites stay sorted, and neighbours are right."""
    shape = (40, 30_000, 30_000)
    coords = [[0, 1, 29_999, 29_999], [0, 2, 29_999, 29_998], [0, 3, 0, 0], [2, 39, 29_999, 29_999]]
    coords = torch.tensor(coords, dtype=torch.int32)
    pairs = book_pairs(submanifold_rules(coords, shape, (3, 3, 3)), coords)
    assert set(pairs) == loop_pairs(coords, shape, (3, 3, 3), (1, 1, 1), (1, 1, 1), submanifold=True)
    book = strided_rules(coords, shape, (2, 2, 2), (2, 2, 2), (0, 0, 0))
    expected = [[0, 0, 14_999, 14_999], [0, 1, 0, 0], [0, 1, 14_999, 14_999], [2, 19, 14_999, 14_999]]
    assert book.coords.tolist() == expected


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 1]], ids=["unsorted", "twice"])
def test_unsorted_sites_are_an_error(order):
    coords = torch.tensor([[0, 0, 0, 1], [0, 0, 2, 0], [1, 0, 0, 0]])[order]
    with pytest.raises(ValueError, match="sorted"):
        SubMConv3d(1, 1)(SparseTensor(torch.ones(3, 1), coords, SHAPE, 2))


def test_even_submanifold_kernel_is_an_error():
    with pytest.raises(ValueError, match="odd"):
        SubMConv3d(1, 1, (3, 2, 3))


# ------------------------------------------------------------------------------------------ sharing


class Net(torch.nn.Module):
    """Two resolutions and the height layer of a SECOND-like encoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            SubMConv3d(3, channels, bias=True),
            SubMConv3d(channels, channels),
            SparseConv3d(channels, channels, 3, 2, 1),
            SubMConv3d(channels, channels),
            SubMConv3d(channels, channels),
            SparseConv3d(channels, channels, (3, 1, 1), (2, 1, 1)),
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.layers(x)


@pytest.fixture
def count_rule_books(monkeypatch):
    calls = []
    for name in ("submanifold_rules", "strided_rules"):
        make = getattr(sparse, name)
        monkeypatch.setattr(sparse, name, lambda *how, make=make: calls.append(how) or make(*how))
    return calls


def random_tensor(sites="random", channels=3, rules=None) -> SparseTensor:
    coords = make_sites(sites)
    features = torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(5))
    return SparseTensor(features, coords, SHAPE, BATCH, {} if rules is None else rules)


def test_rule_books_are_made_once_for_teacher_and_student(count_rule_books):
    torch.manual_seed(0)
    teacher, student = Net(6), Net(4)
    alone = student(random_tensor()).features
    count_rule_books.clear()
    rules = {}
    with torch.no_grad():
        teacher(random_tensor(rules=rules))
    assert len(count_rule_books) == 4  # submanifold and strided, at two resolutions
    shared = student(random_tensor(rules=rules))
    assert len(count_rule_books) == 4
    assert torch.equal(shared.features, alone)
    shared.features.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())


def test_different_layers_do_not_share_rule_books(count_rule_books):
    x = random_tensor()
    layers = [make_layer(layer) for layer in LAYERS]
    outs = [layer(x) for layer in layers]
    assert len(count_rule_books) == len(LAYERS)
    for layer, out in zip(layers, outs, strict=True):
        sites, features = dense_twin(layer, x.features, x.coords)
        assert torch.equal(out.coords, sites)
        torch.testing.assert_close(out.features, features)


def test_rules_of_other_sites_are_an_error():
    rules = random_tensor().rules
    with pytest.raises(ValueError, match="other sites"):
        random_tensor("shell", rules=rules)
    x = random_tensor()
    with pytest.raises(ValueError, match="other sites"):
        SparseTensor(x.features, x.coords, (SHAPE[0] + 1, *SHAPE[1:]), BATCH, x.rules)


def test_rule_books_die_with_their_tensors():
    """No reference cycle: a batch's rule books are freed with it, not when the garbage collector runs."""
    gc.disable()
    try:
        x = random_tensor()
        y = Net(4)(x)
        books = [weakref.ref(x.rules[key]) for key in x.rules if key != "sites"]
        assert len(books) == 2
        del x, y
        assert all(book() is None for book in books)
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------ behaviour


@pytest.mark.parametrize("n_threads", [1, 2])
def test_same_bits_in_every_run(n_threads):
    torch.set_num_threads(n_threads)

    def run():
        torch.manual_seed(1)
        net = torch.nn.Sequential(SubMConv3d(3, 16), SparseConv3d(16, 16, 3, 2, 1))
        net(random_tensor("full")).features.square().sum().backward()
        return [p.grad for p in net.parameters()]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_the_order_of_the_points_does_not_matter():
    grid = Grid((0, 0, 0, 11, 8, 5), (1, 1, 1))
    rng = np.random.default_rng(0)
    points = np.hstack([rng.integers(0, 2, (300, 1)), rng.uniform(0, (11, 8, 5), (300, 3))])
    net, outs = Net(4), []
    for order in (np.arange(300), rng.permutation(300)):
        voxels = voxelize(torch.from_numpy(points[order]).float(), grid, 2)
        outs.append(net(SparseTensor(voxels.features, voxels.coords, grid.shape, 2)).dense())
    torch.testing.assert_close(outs[0], outs[1])


def test_a_batch_is_its_scans_side_by_side():
    torch.manual_seed(0)
    net, x = Net(4), random_tensor()
    whole = net(x).dense()
    for scan in range(BATCH):
        rows = x.coords[:, 0] == scan
        coords = x.coords[rows] * torch.tensor([0, 1, 1, 1])
        alone = net(SparseTensor(x.features[rows], coords, SHAPE, 1)).dense()
        torch.testing.assert_close(whole[scan], alone[0])


def test_dense():
    x = random_tensor()
    x = x.replace(x.features.requires_grad_())
    dense = x.dense()
    assert dense.shape == (BATCH, 3, *SHAPE)
    bev = dense.flatten(1, 2)
    assert bev.is_contiguous(memory_format=torch.channels_last) and bev.data_ptr() == dense.data_ptr()
    b, z, y, xx = x.coords.T
    assert torch.equal(dense[b, :, z, y, xx], x.features)
    assert dense.ne(0).sum() == x.features.ne(0).sum()
    grad = torch.randn_like(dense)
    assert torch.equal(torch.autograd.grad(dense, x.features, grad)[0], grad[b, :, z, y, xx])
    assert random_tensor("none").dense().abs().sum() == 0


def test_state_dict_is_spconvs():
    conv = SparseConv3d(3, 4, (3, 1, 2), bias=True)
    assert {name: tuple(p.shape) for name, p in conv.state_dict().items()} == {
        "weight": (4, 3, 1, 2, 3), "bias": (4,)
    }  # fmt: skip
    assert list(SubMConv3d(3, 4).state_dict()) == ["weight"]
    bound = (3 * 6) ** -0.5
    assert conv.weight.abs().max() <= bound and conv.weight.std() > bound / 3


def test_bfloat16_autocast():
    torch.manual_seed(0)
    net, x = Net(8), random_tensor()
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(random_tensor())
    assert out.features.dtype == torch.bfloat16
    torch.testing.assert_close(out.features.float(), exact.features, rtol=0.05, atol=0.02)
    out.features.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_training_after_inference_mode():
    """Evaluating in inference mode first must not leave buffers or rule books that training cannot use."""
    net, x = Net(4), random_tensor()
    sparse._kept.__dict__.clear()
    with torch.inference_mode():
        net(x)
    net(x).dense().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_results_do_not_alias_the_scratch_buffer():
    x, conv = random_tensor(), SubMConv3d(3, 4)
    first = conv(x).features
    kept = first.clone()
    conv(x.replace(x.features * 7))
    assert torch.equal(first, kept)


# ------------------------------------------------------------------------------------------ spconv


@pytest.fixture
def spconv_engine(monkeypatch):
    """spconv's CPU wheel, forced. Its backward asks for a CUDA stream, which it then does not use."""
    pytest.importorskip("spconv.pytorch", reason="spconv's CPU wheel is an optional oracle")
    if not importlib.import_module("spconv.cppconstants").CPU_ONLY_BUILD:  # the CUDA wheel takes no tensors of a CPU
        pytest.skip("needs spconv's CPU wheel; the CUDA one has its own tests")
    monkeypatch.setattr(sparse, "engine", "spconv")
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("sites", ["random", "corners", "one", "none"])
def test_spconv_engine_equals_ours(spconv_engine, monkeypatch, layer, sites):
    """Values and gradients, in eval mode too (where spconv by itself records none)."""
    torch.manual_seed(0)
    conv, x = make_layer(layer).eval(), random_tensor(sites)
    x.features.requires_grad_()
    outs, grads = [], []
    for engine in ("spconv", "torch"):
        monkeypatch.setattr(sparse, "engine", engine)
        outs.append(conv(x))
        loss = (outs[-1].features * torch.arange(4)).square().sum()
        grads.append(torch.autograd.grad(loss, [x.features, conv.weight, conv.bias]))
    assert ("_spconv" in conv.__dict__) == (sites != "none" and np.prod(conv.kernel_size) > 1)
    theirs, ours = outs
    assert torch.equal(theirs.coords, ours.coords) and theirs.shape == ours.shape
    torch.testing.assert_close(theirs.features, ours.features, rtol=1e-5, atol=1e-5)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_spconv_engine_keeps_kernels_apart(spconv_engine, monkeypatch):
    x, layers = random_tensor(), [make_layer(layer) for layer in LAYERS]
    with torch.no_grad():
        theirs = [layer(x).dense() for layer in layers]
        monkeypatch.setattr(sparse, "engine", "torch")
        for layer, dense in zip(layers, theirs, strict=True):
            torch.testing.assert_close(dense, layer(random_tensor()).dense(), rtol=1e-5, atol=1e-5)


def test_spconv_engine_through_a_network(spconv_engine, monkeypatch):
    """Weights changed or loaded after the first call are used; names, copies and sharing stay ours."""
    torch.manual_seed(0)
    teacher, student, rules = Net(6), Net(4), {}
    names = list(student.state_dict())
    with torch.no_grad():
        teacher(random_tensor(rules=rules))
        student(random_tensor(rules=rules))
        for parameter in student.parameters():
            parameter.mul_(1.5)
        changed = student(random_tensor(rules=rules)).dense()
        clone = copy.deepcopy(student)
        student.load_state_dict(Net(4).state_dict(), assign=True)
        loaded = student(random_tensor(rules=rules)).dense()
        cloned = clone(random_tensor(rules=rules)).dense()
        assert list(student.state_dict()) == list(clone.state_dict()) == names
        assert len(list(student.modules())) == len(list(Net(4).modules()))
        monkeypatch.setattr(sparse, "engine", "torch")
        torch.testing.assert_close(changed, clone(random_tensor()).dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cloned, changed)
        torch.testing.assert_close(loaded, student(random_tensor()).dense(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(loaded, changed)


def test_spconv_engine_builds_submanifold_rule_books_once(spconv_engine, monkeypatch):
    from spconv.pytorch import ops

    calls, make = [], ops.get_indice_pairs
    submanifold = 9  # its place among the arguments
    monkeypatch.setattr(ops, "get_indice_pairs", lambda *a: calls.append(a[submanifold]) or make(*a))
    rules = {}
    with torch.no_grad():
        Net(6)(random_tensor(rules=rules))
        assert calls.count(True) == 2 and calls.count(False) == 2
        Net(4)(random_tensor(rules=rules))
        assert calls.count(True) == 2  # strided ones are made again: spconv cannot share them


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_cuda_equals_cpu(monkeypatch, engine, layer):
    """Values and gradients, in training and in eval mode. "auto" is spconv where it is installed."""
    monkeypatch.setattr(sparse, "engine", engine)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)
    for train in (True, False):
        conv = make_layer(layer, 16, 32).train(train)
        x = random_tensor(channels=16)
        results = []
        for device in ("cpu", "cuda"):
            features = x.features.to(device).detach().requires_grad_()
            conv = conv.to(device)
            out = conv(SparseTensor(features, x.coords.to(device), SHAPE, BATCH))
            grads = torch.autograd.grad(out.features.square().sum(), [features, *conv.parameters()])
            results.append([out.coords, out.features, *grads])
        assert torch.equal(results[0][0], results[1][0].cpu())
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_autocast(monkeypatch, engine, dtype):
    monkeypatch.setattr(sparse, "engine", engine)
    torch.manual_seed(0)
    net = Net(16)
    exact = net(random_tensor()).dense()
    net.cuda()
    x = random_tensor()
    with torch.autocast("cuda", dtype):
        out = net(SparseTensor(x.features.cuda(), x.coords.cuda(), SHAPE, BATCH)).dense()
    torch.testing.assert_close(out.float().cpu(), exact, rtol=0.05, atol=0.02)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(("spconv", "constants", "why"), [
    (None, None, "spconv"), (SimpleNamespace(), SimpleNamespace(CPU_ONLY_BUILD=True), "this one is built for CPUs")])
def test_a_spconv_that_cannot_be_used_is_said_with_its_reason(monkeypatch, spconv, constants, why):
    for name, module in (("spconv", spconv), ("spconv.pytorch", spconv), ("spconv.cppconstants", constants)):
        monkeypatch.setitem(sys.modules, name, module)  # None: importing it is an ImportError
    if spconv:
        spconv.pytorch = spconv
    with pytest.warns(UserWarning, match=f"no spconv with CUDA kernels .*{why}.*: sparse layers run in PyTorch"):
        assert sparse.find_spconv.__wrapped__() is None
