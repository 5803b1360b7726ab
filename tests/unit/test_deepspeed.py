"""The DeepSpeed plugin without ranks: the block, versions, routing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import ConfigError, UnsupportedError
from deepep_moe.integrations.deepspeed import register, registration
from deepep_moe.integrations.deepspeed.routing import dropless_routes, load


class TestBlock:
    def test_absent_or_off(self) -> None:
        assert registration.read_block({}) is None
        assert registration.read_block({"deepep_moe": {"enabled": False, "num_sms": 4}}) is None

    def test_fields(self, monkeypatch: pytest.MonkeyPatch) -> None:
        block = {"deepep_moe": {"enabled": True, "num_sms": 12, "backend": "collective"}}
        assert registration.read_block(block) == DispatcherConfig(num_sms=12, backend="collective")
        monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", "16")
        assert registration.read_block(block) == DispatcherConfig(num_sms=16, backend="collective")

    def test_wrong_key_is_an_error_when_off_too(self) -> None:
        with pytest.raises(ConfigError, match=r"'num_sm' from ds_config block deepep_moe \(did you mean num_sms\?\)"):
            registration.read_block({"deepep_moe": {"enabled": False, "num_sm": 4}})

    @pytest.mark.parametrize("given", [{"train_batch_size": 2}, "ds_config.json"])
    def test_an_engine_that_keeps_its_configuration_otherwise(
        self, given: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without the block nothing of DeepSpeed's private state is needed."""
        from deepspeed.runtime.engine import DeepSpeedEngine

        stock = DeepSpeedEngine._configure_expert_parallel._deepep_moe_original
        monkeypatch.setattr(DeepSpeedEngine, "_configure_expert_parallel", lambda engine, model: "the stock method")
        register()
        assert DeepSpeedEngine._configure_expert_parallel._deepep_moe_original is not stock
        engine = SimpleNamespace(config=given, _config=SimpleNamespace())
        assert DeepSpeedEngine._configure_expert_parallel(engine, torch.nn.Linear(2, 2)) == "the stock method"

    def test_the_block_is_found_in_a_mapping_and_in_a_file(self) -> None:
        block = {"deepep_moe": {"enabled": True}}
        for engine in (
            SimpleNamespace(config=block, _config=SimpleNamespace()),
            SimpleNamespace(config="ds_config.json", _config=SimpleNamespace(_param_dict=block)),
        ):
            assert registration.ds_config_of(engine) == block


