"""What the low-latency calls remember about arguments that they have checked, on tensors without memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from deepep_moe import DispatcherConfig, extension, low_latency, low_latency_cuda, low_latency_reference
from deepep_moe import domain as domain_module
from deepep_moe.domain import Domain
from deepep_moe.errors import CapacityError, HandleError, InputError, PeerError, UnsupportedError
from deepep_moe.events import StreamRunner
from deepep_moe.extension import _C
from deepep_moe.low_latency import LowLatency
from deepep_moe.low_latency_cuda import CudaEngine
from deepep_moe.low_latency_engine import CombineCall, DispatchCall, Half
from tests.low_latency_util import differs

META = torch.device("meta")


class Recorder:
    """An engine that only notes what it is asked for."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Half]] = []
        self.refused: list[str] = []
        self.launches = True

    def state_words(self, max_tokens: int, topk: int) -> int:
        return 10

    def signature(self, *tensors: Any) -> object:
        """As that of the CUDA engine, which takes no tensors without memory."""
        if any(t is not None and not (t.device == META and t.is_contiguous()) for t in tensors):
            return None
        return tuple(t if t is None else (t.shape, t.dtype) for t in tensors)

    def dispatch(self, call: DispatchCall | CombineCall, half: Half) -> None:
        self.calls.append((call, half))
        call.sent = half is not Half.RECEIVE and self.launches

    combine = dispatch

    def refuse_dispatch(self, max_tokens: object, hidden: int, problem: Exception) -> bool:
        self.refused.append(str(problem))
        return True

    def refuse_combine(self, call: DispatchCall | None, problem: Exception) -> bool:
        return self.refuse_dispatch(0, 0, problem)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(low_latency, "make_engine", lambda *_: recorder)
    return recorder


@pytest.fixture
def calls(engine: Recorder) -> LowLatency:
    backend: Any = SimpleNamespace(device=META, rank=0, world_size=2)
    return LowLatency(backend, 0, False, StreamRunner(META))


