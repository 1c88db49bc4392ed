"""Calls of every function of torch that the package has a rule for, with operands drawn at random.

`CALLS` has them by name: each takes a `Draw` and gives positional and keyword arguments. They serve
all spellings of a function, as `torch.add`, `Tensor.add`, `Tensor.add_`; what one does not take is
skipped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trak_dist.ops.example_axis import NO_EXAMPLE, ExampleAxis

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Draw:
    """Operands, and where examples lie in them.

    A `plain` one has examples 0, 1, 2, … along the first dimension of each tensor that `x` gives,
    and none in a weight `w`; others have them anywhere, also repeated, permuted, or nobody's.
    """

    seed: int
    plain: bool = False
    found: dict[int, ExampleAxis] = field(default_factory=dict)
    low: dict[int, float] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    made: list[Tensor] = field(default_factory=list)
    _first: tuple[int, Tensor] | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def x(self, *shape: int, kind: str = "any", fixed: bool = False) -> Tensor:
        """A tensor of examples; a `fixed` one says where others go, and is not varied."""
        tensor = self._values(shape, kind)
        self.made.append(tensor)
        if fixed:
            self.fixed.add(id(tensor))
        if self.plain:
            self.found[id(tensor)] = ExampleAxis(0, torch.arange(shape[0] if shape else 1))
        elif self.random.random() < 0.9:
            self.found[id(tensor)] = self._anywhere(shape)
        return tensor

    def w(self, *shape: int, kind: str = "any", fixed: bool = False) -> Tensor:
        """A tensor that has no examples as a rule."""
        tensor = self.x(*shape, kind=kind, fixed=fixed)
        if self.plain or self.random.random() < 0.7:
            self.found.pop(id(tensor), None)
        return tensor

    def z(self, *shape: int) -> Tensor:
        """A complex tensor of examples."""
        values = torch.view_as_complex(torch.stack([self.x(*shape)] * 2, -1))
        if found := self.found.pop(id(self.made[-1]), None):
            self.found[id(values)] = found
        return values

    def single(self, tensor: Tensor) -> Tensor:
        """The same in float32."""
        self.made[-1] = values = tensor.float()
        if found := self.found.pop(id(tensor), None):
            self.found[id(values)] = found
        return values

    def to(self, high: int, *shape: int, fixed: bool = False) -> Tensor:
        """Indices below `high`."""
        tensor = self.x(*shape, kind="any", fixed=fixed)
        values = torch.randint(high, shape, generator=self.generator)
        self.made[-1] = values
        for kept in (self.fixed,):
            if id(tensor) in kept:
                kept.add(id(values))
        if id(tensor) in self.found:
            self.found[id(values)] = self.found.pop(id(tensor))
        return values

    def chosen(self, high: int, *shape: int) -> Tensor:
        """Indices that say where examples go."""
        return self.to(high, *shape, fixed=True)

    def _values(self, shape: tuple[int, ...], kind: str) -> Tensor:
        if kind == "bool":
            return torch.rand(shape, generator=self.generator) < 0.5
        if kind == "int":
            return torch.randint(4, shape, generator=self.generator)
        if kind == "unit":
            return 0.1 + 0.8 * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _anywhere(self, shape: tuple[int, ...]) -> ExampleAxis:
        if self._first is not None and self.random.random() < 0.6:
            from_end, ids = self._first
            dim = len(shape) + from_end
            if 0 <= dim < len(shape) and shape[dim] in (1, len(ids)):
                if shape[dim] == len(ids):
                    return ExampleAxis(dim, ids)
                return ExampleAxis(dim, ids[:1])
        dim = self.random.randrange(len(shape)) if shape else 0
        size = shape[dim] if shape else 1
        ids = self.random.choice(
            (
                lambda: torch.arange(size),
                lambda: torch.randperm(size, generator=self.generator),
                lambda: torch.randint(3, (size,), generator=self.generator),
                lambda: torch.randint(NO_EXAMPLE, 3, (size,), generator=self.generator),
                lambda: torch.full((size,), 1),
            )
        )()
        self._first = self._first or (dim - len(shape), ids)
        return ExampleAxis(dim, ids)


def call(*args: Any, **kwargs: Any) -> Arguments:
    return args, kwargs


def varied(tensor: Tensor, draw: Draw, example: int, generator: torch.Generator) -> Tensor:
    """The same tensor, but with other values in what is of one example."""
    found = draw.found.get(id(tensor))
    if found is None or id(tensor) in draw.fixed:
        return tensor.clone()
    theirs = found.expand_to(tensor.shape) == example
    if tensor.is_complex():
        other = tensor * torch.rand(tensor.shape, generator=generator)
    elif tensor.dtype == torch.bool:
        other = torch.rand(tensor.shape, generator=generator) < 0.5
    elif not tensor.is_floating_point():
        high = int(tensor.max()) + 1 if tensor.numel() else 1
        other = torch.randint(high, tensor.shape, generator=generator)
    else:
        scale = 0.2 + 0.7 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        unit = tensor.numel() and bool(((tensor > 0) & (tensor < 1)).all())
        other = tensor * scale if unit else tensor + 3 * (scale - 0.55)
    return torch.where(theirs, other.to(tensor.dtype), tensor)


Call = Callable[[Draw], Arguments]
CALLS: dict[str, list[Call]] = {}


def add(names: str, *calls: Call) -> None:
    for name in names.split():
        CALLS.setdefault(name, []).extend(calls)


UNARY = (
    lambda d: call(d.x(4, 3, kind="unit")),
    lambda d: call(d.x(3, 2, 4)),
    lambda d: call(d.x(3, 4, kind="int")),
    lambda d: call(d.x()),
    lambda d: call(d.x(4, 1)),
)
add(
    "abs absolute acos acosh angle arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan "
    "atanh bernoulli bfloat16 bitwise_not bool byte ceil celu char clone conj contiguous cos cosh "
    "cpu deg2rad detach special_digamma digamma double elu erf erfc erfinv exp exp2 expm1 fix "
    "float floor frac gelu half hardshrink hardsigmoid hardswish hardtanh int isfinite isinf isnan "
    "isneginf isposinf isreal leaky_relu lgamma log log10 log1p log2 logical_not logit log_sigmoid "
    "long mish nan_to_num neg negative positive rad2deg reciprocal relu relu6 requires_grad_ rrelu "
    "round rsqrt selu sgn short sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt "
    "square tan tanh tanhshrink trunc special_erf special_erfc special_erfinv special_exp2 "
    "special_expm1 special_log1p special_logit special_round special_sinc special_expit i0 "
    "special_i0 special_ndtr special_log_ndtr __invert__ __abs__ __neg__ __pos__ data real "
    "dropout alpha_dropout feature_dropout feature_alpha_dropout zero_ ravel "
    "zeros_like ones_like empty_like rand_like randn_like",
    *UNARY,
)
add("imag real view_as_real", lambda d: call(d.z(4, 3)))
add("retain_grad", lambda d: call(d.x(4, 3).requires_grad_()))
add("tril triu", lambda d: call(d.x(4, 3)), lambda d: call(d.x(2, 3, 4), 1))
add("clamp clip", lambda d: call(d.x(4, 3), -1, 1), lambda d: call(d.x(4, 3), d.x(4, 3), d.w(3)))
add("clamp clip", lambda d: call(d.x(4, 3), min=d.x(4, 1)))
add("threshold _threshold", lambda d: call(d.x(4, 3), 0.1, 20.0))
add("dropout alpha_dropout", lambda d: call(d.x(4, 3), 0.5, True))
add("dropout1d", lambda d: call(d.x(4, 3, 2), 0.5, True), lambda d: call(d.x(3, 2), 0.5, True))
add("feature_dropout dropout2d feature_alpha_dropout", lambda d: call(d.x(4, 3, 2, 2), 0.5, True))
add("dropout3d", lambda d: call(d.x(4, 3, 2, 2, 1), 0.5, True))
add("requires_grad", lambda d: call(d.x(4, 3), False))

BINARY = (
    lambda d: call(d.x(4, 3), d.x(4, 3)),
    lambda d: call(d.x(4, 3), d.w(3)),
    lambda d: call(d.x(4, 1), d.w(1, 3)),
    lambda d: call(d.x(4, 3), d.x(4, 1)),
    lambda d: call(d.x(2, 4, 3), d.w(4, 3)),
    lambda d: call(d.w(3), d.x(4, 3)),
    lambda d: call(d.x(4, 3), d.w()),
    lambda d: call(d.x(3), d.x(3, 3)),
    lambda d: call(d.x(4, 3), 2.0),
    lambda d: call(d.x(4, 3), other=d.x(4, 3)),
    lambda d: call(d.x(4, 3, kind="int"), d.x(4, 3, kind="int")),
    lambda d: call(d.x(4, 3, kind="bool"), d.w(3, kind="bool")),
)
add(
    "add atan2 arctan2 bitwise_and bitwise_or bitwise_xor copysign div divide eq float_power "
    "floor_divide fmax fmin fmod ge greater greater_equal gt heaviside hypot ldexp le less "
    "less_equal logaddexp logaddexp2 logical_and logical_or logical_xor lt maximum minimum mul "
    "multiply ne nextafter not_equal pow remainder rsub sub subtract true_divide xlogy "
    "special_xlogy isclose clamp_min clamp_max copy_ max min __add__ __radd__ __iadd__ __sub__ "
    "__rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __rdiv__ "
    "__div__ __idiv__ __floordiv__ __rfloordiv__ __mod__ __rmod__ __imod__ __pow__ __rpow__ "
    "__ipow__ __and__ __rand__ __iand__ __or__ __ror__ __ior__ __xor__ __rxor__ __ixor__ __eq__ "
    "__ne__ __lt__ __le__ __gt__ __ge__",
    *BINARY,
)
add("add sub", lambda d: call(d.x(4, 3), d.x(4, 3), alpha=2))
add("fill", lambda d: call(d.x(4, 3), 2.0), lambda d: call(d.x(4, 3), d.x()))
add(
    "addcdiv addcmul lerp",
    lambda d: call(d.x(4, 3), d.x(4, 3), d.x(4, 3)),
    lambda d: call(d.x(4, 3), d.x(4, 1), d.w(3)),
    lambda d: call(d.x(4, 3), d.x(4, 3), 0.3),
)
add(
    "masked_fill",
    lambda d: call(d.x(4, 3), d.x(4, 3, kind="bool"), 1.0),
    lambda d: call(d.x(4, 3), d.x(4, 1, kind="bool"), d.x()),
    lambda d: call(d.x(4, 3), mask=d.w(3, kind="bool"), value=0.0),
)
add("prelu", lambda d: call(d.x(4, 3), d.w(1)), lambda d: call(d.x(4, 3, 2), d.w(3)))
add("prelu", lambda d: call(d.x(4, 2, 3), weight=d.w(2)))

add("to", lambda d: call(d.x(4, 3), torch.float32), lambda d: call(d.x(4, 3), d.x(2)))
add("type", lambda d: call(d.x(4, 3), torch.float32))
add("type_as", lambda d: call(d.x(4, 3), d.x(5)))
add("as_tensor asarray", lambda d: call(d.x(4, 3)))
add("as_tensor asarray", lambda d: call(d.x(4, 3), dtype=torch.float32))
add("as_tensor asarray", lambda d: call([d.x(), d.x()]))

add("full_like", lambda d: call(d.x(4, 3), 2.0), lambda d: call(d.x(4, 3), d.x()))
add("randint_like", lambda d: call(d.x(4, 3), 5))
add("new_zeros new_ones new_empty", lambda d: call(d.x(4, 3), (2, 3)), lambda d: call(d.x(4), 2))
add("new_full", lambda d: call(d.x(4, 3), (2, 3), 1.0), lambda d: call(d.x(4), (2,), d.x()))
add("new_empty_strided", lambda d: call(d.x(4, 3), (2, 3), (3, 1)))
add("arange", lambda d: call(d.x(kind="unit") * 0 + 5))
add("zeros ones empty", lambda d: call(2, 3, out=d.x(2, 3)))
add("full", lambda d: call((2, 3), d.x()), lambda d: call((2, 3), 1.0, out=d.x(2, 3)))
add("linspace", lambda d: call(d.x(), d.x(), 5))
add("eye", lambda d: call(3, out=d.x(3, 3)))


def ordered(draw: Draw, tensor: Tensor) -> Tensor:
    """One that is not varied where it is sorted: whose values go where is read of it."""
    draw.fixed.add(id(tensor))
    return tensor


REDUCED = (
    lambda d: call(d.x(4, 3), 1),
    lambda d: call(d.x(4, 3, 2), -1),
    lambda d: call(d.x(4, 3, 2), 1),
    lambda d: call(d.x(3, 4), 0),
    lambda d: call(d.x(4, 3), dim=1),
    lambda d: call(d.x(4, 3), dim=-2),
    lambda d: call(d.x(4, 3)),
    lambda d: call(ordered(d, d.x(4)), 0),
    lambda d: call(d.x(), 0),
    lambda d: call(d.x(3, 3), 1),
    lambda d: call(d.x(3, 3), 0),
    lambda d: call(d.x(4, 3), 1, keepdim=True),
    lambda d: call(d.x(4, 3, 2), (1, 2)),
    lambda d: call(d.x(2, 4, 3), (0, 2), keepdim=True),
    lambda d: call(d.x(4, 3), axis=1),
    lambda d: call(d.x(4, 3), ()),
    lambda d: call(d.x(4, 3), dim=None),
    lambda d: call(d.x(4, 3, kind="bool"), 1),
    lambda d: call(d.x(4, 3, kind="int"), 1),
)
add(
    "sum nansum mean nanmean prod amax amin max min argmax argmin any all logsumexp "
    "special_logsumexp softmax special_softmax log_softmax special_log_softmax softmin var std "
    "var_mean std_mean cumsum cumprod cummax cummin logcumsumexp count_nonzero median nanmedian "
    "mode aminmax glu sort argsort",
    *REDUCED,
)
add("var std var_mean std_mean", lambda d: call(d.x(4, 3), False))
add("var std", lambda d: call(d.x(4, 3), 1, False), lambda d: call(d.x(4, 3), 1, correction=0))
add(
    "glu",
    lambda d: call(d.x(4, 6)),
    lambda d: call(d.x(4, 6, 3), 1),
    lambda d: call(d.x(4, 6), dim=0),
)
add("sort", lambda d: call(d.x(4, 3), stable=True), lambda d: call(d.x(4, 3), dim=1, stable=True))
add("sort argsort", lambda d: call(d.x(4, 3), 1, True), lambda d: call(d.x(4, 3), descending=True))
add(
    "norm linalg_norm linalg_vector_norm",
    lambda d: call(d.x(4, 3), 2, 1),
    lambda d: call(d.x(4, 3)),
    lambda d: call(d.x(4, 3, 2), dim=-1, keepdim=True),
    lambda d: call(d.x(4, 3, 2), 2, (1, 2)),
    lambda d: call(d.x(4, 3), 1.0),
)
add(
    "quantile nanquantile",
    lambda d: call(d.x(4, 3), 0.3, 1),
    lambda d: call(d.x(4, 3), torch.tensor([0.2, 0.5]).double(), 1),
    lambda d: call(d.x(4, 3), d.x(2, kind="unit"), 1, keepdim=True),
    lambda d: call(d.x(4, 3), 0.3),
    lambda d: call(d.x(4, 3), torch.rand(4).double(), 1),
    lambda d: call(d.x(4, 3), 0.3, dim=0, keepdim=True),
)
add(
    "normalize",
    lambda d: call(d.x(4, 3)),
    lambda d: call(d.x(4, 3, 2), dim=-1),
    lambda d: call(d.x(4, 3), 2.0, 0),
    lambda d: call(d.x(4, 3, 2), dim=(1, 2)),
)
add(
    "topk kthvalue diff fft_fft fft_ifft fft_rfft fft_irfft fft_hfft",
    lambda d: call(d.x(4, 3), 2),
    lambda d: call(d.x(4, 3), 2, 0),
    lambda d: call(d.x(4, 3, 2), 2, dim=1),
    lambda d: call(d.x(4, 3), 1, -1),
)
add("diff", lambda d: call(d.x(4, 3)), lambda d: call(d.x(4, 3), 1, 1, d.x(4, 1)))
add("diff", lambda d: call(d.x(4, 3), append=d.x(4, 2)))
add(
    "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2",
    lambda d: call(d.x(4, 3, 2)),
    lambda d: call(d.x(4, 3, 2), None, (0, 1)),
    lambda d: call(d.x(4, 3, 4), (2, 2)),
    lambda d: call(d.x(2, 4, 3, 2), dim=(1, 2)),
)
add(
    "cosine_similarity",
    lambda d: call(d.x(4, 3), d.x(4, 3)),
    lambda d: call(d.x(4, 3), d.w(3), -1),
    lambda d: call(d.x(4, 1, 3), d.x(1, 4, 3), dim=-1),
    lambda d: call(d.x(4, 3), d.x(4, 3), dim=0),
)
add(
    "gumbel_softmax",
    lambda d: call(d.x(4, 3)),
    lambda d: call(d.x(4, 3), hard=True, dim=0),
    lambda d: call(d.x(4, 3, 2), dim=1),
)
add("bucketize", lambda d: call(d.x(4, 3), torch.arange(3.0).double()))
add("bucketize", lambda d: call(d.x(4, 3), d.w(3).sort().values))
add("cdist", lambda d: call(d.x(4, 2, 3), d.x(4, 3, 3)), lambda d: call(d.x(4, 3), d.w(2, 3)))
add("cdist", lambda d: call(d.x(4, 2, 3), d.w(5, 3)))
add("pixel_shuffle", lambda d: call(d.x(2, 4, 3, 2), 2), lambda d: call(d.x(4, 2, 3), 2))
add("pixel_unshuffle", lambda d: call(d.x(2, 3, 4, 2), 2))
add("channel_shuffle", lambda d: call(d.x(2, 4, 3, 2), 2))
add(
    "one_hot",
    lambda d: call(d.x(4, 3, kind="int"), 4),
    lambda d: call(d.x(4, kind="int"), num_classes=5),
)
add("view_as_complex", lambda d: call(d.x(4, 3, 2)), lambda d: call(d.x(2)))
add("diag_embed", lambda d: call(d.x(4, 3)), lambda d: call(d.x(4, 3), 1, 0, 2))
LOSSES = (
    lambda d: call(d.x(4, 3), d.x(4, 3), reduction="none"),
    lambda d: call(d.x(4, 3, kind="unit"), d.x(4, 3, kind="unit"), reduction="none"),
    lambda d: call(d.x(4, 3), d.w(4, 3), reduction="none"),
    lambda d: call(d.x(4, 3), d.x(4, 3)),
    lambda d: call(d.x(4, 3), d.x(4, 3), reduction="mean"),
    lambda d: call(d.x(4, 3), d.w(3), reduction="none"),
    lambda d: call(d.x(3), d.x(3, 3), reduction="none"),
)
add(
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits kl_div poisson_nll_loss",
    *LOSSES,
)
add(
    "gaussian_nll_loss",
    lambda d: call(d.x(4, 3), d.x(4, 3), d.x(4, 3, kind="unit"), reduction="none"),
)
add(
    "cross_entropy nll_loss",
    lambda d: call(d.x(4, 3), d.to(3, 4), reduction="none"),
    lambda d: call(d.x(4, 3), d.to(3, 4)),
    lambda d: call(d.x(4, 3, 2), d.to(3, 4, 2), reduction="none"),
    lambda d: call(d.x(3), d.to(3), reduction="none"),
    lambda d: call(d.x(4, 3), d.to(3, 4), d.w(3), reduction="none"),
)

# Other shapes ---------------------------------------------------------------------------------

add("permute", lambda d: call(d.x(4, 3, 2), (1, 2, 0)), lambda d: call(d.x(4, 3, 2), 2, 0, 1))
add("transpose swapaxes swapdims", lambda d: call(d.x(4, 3, 2), 0, 1))
add("transpose swapaxes swapdims", lambda d: call(d.x(4, 3, 2), -1, 1))
add(
    "movedim moveaxis",
    lambda d: call(d.x(4, 3, 2), 0, 1),
    lambda d: call(d.x(4, 3, 2), (0, 1), (1, 2)),
)
add("t", lambda d: call(d.x(4, 3)), lambda d: call(d.x(4)))
add("T mT H mH adjoint", lambda d: call(d.x(4, 3)))
add("mT mH adjoint", lambda d: call(d.x(2, 4, 3)))
add("squeeze", lambda d: call(d.x(4, 1, 3)), lambda d: call(d.x(1, 4), 0), lambda d: call(d.x(1)))
add("squeeze", lambda d: call(d.x(4, 1, 1), (1, 2)), lambda d: call(d.x(1, 1)))
add(
    "unsqueeze",
    lambda d: call(d.x(4, 3), 0),
    lambda d: call(d.x(4, 3), -1),
    lambda d: call(d.x(), 0),
)
add("expand", lambda d: call(d.x(4, 1), 4, 3), lambda d: call(d.x(1, 3), (4, 3)))
add("expand", lambda d: call(d.x(4, 1), 2, 4, 3), lambda d: call(d.x(), 3))
add("expand_as", lambda d: call(d.x(4, 1), d.x(4, 3)), lambda d: call(d.x(1, 3), d.x(4, 3)))
add("broadcast_to", lambda d: call(d.x(4, 1), (4, 3)))
add("select", lambda d: call(d.x(4, 3), 1, 0), lambda d: call(d.x(4, 3), 0, 1))
add("narrow", lambda d: call(d.x(4, 3), 1, 0, 2), lambda d: call(d.x(4, 3), 0, 1, 2))
add(
    "chunk unsafe_chunk tensor_split", lambda d: call(d.x(4, 3), 2), lambda d: call(d.x(4, 3), 2, 1)
)
add("split unsafe_split", lambda d: call(d.x(4, 3), 2), lambda d: call(d.x(4, 3), [1, 2], 1))
add("split", lambda d: call(d.x(4, 3), 2, dim=-1))
add("split_with_sizes", lambda d: call(d.x(4, 3), [1, 2], 1), lambda d: call(d.x(4, 3), [1, 3]))
add("hsplit", lambda d: call(d.x(4, 4), 2))
add("vsplit", lambda d: call(d.x(4, 3), 2))
add("dsplit", lambda d: call(d.x(4, 3, 2), 2))
add("unbind", lambda d: call(d.x(4, 3)), lambda d: call(d.x(4, 3), 1))
add("diagonal", lambda d: call(d.x(4, 3)), lambda d: call(d.x(4, 3, 3), 0, 1, 2))
add("linalg_diagonal", lambda d: call(d.x(4, 3, 3)))
add("unfold", lambda d: call(d.x(4, 6), 1, 2, 2), lambda d: call(d.x(4, 6), 0, 2, 1))
add("unfold", lambda d: call(d.x(2, 3, 4, 4), 2))
add("fold", lambda d: call(d.x(2, 12, 9), (4, 4), 2))
add(
    "flip",
    lambda d: call(d.x(4, 3), (0,)),
    lambda d: call(d.x(4, 3), [1]),
    lambda d: call(d.x(4, 3), 0, 1),
)
add("fliplr flipud", lambda d: call(d.x(4, 3)))
add("rot90", lambda d: call(d.x(4, 3)), lambda d: call(d.x(4, 3, 2), 1, (1, 2)))
add(
    "reshape view",
    lambda d: call(d.x(4, 6), -1),
    lambda d: call(d.x(4, 6), (4, 2, 3)),
    lambda d: call(d.x(4, 6), 2, 12),
    lambda d: call(d.x(4, 6), 8, 3),
    lambda d: call(d.x(4, 3, 2), 12, 2),
    lambda d: call(d.x(4, 3, 2), 4, 6),
    lambda d: call(d.x(6, 4), 3, 8),
    lambda d: call(d.x(1, 4), 4),
    lambda d: call(d.x(1), ()),
    lambda d: call(d.x(), 1, 1),
    lambda d: call(d.x(4, 0), 0, 4),
    lambda d: call(d.x(2, 2, 3), 4, 3, 1),
)
add("view", lambda d: call(d.x(4, 3), torch.int64), lambda d: call(d.x(4, 4), torch.float32))
add("view_as reshape_as", lambda d: call(d.x(4, 6), d.x(8, 3)))
add(
    "flatten",
    lambda d: call(d.x(4, 3, 2)),
    lambda d: call(d.x(4, 3, 2), 1),
    lambda d: call(d.x(2, 4, 3), 0, 1),
)
add("flatten", lambda d: call(d.x()), lambda d: call(d.x(4, 3, 2), start_dim=1))
add("unflatten", lambda d: call(d.x(4, 6), 1, (2, 3)), lambda d: call(d.x(4, 6), 0, (2, -1)))
JOINED = (
    lambda d: call([d.x(4, 3), d.x(4, 3)]),
    lambda d: call([d.x(4, 3), d.x(4, 2)], 1),
    lambda d: call([d.x(4, 3), d.w(4, 2)], dim=-1),
    lambda d: call((d.x(4, 3), d.w(2, 3)), 0),
    lambda d: call([d.x(4, 3), torch.zeros(0)], 1),
)
add("cat concat concatenate", *JOINED)
add("concatenate", lambda d: call([d.x(4, 3), d.x(4, 3)], axis=1))
add("stack", lambda d: call([d.x(4, 3), d.x(4, 3)]), lambda d: call([d.x(4, 3), d.w(4, 3)], 1))
add("stack", lambda d: call([d.x(4), d.x(4)], dim=-1), lambda d: call([d.x(), d.x(), d.w()]))
add("pad_sequence", lambda d: call([d.x(4, 3), d.x(2, 3)]), lambda d: call([d.x(1), d.x(1)], True))
add("pad_sequence", lambda d: call([d.x(1, 3), d.w(1, 3)], batch_first=True, padding_value=1.0))
add(
    "pad",
    lambda d: call(d.x(4, 3), (1, 2)),
    lambda d: call(d.x(4, 3), (0, 0, 1, 0), "constant", 1.0),
    lambda d: call(d.x(4, 3), (-1, 1)),
    lambda d: call(d.x(4, 3), (0, 0, 1, -1)),
    lambda d: call(d.x(4, 3, 5), (1, 1), mode="reflect"),
    lambda d: call(d.x(4, 3, 5), (1, 1), "circular"),
)
add(
    "repeat tile",
    lambda d: call(d.x(4, 3), 2, 1),
    lambda d: call(d.x(4, 3), (2, 1, 3)),
    lambda d: call(d.x(4), 2),
)
add("repeat tile", lambda d: call(d.x(), 2), lambda d: call(d.x(4, 3), 1, 2))
add(
    "repeat_interleave",
    lambda d: call(d.x(4, 3), 2, 0),
    lambda d: call(d.x(4, 3), 2, dim=1),
    lambda d: call(d.x(4), 2),
    lambda d: call(d.x(4, 3), 2),
    lambda d: call(d.x(4, 3), d.chosen(3, 4), 0),
    lambda d: call(d.x(4, 3), d.chosen(3, 3), dim=1),
    lambda d: call(d.chosen(3, 4)),
)
add(
    "roll",
    lambda d: call(d.x(4, 3), 1),
    lambda d: call(d.x(4, 3), 1, 0),
    lambda d: call(d.x(4, 3), (1, 2), (0, 1)),
)
add("roll", lambda d: call(d.x(4, 3), shifts=1, dims=1))

# Indices --------------------------------------------------------------------------------------


def by_index(draw: Draw, tensor: Tensor, *at: tuple[int, Tensor]) -> Any:
    """Indices that choose among examples say where these go: they are not varied."""
    found = draw.found.get(id(tensor))
    for dim, index in at:
        if found is not None and found.dim == dim % tensor.ndim:
            draw.fixed.add(id(index))
    return tensor


def looked_up(
    draw: Draw, *shape: int, at: dict[int, tuple[int, ...]], table: bool = False
) -> Arguments:
    x = draw.w(*shape) if table else draw.x(*shape)
    indices = {dim: draw.to(shape[dim], *of) for dim, of in at.items()}
    by_index(draw, x, *indices.items())
    place = [indices.get(dim, slice(None)) for dim in range(max(at) + 1)]
    return call(x, tuple(place) if len(place) > 1 else place[0])


add(
    "__getitem__",
    lambda d: call(d.x(4, 3), 1),
    lambda d: call(d.x(4, 3), (slice(None), 0)),
    lambda d: call(d.x(4, 3), (Ellipsis, slice(0, 2))),
    lambda d: call(d.x(4, 3), None),
    lambda d: call(d.x(4, 3), (slice(None), None)),
    lambda d: call(d.x(4, 3), slice(1, 3)),
    lambda d: call(d.x(4, 3), [0, 2]),
    lambda d: call(d.x(4, 3, 2), (0, Ellipsis, 1)),
    lambda d: call(d.x(4, 3), ()),
    lambda d: call(d.x(4, 3), True),
    lambda d: looked_up(d, 4, 3, at={0: (4,)}),
    lambda d: looked_up(d, 4, 3, at={0: (4, 2)}),
    lambda d: looked_up(d, 4, 3, at={1: (4,)}),
    lambda d: looked_up(d, 4, 3, at={0: (4,), 1: (4,)}),
    lambda d: looked_up(d, 4, 3, 2, at={0: (4, 1), 1: (1, 2)}),
    lambda d: looked_up(d, 4, 3, 2, at={0: (3,), 2: (3,)}),
    lambda d: looked_up(d, 3, 4, 2, at={1: (4,), 2: (4,)}),
    lambda d: looked_up(d, 4, 3, at={0: ()}),
    lambda d: looked_up(d, 5, 3, at={0: (4,)}, table=True),
    lambda d: looked_up(d, 5, 3, at={0: (4, 2)}, table=True),
    lambda d: looked_up(d, 5, 3, at={0: (4,), 1: (4,)}, table=True),
    lambda d: looked_up(d, 5, 3, at={1: (4,)}, table=True),
    lambda d: call(d.x(4, 3), d.x(4, 3, kind="bool", fixed=True)),
    lambda d: call(d.x(4, 3, 2), d.x(4, 3, kind="bool", fixed=True)),
    lambda d: call(d.x(4, 3), d.x(4, kind="bool", fixed=True)),
    lambda d: call(d.x(4, 3), (slice(None), d.w(3, kind="bool", fixed=True))),
    lambda d: call(d.x(4, 3, 2), (slice(None), d.chosen(3, 2), None, d.chosen(2, 2))),
)


def selected(draw: Draw, *shape: int, dim: int, size: int, table: bool = False) -> Arguments:
    x, index = draw.w(*shape) if table else draw.x(*shape), draw.to(shape[dim], size)
    return call(by_index(draw, x, (dim, index)), dim, index)


add(
    "index_select",
    lambda d: selected(d, 4, 3, dim=0, size=5),
    lambda d: selected(d, 4, 3, dim=1, size=2),
    lambda d: selected(d, 4, dim=0, size=4),
    lambda d: selected(d, 5, 3, dim=0, size=4, table=True),
    lambda d: selected(d, 5, dim=0, size=4, table=True),
)


def gathered(draw: Draw, shape: tuple[int, ...], of: tuple[int, ...], dim: int) -> Arguments:
    x, index = draw.x(*shape), draw.to(shape[dim], *of)
    return call(by_index(draw, x, (dim, index)), dim, index)


def taken(draw: Draw, shape: tuple[int, ...], of: tuple[int, ...], dim: int) -> Arguments:
    (x, dim, index), _ = gathered(draw, shape, of, dim)
    return call(x, index, dim)


add(
    "gather",
    lambda d: gathered(d, (4, 3), (4, 2), 1),
    lambda d: gathered(d, (4, 3), (2, 3), 0),
    lambda d: gathered(d, (4, 3), (2, 2), -1),
    lambda d: gathered(d, (4,), (3,), 0),
    lambda d: gathered(d, (4, 3, 2), (4, 1, 2), 1),
)
add(
    "take_along_dim",
    lambda d: taken(d, (4, 3), (4, 2), 1),
    lambda d: taken(d, (4, 3), (1, 2), 1),
    lambda d: taken(d, (1, 3), (4, 3), 1),
    lambda d: taken(d, (4, 3), (2, 3), 0),
    lambda d: call(d.x(4, 3), d.chosen(12, 5)),
)
add("masked_select", lambda d: call(d.x(4, 3), d.x(4, 3, kind="bool", fixed=True)))
add("masked_select", lambda d: call(d.x(4, 3), d.w(3, kind="bool", fixed=True)))
add("masked_select", lambda d: call(d.x(4, 1), mask=d.x(4, 3, kind="bool", fixed=True)))
add("nonzero argwhere where", lambda d: call(d.x(4, 3, kind="bool", fixed=True)))
add("nonzero", lambda d: call(d.x(4, 3, kind="bool", fixed=True), as_tuple=True))
add("where", lambda d: call(d.x(4, 3, kind="bool"), d.x(4, 3), d.x(4, 3)))
add("where", lambda d: call(d.x(4, 1, kind="bool"), d.x(4, 3), 0.0))
add("where", lambda d: call(d.x(3, kind="bool"), 1.0, d.x(4, 3)))
add("where", lambda d: call(d.x(4, 3), d.x(4, 3, kind="bool"), d.x(4, 3)))


add(
    "__setitem__",
    lambda d: call(d.x(4, 3), 1, 2.0),
    lambda d: call(d.x(4, 3), (slice(None), 0), d.x(4)),
    lambda d: call(d.x(4, 3), slice(0, 2), d.w(3)),
    lambda d: call(d.w(4, 3), slice(None), d.x(4, 3)),
    lambda d: call(d.w(4, 3), (slice(None), slice(0, 2)), d.x(4, 2)),
    lambda d: call(d.w(4, 3), Ellipsis, d.x(4, 3)),
    lambda d: call(d.w(4, 3), (Ellipsis, 0), d.x(4)),
    lambda d: call(d.w(4, 3), d.chosen(4, 4), d.x(4, 3)),
    lambda d: call(d.w(4, 3), d.chosen(4, 2), d.x(3)),
    lambda d: call(d.w(4, 3), (d.chosen(4, 4), d.chosen(3, 4)), d.x(4)),
    lambda d: call(d.x(4, 3), (slice(None), d.chosen(3, 2)), 0.0),
    lambda d: call(d.w(4, 3), d.x(4, 3, kind="bool", fixed=True), 1.0),
    lambda d: call(d.w(4, 3), d.x(4, kind="bool", fixed=True), d.w(3)),
    lambda d: call(d.x(4, 3), d.x(4, 3, kind="bool"), 1.0),
    lambda d: call(d.x(4, 3), d.x(4, kind="bool"), 1.0),
    lambda d: call(d.w(4, 3), (torch.arange(4), d.to(3, 4)), 1.0),
    lambda d: call(d.w(4, 3), d.to(4, 4), 1.0),
    lambda d: call(d.w(4, 3), (torch.arange(4), d.to(3, 4)), d.x(4)),
    lambda d: call(d.w(4, 3), None, d.x(4, 3)),
)
add(
    "index_put",
    lambda d: call(d.w(4, 3), (d.chosen(4, 4),), d.x(4, 3)),
    lambda d: call(d.w(4, 3), (d.chosen(4, 2), d.chosen(3, 2)), d.x(2)),
    lambda d: call(d.x(4, 3), (torch.arange(4), d.to(3, 4)), torch.ones(()).double()),
    lambda d: call(d.w(4, 3), [d.chosen(4, 4)], values=d.x(4, 3), accumulate=True),
    lambda d: call(d.w(4, 3), (d.chosen(4, 4),), d.x(4, 3), True),
    lambda d: call(d.w(4, 3), (d.x(4, kind="bool", fixed=True),), d.w(3)),
)
ADDED = (
    lambda d: call(d.w(4, 3), 0, d.chosen(4, 5), d.x(5, 3)),
    lambda d: call(d.w(4, 3), 1, d.chosen(3, 2), d.x(4, 2)),
    lambda d: call(d.x(4, 3), 0, torch.arange(4), d.x(4, 3)),
    lambda d: call(d.w(4), 0, d.chosen(4, 3), d.x(3)),
    lambda d: call(d.w(4, 3), -2, d.chosen(4, 5), source=d.x(5, 3)),
)
add("index_add index_copy", *ADDED)
add("index_add", lambda d: call(d.x(4, 3), 0, torch.tensor([1, 1]), d.x(2, 3), alpha=2))
add(
    "index_fill",
    lambda d: call(d.x(4, 3), 1, d.to(3, 2), 2.0),
    lambda d: call(d.x(4, 3), 0, d.to(4, 2), 0.0),
)
add("index_fill", lambda d: call(d.x(4, 3), 1, torch.tensor([0]), d.x()))
for reduce in ("prod", "mean", "amax"):
    add("index_reduce", lambda d, r=reduce: call(d.w(4, 3), 0, d.chosen(4, 5), d.x(5, 3), r))
    add("index_reduce", lambda d, r=reduce: call(d.x(4, 3), 1, torch.tensor([0, 0]), d.x(4, 2), r))
    add("scatter_reduce", lambda d, r=reduce: call(d.w(4, 3), 1, d.to(3, 4, 2), d.x(4, 3), r))
    add("scatter_reduce", lambda d, r=reduce: call(d.w(4, 3), 0, d.chosen(4, 5, 3), d.x(5, 3), r))
    add(
        "scatter_reduce",
        lambda d, r=reduce: call(d.x(4, 3), 1, d.to(3, 4, 2), d.x(4, 3), r, include_self=False),
    )
add(
    "scatter scatter_add",
    lambda d: call(d.w(4, 3), 1, d.to(3, 4, 2), d.x(4, 3)),
    lambda d: call(d.w(4, 3), 0, d.chosen(4, 5, 3), d.x(5, 3)),
    lambda d: call(d.x(4, 3), 1, d.to(3, 2, 2), d.x(4, 3)),
    lambda d: call(d.w(4, 3), 1, d.to(3, 4, 1), src=d.w(4, 1)),
    lambda d: call(d.w(4), 0, d.chosen(4, 3), d.x(3)),
)
add(
    "scatter",
    lambda d: call(d.w(4, 3), 1, d.to(3, 4, 1), 1.0),
    lambda d: call(d.w(4, 3), 1, d.to(3, 4, 1), value=2.0),
)
add("scatter", lambda d: call(d.w(4, 3), 0, d.to(4, 2, 3), 1.0))
add("scatter", lambda d: call(d.w(4, 3), 1, d.to(3, 4, 2), d.x(4, 3), reduce="add"))

# Products and layers --------------------------------------------------------------------------

PRODUCTS = (
    lambda d: call(d.x(4, 3), d.w(3, 2)),
    lambda d: call(d.w(2, 4), d.x(4, 3)),
    lambda d: call(d.x(4, 2, 3), d.w(3, 2)),
    lambda d: call(d.x(4, 2, 3), d.x(4, 3, 2)),
    lambda d: call(d.x(1, 2, 3), d.x(4, 3, 2)),
    lambda d: call(d.x(2, 4, 2, 3), d.x(2, 4, 3, 2)),
    lambda d: call(d.x(2, 4, 2, 3), d.x(4, 3, 2)),
    lambda d: call(d.x(4, 3), d.w(3)),
    lambda d: call(d.w(4), d.x(4, 3)),
    lambda d: call(d.w(3), d.x(4, 3, 2)),
    lambda d: call(d.x(3), d.w(3)),
    lambda d: call(d.x(4, 2, 3), d.w(3)),
    lambda d: call(d.x(3, 3), d.x(3, 3)),
    lambda d: call(d.x(2, 3, 3), d.x(3, 3)),
)
add("matmul linalg_matmul mm bmm mv __matmul__ __imatmul__ __rmatmul__", *PRODUCTS)
add(
    "addmm",
    lambda d: call(d.w(2), d.x(4, 3), d.w(3, 2)),
    lambda d: call(d.x(4, 2), d.x(4, 3), d.w(3, 2)),
)
add(
    "addmm",
    lambda d: call(d.x(4, 2), d.w(4, 3), d.w(3, 2), beta=2),
    lambda d: call(d.w(4, 2), d.w(4, 3), d.x(3, 2)),
)
add(
    "baddbmm",
    lambda d: call(d.x(4, 2, 2), d.x(4, 2, 3), d.x(4, 3, 2)),
    lambda d: call(d.w(2), d.x(4, 2, 3), d.w(4, 3, 2)),
)
add("addmv", lambda d: call(d.x(4), d.x(4, 3), d.w(3)), lambda d: call(d.w(4), d.w(4, 3), d.x(3)))
add(
    "linear",
    lambda d: call(d.x(4, 3), d.w(2, 3), d.w(2)),
    lambda d: call(d.x(4, 2, 3), d.w(2, 3)),
    lambda d: call(d.x(3), d.w(2, 3)),
    lambda d: call(d.w(4, 3), d.x(2, 3)),
    lambda d: call(d.w(4, 3), d.w(2, 3), bias=d.x(2)),
)
OFFS = torch.tensor([1, 3, 4], dtype=torch.int32)
add(
    "_grouped_mm",
    lambda d: call(d.single(d.x(4, 4)), d.single(d.w(3, 4, 4)), offs=OFFS),
    lambda d: call(d.single(d.w(4, 4)), d.single(d.x(3, 4, 4)), offs=OFFS),
)
for equation in (
    "bi,ij->bj",
    "bi,bi->b",
    "bij,bjk->bik",
    "bi,bj->bij",
    "bi,bj->ij",
    "bii,bj->bj",
    "ib,bj->ij",
):
    shapes = [[3] * len(term) for term in equation.partition("->")[0].split(",")]
    add("einsum", lambda d, e=equation, s=shapes: call(e, d.x(*s[0]), d.x(*s[1])))
    add("einsum", lambda d, e=equation, s=shapes: call(e, d.x(*s[0]), d.w(*s[1])))
    add("einsum", lambda d, e=equation, s=shapes: call(e, [d.w(*s[0]), d.x(*s[1])]))
add(
    "einsum",
    lambda d: call("...i,ij->...j", d.x(4, 3), d.w(3, 2)),
    lambda d: call("bi->b", d.x(4, 3)),
)
add(
    "einsum",
    lambda d: call("bi,ij", d.x(4, 3), d.w(3, 2)),
    lambda d: call("bi, ij -> bj", d.x(4, 3), d.w(3, 2)),
)
add(
    "scaled_dot_product_attention",
    lambda d: call(d.x(4, 2, 3, 2), d.x(4, 2, 3, 2), d.x(4, 2, 3, 2)),
    lambda d: call(d.x(4, 3, 2), d.x(4, 3, 2), d.x(4, 3, 2), d.x(4, 3, 3)),
    lambda d: call(d.x(4, 3, 2), d.w(4, 3, 2), d.w(4, 3, 2), attn_mask=d.w(3, 3)),
    lambda d: call(d.x(3, 3, 2), d.x(3, 3, 2), d.x(3, 3, 2), attn_mask=d.x(3, 3)),
    lambda d: call(d.x(4, 2, 3, 2), d.x(4, 2, 3, 2), d.x(4, 2, 3, 2), is_causal=True),
)
add(
    "layer_norm rms_norm",
    lambda d: call(d.x(4, 3), (3,)),
    lambda d: call(d.x(4, 2, 3), (2, 3), d.w(2, 3)),
)
add("layer_norm", lambda d: call(d.x(4, 3), normalized_shape=(3,), weight=d.w(3), bias=d.w(3)))
add("group_norm", lambda d: call(d.x(4, 4, 3), 2), lambda d: call(d.x(4, 4, 3), 2, d.w(4), d.w(4)))
add(
    "instance_norm",
    lambda d: call(d.x(3, 2, 4)),
    lambda d: call(d.x(3, 2, 4), weight=d.w(2), bias=d.w(2)),
)
add(
    "instance_norm",
    lambda d: call(d.x(3, 2, 4), d.w(2), d.w(2, kind="unit"), use_input_stats=False),
)
add("instance_norm", lambda d: call(d.x(3, 2, 4), torch.zeros(2).double(), torch.ones(2).double()))
add("local_response_norm", lambda d: call(d.x(3, 4, 2), 2), lambda d: call(d.x(3, 4), 2))
add(
    "batch_norm",
    lambda d: call(d.x(4, 3), d.w(3), d.w(3, kind="unit")),
    lambda d: call(d.x(4, 3, 2), d.w(3), d.w(3, kind="unit"), d.w(3), d.w(3), False),
    lambda d: call(d.x(4, 3), None, None, training=True),
    lambda d: call(d.x(4, 3), torch.zeros(3).double(), torch.ones(3).double(), None, None, True),
)
add(
    "embedding",
    lambda d: call(d.to(5, 4, 2), d.w(5, 3)),
    lambda d: call(d.to(5, 4), weight=d.w(5, 3), padding_idx=0),
)
add(
    "embedding_bag",
    lambda d: call(d.to(5, 4, 2), d.w(5, 3)),
    lambda d: call(d.to(5, 6), d.w(5, 3), torch.tensor([0, 2])),
)
add(
    "embedding_bag",
    lambda d: call(d.to(5, 4, 2), d.w(5, 3), mode="sum", per_sample_weights=d.x(4, 2)),
)


def images(dims: int, channels: int, draw: Draw, *, batch: bool = True) -> Tensor:
    return draw.x(*[3] * batch, channels, *[4] * dims)


for dims in (1, 2, 3):
    names = f"conv{dims}d conv_transpose{dims}d"
    add(names, lambda d, n=dims: call(images(n, 2, d), d.w(2, 2, *[2] * n), d.w(2)))
    add(names, lambda d, n=dims: call(images(n, 2, d), d.w(2, 2, *[2] * n), stride=2, padding=1))
    add(names, lambda d, n=dims: call(images(n, 2, d, batch=False), d.w(2, 2, *[2] * n)))
    pools = f"avg_pool{dims}d max_pool{dims}d max_pool{dims}d_with_indices"
    adaptive = (
        f"adaptive_avg_pool{dims}d adaptive_max_pool{dims}d adaptive_max_pool{dims}d_with_indices"
    )
    for batch in (True, False):
        add(f"{pools} {adaptive}", lambda d, n=dims, b=batch: call(images(n, 2, d, batch=b), 2))
        add(f"lp_pool{dims}d", lambda d, n=dims, b=batch: call(images(n, 2, d, batch=b), 2, 2))
    add(f"max_pool{dims}d", lambda d, n=dims: call(images(n, 2, d), 2, return_indices=True))
add(
    "interpolate upsample",
    lambda d: call(d.x(3, 2, 4), 8),
    lambda d: call(d.x(3, 2, 4, 4), scale_factor=2, mode="bilinear"),
)
add("grid_sample", lambda d: call(d.x(2, 1, 3, 3), d.x(2, 3, 3, 2), align_corners=False))
add("grid_sample", lambda d: call(d.x(2, 1, 3, 3), d.w(2, 3, 3, 2), align_corners=False))
add("affine_grid", lambda d: call(d.x(2, 2, 3), (2, 1, 3, 3), align_corners=False))


def recurrent(draw: Draw, gates: int, states: int, *, first: bool, layers: int = 1) -> Arguments:
    x = draw.x(4, 3, 2) if first or not draw.plain else draw.w(4, 3, 2)
    size = 4 if first else 3
    held = [draw.w(layers, size, 3) for _ in range(states)]
    weights = []
    for n in range(layers):
        for shape in ((gates * 3, 3 if n else 2), (gates * 3, 3), (gates * 3,), (gates * 3,)):
            weights.append(draw.w(*shape))  # noqa: PERF401
    hidden: Any = held if states > 1 else held[0]
    return call(x, hidden, weights, True, layers, 0.0, False, False, first)


for first in (True, False):
    for layers in (1, 2):
        more = {"first": first, "layers": layers}
        add("lstm", lambda d, m=more: recurrent(d, 4, 2, **m))
        add("gru", lambda d, m=more: recurrent(d, 3, 1, **m))
        add("rnn_tanh rnn_relu", lambda d, m=more: recurrent(d, 1, 1, **m))


def cell(draw: Draw, gates: int, states: int) -> Arguments:
    held = [draw.x(4, 3) for _ in range(states)]
    weights = [draw.w(*s) for s in ((gates * 3, 2), (gates * 3, 3), (gates * 3,), (gates * 3,))]
    return call(draw.x(4, 2), held if states > 1 else held[0], *weights)


add("lstm_cell", lambda d: cell(d, 4, 2))
add("gru_cell", lambda d: cell(d, 3, 1))
add("rnn_tanh_cell rnn_relu_cell", lambda d: cell(d, 1, 1))
