"""What the files hold decides, not their config: random directories beside stock transformers.

Each case is a tiny model of some family whose files were renamed, cut, merged or retrained in the ways that merges,
fine-tunes and broken downloads leave behind. Where stock ``from_pretrained`` finds every weight, the model loaded here
has the same ones, bit for bit; where it would make some up, or fails, there is a refusal.
"""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_lab import Plan, convert, export_gguf, find_source, load, open_gpu
from lowvram_lab.errors import CheckpointError, LowvramError
from lowvram_lab.quiet import quiet_transformers
from lowvram_lab.repository import hub
from lowvram_lab.weights.layerwise import LayerByLayer
from tests.helpers.checkpoints import write_model
from tests.helpers.tiny import random_ids, tiny_state

CASES, CHUNKS = 504, 12
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
OLD = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
FAMILIES = {
    "llama-tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "llama": ("llama", {**SIZES, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**SIZES, "tie_word_embeddings": True}),
    "gemma": ("gemma", {**SIZES, "head_dim": 8}),
    "gpt2": ("gpt2", {**OLD, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}),
    "pythia": ("gpt_neox", {**SIZES, "tie_word_embeddings": False}),
    "opt": (
        "opt",
        {**OLD, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24}
        | {"word_embed_proj_dim": 16, "max_position_embeddings": 32, "pad_token_id": 1},
    ),
    "phi": ("phi", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}),  # a head with a bias
}
FAMILIES["bert"] = "bert", {**SIZES, "is_decoder": True}  # ties a bias too, and has a LayerNorm of old names
HEADS = {"pythia": "embed_out.weight", "bert": "cls.predictions.decoder.weight"}
PREFIXES = {"gpt2": "transformer.", "pythia": "gpt_neox.", "bert": "bert."}
EMBEDDINGS = {
    "gpt2": "transformer.wte.weight",
    "pythia": "gpt_neox.embed_in.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family → config and tensors, as transformers saves them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for family, (model_type, values) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(len(family))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        with torch.no_grad(), quiet_transformers():
            for parameter in model.parameters():
                parameter.normal_()
            model.to(torch.bfloat16).save_pretrained(folder)
        found[family] = json.loads((folder / "config.json").read_text()), load_file(folder / SINGLE)
    return found


class Case:
    """A directory in the making: one seed, always the same directory."""

    def __init__(self, seed: int, bases: dict, family: str = ""):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.family = family or self.random.choice(list(FAMILIES))
        config, tensors = bases[self.family]
        self.config, self.tensors = dict(config), dict(tensors)
        self.embedding = EMBEDDINGS.get(self.family, "model.embed_tokens.weight")
        self.head = HEADS.get(self.family, "lm_head.weight")
        self.prefix = PREFIXES.get(self.family, "model.")
        self.done: list[str] = []

    def write(self, folder: Path) -> None:
        changes, layouts = (
            {name.removeprefix(kind): getattr(self, name) for name in sorted(dir(self)) if name.startswith(kind)}
            for kind in ("change_", "layout_")
        )
        for _ in range(self.random.choice((0, 1, 1, 1, 2, 3))):
            name = self.random.choice(list(changes))
            self.done.append(name)
            changes[name]()
        layout = self.random.choice(["single"] * len(layouts) + list(layouts))
        self.done.append(layout)
        layouts[layout](folder)
        (folder / "config.json").write_text(json.dumps(self.config))

    def finish(self, folder: Path) -> Path:
        """One file and the config, with the changes made so far."""
        folder.mkdir(exist_ok=True)
        self.layout_single(folder)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    def noise(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=self.generator).to(tensor.dtype)

    def a_name(self) -> str:
        return self.random.choice(sorted(self.tensors)) if self.tensors else "nothing"

    def rename(self, change) -> None:
        self.tensors = {change(name): tensor for name, tensor in self.tensors.items()}

    # ---- what fine-tunes, merges and converters do ----

    def change_prefix_removed(self):
        self.rename(lambda name: name.removeprefix(self.prefix))

    def change_prefix_removed_from_some(self):
        some = {name for name in self.tensors if self.random.random() < 0.5}
        self.rename(lambda name: name.removeprefix(self.prefix) if name in some else name)

    def change_prefix_added(self):
        prefix = self.random.choice(("model.", "base_model.model.", "language_model.", "transformer.", self.prefix))
        self.rename(lambda name: prefix + name)

    def change_legacy_names(self):
        self.rename(lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(".beta", ".bias"))

    def change_shared_bias(self):
        bias = "cls.predictions.bias"
        if bias in self.tensors:
            differs = self.random.random() < 0.5
            values = self.noise(self.tensors[bias]) if differs else self.tensors[bias].clone()
            self.tensors["cls.predictions.decoder.bias"] = values

    def change_other_family_head_name(self):
        swap = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}
        self.rename(lambda name: swap.get(name, name))

    def change_head_equal(self):
        if self.embedding in self.tensors:
            self.tensors[self.head] = self.tensors[self.embedding].clone()

    def change_head_differs(self):
        if self.embedding in self.tensors:
            self.tensors[self.head] = self.noise(self.tensors[self.embedding])

    def change_head_differs_in_one_value(self):
        self.change_head_equal()
        if self.head in self.tensors:
            self.tensors[self.head].view(-1)[-1] += 1

    def change_head_of_another_dtype(self):
        self.change_head_equal()
        if self.head in self.tensors:
            self.tensors[self.head] = self.tensors[self.head].double()

    def change_head_with_signed_zeros(self):
        if self.embedding in self.tensors:
            self.tensors[self.embedding] = self.tensors[self.embedding].clone()
            self.tensors[self.embedding].view(-1)[:3] = 0.0
            self.change_head_equal()
            self.tensors[self.head].view(-1)[:3] = -0.0

    def change_head_alone(self):
        if self.embedding in self.tensors:
            self.tensors[self.head] = self.tensors.pop(self.embedding)

    def change_head_dropped(self):
        self.tensors.pop(self.head, None)

    def change_tie_flag(self):
        self.config["tie_word_embeddings"] = self.random.random() < 0.5

    def change_tie_flag_missing(self):
        self.config.pop("tie_word_embeddings", None)

    def change_dropped(self):
        self.tensors.pop(self.a_name(), None)

    def change_misspelt(self):
        wrong = self.a_name()
        self.rename(lambda name: f"{name}_" if name == wrong else name)

    def change_shape(self):
        name = self.a_name()
        if name in self.tensors:
            self.tensors[name] = torch.cat((self.tensors[name], self.tensors[name][:1]))

    def change_twice_under_two_names(self):
        name = self.a_name()
        if name in self.tensors:
            other = name.removeprefix(self.prefix) if name.startswith(self.prefix) else self.prefix + name
            self.tensors[other] = self.noise(self.tensors[name])

    def change_extra(self):
        names = (
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "gpt_neox.layers.0.attention.masked_bias",
            "transformer.h.0.attn.bias",
            "h.0.attn.masked_bias",
            "model.layers.1.self_attn.q_proj.weight",
            "model.embed_positions.position_ids",
            "score.weight",
            "v_head.summary.bias",
        )
        for name in self.random.sample(names, 3):
            self.tensors[name] = torch.randn(4, 4, generator=self.generator)

    def change_dtype(self):
        dtype = self.random.choice((torch.float64, torch.float32, torch.float16))
        self.tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}

    def change_mixed_dtypes(self):
        for name in self.tensors:
            dtype = self.random.choice((torch.float64, torch.float32, torch.float16, torch.bfloat16))
            self.tensors[name] = self.tensors[name].to(dtype)

    # ---- how the files lie ----

    def save(self, tensors: dict, path: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})

    def shards(self, folder: Path, shift: float = 0) -> dict[str, str]:
        places = {name: self.random.choice(SHARDS) for name in self.tensors}
        for file in SHARDS:
            held = {name: tensor + shift for name, tensor in self.tensors.items() if places[name] == file}
            self.save(held, folder / file)
        return places

    def index(self, folder: Path, places: dict[str, str]) -> None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    def layout_single(self, folder):
        self.save(self.tensors, folder / SINGLE)

    def layout_sharded(self, folder):
        self.index(folder, self.shards(folder))

    def layout_single_beside_other_shards(self, folder):
        self.index(folder, self.shards(folder, shift=1))
        self.layout_single(folder)

    def layout_single_beside_stale_index(self, folder):
        self.index(folder, {"lm_head.weight": SHARDS[0], "model.norm.weight": SHARDS[2]})
        self.layout_single(folder)

    def layout_shard_missing(self, folder):
        self.index(folder, self.shards(folder))
        (folder / self.random.choice(SHARDS)).unlink()

    def layout_shard_cut_short(self, folder):
        self.index(folder, self.shards(folder))
        file = folder / self.random.choice(SHARDS)
        file.write_bytes(file.read_bytes()[:-1])

    def layout_index_of_some_shards(self, folder):
        places = self.shards(folder)
        self.index(folder, {name: file for name, file in places.items() if file != SHARDS[2]})

    def layout_index_of_some_names(self, folder):
        places = self.shards(folder)
        first = {file: name for name, file in places.items()}
        self.index(folder, {name: file for file, name in first.items()})

    def layout_strangers_beside(self, folder):
        self.layout_single(folder)
        shifted = {name: tensor + 1 for name, tensor in self.tensors.items()}
        for name in ("model.fp16.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
            self.save(shifted, folder / name)

    def layout_no_index(self, folder):
        self.shards(folder)

    def layout_no_index_and_shard_missing(self, folder):
        self.shards(folder)
        (folder / self.random.choice(SHARDS)).unlink()

    def layout_variant_alone(self, folder):
        self.save(self.tensors, folder / "model.fp16.safetensors")


def digests(model) -> dict[str, str]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest() for name, value in named}