class TestVersion:
    @pytest.mark.parametrize("version", ["0.19.8", "0.19.8+4f2a9c1", "0.19.12"])
    def test_supported(self, version: str) -> None:
        assert registration.check_version(version) == version

    @pytest.mark.parametrize("version", ["0.19.7", "0.18.9", "0.20.0", "1.0.0"])
    def test_refused(self, version: str) -> None:
        with pytest.raises(UnsupportedError, match=rf"needs deepspeed 0\.19\.8 .* installed is {version}"):
            registration.check_version(version)

    def test_registering_again_changes_nothing(self) -> None:
        from deepspeed.runtime.engine import DeepSpeedEngine

        before = DeepSpeedEngine._configure_expert_parallel
        register()
        assert DeepSpeedEngine._configure_expert_parallel is before

    def test_missing_patch_point(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from deepspeed.runtime.engine import DeepSpeedEngine

        monkeypatch.delattr(DeepSpeedEngine, "_configure_expert_parallel")
        with pytest.raises(UnsupportedError, match=r"no DeepSpeedEngine\._configure_expert_parallel"):
            register()


class TestAutoEP:
    def test_rows_are_weighed_as_by_autoep(self) -> None:
        from deepep_moe.integrations.deepspeed import auto_ep

        torch.manual_seed(0)
        rows, weights = torch.randn(9, 24).bfloat16().requires_grad_(), torch.rand(9, 1, requires_grad=True)
        factors = torch.randn(9, 24).bfloat16()
        found = []
        for weigh in (auto_ep._stock_row_weights, auto_ep._row_weights):
            weighed = weigh(rows, weights, "eager")
            found.append((weighed, *torch.autograd.grad((weighed * factors).sum(), (rows, weights))))
        assert torch.equal(found[0][0], found[1][0])
        for got, expected in zip(found[1][1:], found[0][1:], strict=True):
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected)

    def test_missing_patch_point(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from deepspeed.module_inject import auto_ep_layer

        monkeypatch.delattr(auto_ep_layer, "apply_deepep_row_weights")
        with pytest.raises(
            UnsupportedError, match=r"no deepspeed\.module_inject\.auto_ep_layer\.apply_deepep_row_weights"
        ):
            register()


class TestRefusals:
    """Of what DeepSpeed itself refuses first on some machines."""

    @pytest.mark.parametrize(
        ("changes", "texts"),
        [
            ({"zero_optimization_stage": lambda: 3}, "stage = 3"),
            ({"fp16_enabled": lambda: True}, "fp16.enabled = true"),
        ],
    )
    def test_native(self, changes: dict[str, object], texts: str, monkeypatch: pytest.MonkeyPatch) -> None:
        off = {"zero_optimization_stage": lambda: 0, "fp16_enabled": lambda: False, "bfloat16_enabled": lambda: False}
        monkeypatch.setattr(registration, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cpu"))
        registration.check_native(SimpleNamespace(**off), DispatcherConfig())
        with pytest.raises(UnsupportedError, match=texts):
            registration.check_native(SimpleNamespace(**{**off, **changes}), DispatcherConfig())

    def test_autoep_without_bf16(self) -> None:
        from deepep_moe.integrations.deepspeed import auto_ep

        expert_parallel = SimpleNamespace(expert_tensor_parallel_size=1, comm_max_tokens_per_rank=16)
        auto_ep.check(DispatcherConfig(), expert_parallel, bf16=True, tensor_parallel=1)
        with pytest.raises(ConfigError, match=r'comm_backend = "deepep".*bf16\.enabled'):
            auto_ep.check(DispatcherConfig(), expert_parallel, bf16=False, tensor_parallel=1)


class TestRouting:
    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_equals_the_stock_gate(self, k: int) -> None:
        from deepspeed.moe.sharded_moe import TopKGate

        torch.manual_seed(k)
        gate = TopKGate(8, 6, k, drop_tokens=False, min_capacity=0, use_rts=False, top2_2nd_expert_sampling=False)
        x = torch.randn(20, 8)
        aux_loss, _, _, topk_idx, _, weights, counts = gate(x, sparse_routes=True)
        routes = dropless_routes(gate, x)
        assert torch.equal(routes.topk_idx, topk_idx.t().long())
        torch.testing.assert_close(routes.weights, weights.t())
        ours = load(gate, routes)
        torch.testing.assert_close(ours.aux_loss, aux_loss)
        assert torch.equal(ours.expert_counts, counts)

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_gradients_in_bf16_equal_the_stock_gates(self, k: int) -> None:
        """DeepSpeed converts tokens and weights to fp32; ours stay as they are, and lose nothing by it."""
        from deepspeed.moe.sharded_moe import TopKGate

        torch.manual_seed(k)
        gate = TopKGate(64, 6, k, drop_tokens=False, min_capacity=0, use_rts=False, top2_2nd_expert_sampling=False)
        gate = gate.bfloat16()
        x = torch.randn(200, 64).bfloat16().requires_grad_()
        aux_loss, _, _, topk_idx, _, weights, _ = gate(x, sparse_routes=True)
        routes = dropless_routes(gate, x)
        assert torch.equal(routes.topk_idx, topk_idx.t().long())
        factors = torch.randn(200, k)
        stock = torch.autograd.grad((weights.t() * factors).sum() + aux_loss, (x, gate.wg.weight))
        loss = (routes.weights * factors).sum() + load(gate, routes).aux_loss
        for got, expected in zip(torch.autograd.grad(loss, (x, gate.wg.weight)), stock, strict=True):
            assert got.dtype == torch.bfloat16
            assert (got - expected).norm() < 1e-3 * expected.norm()  # one rounding in the last of 8 bits is 4e-3

    @pytest.mark.parametrize(
        ("k", "options"),
        [(1, {"noisy_gate_policy": "RSample"}), (1, {"noisy_gate_policy": "Jitter"}), (2, {})],
    )
    def test_draws_the_same_noise(self, k: int, options: dict[str, str]) -> None:
        from deepspeed.moe.sharded_moe import TopKGate

        gate = TopKGate(8, 6, k, drop_tokens=False, min_capacity=0, use_rts=False, **options)
        x = torch.randn(50, 8)
        torch.manual_seed(5)
        _, _, _, topk_idx, _, weights, _ = gate(x, sparse_routes=True)
        torch.manual_seed(5)
        routes = dropless_routes(gate, x)
        assert torch.equal(routes.topk_idx, topk_idx.t().long())
        torch.testing.assert_close(routes.weights, weights.t())
        torch.manual_seed(6)
        assert not torch.equal(dropless_routes(gate, x).weights, routes.weights)

    def test_no_tokens(self) -> None:
        from deepspeed.moe.sharded_moe import TopKGate

        gate = TopKGate(8, 6, 2, drop_tokens=False)
        routes = dropless_routes(gate, torch.zeros(0, 8))
        assert routes.topk_idx.shape == routes.weights.shape == (0, 2)
        assert load(gate, routes).aux_loss == 0
        assert not load(gate, routes).expert_counts.any()


class TestLauncher:
    COMMAND = (sys.executable, "-m", "deepep_moe.integrations.deepspeed")

    def test_runs_a_script_with_the_plugin_loaded(self, tmp_path: Path) -> None:
        script = tmp_path / "train.py"
        script.write_text(
            "import sys\nfrom deepspeed.runtime.engine import DeepSpeedEngine as E\n"
            "print(__name__, sys.argv[1:], hasattr(E._configure_expert_parallel, '_deepep_moe_original'))\n"
        )
        result = subprocess.run(
            [*self.COMMAND, str(script), "--steps", "3"], capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "__main__ ['--steps', '3'] True"

    def test_missing_script(self) -> None:
        result = subprocess.run([*self.COMMAND, "no_such.py"], capture_output=True, text=True, timeout=60)
        assert result.returncode == 1
        assert "no such script: no_such.py" in result.stderr


def test_package_says_what_it_needs_where_deepspeed_is_missing() -> None:
    hide = "import sys; sys.modules['deepspeed'] = None; import deepep_moe.integrations.deepspeed"
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=60)
    assert "UnsupportedError: deepep_moe.integrations.deepspeed needs deepspeed 0.19.8" in result.stderr
