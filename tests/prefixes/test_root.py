"""What decides the bits of keys and values beside the tokens: where it is another, nothing is found, and it is named.

What can be another here is; the rest (versions, processor, card, this library's code) is said to be.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.engine.nested import NestedLinear
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import LOADING_SOLVERS
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.prefixes import keys
from lowvram_lab.prefixes.keys import chain, root_of
from lowvram_lab.prefixes.store import Remembered
from tests.helpers.checkpoints import write_model
from tests.helpers.tiny import DictCheckpoint, random_ids, random_state, tiny_config, tiny_plan, tiny_spec, tiny_state

IDS = random_ids(300)[0].tolist()


def model_of(plan: Plan | None = None, state=None, **changes):
    plan = replace(plan or tiny_plan("llama"), **{"remember": 1 << 24, **changes})
    return load(plan, open_gpu(), checkpoint=DictCheckpoint(state or tiny_state("llama")), progress=False)


def of_config(**changes):
    return model_of(Plan.uniform(ModelSpec.from_config(tiny_config("llama", **changes), "tiny-llama"), context=512))


def of_attention(name):
    model = model_of()
    model.config._attn_implementation_internal = name
    return model


def says(name, value):
    """A change that can only be said here."""
    return lambda patch: patch.setattr(keys, name, lambda *_: value) or model_of()


OTHERS = {
    "formats": lambda _: model_of(tiny_plan("llama", "int8")),
    "rope": lambda _: of_config(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "config": lambda _: of_config(rms_norm_eps=1e-5),
    "weights": lambda _: model_of(state=random_state(tiny_spec("llama"), 77)),
    "kv_format": lambda _: model_of(kv_format="int8"),
    "places": lambda _: model_of(stream_from=2),
    "pieces": lambda _: model_of(prefill_chunk=64),
    "attention": lambda _: of_attention("sdpa_paged"),
    "engine": says("_sources", "another"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "9.9") or model_of(),
    "transformers": says("version", "9.9"),
    "processor": says("instruction_set", "another"),
    "card": says("_card", "another"),
    "threads": lambda _: model_of(threads=torch.get_num_threads() + 1),
    "switches": lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2") or model_of(),
    "salt": lambda _: model_of(),
}
"""Field of the root → a model of which this field is another."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder in which a model remembers two blocks."""
    folder, model = tmp_path_factory.mktemp("kept") / "prefixes", model_of()
    decoder = decoder_for(model, 512, progress=False)
    store = Remembered(model, decoder.cache, folder=folder)
    assert store.restore(decoder.cache, IDS) == 0
    decoder.prefill(torch.tensor([IDS]))
    assert store.keep(decoder.cache, IDS[:256], 0.1)[0] == 2
    return folder


def test_every_field_is_tried():
    assert set(OTHERS) == set(root_of(model_of()).fields)


@pytest.mark.parametrize("field", OTHERS)
def test_another_field_is_a_miss_that_names_it(field, kept, monkeypatch):
    model = OTHERS[field](monkeypatch)
    decoder = decoder_for(model, 512, progress=False)
    store = Remembered(model, decoder.cache, "a secret" if field == "salt" else "", kept)
    found = store.find(IDS)
    assert store.restore(decoder.cache, IDS) == 0
    assert found.hit_tokens == 0
    assert found.missed == store.missed
    assert store.missed.token == 0
    assert store.missed.reason.startswith(f"{field}: ")
    assert "\n" not in store.missed.reason
    assert field != "rope" or store.root.fields["config"] == root_of(model_of()).fields["config"]
    same = model_of() if field in ("kv_format", "formats") else None
    assert same is None or Remembered(same, decoder_for(same, 512, progress=False).cache, "", kept).find(IDS).places


def test_how_weights_were_quantised_is_said_by_their_formats():
    found, other = (root_of(model_of(tiny_plan("llama", "int4"), solver=solver)).fields for solver in LOADING_SOLVERS)
    assert found["formats"] != other["formats"] and found["config"] == other["config"]


def test_nothing_changed_is_found(kept):
    model = model_of()
    store = Remembered(model, decoder_for(model, 512, progress=False).cache, folder=kept)
    assert store.find(IDS).places == ("disk", "disk")
    assert store.find(IDS).missed is None


def test_what_is_set_while_a_chat_is_open_counts(kept, monkeypatch):
    model = model_of()
    store = Remembered(model, decoder_for(model, 512, progress=False).cache, folder=kept)
    assert store.find(IDS).places
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    found = store.find(IDS)
    assert not found.places and found.missed.reason.endswith(" then, 77 now")
    monkeypatch.undo()
    assert store.find(IDS).places


def test_code_that_quantises_counts(monkeypatch):
    files = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: files.append(path.parent.name) or real(path))
    keys._sources.__wrapped__()
    assert set(files) == {"decoding", "engine", "kernels", "memory", "model", "prefixes", "weights"}