def ties(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def stock(folder: Path):
    """Stock transformers' model, or why there is none that is wholly the files'."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        return f"fails: {error}"
    return f"makes up {sorted(report['missing_keys'])}" if report["missing_keys"] else model


def ours(folder: Path):
    """Our model, or the refusal."""
    try:
        source = find_source(folder)
        plan = Plan.uniform(source.spec(), "fp32", context=16)
        return load(plan, open_gpu("16MiB"), checkpoint=source.checkpoint(), progress=False)
    except LowvramError as error:
        assert "\n" not in str(error)
        return str(error)


def indexed(folder: Path) -> Path:
    """The same files with the index that stock transformers asks for, and we do not."""
    from safetensors import safe_open

    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            places |= dict.fromkeys(handle.keys(), file.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_weights_are_stock_transformers_or_refused(chunk, bases, tmp_path):
    outcomes = Counter()
    for seed in range(chunk, CASES, CHUNKS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        case = Case(seed, bases)
        case.write(folder)
        about = f"seed {seed}, {case.family}: {', '.join(case.done)}"
        found, reference = ours(folder), stock(folder)
        if isinstance(reference, str) and case.done[-1] in ("no_index", "variant_alone"):
            reference = stock(indexed(folder))
        if isinstance(found, str) or isinstance(reference, str):
            assert isinstance(found, str) and isinstance(reference, str), f"{about}: {found} | stock {reference}"
        else:
            untied_for_its_bias = ties(reference) and "shared_bias" in case.done  # one flag unties both pairs
            assert ties(found) == ties(reference) or untied_for_its_bias, about
            assert digests(found) == digests(reference), about
        outcomes[isinstance(found, str)] += 1
    assert min(outcomes[True], outcomes[False]) >= CASES / CHUNKS / 5, outcomes


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama-tied", ("head_differs",)),
        ("gemma", ("head_alone",)),
        ("gpt2", ("prefix_removed", "head_differs")),
        ("pythia", ("extra",)),
        ("opt", ("prefix_removed_from_some",)),
        ("phi", ("mixed_dtypes",)),
    ],
)
def test_logits_are_stock_transformers(family, changes, bases, tmp_path):
    case = Case(1, bases, family)
    for change in changes:
        getattr(case, f"change_{change}")()
    found, reference = ours(case.finish(tmp_path)), stock(tmp_path)
    with torch.no_grad():
        ids = random_ids(9) % SIZES["vocab_size"]
        torch.testing.assert_close(found(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_untied_head_is_said_once(bases, tmp_path, caplog):
    case = Case(2, bases, "llama-tied")
    case.change_head_differs()
    source = find_source(case.finish(tmp_path))
    assert not source.spec().tied and not source.spec("again").tied
    said = [record.getMessage() for record in caplog.records if "not tied" in record.getMessage()]
    assert len(said) == 1 and "lm_head" in said[0] and "model.embed_tokens" in said[0]
    assert source.spec().config["tie_word_embeddings"] is False


def test_an_equal_head_is_one_tensor(bases, tmp_path, caplog):
    case = Case(3, bases, "llama-tied")
    case.change_head_equal()
    source = find_source(case.finish(tmp_path))
    assert source.spec().tied and "lm_head.weight" not in source.checkpoint()
    assert not caplog.records


def test_a_plan_made_before_the_files_came_is_refused_where_they_disagree(bases, tmp_path):
    case = Case(4, bases, "llama-tied")
    case.change_head_differs()
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    source = find_source(tmp_path)
    before = Plan.uniform(source.spec(), "fp32", context=16)
    case.finish(tmp_path)
    with pytest.raises(CheckpointError, match="lm_head.weight is model.embed_tokens.weight, but.*plan again") as error:
        load(before, open_gpu("16MiB"), checkpoint=source.checkpoint(), progress=False)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="plan again"):
        LayerByLayer(before.spec, source.checkpoint())
    assert load(Plan.uniform(source.spec(), "fp32", context=16), open_gpu("16MiB"), progress=False)


def test_a_hub_model_is_asked_for_nothing_that_is_not_here(bases, tmp_path, monkeypatch):
    case = Case(5, bases, "llama-tied")
    case.change_head_differs()
    asked = []
    monkeypatch.setattr(hub, "snapshot", lambda _, patterns, *rest, **more: asked.append((patterns, rest)) or tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    source = find_source("someone/something")
    assert source.spec().tied
    case.finish(tmp_path)
    assert not source.spec().tied
    weights = [rest for patterns, rest in asked if "*.safetensors" in patterns]
    assert weights == [(False, True), (False, True)]  # no bars, nothing but the cache


@pytest.mark.parametrize("differs", [True, False])
def test_what_is_made_of_it_has_the_same_head(differs, tmp_path, monkeypatch):
    """A GGUF file says it by holding a head or not; a converted directory in its config too."""
    from gguf import GGUFReader

    state = tiny_state("llama")
    embedding = state["model.embed_tokens.weight"]
    head = embedding.flip(0) if differs else embedding.clone()
    folder = write_model(tmp_path / "model", "llama", {**state, "lm_head.weight": head}, torch.float32)
    monkeypatch.setattr("lowvram_lab.conversion.gguf_export.vocabulary_of", lambda *_: {})  # bytes alone: no merges
    export_gguf(folder, tmp_path / "model.gguf", tensor_type="f32", progress=False)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in tensors) == differs
    if differs:
        assert torch.equal(torch.from_numpy(tensors["output.weight"].copy()), head)
    plan = Plan.uniform(find_source(folder).spec(), "bf16", context=16)
    convert(folder, tmp_path / "converted", plan, calibration_tokens=2048, solver="rtn", progress=False)
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["tie_word_embeddings"] is not differs
    assert digests(ours(tmp_path / "converted")) == digests(stock(tmp_path / "converted"))
    assert ties(stock(tmp_path / "converted")) is not differs


def test_a_parameter_that_transformers_computes_is_refused_by_name(bases, tmp_path, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    parts = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    monkeypatch.setattr(
        conversion_mapping,
        "get_model_conversion_mapping",
        lambda model: [WeightConverter("self_attn.qkv_proj.weight", parts, operations=[Chunk(dim=0)])],
    )
    case = Case(7, bases, "llama")
    assert not isinstance(ours(case.finish(tmp_path)), str)  # the rule touches nothing here
    case.tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.cat(
        [case.tensors.pop(f"model.layers.0.{part}") for part in parts]
    )
    assert "q_proj.weight from model.layers.0.self_attn.qkv_proj.weight" in ours(case.finish(tmp_path))


def test_constants_of_the_files_own_are_refused(tmp_path):
    """Apertus stores the constants of its activation; those that are the class's own are no obstacle."""
    from transformers import ApertusConfig, ApertusForCausalLM

    model = ApertusForCausalLM(ApertusConfig(**SIZES))
    model.save_pretrained(tmp_path)
    assert digests(ours(tmp_path)) == digests(stock(tmp_path))
    model.model.layers[0].mlp.act_fn.beta.fill_(0.25)
    model.save_pretrained(tmp_path)
    assert "act_fn.beta holds values of its own" in ours(tmp_path)


def test_tensors_of_no_place_are_counted(bases, tmp_path, caplog):
    case = Case(8, bases, "llama")
    case.change_extra()
    source = find_source(case.finish(tmp_path))
    with caplog.at_level("INFO", "lowvram_lab"):
        checkpoint = source.checkpoint()
    assert len(checkpoint.unknown) == 3 and len(checkpoint) == len(case.tensors) - 3
    assert "3 tensors are none of the model's" in caplog.text


def test_files_that_transformers_would_load_instead_are_named(bases, tmp_path, caplog):
    case = Case(9, bases, "llama")
    folder = case.finish(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    assert not isinstance(ours(folder), str)
    assert "the adapter beside the model is not applied" in caplog.text
    case.config["transformers_weights"] = "other.safetensors"
    assert "has transformers load other.safetensors" in ours(case.finish(tmp_path))