def tokens(count: int = 4, hidden: int = 256, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(count, hidden, dtype=dtype, device=META)


def indices(count: int = 4, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(count, 2, dtype=dtype, device=META)


def dispatch(calls: LowLatency, **changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "x": tokens(),
        "topk_idx": indices(),
        "max_tokens": 8,
        "num_experts": 6,
        "stats": None,
        "wait_stats": None,
        "switches": (True, False, False),
        "async_finish": False,
        "return_recv_hook": False,
    }
    return calls.dispatch(**{**arguments, **changed})


def combine(calls: LowLatency, handle: Any, **changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "x": torch.empty(3, 16, 256, dtype=torch.bfloat16, device=META),
        "topk_idx": indices(),
        "topk_weights": torch.empty(4, 2, dtype=torch.float32, device=META),
        "handle": handle,
        "zero_copy": False,
        "async_finish": False,
        "return_recv_hook": False,
        "out": None,
        "wait_stats": None,
    }
    return calls.combine(**{**arguments, **changed})


def test_equal_arguments_are_checked_once(calls: LowLatency, engine: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    _, handle, *_ = dispatch(calls)
    combine(calls, handle)
    monkeypatch.setattr(low_latency, "check_dispatch", pytest.fail)
    monkeypatch.setattr(low_latency, "check_combine", pytest.fail)
    call, handle, *_ = dispatch(calls)
    combine(calls, handle)
    assert call.shape is engine.calls[0][0].shape
    assert (call.shape.tokens, call.shape.topk, call.shape.hidden) == (4, 2, 256)
    assert [half for _, half in engine.calls] == [Half.BOTH] * 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": tokens(dtype=torch.float16)}, "x = torch.float16"),
        ({"x": tokens(hidden=192)}, "x = hidden size 192"),
        ({"x": tokens(8).as_strided((4, 256), (512, 1))}, "x = strides"),
        ({"x": torch.empty(4, 256, dtype=torch.bfloat16, device="cpu")}, "x = cpu"),
        ({"x": None}, "x = None"),
        ({"topk_idx": indices(dtype=torch.int16)}, "topk_idx = torch.int16"),
        ({"topk_idx": torch.empty(4, 2, dtype=torch.int64, device="cpu")}, "topk_idx = cpu"),
        ({"topk_idx": indices(3)}, r"x = shape \(4, 256\)"),
        ({"max_tokens": 8.0}, "num_max_dispatch_tokens_per_rank = 8.0"),
        ({"max_tokens": True, "x": tokens(1), "topk_idx": indices(1)}, "num_max_dispatch_tokens_per_rank = True"),
        ({"max_tokens": 3}, "x = 4 tokens"),
        ({"num_experts": 7}, "num_experts = 7"),
        ({"stats": torch.empty(3, dtype=torch.int64, device=META)}, "cumulative_local_expert_recv_stats"),
        ({"wait_stats": torch.empty(3, dtype=torch.int64, device=META)}, "dispatch_wait_recv_cost_stats"),
        ({"switches": (True, False, True)}, "use_ue8m0"),
        ({"switches": ("no", False, False)}, "use_fp8 = 'no': must be True or False"),
        ({"switches": (True, [], False)}, r"round_scale = \[\]: must be True or False"),
        ({"async_finish": True, "return_recv_hook": True}, "async_finish"),
    ],
)
def test_a_changed_argument_is_checked_again(
    calls: LowLatency, engine: Recorder, changed: dict[str, Any], message: str
) -> None:
    dispatch(calls)
    dispatch(calls, x=tokens(1), topk_idx=indices(1), max_tokens=1)
    with pytest.raises(InputError, match=message):
        dispatch(calls, **changed)
    assert len(engine.calls) == 2 and len(engine.refused) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.empty(3, 16, 256, dtype=torch.float32, device=META)}, "x = torch.float32"),
        ({"x": torch.empty(3, 8, 256, dtype=torch.bfloat16, device=META)}, "x = shape"),
        ({"topk_idx": indices(3)}, "topk_idx = shape"),
        ({"topk_weights": torch.empty(4, 2, dtype=torch.float64, device=META)}, "topk_weights = torch.float64"),
        ({"topk_weights": None}, "topk_weights = None"),
        ({"out": tokens(3)}, "out = shape"),
        ({"wait_stats": torch.empty(2, dtype=torch.int32, device=META)}, "combine_wait_recv_cost_stats"),
        ({"zero_copy": True}, "zero_copy"),
    ],
)
def test_a_changed_argument_of_combine_is_checked_again(
    calls: LowLatency, engine: Recorder, changed: dict[str, Any], message: str
) -> None:
    _, handle, *_ = dispatch(calls)
    combine(calls, handle)
    with pytest.raises(InputError, match=message):
        combine(calls, handle, **changed)
    assert len(engine.calls) == 2 and len(engine.refused) == 1


def test_calls_use_memory_in_turn_refused_or_not(calls: LowLatency, engine: Recorder) -> None:
    """A call uses the memory of the call two before it: a refused call as well, one that was not launched does not."""
    hook = dispatch(calls, return_recv_hook=True)[3]  # 1
    with pytest.raises(InputError, match=r"x = torch\.float16"):
        dispatch(calls, x=tokens(dtype=torch.float16))  # 2
    with pytest.raises(HandleError, match="hook of dispatch 1 was not called, and this is dispatch 3: at most 2"):
        dispatch(calls)
    assert [half for _, half in engine.calls] == [Half.SEND, Half.RECEIVE] and len(engine.refused) == 2
    hook()  # nothing is left for it to do
    with pytest.raises(HandleError, match="hook of dispatch 1 was called twice"):
        hook()
    assert len(engine.calls) == 2
    hook = dispatch(calls, return_recv_hook=True)[3]  # 4
    engine.launches = False  # as after a failure that lasts
    for _ in range(3):
        dispatch(calls)
    engine.launches = True
    dispatch(calls)  # 5
    hook()
    dispatch(calls)
    assert len(engine.refused) == 2