def test_of_several_roots_the_nearest_says_what_is_another(tmp_path, monkeypatch):
    """Blocks of older versions stay in the folder: what it takes to use one of them is to be named."""
    other = tmp_path / "prefixes"
    for torch_version, chunk in [("0.1", 64), *((f"0.{at}", 32) for at in range(2, 9))]:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", torch_version)
            model = model_of(prefill_chunk=chunk)
            decoder = decoder_for(model, 512, progress=False)
            decoder.prefill(torch.tensor([IDS]))
            Remembered(model, decoder.cache, folder=other).keep(decoder.cache, IDS[:128], 0.1)
    model = model_of(prefill_chunk=64)
    store = Remembered(model, decoder_for(model, 512, progress=False).cache, folder=other)
    assert store.find(IDS).missed.reason == f"torch: 0.1 then, {torch.__version__} now"


def test_a_reason_is_never_taken_from_a_damaged_file(kept, tmp_path, monkeypatch):
    other = tmp_path / "prefixes"
    other.mkdir(mode=0o700)
    for file in kept.glob("*.safetensors"):
        data = file.read_bytes()
        assert b'"root.kv_format":"bf16"' in data
        (other / file.name).write_bytes(data.replace(b'"root.kv_format":"bf16"', b'"root.kv_format":"what"'))
    model = model_of(threads=torch.get_num_threads() + 1)
    store = Remembered(model, decoder_for(model, 512, progress=False).cache, folder=other)
    assert store.find(IDS).missed.reason == "not read before"


def test_a_place_in_the_text_is_named(kept):
    model = model_of()
    store = Remembered(model, decoder_for(model, 512, progress=False).cache, folder=kept)
    other = [*IDS[:200], IDS[200] + 1, *IDS[201:]]
    missed = store.find(other).missed
    assert (missed.token, missed.reason.split(" is ")[0]) == (128, "not read before: token 200")


def test_salts_have_no_name_in_common_and_none_is_told(tmp_path):
    model, salts = model_of(), ("", "a long secret", "a long secreu", "\udce9")
    roots = {salt: root_of(model, salt) for salt in salts}
    names = [{key.name for key in chain(root, IDS)} | {key.text for key in chain(root, IDS)} for root in roots.values()]
    assert len(set.union(*names)) == sum(map(len, names))
    # what a file tells of a salt is not what its chain begins with
    for salt, root in roots.items():
        assert not salt or (salt not in repr(root.fields) and root.seed.hex() not in repr(root.fields))
    decoder = decoder_for(model, 512, progress=False)
    decoder.prefill(torch.tensor([IDS]))
    Remembered(model, decoder.cache, "a long secret", tmp_path / "p").keep(decoder.cache, IDS[:256], 0.1)
    for file in (tmp_path / "p").iterdir():
        data = file.read_bytes() + file.name.encode()
        assert b"a long secret" not in data
        assert roots["a long secret"].seed not in data
        assert roots["a long secret"].seed.hex().encode() not in data
    for salt in salts:
        found = Remembered(model, decoder.cache, salt, tmp_path / "p").find(IDS)
        assert bool(found.places) == (salt == "a long secret")


@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "int4+4"])
@pytest.mark.parametrize("placement", ["gpu", "half", "disk"])
def test_other_weights_are_another_root_in_every_format_and_place(recipe, placement):
    """Both planes count, and weights that are mapped."""
    one = root_of(model_of(tiny_plan("llama", recipe, placement)))
    state = tiny_state("llama")
    name = "model.layers.2.mlp.down_proj.weight"
    state[name] = state[name] + 0.01 * state[name].flip(0)
    other = root_of(model_of(tiny_plan("llama", recipe, placement), state))
    assert one.difference(other.fields).startswith("weights: ")


def test_a_low_plane_alone_counts():
    model = model_of(tiny_plan("llama", "int4+4", "disk"))
    before = root_of(model)
    low = next(module.low for module in model.modules() if isinstance(module, NestedLinear))
    next(low.buffers()).view(-1).view(torch.uint8)[0] ^= 1
    assert before.difference(root_of(model).fields).startswith("weights: ")


def test_weights_of_a_file_that_has_another_s_size_and_time(tmp_path, monkeypatch):
    """As an archive leaves them, or a clock that was set back."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    roots = []
    for state in (tiny_state("llama"), random_state(tiny_spec("llama"), 77)):
        folder = write_model(tmp_path / "model", state=state)
        os.utime(folder / "model.safetensors", (1, 1))
        plan = replace(tiny_plan("llama"), remember=1 << 24)
        roots += [root_of(load(plan, open_gpu(), checkpoint=Checkpoint(folder), progress=False)) for _ in range(2)]
    assert roots[0].fields == roots[1].fields
    assert roots[2].fields == roots[3].fields
    assert roots[0].difference(roots[2].fields).startswith("weights: ")