def test_a_hook_that_raises_has_received(calls: LowLatency, engine: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiving half raises what kernels reported about some call; the rows of its own call are there."""
    *_, handle, _, hook = dispatch(calls, return_recv_hook=True)
    with pytest.raises(HandleError, match="call the hook"):
        combine(calls, handle)
    assert hook is not None

    def reports(call: DispatchCall, half: Half) -> None:
        raise PeerError("rank 1 refused its input")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "dispatch", reports)
        with pytest.raises(PeerError):
            hook()
    combine(calls, handle)
    assert [half for _, half in engine.calls] == [Half.SEND, Half.BOTH] and len(engine.refused) == 1


def test_arguments_that_are_counted_into_are_checked_once(
    calls: LowLatency, engine: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {
        "stats": torch.empty(3, dtype=torch.int32, device=META),
        "wait_stats": torch.empty(2, dtype=torch.int64, device=META),
    }
    _, handle, *_ = dispatch(calls, **counted)
    combine(calls, handle, wait_stats=counted["wait_stats"])
    with monkeypatch.context() as patch:
        patch.setattr(low_latency, "check_dispatch", pytest.fail)
        patch.setattr(low_latency, "check_combine", pytest.fail)
        call, handle, *_ = dispatch(calls, **counted)
        combine(calls, handle, wait_stats=counted["wait_stats"])
    assert call.stats is counted["stats"] and call.wait_stats is counted["wait_stats"]
    wrong = torch.empty(3, dtype=torch.int64, device=META)
    for name, argument in (("stats", "cumulative_local_expert"), ("wait_stats", "dispatch_wait_recv")):
        with pytest.raises(InputError, match=argument):
            dispatch(calls, **{**counted, name: wrong})
    with pytest.raises(InputError, match="combine_wait_recv"):
        combine(calls, handle, wait_stats=wrong)


def test_a_refused_combine_leaves_the_rows_that_were_written(calls: LowLatency, engine: Recorder) -> None:
    _, handle, *_ = dispatch(calls)
    rows = calls.next_combine_buffer(handle)
    with pytest.raises(InputError, match="topk_weights = None"):
        combine(calls, handle, zero_copy=True, topk_weights=None)
    assert calls.next_combine_buffer(handle) is rows
    combine(calls, handle, zero_copy=True)
    assert engine.calls[-1][0].x is rows
    with pytest.raises(InputError, match="zero_copy"):
        combine(calls, handle, zero_copy=True)


def test_a_buffer_for_rows_is_free_when_its_handle_is(calls: LowLatency) -> None:
    """A program that fails between taking a buffer and combining must be able to go on."""
    handles = [dispatch(calls)[1] for _ in range(3)]
    kept = [calls.next_combine_buffer(handle) for handle in handles[:2]]
    with pytest.raises(HandleError, match="2 buffers are being filled"):
        calls.next_combine_buffer(handles[2])
    del handles[0]
    assert calls.next_combine_buffer(handles[1]) is kept[0]


@pytest.mark.parametrize("name", ["async_finish", "return_recv_hook", "zero_copy"])
def test_a_switch_without_a_truth_value_is_refused(calls: LowLatency, engine: Recorder, name: str) -> None:
    """On this rank alone, after equal calls that passed: the others must not wait for it."""
    _, handle, *_ = dispatch(calls)
    combine(calls, handle)
    wrong = torch.zeros(2, dtype=torch.bool, device="cpu")
    with pytest.raises(InputError, match=rf"{name} = tensor\(\[False, False\]\): must be True or False"):
        combine(calls, handle, **{name: wrong})
    if name != "zero_copy":
        with pytest.raises(InputError, match=f"{name} = 'no': must be True or False"):
            dispatch(calls, **{name: "no"})
    assert len(engine.refused) == (1 if name == "zero_copy" else 2) and len(engine.calls) == 2


@pytest.mark.parametrize("mode", ["plain", "async_finish", "return_recv_hook"])
def test_a_rank_without_memory_refuses(
    calls: LowLatency, engine: Recorder, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    _, handle, *_ = dispatch(calls)
    combine(calls, handle)

    def fails(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory for the rows")

    changed = {} if mode == "plain" else {mode: True}
    monkeypatch.setattr(torch, "empty_like", fails)
    for call in (lambda: dispatch(calls, **changed), lambda: combine(calls, handle, **changed)):
        with pytest.raises(torch.OutOfMemoryError, match="no memory for the rows"):
            call()
    assert engine.refused == ["OutOfMemoryError: no memory for the rows"] * 2 and len(engine.calls) == 2


def test_hooks_of_a_closed_buffer_launch_nothing(calls: LowLatency, engine: Recorder) -> None:
    """They would use memory that has been released."""
    engine.close = lambda: None  # type: ignore[attr-defined]
    *_, hook = dispatch(calls, return_recv_hook=True)
    assert hook is not None
    calls.close()
    made = len(engine.calls)
    with pytest.raises(HandleError, match="the hook of dispatch 1: its Buffer was destroyed before"):
        hook()
    assert len(engine.calls) == made


def test_a_hook_receives_on_the_stream_of_its_call(calls: LowLatency, monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[int] = [7]
    entered: list[object] = []

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        entered.append(stream)
        now.append(int(str(stream)))
        yield
        now.pop()

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: now[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: str(now[-1]))
    monkeypatch.setattr(torch.cuda, "stream", on)
    calls.device = torch.device("cuda", 0)
    received: list[int] = []
    for number, later in enumerate((7, 8)):
        calls._dispatches.made = number
        hook = calls._hook(calls._dispatches, lambda: received.append(now[-1]))
        now.append(later)
        hook()
        now.pop()
    assert received == [7, 7] and entered == ["7"]


@pytest.mark.parametrize("rank", ["1", True, None, 1.0, -1, 0, 2])
def test_only_another_rank_can_be_masked(calls: LowLatency, rank: Any) -> None:
    calls.masks = True
    with pytest.raises(InputError, match=f"rank_to_mask = '?{rank}"):
        calls.update_mask(rank, True)


def test_other_shapes_have_results_of_their_own(calls: LowLatency) -> None:
    for count, fp8 in ((4, True), (2, True), (4, False), (0, False), (4, True)):
        call, handle, *_ = dispatch(calls, x=tokens(count), topk_idx=indices(count), switches=(fp8, False, False))
        assert call.shape.tokens == count and (call.scales is None) == (not fp8)
        assert call.rows.shape == (3, 16, 256) and call.src_info.shape == (3, 16) and call.counts.shape == (3,)
        assert call.src_info.is_contiguous() and call.layout_range.is_contiguous()
        offsets = [t.storage_offset() * t.element_size() for t in (call.layout_range, call.src_info, call.counts)]
        assert offsets == [4 * 10, 4 * 10 + 8 * 6, 4 * (10 + 12 + 48)] and call.layout_range.dtype == torch.int64
        assert call.memory.numel() == 10 + 12 + 48 + 3
        assert handle[2:] == (8, 256, 6)


def test_what_is_remembered_is_bounded(calls: LowLatency, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_latency, "_MAX_SHAPES", 3)
    for count in range(9):
        dispatch(calls, x=tokens(count), topk_idx=indices(count))
        assert len(calls._shapes) <= 3


def _is_negative(count: int) -> Tensor:
    return torch.zeros(count, 1, dtype=torch.complex64, device="cpu").conj().imag


def _is_freed(size: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(size, dtype=torch.bfloat16, device="cpu")
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.skipif(_C is None, reason="needs the CUDA extension")
def test_the_signature_has_what_the_checks_examine() -> None:
    """A wrong argument must not have the signature of one that has passed the checks."""
    signature = _C.TensorSignatures(*torch.empty(0, dtype=torch.int32, device="cpu").__dlpack_device__()).of
    size = torch.zeros(8, 16, dtype=torch.bfloat16, device="cpu")
    x, weights = size[:4], torch.zeros(4, 2, dtype=torch.float32, device="cpu")
    plain = signature(x, weights, None, None)
    assert plain is not None and plain == signature(size[4:], weights + 1, None, None)
    others = [
        (weights, x, None, None),
        (x, weights, weights, None),
        (x, weights, None, weights),
        (x, None, weights, None),
        (size[:3], weights, None, None),
        (x.half(), weights, None, None),
        (x.view(torch.int16), weights, None, None),
        (x.view(torch.uint16), weights, None, None),
        (x.view(torch.float8_e4m3fn), weights, None, None),
        (x.view(torch.float8_e5m2), weights, None, None),
        (x.view(2, 2, 16), weights, None, None),
        (x.flatten(), weights, None, None),
        (size[:0], weights, None, None),
        (x, weights.view(torch.int32), None, None),
        (x, weights.view(2, 4), None, None),
    ]
    signatures = [plain, *(signature(*arguments) for arguments in others)]
    assert None not in signatures and len(set(signatures)) == len(signatures)
    assert signature(x, weights, None, None, None) not in signatures

    with FakeTensorMode():
        fake = torch.zeros(4, 16, dtype=torch.bfloat16, device="cpu")
    not_plain = [
        x.t(),
        size[::2],
        size.flatten()[1:65].view(4, 16),  # not aligned for kernels
        torch.nn.Parameter(x),
        x.to_sparse(),
        torch._neg_view(x),
        _is_negative(1),
        x.to(META),
        fake,
        x.view(1, 1, 2, 2, 16),
        _is_freed((4, 16)),
        x.tolist(),
        3,
    ]
    for argument in not_plain:
        assert signature(None, argument, None, None) is None, argument
    assert _C.TensorSignatures(2, 0).of(x, weights, None, None) is None, "another device"
    with pytest.raises(TypeError):
        signature(x)


@pytest.mark.parametrize(
    ("arenas", "others", "max_tokens", "expected"),
    [
        ([], None, 8, ["gather"]),  # no rank has memory yet: all are on their hosts
        ([(8, 256)], 0, 8, ["announce_refusal", "refuse DISPATCH"]),
        ([(8, 256)], 0, 16, ["announce_refusal", "refuse DISPATCH"]),  # an error, the others have another shape
        ([(8, 256)], 0, "8", ["announce_refusal", "refuse DISPATCH"]),
        ([(8, 256)], 1, 16, ["announce_refusal", "gather", "withdraw", "gather"]),
        ([(8, 256)], 1, 8, ["announce_refusal", "gather", "withdraw", "gather"]),
        ([(8, 256)], None, 8, ["announce_refusal", "refuse DISPATCH"]),  # kernels are frozen
        ([(8, 256)], None, 16, ["announce_refusal", "gather", "withdraw", "gather"]),
        ([(8, 256)], None, "16", ["announce_refusal", "refuse DISPATCH"]),
    ],
)
def test_a_refusing_rank_goes_where_the_others_are(
    monkeypatch: pytest.MonkeyPatch, arenas: list[Any], others: int | None, max_tokens: Any, expected: list[str]
) -> None:
    """Others execute the dispatch, or wait on their hosts to allocate memory: their kernels' announcements tell."""
    did: list[str] = []

    def announce_refusal(address: int, stream: int) -> None:
        did.append("announce_refusal")
        if others is not None:
            ctypes.c_int.from_address(address).value = others

    def gather(phase: str, group: Any, device: Any, seconds: float, mine: Any) -> list[Any]:
        did.append("gather")
        return [mine, [None, 16, 256]]

    engine: Any = object.__new__(CudaEngine)
    engine.device, engine._arenas, engine._last = torch.device("cpu"), dict.fromkeys(arenas), None
    engine._engine = SimpleNamespace(
        announce_refusal=announce_refusal,
        announce=lambda *, withdrawn, **_: did.append("withdraw" if withdrawn else "announce"),
        refuse=lambda *, kind, **_: did.append(f"refuse {kind}"),
    )
    engine._domain = SimpleNamespace(enter_stream=lambda: 0, raise_lasting=lambda: None, group=None, timeout_seconds=1)
    monkeypatch.setattr(low_latency_cuda, "gather", gather)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    kinds = SimpleNamespace(DISPATCH="DISPATCH", COMBINE="COMBINE")
    monkeypatch.setattr(low_latency_cuda, "_C", SimpleNamespace(LATENCY_ALLOCATING=1, LatencyKind=kinds))
    problem = InputError("x", "torch.float32", "must be torch.bfloat16")
    used_a_number = engine.refuse_dispatch(max_tokens, 256, problem)
    assert did == expected and used_a_number == ("refuse DISPATCH" in expected)
    did.clear()
    assert engine.refuse_combine(None, problem) == used_a_number  # no dispatch, no combine
    assert did == ["refuse COMBINE"] * used_a_number


def test_the_bound_on_sums_allows_two_units_and_no_more() -> None:
    """-5.0 - 0.828125 is halfway between two values of BF16: if one sum rounds the other way, two units."""
    ulp = 2**-5
    expected = torch.tensor([-5.8125, -5.8125, -5.8125, 0.0], dtype=torch.bfloat16, device="cpu")
    got = torch.tensor([-5.8125 - 2 * ulp, -5.8125 - 4 * ulp, torch.nan, torch.nan], dtype=torch.bfloat16, device="cpu")
    assert differs(got, expected).tolist() == [False, True, True, True]


def test_what_a_graph_cannot_capture_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host of the reference waits, and the first call allocates on all ranks."""
    engine = object.__new__(low_latency_reference.ReferenceEngine)
    engine.device = torch.device("cuda")
    call: Any = SimpleNamespace(sent=False)
    monkeypatch.setattr(low_latency_reference, "is_capturing", lambda device: device.type == "cuda")
    for run in (engine.dispatch, engine.combine):
        with pytest.raises(UnsupportedError, match=r"cannot be captured in a CUDA graph.*rail=nvshmem"):
            run(call, Half.BOTH)
    assert not call.sent
    monkeypatch.setattr(low_latency, "is_capturing", lambda device: True)
    with pytest.raises(CapacityError, match="make one such call before capturing"):
        low_latency.make_engine(cast(Any, SimpleNamespace(device=torch.device("cuda"))), 0, False, 0)


@pytest.mark.parametrize(
    ("ranks", "per_node", "reason"),
    [
        (32, 0, "backend collective does not map the peers' memory, and rail=nvshmem is not set"),
        (33, 0, None),
        (128, 128, None),
        (128, 8, "ranks_per_node = 8 cuts the group into several nodes, and rail=nvshmem is not set"),
        (129, 0, "rank 0: the group has 129 ranks, one NVLink domain is served up to 128, and rail=nvshmem is not set"),
    ],
)
def test_more_ranks_than_nvlink_serves_have_a_domain_for_these_calls(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ranks: int, per_node: int, reason: str | None
) -> None:
    class Made(CudaEngine):
        def __init__(self, domain: Domain, num_sms: int, masks: bool) -> None:
            self.made = domain, num_sms, masks

    monkeypatch.setattr(low_latency, "is_capturing", lambda device: False)
    monkeypatch.setattr(low_latency, "CudaEngine", Made)
    monkeypatch.setattr(low_latency, "ReferenceEngine", lambda backend: "reference")
    monkeypatch.setattr(low_latency_cuda, "gather", lambda *arguments: [arguments[-1]] * ranks)
    monkeypatch.setattr(domain_module, "gather", lambda *arguments: [arguments[-1]] * ranks)
    monkeypatch.setattr(domain_module, "why_not_on", lambda device: None)
    monkeypatch.setattr(domain_module.dist, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(domain_module.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(Domain, "__init__", lambda self, *arguments: self.__dict__.update(arguments=arguments))
    config = DispatcherConfig(ranks_per_node=per_node, timeout_seconds=7.0, debug_waits=True)
    device = torch.device("cuda", 0)
    backend: Any = SimpleNamespace(
        name="collective", device=device, rank=0, world_size=ranks, config=config, group="the group"
    )
    made: Any = low_latency.make_engine(backend, 3, True, 0)
    if reason is None:
        domain, *rest = made.made
        assert domain.arguments == ("the group", device, 7.0, True) and rest == [3, True]
    else:
        assert made == "reference" and f"through torch.distributed: {reason}." in caplog.text
    supported = Domain.supports(backend.group, device, 7.0)
    told = f"the group has {ranks} ranks, one NVLink domain is served up to 32"
    assert supported == (None if ranks <= 32 else told)


@pytest.mark.skipif(_C is None, reason="needs the CUDA extension")
def test_the_extension_serves_as_many_ranks_as_python_thinks() -> None:
    assert (_C.MAX_RANKS, _C.wide.MAX_RANKS) == (extension.MAX_RANKS, extension.MAX_LOW_LATENCY_RANKS)
    for ranks in (1, 32, 33, 128):
        module = extension.module_for(_C, ranks)
        assert module is (_C if ranks <= 32 else _C.wide)
        assert module.LatencyEngine.fewest_blocks(ranks) == (ranks + 1 if ranks <= 32 else 4)
        assert module.LatencyEngine.places_words(ranks, 3, 2) == 2 + module.MAX_RANKS + ranks * 6
        with pytest.raises(ValueError, match=f"num_ranks = {module.MAX_RANKS + 1}: must be 1 to {module.MAX_RANKS}"):
            module.Domain(0, module.MAX_RANKS + 1, 0, 1.0, False)
